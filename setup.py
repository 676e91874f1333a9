"""Builds only the native extension `prismer._C`; the rest of the package is in pyproject.toml.

Without torch or a working compiler one line says so and the installation goes on: every op also
runs on torch.
"""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MINIMUM_TORCH = (2, 10)
# the first release whose stable ABI has parallel_for


def skipped(reason: str) -> None:
    """The one line about a missing extension."""
    print(f"prismer: native extension skipped ({reason}); torch operators run instead", flush=True)


def native_extensions() -> list[Extension]:
    """`prismer._C` on torch's stable ABI, or nothing if there is no torch to build against."""
    # found without importing it: that takes seconds, and only its headers are needed
    spec = importlib.util.find_spec("torch")
    if spec is None:
        skipped("torch is not installed; install it first and add --no-build-isolation")
        return []
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < MINIMUM_TORCH:
        skipped(f"torch {version} is older than 2.10")
        return []
    torch = Path(spec.submodule_search_locations[0])
    return [
        Extension(
            "prismer._C",
            sources=["csrc/ops.cpp", "csrc/cpu/label_map.cpp"],
            language="c++",
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["c10", "torch", "torch_cpu"],
            define_macros=[
                ("Py_LIMITED_API", "0x030A0000"),
                ("TORCH_TARGET_VERSION", "0x020A000000000000"),
            ],
            # instruction sets are chosen at run time, see csrc/cpu: one wheel serves every x86-64
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ]


class BuildNative(build_ext):
    """The extension is an accelerator, not a need: a failed build costs one line."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            # the compiler has already said what it thinks; pip shows that with -v
            skipped(f"its build failed with {type(error).__name__}")


extensions = native_extensions()
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
