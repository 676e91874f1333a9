"""Proves that a new Prismer inherits its towers exactly: open_clip's CLIPs and transformers' RoBERTas of random weights
give the same tokens and logits inside it; all other parts are new and initialised as documented; the result trains; and
towers that do not fit are refused in one sentence. Run: pytest tests/model/test_backbones.py"""

import json
import shutil
import warnings

import open_clip
import pytest
import torch
import transformers
from huggingface_hub import constants

import prismer.weights.backbones as backbones
from prismer.batch import Batch, TextBatch
from prismer.cli.main import main
from prismer.config import ALL_EXPERTS, prismer_base, prismer_huge, prismer_large
from prismer.freezing import freeze
from prismer.model import Prismer
from prismer.tokenizer import Tokenizer
from prismer.training.initial_model import build_initial_model
from tests.fake_hub import FakeHub, connected
from tests.model.plain_published import bicubic, randomise
from tests.model.teacher_forcing import logits_of
from tests.model.test_model import make_images
from tests.model.twins import assert_close, encode_without_adaptors, open_clip_tokens

CLIPS = {
    # name: (vision settings, whether it has QuickGELU)
    "prismer-test-b": (dict(image_size=64, layers=2, width=64, head_width=16, patch_size=16), True),
    "prismer-test-h": (dict(image_size=70, layers=3, width=80, head_width=40, patch_size=14), False),
    "prismer-test-wide": (dict(image_size=64, layers=1, width=64, head_width=16, patch_size=16, mlp_ratio=2.0), True),
    "prismer-test-scale": (
        dict(image_size=64, layers=1, width=64, head_width=16, patch_size=16, ls_init_value=1e-5),
        True,
    ),
    "prismer-test-nopre": (dict(image_size=64, layers=1, width=64, head_width=16, patch_size=16, no_ln_pre=True), True),
    "prismer-test-tanh": (
        dict(image_size=64, layers=1, width=64, head_width=16, patch_size=16, act_kwargs={"approximate": "tanh"}),
        False,
    ),
    "prismer-test-pool": (
        dict(image_size=64, layers=1, width=64, head_width=16, patch_size=16, attentional_pool=True),
        True,
    ),
}


NEW = dict(resampler_heads=4, resampler_depth=1, num_latents=4, label_size=64)


@pytest.fixture(scope="module", autouse=True)
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, (vision, quick) in CLIPS.items():
        text = dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1)
        config = dict(embed_dim=16, quick_gelu=quick, vision_cfg=vision, text_cfg=text)
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def make_clip(name, path, seed=0, dtype=torch.float32):
    clip = randomise(open_clip.create_model(name), seed)
    torch.save({key: tensor.to(dtype) for key, tensor in clip.state_dict().items()}, path)
    return clip.visual


def make_roberta(folder, seed=1, tokenizer=True, cls=transformers.RobertaForMaskedLM, **changes):
    """A small RoBERTa, saved in the layout of the hub."""
    words = Tokenizer.train(["a red cube on the ground"] * 3 + ["Is there a sphere?"] * 2, vocab_size=270)
    settings = dict(
        vocab_size=words.vocab_size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=72,
        max_position_embeddings=40,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.2,
    )
    config = transformers.RobertaConfig(**{**settings, **changes})
    model = randomise(cls(config), seed)
    model.save_pretrained(folder)
    if tokenizer:
        words.save(folder)
    return model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    visual = make_clip("prismer-test-b", folder / "clip.pt")
    roberta = make_roberta(folder / "roberta")
    return folder, visual, roberta


