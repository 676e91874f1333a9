"""Rules for the head and loss of causal language models of transformers: the loss without the logits.

    apply_to(model, "loss")
    output = model(input_ids, labels=labels)  # output.loss as before; in training, output.logits is None

Supported is every `...ForCausalLM` and `...LMHeadModel` of transformers whose forward passes the logits of a plain
linear head, unchanged, to `self.loss_function`, if that function is transformers' `ForCausalLMLoss`: the labels are
shifted by one (or given as `shift_labels`), `ignore_index` defaults to -100, and the loss is a mean, or the sum
divided by `num_items_in_batch`. The head may be tied and may have a bias. Models that scale or cap their logits
(Gemma 2, Cohere, Granite) or have a loss of their own (BLIP's text decoder) are kept.

The fused loss runs in training with labels. A call without labels, a model after `model.eval()` and a call under
`torch.no_grad()` run the original forward, so that generation and metrics have their logits. The head computes the loss
inside its own forward, where ZeRO-3 has gathered its weight. The logits never exist, and `output.logits` is None. If
every label is ignored, the fused loss is 0; transformers' mean is NaN.
"""

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.kernels.layer_state import has_foreign_hooks, reason_not_plain
from prismer.kernels.patch.rules import Rule, is_patched, unpatched_class

# the attribute that asks the head for the loss in place of the logits, during one call of the model
_LOSS_ARGUMENTS = "prismer_loss_arguments"


# what the patched model and its head do


def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if args:
        kwargs.update(zip(_parameter_names(self.unpatched_class), args, strict=False))
    labels = kwargs.get("labels")
    is_training = self.training and torch.is_grad_enabled()
    # the user may have set another loss_function since patching
    if labels is None or not is_training or not _has_causal_loss(self):
        return self.unpatched_class.forward(self, **kwargs)
    as_dict = kwargs.pop("return_dict", None)
    as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
    options = {name: kwargs.get(name) for name in ("num_items_in_batch", "ignore_index", "shift_labels")}
    head = self.get_output_embeddings()
    setattr(head, _LOSS_ARGUMENTS, {"labels": labels, **options})
    try:
        output = self.unpatched_class.forward(self, **kwargs, return_dict=True)
    finally:
        delattr(head, _LOSS_ARGUMENTS)
    output = type(output)(**{name: value for name, value in output.items() if name != "logits"})
    return output if as_dict else output.to_tuple()


def _head_forward(self: nn.Linear, x: Tensor) -> Tensor:
    """The logits, or the loss in their place if the model asks for it."""
    arguments = getattr(self, _LOSS_ARGUMENTS, None)
    if arguments is None:
        return F.linear(x, self.weight, self.bias)
    ignore_index = -100 if arguments["ignore_index"] is None else arguments["ignore_index"]
    targets, count = arguments["shift_labels"], arguments["num_items_in_batch"]
    if targets is None:
        targets = F.pad(arguments["labels"], (0, 1), value=ignore_index)[..., 1:]
    if targets.numel() != x.numel() // x.shape[-1]:
        raise ValueError(
            f"labels of shape {tuple(targets.shape)} do not fit hidden states {tuple(x.shape)}; "
            f"pass one label for each position, and leave logits_to_keep at 0"
        )
    loss = linear_cross_entropy(
        x.flatten(0, -2),
        self.weight,
        self.bias,
        targets.flatten().to(x.device),
        label_smoothing=0.0,
        ignore_index=ignore_index,
        reduction="mean" if count is None else "sum",
    )
    if count is None:
        return loss
    return loss / (count.to(loss.device) if hasattr(count, "to") else count)


def _get_loss_function(self: Any) -> Any:
    head = self.get_output_embeddings()
    if getattr(head, _LOSS_ARGUMENTS, None) is None:
        return self.unpatched_class.loss_function.fget(self)
    return functools.partial(_pass_loss_on, head)


def _set_loss_function(self: Any, function: Any) -> None:
    self.unpatched_class.loss_function.fset(self, function)


