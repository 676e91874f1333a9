"""Attention composed of torch's operators, for every device, dtype and call: a chunk of scores at a time.

Formulas in `attention.py`; the largest chunk of scores is 64 MB.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from prismer.kernels.philox import survivors

_CHUNK_BYTES = 64 << 20  # of scores that are there at once
_LOG2E = math.log2(math.e)


def _chunks(q: Tensor, keys: int, itemsize: int) -> Iterator[slice]:
    B, H, N, _ = q.shape
    rows = max(1, _CHUNK_BYTES // max(1, B * H * keys * itemsize))
    for start in range(0, N, rows):
        yield slice(start, min(N, start + rows))


def _segments(k, v, extra_k, extra_v, compute) -> list[tuple[int, Tensor, Tensor]]:
    """Those that have keys: number, keys, values."""
    pairs = enumerate(((k, v), (extra_k, extra_v)))
    return [(i, a.to(compute), b.to(compute)) for i, (a, b) in pairs if a is not None and a.shape[2]]


def _scores(q, k, segment, rows, causal, key_mask) -> Tensor:
    """Of the scaled queries `q`, which are those of `rows`; the extra segment is seen by all."""
    scores = q @ k.mT
    if segment == 0 and key_mask is not None:
        scores.masked_fill_(~key_mask[:, None, None, :], float("-inf"))
    if segment == 0 and causal:
        o_q, o_k = (torch.arange(n, device=q.device) for n in (rows.stop, k.shape[2]))
        scores.masked_fill_(o_k > o_q[rows, None], float("-inf"))
    return scores


def forward(q, k, v, extra_k, extra_v, key_mask, seed, causal, dropout, scale, out, lse):
    B, H, _, _ = q.shape
    segments = _segments(k, v, extra_k, extra_v, lse.dtype)
    if not segments:
        out.zero_()
        lse.fill_(float("inf"))
        return
    for rows in _chunks(q, sum(k.shape[2] for _, k, _ in segments), lse.itemsize):
        q_rows = q[:, :, rows].to(lse.dtype) * (scale * _LOG2E)
        weights = [_scores(q_rows, k, i, rows, causal, key_mask) for i, k, _ in segments]
        base = weights[0].amax(3, keepdim=True)
        for more in weights[1:]:
            base = torch.maximum(base, more.amax(3, keepdim=True))
        base = base.masked_fill_(base == float("-inf"), 0)
        weights = [s.sub_(base).exp2_() for s in weights]
        total = sum(w.sum(3, keepdim=True) for w in weights)
        nothing = total == 0
        lse[:, :, rows] = (base + total.log2()).masked_fill_(nothing, float("inf")).squeeze(3)
        if dropout:
            for (i, k, _), w in zip(segments, weights, strict=True):
                w *= survivors(seed, B, H, rows.start, w.shape[2], k.shape[2], i, dropout)
        x = sum(w @ v for w, (_, _, v) in zip(weights, segments, strict=True))
        x *= 1 / (1 - dropout) / total.masked_fill_(nothing, 1)
        out[:, rows] = x.transpose(1, 2)


def backward(dout, q, k, v, extra_k, extra_v, key_mask, seed, out, lse, causal, dropout, scale, grads):
    B, H, _, _ = q.shape
    compute = lse.dtype
    segments = _segments(k, v, extra_k, extra_v, compute)
    dq, sums = grads[0], [None if g is None else g.new_zeros(g.shape, dtype=compute) for g in grads]
    if dq is not None and not segments:
        dq.zero_()
    for rows in _chunks(q, sum(k.shape[2] for _, k, _ in segments), lse.itemsize):
        q_rows = q[:, :, rows].to(compute) * (scale * _LOG2E)
        dout_rows = dout[:, rows].transpose(1, 2).to(compute)
        delta = (dout_rows * out[:, rows].transpose(1, 2)).sum(3, keepdim=True)
        dq_rows = 0
        for i, k, v in segments:
            p = _scores(q_rows, k, i, rows, causal, key_mask)
            p = p.sub_(lse[:, :, rows, None]).exp2_()
            dp = dout_rows @ v.mT
            dropped = p
            if dropout:
                kept = survivors(seed, B, H, rows.start, p.shape[2], k.shape[2], i, dropout)
                kept = kept.to(compute) / (1 - dropout)
                dropped = p * kept
                dp *= kept
            ds = p * dp.sub_(delta)
            if sums[1 + 2 * i] is not None:
                sums[1 + 2 * i] += (ds.mT @ q_rows).transpose(1, 2)
                sums[2 + 2 * i] += (dropped.mT @ dout_rows).transpose(1, 2)
            if dq is not None:
                dq_rows = dq_rows + ds @ k
        if dq is not None and segments:
            dq[:, rows] = (dq_rows * scale).transpose(1, 2)
    # the queries above hold the factor that makes the logarithms base 2
    for grad, total, of_values in zip(grads[1:], sums[1:], (False, True) * 2, strict=True):
        if grad is not None:
            grad.copy_(total if of_values else total.div_(_LOG2E))
