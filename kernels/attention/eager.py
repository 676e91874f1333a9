"""Attention in three operators of torch, which keep the probabilities, for the shapes at which these are few.

Where queries or keys are few, the N x L probabilities take no more memory than the tensors that are kept in any case.
Two plain matrix products are then faster with a gradient than a kernel that computes the probabilities again, whatever
the processor: the backward pass has 4 products instead of 5, and none of them is cut into blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prismer.kernels.attention.call import Call, Facts

# probabilities for each number of q, k, v and out: at most so many are kept
_MOST = 2


def refuses(facts: Facts) -> str | None:
    """None if this backend serves the call, else the reason why not."""
    if facts.empty:
        return "eager attention does not take tensors without elements"
    if facts.dropout and facts.seeded:
        return "eager attention draws dropout from torch's generator, and a seed was given"
    if facts.masked:
        return "eager attention does not promise zeros for a query whose keys are all masked"
    if not facts.shape:
        return "torch.compile leaves sizes open, and eager attention is for few probabilities"
    _, N, L, K, _ = facts.shape
    if N * L > _MOST * 2 * (N + L) * K:
        return f"{N} x {L} probabilities take more than {_MOST} times the memory of q, k, v and out"
    return None


def slower(facts: Facts) -> str | None:
    """None if this backend is the prior, else the reason why another one precedes it."""
    if facts.device.type != "cpu" or not facts.gradient or facts.dtype == torch.float32:
        return "eager attention is for gradients in 16 bits on a CPU, until a measurement says otherwise"
    _, N, L, K, _ = facts.shape
    # where keys are many, the other backends spend their time on converting them, twice
    if 2 * N > L or N * L > 2 * (N + L) * K:
        return f"{N} queries are not few beside {L} keys"
    return None


def forward(call: Call) -> Tensor:
    """(B, H, N, K) whose memory is (B, N, H, K), under plain autograd."""
    q, exact = call.q, math.frexp(call.scale)[0] == 0.5
    # a power of two rounds nothing, and there are fewer queries than scores
    scores = (q * call.scale if exact else q) @ call.k.mT
    if not exact:
        scores = scores * call.scale
    if call.causal:
        N = q.shape[2]
        future = torch.ones(N, N, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = scores.softmax(3)
    if call.dropout:
        weights = F.dropout(weights, call.dropout)
    return (weights @ call.v).transpose(1, 2).contiguous().transpose(1, 2)