def _pass_loss_on(head: nn.Linear, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    """Stand in for the model's loss function: its logits are the loss that the head has computed."""
    if vocab_size != head.out_features:
        raise ValueError(
            f"the config says a vocabulary of {vocab_size}, the head has {head.out_features} rows; "
            f"set config.vocab_size, as resize_token_embeddings does"
        )
    return logits


@functools.cache
def _parameter_names(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


# when a model is kept


def _has_causal_loss(model: Any) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return model.loss_function is ForCausalLMLoss


def _find_head(model: Any) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _check(model: Any) -> str | None:
    head = model.get_output_embeddings()
    if unpatched_class(head) is not nn.Linear:
        return f"its head is a {type(head).__name__} (quantised, adapted or wrapped), not a plain layer"
    if is_patched(model) and not is_patched(head):
        return "its head was replaced after it was patched; call undo() and apply_to() again for the fused loss"
    name = _find_head(model)
    reason = reason_not_plain(name, head, is_called=True) or _reason_needs_logits("head", head)
    if reason is not None:
        return reason
    if not is_patched(model) and not _has_causal_loss(model):
        return "its loss is not transformers' ForCausalLMLoss"
    first, *path = name.split(".")
    kind: Any = unpatched_class(model)
    if not only_passes_logits_to_loss(kind, first):
        return "its forward does more with the logits or labels than pass them to self.loss_function"
    module: Any = model.get_submodule(first)
    for child in path:
        reason = _reason_needs_logits(first, module)
        if reason is not None:
            return reason
        if not _returns_output_of(module.__class__, child):
            return f"its {first} does more than end with the linear head"
        module = module.get_submodule(child)
    return None


def _reason_needs_logits(name: str, module: nn.Module) -> str | None:
    """Keep a model if hooks or wrappers of this module expect logits to pass through it."""
    if has_foreign_hooks(module):
        return f"its {name} has hooks, which would see the loss in place of the logits"
    if "forward" in module.__dict__:
        return f"its {name} has a forward on the instance (offloaded or wrapped), which hides that of its class"
    return None


@functools.cache
def only_passes_logits_to_loss(kind: Any, head: str) -> bool:
    """Whether the source of `forward` computes logits once, with self.<head>(...), for the loss and the output alone.

    Args:
        kind: the model's class.
        head: name of the attribute that is called.
    """
    tree = _parse_forward(kind)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    assignments = losses = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or node.id not in ("logits", "labels"):
            continue
        parent = parents[node]
        user = parents[parent] if isinstance(parent, ast.keyword) else parent
        if isinstance(node.ctx, ast.Store):
            if node.id == "labels" or not isinstance(parent, ast.Assign) or not _calls(parent.value, head):
                return False
            assignments += 1
        elif isinstance(user, ast.Call) and _is_attribute_of_self(user.func, "loss_function"):
            losses += node.id == "logits"
        elif isinstance(user, ast.Call):
            # the construction of the output
            if node.id == "labels" or not isinstance(parents[user], ast.Return):
                return False
        elif node.id == "logits" or not isinstance(user, ast.Compare):
            return False
    return assignments == losses == 1


@functools.cache
def _returns_output_of(kind: Any, child: str) -> bool:
    """Whether the source of `forward` ends by returning self.<child>(...)."""
    body = _parse_forward(kind).body
    if not isinstance(body[-1], ast.Return):
        return False
    value = body[-1].value
    if isinstance(value, ast.Name) and len(body) > 1 and isinstance(body[-2], ast.Assign):
        (target,) = body[-2].targets
        return isinstance(target, ast.Name) and target.id == value.id and _calls(body[-2].value, child)
    return _calls(value, child)


def _parse_forward(kind: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))).body[0]


def _calls(node: ast.AST | None, name: str) -> bool:
    """Whether this is self.<name>(...), with or without .contiguous() behind it."""
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute) and node.func.attr == "contiguous" and not node.args:
        return _calls(node.func.value, name)
    return _is_attribute_of_self(node.func, name)


def _is_attribute_of_self(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) == ("self", name)
    )


RULES = tuple(
    Rule(
        "loss",
        f"transformers.models.*.{name}",
        {"forward": _model_forward, "loss_function": property(_get_loss_function, _set_loss_function)},
        _check,
        covers=False,
        find_head=_find_head,
        head_methods={"forward": _head_forward},
    )
    for name in ("*ForCausalLM", "*LMHeadModel")
)
