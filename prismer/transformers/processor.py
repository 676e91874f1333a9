"""Images, expert labels and texts of a user -> the tensors that PrismerForConditionalGeneration takes.

Images and labels are read by `prismer.image_batch`, texts follow the rules of prismer/texts.py.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, RobertaTokenizer
from transformers.image_processing_utils import BaseImageProcessor

from prismer.config import PrismerConfig as Architecture
from prismer.dataloading.feed.image_batch import ExpertLabels, image_batch
from prismer.dataloading.feed.load_image import ImageSource
from prismer.dataloading.semantics.features import Semantics
from prismer.errors import InputError
from prismer.texts import (
    CLASS_PREFIX,
    collate,
    encode_caption,
    encode_class,
    encode_prompt,
    encode_qa,
    encode_question,
)
from prismer.tokenizer import Tokenizer
from prismer.transformers.config import PrismerConfig
from prismer.transformers.inputs import IMAGE_INPUTS, check_known, tensors_of
from prismer.weights.folder import copy_companions, stored_semantics

KINDS = ("caption", "question", "class")
# the last message: a question, the start of a caption that the assistant is to complete, or any other request, which
# becomes a caption
_CHAT_TEMPLATE = (
    "{%- set last = messages[-1] -%}"
    "{%- set text -%}{%- if last.content is string -%}{{ last.content }}{%- else -%}"
    "{%- for part in last.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}{%- endset -%}"
    "{{- text if last.role == 'assistant' or (text | trim).endswith('?') else '' -}}"
)
# options of tokenizers that the chat template and pipelines give, and that change nothing: one text for each image,
# padded on the right
_IMPLIED = ("padding", "truncation", "add_special_tokens", "return_token_type_ids")
_Labels = Sequence[ExpertLabels | str | os.PathLike | None]


class PrismerImageProcessor(BaseImageProcessor):
    """Images and expert labels -> `pixel_values` and the maps of the model's experts.

    Attributes:
        architecture: the settings of the model, as in config.json.
        folder: the folder that it was loaded from, which may hold a table of features; None for a new one.
    """

    model_input_names = ["pixel_values", *IMAGE_INPUTS]

    def __init__(self, architecture: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.architecture = dataclasses.asdict(Architecture(**(architecture or {})))
        self.folder: Path | None = None

    @classmethod
    def get_image_processor_dict(cls, source: str | os.PathLike, **options: Any) -> tuple[dict, dict]:
        """The settings of an image processor; for a folder that `Prismer` wrote, those of its config.json."""
        try:
            return super().get_image_processor_dict(source, **options)
        except OSError:
            config, rest = PrismerConfig.from_pretrained(source, return_unused_kwargs=True, **options)
            return {"architecture": dataclasses.asdict(config.architecture)}, rest

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> "PrismerImageProcessor":
        """Load the settings of a model folder, or of "owner/name" on the hub; options as in transformers."""
        found = super().from_pretrained(source, **options)
        found.folder = Path(source) if Path(source).is_dir() else None
        return found

    def to_dict(self) -> dict[str, Any]:
        """What is written: the settings."""
        settings = super().to_dict()
        settings.pop("folder", None)
        return settings

    def __call__(
        self,
        images: Any,
        expert_labels: _Labels | None = None,
        semantics: Semantics | None = None,
        tokenizer: Tokenizer | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Read images.

        Args:
            images: one or a list of what `prismer.load_image` opens, or lists of one image each, as chats have them.
            expert_labels: of each image, see `prismer.image_batch`; None fills the maps with background.
            semantics: features of names; None takes the table in the model's folder.
            tokenizer: of a model that reads detections as text.
            return_tensors: "pt"; maps and images are uint8, whatever the dtype of the model.
        """
        if return_tensors not in (None, "pt"):
            raise InputError(f"return_tensors is {return_tensors!r}; this processor makes tensors of torch, give 'pt'")
        config = Architecture(**self.architecture)
        if semantics is None and config.experts:
            semantics = stored_semantics(config, self.folder)
        return BatchFeature(tensors_of(image_batch(_flat(images), config, expert_labels, semantics, tokenizer)))


class _Words:
    """The part of `prismer.tokenizer.Tokenizer` that texts are encoded with, on a tokenizer of transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.bos_id, self.pad_id, self.eos_id = (
            tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<pad>", "</s>")
        )

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens: `<s>` typed by a user is three ordinary tokens."""
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


