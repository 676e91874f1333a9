"""Proves that published checkpoints load and are written exactly: files made by an independent model whose state dict
has the published names (plain_published.py) give the same tokens and logits in ours, in both directions; and that what
does not fit is refused with a table and a remedy. Run: pytest tests/model/test_published_checkpoint.py"""

import itertools
import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismer.batch import ImageBatch
from prismer.cli.main import main
from prismer.config import ALL_EXPERTS, PRESETS, PrismerConfig, preset
from prismer.experts import EXPERTS
from prismer.model import Prismer
from prismer.stems import CLIP_MEAN, CLIP_STD
from prismer.weights import published
from prismer.weights.load_report import LoadReport, Misfit
from prismer.weights.names import IGNORED, to_published
from prismer.weights.published import published_config, save_published
from prismer.weights.tensors import load_tensors
from tests.model.plain_published import LOW_LEVEL, PlainPrismer, bicubic, randomise
from tests.model.teacher_forcing import logits_of
from tests.model.test_published_keys import published_keys

SMALL = dict(
    image_size=80,
    label_size=224,
    vision_width=32,
    vision_depth=2,
    vision_heads=2,
    resampler_depth=4,
    resampler_heads=4,
    text_width=24,
    text_depth=3,
    text_heads=2,
    text_mlp_width=96,
    vocab_size=50,
)
TEXT, VISION = "text_decoder.", "expert_encoder."
WORD, MATRIX = f"{TEXT}roberta.embeddings.word_embeddings.weight", f"{TEXT}lm_head.decoder.weight"


def small(**changes) -> PrismerConfig:
    return PrismerConfig(**{**SMALL, "name": "small", **changes})


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    """The architecture of the test files is one that is known by its sizes, like BASE."""
    monkeypatch.setitem(PRESETS, "small", small)
    monkeypatch.setitem(PRESETS, "small14", lambda **changes: small(**{"name": "small14", "patch_size": 14, **changes}))


def write(path, config, seed=0, change=lambda tensors: None):
    """A published file with random tensors, and the plain model that it belongs to."""
    plain = randomise(PlainPrismer(config), seed)
    tensors = dict(plain.state_dict())
    change(tensors)
    path.parent.mkdir(exist_ok=True)
    torch.save(tensors, path)
    return plain


def inputs(config, seed=1, batch=2):
    """An ImageBatch, and the same as the plain model reads it."""
    g = torch.Generator().manual_seed(seed)
    rgb = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), generator=g, dtype=torch.uint8)
    labels, rows, plain = {}, {}, {}
    features = torch.randn(9, 64, generator=g)
    for name in config.experts:
        shape = (batch, EXPERTS[name].planes, config.label_size, config.label_size)
        ids = EXPERTS[name].is_ids
        labels[name] = torch.randint(0, 6 if ids else 250, shape, generator=g, dtype=torch.uint8)
        if ids:
            rows[name] = torch.randint(0, 9, (batch, 256), generator=g)
            picked = [features[rows[name][b]][labels[name][b, 0].long()] for b in range(batch)]
            plain[name] = torch.stack(picked).permute(0, 3, 1, 2)
        else:
            assert name in LOW_LEVEL
            x = labels[name].double().flatten(1) / 255
            low, high = x.min(1).values[:, None], x.max(1).values[:, None]
            plain[name] = (2 * (x - low) / (high - low + 1e-6) - 1).view(shape)
    instance_rows = torch.randint(0, 128, (256,), generator=g)
    images = ImageBatch(rgb=rgb, labels=labels, rows=rows, features=features, instance_rows=instance_rows)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    objects = labels["obj_detection"][:, 0] if "obj_detection" in labels else None
    return images, ((rgb / 255 - mean) / std, plain, objects, instance_rows)


def draw_ids(config, seed=2, shape=(2, 9)):
    """Token ids: one row with pads at its end, one with pads in between, as questions have them."""
    ids = torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = config.bos_id
    ids[0, 6:], ids[1, 3:5] = config.pad_id, config.pad_id
    return ids


def close(name, ours, plain, relative):
    """The largest difference, against the largest entry."""
    error = ((ours - plain).abs().max() / plain.abs().max()).item()
    assert error <= relative, f"{name} is off by {error:.2g} of its largest entry, allowed {relative:.2g}"


def compare(model, plain, seed=1):
    """Context and logits of ours and of the plain model, in fp32 and, without its roundings, in float64.

    Batch norms of ours stay fp32, so that with experts there is no float64.
    """
    config = model.config
    images, (rgb, labels, objects, rows) = inputs(config, seed)
    ids = draw_ids(config)
    for dtype, relative in ((torch.float32, 1e-5), (torch.float64, 1e-6))[: 1 if config.experts else 2]:
        model, plain = model.to(dtype), plain.to(dtype)
        with torch.no_grad():
            ours = model.encode(images)
            theirs = plain.expert_encoder(rgb.to(dtype), {k: v.to(dtype) for k, v in labels.items()}, objects, rows)
            close("context", ours, theirs, relative)
            close("logits", logits_of(model.decoder, ids, ours), plain.text_decoder(ids, theirs), relative)
    plain.float()


