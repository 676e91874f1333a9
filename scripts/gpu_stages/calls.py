"""Calls of every op at the shapes of the model and at edge shapes, each beside the same in plain PyTorch.

Letters: B images, N image tokens or queries, L keys, M latents or slots, R rows, D and E widths, H heads, K head size,
V vocabulary, S keys that queries share, A listed slots, Q queries of a row, F rows of a table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import LOSS_ROWS, MODELS, NUM_LATENTS, RESAMPLER_HEADS, TEXT_TOKENS, VOCABULARY, Model
from prismer.kernels import (
    activation,
    adaptor,
    attention,
    cross_attention,
    cross_entropy,
    decode_attention,
    instance_rows,
    label_map,
    layer_norm,
    linear,
    mlp,
    resampler_attention,
)
from prismer.kernels.dispatch import Op

Shape = dict[str, int]
# a caption of three beams: "A picture of" with its <s>, and the cache slots of 16 new tokens less the last
BEAMS, PROMPT, NEW_TOKENS = 3, 4, 16


@dataclass(frozen=True, kw_only=True)
class OpCalls:
    """How an op is called.

    Attributes:
        op: its contract.
        draw: takes a shape and gives the arguments: fp32 tensors to cast, integer tensors and plain values.
        ours, plain: take the arguments and give a tensor or several; plain is what a user would write.
        real: takes a model and a batch and gives the shape of the model's own call.
        edges: shapes that hurt.
        tiny: the shape of quick runs.
        trained: whether it has a gradient.
    """

    op: Op
    draw: Callable[..., list]
    ours: Callable
    plain: Callable
    real: Callable[[Model, int], Shape]
    edges: Sequence[Shape]
    tiny: Shape
    trained: bool = True


def _linear(out: int, width: int) -> list[Tensor]:
    return [torch.randn(out, width) / width**0.5, torch.randn(out)]


def _heads(x: Tensor, H: int) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, H: int) -> Tensor:
    out = F.scaled_dot_product_attention(*(_heads(t, H) for t in (q, k, v)))
    return out.transpose(1, 2).flatten(2)


def _plain_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


def _quick_gelu(h: Tensor) -> Tensor:
    return h * torch.sigmoid(1.702 * h)


def _plain_adaptor(x, gamma, beta, down, down_bias, up, up_bias, late):
    u = x if late else F.layer_norm(x, x.shape[-1:], gamma, beta)
    total = x + F.linear(F.relu(F.linear(u, down, down_bias)).square(), up, up_bias)
    return F.layer_norm(total, x.shape[-1:], gamma, beta) if late else total


def _draw_adaptor(late: bool) -> Callable[..., list]:
    return lambda R, D: [torch.randn(R, D), 1 + torch.randn(D), torch.randn(D), *_linear(D, D), *_linear(D, D), late]


def _draw_attention(B: int, H: int, N: int, L: int, K: int, causal: int = 0, masked: int = 0) -> list:
    q, k, v = (torch.randn(B, n, H, K).transpose(1, 2) for n in (N, L, L))
    mask = torch.arange(L).expand(B, L) < torch.randint(1, L + 1, (B, 1)) if masked else None
    return [q, k, v, bool(causal), mask]


def _plain_attention(q, k, v, causal, mask):
    seen = None
    if causal or mask is not None:
        seen = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        seen = seen.tril() if causal else seen
        seen = seen if mask is None else seen & mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, seen)


def _draw_decode(R: int, H: int, Q: int, S: int, M: int, A: int, K: int = 64) -> list:
    keys = [torch.randn(R, H, n, K) for n in (S, S, M, M)]
    listed = torch.rand(R, Q, M).argsort(-1)[..., :A]
    return [torch.randn(R, H, Q, K), *keys[:2], torch.ones(R, S, dtype=torch.bool), *keys[2:], listed]


def _plain_decode(q, shared_k, shared_v, shared_mask, suffix_k, suffix_v, listed):
    """One masked attention over all keys side by side, as a cache that is padded to its longest holds them."""
    R, _, Q, _ = q.shape
    seen = torch.zeros(R, Q, suffix_k.shape[2], dtype=torch.bool, device=q.device).scatter_(2, listed, True)
    mask = torch.cat((shared_mask[:, None].expand(-1, Q, -1), seen), -1)[:, None]
    k, v = torch.cat((shared_k, suffix_k), 2), torch.cat((shared_v, suffix_v), 2)
    return F.scaled_dot_product_attention(q, k, v, mask)


def _draw_label_map(B: int, s: int, size: int, F: int) -> list:
    ids = torch.randint(0, 256, (B, -(-s // 8), -(-s // 8)), dtype=torch.uint8)
    ids = ids.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :s, :s].contiguous()
    return [ids, torch.randint(0, F, (B, 256)), torch.randn(F, 64), size]


def _plain_label_map(ids, rows, features, size):
    batch = torch.arange(ids.shape[0], device=ids.device)[:, None, None]
    full = features[rows[batch, ids.long()]].permute(0, 3, 1, 2)
    return F.interpolate(full, (size, size), mode="bilinear", align_corners=True)


def _draw_instances(B: int, s: int, grid: int, F: int, D: int) -> list:
    ids = torch.randint(0, 256, (B, s, s), dtype=torch.uint8)
    rows = torch.randperm(256) % F
    return [torch.randn(B, grid * grid, D), ids, torch.randn(F, D), rows, grid, torch.randn(grid * grid, D)]


def _plain_instances(x, ids, table, rows, grid, positions):
    cells = torch.arange(grid, device=ids.device) * ids.shape[1] // grid
    return x + table[rows[ids[:, cells[:, None], cells].flatten(1).long()]] + positions


def _draw_resampler(B: int, M: int, L: int, D: int, H: int) -> list:
    affine = [1 + 0.1 * torch.randn(D), torch.randn(D)]
    x_hat = F.layer_norm(torch.randn(B, L, D), (D,))
    return [torch.randn(B, M, D), x_hat, *affine, torch.randn(3 * D, D) / D**0.5, torch.randn(3 * D), H]


def _plain_resampler(query, x_hat, gamma, beta, weight, bias, H):
    D = query.shape[-1]
    keys = torch.cat((query, x_hat * gamma + beta), 1)
    q = F.linear(query, weight[:D], bias[:D])
    return _sdpa(q, *F.linear(keys, weight[D:], bias[D:]).chunk(2, -1), H)


def _draw_loss(R: int, D: int, V: int) -> list:
    labels = torch.randint(0, V, (R,))
    labels[1::7] = -100
    return [torch.randn(R, D), torch.randn(V, D) / D**0.5, torch.randn(V), labels]


def _plain_loss(x, weight, bias, labels):
    logits = F.linear(x, weight, bias)
    logits = logits if x.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")


def _rows(model: Model, batch: int) -> Shape:
    return dict(R=batch * model.tokens, D=model.width)


_ROW_EDGES = (dict(R=1, D=1), dict(R=7, D=61), dict(R=5, D=1023), dict(R=3, D=1025))
_PRODUCT_EDGES = (dict(R=1, D=16), dict(R=7, D=61), dict(R=65, D=65))

CALLS: dict[str, OpCalls] = {
    "layer_norm": OpCalls(
        op=layer_norm.OP,
        draw=lambda R, D: [2 * torch.randn(R, D) + 1, 1 + torch.randn(D), torch.randn(D)],
        ours=layer_norm.layer_norm,
        plain=lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
        real=_rows,
        edges=_ROW_EDGES,
        tiny=dict(R=5, D=48),
    ),
    "add_layer_norm": OpCalls(
        op=layer_norm.OP,
        draw=lambda R, D: [2 * torch.randn(R, D) + 1, torch.randn(R, D), 1 + torch.randn(D), torch.randn(D)],
        ours=layer_norm.add_layer_norm,
        plain=_plain_add_norm,
        real=lambda m, batch: dict(R=batch * TEXT_TOKENS, D=m.text_width),
        edges=_ROW_EDGES,
        tiny=dict(R=5, D=48),
    ),
    "bias_activation": OpCalls(
        op=activation.OP,
        draw=lambda R, D: [2 * torch.randn(R, D), torch.randn(D), "quick_gelu"],
        ours=activation.bias_activation,
        plain=lambda h, bias, _: _quick_gelu(h + bias),
        real=lambda m, batch: dict(R=batch * m.tokens, D=4 * m.width),
        edges=_ROW_EDGES,
        tiny=dict(R=5, D=48),
    ),
    "mlp": OpCalls(
        op=mlp.OP,
        draw=lambda R, D: [torch.randn(R, D), *_linear(4 * D, D), *_linear(D, 4 * D), "quick_gelu"],
        ours=lambda *t: mlp.mlp(*t[:-1], activation=t[-1]),
        plain=lambda x, w1, b1, w2, b2, _: F.linear(_quick_gelu(F.linear(x, w1, b1)), w2, b2),
        real=_rows,
        edges=_PRODUCT_EDGES,
        tiny=dict(R=5, D=16),
    ),
    "adaptor": OpCalls(
        op=adaptor.OP,
        draw=_draw_adaptor(False),
        ours=lambda *t: adaptor.adaptor(*t[:-1], late=t[-1]),
        plain=_plain_adaptor,
        real=_rows,
        edges=_PRODUCT_EDGES,
        tiny=dict(R=5, D=16),
    ),
    "adaptor_late": OpCalls(
        op=adaptor.OP,
        draw=_draw_adaptor(True),
        ours=lambda *t: adaptor.adaptor(*t[:-1], late=t[-1]),
        plain=_plain_adaptor,
        real=lambda m, batch: dict(R=batch * TEXT_TOKENS, D=m.text_width),
        edges=_PRODUCT_EDGES[1:],
        tiny=dict(R=5, D=16),
    ),
    "linears": OpCalls(
        op=linear.OP,
        draw=lambda R, D: [torch.randn(R, D), *_linear(D, D), *_linear(D, D), *_linear(D, D)],
        ours=lambda x, *t: linear.linears(x, list(zip(t[::2], t[1::2], strict=True))),
        plain=lambda x, *t: [F.linear(x, *layer) for layer in zip(t[::2], t[1::2], strict=True)],
        real=_rows,
        edges=_PRODUCT_EDGES,
        tiny=dict(R=5, D=16),
    ),
    "attention": OpCalls(
        op=attention.OP,
        draw=_draw_attention,
        ours=lambda q, k, v, causal, mask: attention.attention(q, k, v, causal=causal, key_mask=mask),
        plain=_plain_attention,
        real=lambda m, batch: dict(B=batch, H=m.heads, N=m.tokens, L=m.tokens, K=64),
        edges=(
            dict(B=2, H=12, N=TEXT_TOKENS, L=TEXT_TOKENS, K=64, causal=1, masked=1),
            dict(B=2, H=12, N=TEXT_TOKENS, L=964, K=64),
            dict(B=1, H=2, N=1, L=3, K=32),
            dict(B=3, H=1, N=65, L=65, K=32, causal=1),
            dict(B=3, H=1, N=17, L=45, K=64, masked=1),
            dict(B=1, H=8, N=64, L=1240, K=96),
            dict(B=1, H=8, N=64, L=260, K=160),
        ),
        tiny=dict(B=1, H=2, N=5, L=7, K=32),
    ),
    "cross_attention": OpCalls(
        op=cross_attention.OP,
        draw=lambda B, N, L, D, E, H: [
            torch.randn(B, N, D),
            torch.randn(B, L, E),
            *_linear(D, E),
            *_linear(D, E),
            H,
        ],
        ours=cross_attention.cross_attention,
        plain=lambda q, c, kw, kb, vw, vb, H: _sdpa(q, F.linear(c, kw, kb), F.linear(c, vw, vb), H),
        real=lambda m, batch: dict(B=batch, N=TEXT_TOKENS, L=m.tokens, D=m.text_width, E=m.width, H=m.text_heads),
        edges=(dict(B=1, N=1, L=2, D=16, E=16, H=1), dict(B=3, N=5, L=23, D=24, E=40, H=3)),
        tiny=dict(B=2, N=3, L=7, D=16, E=24, H=2),
    ),
    "decode_attention": OpCalls(
        op=decode_attention.OP,
        draw=_draw_decode,
        ours=decode_attention.decode_attention,
        plain=_plain_decode,
        real=lambda m, batch: dict(
            R=batch, H=m.text_heads, Q=BEAMS, S=PROMPT, M=BEAMS * (NEW_TOKENS - 1), A=NEW_TOKENS
        ),
        edges=(
            # 128 answers as a trie, to a question of 16 tokens
            dict(R=1, H=12, Q=217, S=16, M=217, A=4),
            dict(R=1, H=1, Q=1, S=1, M=1, A=1),
            dict(R=2, H=3, Q=7, S=13, M=17, A=3, K=80),
        ),
        tiny=dict(R=2, H=2, Q=3, S=4, M=6, A=2, K=16),
        trained=False,
    ),
    "label_map": OpCalls(
        op=label_map.OP,
        draw=_draw_label_map,
        ours=label_map.label_map,
        plain=_plain_label_map,
        real=lambda m, batch: dict(B=batch, s=224, size=64 if m.width == 1024 else 56, F=150),
        edges=(dict(B=1, s=1, size=3, F=1), dict(B=2, s=9, size=9, F=37), dict(B=2, s=23, size=11, F=67)),
        tiny=dict(B=1, s=12, size=5, F=9),
    ),
    "instance_rows": OpCalls(
        op=instance_rows.OP,
        draw=_draw_instances,
        ours=instance_rows.add_instance_rows,
        plain=_plain_instances,
        real=lambda m, batch: dict(B=batch, s=224, grid=16 if m.width == 1024 else 14, F=128, D=m.width),
        edges=(dict(B=1, s=1, grid=1, F=1, D=1), dict(B=3, s=23, grid=5, F=37, D=61)),
        tiny=dict(B=1, s=9, grid=3, F=7, D=16),
    ),
    "resampler_attention": OpCalls(
        op=resampler_attention.OP,
        draw=_draw_resampler,
        ours=resampler_attention.resampler_attention,
        plain=_plain_resampler,
        real=lambda m, batch: dict(B=batch, M=NUM_LATENTS, L=m.expert_tokens, D=m.width, H=RESAMPLER_HEADS),
        edges=(dict(B=3, M=7, L=13, D=15, H=3), dict(B=1, M=65, L=129, D=32, H=2)),
        tiny=dict(B=2, M=4, L=9, D=32, H=2),
    ),
    "linear_cross_entropy": OpCalls(
        op=cross_entropy.OP,
        draw=_draw_loss,
        ours=lambda *t: cross_entropy.linear_cross_entropy(*t, reduction="sum"),
        plain=_plain_loss,
        real=lambda m, batch: dict(R=batch * LOSS_ROWS // 32, D=m.text_width, V=VOCABULARY),
        edges=(dict(R=1, D=60, V=33), dict(R=23, D=17, V=101), dict(R=130, D=24, V=1030)),
        tiny=dict(R=5, D=16, V=37),
    ),
}

BASE, LARGE = MODELS[1], MODELS[3]


def draw(calls: OpCalls, shape: Shape, device: str) -> list:
    """The arguments of a call, the same at every time, drawn on the device: a CPU would need a minute for all."""
    torch.manual_seed(0)
    with torch.device(device):
        return calls.draw(**shape)


def cast(arguments: list, dtype: torch.dtype, device: str, trained: bool) -> list:
    """The arguments on a device, floats in `dtype`; they require a gradient if `trained`."""
    return [
        a
        if not isinstance(a, Tensor)
        else a.to(device, dtype).detach().requires_grad_(trained)
        if a.is_floating_point()
        else a.to(device)
        for a in arguments
    ]


def run(function: Callable, arguments: list, dy: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """The outputs of a call by name and, with `dy`, the gradients of its float arguments.

    Args:
        dy: gives the gradient of an output; None runs the forward pass alone.
    """
    if dy is None:
        with torch.no_grad():
            return {f"y{i}": y for i, y in enumerate(_tensors(function(*arguments)))}
    outputs = _tensors(function(*arguments))
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    grads = torch.autograd.grad(outputs, leaves, [dy(y) for y in outputs])
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{i}": g for i, g in enumerate(grads)}


def _tensors(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


class Upstream:
    """Random gradients of outputs, the same for the same place and shape in every dtype and at every call."""

    def __init__(self) -> None:
        self.drawn: dict[tuple, Tensor] = {}

    def __call__(self, y: Tensor) -> Tensor:
        key = tuple(y.shape), y.dtype, y.device
        if key not in self.drawn:
            generator = torch.Generator(y.device).manual_seed(1)
            # numbers of bf16, which are the same in every dtype
            dy = torch.randn(y.shape, generator=generator, device=y.device).bfloat16()
            self.drawn[key] = (dy if y.dim() else torch.ones_like(dy)).to(y.dtype)
        return self.drawn[key]
