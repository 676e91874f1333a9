"""Proves that towers of torch, open_clip and transformers compute the same when patched: outputs and the gradient of
every parameter and input, in training and evaluation, with masks, causal, in bf16, over training steps; what falls
back to the unpatched forward; and what is saved.

Run: pytest tests/ops/test_patch_towers.py
"""

import copy
import logging

import pytest
import torch
from torch import nn

from prismer.kernels.patch import apply_to
from tests.ops.patched import assert_no_worse, assert_same, enlarge, losses, step

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

B, T, V, D = 2, 7, 61, 32
VISION = dict(
    hidden_size=D, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
TEXT = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=24,
)
BERT = dict(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SPECIAL = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)


def pixels():
    return torch.randn(B, 3, 16, 16)


def words():
    return torch.randint(3, V, (B, T))


def padding(left=False):
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, slice(0, 2) if left else slice(5, None)] = 0
    return mask


def open_clip_model(kind=None, **options):
    vision = dict(layers=2, width=D, head_width=8, patch_size=8, image_size=16)
    text = dict(context_length=T, vocab_size=V, width=D, heads=4, layers=2)
    for name in ("ls_init_value", "norm_kwargs"):
        if name in options:
            vision[name] = text[name] = options[name]
    options = {k: v for k, v in options.items() if k not in vision}
    return (kind or open_clip.model.CLIP)(
        D, open_clip.model.CLIPVisionCfg(**vision), open_clip.model.CLIPTextCfg(**text), **options
    )


def coca():
    return open_clip.coca_model.CoCa(
        D,
        open_clip.coca_model.MultimodalCfg(width=D, context_length=T, heads=4, layers=2),
        open_clip.model.CLIPTextCfg(
            context_length=T, vocab_size=V, width=D, heads=4, layers=2, embed_cls=True, output_tokens=True
        ),
        open_clip.model.CLIPVisionCfg(
            layers=2,
            width=D,
            head_width=8,
            patch_size=8,
            image_size=16,
            attentional_pool=True,
            attn_pooler_heads=4,
            output_tokens=True,
        ),
    )


def hf(kind, config, **options):
    def build():
        return getattr(transformers, kind)(getattr(transformers, config)(**options))

    return build


def two_towers(kind, act="quick_gelu", **text):
    def build():
        vision = getattr(transformers, f"{kind}VisionConfig")(**VISION, hidden_act=act)
        words = getattr(transformers, f"{kind}TextConfig")(**TEXT, hidden_act=act, projection_dim=D, **SPECIAL, **text)
        config = getattr(transformers, f"{kind}Config")
        extra = {} if kind.startswith("Siglip") else {"projection_dim": D}
        return getattr(transformers, f"{kind}Model")(
            config(text_config=words.to_dict(), vision_config=vision.to_dict(), **extra)
        )

    return build


def blip():
    config = transformers.BlipConfig(
        text_config=dict(
            **BERT,
            encoder_hidden_size=D,
            projection_dim=D,
            is_decoder=True,
            **SPECIAL,
            sep_token_id=2,
            label_smoothing=0.0,
        ),
        vision_config=dict(**VISION, projection_dim=D),
        projection_dim=D,
        image_text_hidden_size=D,
    )
    return transformers.BlipForConditionalGeneration(config)


def qformer(kind="Blip2", **options):
    config = getattr(transformers, f"{kind}QFormerConfig")(
        **BERT, encoder_hidden_size=24, cross_attention_frequency=2, **options
    )
    module = __import__(f"transformers.models.{'blip_2' if kind == 'Blip2' else 'instructblip'}", fromlist=["x"])
    return getattr(module, f"{kind}QFormerModel")(config)


def vision_tower(kind):
    def build():
        config = getattr(transformers, f"{kind}VisionConfig")(**VISION, hidden_act="gelu")
        return getattr(transformers, f"{kind}VisionModel")(config)

    return build


def queries(**options):
    return dict(query_embeds=torch.randn(B, 5, D), encoder_hidden_states=torch.randn(B, 9, 24), **options)


def encoder(**options):
    return dict(encoder_hidden_states=torch.randn(B, 9, D), **options)


def seen(size=9):
    mask = torch.ones(B, size, dtype=torch.long)
    mask[1, 4:] = 0
    return mask


BLOCK = {"ResidualAttentionBlock", "MultiheadAttention", "LayerNorm"}
CLIP_PARTS = ("MLP", "Attention", "EncoderLayer")


