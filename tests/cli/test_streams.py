"""Proves how the process behaves: its entry point, and streams that are closed, full or interrupted.

Run: pytest tests/cli/test_streams.py
"""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prismer
from tests.cli.commands import Run, raiser

ROOT = Path(prismer.__file__).resolve().parent.parent


def process(*args, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "prismer", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_the_entry_point_prints_its_version_and_refuses_a_missing_image():
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"prismer {prismer.__version__}\n")
    done = process("caption", "none.jpg")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "prismer: no image file none.jpg; check the path\n"


@pytest.mark.parametrize("value", ("fast", "mlp:fast", "no_op:torch"))
def test_a_wrong_environment_variable_is_one_sentence(images, value):
    done = process("caption", images[0], env={**os.environ, "PRISMER_BACKEND": value})
    assert done.returncode == 2 and done.stderr.startswith("prismer: PRISMER_BACKEND ")
    assert done.stderr.count("\n") == 1


def test_building_the_parser_imports_nothing_heavy():
    code = "import sys, prismer, prismer.cli.main; prismer.cli.main.build_parser(); dir(prismer); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "PIL", "transformers", "nvidia", "deepspeed", "tqdm"}
    assert heavy.isdisjoint(done.stdout.split())


def test_the_public_names_import():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{prismer.__version__}"' in pyproject
    assert 'prismer = "prismer.cli.main:main"' in pyproject
    for name in prismer.__all__:
        assert getattr(prismer, name) is not None
    assert prismer.preset("tiny") == prismer.prismer_tiny()
    with pytest.raises(AttributeError, match="no attribute 'prism'"):
        prismer.prism  # noqa: B018 - the access itself is tested


def test_an_interrupt_prints_nothing(run, monkeypatch):
    monkeypatch.setattr("prismer.costs.info.info_text", raiser("raise KeyboardInterrupt"))
    assert run("info") == Run(130, "", "")


def test_a_closed_pipe_prints_nothing(scenes):
    command = [sys.executable, "-m", "prismer", "data", "check", str(scenes / "val")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    _, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (1, b"")


class Full(io.TextIOWrapper):
    """A stream on a full disk."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self):
        pass


@pytest.mark.parametrize(
    "command", ["--version", "--help", "data check --help", "info", "caption {image} --model {model}"]
)
def test_a_full_disk_for_the_output_is_one_sentence(run, monkeypatch, images, model, command):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        done = run(*command.format(image=images[0], model=model).split())
    assert done.code == 1
    assert done.err == (
        "prismer: output cannot be written: No space left on device; free some space and give the command again\n"
    )


@pytest.mark.parametrize("stream", (Full, lambda: None), ids=("full", "closed"))
def test_a_lost_stderr_changes_no_exit_code(run, monkeypatch, images, model, tmp_path, stream):
    commands = [
        (0, ("caption", images[0], "--model", model)),
        (2, ("caption", tmp_path / "none.jpg")),
        (2, ("caption",)),
    ]
    for code, command in commands:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream())
            assert run(*command).code == code


def test_a_closed_stdout_is_no_failure(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert run("info").code == 0
        patch.setattr(sys, "stdout", None)
        assert run("--version").code == 0


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))
def test_a_full_disk_is_one_sentence(run, monkeypatch, number):
    monkeypatch.setattr("prismer.costs.info.info_text", raiser(f"raise OSError({number}, 'x', 'a.bin')"))
    done = run("info")
    assert (done.code, done.err) == (
        1,
        f"prismer: a.bin cannot be written: {os.strerror(number)}; free some space and give the command again\n",
    )
