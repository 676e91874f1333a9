"""Prismer: the whole model, batch -> loss, and the ways to load, save and ask it (arXiv:2303.02506)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismer.batch import IGNORE_INDEX, Batch, ImageBatch, TextBatch
from prismer.config import PrismerConfig
from prismer.kernels.cross_entropy import linear_cross_entropy
from prismer.text import TextDecoder, in_a_row
from prismer.tied_embedding import look_up
from prismer.tokenizer import Tokenizer
from prismer.vision import VisionEncoder


class Prismer(nn.Module):
    """A frozen CLIP encoder, a frozen RoBERTa decoder, expert labels, and the trainable parts that join them.

    Attributes:
        encoder: images and expert labels -> context tokens.
        decoder: text given context tokens.
        tokenizer: text <-> ids, or None for a model that only computes.
    """

    def __init__(self, config: PrismerConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
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

    def _hidden_and_targets(self, context: Tensor, texts: TextBatch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(B, T, D) hidden states of an image's texts in a row, the head's matrix, (B, G, T) targets of each part."""
        parts = texts.parts()
        ids = [ids for ids, _ in parts]
        words, head_weight = look_up(self.decoder.embeddings.word, in_a_row(ids)) or (None, None)
        hidden = self.decoder(ids, context, words)
        if head_weight is None:
            head_weight = self.decoder.head_weight
        # the token after each position; after the last there is none
        targets = [F.pad(labels[:, :, 1:], (0, 1), value=IGNORE_INDEX) for _, labels in parts]
        return hidden, head_weight, targets

    def _token_losses(self, hidden: Tensor, head_weight: Tensor, targets: list[Tensor], **reduction) -> Tensor:
        """The losses of all positions, (B * T,), or as `reduction` puts them together."""
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            head_weight,
            self.decoder.head_bias,
            in_a_row(targets).flatten(),
            label_smoothing=self.config.label_smoothing,
            **reduction,
        )

    def text_losses(self, context: Tensor, texts: TextBatch) -> Tensor:
        """(B, G): each text's label-smoothed cross entropy, summed over its target tokens (spec 1.7)."""
        hidden, head_weight, targets = self._hidden_and_targets(context, texts)
        losses = self._token_losses(hidden, head_weight, targets)
        pieces = losses.unflatten(0, hidden.shape[:2]).split([t[0].numel() for t in targets], dim=1)
        sums = [x.unflatten(1, t.shape[1:]).sum(-1) for x, t in zip(pieces, targets, strict=True)]
        return torch.cat(sums, dim=1)

    def forward(self, batch: Batch) -> Tensor:
        """The training loss: mean over the texts of weight * summed loss."""
        context = self.encode(batch.images)
        hidden, head_weight, targets = self._hidden_and_targets(context, batch.texts)
        shares = batch.texts.weights.float() / batch.texts.weights.numel()
        # each position weighs what its text does; one sum, so that its logits are formed once
        pieces = shares.split([t.shape[1] for t in targets], dim=1)
        rows = [w[:, :, None].expand(t.shape).flatten(1) for w, t in zip(pieces, targets, strict=True)]
        weights = torch.cat(rows, dim=1).flatten()
        return self._token_losses(hidden, head_weight, targets, reduction="sum", row_weights=weights)

    def caption(self, images, *, labels=None, semantics=None, **options) -> list[str]:
        """One caption per image.

        Args:
            images: an ImageBatch, or one or a list of what `prismer.load_image` opens (paths, PIL images, ...).
            labels, semantics: what the experts say about each, and features of names, see
                `prismer.image_batch`; `prismer.dataloading.experts.labeller.Labeller` makes labels.
            options: as in `prismer.inference.caption`.
        """
        from prismer.inference import caption

        return caption(self, self._as_batch(images, labels, semantics), **options)

    def answer(self, images, questions, answers=None, *, labels=None, semantics=None, **options):
        """Answer questions about images, freely or from a list.

        Args:
            images, labels, semantics: as in `caption`.
            questions: one per image, or a list of them per image; an image is encoded once for all of its questions.
            answers, options: as in `prismer.inference.answer`.
        """
        from prismer.inference import answer

        return answer(self, self._as_batch(images, labels, semantics), questions, answers, **options)

    def classify(self, images, class_names, *, labels=None, semantics=None, **options):
        """The best of `class_names` per image.

        Args:
            images, labels, semantics: as in `caption`.
            class_names, options: as in `prismer.inference.classify`.
        """
        from prismer.inference import classify

        return classify(self, self._as_batch(images, labels, semantics), class_names, **options)

    def _as_batch(self, images, labels=None, semantics=None) -> ImageBatch:
        if isinstance(images, ImageBatch):
            if labels is not None:
                raise ValueError("an ImageBatch holds its labels already; leave labels out")
            return images
        from prismer.dataloading.feed.image_batch import image_batch

        images = images if isinstance(images, (list, tuple)) else [images]
        return image_batch(images, self.config, labels, semantics)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and the tokenizer to `folder`, aside first, then renamed."""
        from prismer.weights.folder import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options) -> "Prismer":
        """Load a model folder, "tiny", a published checkpoint, or "owner/name" of the hub.

        Args:
            source, options: as in `prismer.weights.folder.from_pretrained`.
        """
        from prismer.weights.folder import from_pretrained

        return from_pretrained(source, **options)

    @classmethod
    def from_backbones(
        cls, vision: str = "ViT-B-16-quickgelu", text: str | Path = "roberta-base", **options
    ) -> "Prismer":
        """New trainable parts around a pre-trained CLIP of open_clip and a RoBERTa of transformers.

        Args:
            vision, text, options: as in `prismer.weights.backbones.from_backbones`.
        """
        from prismer.weights.backbones import from_backbones

        return from_backbones(vision, text, **options)