def parts(name, *others, kinds=CLIP_PARTS):
    return {f"{name}{kind}" for kind in kinds} | {"LayerNorm", *others}


def bert_parts(name, *others):
    return parts(name, *others, kinds=("Layer", "SelfAttention", "SelfOutput"))


# name -> builder, inputs, the classes that are replaced
FAMILIES = {
    "open_clip-gelu": (open_clip_model, lambda: dict(image=pixels(), text=words()), BLOCK),
    "open_clip-quick_gelu": (
        lambda: open_clip_model(quick_gelu=True),
        lambda: dict(image=pixels(), text=words()),
        BLOCK,
    ),
    "open_clip-layer_scale": (
        lambda: open_clip_model(ls_init_value=0.7),
        lambda: dict(image=pixels(), text=words()),
        BLOCK,
    ),
    "open_clip-fp32_norms": (
        lambda: open_clip_model(cast_dtype=torch.float16),
        lambda: dict(image=pixels(), text=words()),
        BLOCK - {"LayerNorm"} | {"LayerNormFp32"},
    ),
    "open_clip-coca": (coca, lambda: dict(image=pixels(), text=words()), BLOCK),
    "clip": (two_towers("CLIP"), lambda: dict(input_ids=words(), pixel_values=pixels()), parts("CLIP")),
    "clip-padded": (
        two_towers("CLIP", "gelu"),
        lambda: dict(input_ids=words(), pixel_values=pixels(), attention_mask=padding()),
        parts("CLIP"),
    ),
    "metaclip2": (two_towers("MetaClip2"), lambda: dict(input_ids=words(), pixel_values=pixels()), parts("MetaClip2")),
    "siglip": (
        two_towers("Siglip", "gelu_pytorch_tanh"),
        lambda: dict(input_ids=words(), pixel_values=pixels()),
        parts("Siglip", "MultiheadAttention") - {"SiglipMLP"},
    ),
    "siglip-gelu-padded": (
        two_towers("Siglip", "gelu"),
        lambda: dict(input_ids=words(), pixel_values=pixels(), attention_mask=padding()),
        parts("Siglip", "MultiheadAttention"),
    ),
    "siglip2": (
        hf(
            "Siglip2VisionModel",
            "Siglip2VisionConfig",
            hidden_act="gelu",
            num_patches=16,
            **{k: v for k, v in VISION.items() if k != "image_size"},
        ),
        lambda: dict(
            pixel_values=torch.randn(B, 16, 192),
            spatial_shapes=torch.tensor([[4, 4], [3, 4]]),
            pixel_attention_mask=torch.arange(16) < torch.tensor([[16], [12]]),
        ),
        parts("Siglip2", "MultiheadAttention"),
    ),
    "vit": (
        hf("ViTModel", "ViTConfig", **VISION),
        lambda: dict(pixel_values=pixels()),
        parts("ViT", kinds=("MLP", "Attention")),
    ),
    "deit": (
        hf("DeiTModel", "DeiTConfig", **VISION, qkv_bias=False),
        lambda: dict(pixel_values=pixels()),
        parts("DeiT", kinds=("MLP", "Attention")),
    ),
    "dinov2": (
        hf("Dinov2Model", "Dinov2Config", **{k: v for k, v in VISION.items() if k != "intermediate_size"}),
        lambda: dict(pixel_values=pixels()),
        parts("Dinov2", kinds=("MLP", "Attention")),
    ),
    "blip": (
        blip,  # with labels: without them it fills a cache, and attends as it always did
        lambda: dict(pixel_values=pixels(), input_ids=words(), attention_mask=padding(), labels=words()),
        parts("Blip") | bert_parts("BlipText"),
    ),
    "blip-text": (
        lambda: transformers.models.blip.modeling_blip_text.BlipTextModel(
            transformers.BlipTextConfig(**BERT, encoder_hidden_size=D, projection_dim=D, **SPECIAL)
        ),
        lambda: dict(
            input_ids=words(), attention_mask=padding(), is_decoder=False, **encoder(encoder_attention_mask=seen())
        ),
        bert_parts("BlipText"),
    ),
    "blip2-vision": (vision_tower("Blip2"), lambda: dict(pixel_values=pixels()), parts("Blip2")),
    "instructblip-vision": (vision_tower("InstructBlip"), lambda: dict(pixel_values=pixels()), parts("InstructBlip")),
    "qformer": (qformer, queries, parts("Blip2QFormer", kinds=("MultiHeadAttention", "SelfOutput", "Layer"))),
    "qformer-padded": (
        qformer,
        lambda: queries(encoder_attention_mask=seen()),
        parts("Blip2QFormer", kinds=("MultiHeadAttention", "SelfOutput", "Layer")),
    ),
    "instructblip-qformer": (
        lambda: qformer("InstructBlip"),
        lambda: dict(
            input_ids=words(),
            attention_mask=torch.cat((torch.ones(B, 5, dtype=torch.long), padding()), 1),
            **queries(encoder_attention_mask=seen()),
        ),
        parts("InstructBlipQFormer", kinds=("MultiHeadAttention", "SelfOutput", "Output", "Layer")),
    ),
    **{
        name.lower(): (
            hf(f"{name}Model", f"{name}Config", **BERT, **SPECIAL),
            lambda: dict(input_ids=words()),
            bert_parts(name),
        )
        for name in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
    },
    "bert-padded": (
        hf("BertModel", "BertConfig", **BERT),
        lambda: dict(input_ids=words(), attention_mask=padding(left=True)),
        bert_parts("Bert"),
    ),
    "bert-relu": (
        hf("BertModel", "BertConfig", **BERT, hidden_act="relu"),
        lambda: dict(input_ids=words()),
        bert_parts("Bert", "BertOutput") - {"BertLayer"},
    ),
    "roberta-decoder": (
        hf("RobertaModel", "RobertaConfig", **BERT, **SPECIAL, is_decoder=True, add_cross_attention=True),
        lambda: dict(input_ids=words(), use_cache=False, **encoder()),
        bert_parts("Roberta", "RobertaCrossAttention"),
    ),
    "roberta-decoder-padded": (
        hf("RobertaModel", "RobertaConfig", **BERT, **SPECIAL, is_decoder=True, add_cross_attention=True),
        lambda: dict(
            input_ids=words(), use_cache=False, attention_mask=padding(), **encoder(encoder_attention_mask=seen())
        ),
        bert_parts("Roberta", "RobertaCrossAttention"),
    ),
    "bert-decoder-chunked": (
        hf("BertModel", "BertConfig", **BERT, is_decoder=True, add_cross_attention=True, chunk_size_feed_forward=1),
        lambda: dict(input_ids=words(), use_cache=False, **encoder()),
        bert_parts("Bert", "BertCrossAttention"),
    ),
}


