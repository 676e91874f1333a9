"""Tiny models of every tower family that `apply_to` supports, with inputs and the classes that it replaces in them."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prismer.kernels.patch import apply_to
from tests.ops.patching import randomise

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


def random_images() -> Tensor:
    return torch.randn(B, 3, 16, 16)


def random_ids() -> Tensor:
    return torch.randint(3, V, (B, T))


def padding(left: bool = False) -> Tensor:
    """An attention mask in which the first sample is padded."""
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, slice(0, 2) if left else slice(5, None)] = 0
    return mask


def open_clip_model(**options: object) -> nn.Module:
    vision = dict(layers=2, width=D, head_width=8, patch_size=8, image_size=16)
    text = dict(context_length=T, vocab_size=V, width=D, heads=4, layers=2)
    for name in ("ls_init_value", "norm_kwargs"):
        if name in options:
            vision[name] = text[name] = options[name]
    options = {k: v for k, v in options.items() if k not in vision}
    return open_clip.model.CLIP(
        D, open_clip.model.CLIPVisionCfg(**vision), open_clip.model.CLIPTextCfg(**text), **options
    )


def coca() -> nn.Module:
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


def transformers_model(kind: str, config: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(transformers, kind)(getattr(transformers, config)(**options))

    return build


def two_towers(kind: str, act: str = "quick_gelu") -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        vision = getattr(transformers, f"{kind}VisionConfig")(**VISION, hidden_act=act)
        words = getattr(transformers, f"{kind}TextConfig")(**TEXT, hidden_act=act, projection_dim=D, **SPECIAL)
        config = getattr(transformers, f"{kind}Config")
        extra = {} if kind.startswith("Siglip") else {"projection_dim": D}
        return getattr(transformers, f"{kind}Model")(
            config(text_config=words.to_dict(), vision_config=vision.to_dict(), **extra)
        )

    return build


def blip() -> nn.Module:
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


def qformer(kind: str = "Blip2") -> nn.Module:
    config = getattr(transformers, f"{kind}QFormerConfig")(**BERT, encoder_hidden_size=24, cross_attention_frequency=2)
    module = __import__(f"transformers.models.{'blip_2' if kind == 'Blip2' else 'instructblip'}", fromlist=["x"])
    return getattr(module, f"{kind}QFormerModel")(config)


def vision_tower(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}VisionConfig")(**VISION, hidden_act="gelu")
        return getattr(transformers, f"{kind}VisionModel")(config)

    return build


def open_clip_inputs() -> dict:
    return dict(image=random_images(), text=random_ids())


def clip_inputs() -> dict:
    return dict(input_ids=random_ids(), pixel_values=random_images())


def qformer_inputs(**options: object) -> dict:
    return dict(query_embeds=torch.randn(B, 5, D), encoder_hidden_states=torch.randn(B, 9, 24), **options)


def context(**options: object) -> dict:
    """What a cross-attention takes beside its own inputs."""
    return dict(encoder_hidden_states=torch.randn(B, 9, D), **options)


def context_mask(size: int = 9) -> Tensor:
    mask = torch.ones(B, size, dtype=torch.long)
    mask[1, 4:] = 0
    return mask


OPEN_CLIP_PARTS = {"ResidualAttentionBlock", "MultiheadAttention", "LayerNorm"}
CLIP_PARTS = ("MLP", "Attention", "EncoderLayer")


def parts(name: str, *others: str, kinds: tuple[str, ...] = CLIP_PARTS) -> set[str]:
    return {f"{name}{kind}" for kind in kinds} | {"LayerNorm", *others}


def bert_parts(name: str, *others: str) -> set[str]:
    return parts(name, *others, kinds=("Layer", "SelfAttention", "SelfOutput"))


# name -> builder, inputs, classes that are replaced
FAMILIES = {
    "open_clip-gelu": (open_clip_model, open_clip_inputs, OPEN_CLIP_PARTS),
    "open_clip-quick_gelu": (lambda: open_clip_model(quick_gelu=True), open_clip_inputs, OPEN_CLIP_PARTS),
    "open_clip-layer_scale": (lambda: open_clip_model(ls_init_value=0.7), open_clip_inputs, OPEN_CLIP_PARTS),
    "open_clip-fp32_norms": (
        lambda: open_clip_model(cast_dtype=torch.float16),
        open_clip_inputs,
        OPEN_CLIP_PARTS - {"LayerNorm"} | {"LayerNormFp32"},
    ),
    "open_clip-coca": (coca, open_clip_inputs, OPEN_CLIP_PARTS),
    "clip": (two_towers("CLIP"), clip_inputs, parts("CLIP")),
    "clip-padded": (
        two_towers("CLIP", "gelu"),
        lambda: dict(input_ids=random_ids(), pixel_values=random_images(), attention_mask=padding()),
        parts("CLIP"),
    ),
    "metaclip2": (two_towers("MetaClip2"), clip_inputs, parts("MetaClip2")),
    "siglip": (
        two_towers("Siglip", "gelu_pytorch_tanh"),
        clip_inputs,
        parts("Siglip", "MultiheadAttention"),
    ),
    "siglip-gelu-padded": (
        two_towers("Siglip", "gelu"),
        lambda: dict(input_ids=random_ids(), pixel_values=random_images(), attention_mask=padding()),
        parts("Siglip", "MultiheadAttention"),
    ),
    "siglip2": (
        transformers_model(
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
        transformers_model("ViTModel", "ViTConfig", **VISION),
        lambda: dict(pixel_values=random_images()),
        parts("ViT", kinds=("MLP", "Attention")),
    ),
    "deit": (
        transformers_model("DeiTModel", "DeiTConfig", **VISION, qkv_bias=False),
        lambda: dict(pixel_values=random_images()),
        parts("DeiT", kinds=("MLP", "Attention")),
    ),
    "dinov2": (
        transformers_model(
            "Dinov2Model", "Dinov2Config", **{k: v for k, v in VISION.items() if k != "intermediate_size"}
        ),
        lambda: dict(pixel_values=random_images()),
        parts("Dinov2", kinds=("MLP", "Attention")),
    ),
    "blip": (
        # with labels, since without them it fills a cache, which the fused attention does not serve
        blip,
        lambda: dict(
            pixel_values=random_images(), input_ids=random_ids(), attention_mask=padding(), labels=random_ids()
        ),
        parts("Blip") | bert_parts("BlipText"),
    ),
    "blip-text": (
        lambda: transformers.models.blip.modeling_blip_text.BlipTextModel(
            transformers.BlipTextConfig(**BERT, encoder_hidden_size=D, projection_dim=D, **SPECIAL)
        ),
        lambda: dict(
            input_ids=random_ids(),
            attention_mask=padding(),
            is_decoder=False,
            **context(encoder_attention_mask=context_mask()),
        ),
        bert_parts("BlipText"),
    ),
    "blip2-vision": (vision_tower("Blip2"), lambda: dict(pixel_values=random_images()), parts("Blip2")),
    "instructblip-vision": (
        vision_tower("InstructBlip"),
        lambda: dict(pixel_values=random_images()),
        parts("InstructBlip"),
    ),
    "qformer": (qformer, qformer_inputs, parts("Blip2QFormer", kinds=("MultiHeadAttention", "SelfOutput", "Layer"))),
    "qformer-padded": (
        qformer,
        lambda: qformer_inputs(encoder_attention_mask=context_mask()),
        parts("Blip2QFormer", kinds=("MultiHeadAttention", "SelfOutput", "Layer")),
    ),
    "instructblip-qformer": (
        lambda: qformer("InstructBlip"),
        lambda: dict(
            input_ids=random_ids(),
            attention_mask=torch.cat((torch.ones(B, 5, dtype=torch.long), padding()), 1),
            **qformer_inputs(encoder_attention_mask=context_mask()),
        ),
        parts("InstructBlipQFormer", kinds=("MultiHeadAttention", "SelfOutput", "Output", "Layer")),
    ),
    **{
        name.lower(): (
            transformers_model(f"{name}Model", f"{name}Config", **BERT, **SPECIAL),
            lambda: dict(input_ids=random_ids()),
            bert_parts(name),
        )
        for name in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
    },
    "bert-padded": (
        transformers_model("BertModel", "BertConfig", **BERT),
        lambda: dict(input_ids=random_ids(), attention_mask=padding(left=True)),
        bert_parts("Bert"),
    ),
    "bert-relu": (
        transformers_model("BertModel", "BertConfig", **BERT, hidden_act="relu"),
        lambda: dict(input_ids=random_ids()),
        bert_parts("Bert", "BertOutput") - {"BertLayer"},
    ),
    "roberta-decoder": (
        transformers_model(
            "RobertaModel", "RobertaConfig", **BERT, **SPECIAL, is_decoder=True, add_cross_attention=True
        ),
        lambda: dict(input_ids=random_ids(), use_cache=False, **context()),
        bert_parts("Roberta", "RobertaCrossAttention"),
    ),
    "roberta-decoder-padded": (
        transformers_model(
            "RobertaModel", "RobertaConfig", **BERT, **SPECIAL, is_decoder=True, add_cross_attention=True
        ),
        lambda: dict(
            input_ids=random_ids(),
            use_cache=False,
            attention_mask=padding(),
            **context(encoder_attention_mask=context_mask()),
        ),
        bert_parts("Roberta", "RobertaCrossAttention"),
    ),
    "bert-decoder-chunked": (
        transformers_model(
            "BertModel", "BertConfig", **BERT, is_decoder=True, add_cross_attention=True, chunk_size_feed_forward=1
        ),
        lambda: dict(input_ids=random_ids(), use_cache=False, **context()),
        bert_parts("Bert", "BertCrossAttention"),
    ),
}


def build_pair(name: str) -> tuple[nn.Module, nn.Module, dict]:
    """An unpatched model, a patched copy, and inputs."""
    build, inputs, expected = FAMILIES[name]
    torch.manual_seed(0)
    plain = randomise(build())
    patched = copy.deepcopy(plain)
    report = apply_to(patched, ("layer_norm", "mlp", "attention"))
    replaced = {row.class_name for row in report.rows if row.reason is None}
    assert replaced == expected, report
    return plain, patched, inputs()