# loading


@pytest.mark.parametrize("experts", [ALL_EXPERTS, ("depth", "seg"), ("obj_detection", "normal"), ()], ids=str)
@pytest.mark.parametrize("patch", [16, 14])
def test_from_pretrained(tmp_path, experts, patch):
    """A file without config gives the tokens and logits of the model that wrote it."""
    config = small(experts=experts, patch_size=patch, image_size=5 * patch)
    plain = write(tmp_path / "pytorch_model.bin", config)
    model = Prismer.from_pretrained(tmp_path)
    assert set(model.config.experts) == set(experts) and model.config.patch_size == patch
    assert model.config.image_size == 5 * patch
    assert model.config.name == ("small14" if patch == 14 else "small") + ("" if experts else "-z")
    compare(model, plain)


def test_file_and_folder_are_the_same(tmp_path):
    write(tmp_path / "pytorch_model.bin", small())
    folder, file = (Prismer.from_pretrained(x) for x in (tmp_path, tmp_path / "pytorch_model.bin"))
    for (name, a), b in zip(folder.state_dict().items(), file.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not folder.training


def test_every_tensor_lands_where_it_belongs(tmp_path):
    """Numbered tensors: each of ours equals the published one of its name, counters and statistics included."""
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
def test_architecture_is_found(name, side):
    """From shapes alone, for every preset, resolution, and a variety of expert sets."""
    sets = [ALL_EXPERTS, (), ("seg",), ("depth", "obj_detection"), tuple(reversed(ALL_EXPERTS))]
    for experts in sets:
        config = preset(name, experts=experts, image_size=side)
        meta = {key: torch.empty(shape, device="meta") for key, shape in published_with(config).items()}
        found = published_config(meta, "file")
        ordered = tuple(e for e in ALL_EXPERTS if e in experts)
        assert found == config.replace(
            name=name if experts else f"{name}-z", experts=ordered, caption_prefix="" if side == 224 else "A picture of"
        )


def published_with(config):
    """The table, whose instance rows go with the objects."""
    table = published_keys(config)
    if "obj_detection" not in config.experts:
        table.pop(f"{VISION}instance_embedding", None)
    return table


def test_only_whole_published_sizes_are_presets():
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


def test_given_config(tmp_path):
    """Sizes of no preset load with the config that is given, or that lies beside the file."""
    config = small(text_depth=1, experts=("seg",))
    plain = write(tmp_path / "x" / "pytorch_model.bin", config)
    with pytest.raises(ValueError, match="sizes of no preset"):
        Prismer.from_pretrained(tmp_path / "x")
    compare(Prismer.from_pretrained(tmp_path / "x", config=config), plain)
    (tmp_path / "x" / "config.json").write_text(config.to_json())
    compare(Prismer.from_pretrained(tmp_path / "x"), plain)


def test_tokenizer_is_roberta_s(tmp_path):
    config = small(vocab_size=50265, experts=())
    PRESETS["small"] = lambda **changes: small(**{"vocab_size": 50265, **changes})
    write(tmp_path / "pretrain" / "pytorch_model.bin", config)
    model = Prismer.from_pretrained(tmp_path / "pretrain")
    assert model.tokenizer.encode("A picture of") == [250, 2170, 9]
    write(tmp_path / "other.bin", small(experts=()))
    with pytest.raises(ValueError, match="sizes of no preset"):
        Prismer.from_pretrained(tmp_path / "other.bin")


def test_dtype_and_grad(tmp_path):
    write(tmp_path / "a.bin", small())
    model = Prismer.from_pretrained(tmp_path / "a.bin", dtype=torch.bfloat16)
    whole = Prismer.from_pretrained(tmp_path / "a.bin")
    for (name, ours), full in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        expected = full if "running" in name or "num_batches" in name else full.bfloat16()
        assert torch.equal(ours, expected), name
    assert all(p.requires_grad for p in model.parameters())


def test_loading_leaves_the_file_alone(tmp_path):
    """The model is a copy: training it, or deleting the file, changes neither the other."""
    path = tmp_path / "a.bin"
    write(path, small())
    before = path.read_bytes()
    model = Prismer.from_pretrained(path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert path.read_bytes() == before


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


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
def test_tolerates(tmp_path, change):
    plain = write(tmp_path / "a.bin", small(), change=change)
    compare(Prismer.from_pretrained(tmp_path / "a.bin"), plain)


def test_safetensors_with_published_names(tmp_path):
    plain = randomise(PlainPrismer(small()))
    tensors = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    compare(Prismer.from_pretrained(tmp_path), plain)


def test_old_torch_format(tmp_path):
    plain = randomise(PlainPrismer(small()))
    torch.save(plain.state_dict(), tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    compare(Prismer.from_pretrained(tmp_path / "a.bin"), plain)


# writing


@pytest.mark.parametrize("experts", [ALL_EXPERTS, ("edge", "ocr_detection"), ()], ids=str)
def test_save_published(tmp_path, experts):
    """Our random model, written, loads strictly into the plain one, and both compute the same."""
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


def test_save_published_writes_fp32_and_tied_tensors_once(tmp_path):
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


def test_command_line(tmp_path, capsys):
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


# refusing

SETS = (("seg", "depth"), ALL_EXPERTS, ())


@pytest.mark.parametrize("stored, asked", list(itertools.permutations(SETS, 2)), ids=str)
def test_wrong_experts(tmp_path, stored, asked):
    """Whether asked for by name or by a config: the sentence names both sets and what to do."""
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


def test_right_experts_in_another_order(tmp_path):
    plain = write(tmp_path / "a.bin", small(experts=("depth", "seg")))
    compare(Prismer.from_pretrained(tmp_path / "a.bin", experts=["seg", "depth"]), plain)


def test_wrong_experts_of_a_model_folder(tmp_path):
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
def test_what_does_not_fit_is_a_table(tmp_path, fault):
    change, row = FAULTS[fault]
    write(tmp_path / "a.bin", small(), change=change)
    with pytest.raises(Misfit) as caught:
        Prismer.from_pretrained(tmp_path / "a.bin")
    assert re.search(row, str(caught.value)), str(caught.value)
    assert "does not fit the config" in str(caught.value).splitlines()[-1]


def test_a_table_of_no_grid_is_not_resized(tmp_path):
    write(tmp_path / "a.bin", small(), change=FAULTS["not a grid"][0])
    with pytest.raises(Misfit, match="other shape .*positional.*24x32 +100x32"):
        Prismer.from_pretrained(tmp_path / "a.bin", image_size=160)


def test_copies_that_differ(tmp_path):
    for name in (MATRIX, f"{TEXT}lm_head.decoder.bias"):
        write(tmp_path / "a.bin", small(), change=reshape(name, lambda t: t + 1))
        with pytest.raises(ValueError, match="holds two different .* one tensor in Prismer"):
            Prismer.from_pretrained(tmp_path / "a.bin")


def test_broken_files(tmp_path):
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
    """What unpickling would run."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_nothing_in_a_file_is_run(tmp_path):
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


# the report


def test_report(tmp_path, caplog):
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


def test_report_joins_layers_and_ends():
    shape = torch.Size((3, 4))
    rows = {f"a.{i}.b.{j}.weight": shape for i in range(12) for j in range(2)}
    assert "missing  a.*.b.*.weight  x24               3x4" in str(LoadReport(source="s", loaded=0, missing=rows))
    many = LoadReport(source="s", loaded=0, missing={f"t{i}": shape for i in range(100)})
    assert len(str(many).splitlines()) == 43 and str(many).endswith("... and 60 more rows")
    assert str(LoadReport(source="s", loaded=5)) == "s: 5 tensors loaded"


# the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository: `calls` records what is asked of it, `folder` is what it holds."""
    import huggingface_hub

    class Hub:
        calls, folder = [], tmp_path / "snapshot"

        def download(self, name, allow_patterns):
            self.calls.append((name, allow_patterns))
            if name != "someone/prismer":
                raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nat all")
            return str(self.folder)

    hub = Hub()
    hub.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def test_hub_id(hub):
    model = randomise(Prismer(small(experts=())))
    model.save_pretrained(hub.folder)
    loaded = Prismer.from_pretrained("someone/prismer").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    ((name, patterns),) = hub.calls
    assert name == "someone/prismer" and {"config.json", "model.safetensors", "vocab.json"} <= set(patterns)
    assert not any("*" in p or p.endswith(".bin") for p in patterns)


def test_a_published_checkpoint_of_the_hub(hub):
    """The published ones are folders of one repository."""
    hub.folder.mkdir()
    plain = write(hub.folder / "vqa_prismerz_small" / "pytorch_model.bin", small(experts=()))
    compare(Prismer.from_pretrained("someone/prismer/vqa_prismerz_small"), plain)
    assert hub.calls[0][0] == "someone/prismer"
    assert "vqa_prismerz_small/pytorch_model.bin" in hub.calls[0][1]
    with pytest.raises(ValueError, match="holds no model.safetensors; name the folder in it"):
        Prismer.from_pretrained("someone/prismer")


def test_offline(hub, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^there is no folder no/body, .* from the hub \(no connection\); check"):
        Prismer.from_pretrained("no/body")
    hub.calls.clear()
    # nothing that is, or looks like, a path is asked of the hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    for source in ("runs/tiny", "runs/tyni", "./no/body", "/no/body", "nobody", "a b/c", tmp_path / "none"):
        with pytest.raises(ValueError, match="has no config.json|no model folder"):
            Prismer.from_pretrained(source)
    assert hub.calls == []


def test_own_folders_are_as_before(tmp_path):
    model = randomise(Prismer(small()))
    model.save_pretrained(tmp_path / "m")
    loaded = Prismer.from_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config == model.config
    file = Prismer.from_pretrained(tmp_path / "m" / "model.safetensors")
    assert file.config == model.config
