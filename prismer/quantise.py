"""int8 products in the frozen towers, for inference on a CPU: `quantise(model)`.

    s_n = max_d |W_nd| / 127,  W8 = round(W / s)           once, a scale for each output channel
    t_r = max_d |x_rd| / 127,  x8 = round(x / t)           at each call, a scale for each row
    y_rn = t_r s_n (sum over d of x8_rd W8_nd) + b_n       the sum exact, in int32

Each row has a scale of its own. So a caption does not depend on the other images of its batch, and a token with large
activations, which CLIP and RoBERTa have, does not cost the other tokens precision. Source: the vector-wise scheme of
LLM.int8(), arXiv:2208.07339, without its outlier columns. The products are kernels/few_rows.py's.

The attention projections and MLPs that come from CLIP and RoBERTa are quantised (`pretrained` in prismer/vision.py and
prismer/text.py). They are two thirds of an encoder's arithmetic and the same in every model of a size. Trained parts
keep their dtype: whether they tolerate int8 differs from model to model. (The adaptors of the shipped tiny do: with
them, the encoder's error rises from 0.98 to 1.04 %.)

An x86 CPU without VNNI instructions adds two products in 16 bits, which overflow if weights use all of their 8 bits
(sums were off by 19 %). There weights take 63 steps instead of 127, and sums are exact again.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from prismer.errors import InputError
from prismer.kernels.activation import bias_activation
from prismer.kernels.attention import attention
from prismer.kernels.few_rows import few_rows_linear
from prismer.kernels.modules import MLP, MultiheadAttention
from prismer.network import Model
from prismer.text import Attend, PostNormMLP, SelfAttention

_STEPS = 127
# oneDNN shifts activations to 0..255, and 2 * 255 * 63 fits into 16 bits
_SAFE_STEPS = 63
_TINY = torch.finfo(torch.float32).tiny


def weight_steps() -> int:
    """The largest int8 weight on this processor: 127, or 63 where products with larger ones overflow."""
    most = torch.full((32, 64), _STEPS, dtype=torch.int8)
    exact = torch._int_mm(most, most.T).eq(64 * _STEPS * _STEPS).all()
    return _STEPS if exact else _SAFE_STEPS


class Int8Linear(nn.Module):
    """x W^T + bias with W in int8: (..., D) -> (..., N) in the dtype of `x`, for inference alone.

    Args:
        weight: (N, D), any floating dtype.
        bias: (N,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(1).div_(weight_steps()).clamp_(min=_TINY)
        self.register_buffer("weight", (weight / scale[:, None]).round_().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def train(self, mode: bool = True) -> "Int8Linear":
        """Raise a ValueError if `mode` is True."""
        if mode:
            raise InputError("an int8 model cannot train; train the original and quantise it afterwards")
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError("int8 products have no gradient; call the model under torch.no_grad()")
        return few_rows_linear(x, self.weight, self.bias, self.scale)


class Int8Attention(nn.Module):
    """The self-attention of a `MultiheadAttention`, with its three projections packed into one."""

    def __init__(self, attn: MultiheadAttention):
        super().__init__()
        self.num_heads = attn.num_heads
        if attn.names is None:
            weight, bias, out = attn.in_proj_weight, attn.in_proj_bias, attn.out_proj
        else:
            *inputs, out = (attn.get_submodule(name) for name in attn.names)
            weight = torch.cat([layer.weight for layer in inputs])
            bias = torch.cat([layer.bias for layer in inputs])
        self.in_proj = Int8Linear(weight, bias)
        self.out_proj = Int8Linear(out.weight, out.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> queries, keys and values (B, H, N, K)."""
        packed = self.in_proj(x)
        return tuple(rearrange(packed, "b n (three h k) -> three b h n k", three=3, h=self.num_heads))

    def merge(self, out: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, N, D)."""
        return self.out_proj(rearrange(out, "b h n k -> b n (h k)"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.merge(attention(*self.project(x)))


class Int8SelfAttention(Int8Attention):
    """RoBERTa's attention sub-layer: norm(x + output(attend(q, k, v)))."""

    def __init__(self, attn: SelfAttention):
        super().__init__(attn)
        self.norm = attn.norm

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        """x: (R, Q, D)."""
        return self.norm.add(self.merge(attend(layer, *self.project(x))), x)[0]


class Int8MLP(nn.Module):
    """proj(activation(fc(x))): (..., D) -> (..., D)."""

    def __init__(self, mlp: MLP):
        super().__init__()
        fc, proj = (mlp.get_submodule(name) for name in mlp.names)
        self.activation = mlp.activation
        # bias_activation adds the first bias
        self.fc, self.proj = Int8Linear(fc.weight, None), Int8Linear(proj.weight, proj.bias)
        self.register_buffer("fc_bias", fc.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(bias_activation(self.fc(x), self.fc_bias, self.activation))


class Int8PostNormMLP(Int8MLP):
    """RoBERTa's feed-forward sub-layer: norm(x + proj(gelu(fc(x))))."""

    def __init__(self, mlp: PostNormMLP):
        super().__init__(mlp)
        self.norm = mlp.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.add(super().forward(x), x)[0]


def check_device(device: torch.device) -> None:
    """Raise a ValueError unless `device` is a CPU."""
    if device.type != "cpu":
        raise InputError(f"int8 towers are for a CPU and the device is {device}; a GPU computes in bf16")


def quantise(model: Model) -> Model:
    """Make the matrices of the frozen towers int8, in place; call it last, after loading and casting.

    Args:
        model: on a CPU, in fp32 or bf16; everything but the products of the towers keeps that dtype.

    Returns:
        `model`, in evaluation mode, without gradients; it can neither train nor be saved.

    Raises:
        ValueError: if the model is on another device, or its towers are int8 already.
    """
    check_device(model.device)
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise InputError("the model's towers are int8 already; quantise a model once")
    model.requires_grad_(False)
    for block in model.encoder.blocks:
        block.attn, block.mlp = Int8Attention(block.attn), Int8MLP(block.mlp)
    for layer in model.decoder.layers:
        layer.attention, layer.mlp = Int8SelfAttention(layer.attention), Int8PostNormMLP(layer.mlp)
    return model.eval()
