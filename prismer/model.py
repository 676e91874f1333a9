"""Prismer: the network with the ways to load it, save it and ask it in words (arXiv:2303.02506)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prismer.batch import ImageBatch
from prismer.dataloading.feed.image_batch import ExpertLabels, image_batch
from prismer.dataloading.feed.load_image import ImageSource
from prismer.dataloading.semantics.features import Semantics
from prismer.errors import InputError
from prismer.inference import Answer, Candidates, answer, caption, classify
from prismer.network import PrismerNetwork
from prismer.weights.backbones import from_backbones
from prismer.weights.folder import from_pretrained, save_pretrained, stored_semantics

Images = ImageBatch | ImageSource | Sequence[ImageSource]
Labels = Sequence[ExpertLabels | str | os.PathLike | None]


class Prismer(PrismerNetwork):
    """A frozen CLIP encoder, a frozen RoBERTa decoder, expert labels, and the trainable parts that join them.

    Attributes:
        config: the architecture.
        encoder: images and expert labels -> context tokens.
        decoder: text given context tokens.
        tokenizer: text <-> ids, or None for a model that only computes.
        folder: the model folder that it was loaded from, which may hold answers, class names and a table of features;
            None for a new model.
    """

    folder: Path | None = None

    def caption(
        self, images: Images, *, labels: Labels | None = None, semantics: Semantics | None = None, **options: Any
    ) -> list[str]:
        """One caption per image.

        Args:
            images: an ImageBatch, or one or a list of what `prismer.load_image` opens (paths, PIL images, ...).
            labels, semantics: the experts' labels of each image and the features of names, see `prismer.image_batch`;
                `prismer.dataloading.experts.labeller.Labeller` makes labels, and the model's folder may hold features.
            options: as in `prismer.inference.caption`.
        """
        return caption(self, self._as_batch(images, labels, semantics), **options)

    def answer(
        self,
        images: Images,
        questions: list[str] | list[list[str]],
        answers: list[str] | Candidates | None = None,
        *,
        labels: Labels | None = None,
        semantics: Semantics | None = None,
        **options: Any,
    ) -> list[Answer] | list[list[Answer]]:
        """Answer questions about images, in the model's own words or from a list.

        Args:
            images, labels, semantics: as in `caption`.
            questions: one per image, or a list of them per image; an image is encoded once for all of its questions.
            answers, options: as in `prismer.inference.answer`.
        """
        return answer(self, self._as_batch(images, labels, semantics), questions, answers, **options)

    def classify(
        self,
        images: Images,
        class_names: list[str] | Candidates,
        *,
        labels: Labels | None = None,
        semantics: Semantics | None = None,
        **options: Any,
    ) -> list[Answer]:
        """The best of `class_names` per image.

        Args:
            images, labels, semantics: as in `caption`.
            class_names, options: as in `prismer.inference.classify`.
        """
        return classify(self, self._as_batch(images, labels, semantics), class_names, **options)

    def _as_batch(self, images: Images, labels: Labels | None, semantics: Semantics | None) -> ImageBatch:
        if isinstance(images, ImageBatch):
            if labels is not None:
                raise InputError("an ImageBatch holds its labels already; leave labels out")
            return images
        images = images if isinstance(images, list | tuple) else [images]
        if semantics is None and self.config.experts:
            semantics = stored_semantics(self.config, self.folder)
        return image_batch(images, self.config, labels, semantics, self.tokenizer)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a whole model folder: beside `folder` first, then renamed.

        Args:
            folder, options: as in `prismer.weights.folder.save_pretrained`.
        """
        save_pretrained(self, folder, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "Prismer":
        """Load a model folder, a model by name, a published checkpoint, or "owner/name" of the hub.

        Args:
            source, options: as in `prismer.weights.folder.from_pretrained`.
        """
        return from_pretrained(cls, source, **options)

    @classmethod
    def from_backbones(
        cls, vision: str = "ViT-B-16-quickgelu", text: str | Path = "roberta-base", **options: Any
    ) -> "Prismer":
        """New trainable parts around a pre-trained CLIP of open_clip and a RoBERTa of transformers.

        Args:
            vision, text, options: as in `prismer.weights.backbones.from_backbones`.
        """
        return from_backbones(cls, vision, text, **options)