def pair(name):
    build, inputs, expected = FAMILIES[name]
    torch.manual_seed(0)
    plain = enlarge(build())
    patched = copy.deepcopy(plain)
    report = apply_to(patched, ("layer_norm", "mlp", "attention"))
    kinds = {row.class_name for row in report.rows if row.reason is None}
    assert kinds == expected, report
    return plain, patched, inputs()


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_unpatched_model(name):
    plain, patched, inputs = pair(name)
    for mode in (True, False):
        plain.train(mode), patched.train(mode)
        assert_same(step(patched, inputs), step(plain, inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_low_precision(name):
    plain, patched, inputs = pair(name)
    if name == "open_clip-fp32_norms":
        pytest.skip("open_clip casts its weights by itself there")
    assert_no_worse(plain, patched, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_three_training_steps(name):
    plain, patched, inputs = pair(name)
    assert losses(patched, inputs) == pytest.approx(losses(plain, inputs), rel=1e-4)


def test_open_clip_with_low_precision_weights():
    """As open_clip's own precision="bf16": norms keep fp32 weights between linears in bf16."""
    plain = enlarge(open_clip_model(cast_dtype=torch.bfloat16))
    open_clip.model.convert_weights_to_lp(plain, torch.bfloat16)
    patched = copy.deepcopy(plain)
    apply_to(patched)
    inputs = dict(image=pixels().bfloat16(), text=words())
    assert {p.dtype for p in plain.parameters()} == {torch.float32, torch.bfloat16}
    got, expected = step(patched, inputs), step(plain, inputs)
    for name in ("output.0", "output.1", "dvisual.ln_post.weight", "dvisual.transformer.resblocks.0.ln_2.weight"):
        assert got[name].dtype == expected[name].dtype
        size = expected[name].abs().max().item()
        torch.testing.assert_close(got[name].float(), expected[name].float(), rtol=0.1, atol=0.1 * size)


# nn.MultiheadAttention


def float_mask():
    return torch.full((T, T), float("-inf")).triu(1)


HEAD_MASK = torch.randn(B * 4, T, T, generator=torch.Generator().manual_seed(5))
MHA = {
    # name: (options of the module, options of the call, is it fused)
    "self": ({}, {}, True),
    "sequence_first": (dict(batch_first=False), {}, True),
    "no_bias": (dict(bias=False), {}, True),
    "causal_float": ({}, dict(attn_mask=float_mask()), True),
    "causal_bool": ({}, dict(attn_mask=torch.ones(T, T, dtype=torch.bool).triu(1)), True),
    "causal_promised": ({}, dict(attn_mask=float_mask(), is_causal=True), True),
    "mask_of_heads": ({}, dict(attn_mask=HEAD_MASK), True),
    "mask_of_heads_sequence_first": (dict(batch_first=False), dict(attn_mask=HEAD_MASK), True),
    "padded": ({}, dict(key_padding_mask=padding() == 0), True),
    "padded_sequence_first": (dict(batch_first=False), dict(key_padding_mask=padding() == 0), True),
    "padded_floats": ({}, dict(key_padding_mask=torch.randn(B, T)), False),
    "padded_and_causal": ({}, dict(key_padding_mask=padding() == 0, attn_mask=float_mask() < 0), False),
    "weights": ({}, dict(need_weights=True), False),
    "weights_of_heads": ({}, dict(need_weights=True, average_attn_weights=False), False),
    "dropout": (dict(dropout=0.4), {}, False),
}


@pytest.mark.parametrize("name", MHA)
def test_multihead_attention(name, count_calls):
    options, call, fused = MHA[name]
    plain = enlarge(nn.MultiheadAttention(D, 4, **{"batch_first": True, **options}))
    patched = copy.deepcopy(plain)
    apply_to(patched)
    x = torch.randn(B, T, D) if plain.batch_first else torch.randn(T, B, D)

    def run(module):
        def forward(x):
            torch.manual_seed(3)
            return module(x, x, x, **{"need_weights": False, **call})

        return forward

    for mode in (True, False):
        patched.train(mode), plain.train(mode)
        assert_same(step(patched, dict(x=x), run(patched)), step(plain, dict(x=x), run(plain)))
    patched.train()
    with count_calls() as calls:
        run(patched)(x)
    assert ("prismer::linears" in calls) == fused


@pytest.mark.parametrize("form", ("cross", "key_is_not_value", "other_widths", "unbatched", "cross_causal"))
def test_multihead_cross_attention(form):
    options = dict(kdim=24, vdim=24) if form == "other_widths" else {}
    plain = enlarge(nn.MultiheadAttention(D, 4, batch_first=True, **options))
    patched = copy.deepcopy(plain)
    apply_to(patched)
    inputs = dict(query=torch.randn(B, T, D), key=torch.randn(B, 5, 24 if options else D))
    if form == "key_is_not_value":
        inputs["value"] = torch.randn(B, 5, D)
    if form == "unbatched":
        inputs = {name: x[0] for name, x in inputs.items()}
    extra = dict(attn_mask=torch.zeros(T, 5), is_causal=True) if form == "cross_causal" else {}

    def run(module):
        return lambda query, key, value=None: module(
            query, key, key if value is None else value, need_weights=False, **extra
        )

    assert_same(step(patched, inputs, run(patched)), step(plain, inputs, run(plain)))


def test_padding_of_a_whole_sample():
    """Torch gives zeros for a query that sees nothing, or NaN: so do we."""
    plain = enlarge(nn.MultiheadAttention(D, 4, batch_first=True))
    patched = copy.deepcopy(plain)
    apply_to(patched)
    x, mask = torch.randn(B, T, D), torch.zeros(B, T, dtype=torch.bool)
    mask[1] = True
    got, expected = (m(x, x, x, key_padding_mask=mask, need_weights=False)[0] for m in (patched, plain))
    torch.testing.assert_close(got, expected, equal_nan=True)


# what only a call knows


@pytest.mark.parametrize("name", ("roberta-decoder-padded", "bert-padded", "blip", "clip", "vit", "qformer-padded"))
def test_dropout_draws_as_before(name):
    """The same seed drops the same elements: active attention dropout is left to torch."""
    build, inputs, _ = FAMILIES[name]
    plain = enlarge(build())
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.3)
    patched = copy.deepcopy(plain)
    apply_to(patched, ("layer_norm", "mlp", "attention"))
    inputs = inputs()

    def run(model):
        def forward(**kwargs):
            torch.manual_seed(3)
            return model(**kwargs)

        return forward

    patched.train(), plain.train()
    expected = step(plain, inputs, run(plain))
    assert_same(step(patched, inputs, run(patched)), expected)
    name = next(iter(expected))
    assert not torch.allclose(step(plain.eval(), inputs, run(plain))[name], expected[name])


@pytest.mark.parametrize("name", ("clip", "vit", "roberta-decoder-padded", "blip", "qformer", "blip2-vision"))
def test_attention_weights_are_given_where_they_are_asked_for(name):
    plain, patched, inputs = pair(name)
    for model in (plain, patched):
        if name != "blip":  # it has no other implementation
            model.set_attn_implementation("eager")
        model.eval()
    outputs = [model(**inputs, output_attentions=True) for model in (patched, plain)]
    if name == "clip":
        outputs = [out.vision_model_output for out in outputs]
    for key in [k for k in outputs[1] if "attentions" in k]:
        got, expected = outputs[0][key], outputs[1][key]
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert_same(step(patched, inputs), step(plain, inputs))


def test_hooks_that_may_read_attention_weights():
    """BLIP's attention always gives its weights: where somebody listens, it is kept."""
    model = blip()
    text = model.text_decoder.bert.encoder.layer[1]
    for layer in (model.vision_model.encoder.layers[0].self_attn, text.attention.self):
        layer.register_forward_hook(lambda *a: None)
    report = apply_to(model, "attention")
    kept = [row for row in report.rows if row.reason]
    assert len(kept) == 2 and all("may read the attention weights" in row.reason for row in kept)
    assert len(report.replaced) == len(report.rows) - 2 == 4


def test_siglip_attends_to_both_sides():
    """Its forward knows no is_causal: what callers pass is ignored, and so it is when patched."""
    plain = enlarge(two_towers("Siglip", "gelu")().text_model.encoder.layers[0].self_attn)
    patched = copy.deepcopy(plain)
    apply_to(patched)
    inputs = dict(hidden_states=torch.randn(B, T, D), is_causal=True)
    assert_same(step(patched, inputs), step(plain, inputs))


@pytest.mark.parametrize("cached", (True, False))
def test_generation(cached):
    build = hf("RobertaForCausalLM", "RobertaConfig", **BERT, **SPECIAL, is_decoder=True, add_cross_attention=True)
    plain = enlarge(build()).eval()
    patched = copy.deepcopy(plain)
    apply_to(patched)
    inputs = encoder(encoder_attention_mask=seen())

    def run(model):
        cache = {}
        if cached:
            empty = [transformers.DynamicCache(config=model.config) for _ in range(2)]
            cache["past_key_values"] = transformers.EncoderDecoderCache(*empty)
        torch.manual_seed(0)
        return model.generate(
            words(),
            **inputs,
            **cache,
            use_cache=cached,
            max_new_tokens=6,
            output_scores=True,
            do_sample=False,
            return_dict_in_generate=True,
        )

    got, expected = run(patched), run(plain)
    assert torch.equal(got.sequences, expected.sequences)
    if cached:
        assert got.past_key_values.is_updated == expected.past_key_values.is_updated == {0: True, 1: True}
    for a, b in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hidden_states_are_recorded_as_before():
    plain, patched, inputs = pair("clip")
    got, expected = (model(**inputs, output_hidden_states=True).vision_model_output for model in (patched, plain))
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("clip", "open_clip-gelu", "roberta-decoder-padded"))
def test_gradient_checkpointing(name):
    plain, patched, inputs = pair(name)
    expected = step(plain, inputs)
    if name == "open_clip-gelu":
        patched.set_grad_checkpointing()
    else:
        patched.gradient_checkpointing_enable()
    assert_same(step(patched.train(), inputs), expected)


@pytest.mark.parametrize("name", ("clip", "open_clip-gelu", "qformer"))
def test_autocast_runs_the_modules_own_forward(name, count_calls):
    plain, patched, inputs = pair(name)

    def run(model):
        def forward(**kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return model(**kwargs)

        return forward

    with count_calls() as calls:
        got = step(patched, inputs, run(patched))
    assert not any(key.startswith("prismer::") for key in calls)
    assert_same(got, step(plain, inputs, run(plain)))


# what is saved


def kept_bytes(model, call) -> int:
    """Bytes that autograd keeps between the passes, parameters not counted: they exist anyway."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append((storage.nbytes(), t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = call()
    assert out.requires_grad
    return sum(size for size, _ in kept)


def clip_tower(family, act):
    if family == "open_clip":
        layer = open_clip.transformer.QuickGELU if act == "quick_gelu" else nn.GELU
        return open_clip.transformer.Transformer(64, 3, 4, act_layer=layer)
    config = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=act,
        attn_implementation="sdpa",
    )
    return transformers.models.clip.modeling_clip.CLIPEncoder(config)


class Adapted(nn.Module):
    """A frozen tower behind trainable prompts, with a trainable adaptor after it."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(1, 4, 64))
        self.adaptor = nn.Linear(64, 64)

    def forward(self, x):
        x = torch.cat((self.prompt.expand(x.shape[0], -1, -1), x), 1)
        if type(self.tower).__name__ == "CLIPEncoder":
            return self.adaptor(self.tower(x, attention_mask=None).last_hidden_state)
        return self.adaptor(self.tower(x))


@pytest.mark.parametrize("frozen", (True, False), ids=("frozen", "trained"))
@pytest.mark.parametrize("act", ("quick_gelu", "gelu"))
@pytest.mark.parametrize("family", ("open_clip", "transformers"))
def test_saved_activations(family, act, frozen):
    """CLIP's own activation, QuickGELU, is saved twice over by plain torch; frozen GELU is not, and gains nothing."""
    plain = enlarge(Adapted(clip_tower(family, act)))
    plain.tower.requires_grad_(not frozen)
    patched = copy.deepcopy(plain)
    report = apply_to(patched)
    assert len(report.replaced) == 3 * (3 if family == "open_clip" else 4)
    x = torch.randn(B, 49, 64)
    expected, got = (kept_bytes(m, lambda m=m: m(x)) for m in (plain, patched))
    print(f"\n{family} {act} frozen={frozen}: {expected} bytes unpatched, {got} patched, {1 - got / expected:.0%} less")
    saved = {("quick_gelu", True): 0.25, ("quick_gelu", False): 0.35, ("gelu", True): 0.0, ("gelu", False): 0.2}
    assert got <= (1 - saved[act, frozen]) * expected
    assert_same(step(patched, dict(x=x)), step(plain, dict(x=x)))


def launches_nothing(name: str) -> bool:
    """Views and allocations."""
    op = getattr(torch.ops.aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
    views = op is not None and all(getattr(op, overload).is_view for overload in op.overloads())
    return views or "empty" in name or name.endswith(("::detach", "::_unsafe_view"))


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_operators_are_issued(name, count_calls):
    plain, patched, inputs = pair(name)
    counts = []
    for model in (plain, patched):
        with count_calls() as calls:
            step(model, inputs)
        counts.append(sum(len(found) for key, found in calls.items() if not launches_nothing(key)))
    print(f"\n{name}: {counts[0]} operators a step, {counts[1]} patched")
    assert counts[1] < 0.9 * counts[0]
    # the projections are fused whatever the mask is
    assert "prismer::linears" in calls and "prismer::layer_norm" in calls


def one_layer(name):
    """A layer, and inputs for it."""
    x = torch.randn(B, T, D)
    mask = (padding() == 1)[:, None, None, :].expand(-1, 1, T, -1)
    if name.startswith("open_clip"):
        block = open_clip.transformer.ResidualAttentionBlock(D, 4, act_layer=open_clip.transformer.QuickGELU)
        return block, dict(q_x=x, **({"attn_mask": float_mask()} if name == "open_clip-causal" else {}))
    models, options = transformers.models, dict(attn_implementation="sdpa")
    if name == "blip":
        layer = models.blip.modeling_blip.BlipEncoderLayer(transformers.BlipVisionConfig(**VISION))
        return layer, dict(hidden_states=x)
    if name.startswith("clip"):
        layer = models.clip.modeling_clip.CLIPEncoderLayer(transformers.CLIPVisionConfig(**VISION, **options))
        masks = {"clip-padded": mask, "clip-dense": mask & (float_mask() == 0)}
        return layer, dict(hidden_states=x, attention_mask=masks.get(name))
    config = transformers.RobertaConfig(**BERT, **options, is_decoder=True, add_cross_attention=True)
    layer = models.roberta.modeling_roberta.RobertaLayer(config)
    return layer, dict(hidden_states=x, **encoder())


LAYERS = ("open_clip", "open_clip-causal", "clip", "clip-padded", "clip-dense", "blip", "roberta")


@pytest.mark.parametrize("name", LAYERS)
def test_compiles(name):
    """In one graph, forward and backward, masks or not."""
    layer, inputs = one_layer(name)
    plain = enlarge(layer)
    patched = copy.deepcopy(plain)
    apply_to(patched)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    assert_same(step(patched, inputs, compiled), step(plain, inputs))
    assert_same(step(patched, inputs), step(plain, inputs))
