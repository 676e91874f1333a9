"""Tiny resamplers of every family that `apply_to` supports, with inputs."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from tests.ops.patching import randomise, step

D, LATENTS = 48, 6


def flamingo_module(package: str) -> ModuleType:
    if package == "flamingo_pytorch":
        return pytest.importorskip(
            "flamingo_pytorch.flamingo_pytorch", reason="pip install --no-deps flamingo-pytorch einops-exts"
        )
    # the package pins torch 2.0.1, but its code runs on this torch
    pytest.importorskip("open_flamingo", reason="pip install --no-deps open-flamingo einops-exts")
    import open_flamingo.src.helpers

    return open_flamingo.src.helpers


def flamingo_pytorch(
    depth: int = 2, width: int = D, heads: int = 4, dim_head: int = 8, latents: int = LATENTS
) -> nn.Module:
    return flamingo_module("flamingo_pytorch").PerceiverResampler(
        dim=width, depth=depth, dim_head=dim_head, heads=heads, num_latents=latents, num_media_embeds=4
    )


def open_flamingo(
    depth: int = 2,
    width: int = D,
    heads: int = 4,
    dim_head: int = 8,
    latents: int = LATENTS,
    media: int | None = None,
    frames: int | None = None,
) -> nn.Module:
    return flamingo_module("open_flamingo").PerceiverResampler(
        dim=width,
        depth=depth,
        dim_head=dim_head,
        heads=heads,
        num_latents=latents,
        max_num_media=media,
        max_num_frames=frames,
    )


def idefics(
    depth: int = 2, width: int = D, heads: int = 4, dim_head: int = 8, latents: int = LATENTS, qk: bool = False
) -> nn.Module:
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(
        vision_config=dict(embed_dim=width), perceiver_config=dict(qk_layer_norms_perceiver=qk, use_resampler=True)
    )
    return IdeficsPerceiverResampler(config, width, depth, heads, dim_head, latents)


def idefics2(
    depth: int = 2,
    width: int = D,
    heads: int = 4,
    dim_head: int = 8,
    latents: int = LATENTS,
    keys: int = 2,
    attn: str = "sdpa",
    act: str = "silu",
) -> nn.Module:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    config = Idefics2PerceiverConfig(
        hidden_size=width,
        resampler_depth=depth,
        resampler_n_heads=heads,
        resampler_head_dim=dim_head,
        resampler_n_latents=latents,
        num_key_value_heads=keys,
        hidden_act=act,
    )
    config._attn_implementation = attn
    return Idefics2PerceiverResampler(config)


def masked(shape: tuple[int, ...]) -> dict[str, Tensor]:
    mask = torch.ones(shape[:2], dtype=torch.int64)
    # padding of one sample, and a hidden token of another
    mask[0, 5:] = 0
    mask[1, 0] = 0
    return {"attention_mask": mask}


def unmasked(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"attention_mask": torch.ones(shape[:2], dtype=torch.int64)}


def no_mask(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {}


FAMILIES = {
    # name: builder, its options, shape of the inputs without the width, what else the forward takes
    "flamingo-pytorch": (flamingo_pytorch, {}, (2, 3, 13), no_mask),
    "flamingo-pytorch-3d": (flamingo_pytorch, dict(depth=1), (2, 13), no_mask),
    "flamingo-pytorch-wide-heads": (flamingo_pytorch, dict(heads=3, dim_head=24), (1, 1, 7), no_mask),
    "open-flamingo": (open_flamingo, {}, (2, 3, 2, 7), no_mask),
    "open-flamingo-times": (open_flamingo, dict(media=4, frames=5), (2, 3, 2, 7), no_mask),
    "idefics": (idefics, {}, (3, 17), no_mask),
    "idefics-qk-norms": (idefics, dict(qk=True), (3, 17), no_mask),
    "idefics2": (idefics2, {}, (3, 17), unmasked),
    "idefics2-masked": (idefics2, {}, (3, 17), masked),
    "idefics2-one-key-head": (idefics2, dict(keys=1, attn="eager", act="gelu"), (2, 9), masked),
    "idefics2-all-key-heads": (idefics2, dict(keys=4, depth=3), (2, 9), masked),
}


def build_resampler(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A resampler with random weights, and the arguments of its forward in their order."""
    build, options, shape, mask = FAMILIES[name]
    module = randomise(build(**options), seed=1)
    x = torch.randn(*shape, module.latents.shape[1]) * 2 + 0.5
    return module, {"x" if "flamingo" in name else "context": x, **mask(shape)}


def positional_step(module: nn.Module, inputs: dict[str, Tensor], call: Callable | None = None) -> dict[str, Tensor]:
    """A `step` that passes its inputs by position."""
    return step(module, inputs, lambda **inputs: (module if call is None else call)(*inputs.values()))
