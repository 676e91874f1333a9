"""Tiny models of the vision families of qwen_vl.py and vision.py, with inputs and the classes that are replaced."""

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from prismer.kernels.patch import apply_to
from tests.ops.patching import randomise
from tests.ops.tower_families import D

transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=D, intermediate_size=4 * D, num_hidden_layers=2, num_attention_heads=4)
# one still image of 4 x 6 patches, and a clip of two frames of 6 x 4
GRID = torch.tensor([[1, 4, 6], [2, 6, 4]])
QWEN = dict(patch_size=4, num_heads=4)
QWEN_OWN = dict(**QWEN, hidden_size=D, intermediate_size=4 * D, out_hidden_size=24)


def model_of(family: str, model: str, config: str, **options: object) -> Callable[[], nn.Module]:
    """A builder; a version of transformers without the family skips the test."""

    def build() -> nn.Module:
        try:
            module = importlib.import_module(f"transformers.models.{family}")
            kinds = [getattr(module, name) for name in (model, config)]
        except (ImportError, AttributeError) as error:
            pytest.skip(f"transformers {transformers.__version__} has no {model}: {error}")
        settings = kinds[1](**options)
        settings._attn_implementation = "sdpa"
        # towers that are parts of another model are built by themselves
        return kinds[0](settings)

    return build


def packed() -> dict:
    return dict(hidden_states=torch.randn(72, 3 * 2 * 4 * 4), grid_thw=GRID)


def images(size: int = 16) -> Callable[[], dict]:
    return lambda: dict(pixel_values=torch.randn(2, 3, size, size))


