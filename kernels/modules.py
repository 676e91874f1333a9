"""Drop-in modules on the fused ops, with the state-dict keys of the modules that they replace.

| module | replaces | keys |
|---|---|---|
| `LayerNorm` | `nn.LayerNorm` | weight, bias |
| `MLP` | the feed-forward of CLIP and others | c_fc.*, c_proj.*, or two names of your choice |
| `Adaptor` | Prismer's residual adaptors (arXiv:2303.02506, section 3.2) | norm.*, down.*, up.* |
| `MultiheadAttention` | `nn.MultiheadAttention`, batch first | in_proj_*, out_proj.*, or four names of your choice |
| `PerceiverResampler` | Flamingo's and Prismer's resampler (arXiv:2204.14198, section 3.1.1) | latents, blocks.i.* |
| `LinearCrossEntropy` | an LM head and its loss | weight, bias |

A module with children reads their weights and does not call them. The attribute `_z3_leaf` makes DeepSpeed ZeRO-3
gather such a module as a whole (without an import of deepspeed). Under ZeRO-3, an input of a module that trains must
require a gradient.

A module reads a child only while the child is the plain layer that was built (prismer.kernels.layer_state). A child
that is adapted, quantised, pruned, parametrised, hooked, wrapped or offloaded is called, and the module runs unfused
around it. The module always reads its own weights (`in_proj_*`, the matrix of `LinearCrossEntropy`): hooks and
parametrisations of the module itself have run by then, and the ops refuse tensor classes of other libraries or run
their operators.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.kernels.activation import bias_activation
from prismer.kernels.adaptor import adaptor
from prismer.kernels.attention import attention
from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.kernels.layer_norm import add_layer_norm, layer_norm
from prismer.kernels.layer_state import has_hooks, is_plain_layer
from prismer.kernels.linear import linears
from prismer.kernels.mlp import mlp
from prismer.kernels.resampler_attention import resampler_attention, standardise


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over one dimension, with fp32 statistics. A frozen weight and bias cost no reduction."""

    def __init__(self, width: int | Sequence[int], eps: float = 1e-5, **options: Any) -> None:
        super().__init__(width, eps=eps, **options)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"normalized_shape is {self.normalized_shape}; this norm takes only one dimension, the last"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + residual) and x + residual in one pass; for modules that contain this one."""
        if has_hooks(self) or "forward" in self.__dict__ or type(self).forward is not LayerNorm.forward:
            total = x + residual
            return self(total), total
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


def apply_linear(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)`, by the fused op if the layer is a plain linear."""
    return linears(x, [(layer.weight, layer.bias)])[0] if is_plain_layer(layer) else layer(x)


