"""Beams and candidates over shared keys, against SDPA on repeated keys.

Run: pytest benchmarks/test_decode_attention.py --benchmark-only
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import DEVICE, contenders_on, refuse_if_worse, time_contenders
from prismer.capture import size_class
from prismer.kernels.decode_attention import decode_attention

# rows, heads, queries of a row, shared keys, suffix slots, ancestors of a query. The shared keys are those of a prompt:
# "A picture of" has 4 tokens with <s>, the longest question of word_lists.py has 16. The beams are those of the last
# step of a caption of 20 tokens. Answers are the internal nodes of a trie, for 128 drawn from ANSWERS and for all 3,128
SHAPES = {
    "BASE 3 beams": (1, 12, 3, 4, 45, 15),
    "BASE 128 answers": (1, 12, 217, 16, 217, 4),
    "BASE 3128 answers": (1, 12, 3718, 16, 3718, 9),
    "LARGE 3 beams": (1, 16, 3, 4, 45, 15),
    "LARGE 128 answers": (1, 16, 217, 16, 217, 4),
    "BASE B8 3 beams": (8, 12, 3, 4, 45, 15),
}


def repeated(q, shared_k, shared_v, shared_mask, suffix_k, suffix_v, ancestors):
    """Every query with keys of its own: shared ones repeated, its suffix gathered, as a library's cache holds them."""
    R, H, Q, K = q.shape
    rows = torch.arange(R, device=q.device)[:, None, None]
    gathered = [t.transpose(1, 2)[rows, ancestors].permute(0, 1, 3, 2, 4).flatten(0, 1) for t in (suffix_k, suffix_v)]
    shared = [t.repeat_interleave(Q, 0) for t in (shared_k, shared_v)]
    k, v = (torch.cat(pair, 2) for pair in zip(shared, gathered, strict=True))
    seen = F.pad(shared_mask, (0, ancestors.shape[2]), value=True).repeat_interleave(Q, 0)[:, None, None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2).reshape(R * Q, H, 1, K), k, v, seen)
    return out.view(R, Q, H, K).transpose(1, 2)


def sdpa_alone(q, k, v):
    """Only the attention of `repeated`, its keys repeated in advance."""
    return F.scaled_dot_product_attention(q, k, v)


def draws(R, H, Q, S, M, A):
    # on a GPU the model pads prompts, so that few shapes occur
    padded = size_class(S, DEVICE)
    keys = [torch.randn(R, H, n, 64) for n in (padded, padded, M, M)]
    ancestors = torch.stack([torch.randperm(M)[:A] for _ in range(R * Q)]).view(R, Q, A)
    mask = (torch.arange(padded) < S).expand(R, -1)
    return [torch.randn(R, H, Q, 64), *keys[:2], mask, *keys[2:], ancestors]


def calls(*sizes):
    return contenders_on(draws(*sizes), dict(ours=decode_attention, eager=repeated), frozen=(0, 1, 2, 4, 5))


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_attention(benchmark, shape, dtype, compiled):
    R, H, Q, S, M, A = SHAPES[shape]
    refuse_if_worse(calls(R, 2, min(Q, 5), S, M, A), dtype, "forward")
    contenders = calls(R, H, Q, S, M, A)(dtype)
    # the softer comparison: the repeat is free, as if the cache had been built that way
    q, k, v, *_ = contenders["ours"].inputs
    q, k, v = q.transpose(1, 2).reshape(R * Q, H, 1, 64), k.repeat_interleave(Q, 0), v.repeat_interleave(Q, 0)
    contenders["sdpa-alone"] = type(contenders["ours"])(run=sdpa_alone, inputs=[q, k, v])
    time_contenders(
        benchmark,
        contenders,
        room="decode_attention",
        shape=shape,
        dtype=dtype,
        part="forward",
        flops=4 * R * H * Q * (S + A) * 64,
        bytes_moved=2 * R * H * (S + M) * 64 * dtype.itemsize,
        seconds=0.5,
    )
