"""Shared by the tests of data: a disk without waiting, and the stand-in for a CLIP model."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which takes a second on a busy disk; one test proves its order."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in for a CLIP model."""
    from tests.data.stand_in_clip import save_tower

    return save_tower(tmp_path_factory.mktemp("towers") / "stand-in")


@pytest.fixture
def run_semantics(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Call `prismer semantics` in this process; returns what it prints."""
    from prismer.cli.semantics import add_semantics_commands

    def call(*args: object) -> str:
        parser = argparse.ArgumentParser()
        add_semantics_commands(parser.add_subparsers())
        parsed = parser.parse_args(["semantics", *map(str, args)])
        capsys.readouterr()
        parsed.run(parsed)
        return capsys.readouterr().out

    return call
