"""PrismerNetwork: the computation alone, from a batch to its loss (Prismer, arXiv:2303.02506, section 3)."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from prismer.batch import Batch, ImageBatch
from prismer.config import PrismerConfig
from prismer.errors import InputError
from prismer.text import TextDecoder
from prismer.tokenizer import Tokenizer
from prismer.vision import VisionEncoder

# for functions that build or return the class that they are given
Model = TypeVar("Model", bound="PrismerNetwork")


class PrismerNetwork(nn.Module):
    """A frozen CLIP encoder, a frozen RoBERTa decoder, expert labels, and the trainable parts that join them.

    Attributes:
        config: the architecture.
        encoder: images and expert labels -> context tokens.
        decoder: text given context tokens, and given detections as text if `config.expert_text` names experts.
        tokenizer: text <-> ids, or None for a model that only computes.
    """

    def __init__(self, config: PrismerConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise InputError(
                f"tokenizer has {tokenizer.vocab_size} tokens, config.vocab_size is {config.vocab_size}; "
                "give the tokenizer that the model was trained with"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.encoder = VisionEncoder(config)
        self.decoder = TextDecoder(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.positional_embedding.device

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.encoder.gradient_checkpointing = enabled
        self.decoder.gradient_checkpointing = enabled

    def encode(self, images: ImageBatch) -> Tensor:
        """(B, N, D) context tokens of a batch of images."""
        return self.encoder(images)

    def forward(self, batch: Batch) -> Tensor:
        """The training loss: the mean over texts of weight * summed label-smoothed cross entropy."""
        return self.decoder(batch.texts, self.encode(batch.images), batch.images.detections)
