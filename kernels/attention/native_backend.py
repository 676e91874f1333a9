"""Attention on a CPU in C++ (`csrc/cpu/attention*.cpp`), without dropout."""

import torch
from torch import Tensor

from prismer.kernels.attention.call import Call, Facts
from prismer.kernels.tuning.tables import has_amx, mkl_is_slow

# numbers of queries up to which torch's own attention is faster where MKL is fast: measured on an Intel Xeon with
# AVX-512, 20 queries over 964 keys and over 20, 260 over 260
_FEW, _MEDIUM = 64, 512


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill out (B, N, H, K) and lse (B, H, N); the last dimension of q, k and v is dense."""
    torch.ops.prismer_native.attention(call.q, call.k, call.v, call.key_mask, call.causal, call.scale, out, lse)


def backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor, grads: list[Tensor | None]) -> None:
    """Fill those of dq, dk and dv (B, tokens, H, K) that are not None; dout (B, N, H, K) is contiguous."""
    torch.ops.prismer_native.attention_backward(
        dout, call.q, call.k, call.v, call.key_mask, out, lse, call.causal, call.scale, *grads
    )


def refuses(facts: Facts) -> str | None:
    """None if the kernel serves the call, else the reason why not."""
    if facts.head_dim % 16 or facts.head_dim > 256:
        return f"native attention serves head dims up to 256 that are multiples of 16, not {facts.head_dim}"
    if facts.dropout:
        return "native attention has no dropout"
    if torch._C._are_functorch_transforms_active():
        return "torch.func does not see through native attention"
    return "native attention does not take tensors without elements" if facts.empty else None


def slower_than_torch(facts: Facts) -> str | None:
    """None where the kernel's vectors are wider than those of torch's own attention, else why torch is preferred.

    The kernel multiplies in vectors. In 16 bits, torch's own attention multiplies in the tiles of AMX where there are
    any, at about three times the rate (measured on an Intel Xeon with AMX). In fp32 it multiplies with MKL, which on
    Intel's processors is as fast as the kernel, and does not pack the keys for a few queries.
    """
    if facts.shape and not mkl_is_slow():
        queries = facts.shape[1]
        # torch's backward pass in 16 bits is several times slower without AMX
        few = facts.dtype == torch.float32 and queries <= _FEW
        if few or (queries <= _MEDIUM and not facts.gradient):
            return f"torch's own attention is faster for {queries} queries on this processor"
    if facts.dtype != torch.float32 and has_amx():
        return f"torch's own attention multiplies {facts.dtype} in AMX tiles"
    vectors = torch.ops.prismer_native.cpu_capability()
    if vectors == "avx512" or (vectors == "avx2" and facts.dtype != torch.float32):
        return None
    return f"on {vectors} torch's own attention is as fast in {facts.dtype}"
