"""PerceiverResampler: any number of expert tokens -> a fixed number of latents (spec 1.5)."""

import torch
from torch import Tensor, nn

from prismer.layers import MLP, LayerNorm, PackedAttention


class ResamplerBlock(nn.Module):
    """Latents attend to themselves and to the expert tokens, then pass a squared-ReLU MLP; both residual, pre-norm."""

    _z3_leaf = True
    # ZeRO-3 gathers the block's parameters at once, instead of each layer's by hooks of its own

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.ln_2 = LayerNorm(width)
        self.ln_ff = LayerNorm(width)
        self.attn = PackedAttention(width, heads)
        self.mlp = MLP(width, 4 * width, "squared_relu")

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """z: (B, M, D) latents; x: (B, N, D) expert tokens. Returns the new latents."""
        query = self.ln_1(z)
        z = z + self.attn(query, torch.cat([query, self.ln_2(x)], dim=1))
        return z + self.mlp(self.ln_ff(z))


class PerceiverResampler(nn.Module):
    """(B, N, D) expert tokens of any number and order -> (B, M, D) latents; no positions, no final norm."""

    def __init__(self, width: int, depth: int, heads: int, num_latents: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, width) * width**-0.5)
        self.blocks = nn.ModuleList(ResamplerBlock(width, heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents.expand(x.shape[0], -1, -1)
        for block in self.blocks:
            z = block(z, x)
        return z