class PrismerProcessor(ProcessorMixin):
    """An image processor and RoBERTa's tokenizer; texts follow the rules that the model was trained with."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or _CHAT_TEMPLATE)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, source: str | os.PathLike, processor_dict: dict | None = None, **options: Any
    ) -> list:
        image_processor = PrismerImageProcessor.from_pretrained(source, **options)
        return [image_processor, RobertaTokenizer.from_pretrained(source, **options)]

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **options: Any) -> Any:
        """Write settings and tokenizer, and the table of features of the folder that it was loaded from."""
        written = super().save_pretrained(save_directory, *args, **options)
        copy_companions(self.image_processor.folder, Path(save_directory))
        return written

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        kind: str | None = None,
        targets: str | list[str] | None = None,
        expert_labels: _Labels | None = None,
        semantics: Semantics | None = None,
        return_tensors: str = "pt",
        **implied: Any,
    ) -> BatchFeature:
        """The inputs of the model for images, prompts and, to train, targets.

        Args:
            images, expert_labels, semantics, return_tensors: as in `PrismerImageProcessor`.
            text: one prompt for each image: a question, or how a caption or a class starts. None or empty: the start
                that the model was trained with.
            kind: "caption", "question" or "class", of all prompts; None takes a prompt that ends in "?" for a question
                and any other for the start of a caption.
            targets: captions, answers or classes to train on; with them the inputs hold `labels`.
            implied: `padding` and the like, which change nothing: texts are always padded on the right.

        Returns:
            `pixel_values` and maps, `input_ids`, `attention_mask` and, with targets, `labels`.

        Raises:
            ValueError: if there are no images, or a text cannot be used.
        """
        check_known({name for name, value in implied.items() if value is not None}, _IMPLIED, "the processor")
        if images is None:
            raise InputError("there are no images; give one for each text")
        flat = _flat(images)
        config, words = Architecture(**self.image_processor.architecture), _Words(self.tokenizer)
        if kind is not None and kind not in KINDS:
            raise InputError(f"kind is {kind!r}; choose {', '.join(KINDS)}")
        prompts = _one_each(text, len(flat), CLASS_PREFIX if kind == "class" else config.caption_prefix, "texts")
        answers = _one_each(targets, len(flat), None, "targets")
        given = self.image_processor(flat, expert_labels, semantics, words, return_tensors)
        texts = [_encode(words, config, kind, prompt, target) for prompt, target in zip(prompts, answers, strict=True)]
        batch = collate([[(ids, labels, 1.0)] for ids, labels in texts], pad_id=words.pad_id, bos_id=words.bos_id)
        given["input_ids"] = batch.ids[:, 0]
        lengths = torch.tensor([len(ids) for ids, _ in texts])
        given["attention_mask"] = (torch.arange(batch.ids.shape[2]) < lengths[:, None]).long()
        if targets is not None:
            given["labels"] = batch.labels[:, 0]
        return given

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the model takes."""
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask"]

    def post_process_image_text_to_text(
        self, generated_outputs: Tensor, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """Texts of generated tokens; options as in the tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)


def _encode(
    words: Any, config: Architecture, kind: str | None, prompt: str, target: str | None
) -> tuple[list[int], list[int]]:
    """Ids and labels of a prompt, with its target if there is one."""
    kind = kind or ("question" if prompt.rstrip().endswith("?") else "caption")
    if target is not None:
        if kind == "question":
            return encode_qa(words, prompt, target, config.max_positions)
        encode = encode_class if kind == "class" else None
        if encode is not None:
            return encode(words, prompt, target, config.max_positions)
        return encode_caption(words, target, prompt, config.max_positions)
    # the `<pad>` after a question is the query that predicts its answer
    ids = [*encode_question(words, prompt), words.pad_id] if kind == "question" else encode_prompt(words, prompt)
    return ids, ids


def _one_each(texts: str | list[str] | None, count: int, otherwise: str | None, name: str) -> list:
    if texts is None:
        return [otherwise] * count
    texts = [texts] if isinstance(texts, str) else list(texts)
    if len(texts) != count:
        raise InputError(f"there are {len(texts)} {name} and {count} images; give one for each image")
    return [text or otherwise for text in texts]


def _flat(images: Any) -> list[ImageSource]:
    """The images of a list, of which each may be in a list of its own."""
    if not isinstance(images, list | tuple):
        return [images]
    flat = []
    for image in images:
        if isinstance(image, list | tuple):
            if len(image) != 1:
                raise InputError(f"a text comes with {len(image)} images; this model reads one, give one")
            image = image[0]
        flat.append(image)
    return flat
