"""Proves that damaged and absurd model folders are refused in one sentence before memory is allocated, and that a full
disk costs no model.

Run: pytest tests/model/test_damaged_folders.py
"""

import json
import logging
import os
import random
import resource
import shutil
import time

import pytest
import torch
from safetensors.torch import save_file

from prismer.config import PrismerConfig, prismer_tiny
from prismer.costs.info import info_text
from prismer.errors import InputError
from prismer.files import find_damage
from prismer.model import Prismer
from prismer.shipped import shipped_folder
from prismer.tokenizer import Tokenizer
from prismer.training.initial_model import build_initial_model, initial_config
from prismer.weights.published import save_published
from tests.faults.disk import full_after

SIZES = dict(
    image_size=64,
    label_size=64,
    vision_width=32,
    vision_depth=2,
    vision_heads=2,
    resampler_depth=1,
    resampler_heads=2,
    num_latents=4,
    text_width=32,
    text_depth=2,
    text_heads=2,
    text_mlp_width=64,
)


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer.from_folder(shipped_folder("tiny"))
    return Prismer(prismer_tiny(**SIZES, vocab_size=tokenizer.vocab_size), tokenizer)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def refusal(load) -> str:
    """The sentence that `load` ends with: the last line of its message, after the table of weights that do not fit."""
    with pytest.raises(ValueError) as caught:
        load()
    assert isinstance(caught.value, InputError)
    return str(caught.value).splitlines()[-1]


def flip(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.json", "merges.txt"])
def test_a_flipped_bit_is_noticed(folder, name):
    whole = (folder / name).read_bytes()
    for _ in range(8):
        flip(folder / name, random.randrange(8 * len(whole)))
        # a damaged merge is reported with the vocabulary's name
        assert str(folder) in refusal(lambda: Prismer.from_pretrained(folder))
        (folder / name).write_bytes(whole)


def test_a_changed_weight_is_noticed(folder):
    """The last weight, which no header covers."""
    path = folder / "model.safetensors"
    flip(path, 8 * (path.stat().st_size - 40))
    words = "is damaged: its checksum is not the one in checksums.json"
    assert words in refusal(lambda: Prismer.from_pretrained(folder))


def test_a_file_of_another_size_is_noticed(folder):
    (folder / "merges.txt").write_text((folder / "merges.txt").read_text().rsplit("\n", 2)[0] + "\n")
    assert "merges.txt is damaged" in refusal(lambda: Prismer.from_pretrained(folder))


def test_a_folder_without_checksums_loads(folder, caplog):
    (folder / "checksums.json").unlink()
    with caplog.at_level(logging.INFO):
        Prismer.from_pretrained(folder)
    assert "holds no checksums" in caplog.text


def test_an_edited_config_warns(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "caption_prefix": "a photo of"}))
    with pytest.warns(UserWarning, match="config.json was changed since the model was written"):
        assert Prismer.from_pretrained(folder).config.caption_prefix == "a photo of"


