"""The variants that change modules: each replaces a few modules of a Prismer that was built as always.

A variant is a subclass of Prismer, so that training, checkpoints and evaluation build and load it like any model. The
model's own files know nothing of it. What a variant does not replace starts with the values of the baseline.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prismer.ablations.catalogue import Variant
from prismer.batch import ImageBatch
from prismer.config import PrismerConfig
from prismer.kernels.activation import bias_activation
from prismer.kernels.modules import Adaptor
from prismer.model import Prismer
from prismer.stems import ExpertStem, resize_positions
from prismer.text import DecoderLayer
from prismer.tokenizer import Tokenizer
from prismer.vision import VisionBlock, VisionEncoder


def variant_class(variant: Variant) -> type[Prismer]:
    """The class of a variant's models; Prismer itself if the variant changes neither config nor modules."""
    if not variant.config and not variant.network:
        return Prismer

    class VariantOfPrismer(Prismer):
        """A Prismer with the config and the modules of one variant."""

        def __init__(self, config: PrismerConfig, tokenizer: Tokenizer | None = None):
            # the config of a saved variant is changed already, and stays the same
            super().__init__(config.replace(**variant.config), tokenizer)
            if variant.network:
                change, *arguments = variant.network
                CHANGES[change](self, *arguments)

    return VariantOfPrismer


# adaptors


def _layers(model: Prismer) -> list[VisionBlock | DecoderLayer]:
    return [*model.encoder.blocks, *model.decoder.layers]


def _initialise(model: Prismer, adaptor: nn.Module) -> None:
    """Draw a new adaptor of the decoder as the decoder draws its own; the encoder keeps the framework's values."""
    if not adaptor.late:
        return
    for layer in (adaptor.down, adaptor.up):
        nn.init.normal_(layer.weight, std=model.config.init_std)
        nn.init.zeros_(layer.bias)


def _remove_adaptors(model: Prismer) -> None:
    for layer in _layers(model):
        layer.adaptor = nn.Identity()


def _scale_adaptors(model: Prismer, share: float) -> None:
    for layer in _layers(model):
        adaptor, width = layer.adaptor, layer.adaptor.down.in_features
        hidden = max(1, round(share * width))
        adaptor.down, adaptor.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        _initialise(model, adaptor)


class GatedAdaptor(Adaptor):
    """An adaptor whose branch is multiplied by tanh of a learned gate; the gate is 0 at first."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = bias_activation(self.down(x if self.late else self.norm(x)), None, "squared_relu")
        y = x + self.gate.tanh() * self.up(hidden)
        return self.norm(y) if self.late else y


def _gate_adaptors(model: Prismer) -> None:
    for layer in _layers(model):
        _specialise(layer.adaptor, GatedAdaptor)
        layer.adaptor.gate = nn.Parameter(torch.zeros(1))


class TwoAdaptorVisionBlock(VisionBlock):
    """A CLIP block with one adaptor between its halves and one at its end."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.second_adaptor(super().forward(x))


class TwoAdaptorDecoderLayer(DecoderLayer):
    """A decoder layer with one adaptor between its halves and one at its end."""

    def forward(self, *inputs: Any) -> Tensor:
        """The inputs of a decoder layer -> (R, Q, D)."""
        return self.second_adaptor(super().forward(*inputs))


def _double_adaptors(model: Prismer) -> None:
    for layer in _layers(model):
        own = layer.adaptor
        _specialise(layer, TwoAdaptorVisionBlock if isinstance(layer, VisionBlock) else TwoAdaptorDecoderLayer)
        layer.second_adaptor = Adaptor(own.down.in_features, late=own.late)
        _initialise(model, layer.second_adaptor)


# the resampler


class RandomSampling(nn.Module):
    """As many of the tokens as a resampler would return: a new draw in each training step, one fixed draw otherwise."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, M, D), or all tokens if there are no more than M."""
        L = x.shape[1]
        if self.training:
            chosen = torch.randperm(L)[: self.count]
        else:
            chosen = torch.randperm(L, generator=torch.Generator().manual_seed(0))[: self.count]
        return x[:, chosen.to(x.device)]


def _sample_at_random(model: Prismer) -> None:
    model.encoder.resampler = RandomSampling(model.config.num_latents)


def _keep_all_tokens(model: Prismer) -> None:
    model.encoder.resampler = nn.Identity()


class ResampledEncoder(VisionEncoder):
    """An encoder whose RGB tokens, too, pass the resampler: its blocks read the latents alone."""

    def join_experts(self, rgb: Tensor, images: ImageBatch) -> Tensor:
        """(B, grid * grid, D) -> (B, M, D)."""
        return self.resampler(torch.cat([rgb, self.expert_tokens(images)], dim=1))


def _resample_rgb(model: Prismer) -> None:
    _specialise(model.encoder, ResampledEncoder)


# experts that predict noise


class NoisyEncoder(VisionEncoder):
    """An encoder with further experts, whose maps are uniform noise; an image has the same noise each time."""

    def expert_tokens(self, images: ImageBatch) -> Tensor:
        """The tokens of all experts, those of noise last."""
        tokens = [super().expert_tokens(images)]
        positions = resize_positions(self.positional_embedding, self.config.label_grid)
        for number, stem in enumerate(self.noise_stems):
            map_ = stem(noise_maps(images.rgb, number, self.config.label_size), None, images.features)
            tokens.append(map_.flatten(2).mT + positions)
        return torch.cat(tokens, dim=1)


def _add_noise_experts(model: Prismer, count: int) -> None:
    config = model.config
    _specialise(model.encoder, NoisyEncoder)
    model.encoder.noise_stems = nn.ModuleList(
        ExpertStem("depth", config.vision_width, config.patch_size, config.label_size) for _ in range(count)
    )


# SplitMix64's multipliers as signed numbers
_MIX = (-4658895280553007687, -7723592293110705685)
_GOLDEN = -7046029254386353131


def noise_maps(rgb: Tensor, number: int, side: int) -> Tensor:
    """Uniform noise that depends on the image alone, not on its batch, the device or a generator.

    Args:
        rgb: (B, 3, h, w) uint8.
        number: of the noise expert; two experts have different noise.
        side: of the maps.

    Returns:
        (B, 1, side, side) uint8.
    """
    pixels = rgb.flatten(1).long()
    # from 1: the finaliser maps 0 to 0
    places = _mixed(torch.arange(1, pixels.shape[1] + 1, device=rgb.device))
    images = _mixed((pixels * places).sum(1) + number)
    cells = torch.arange(side * side, device=rgb.device) * _GOLDEN
    return (_mixed(images[:, None] + cells) & 255).to(torch.uint8).view(-1, 1, side, side)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, modulo 2^64 in int64."""
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _specialise(module: nn.Module, subclass: type[nn.Module]) -> None:
    """Make a built module one of a subclass that changes its forward pass; tensors and their names stay as they are."""
    assert issubclass(subclass, type(module))
    module.__class__ = subclass


CHANGES: dict[str, Callable[..., Any]] = {
    "adaptor_none": _remove_adaptors,
    "adaptor_two": _double_adaptors,
    "adaptor_gated": _gate_adaptors,
    "adaptor_width": _scale_adaptors,
    "sampling_random": _sample_at_random,
    "sampling_none": _keep_all_tokens,
    "sampling_rgb": _resample_rgb,
    "noise": _add_noise_experts,
}
