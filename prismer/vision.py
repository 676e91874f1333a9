"""VisionEncoder: RGB patches and resampled expert latents through a frozen CLIP ViT with adaptors.

Source: Prismer, arXiv:2303.02506, section 3.2.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prismer.batch import ImageBatch
from prismer.config import PrismerConfig
from prismer.errors import InputError
from prismer.kernels.instance_rows import add_instance_rows
from prismer.kernels.modules import MLP, Adaptor, LayerNorm, MultiheadAttention, PerceiverResampler
from prismer.stems import ExpertStem, Stems, normalise_rgb, resize_positions


class VisionBlock(nn.Module):
    """A pre-norm CLIP block with an adaptor between its halves."""

    # ZeRO-3 gathers all parameters of the module at once, instead of layer by layer
    _z3_leaf = True

    def __init__(self, width: int, heads: int, activation: str):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = MultiheadAttention(width, heads)
        self.adaptor = Adaptor(width, late=False)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, 4 * width, activation)

    @property
    def pretrained(self) -> tuple[nn.Module, ...]:
        """The modules inherited from CLIP, which `freeze_vision` freezes."""
        return self.ln_1, self.attn, self.ln_2, self.mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = self.adaptor(x)
        return x + self.mlp(self.ln_2(x))


class VisionEncoder(nn.Module):
    """ImageBatch -> (B, N, D) context tokens: RGB tokens first, then the latents of the experts."""

    def __init__(self, config: PrismerConfig):
        super().__init__()
        width = config.vision_width
        self.config = config
        self.gradient_checkpointing = False
        self.stems = Stems({"rgb": nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)})
        for expert in config.experts:
            self.stems[expert] = ExpertStem(expert, width, config.patch_size, config.label_size)
        self.positional_embedding = nn.Parameter(torch.randn(config.grid**2, width) * width**-0.5)
        if "obj_detection" in config.experts:
            self.instance_embedding = nn.Parameter(torch.randn(config.num_instances, width) * width**-0.5)
        if config.experts:
            self.resampler = PerceiverResampler(
                width, config.resampler_depth, config.resampler_heads, config.num_latents
            )
        self.ln_pre = LayerNorm(width)
        self.blocks = nn.ModuleList(
            VisionBlock(width, config.vision_heads, config.vision_activation) for _ in range(config.vision_depth)
        )
        self.ln_post = LayerNorm(width)

    def expert_tokens(self, images: ImageBatch) -> Tensor:
        """(B, experts * g * g, D): stem output + instance row (objects alone) + positional table at the label grid."""
        grid = self.config.label_grid
        positions = resize_positions(self.positional_embedding, grid)
        tokens = []
        for expert, map_ in zip(self.config.experts, self.stems(images, self.config.experts), strict=True):
            x = map_.flatten(2).mT
            if expert == "obj_detection":
                rows = images.instance_rows
                rows = None if rows is None else rows.to(x.device)
                ids = images.labels[expert][:, 0]
                x = add_instance_rows(x, ids, self.instance_embedding, rows, grid, positions)
            else:
                x = x + positions
            tokens.append(x)
        return torch.cat(tokens, dim=1)

    def join_experts(self, rgb: Tensor, images: ImageBatch) -> Tensor:
        """What the blocks read: the RGB tokens (B, grid * grid, D), then the latents of the experts."""
        if not self.config.experts:
            return rgb
        return torch.cat([rgb, self.resampler(self.expert_tokens(images))], dim=1)

    def forward(self, images: ImageBatch) -> Tensor:
        """Encode a batch of images.

        Raises:
            ValueError: if the RGB side is not that of the config, or labels of one of its experts are missing.
        """
        side = self.config.image_size
        if tuple(images.rgb.shape[1:]) != (3, side, side):
            raise InputError(
                f"images are {tuple(images.rgb.shape)}, this model reads (B, 3, {side}, {side}); "
                "resize them or load the model at their size"
            )
        missing = [expert for expert in self.config.experts if expert not in images.labels]
        if missing:
            raise InputError(
                f"labels of {', '.join(missing)} are missing; give them, or fill them as ImageBatch.without_labels does"
            )
        x = self.stems["rgb"](normalise_rgb(images.rgb, self.positional_embedding.dtype))
        x = x.flatten(2).mT + self.positional_embedding  # (B, N, D)
        x = self.ln_pre(self.join_experts(x, images))
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.ln_post(x)