def test_a_flipped_bit_in_a_published_file_is_noticed(model, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    save_published(model, path)
    Prismer.from_pretrained(path, config=model.config)
    flip(path, 8 * (path.stat().st_size // 2))
    assert "is damaged (the checksum of" in refusal(lambda: Prismer.from_pretrained(path, config=model.config))


def test_the_shipped_folders_are_whole(monkeypatch, tmp_path):
    for name in ("tiny", "tiny-towers", "roberta"):
        assert (shipped_folder(name) / "checksums.json").is_file() and find_damage(shipped_folder(name)) is None
    shutil.copytree(shipped_folder("tiny-towers"), tmp_path / "t")
    flip(tmp_path / "t" / "towers.safetensors", 8 * 1_000_000)
    monkeypatch.setattr("prismer.training.initial_model.shipped_folder", lambda name: tmp_path / "t")
    assert "towers.safetensors is damaged" in refusal(lambda: build_initial_model("tiny"))


ABSURD = {
    "vision_depth": 10**9,
    "text_depth": 10**6,
    "resampler_depth": 10**7,
    "vision_width": 2**40,
    "text_width": 2**33,
    "text_mlp_width": 10**12,
    "vocab_size": 10**13,
    "max_positions": 10**12,
    "num_latents": 10**12,
    "num_instances": 10**11,
    "image_size": 10**6,
    "label_size": 10**9,
    "vision_heads": 0,
    "text_heads": -2,
    "patch_size": 10**6,
    "bos_id": -1,
    "caption_max_length": 0,
    "vision_activation": "relu",
    "name": 5,
    "experts": [[]],
    "dropout": 1.0,
    "init_std": -1.0,
    "caption_prefix": "\ud800",
    "semantics": None,
}
LARGE = {
    "vision_depth": 1000,
    "text_depth": 1000,
    "resampler_depth": 1000,
    "vision_width": 65_536,
    "text_width": 65_536,
    "text_mlp_width": 200_000,
    "vocab_size": 10**7,
    "max_positions": 10**7,
    "num_latents": 50_000,
    "num_instances": 60_000,
}


@pytest.mark.parametrize("field, value", [*ABSURD.items(), *LARGE.items()])
def test_an_absurd_config_builds_nothing(folder, field, value):
    """Neither from_pretrained nor training nor `prismer info` spends time or memory on it."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (Prismer.from_pretrained, initial_config, info_text):
        assert field in refusal(lambda load=load: load(str(folder)))
    assert time.monotonic() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is not JSON"),
        ("[]", "unknown settings"),
        ("5", "unknown settings"),
        ('{"dropout": NaN}', "NaN"),
        ('{"dropout": 1e999}', "1e999"),
        ('{"dropout": 0, "dropout": 0}', "twice"),
        ("[" * 10**5, "too deeply"),
        ('{"experts": 5}', "experts is 5"),
        ('{"experts": [{}]}', "unknown expert"),
        ("{}", "does not fit"),
    ],
)
def test_a_damaged_config_is_refused(folder, text, words):
    (folder / "config.json").write_text(text)
    assert words in refusal(lambda: Prismer.from_pretrained(folder))


@pytest.mark.parametrize("field", ["dropout", "label_smoothing", "init_std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_numbers_of_a_config_must_be_finite(field, value):
    with pytest.raises(ValueError, match=field):
        PrismerConfig(**{field: value})


TOKENIZERS = {
    "vocab list": ("vocab.json", "[]"),
    "vocab null": ("vocab.json", "null"),
    "vocab bytes": ("vocab.json", b"\xff\xfe"),
    "vocab deep": ("vocab.json", "[" * 10**5),
    "vocab surrogate": ("vocab.json", '{"\\ud800": 0}'),
    "merges bytes": ("merges.txt", b"\xff\xff"),
    "merges one": ("merges.txt", "#version: 0.2\na\n"),
    **{
        f"tokenizer {number}": ("tokenizer.json", text)
        for number, text in enumerate(
            (
                "5",
                "[]",
                '{"model": 5}',
                '{"model": {"type": "BPE"}, "pre_tokenizer": "ByteLevel"}',
                *(
                    json.dumps(
                        {"model": {"type": "BPE", "vocab": {"a": 0}}, "pre_tokenizer": {"type": "ByteLevel"}} | more
                    )
                    for more in (
                        {"added_tokens": 5},
                        {"added_tokens": [5]},
                        {"added_tokens": [{"id": 1}]},
                        {"added_tokens": None},
                        {"added_tokens": [{"id": "x", "content": []}]},
                        {"added_tokens": [{"id": 2, "content": 5}]},
                    )
                ),
                *(
                    json.dumps(
                        {
                            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": merges},
                            "pre_tokenizer": {"type": "ByteLevel"},
                        }
                    )
                    for merges in (5, None, [5], [None], [["a"]], [["a", 5]], {"a": 1})
                ),
            )
        )
    },
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused(folder, case):
    name, content = TOKENIZERS[case]
    if name == "tokenizer.json":
        for other in ("vocab.json", "merges.txt"):
            (folder / other).unlink()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert name in refusal(lambda: Prismer.from_pretrained(folder))


def test_a_full_disk_leaves_the_old_model(model, folder, tmp_path):
    """Whether weights, config or tokenizer fail to be written; the same for a published file."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save_published(model, tmp_path / "a.bin")
    published = (tmp_path / "a.bin").read_bytes()
    for size in (0, 1000, 100_000, len(before["model.safetensors"]) - 1):
        with pytest.raises(OSError) as caught, full_after(size):
            model.save_pretrained(folder)
        assert caught.value.filename
        with pytest.raises(OSError, match="a.bin"), full_after(size):
            save_published(model, tmp_path / "a.bin")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (tmp_path / "a.bin").read_bytes() == published
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "m"]


def test_an_interrupted_save_is_reported(folder):
    """After a kill between the two renames, the sentence says where the earlier model is."""
    folder.rename(folder.with_name(".m-old"))
    assert "was interrupted, and the earlier model lies in" in refusal(lambda: Prismer.from_pretrained(folder))


def test_weights_are_written_as_they_are(tmp_path):
    model = Prismer(prismer_tiny(**SIZES)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    assert find_damage(tmp_path / "m") is None, "the checksum of the stream is not that of the file"
    again = Prismer.from_pretrained(tmp_path / "m", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("source", [None, 5, b"tiny", ["tiny"], ""])
def test_a_source_that_names_no_model_is_refused(source):
    assert "the model is" in refusal(lambda: Prismer.from_pretrained(source))


@pytest.mark.parametrize("data", [b"hi", b"\x80\x02junk", b"\x80\x05.", b"GIF89a", b"PK\3\4junk", b"{}", b"["])
def test_a_file_that_torch_did_not_write_is_refused(tmp_path, data):
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    message = refusal(lambda: Prismer.from_pretrained(tmp_path / "pytorch_model.bin"))
    assert "pytorch_model.bin is not a whole file of tensors" in message


def test_tensors_without_names_are_refused(tmp_path):
    torch.save({1: torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    message = refusal(lambda: Prismer.from_pretrained(tmp_path / "pytorch_model.bin"))
    assert "does not hold tensors by name" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("which", ["encoder.positional_embedding", "decoder.embeddings.word.weight"])
def test_weights_that_are_no_floats_are_refused(model, folder, dtype, which):
    """Without their scales, int8 weights would be other weights."""
    state = model.state_dict()
    save_file({k: (t.to(dtype) if k == which else t).clone() for k, t in state.items()}, folder / "model.safetensors")
    (folder / "checksums.json").unlink()
    message = refusal(lambda: Prismer.from_pretrained(folder))
    assert f"{which} as {dtype}" in message


@pytest.mark.parametrize("kind", ["file", "fifo", "dangling link", "folder of other things"])
def test_a_save_deletes_nothing_but_a_model(model, tmp_path, kind):
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "dangling link":
        place.symlink_to("nowhere")
    else:
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    before = sorted((path, path.lstat().st_mode) for path in tmp_path.rglob("*"))
    refusal(lambda: model.save_pretrained(place))
    assert sorted((path, path.lstat().st_mode) for path in tmp_path.rglob("*")) == before


def test_a_save_replaces_a_model_and_fills_an_empty_folder(model, tmp_path):
    (tmp_path / "m").mkdir()
    for _ in range(2):
        model.save_pretrained(tmp_path / "m")
    assert Prismer.from_pretrained(tmp_path / "m") is not None
