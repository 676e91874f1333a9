"""Fixtures of the command tests: command lines, a small model, rendered scenes and their images."""

import shutil
from pathlib import Path

import pytest
import torch

from prismer.cli.main import main
from prismer.config import prismer_tiny
from prismer.dataloading.scenes.dataset import render_dataset
from prismer.dataloading.store.shards import ShardDataset
from prismer.model import Prismer
from prismer.tokenizer import Tokenizer
from tests.cli.commands import ANSWERS, SMALL_MODEL, Run


@pytest.fixture
def run(capsys):
    """Call the command in this process."""

    def call(*args) -> Run:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as leaving:
            code = leaving.code
        return Run(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A model folder with random weights."""
    torch.manual_seed(0)
    texts = ["A red cube stands on the ground.", "What colour is the cube?", *(f" {a}" for a in ANSWERS)]
    tokenizer = Tokenizer.train(texts, vocab_size=280)
    folder = tmp_path_factory.mktemp("models") / "small"
    config = prismer_tiny(**SMALL_MODEL, vocab_size=tokenizer.vocab_size)
    Prismer(config, tokenizer).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """train/ of 12 and val/ of 2 rendered scenes."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    render_dataset(folder, train=12, val=2, test=0, size=48, label_size=48, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory, scenes) -> list[Path]:
    """The 12 training images as JPEG files."""
    folder = tmp_path_factory.mktemp("images")
    dataset = ShardDataset(scenes / "train")
    for i in range(len(dataset)):
        (folder / f"{i:02}.jpg").write_bytes(dataset[i].jpeg)
    return sorted(folder.iterdir())


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """A copy of the model folder, to damage."""
    return Path(shutil.copytree(model, tmp_path / "copy"))
