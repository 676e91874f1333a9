"""Rules for the vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL of transformers: images of any size in one row.

| class | what is fused |
|---|---|
| attention | projection, rotary positions in two dimensions, attention of segments of one length in one call |
| block | first residual + norm (layer norm, or RMS norm in Qwen2.5-VL) |
| MLP | QuickGELU, tanh GELU, or gated SiLU |
| merger | its two layers |

`cu_seqlens` gives the segments: images, frames, or the windows of Qwen2.5-VL. torch's attention runs once for each
segment in the original forward, and here once for each run of segments of one length: once for images of one size, and
for whole windows once in all.

Another attention implementation than "sdpa" runs the original forward, and so does active attention dropout.
"""

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from prismer.kernels.attention import attention
from prismer.kernels.patch.layers import (
    add_norm,
    apply_gated_mlp,
    apply_linears,
    apply_mlp,
    reason_activation,
    reason_not_swiglu,
    transformers_class,
)
from prismer.kernels.patch.rms_norm import rms_norm
from prismer.kernels.patch.rotary import rotary
from prismer.kernels.patch.rules import RMS_NORMS, Rule, reason_wrong_class

# RMS norms, also of other families


def _rms_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


# attention


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    if (
        self.config._attn_implementation != "sdpa"
        or cu_seqlens is None
        or position_embeddings is None
        or any(t.requires_grad for t in position_embeddings)
        or (self.training and self.attention_dropout > 0)
    ):
        return NotImplemented
    cos, sin = position_embeddings
    qkv = apply_linears(hidden_states, self.qkv)[0]
    qkv = rotary(qkv.view(1, len(qkv), 3, self.num_heads, -1), cos, sin, 2)[0]
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return self.proj(_attend_segments(qkv, lengths, self.scaling))


def _attend_segments(qkv: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Attention inside each segment of a row of tokens: (S, 3, H, K) -> (S, H K)."""
    runs = [(length, len(list(run))) for length, run in groupby(filter(None, lengths))]
    outputs = []
    for (length, count), part in zip(runs, qkv.split([length * count for length, count in runs]), strict=True):
        q, k, v = part.unflatten(0, (count, length)).permute(2, 0, 3, 1, 4).unbind(0)
        outputs.append(attention(q, k, v, scale=scale).transpose(1, 2).reshape(count * length, -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


# blocks, MLPs and mergers


def _block_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    attended = self.attn(self.norm1(hidden_states), *args, **kwargs)
    normed, hidden_states = add_norm(attended, hidden_states, self.norm2)
    return hidden_states + self.mlp(normed)


def _gated_forward(self: Any, hidden_state: Tensor) -> Tensor:
    return apply_gated_mlp(hidden_state, self.gate_proj, self.up_proj, self.down_proj)


def _qwen2_mlp_forward(self: Any, x: Tensor) -> Tensor:
    return apply_mlp(x, self.fc1, self.act, self.fc2)


def _qwen3_mlp_forward(self: Any, hidden_state: Tensor) -> Tensor:
    return apply_mlp(hidden_state, self.linear_fc1, self.act_fn, self.linear_fc2)


def _qwen2_merger_forward(self: Any, x: Tensor) -> Tensor:
    return apply_mlp(self.ln_q(x).view(-1, self.hidden_size), *self.mlp)


def _qwen3_merger_forward(self: Any, x: Tensor) -> Tensor:
    x = self.norm(x.view(-1, self.hidden_size) if self.use_postshuffle_norm else x).view(-1, self.hidden_size)
    return apply_mlp(x, self.linear_fc1, self.act_fn, self.linear_fc2)


def _check_qwen2_merger(module: nn.Module) -> str | None:
    reason = reason_wrong_class(module, {"mlp": "torch.nn.modules.container.Sequential"})
    if reason is None and len(module.get_submodule("mlp")._modules) != 3:
        return "its mlp is not two linear layers and an activation"
    return reason or reason_activation("mlp.1", module)


# the rules


def _qwen_rules() -> Iterator[Rule]:
    for target in RMS_NORMS:
        yield Rule("layer_norm", target, {"forward": _rms_norm_forward}, one_dtype=True)
    qwen2, qwen25 = partial(transformers_class, "qwen2_vl"), partial(transformers_class, "qwen2_5_vl")
    qwen3 = [partial(transformers_class, family) for family in ("qwen3_vl", "qwen3_vl_moe")]
    names3 = list(zip(qwen3, ("Qwen3VL", "Qwen3VLMoe"), strict=True))

    attentions = [qwen2("VisionAttention"), qwen25("Qwen2_5_VLVisionAttention")]
    for target in (*attentions, *(named(f"{name}VisionAttention") for named, name in names3)):
        yield Rule("attention", target, {"forward": _attention_forward}, reads=("qkv",), covers=("qkv",))

    blocks = [qwen2("Qwen2VLVisionBlock"), qwen25("Qwen2_5_VLVisionBlock")]
    for target in (*blocks, *(named(f"{name}VisionBlock") for named, name in names3)):
        forward, norm = {"forward": _block_forward}, ("norm2",)
        yield Rule("layer_norm", target, forward, reads=norm, covers=norm, one_dtype="2_5" in target)

    fc = ("fc1", "fc2")
    yield Rule("mlp", qwen2("VisionMlp"), {"forward": _qwen2_mlp_forward}, partial(reason_activation, "act"), reads=fc)
    yield Rule(
        "mlp",
        qwen25("Qwen2_5_VLMLP"),
        {"forward": _gated_forward},
        partial(reason_not_swiglu, "act_fn"),
        reads=("gate_proj", "up_proj", "down_proj"),
        one_dtype=True,
    )
    for target in (qwen2("PatchMerger"), qwen25("Qwen2_5_VLPatchMerger")):
        forward, reads = {"forward": _qwen2_merger_forward}, ("mlp.0", "mlp.2")
        yield Rule("mlp", target, forward, _check_qwen2_merger, reads=reads, covers=("mlp",))
    fc = ("linear_fc1", "linear_fc2")
    check = partial(reason_activation, "act_fn")
    for named, name in names3:
        yield Rule("mlp", named(f"{name}VisionMLP"), {"forward": _qwen3_mlp_forward}, check, reads=fc)
        target, forward = named(f"{name}VisionPatchMerger"), {"forward": _qwen3_merger_forward}
        yield Rule("mlp", target, forward, check, reads=fc, covers=(*fc, "act_fn"))


RULES = tuple(_qwen_rules())
