"""What a room says about each of its Triton kernels, so that `inspect.py` can compile and price them without a GPU.

A room with Triton kernels has a function `kernel_cases() -> list[KernelCase]`: one case per kernel and
shape class, with the tile shapes that its launcher would take.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel as it is launched at one real shape.

    Every pointer argument is taken to be 16-byte aligned, as torch allocates. `flops` and `bytes` are
    the compulsory cost of the one launch at `shape`: each tensor read once, each written once, masked
    and padded work not counted.
    """

    name: str  # unique in the room, such as "layer_norm_forward-D768-bf16"
    kernel: Any  # the function under @triton.jit
    signature: Mapping[str, str]  # argument -> "*bf16", "*fp32", "i32", "i64", "fp32", ...
    constants: Mapping[str, Any] = field(default_factory=dict)
    # the tl.constexpr arguments, and any argument that is None or that Triton would specialise to 1
    divisible: tuple[str, ...] = ()  # integer arguments that are multiples of 16, such as strides
    num_warps: int = 4
    num_stages: int = 3
    archs: tuple[int, ...] = (80, 90, 100, 120)  # where the launcher takes these tile shapes
    shape: str  # for people: "R 16384 x D 768, bf16"
    flops: int
    bytes: int
    dot: bool = False  # the compiled code must use tensor cores
    vector_loads: bool = True  # and must read global memory 128 bits at a time

    def __post_init__(self) -> None:
        arguments = list(self.kernel.arg_names)
        both = set(self.signature) & set(self.constants)
        given = set(self.signature) | set(self.constants)
        if both or given != set(arguments):
            raise ValueError(
                f"case {self.name}: each of {arguments} belongs in either signature or constants; "
                f"missing {sorted(set(arguments) - given)}, unknown {sorted(given - set(arguments))}, "
                f"in both {sorted(both)}"
            )
        unknown = [name for name in self.divisible if name not in self.signature]
        if unknown:
            raise ValueError(f"case {self.name}: divisible names {unknown}, not in its signature")
