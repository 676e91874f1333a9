"""Attention of the native extension on a CPU, behind the signature of the other backends: `csrc/cpu/attention*.cpp`."""

import torch

from prismer.kernels.attention.peers import Call


def forward(q, k, v, extra_k, extra_v, key_mask, seed, causal, dropout, scale, out, lse):
    """Fill out (B, N, H, K) and lse (B, H, N); the last dimension of q, k and v is dense."""
    torch.ops.prismer_native.attention(q, k, v, key_mask, causal, scale, out, lse)


def backward(dout, q, k, v, extra_k, extra_v, key_mask, seed, out, lse, causal, dropout, scale, grads):
    """Fill those of the gradients (B, tokens, H, K) that are not None; dout (B, N, H, K) is contiguous."""
    dq, dk, dv, _, _ = grads
    torch.ops.prismer_native.attention_backward(dout, q, k, v, key_mask, out, lse, causal, scale, dq, dk, dv)


def serves(call: Call) -> str | None:
    """None if the kernel serves the call, else the reason why not."""
    if call.dtype == torch.float64:
        return "native attention computes in fp32, and q is float64"
    if call.head_dim % 16 or call.head_dim > 256:
        return f"native attention serves head dims up to 256 that are multiples of 16, not {call.head_dim}"
    if call.extra:
        return "native attention takes one segment of keys, and extra_k was given"
    if call.dropout:
        return "native attention has no dropout"
    if torch._C._are_functorch_transforms_active():
        return "torch.func does not see through native attention"
    return "native attention is not asked about tensors without elements" if call.empty else None


def slower_than_torch(dtype: torch.dtype) -> str | None:
    """None where its vectors are wider than what torch's own attention multiplies with, else the reason."""
    vectors = torch.ops.prismer_native.cpu_capability()
    if vectors == "avx512" or (vectors == "avx2" and dtype != torch.float32):
        return None
    return f"on {vectors} torch's own attention is as fast in {dtype}"