def dinov3(**options: object) -> Callable[[], nn.Module]:
    # its positions are scaled at random in training, unless told not to
    options = dict(num_register_tokens=2, image_size=16, patch_size=4, pos_embed_rescale=None) | options
    return model_of("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **SIZES, **options)


def internvl(**options: object) -> Callable[[], nn.Module]:
    options = dict(image_size=(16, 16), patch_size=(4, 4)) | options
    return model_of("internvl", "InternVLVisionModel", "InternVLVisionConfig", **SIZES, **options)


def sam(family: str = "sam", name: str = "Sam", **options: object) -> Callable[[], nn.Module]:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    options = dict(image_size=80, patch_size=4, window_size=3, global_attn_indexes=[1], output_channels=16) | options
    return model_of(family, f"{name}VisionModel", f"{name}VisionConfig", **sizes, mlp_dim=4 * D, **options)


class Projector(nn.Module):
    """A projector of `family` with a tower's width and a language model's, behind a name of its input."""

    def __init__(self, family: str, name: str, **options: object) -> None:
        super().__init__()
        try:
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            kind = getattr(module, f"{name}MultiModalProjector")
        except (ImportError, AttributeError) as error:
            pytest.skip(f"transformers {transformers.__version__} has no projector of {name}: {error}")
        wide, narrow = (transformers.PreTrainedConfig(hidden_size=size) for size in (D, 24))
        settings = dict(
            vision_config=wide,
            text_config=narrow,
            vision_feature_layer=-2,
            # its name in VipLLaVA of older versions
            vision_feature_layers=-2,
            projector_hidden_act="gelu",
            multimodal_projector_bias=True,
            projector_layernorm_eps=1e-5,
            downsample_ratio=1.0,
        )
        self.projector = kind(type("Config", (), settings | options))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projector(features)


def projector(family: str, name: str) -> tuple[Callable[[], nn.Module], Callable[[], dict], set[str]]:
    norm = {"LayerNorm"} if family in ("vipllava", "internvl") else set()
    return (
        lambda: Projector(family, name),
        lambda: dict(features=torch.randn(2, 9, D)),
        {f"{name}MultiModalProjector"} | norm,
    )


def idefics(family: str, name: str) -> tuple[Callable[[], nn.Module], Callable[[], dict], set[str]]:
    return (
        model_of(family, f"{name}VisionTransformer", f"{name}VisionConfig", **SIZES, image_size=16, patch_size=4),
        lambda: dict(pixel_values=torch.randn(2, 3, 16, 16), patch_attention_mask=torch.ones(2, 4, 4).bool()),
        {f"{name}VisionMLP", f"{name}VisionAttention", f"{name}EncoderLayer", "LayerNorm"},
    )


def qwen3(family: str, name: str) -> tuple[Callable[[], nn.Module], Callable[[], dict], set[str]]:
    options = dict(**QWEN_OWN, depth=2, num_position_embeddings=16, deepstack_visual_indexes=[0])
    kinds = ("Attention", "Block", "MLP", "PatchMerger")
    return (
        model_of(family, f"{name}VisionModel", f"{name}VisionConfig", **options),
        packed,
        {f"{name}Vision{kind}" for kind in kinds} | {"LayerNorm"},
    )


DINOV3_PARTS, INTERNVL_PARTS = {"DINOv3ViTAttention", "LayerNorm"}, {"InternVLVisionLayer", "InternVLVisionAttention"}
SAM_PARTS = {"SdpaAttention", "Layer"}

# name -> builder, inputs, classes that are replaced
FAMILIES = {
    "qwen2-vl": (
        model_of(
            *("qwen2_vl.modeling_qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig"),
            **QWEN,
            depth=2,
            embed_dim=D,
            hidden_size=24,
            mlp_ratio=4,
        ),
        packed,
        {"VisionAttention", "VisionMlp", "Qwen2VLVisionBlock", "PatchMerger", "LayerNorm"},
    ),
    "qwen2.5-vl": (
        model_of(
            "qwen2_5_vl.modeling_qwen2_5_vl",
            "Qwen2_5_VisionTransformerPretrainedModel",
            "Qwen2_5_VLVisionConfig",
            **QWEN_OWN,
            depth=2,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        packed,
        {f"Qwen2_5_VL{kind}" for kind in ("VisionAttention", "VisionBlock", "MLP", "RMSNorm", "PatchMerger")},
    ),
    "qwen3-vl": qwen3("qwen3_vl", "Qwen3VL"),
    "dinov3": (dinov3(), images(), DINOV3_PARTS | {"DINOv3ViTMLP"}),
    "dinov3-gated": (
        dinov3(use_gated_mlp=True, hidden_act="silu", key_bias=True),
        images(),
        DINOV3_PARTS | {"DINOv3ViTGatedMLP"},
    ),
    "internvl": (internvl(attention_bias=True), images(), INTERNVL_PARTS | {"InternVLVisionMLP", "LayerNorm"}),
    "internvl-rms": (
        internvl(use_qk_norm=True, norm_type="rms_norm"),
        images(),
        INTERNVL_PARTS | {"InternVLVisionMLP", "InternVLVisionRMSNorm"},
    ),
    "sam": (sam(), images(80), {f"SamVision{part}" for part in SAM_PARTS} | {"SamMLPBlock", "LayerNorm"}),
    "sam-absolute": (
        sam(use_rel_pos=False),
        images(80),
        {f"SamVision{part}" for part in SAM_PARTS} | {"SamMLPBlock", "LayerNorm"},
    ),
    "idefics3-vision": idefics("idefics3", "Idefics3"),
    "llava": projector("llava", "Llava"),
    "vipllava": projector("vipllava", "VipLlava"),
    "internvl-projector": projector("internvl", "InternVL"),
}
# the same code under other names: one comparison each
COPIES = {
    "qwen3-vl-moe": qwen3("qwen3_vl_moe", "Qwen3VLMoe"),
    "sam-hq": (
        sam("sam_hq", "SamHQ"),
        images(80),
        {f"SamHQVision{part}" for part in SAM_PARTS} | {"SamHQMLPBlock", "LayerNorm"},
    ),
    "smolvlm-vision": idefics("smolvlm", "SmolVLM"),
    "llava-next": projector("llava_next", "LlavaNext"),
    "llava-next-video": projector("llava_next_video", "LlavaNextVideo"),
    "llava-onevision": projector("llava_onevision", "LlavaOnevision"),
    "video-llava": projector("video_llava", "VideoLlava"),
}


def build_pair(name: str) -> tuple[nn.Module, nn.Module, dict]:
    """An unpatched model, a patched copy, and inputs."""
    build, inputs, expected = (FAMILIES | COPIES)[name]
    torch.manual_seed(0)
    plain = randomise(build())
    patched = copy.deepcopy(plain)
    report = apply_to(patched, ("layer_norm", "mlp", "attention"))
    replaced = {row.class_name for row in report.rows if row.reason is None}
    assert replaced == expected, report
    return plain, patched, inputs()
