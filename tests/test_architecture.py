"""Proves that the folders are the architecture: imports go down only, in no circle, and no file outgrows its reader.

    pytest tests/test_architecture.py

Imports are read, not run, so that one inside a function or under TYPE_CHECKING counts like any other.
"""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND_FLOOR = (
    "prismer prismer.batch prismer.config prismer.errors prismer.experts prismer.files prismer.reading "
    "prismer.resumable prismer.shipped prismer.kernels.errors prismer.tensor_files prismer.texts prismer.tokenizer "
    "prismer.storage prismer.storage.cache prismer.storage.folders prismer.storage.objects prismer.storage.output "
    "prismer.storage.places"
).split()
LONGEST_FILE = 450


def product_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "prismer/**.py", "kernels/**.py", "dataloading/**.py", "train.py", "scripts/gpu_*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def module_name(path: Path) -> str:
    parts = list(path.with_suffix("").parts)
    if parts[0] in ("kernels", "dataloading"):
        parts.insert(0, "prismer")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in product_files()}


def read_imports(text: str, modules) -> set[str]:
    """The modules of ours that a source imports by name."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import: write the module's full name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return {name for name in found if name in modules}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return {name: read_imports((ROOT / path).read_text(), MODULES) - {name} for name, path in MODULES.items()}


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """Some modules of which each imports the next, and the last the first; [] if there are none."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in finished:
            return []
        for target in sorted(imports[name]):
            if cycle := visit(target, [*path, name]):
                return cycle
        finished.add(name)
        return []

    for name in sorted(imports):
        if cycle := visit(name, []):
            return cycle
    return []


def upward(imports: dict[str, set[str]], floor: str, allowed) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, targets in sorted(imports.items())
        if name == floor or name.startswith(f"{floor}.")
        for target in sorted(targets)
        if not allowed(target)
    ]


def test_the_list_of_modules_is_whole():
    assert {"prismer.model", "prismer.kernels.layer_norm", "prismer.dataloading.store.shards", "train"} <= set(MODULES)


def test_no_module_imports_itself_by_a_detour(imports):
    assert find_cycle(imports) == []


def test_kernels_import_nothing_of_the_product(imports):
    assert upward(imports, "prismer.kernels", lambda target: target.startswith("prismer.kernels")) == []


def test_dataloading_imports_only_the_ground_floor(imports):
    def allowed(target: str) -> bool:
        # the native extension, which holds pixel operations too, is loaded in one place
        return target.startswith("prismer.dataloading") or target in GROUND_FLOOR or target == "prismer.kernels.machine"

    assert upward(imports, "prismer.dataloading", allowed) == []


def test_the_gpu_check_imports_the_model_and_the_kernels_alone(imports):
    """The machine with a GPU may lack DeepSpeed, DALI, open_clip and what reads images, texts and files."""
    model = "batch capture config experts freezing generation ranking text vision".split()
    allowed = {f"prismer.{name}" for name in model}

    def is_allowed(target: str) -> bool:
        return target.startswith(("prismer.kernels", "scripts.")) or target in allowed

    assert {"scripts.gpu_check", "scripts.gpu_stages.models"} <= set(imports)
    assert upward(imports, "scripts", is_allowed) == []


@pytest.mark.parametrize("room", ["prismer.evaluation", "prismer.asking", "prismer.transformers"])
def test_results_import_no_job_and_no_command(imports, room):
    above = ("prismer.training", "prismer.costs", "prismer.ablations", "prismer.cli")
    assert any(name.startswith(room) for name in imports)
    assert upward(imports, room, lambda target: not target.startswith(above)) == []


@pytest.mark.parametrize("name", GROUND_FLOOR)
def test_the_ground_floor_imports_nothing_above_it(imports, name):
    assert imports[name] <= set(GROUND_FLOOR)


@pytest.mark.parametrize(
    "library, home",
    [
        ("deepspeed", "prismer.training.zero"),
        ("nvidia", "prismer.dataloading"),
        ("fsspec", "prismer.storage.objects"),
    ],
)
def test_deepspeed_dali_and_fsspec_are_known_to_one_room_each(library, home):
    importers = [
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if module.split(".")[0] == library
    ]
    assert importers
    assert [name for name in importers if not name.startswith(home)] == []


def test_files_are_short_enough_to_read():
    long = {
        str(path): lines
        for name, path in MODULES.items()
        if not name.startswith("prismer.kernels")
        if (lines := len((ROOT / path).read_text().splitlines())) > LONGEST_FILE
    }
    assert long == {}


def test_every_file_opens_with_its_purpose():
    silent = [str(path) for path in MODULES.values() if not ast.get_docstring(ast.parse((ROOT / path).read_text()))]
    assert silent == []


def bare_signatures(text: str) -> list[str]:
    """Public functions and methods with an argument or a result that has no annotation; Triton kernels have none."""
    found: list[str] = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body, f"{node.name}.")
            if not isinstance(node, ast.FunctionDef) or (node.name.startswith("_") and node.name != "__init__"):
                continue
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
            if bare or (node.returns is None and node.name != "__init__"):
                found.append(f"{prefix}{node.name}")

    visit(ast.parse(text).body, "")
    return found


def test_public_signatures_are_annotated():
    bare = {str(path): names for path in MODULES.values() if (names := bare_signatures((ROOT / path).read_text()))}
    assert bare == {}


def test_a_bare_signature_is_found():
    assert bare_signatures(
        "def f(x) -> int: ...\ndef g(x: int): ...\ndef _h(x): ...\nclass A:\n    def m(self, y): ..."
    ) == [
        "f",
        "g",
        "A.m",
    ]


def test_a_planted_cycle_and_a_lazy_import_are_found():
    modules = {"a", "b", "c"}
    sources = {"a": "import b", "b": "def f():\n    from c import x", "c": "if TYPE_CHECKING:\n    import a"}
    imports = {name: read_imports(text, modules) for name, text in sources.items()}
    assert find_cycle(imports) == ["a", "b", "c"]
    assert find_cycle(imports | {"c": set()}) == []
    assert upward(imports, "b", lambda target: False) == ["b imports c"]
