"""Proves that a damaged model folder loads as it was saved, or is refused in one sentence before it takes memory.

python -m pytest tests/faults/test_model_files.py
"""

import json
import resource
import shutil
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prismer.config import prismer_tiny
from prismer.model import Prismer
from prismer.tokenizer import Tokenizer
from tests.faults.anything import cases, damaged, dump, is_sentence, mutated

SMALL = dict(
    image_size=32,
    label_size=32,
    vision_width=16,
    vision_depth=1,
    vision_heads=2,
    resampler_depth=1,
    resampler_heads=2,
    num_latents=4,
    text_width=16,
    text_depth=1,
    text_heads=2,
    text_mlp_width=32,
)


class Saved:
    """A model folder and its tensors; not a dataclass, because hypothesis would print every tensor of a failure."""

    def __init__(self, folder, tensors):
        self.folder, self.tensors = folder, tensors

    def is_in(self, model):
        """Whether a loaded model equals the saved one, except for resized positional embeddings."""
        found = model.state_dict()
        resized = {"encoder.positional_embedding"} if model.config.image_size != 32 else set()
        return all(torch.equal(found[name], self.tensors[name]) for name in self.tensors.keys() - resized)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved"
    tokenizer = Tokenizer.train(["a cube", "two cones"], 300)
    torch.manual_seed(0)
    model = Prismer(prismer_tiny(**SMALL, vocab_size=tokenizer.vocab_size), tokenizer)
    model.save_pretrained(folder)
    return Saved(folder, model.state_dict())


def load(folder):
    """Load the model, or return the sentence that refuses it; either may take half a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Prismer.from_pretrained(folder)
    except ValueError as error:
        *_, found = str(error).splitlines()
        assert is_sentence(found), found
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    return found


def altered(saved, place):
    shutil.rmtree(place, ignore_errors=True)
    return shutil.copytree(saved.folder, place)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("altered") / "model"


@cases(200)
@given(data=st.data())
def test_a_mutated_config_loads_or_is_refused(saved, place, data):
    folder = altered(saved, place)
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_bytes(dump(data.draw(mutated(config))))
    found = load(folder)
    if isinstance(found, str):
        assert "config" in found or "experts" in found, found
    else:
        assert saved.is_in(found)


@cases(100)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(saved, place, data):
    folder = altered(saved, place)
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    whole = (folder / name).read_bytes()
    broken = data.draw(damaged(whole))
    (folder / name).write_bytes(broken)
    found = load(folder)
    if isinstance(found, str):
        assert name in found or folder.name in found, (name, found)
    elif broken != whole:
        # users may edit these files, which must not change a weight
        assert name in ("config.json", "checksums.json", "tokenizer.json", "README.md"), name
    if not isinstance(found, str):
        assert saved.is_in(found)
