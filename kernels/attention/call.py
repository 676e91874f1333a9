"""One call of attention, and the facts about it that decide which backends serve it."""

import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prismer.kernels.tuning import class_with_tokens


class Call(NamedTuple):
    """What a backend computes: checked tensors and options.

    Attributes:
        q: (B, H, N, K).
        k, v: (B, H, L, K).
        key_mask: (B, L) bool, True where a key is seen, or None.
        seed: int64, one element, which fixes what dropout drops, or None.
        causal: query i sees keys 0..i.
        dropout: probability that a weight is dropped.
        scale: factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    seed: Tensor | None
    causal: bool
    dropout: float
    scale: float

    def is_empty(self) -> bool:
        """Is there no sample, no query or no key?"""
        # torch.compile leaves sizes open, but evaluates the condition of a branch
        return True if self.q.numel() == 0 or self.k.numel() == 0 else False

    def constants(self) -> dict[str, object]:
        """The arguments of `Facts.on_this_machine`, all of them constants for torch.compile."""
        return dict(
            device=self.q.device,
            dtype=self.q.dtype,
            head_dim=operator.index(self.q.shape[3]),
            masked=self.key_mask is not None,
            dropout=True if self.dropout > 0 else False,
            seeded=self.seed is not None,
            empty=self.is_empty(),
            compiling=torch.compiler.is_compiling(),
            # torch.compile leaves sizes open: the prior decides for a compiled call
            shape=() if torch.compiler.is_compiling() else self.shape_class(),
            gradient=self.keeps_graph(),
        )

    def shape_class(self) -> tuple[int, ...]:
        """Classes of the heads of all samples, the queries and the keys; head dim; a bit for each option."""
        B, H, N, K = self.q.shape
        options = self.causal + 2 * (self.key_mask is not None) + 4 * (self.dropout > 0)
        return class_with_tokens("attention", B * H, (N, self.k.shape[2]), (K, options))

    def keeps_graph(self) -> bool:
        """Does autograd record the call?"""
        return torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad or self.v.requires_grad)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What decides whether a backend serves a call.

    Attributes:
        device, dtype, head_dim: those of the queries.
        capability: compute capability of the GPU, such as (9, 0); None on other devices.
        masked: there is a key mask.
        dropout: weights are dropped.
        seeded: the caller gave a seed.
        empty: there is no sample, no query or no key.
        deterministic: torch.use_deterministic_algorithms is on.
        compiling: torch.compile traces the call.
        shape: class of the shape, as `Call.shape_class` gives it; () if it is not known.
        gradient: autograd records the call.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int] | None = None
    masked: bool = False
    dropout: bool = False
    seeded: bool = False
    empty: bool = False
    deterministic: bool = False
    compiling: bool = False
    shape: tuple[int, ...] = ()
    gradient: bool = False

    @classmethod
    def on_this_machine(cls, *, device: torch.device, **constants: object) -> "Facts":
        """The facts of a call with these `Call.constants`."""
        return cls(
            device=device,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **constants,
        )
