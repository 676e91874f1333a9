"""Attention composed of torch's operators, for every device, dtype and call, one block of queries at a time.

The formulas are in the op's docstring; the scores of a block take 64 MB at most.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prismer.kernels.attention.call import Call
from prismer.kernels.philox import survivors

_BLOCK_BYTES = 64 << 20
_LOG2E = math.log2(math.e)


def _blocks(call: Call, itemsize: int) -> Iterator[slice]:
    """The queries of each block."""
    B, H, N, _ = call.q.shape
    rows = max(1, _BLOCK_BYTES // max(1, B * H * call.k.shape[2] * itemsize))
    for start in range(0, N, rows):
        yield slice(start, min(N, start + rows))


def _scores(call: Call, q: Tensor, k: Tensor, rows: slice) -> Tensor:
    """The scores of scaled queries `q`, which are those of `rows`; -inf where a query does not see a key."""
    scores = q @ k.mT
    if call.key_mask is not None:
        scores.masked_fill_(~call.key_mask[:, None, None, :], float("-inf"))
    if call.causal:
        o_q = torch.arange(rows.start, rows.stop, device=q.device)
        o_k = torch.arange(k.shape[2], device=q.device)
        scores.masked_fill_(o_k > o_q[:, None], float("-inf"))
    return scores


def _survivors(call: Call, rows: slice) -> Tensor:
    B, H, _, _ = call.q.shape
    return survivors(call.seed, B, H, rows.start, rows.stop - rows.start, call.k.shape[2], call.dropout)


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill out (B, N, H, K) and lse (B, H, N), in base 2."""
    if not call.k.shape[2]:
        out.zero_()
        lse.fill_(float("inf"))
        return
    k, v = call.k.to(lse.dtype), call.v.to(lse.dtype)
    for rows in _blocks(call, lse.itemsize):
        weights = _scores(call, call.q[:, :, rows].to(lse.dtype) * (call.scale * _LOG2E), k, rows)
        base = weights.amax(3, keepdim=True)
        base.masked_fill_(base == float("-inf"), 0)
        weights.sub_(base).exp2_()
        total = weights.sum(3, keepdim=True)
        nothing = total == 0
        lse[:, :, rows] = (base + total.log2()).masked_fill_(nothing, float("inf")).squeeze(3)
        if call.dropout:
            weights *= _survivors(call, rows)
        x = weights @ v
        x *= 1 / (1 - call.dropout) / total.masked_fill_(nothing, 1)
        out[:, rows] = x.transpose(1, 2)


def backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor, grads: list[Tensor | None]) -> None:
    """Fill those of dq, dk and dv (B, tokens, H, K) that are not None; dout (B, N, H, K) is contiguous."""
    dq, dk, dv = grads
    compute = lse.dtype
    if not call.k.shape[2]:
        # there are no keys, and only dq has elements
        dq.zero_()
        return
    k, v = call.k.to(compute), call.v.to(compute)
    sums = None if dk is None else (torch.zeros_like(dk, dtype=compute), torch.zeros_like(dv, dtype=compute))
    for rows in _blocks(call, lse.itemsize):
        q_rows = call.q[:, :, rows].to(compute) * (call.scale * _LOG2E)
        dout_rows = dout[:, rows].transpose(1, 2).to(compute)
        delta = (dout_rows * out[:, rows].transpose(1, 2)).sum(3, keepdim=True)
        p = _scores(call, q_rows, k, rows).sub_(lse[:, :, rows, None]).exp2_()
        dp = dout_rows @ v.mT
        dropped = p
        if call.dropout:
            kept = _survivors(call, rows).to(compute) / (1 - call.dropout)
            dropped = p * kept
            dp *= kept
        ds = p * dp.sub_(delta)
        if sums is not None:
            sums[0].add_((ds.mT @ q_rows).transpose(1, 2))
            sums[1].add_((dropped.mT @ dout_rows).transpose(1, 2))
        if dq is not None:
            dq[:, rows] = (ds @ k * call.scale).transpose(1, 2)
    if sums is not None:
        # q_rows holds the factor that makes the logarithms base 2
        dk.copy_(sums[0].div_(_LOG2E))
        dv.copy_(sums[1])