@pytest.mark.parametrize("name", ["prismer-test-b", "prismer-test-h"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_vision_tower_gives_open_clips_tokens(tmp_path, parts, name, dtype):
    """QuickGELU with heads of 16, exact GELU with heads of 40, from files in fp32 and fp16."""
    visual = make_clip(name, tmp_path / "clip.pt", dtype=dtype)
    visual.load_state_dict({key: tensor.to(dtype).float() for key, tensor in visual.state_dict().items()})
    model = Prismer.from_backbones(name, parts[0] / "roberta", vision_weights=tmp_path / "clip.pt", experts=(), **NEW)
    settings, quick = CLIPS[name]
    assert model.config.vision_heads == settings["width"] // settings["head_width"]
    assert model.config.vision_activation == ("quick_gelu" if quick else "gelu")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    images = torch.randn(2, 3, settings["image_size"], settings["image_size"])
    assert_close("tokens", encode_without_adaptors(model, images), open_clip_tokens(visual, images))


@pytest.mark.parametrize("size", [32, 96])
def test_positional_table_is_resized(parts, size):
    folder, visual, _ = parts
    model = Prismer.from_backbones(
        "prismer-test-b", folder / "roberta", vision_weights=folder / "clip.pt", image_size=size, experts=(), **NEW
    )
    expected = bicubic(visual.positional_embedding[1:], size // 16)
    torch.testing.assert_close(model.encoder.positional_embedding.detach(), expected, rtol=0, atol=1e-6)
    assert model.config.image_size == size


@pytest.mark.parametrize("where", ["folder", "file", "safetensors"])
def test_text_tower_gives_robertas_logits(parts, tmp_path, where):
    """Embeddings, layers and head: without the new parts, the logits are those of transformers' causal RoBERTa."""
    folder, _, roberta = parts
    options = {}
    if where == "file":
        torch.save(roberta.state_dict(), tmp_path / "words.bin")
        options["text_weights"] = tmp_path / "words.bin"
    if where == "safetensors":
        options["text_weights"] = folder / "roberta" / "model.safetensors"
    model = build(parts, **options)
    causal = transformers.RobertaForCausalLM.from_pretrained(folder / "roberta", is_decoder=True).eval()
    decoder = model.decoder
    for layer in decoder.layers:
        layer.cross.forward = lambda x, *_: x
        layer.adaptor.forward = lambda x: x
    decoder.extra.forward = lambda x, *_: x
    ids = torch.randint(3, model.config.vocab_size, (2, 9))
    ids[0, 6:] = 1
    expected = causal(ids, attention_mask=(ids != 1).long()).logits
    assert_close("logits", logits_of(decoder, ids, torch.zeros(2, 1, 64)), expected)
    assert model.config.dropout == 0.2 and model.config.text_mlp_width == 72
    assert model.tokenizer.decode(model.tokenizer.encode("a red cube")) == "a red cube"


def build(parts, **options):
    options = {"vision_weights": parts[0] / "clip.pt", **NEW, **options}
    return Prismer.from_backbones("prismer-test-b", parts[0] / "roberta", **options)


def test_only_the_towers_are_inherited(parts):
    """What can be frozen, both ends of the encoder, embeddings and head are copied; the rest depends on the seed."""
    one, again, other = build(parts), build(parts), build(parts, seed=1)
    freeze(one, "freeze_lang_vision")
    ends = ("decoder.embeddings.", "decoder.head.")
    copied = {n for n, p in one.named_parameters() if not p.requires_grad or n.startswith(ends)} | {
        "encoder.positional_embedding",
        "encoder.stems.rgb.weight",
        *(f"encoder.{norm}.{leaf}" for norm in ("ln_pre", "ln_post") for leaf in ("weight", "bias")),
    }
    _, visual, roberta = parts
    # without class token and projection; without the second name of the tied matrix and bias
    assert len(copied) == len(list(visual.parameters())) - 2 + len(list(roberta.parameters()))
    for (name, p), q, r in zip(one.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        # biases of zero and norms of one are the same at any seed
        assert torch.equal(p, r) == (name in copied or p.std() == 0), name
    assert not one.training and one.config.name == "custom"


def test_new_parts_are_initialised(parts):
    """Text: N(0, 0.02) and zeros. Vision: torch's uniform draws. Norms: 1 and 0. As in the released code."""
    model = build(parts)
    for layer in model.decoder.layers:
        new = [layer.cross.query, layer.cross.key, layer.cross.value, layer.cross.output]
        for linear in [*new, layer.adaptor.down, layer.adaptor.up]:
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15) and not linear.bias.any()
        for norm in (layer.cross.norm, layer.adaptor.norm):
            assert (norm.weight == 1).all() and not norm.bias.any()
    extra = model.decoder.extra
    assert extra.mlp.intermediate.weight.std().item() == pytest.approx(0.02, rel=0.15)
    for block in model.encoder.blocks:
        bound = 64**-0.5
        for linear in (block.adaptor.down, block.adaptor.up):
            assert 0.95 * bound < linear.weight.abs().max() <= bound and linear.bias.abs().max() <= bound
    attention = model.encoder.resampler.blocks[0].attn
    bound = (6 / (4 * 64)) ** 0.5
    assert 0.95 * bound < attention.in_proj_weight.abs().max() <= bound and not attention.in_proj_bias.any()
    assert model.encoder.resampler.latents.std().item() == pytest.approx(64**-0.5, rel=0.2)


def test_the_callers_random_state_is_unchanged(parts):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(parts)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_with_all_experts_trains(parts, tmp_path):
    """It is saved, loaded as train.py does, and its loss falls within a few steps."""
    model = build(parts, experts=ALL_EXPERTS)
    assert list(model.encoder.stems) == ["rgb", *ALL_EXPERTS]
    model.save_pretrained(tmp_path / "start")
    started = build_initial_model(str(tmp_path / "start"))
    assert started.tokenizer is not None and started.config == model.config
    before = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in started.state_dict().items())
    freeze(started, "freeze_lang_vision")

    ids = torch.randint(3, 200, (2, 1, 7))
    texts = TextBatch(ids=ids, labels=ids, weights=torch.ones(2, 1))
    batch = Batch(images=make_images(started.config), texts=texts, keys=["a", "b"], meta=[{}, {}])
    trainable = [p for p in started.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    losses = []
    for _ in range(8):
        losses.append(started(batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "name, config",
    [
        ("ViT-B-16-quickgelu", prismer_base()),
        ("ViT-L-14-336-quickgelu", prismer_large(image_size=336)),
        ("ViT-H-14", prismer_huge()),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_presets_have_the_sizes_of_open_clip(name, config):
    """Heads, activation and sizes of the three towers; HUGE has 16 heads and exact GELU."""
    with torch.device("meta"):
        visual = open_clip.create_model(name, device="meta").visual
    sizes = backbones._clip_sizes(open_clip, name, visual)
    assert sizes == {field: getattr(config, field) for field in sizes} and len(sizes) == 6
    text = transformers.RobertaConfig(
        **backbones._ROBERTA["roberta-base" if config.name == "base" else "roberta-large"], **backbones._ROBERTA_COMMON
    )
    sizes |= backbones._roberta_sizes("roberta", text)
    assert backbones._preset_of(sizes, ALL_EXPERTS) == config.name
    assert backbones._preset_of(sizes, ()) == f"{config.name}-z"


@pytest.fixture
def towers_on_the_hub(parts, tmp_path, monkeypatch):
    """A hub that holds small towers, of which the preset "base" is built."""
    with connected(FakeHub(), tmp_path / "cache", monkeypatch) as hub:
        # only RoBERTa's own vocabulary needs no tokenizer files
        roberta = make_roberta(tmp_path / "roberta", vocab_size=50265, tokenizer=False)
        hub.add_folder("someone/roberta", tmp_path / "roberta")
        hub.words = roberta.roberta.embeddings.word_embeddings.weight
        hub.repositories["someone/clip"] = {"open_clip_pytorch_model.bin": (parts[0] / "clip.pt").read_bytes()}
        # transformers keeps a client for the address that it saw first
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        tag = dict(hf_hub="someone/clip/", quick_gelu=True)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "prismer-test-b", {"openai": tag})
        monkeypatch.setitem(backbones.TOWERS, "base", ("prismer-test-b", "openai", "someone/roberta"))
        yield hub


def test_a_preset_is_built_from_the_hub_and_then_from_its_cache(parts, towers_on_the_hub, monkeypatch):
    """Its towers are those of the hub; `train.py --model base` builds the same, with new parts of the run's seed."""
    with pytest.warns(UserWarning, match="base is new: its towers are trained, what joins them is not; train it first"):
        model = Prismer.from_pretrained("base", image_size=64)
    assert model.config.experts == ALL_EXPERTS and model.folder is None and not model.training
    assert torch.equal(model.decoder.embeddings.word.weight, towers_on_the_hub.words)
    assert torch.equal(model.encoder.positional_embedding, parts[1].positional_embedding[1:])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = build_initial_model("base", image_size=64, seed=1)
    assert torch.equal(start.encoder.positional_embedding, model.encoder.positional_embedding)
    assert torch.equal(start.decoder.embeddings.word.weight, towers_on_the_hub.words)
    assert not torch.equal(start.encoder.resampler.latents, model.encoder.resampler.latents)
    with pytest.warns(UserWarning, match="base-z is new"):
        half = Prismer.from_pretrained("base-z", dtype=torch.bfloat16)
    assert (
        half.config.experts == () and half.config.image_size == 224 and half.decoder.head_weight.dtype == torch.bfloat16
    )


def test_the_towers_of_a_preset_are_fetched_once(towers_on_the_hub, monkeypatch, capsys):
    main(["models", "fetch", "base-z"])
    assert (
        capsys.readouterr().out
        == "base-z: open_clip's prismer-test-b (openai) and someone/roberta are on this machine\n"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert build_initial_model("base").config.name


def test_a_preset_whose_towers_are_missing_says_which(towers_on_the_hub, monkeypatch):
    towers_on_the_hub.repositories.pop("someone/clip")
    start = r"^base is built from open_clip's prismer-test-b \(openai\) and someone/roberta, and "
    with pytest.raises(
        ValueError, match=start + "the weights openai of open_clip's prismer-test-b are not on this mach"
    ):
        Prismer.from_pretrained("base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("large", "huge-z"):
        with pytest.raises(
            ValueError, match=rf"^{name} is built from open_clip's .*transformers cannot load"
        ) as caught:
            build_initial_model(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="base has a config of its own"):
        Prismer.from_pretrained("base", config=prismer_base())


def test_the_towers_of_the_presets_are_known_to_open_clip():
    for name, (vision, tag, text) in backbones.TOWERS.items():
        assert tag in open_clip.list_pretrained_tags_by_model(vision), name
        assert text in backbones._ROBERTA


def test_a_random_tower_warns(parts):
    with pytest.warns(UserWarning, match="vision tower prismer-test-b is random"):
        build(parts, vision_weights=None)


def test_local_towers_need_no_network_and_warn_of_nothing(parts, tmp_path):
    """Neither we nor the libraries warn; a folder without a model is not looked up on the hub."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(parts)
    with pytest.raises(ValueError, match="transformers cannot load .*empty .*give the folder"):
        (tmp_path / "empty").mkdir()
        Prismer.from_backbones("prismer-test-b", tmp_path / "empty")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(vision="ViT-B-61"), "open_clip knows no model 'ViT-B-61'; did you mean ViT-B-"),
        (dict(vision="RN50"), "RN50 is a ModifiedResNet; Prismer takes a plain CLIP ViT"),
        (dict(vision="prismer-test-tanh"), "has the activation GELU.approximate='tanh'"),
        (dict(vision="prismer-test-pool"), "pools by attention"),
        (dict(vision="prismer-test-wide"), r"c_fc.weight of shape \(128, 64\)|c_fc.bias of shape \(128,\)"),
        (dict(vision="prismer-test-scale"), "has a visual.transformer.resblocks.0.ls_1.gamma"),
        (dict(vision="prismer-test-nopre"), "has no encoder.ln_pre.bias"),
        (dict(vision_weights="openay"), "neither a file nor a tag of prismer-test-b; its tags are none"),
        (dict(vision="ViT-B-16-quickgelu", vision_weights="openay"), "its tags are .*openai"),
        (dict(vision_weights="h"), "does not load as open_clip's prismer-test-b .*name the model"),
        (dict(vision_weights="garbage"), "does not load as open_clip's prismer-test-b"),
        (dict(text_weights="none.bin"), "text_weights none.bin is no file"),
        (dict(text_weights="h"), "has no decoder.embeddings"),
        (dict(image_size=8), "image_size 8 is smaller than patch_size 16"),
        (dict(experts=("smell",)), "unknown expert 'smell'"),
        (dict(resampler_heads=5), "vision_width 64 is not a multiple of resampler_heads 5"),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:the vision tower")
def test_a_tower_that_does_not_fit_is_refused_in_one_sentence(parts, tmp_path, options, message):
    make_clip("prismer-test-h", tmp_path / "h")
    (tmp_path / "garbage").write_bytes(b"not weights")
    files = {"h": tmp_path / "h", "garbage": tmp_path / "garbage"}
    options = {key: files.get(value, value) if key.endswith("weights") else value for key, value in options.items()}
    options = {"vision": "prismer-test-b", **NEW, **options}
    with pytest.raises(ValueError, match=message) as caught:
        Prismer.from_backbones(text=parts[0] / "roberta", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layer_norm_eps=1e-12), "has layer_norm_eps 1e-12, Prismer's decoder has 1e-05"),
        (dict(type_vocab_size=2), "has type_vocab_size 2"),
        (dict(hidden_act="relu"), "has hidden_act 'relu'"),
        (dict(cls=transformers.RobertaModel), "lacks lm_head"),
        (dict(tokenizer=False), "and no tokenizer files; put them there"),
    ],
    ids=["eps", "types", "activation", "no head", "no tokenizer"],
)
@pytest.mark.filterwarnings("ignore:the vision tower")
def test_text_models_that_do_not_fit_are_refused(tmp_path, changes, message):
    make_roberta(tmp_path / "r", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        Prismer.from_backbones("prismer-test-b", tmp_path / "r", **NEW)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:the vision tower")
def test_a_bert_and_a_config_of_other_sizes_are_refused(tmp_path, parts):
    folder = tmp_path / "bert"
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=30)
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(folder)
    with pytest.raises(ValueError, match="has model_type 'bert'"):
        Prismer.from_backbones("prismer-test-b", folder, **NEW)
    # weights of other sizes than the config beside them
    shutil.copytree(parts[0] / "roberta", tmp_path / "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    (tmp_path / "r" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ValueError, match="transformers cannot load|lacks"):
        Prismer.from_backbones("prismer-test-b", tmp_path / "r", **NEW)


@pytest.mark.filterwarnings("ignore:the vision tower")
def test_known_names_need_no_hub(tmp_path, monkeypatch, parts):
    """With a file of weights "roberta-base" asks nothing of the hub; without one and without connection, a sentence."""

    def offline(source, local_files_only, **_):
        assert not local_files_only
        raise OSError(f"We couldn't connect\nto load {source}")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"transformers cannot load roberta-base \(We couldn't connect\); give"):
        Prismer.from_backbones("prismer-test-b", **NEW)
    monkeypatch.setitem(
        backbones._ROBERTA,
        "roberta-base",
        dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=72),
    )
    monkeypatch.setattr(backbones, "_ROBERTA_COMMON", backbones._ROBERTA_COMMON | dict(max_position_embeddings=40))
    roberta = make_roberta(tmp_path / "r", vocab_size=50265, tokenizer=False)
    torch.save(roberta.state_dict(), tmp_path / "words.bin")
    model = Prismer.from_backbones("prismer-test-b", text_weights=tmp_path / "words.bin", **NEW)
    assert torch.equal(model.decoder.embeddings.word.weight, roberta.roberta.embeddings.word_embeddings.weight)
    assert model.tokenizer.vocab_size == 50265
