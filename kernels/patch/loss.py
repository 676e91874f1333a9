"""Rules for the head and loss of causal language models of transformers: the loss without the logits.

    apply_to(model, "loss")
    output = model(input_ids, labels=labels)  # output.loss as before; while it trains, output.logits is None

Known is every `...ForCausalLM` and `...LMHeadModel` of transformers whose forward gives the logits of a plain linear
head, unchanged, to `self.loss_function`, and that to be transformers' `ForCausalLMLoss`: the labels are shifted by
one (or come as `shift_labels`), `ignore_index` is -100 unless given, and the loss is a mean, or the sum divided by
`num_items_in_batch`. Tied and biased heads are served. Kept are models that scale or cap their logits (Gemma 2,
Cohere, Granite) or have a loss of their own (BLIP's text decoder).

A call without labels is the model's own, and so are generation and evaluation: after `model.eval()`, and under
`torch.no_grad()`, the output has its logits, for the metrics of whoever asks. In training, with labels, the head
computes the loss in its own forward, so that ZeRO-3 gathers its weight as ever; the logits never exist, and
`output.logits` is None. A batch in which every label is ignored gives 0, where a mean over nothing is NaN in
transformers.
"""

import ast
import functools
import inspect
import textwrap

import torch
import torch.nn.functional as F
from torch import nn

from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.kernels.layer_state import has_foreign_hooks, why_not
from prismer.kernels.patch.core import Rule, is_patched, own_class

_TASK = "prismer_task"


def _forward(self, *args, **kwargs):
    if args:
        kwargs.update(zip(_parameters(self.prismer_class), args, strict=False))
    labels = kwargs.get("labels")
    trains = self.training and torch.is_grad_enabled()
    # a loss may have been set since
    if labels is None or not trains or not _is_causal_loss(self):
        return self.prismer_class.forward(self, **kwargs)
    as_dict = kwargs.pop("return_dict", None)
    as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
    options = {name: kwargs.get(name) for name in ("num_items_in_batch", "ignore_index", "shift_labels")}
    head = self.get_output_embeddings()
    setattr(head, _TASK, {"labels": labels, **options})
    try:
        output = self.prismer_class.forward(self, **kwargs, return_dict=True)
    finally:
        delattr(head, _TASK)
    output = type(output)(**{name: value for name, value in output.items() if name != "logits"})
    return output if as_dict else output.to_tuple()


def _head_forward(self, x):
    """The logits; or, where the model was given labels, the loss in their place."""
    task = getattr(self, _TASK, None)
    if task is None:
        return F.linear(x, self.weight, self.bias)
    ignore = -100 if task["ignore_index"] is None else task["ignore_index"]
    targets, count = task["shift_labels"], task["num_items_in_batch"]
    if targets is None:
        targets = F.pad(task["labels"], (0, 1), value=ignore)[..., 1:]
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
        ignore_index=ignore,
        reduction="mean" if count is None else "sum",
    )
    if count is None:
        return loss
    return loss / (count.to(loss.device) if hasattr(count, "to") else count)


def _get_loss_function(self):
    head = self.get_output_embeddings()
    if getattr(head, _TASK, None) is None:
        return self.prismer_class.loss_function.fget(self)
    return functools.partial(_finished_loss, head)


def _set_loss_function(self, function):
    self.prismer_class.loss_function.fset(self, function)


def _finished_loss(head, logits, labels, vocab_size, **kwargs):
    # what the model takes for its logits is the loss that the head has computed
    if vocab_size != head.out_features:
        raise ValueError(
            f"the config says a vocabulary of {vocab_size}, the head has {head.out_features} rows; "
            f"set config.vocab_size, as resize_token_embeddings does"
        )
    return logits


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _is_causal_loss(model) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return model.loss_function is ForCausalLMLoss


def _head_name(model) -> list[str]:
    head = model.get_output_embeddings()
    return [next(name for name, module in model.named_modules() if module is head)]


def _check(model):
    head = model.get_output_embeddings()
    if own_class(head) is not nn.Linear:
        return f"its head is a {type(head).__name__} (quantised, adapted or wrapped), not a plain layer"
    if is_patched(model) and not is_patched(head):
        return "its head was set after it was patched; call undo() and apply_to() again to have the fused loss"
    name = _head_name(model)[0]
    reason = why_not(name, head, hooks=False) or _listened("head", head)
    if reason is not None:
        return reason
    if not is_patched(model) and not _is_causal_loss(model):
        return "its loss is not transformers' ForCausalLMLoss"
    first, *path = name.split(".")
    if not hands_on_logits(own_class(model), first):
        return "its forward does more with the logits or labels than hand them to self.loss_function"
    module = model.get_submodule(first)
    for child in path:
        reason = _listened(first, module)
        if reason is not None:
            return reason
        if not ends_with(type(module), child):
            return f"its {first} does more than end with the linear head"
        module = module.get_submodule(child)
    return None


def _listened(name: str, module: nn.Module) -> str | None:
    """Why what goes through this module has to be logits."""
    if has_foreign_hooks(module):
        return f"its {name} has hooks, which would see the loss in place of the logits"
    if "forward" in module.__dict__:
        return f"its {name} has a forward on the instance (offloaded or wrapped), which hides that of its class"
    return None


@functools.cache
def hands_on_logits(kind: type, head: str) -> bool:
    """Whether `forward`, as written, makes its logits by self.<head>(...), for the loss and the output alone.

    Args:
        kind: the model's class.
        head: name of the attribute that is called.
    """
    tree = _source(kind)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    made = losses = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or node.id not in ("logits", "labels"):
            continue
        parent = parents[node]
        holder = parents[parent] if isinstance(parent, ast.keyword) else parent
        if isinstance(node.ctx, ast.Store):
            if node.id == "labels" or not isinstance(parent, ast.Assign) or not _calls(parent.value, head):
                return False
            made += 1
        elif isinstance(holder, ast.Call) and _is_own(holder.func, "loss_function"):
            losses += node.id == "logits"
        elif isinstance(holder, ast.Call):
            if node.id == "labels" or not isinstance(parents[holder], ast.Return):
                return False
        elif node.id == "logits" or not isinstance(holder, ast.Compare):
            return False
    return made == losses == 1


@functools.cache
def ends_with(kind: type, child: str) -> bool:
    """Whether `forward`, as written, returns what self.<child>(...) gives."""
    *_, before, last = [None, *_source(kind).body[0].body]
    if not isinstance(last, ast.Return):
        return False
    if isinstance(last.value, ast.Name) and isinstance(before, ast.Assign):
        (target,) = before.targets
        return isinstance(target, ast.Name) and target.id == last.value.id and _calls(before.value, child)
    return _calls(last.value, child)


def _source(kind: type) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))


def _calls(node: ast.AST, name: str) -> bool:
    """Is it self.<name>(...), with .contiguous() behind it or not?"""
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute) and node.func.attr == "contiguous" and not node.args:
        return _calls(node.func.value, name)
    return _is_own(node.func, name)


def _is_own(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) == ("self", name)
    )


_METHODS = {"forward": _forward, "loss_function": property(_get_loss_function, _set_loss_function)}
RULES = tuple(
    Rule(
        "loss",
        f"transformers.models.*.{name}",
        _METHODS,
        _check,
        covers=False,
        inner=(_head_name, {"forward": _head_forward}),
    )
    for name in ("*ForCausalLM", "*LMHeadModel")
)
