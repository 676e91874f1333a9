"""Proves that published checkpoints load and are written exactly: files made by an independent model whose state dict
has the published names (plain_published.py) give the same tokens and logits in ours, in both directions.

Run: pytest tests/model/test_published_checkpoint.py
"""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from prismer.cli.main import main
from prismer.config import ALL_EXPERTS, PRESETS, preset
from prismer.model import Prismer
from prismer.weights import published
from prismer.weights.names import IGNORED, to_published
from prismer.weights.published import published_config, save_published
from tests.model.plain_published import PlainPrismer, bicubic, randomise
from tests.model.published_files import (
    MATRIX,
    TEXT,
    VISION,
    WORD,
    compare,
    drop,
    published_with,
    small,
    small_preset,  # noqa: F401 - a fixture
    write,
)
from tests.model.test_published_keys import published_keys


@pytest.mark.parametrize("experts", [ALL_EXPERTS, ("depth", "seg"), ("obj_detection", "normal"), ()], ids=str)
@pytest.mark.parametrize("patch", [16, 14])
def test_a_published_file_gives_the_tokens_and_logits_of_its_model(tmp_path, experts, patch):
    """There is no config: the architecture is read off the tensors."""
    config = small(experts=experts, patch_size=patch, image_size=5 * patch)
    plain = write(tmp_path / "pytorch_model.bin", config)
    model = Prismer.from_pretrained(tmp_path)
    assert set(model.config.experts) == set(experts) and model.config.patch_size == patch
    assert model.config.image_size == 5 * patch
    assert model.config.name == ("small14" if patch == 14 else "small") + ("" if experts else "-z")
    compare(model, plain)


