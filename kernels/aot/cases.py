"""What an op says about each of its Triton kernels, so that they can be compiled and priced without a GPU.

A module with Triton kernels has a function `kernel_cases() -> list[KernelCase]`: one case for each kernel and class of
shapes, with the tile shapes that its launcher takes. `all_cases` finds these functions by their name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import triton.language as tl

from prismer.kernels import dispatch
from prismer.kernels.launch import unspecialised


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel as it is launched at one real shape.

    Every pointer argument is taken to be 16-byte aligned, as torch allocates. `flops` and `bytes` are the compulsory
    cost of one launch at `shape`: each tensor read once and written once, masked and padded work not counted.

    Attributes:
        name: unique within the op, such as "BASE layer_norm forward".
        kernel: the function under @triton.jit.
        signature: argument -> "*bf16", "*fp32", "i32", "i64", "fp32" and so on.
        constants: the tl.constexpr arguments, and any argument that is None or that Triton would specialise to 1.
        divisible: integer arguments that are multiples of 16, such as strides.
        num_warps, num_stages: as the launcher passes them.
        shape: for people, such as "R 16384 x D 768, bf16".
        flops, bytes: the compulsory cost.
        dot: the compiled code must use tensor cores.
        vector_loads: the compiled code must read global memory 128 bits at a time.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    shape: str
    flops: int
    bytes: int
    dot: bool = False
    vector_loads: bool = True

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

    @classmethod
    def of_launch(
        cls, name: str, kernel: Any, arguments: Iterable[Any], keywords: Mapping[str, Any], **described: Any
    ) -> "KernelCase":
        """The case of a launch, specialised as Triton does when it launches a kernel.

        Args:
            name, kernel: as above.
            arguments, keywords: pointers and numbers, and constants, as the launcher passes them, but the type of a
                pointer, such as "*bf16", for a tensor.
            described: `shape`, `flops`, `bytes`, and any other field that does not follow from the arguments.
        """
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        options = {option: given.pop(option) for option in ("num_warps", "num_stages") if option in given}
        signature, constants, divisible = {}, {}, []
        plain = unspecialised(kernel)
        for argument, value in given.items():
            is_integer = type(value) is int
            special = is_integer and argument not in plain
            if kernel.fn.__annotations__.get(argument) is tl.constexpr or value is None or special and value == 1:
                constants[argument] = value
                continue
            signature[argument] = value if isinstance(value, str) else "i32" if is_integer else "fp32"
            if special and value % 16 == 0:
                divisible.append(argument)
        fields = dict(signature=signature, constants=constants, divisible=tuple(divisible))
        return cls(name=name, kernel=kernel, **fields, **options, **described)


def all_cases(ops: Iterable[str] = ()) -> list[tuple[str, KernelCase]]:
    """Every case of every op, or of the ops named, each with the name of its op's file.

    Raises:
        ValueError: if an op is named that has no Triton kernels.
    """
    functions = {}
    for module in dispatch.op_modules():
        if hasattr(module, "kernel_cases"):
            name = module.__name__.removeprefix("prismer.kernels.").removesuffix(".triton_backend")
            functions[name] = module.kernel_cases
    unknown = set(ops) - set(functions)
    if unknown:
        raise ValueError(
            f"no op with Triton kernels is called {', '.join(sorted(unknown))}; choose {', '.join(functions)}"
        )
    return [(op, case) for op, function in functions.items() if not ops or op in ops for case in function()]


def representatives(found: list[tuple[str, KernelCase]]) -> list[tuple[str, KernelCase]]:
    """The first case of every kernel."""
    first = {}
    for op, case in found:
        first.setdefault((op, case.kernel.__name__), (op, case))
    return list(first.values())
