"""Which weights of attention survive dropout, as a function of the seed and of (sample, head, query, key) alone.

Philox 4x32-10 decides, keyed by the 64 bits of the seed. Its counter is (key // 4, query, sample * H + head, 0). Each
of its four words belongs to one key, which is kept if word >> 8 >= round(dropout * 2^24). Forward and backward pass,
every block size and every backend therefore draw the same, and nothing needs to be stored.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. On a CPU the native extension draws eight
keys in the time in which torch's operators draw one.
"""

import torch
from torch import Tensor

from prismer.kernels.dispatch import TORCH, Backend, Op

# a part of attention
OP = Op(name="philox_kept", reference=None, backends=(Backend(name="native", devices=("cpu",)), TORCH))
_WORD = 0xFFFFFFFF


def draw_seed(dropout: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed of a call: `seed`, one from torch's generator if it is None, or None if there is no dropout."""
    if not dropout:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device) if seed is None else seed


def _high(a: int, b: Tensor) -> Tensor:
    """The upper word of the product of two 32-bit words, in int64 without overflow."""
    return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words for every counter of four words, keyed by the two words of the seed; all in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        c0, c1, c2, c3 = (
            _high(0xCD9E8D57, c2) ^ c1 ^ k0,
            (0xCD9E8D57 * c2) & _WORD,
            _high(0xD2511F53, c0) ^ c3 ^ k1,
            (0xD2511F53 * c0) & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.broadcast_tensors(c0, c1, c2, c3)


def _kept_torch(seed: Tensor, heads: int, row: int, rows: int, L: int, threshold: int) -> Tensor:
    indices = dict(dtype=torch.int64, device=seed.device)
    words = philox(
        seed.reshape(()),
        torch.arange((L + 3) // 4, **indices),
        torch.arange(row, row + rows, **indices)[:, None],
        torch.arange(heads, **indices).view(heads, 1, 1),
        torch.zeros((), **indices),
    )
    return torch.stack(words, -1).flatten(-2)[..., :L] >> 8 >= threshold


def survivors(seed: Tensor, B: int, H: int, row: int, rows: int, L: int, dropout: float) -> Tensor:
    """Which weights survive: (B, H, rows, L) bool, for the queries row.. and all L keys.

    Args:
        seed: int64, one element; the result is on its device.
        B, H: samples and heads.
        row, rows: the first query and the number of queries.
        L: number of keys.
        dropout: probability that a weight does not survive.
    """
    numbers = B * H, row, rows, L, round(dropout * 2**24)
    if OP.choose(seed) == "native" and B * H * rows * L:
        drawn = torch.ops.prismer_native.philox_kept(seed, *numbers)
    else:
        drawn = _kept_torch(seed, *numbers)
    return drawn.view(B, H, rows, L)