def test_a_file_and_its_folder_load_alike(tmp_path):
    write(tmp_path / "pytorch_model.bin", small())
    folder, file = (Prismer.from_pretrained(x) for x in (tmp_path, tmp_path / "pytorch_model.bin"))
    for (name, a), b in zip(folder.state_dict().items(), file.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not folder.training


def test_every_tensor_is_loaded_under_its_name(tmp_path):
    """Each of our tensors equals the published one of its name, including counters and statistics of batch norms."""
    write(tmp_path / "a.bin", small())
    stored = torch.load(tmp_path / "a.bin")
    for key, tensor in Prismer.from_pretrained(tmp_path / "a.bin").state_dict().items():
        for name in to_published(key):
            assert torch.equal(tensor, stored[name]), (key, name)


@pytest.mark.parametrize("stored, asked", [(14, 30), (30, 14), (14, 24), (5, 5)])
def test_positional_table_is_resized(tmp_path, stored, asked):
    config = small(image_size=16 * stored, experts=())
    plain = write(tmp_path / "a.bin", config)
    model = Prismer.from_pretrained(tmp_path / "a.bin", image_size=16 * asked)
    expected = bicubic(plain.expert_encoder.positional_embedding, asked)
    torch.testing.assert_close(model.encoder.positional_embedding, expected, rtol=0, atol=1e-6)
    grown = PlainPrismer(model.config)
    grown.load_state_dict(plain.state_dict() | {f"{VISION}positional_embedding": expected})
    if asked <= 14:
        compare(model, grown.eval().requires_grad_(False))


@pytest.mark.parametrize("name", ["base", "large", "huge"])
@pytest.mark.parametrize("side", [224, 384, 480])
def test_the_architecture_is_found(name, side):
    """From shapes alone, for every preset and resolution and several sets of experts."""
    sets = [ALL_EXPERTS, (), ("seg",), ("depth", "obj_detection"), tuple(reversed(ALL_EXPERTS))]
    for experts in sets:
        config = preset(name, experts=experts, image_size=side)
        meta = {key: torch.empty(shape, device="meta") for key, shape in published_with(config).items()}
        found = published_config(meta, "file")
        ordered = tuple(e for e in ALL_EXPERTS if e in experts)
        assert found == config.replace(
            name=name if experts else f"{name}-z", experts=ordered, caption_prefix="" if side == 224 else "A picture of"
        )


def test_sizes_of_no_preset_are_refused():
    config = preset("base", experts=())
    table = {key: torch.empty(shape, device="meta") for key, shape in published_keys(config).items()}
    cut = {key: value for key, value in table.items() if "encoder.layer.11." not in key}
    with pytest.raises(ValueError, match=r"the nearest is base, but for text_depth 11 \(not 12\).*config="):
        published_config(cut, "file")
    for key in (f"{VISION}positional_embedding", f"{VISION}conv1.rgb.weight"):
        with pytest.raises(ValueError, match=f"file lacks {re.escape(key)}"):
            published_config({k: v for k, v in table.items() if k != key}, "file")
    stranger = {**table, f"{VISION}conv1.sound.1.weight": torch.empty(96, 1, 3, 3, device="meta")}
    with pytest.raises(ValueError, match=r"experts this library does not know \(sound\)"):
        published_config(stranger, "file")


def test_a_given_config_is_used(tmp_path):
    """Sizes of no preset load with a config that is given or lies beside the file."""
    config = small(text_depth=1, experts=("seg",))
    plain = write(tmp_path / "x" / "pytorch_model.bin", config)
    with pytest.raises(ValueError, match="sizes of no preset"):
        Prismer.from_pretrained(tmp_path / "x")
    compare(Prismer.from_pretrained(tmp_path / "x", config=config), plain)
    (tmp_path / "x" / "config.json").write_text(config.to_json())
    compare(Prismer.from_pretrained(tmp_path / "x"), plain)


def test_the_tokenizer_is_robertas(tmp_path):
    config = small(vocab_size=50265, experts=())
    PRESETS["small"] = lambda **changes: small(**{"vocab_size": 50265, **changes})
    write(tmp_path / "pretrain" / "pytorch_model.bin", config)
    model = Prismer.from_pretrained(tmp_path / "pretrain")
    assert model.tokenizer.encode("A picture of") == [250, 2170, 9]
    write(tmp_path / "other.bin", small(experts=()))
    with pytest.raises(ValueError, match="sizes of no preset"):
        Prismer.from_pretrained(tmp_path / "other.bin")


def test_weights_are_cast_and_train(tmp_path):
    write(tmp_path / "a.bin", small())
    model = Prismer.from_pretrained(tmp_path / "a.bin", dtype=torch.bfloat16)
    whole = Prismer.from_pretrained(tmp_path / "a.bin")
    for (name, ours), full in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        expected = full if "running" in name or "num_batches" in name else full.bfloat16()
        assert torch.equal(ours, expected), name
    assert all(p.requires_grad for p in model.parameters())


def test_the_loaded_model_is_a_copy(tmp_path):
    """Changing the model leaves the file as it was."""
    path = tmp_path / "a.bin"
    write(path, small())
    before = path.read_bytes()
    model = Prismer.from_pretrained(path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert path.read_bytes() == before


def drop_matching(pattern):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if re.search(pattern, name)]


@pytest.mark.parametrize(
    "change",
    [
        drop(IGNORED),
        drop(MATRIX),
        drop(WORD),
        drop(f"{TEXT}lm_head.bias"),
        drop(f"{TEXT}lm_head.decoder.bias"),
        drop_matching("num_batches_tracked"),
        drop(IGNORED, MATRIX, f"{TEXT}lm_head.decoder.bias"),
    ],
    ids=["position_ids", "matrix", "words", "bias", "decoder.bias", "counters", "all"],
)
def test_tensors_stored_elsewhere_or_without_effect_may_be_missing(tmp_path, change):
    plain = write(tmp_path / "a.bin", small(), change=change)
    compare(Prismer.from_pretrained(tmp_path / "a.bin"), plain)


def test_a_safetensors_file_with_published_names_loads(tmp_path):
    plain = randomise(PlainPrismer(small()))
    tensors = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    compare(Prismer.from_pretrained(tmp_path), plain)


def test_the_old_torch_format_loads(tmp_path):
    plain = randomise(PlainPrismer(small()))
    torch.save(plain.state_dict(), tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    compare(Prismer.from_pretrained(tmp_path / "a.bin"), plain)


@pytest.mark.parametrize("experts", [ALL_EXPERTS, ("edge", "ocr_detection"), ()], ids=str)
def test_a_written_file_loads_into_the_plain_model(tmp_path, experts):
    """It loads strictly, and both models compute the same."""
    config = small(experts=experts)
    model = randomise(Prismer(config))
    save_published(model, tmp_path / "new" / "pytorch_model.bin")
    stored = torch.load(tmp_path / "new" / "pytorch_model.bin", weights_only=True)
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == published_with(config)
    plain = PlainPrismer(config)
    plain.load_state_dict(stored, strict=True)
    compare(model, plain.eval().requires_grad_(False))
    back = Prismer.from_pretrained(tmp_path / "new")
    for name, tensor in model.float().state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_written_file_is_fp32_and_holds_tied_tensors_once(tmp_path):
    model = Prismer(small(vocab_size=20_000, experts=())).to(torch.bfloat16)
    save_published(model, tmp_path / "a.bin")
    stored = torch.load(tmp_path / "a.bin")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.int64}
    assert stored[WORD].data_ptr() == stored[MATRIX].data_ptr()
    payload = 4 * sum(p.numel() for p in model.parameters())
    assert payload < (tmp_path / "a.bin").stat().st_size < payload + 500_000
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o644


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = Prismer(small(experts=()))
    save_published(model, tmp_path / "a.bin")
    before = (tmp_path / "a.bin").read_bytes()

    def fail(tensors, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(published.torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_published(model, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="is a folder; name a file"):
        save_published(model, tmp_path)


def test_prismer_export_translates_in_both_directions(tmp_path, capsys):
    """A published file to a model folder and back, and tiny to a published file."""
    file, folder = tmp_path / "a.bin", tmp_path / "folder"
    write(file, small())
    assert main(["export", str(file), "--out", str(folder)]) == 0
    assert "left out" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["experts"] == list(ALL_EXPERTS)
    assert main(["export", str(folder), "--official", str(tmp_path / "b.bin")]) == 0
    a, b = torch.load(file), torch.load(tmp_path / "b.bin")
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert main(["export", "tiny", "--official", str(tmp_path / "tiny.bin")]) == 0
    tiny = Prismer.from_pretrained(tmp_path / "tiny.bin", dtype=torch.float32)
    for name, tensor in Prismer.from_pretrained("tiny", dtype=torch.float32).state_dict().items():
        assert torch.equal(tiny.state_dict()[name], tensor), name
    with pytest.raises(SystemExit):
        main(["export", str(folder)])
    capsys.readouterr()
    torch.save({f"{VISION}x": torch.zeros(1)}, tmp_path / "c.bin")
    assert main(["export", str(tmp_path / "c.bin"), "--out", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.startswith("prismer: ") and not (tmp_path / "no").exists()
