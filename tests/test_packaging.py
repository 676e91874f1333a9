"""Proves what an installation holds: one import root, every module and asset in the wheel, the native extension where
a compiler works, and a wheel all the same where it does not.

Run: pytest tests/test_packaging.py
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md")
ROOMS = ("prismer", "kernels", "dataloading", "csrc")
LINKS = {"prismer/kernels": "../kernels", "prismer/dataloading": "../dataloading"}
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")


def run(*command, cwd=ROOT, **environment):
    """Run a command; its output, with the whole of it in the failure message."""
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))} failed:\n{result.stdout}"
    return result.stdout


@pytest.mark.parametrize("link", LINKS)
def test_symlinks(link):
    """Relative, and committed as links, so that every checkout has them."""
    assert os.readlink(ROOT / link) == LINKS[link]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert run("git", "ls-files", "-s", link).startswith("120000 "), f"{link} is not committed as a link"


def test_kernels_is_no_package():
    """A top-level `kernels` package would answer for Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_ignores_our_kernels():
    """From the root of the repository, where `import kernels` finds our folder: transformers must not take it."""
    program = (
        "import sys, transformers.integrations.hub_kernels\n"
        "from transformers.utils import is_kernels_available\n"
        "paths = getattr(sys.modules.get('kernels'), '__path__', [])\n"
        "ours = [path for path in paths if path.startswith(sys.argv[1])]\n"
        "assert not (ours and is_kernels_available()), ours\n"
        "assert not [name for name in sys.modules if name.startswith('kernels.') and ours]\n"
    )
    run(sys.executable, "-c", program, str(ROOT))


def build_wheel(folder, **environment):
    """Build from a clean copy of the sources; the names in the wheel, its path and the printed output."""
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    for name in ROOMS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=IGNORED)
    pip = (sys.executable, "-m", "pip", "wheel", "--verbose", "--no-index", "--no-build-isolation", "--no-deps")
    printed = run(*pip, "--wheel-dir", folder, tree, cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist()), wheel, printed


def expected_files():
    """Every module of the three rooms, by its place under `prismer`, and every asset."""
    ours = (ROOT / "prismer").rglob("*.py")
    files = {str(path.relative_to(ROOT)) for path in ours} | {"prismer/py.typed"}
    for room in ("kernels", "dataloading"):
        files |= {f"prismer/{path.relative_to(ROOT)}" for path in (ROOT / room).rglob("*.py")}
    assets = (path for path in (ROOT / "prismer" / "assets").rglob("*") if path.is_file())
    files |= {str(path.relative_to(ROOT)) for path in assets if "__pycache__" not in path.parts}
    assert {
        "prismer/kernels/label_map.py",
        "prismer/dataloading/store/shards.py",
        "prismer/training/trainer.py",
    } <= files
    return files


# it compiles the extension once more, which takes as long as a tenth of all other tests
@pytest.mark.long
def test_wheel(tmp_path):
    # a GPU beside nvcc would add the CUDA kernels, which take minutes
    names, wheel, printed = build_wheel(tmp_path, PRISMER_CUDA="0")
    missing = expected_files() - names
    assert not missing, f"not in the wheel: {sorted(missing)}"
    foreign = {name for name in names if not name.startswith(("prismer/", "prismer_vlm-")) or "__pycache__" in name}
    assert not foreign, f"should not be in the wheel: {sorted(foreign)}"
    native = [name for name in names if name.startswith("prismer/_C")]
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler: the native extension cannot be looked at")
    assert native == ["prismer/_C.abi3.so"], printed
    # the installed files alone, away from the repository
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import sys, torch, prismer.kernels.label_map as room\n"
        "assert room.__file__.startswith(sys.argv[1]), room.__file__\n"
        "from prismer.kernels.dispatch import use_backend\n"
        "ids, rows = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 256, dtype=torch.int64)\n"
        "with use_backend('native'):\n"
        "    assert room.label_map(ids, rows, torch.ones(1, 64), 2).eq(1).all()\n"
        "assert sys.modules['prismer._C'].__file__.startswith(sys.argv[1])\n"
    )
    run(sys.executable, "-c", program, str(site), cwd=tmp_path, PYTHONPATH=str(site))


def test_wheel_without_compiler(tmp_path):
    """A compiler that fails costs one printed line and the extension, nothing else."""
    names, _, printed = build_wheel(tmp_path, CXX="/bin/false", CC="/bin/false")
    assert not expected_files() - names
    assert not [name for name in names if name.startswith("prismer/_C")]
    lines = [line for line in printed.splitlines() if "native extension skipped" in line]
    assert len(lines) == 1, printed
