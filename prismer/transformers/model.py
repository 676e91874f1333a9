"""PrismerForConditionalGeneration: the modules of `prismer.Prismer` as a model of transformers.

The attributes `encoder` and `decoder` are those of `Prismer`, so that both have the same names of tensors. Loss, logits
and generated tokens are those of `Prismer`, too.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerateBeamDecoderOnlyOutput
from transformers.utils import ModelOutput

from prismer.batch import Detections
from prismer.config import PrismerConfig as Architecture
from prismer.errors import InputError
from prismer.generation import Generated, beam_search
from prismer.model import Prismer
from prismer.text import TextDecoder, causal_attend, position_ids
from prismer.tokenizer import Tokenizer
from prismer.transformers.config import PrismerConfig
from prismer.transformers.inputs import IMAGE_INPUTS, check_known, image_batch_of, prompts_of, text_batch_of
from prismer.vision import VisionEncoder
from prismer.weights.folder import copy_companions
from prismer.weights.locate import has_tokenizer

# how `prismer.inference.answer` generates; captions follow the generation config
_ANSWER = dict(max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)
_SEARCH = ("num_beams", "max_length", "min_length", "max_new_tokens", "min_new_tokens", "length_penalty", "scoring")
# settings that say nothing new: the tokens are the model's, and keys and values are always kept
_IMPLIED = (
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "num_return_sequences",
    "pad_token_id",
    "return_dict_in_generate",
    "synced_gpus",
    "transformers_version",
    "use_cache",
)


@dataclass
class PrismerOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: the training loss: the mean over texts of weight * summed label-smoothed cross entropy; with labels only.
        logits: (B, T, V) of the token after each position; see `skip_logits`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class PrismerForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Images, expert maps and texts -> loss, logits and generated texts.

    Attributes:
        encoder: images and expert labels -> context tokens.
        decoder: text given context tokens.
    """

    config_class = PrismerConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # the loss is a mean over texts: Trainer divides it by the steps of accumulation
    accepts_loss_kwargs = False
    # statistics of the stems' norms, at least fp32 in Prismer, too
    _keep_in_fp32_modules_strict = ["running_mean", "running_var"]
    _no_split_modules = ["VisionBlock", "ResamplerBlock", "DecoderLayer", "ExtraLayer"]

    def __init__(self, config: PrismerConfig) -> None:
        super().__init__(config)
        architecture = config.architecture
        self.encoder = VisionEncoder(architecture)
        self.decoder = TextDecoder(architecture)
        self.generation_config = _captions(architecture)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: each module has initialised its own weights, and `from_pretrained` refuses to leave any out."""

    @classmethod
    def from_prismer(cls, model: Prismer) -> "PrismerForConditionalGeneration":
        """The model of transformers that shares the modules of `model`."""
        with torch.device("meta"):
            shared = cls(PrismerConfig.from_architecture(model.config))
        shared.encoder, shared.decoder = model.encoder, model.decoder
        shared.config.dtype = shared.dtype
        shared.name_or_path = "" if model.folder is None else str(model.folder)
        return shared.train(model.training)

    def to_prismer(self, tokenizer: Tokenizer | None = None) -> Prismer:
        """The `Prismer` that shares the modules of this model and can be asked in words.

        Args:
            tokenizer: the model's own; None for the one in the folder that it was loaded from.
        """
        folder = Path(self.name_or_path) if self.name_or_path else None
        folder = folder if folder is not None and folder.is_dir() else None
        if tokenizer is None and folder is not None and has_tokenizer(folder):
            tokenizer = Tokenizer.from_folder(folder)
        with torch.device("meta"):
            model = Prismer(self.decoder.config, tokenizer)
        model.encoder, model.decoder, model.folder = self.encoder, self.decoder, folder
        return model.train(self.training)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, *args: Any, **options: Any) -> Any:
        """Load a model folder, written by this class or by `Prismer`, or "owner/name" of the hub.

        Args:
            source, args, options: as in transformers.

        Raises:
            ValueError: if the folder lacks weights of the architecture.
        """
        wants_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise InputError(
                f"{source} lacks {len(info['missing_keys'])} tensors of this architecture, such as "
                f"{min(info['missing_keys'])}; load it with Prismer.from_pretrained and save it"
            )
        if model.generation_config.max_length is None and model.generation_config.max_new_tokens is None:
            # the folder has no generation_config.json
            model.generation_config = _captions(model.config.architecture)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **options: Any) -> None:
        """Write a model folder that transformers and `Prismer.from_pretrained` load.

        Answers, class names, tokenizer and table of features are copied from the folder that the model was loaded from.

        Args:
            save_directory, args, options: as in transformers.
        """
        super().save_pretrained(save_directory, *args, **options)
        if options.get("is_main_process", True):
            copy_companions(self.name_or_path or None, Path(save_directory))

    def get_input_embeddings(self) -> nn.Module:
        """The word table, which is the matrix of the head, too."""
        return self.decoder.embeddings.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word table."""
        self.decoder.embeddings.word = value

    def encode(self, pixel_values: Tensor, instance_rows: Tensor | None = None, **maps: Tensor | None) -> Tensor:
        """(B, N, vision width) context tokens; arguments as in `forward`."""
        return self.encoder(image_batch_of(self.decoder.config, pixel_values, maps, instance_rows))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        depth: Tensor | None = None,
        normal: Tensor | None = None,
        seg: Tensor | None = None,
        edge: Tensor | None = None,
        obj_detection: Tensor | None = None,
        ocr_detection: Tensor | None = None,
        seg_features: Tensor | None = None,
        obj_detection_features: Tensor | None = None,
        ocr_detection_features: Tensor | None = None,
        detection_ids: Tensor | None = None,
        detection_facts: Tensor | None = None,
        instance_rows: Tensor | None = None,
        text_weights: Tensor | None = None,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> PrismerOutput | tuple[Tensor, ...]:
        """Loss and logits of one text for each image; `prismer.transformers.inputs` has the table of shapes.

        Args:
            instance_rows: (256,) int64: for each object id, its row of the instance table. None draws them in training,
                as the paper does, from torch's generator; in evaluation it is the fixed default.
            text_weights: (B,) weights of the texts in the loss; None for 1.
            skip_logits: whether to leave out the logits, which the loss does not need; None leaves them out in training
                with labels.
            return_dict: False for a tuple.

        Raises:
            ValueError: if an input is missing or does not fit the architecture.
        """
        given = locals()
        config = self.decoder.config
        if input_ids is None:
            raise InputError("input_ids are missing; give token ids, as PrismerProcessor makes them")
        if instance_rows is None and self.training and "obj_detection" in config.experts:
            order = torch.randperm(config.num_instances)
            instance_rows = order[torch.arange(256) % config.num_instances]
        maps = {name: given[name] for name in IMAGE_INPUTS}
        images = image_batch_of(config, pixel_values, maps, instance_rows)
        texts = text_batch_of(config, input_ids, attention_mask, labels, text_weights)
        context = self.encoder(images)
        loss = None if labels is None else self.decoder(texts, context, images.detections)
        logits = None
        if not (labels is not None and self.training if skip_logits is None else skip_logits):
            logits = self._logits(texts.ids[:, 0], context, images.detections)
        output = PrismerOutput(loss=loss, logits=logits)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _logits(self, ids: Tensor, context: Tensor, detections: Detections | None) -> Tensor:
        """(B, T, V) of the token after each position."""
        decoder, config = self.decoder, self.decoder.config
        attend = causal_attend(ids.ne(config.pad_id), config.dropout if self.training else 0.0)
        cross = context if decoder.detections is None else decoder.project_context(context, detections)
        hidden = decoder.run(ids, position_ids(ids, config.pad_id), attend, cross)
        return decoder.logits(decoder.transform(hidden))

    def generate(
        self,
        pixel_values: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor | GenerateBeamDecoderOnlyOutput:
        """The prompts, each followed by its likeliest continuation: greedy or beam search of `prismer.generation`.

        What neither `options` nor `generation_config` sets is as in `Prismer.caption` and, for questions, as in
        `Prismer.answer`.

        Args:
            pixel_values, attention_mask: as in `forward`; its inputs of experts are taken, too.
            input_ids: (B, T) prompts, padded on either side.
            generation_config, options: num_beams, max_length, min_length, max_new_tokens, min_new_tokens,
                length_penalty, return_dict_in_generate, and `scoring` of `prismer.generation.beam_search`.

        Returns:
            (B, T + n) int64, with `<pad>` after the end token; with return_dict_in_generate a ModelOutput that also
            holds `sequences_scores` (B,).

        Raises:
            ValueError: for an option that beam search does not have, such as do_sample.
        """
        maps = {name: options.pop(name) for name in IMAGE_INPUTS if name in options}
        config, device = self.decoder.config, self.encoder.positional_embedding.device
        given = {} if generation_config is None else generation_config.to_diff_dict()
        given |= {name: value for name, value in options.items() if value is not None}
        check_known(given, (*_SEARCH, *_IMPLIED), "generate")
        if given.get("do_sample") or given.get("num_return_sequences", 1) != 1:
            raise InputError("generate is greedy or beam search of one text; leave do_sample, num_return_sequences out")
        if input_ids is None:
            raise InputError("input_ids are missing; give prompts, as PrismerProcessor makes them")
        prompts, asked = prompts_of(config, input_ids, attention_mask)
        own = self.generation_config.to_diff_dict()
        settings = (_ANSWER | {"num_beams": own.get("num_beams", 1)} if asked else own) | given
        longest = max(map(len, prompts))
        search = dict(
            beams=settings.get("num_beams", 1),
            max_new_tokens=_new_tokens(settings, given, "max", longest, config.caption_max_length - longest),
            min_new_tokens=max(0, _new_tokens(settings, given, "min", longest, 0)),
            length_penalty=settings.get("length_penalty", 1.0),
            scoring=settings.get("scoring", "classic"),
            read_out="pad" if asked else "last",
        )
        found = self._search(pixel_values, maps, prompts, search)
        # an end token follows a text that is shorter than the longest possible
        rows = [tokens + [config.eos_id] * (len(tokens) < search["max_new_tokens"]) for tokens in found.tokens]
        width = max(map(len, rows))
        new = torch.tensor([row + [config.pad_id] * (width - len(row)) for row in rows], device=device)
        sequences = torch.cat([input_ids.to(device), new], dim=1)
        if not given.get("return_dict_in_generate"):
            return sequences
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=found.scores.clone())

    @torch.inference_mode()
    def _search(
        self, pixel_values: Tensor | None, maps: dict[str, Tensor | None], prompts: list[list[int]], search: dict
    ) -> Generated:
        images = image_batch_of(self.decoder.config, pixel_values, maps, None)
        if len(images) != len(prompts):
            raise InputError(f"there are {len(images)} images and {len(prompts)} prompts; give one for each")
        images = images.to(self.encoder.positional_embedding.device)
        groups = [[prompt] for prompt in prompts]
        return beam_search(self.decoder, self.encoder(images), groups, detections=images.detections, **search)


def _captions(architecture: Architecture) -> GenerationConfig:
    """How `prismer.inference.caption` generates."""
    return GenerationConfig(
        bos_token_id=architecture.bos_id,
        pad_token_id=architecture.pad_id,
        eos_token_id=architecture.eos_id,
        num_beams=3,
        min_length=min(8, architecture.caption_max_length),
        max_length=architecture.caption_max_length,
    )


def _new_tokens(settings: dict, given: dict, bound: str, prompt: int, otherwise: int) -> int:
    """The bound of generated tokens: what was given comes before defaults, new tokens before tokens in all."""
    for source in (given, settings):
        if source.get(f"{bound}_new_tokens") is not None:
            return source[f"{bound}_new_tokens"]
        if source.get(f"{bound}_length") is not None:
            return source[f"{bound}_length"] - prompt
    return otherwise