def _add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and x + residual, for a norm of any class."""
    if isinstance(norm, LayerNorm):
        return norm.add(x, residual)
    total = x + residual
    return norm(total), total


class MLP(nn.Module):
    """proj(activation(fc(x))): (..., D) -> (..., D). Autograd saves one of the two hidden tensors, the pre-activation.

    Args:
        width: D.
        hidden: size between the two layers.
        activation: "quick_gelu", "gelu" (erf), "squared_relu" or "gelu_tanh".
        names: of the two linear layers.
    """

    _z3_leaf = True

    def __init__(self, width: int, hidden: int, activation: str, names: tuple[str, str] = ("c_fc", "c_proj")) -> None:
        super().__init__()
        self.activation, self.names = activation, names
        self.add_module(names[0], nn.Linear(width, hidden))
        self.add_module(names[1], nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        fc, proj = (getattr(self, name) for name in self.names)
        if not (is_plain_layer(fc) and is_plain_layer(proj)):
            return proj(bias_activation(fc(x), None, self.activation))
        return mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class Adaptor(nn.Module):
    """A residual MLP that adapts a frozen layer: (..., D) -> (..., D). Autograd saves one hidden tensor.

    `late=False` (vision): x + up(relu(down(norm(x)))^2). `late=True` (text): norm(x + up(relu(down(x))^2)).

    Args:
        width: D.
        late: whether the norm comes after the residual sum.
    """

    _z3_leaf = True

    def __init__(self, width: int, *, late: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = LayerNorm(width, eps=eps)
        self.down = nn.Linear(width, width)
        self.up = nn.Linear(width, width)
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        norm, down, up = self.norm, self.down, self.up
        if not (is_plain_layer(norm, LayerNorm) and is_plain_layer(down) and is_plain_layer(up)):
            y = x + up(bias_activation(down(x if self.late else norm(x)), None, "squared_relu"))
            return norm(y) if self.late else y
        return adaptor(
            x, norm.weight, norm.bias, down.weight, down.bias, up.weight, up.bias, late=self.late, eps=norm.eps
        )

    def extra_repr(self) -> str:
        return f"late={self.late}"


class MultiheadAttention(nn.Module):
    """Multi-head self- or cross-attention, batch first.

    Args:
        width: D of queries and output.
        num_heads: H, a divisor of D.
        context_width: width of the context if it is not D; needs `names`.
        names: None for one packed projection with the keys of `nn.MultiheadAttention`, or the names of query, key,
            value and output projection, such as ("q_proj", "k_proj", "v_proj", "out_proj").
        dropout: of the attention probabilities, in training.

    Raises:
        ValueError: if D is not a multiple of H, or `context_width` differs from D without `names`.
    """

    _z3_leaf = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        context_width: int | None = None,
        names: tuple[str, str, str, str] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} does not divide into {num_heads} heads; choose a divisor")
        if names is None and context_width not in (None, width):
            raise ValueError(
                f"one packed projection cannot take a context of width {context_width} beside {width}; pass names"
            )
        self.num_heads, self.names, self.dropout = num_heads, names, dropout
        if names is None:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
            self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
            self.out_proj = nn.Linear(width, width)
        else:
            for name, size in zip(names, (width, context_width or width, context_width or width, width), strict=True):
                self.add_module(name, nn.Linear(size, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise a packed projection like `nn.MultiheadAttention`; separate ones keep nn.Linear's values."""
        if self.names is None:
            nn.init.xavier_uniform_(self.in_proj_weight)
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def _heads(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        return x.view(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x` (B, N, D), keys and values of `context` (B, L, ...) or else of `x`: each (B, H, N or L, K)."""
        D = x.shape[-1]
        if self.names is not None:
            layers = [getattr(self, name) for name in self.names[:3]]
            if all(map(is_plain_layer, layers)):
                pairs = [(layer.weight, layer.bias) for layer in layers]
                parts = linears(x, pairs) if context is None else [*linears(x, pairs[:1]), *linears(context, pairs[1:])]
            else:
                source = x if context is None else context
                parts = [layer(t) for layer, t in zip(layers, (x, source, source), strict=True)]
        elif context is None:
            parts = list(linears(x, [(self.in_proj_weight, self.in_proj_bias)])[0].chunk(3, dim=-1))
        else:
            packed = linears(context, [(self.in_proj_weight[D:], self.in_proj_bias[D:])])[0]
            parts = [*linears(x, [(self.in_proj_weight[:D], self.in_proj_bias[:D])]), *packed.chunk(2, dim=-1)]
        q, k, v = (self._heads(part) for part in parts)
        return q, k, v

    def merge(self, out: Tensor) -> Tensor:
        """Merge the heads and project: (B, H, N, K) -> (B, N, D)."""
        layer = self.out_proj if self.names is None else self.get_submodule(self.names[3])
        return apply_linear(layer, out.transpose(1, 2).flatten(2))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, causal: bool = False, key_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, D) queries.
            context: (B, L, D or context_width) keys and values; `x` itself if None.
            causal: whether query i sees only the keys up to i.
            key_mask: (B, L) bool, True where a key is seen.

        Returns:
            (B, N, D).
        """
        q, k, v = self.project(x, context)
        dropout = self.dropout if self.training else 0.0
        return self.merge(attention(q, k, v, causal=causal, key_mask=key_mask, dropout=dropout))


class ResamplerBlock(nn.Module):
    """A pre-norm layer: latents attend to themselves and to the inputs, then pass a squared-ReLU MLP."""

    _z3_leaf = True

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.ln_2 = LayerNorm(width)
        self.ln_ff = LayerNorm(width)
        self.attn = MultiheadAttention(width, num_heads)
        self.mlp = MLP(width, 4 * width, "squared_relu")

    @property
    def folds_norm(self) -> bool:
        """Whether the inputs' norm is folded into the projections: both must be plain."""
        return is_plain_layer(self.ln_2, LayerNorm) and is_plain_layer(self.attn, MultiheadAttention)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Latents z (B, M, D), inputs x (B, L, D) -> latents (B, M, D); `folds_norm` asks for standardised inputs."""
        attn = self.attn
        if not self.folds_norm:
            y = self.ln_1(z)
            y, z = _add_norm(self.ln_ff, attn(y, torch.cat((y, self.ln_2(x)), 1)), z)
            return z + self.mlp(y)
        out = resampler_attention(
            self.ln_1(z), x, self.ln_2.weight, self.ln_2.bias, attn.in_proj_weight, attn.in_proj_bias, attn.num_heads
        )
        y, z = _add_norm(self.ln_ff, apply_linear(attn.out_proj, out), z)
        return z + self.mlp(y)


class PerceiverResampler(nn.Module):
    """Resample any number of tokens to a fixed number of latents: (B, L, D) -> (B, M, D).

    It adds no positional embeddings and has no final norm (Prismer, arXiv:2303.02506, section 3.2).

    The inputs are standardised once; each block folds the weights of its own norm into its projections.

    Args:
        width: D.
        depth: number of blocks.
        num_heads: H.
        num_latents: M.
    """

    def __init__(self, width: int, depth: int, num_heads: int, num_latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, width) * width**-0.5)
        self.blocks = nn.ModuleList(ResamplerBlock(width, num_heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x_hat = None
        z = self.latents.expand(x.shape[0], -1, -1)
        blocks: Any = self.blocks
        for block in blocks:
            if not block.folds_norm:
                z = block(z, x)
                continue
            x_hat = standardise(x, block.ln_2.eps) if x_hat is None else x_hat
            z = block(z, x_hat)
        return z


class LinearCrossEntropy(nn.Module):
    """An LM head and its label-smoothed loss, which does not form the logits; with the keys of the head's `nn.Linear`.

    Args:
        width: D.
        vocabulary: V.
        bias: whether the head has a bias.
        label_smoothing, ignore_index, reduction: as in `linear_cross_entropy`.
        device, dtype: of the parameters.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        width: int,
        vocabulary: int,
        *,
        bias: bool = True,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width, device=device, dtype=dtype))
        offset = torch.empty(vocabulary, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if offset is None else nn.Parameter(offset))
        self.label_smoothing, self.ignore_index, self.reduction = label_smoothing, ignore_index, reduction
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrix from N(0, 0.02) and set the bias to zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, labels: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """Compute the loss of hidden states.

        Args:
            x: (..., D).
            labels: (...) int64.
            row_weights: (...) factors of the losses, or None.

        Returns:
            A scalar, or (...) losses with reduction "none".
        """
        losses = linear_cross_entropy(
            x.flatten(0, -2),
            self.weight,
            self.bias,
            labels.flatten(),
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            row_weights=None if row_weights is None else row_weights.flatten(),
        )
        return losses.view(labels.shape) if self.reduction == "none" else losses

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V), for generation."""
        return F.linear(x, self.weight, self.bias)
