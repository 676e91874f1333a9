"""Proves that weights that do not fit are refused with a table and a remedy.

Run: pytest tests/model/test_loading.py
"""

import itertools
import logging
import re

import pytest
import torch
from safetensors.torch import load_file

from prismer.config import ALL_EXPERTS
from prismer.model import Prismer
from prismer.weights.load_report import LoadReport, Misfit
from prismer.weights.names import IGNORED
from prismer.weights.tensors import load_tensors
from tests.model.plain_published import randomise
from tests.model.published_files import (
    MATRIX,
    TEXT,
    VISION,
    compare,
    drop,
    small,
    small_preset,  # noqa: F401 - a fixture
    write,
)

SETS = (("seg", "depth"), ALL_EXPERTS, ())


@pytest.mark.parametrize("stored, asked", list(itertools.permutations(SETS, 2)), ids=str)
def test_other_experts_are_refused(tmp_path, stored, asked):
    """Asked for by name or by a config; the sentence names both sets of experts and what to do."""
    write(tmp_path / "a.bin", small(experts=stored))
    for options in (dict(experts=asked), dict(config=small(experts=asked))):
        with pytest.raises(ValueError) as caught:
            Prismer.from_pretrained(tmp_path / "a.bin", **options)
        sentence = str(caught.value).splitlines()[-1]
        assert "a model works with the experts that it was trained with; set experts to [" in sentence
        has, wants = re.search(r" has (?:the experts )?(.+), but asked for (?:is|are) (.+): a model", sentence).groups()
        assert set(has.split(", ")) == set(stored or ["no experts"])
        assert set(wants.split(", ")) == set(asked or ["none"])
        assert ("from_backbones" in sentence) == (not set(asked) <= set(stored))
    assert isinstance(caught.value, Misfit)


def test_the_same_experts_in_another_order_load(tmp_path):
    plain = write(tmp_path / "a.bin", small(experts=("depth", "seg")))
    compare(Prismer.from_pretrained(tmp_path / "a.bin", experts=["seg", "depth"]), plain)


def test_other_experts_of_a_model_folder_are_refused(tmp_path):
    Prismer(small(experts=("seg", "depth"))).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"has the experts seg, depth, .*set experts to \['seg', 'depth'"):
        Prismer.from_pretrained(tmp_path / "m", experts=ALL_EXPERTS)
    (tmp_path / "m" / "config.json").write_text(small().to_json())
    with pytest.raises(Misfit, match=r"has the experts depth, seg, but asked for are depth, normal"):
        Prismer.from_pretrained(tmp_path / "m")


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def reshape(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


BLOCK = f"{VISION}transformer.resblocks.1"


FAULTS = {
    "missing bias": (drop(f"{BLOCK}.0.attn.out_proj.bias"), r"missing +encoder.blocks.\*.attn.out_proj.bias"),
    "missing norm": (drop(f"{TEXT}roberta.encoder.layer.0.1.output.LayerNorm.weight"), "missing +decoder.layers"),
    "unexpected": (rename(IGNORED, f"{TEXT}x.y"), "unexpected +text_decoder.x.y +1x514"),
    "transposed": (reshape(f"{BLOCK}.0.mlp.c_fc.weight", torch.t), "other shape +encoder.* +32x128 +128x32"),
    "not a grid": (reshape(f"{VISION}positional_embedding", lambda t: t[1:]), "other shape .*positional.*24x32 +25x32"),
    "misnamed layer": (
        rename(f"{BLOCK}.1.adaptor_ln.bias", f"{BLOCK}.1.ln_adaptor.bias"),
        r"(?s)missing +encoder.*adaptor.norm.bias.*unexpected +expert_encoder.transformer.resblocks.\*.\*.ln_adaptor",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_listed_in_a_table(tmp_path, fault):
    change, row = FAULTS[fault]
    write(tmp_path / "a.bin", small(), change=change)
    with pytest.raises(Misfit) as caught:
        Prismer.from_pretrained(tmp_path / "a.bin")
    assert re.search(row, str(caught.value)), str(caught.value)
    assert "does not fit the config" in str(caught.value).splitlines()[-1]


def test_a_positional_table_that_is_not_square_is_not_resized(tmp_path):
    write(tmp_path / "a.bin", small(), change=FAULTS["not a grid"][0])
    with pytest.raises(Misfit, match="other shape .*positional.*24x32 +100x32"):
        Prismer.from_pretrained(tmp_path / "a.bin", image_size=160)


def test_different_copies_of_a_tied_tensor_are_refused(tmp_path):
    for name in (MATRIX, f"{TEXT}lm_head.decoder.bias"):
        write(tmp_path / "a.bin", small(), change=reshape(name, lambda t: t + 1))
        with pytest.raises(ValueError, match="holds two different .* one tensor in Prismer"):
            Prismer.from_pretrained(tmp_path / "a.bin")


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "a.bin"
    write(path, small(experts=()))
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a whole file of tensors"):
            Prismer.from_pretrained(path)
    for value in ([torch.zeros(1)], {"model": {"x": torch.zeros(1)}}, {"epoch": 3}):
        torch.save(value, path)
        with pytest.raises(ValueError, match="does not hold tensors by name"):
            Prismer.from_pretrained(path)


class Trap:
    """Unpickling it would end the process."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"x": Trap()}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="is not a whole file of tensors"):
        Prismer.from_pretrained(tmp_path / "a.bin")


def test_a_refused_load_changes_nothing():
    model = randomise(Prismer(small(experts=())))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    tensors.pop("decoder.head.bias")
    with pytest.raises(Misfit):
        load_tensors(model, tensors, "x")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_loading_report_is_a_table(tmp_path, caplog):
    write(tmp_path / "a.bin", small(image_size=224))
    seen = []
    Prismer.from_pretrained(tmp_path / "a.bin", image_size=320, on_report=seen.append)
    (report,) = seen
    assert report.fits and not report.plain
    assert str(report).splitlines() == [
        f"{tmp_path}/a.bin: {len(Prismer(small()).state_dict())} tensors loaded",
        "          tensor                                        in the file  in the model",
        "resized   encoder.positional_embedding                  196x32       400x32",
        "left out  text_decoder.roberta.embeddings.position_ids",
    ]
    with caplog.at_level(logging.INFO, "prismer"):
        Prismer.from_pretrained(tmp_path / "a.bin")
    assert "left out" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "prismer"):
        Prismer.from_pretrained("tiny")
    assert not caplog.text


def test_the_report_joins_layers_and_is_cut_at_40_rows():
    shape = torch.Size((3, 4))
    rows = {f"a.{i}.b.{j}.weight": shape for i in range(12) for j in range(2)}
    assert "missing  a.*.b.*.weight  x24               3x4" in str(LoadReport(source="s", loaded=0, missing=rows))
    many = LoadReport(source="s", loaded=0, missing={f"t{i}": shape for i in range(100)})
    assert len(str(many).splitlines()) == 43 and str(many).endswith("... and 60 more rows")
    assert str(LoadReport(source="s", loaded=5)) == "s: 5 tensors loaded"


def test_a_model_folder_and_its_file_load_alike(tmp_path):
    model = randomise(Prismer(small()))
    model.save_pretrained(tmp_path / "m")
    loaded = Prismer.from_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config == model.config
    file = Prismer.from_pretrained(tmp_path / "m" / "model.safetensors")
    assert file.config == model.config
