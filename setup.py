"""Builds only the native extensions; the rest of the package is in pyproject.toml.

`prismer._C`, for CPU tensors, needs torch and a C++ compiler. `prismer._C_cuda`, for CUDA tensors, needs a torch with
CUDA, nvcc, and a driver; PRISMER_CUDA=1 builds it without a driver, PRISMER_CUDA=0 leaves it out. An extension that
cannot be built costs one line and the installation goes on: every op also runs on torch.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# the first release whose stable ABI has parallel_for
MINIMUM_TORCH = (2, 10)
# A100, H100 and B200; PTX of the first serves all others
CUDA_CODE = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100a": "compute_100a"}


def skipped(reason: str) -> None:
    """The one line about a missing extension."""
    print(f"prismer: native extension skipped ({reason}); torch operators run instead", flush=True)


def find_nvcc() -> str | None:
    """The CUDA compiler on the path, or where CUDA_HOME or the usual place has it."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("nvcc") or shutil.which(str(home / "bin" / "nvcc"))


def cuda_missing(torch: Path) -> str | None:
    """Why `prismer._C_cuda` is not built, or None if it is."""
    asked = os.environ.get("PRISMER_CUDA", "")
    if asked not in ("", "0", "1"):
        return f"PRISMER_CUDA is {asked!r}; set it to 0 or 1, or leave it unset"
    if asked == "0":
        return "PRISMER_CUDA=0"
    # read, not imported
    if not re.search(r"^cuda\b.*= *['\"]", (torch / "version.py").read_text(), re.MULTILINE):
        return "this torch is built without CUDA"
    if find_nvcc() is None:
        return "nvcc is not installed"
    drivers = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")
    if asked != "1" and not any(map(os.path.exists, drivers)):
        return "no NVIDIA driver here; PRISMER_CUDA=1 builds them all the same"
    return None


def native_extensions() -> list[Extension]:
    """What to build on torch's stable ABI, or nothing if there is no torch to build against."""
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
    macros = [("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020A000000000000")]
    extensions = [
        Extension(
            "prismer._C",
            sources=["csrc/ops.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))],
            depends=[*map(str, Path("csrc").glob("*/*.h"))],
            language="c++",
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["c10", "torch", "torch_cpu"],
            define_macros=macros,
            # csrc/cpu chooses the instruction set at run time, so one wheel serves every x86-64. Nothing reads errno,
            # which would keep square roots out of vectors; functions that take vectors are all inlined, so the ABI of
            # passing them (-Wno-psabi) does not matter
            extra_compile_args=[*("-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno"), "-Wno-psabi"],
            py_limited_api=True,
        )
    ]
    if cuda_missing(torch) is None:
        extensions.append(
            Extension(
                "prismer._C_cuda",
                sources=["csrc/cuda/register.cpp", *map(str, sorted(Path("csrc/cuda").glob("*.cu")))],
                include_dirs=[str(torch / "include")],
                library_dirs=[str(torch / "lib")],
                libraries=["c10", "torch", "torch_cpu", "torch_cuda"],
                define_macros=[*macros, ("USE_CUDA", "1")],
                py_limited_api=True,
                # setuptools copies the other extension even if this one was not built
                optional=True,
            )
        )
    return extensions


def nvcc_command(ext: Extension, include_dirs: list[str], target: Path) -> list[str]:
    """One call of nvcc that compiles and links an extension, its CUDA runtime inside it."""
    nvcc = find_nvcc()
    known = subprocess.run([nvcc, "--list-gpu-code"], stdout=subprocess.PIPE, text=True).stdout
    code = {real: virtual for real, virtual in CUDA_CODE.items() if real.rstrip("a") in known}
    return [
        *(nvcc, "-shared", "-std=c++20", "-O3", "--threads", "0", "-cudart", "static"),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "--exclude-libs=ALL,-s"),
        *(f"-gencode=arch={virtual},code={real}" for real, virtual in code.items()),
        "-gencode=arch=compute_80,code=compute_80",
        *(f"-I{folder}" for folder in (*ext.include_dirs, *include_dirs)),
        *(f"-D{name}={value}" for name, value in ext.define_macros),
        *ext.sources,
        *(f"-L{folder}" for folder in ext.library_dirs),
        *(f"-l{library}" for library in ext.libraries),
        *("-o", str(target)),
    ]


class BuildNative(build_ext):
    """Builds what can be built: a failed build costs one line, since torch operators can replace every extension."""

    def run(self) -> None:
        reason = cuda_missing(Path(self.extensions[0].include_dirs[0]).parent)
        if reason is not None:
            print(f"prismer: CUDA kernels not built ({reason})", flush=True)
        try:
            super().run()
        except Exception as error:
            # the compiler has printed its own errors; pip shows them with -v
            skipped(f"its build failed with {type(error).__name__}")

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "prismer._C_cuda":
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(nvcc_command(ext, self.include_dirs, target), check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"their build failed with {type(error).__name__}"
            print(f"prismer: CUDA kernels not built ({reason})", flush=True)


extensions = native_extensions()
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
