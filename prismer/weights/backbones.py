"""A new Prismer around pre-trained towers: CLIP from open_clip, RoBERTa from transformers.

The inherited parts are copied tensor for tensor (Prismer, arXiv:2303.02506, section 3.1): CLIP's vision tower without
class token and projection, and RoBERTa's masked language model without pooler. All other tensors are new.
"""

import difflib
import logging
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prismer.config import ALL_EXPERTS, PRESETS, PrismerConfig, preset
from prismer.errors import InputError, MachineError
from prismer.files import is_disk_failure
from prismer.network import Model
from prismer.stems import CLIP_MEAN, CLIP_STD, resize_positions
from prismer.tokenizer import ROBERTA_VOCAB_SIZE, Tokenizer
from prismer.weights.locate import has_tokenizer
from prismer.weights.names import from_clip, from_roberta
from prismer.weights.tensors import POSITIONS, read_tensors

_NOT_TAKEN = ("visual.class_embedding", "visual.proj")
# the sizes of these two are known without asking the hub
_ROBERTA = {
    "roberta-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "roberta-large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
_ROBERTA_COMMON = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
# preset -> its towers (Prismer, arXiv:2303.02506, section 3.1): a model of open_clip, the tag of its weights, a RoBERTa
TOWERS = {
    "base": ("ViT-B-16-quickgelu", "openai", "roberta-base"),
    "large": ("ViT-L-14-336-quickgelu", "openai", "roberta-large"),
    "huge": ("ViT-H-14", "laion2b_s32b_b79k", "roberta-large"),
}
# fields that need not agree with a preset for the model to have its name
_FREE = ("image_size", "dropout")
_log = logging.getLogger(__name__)


def from_backbones(
    model_class: type[Model],
    vision: str = "ViT-B-16-quickgelu",
    text: str | Path = "roberta-base",
    *,
    vision_weights: str | Path | None = None,
    text_weights: str | Path | None = None,
    experts: Sequence[str] = ALL_EXPERTS,
    image_size: int | None = None,
    seed: int = 0,
    **changes: Any,
) -> Model:
    """Build a model from a CLIP and a RoBERTa; `Prismer.from_backbones` calls this.

    To train it, save it with `save_pretrained` and give that folder to train.py.

    Args:
        model_class: what is built.
        vision: the name of a ViT of open_clip; for OpenAI's weights a "-quickgelu" one, which they were trained as.
        text: a folder of transformers with a RoBERTa masked-LM; or a hub id such as "roberta-base", which downloads
            what this machine lacks.
        vision_weights: a local file of the whole CLIP; or a tag of open_clip, such as "openai", which downloads; None
            leaves the tower random and warns.
        text_weights: a local file of the text tower; with "roberta-base" and "roberta-large" nothing else is read.
        experts: of the new model; () is PrismerZ.
        image_size: RGB side in px, to which CLIP's positional table is resized; None keeps CLIP's own.
        seed: of the new parts; the caller's random numbers are not touched.
        changes: other fields of PrismerConfig, such as num_latents and expert_text.

    Returns:
        The model in fp32 on the CPU, in evaluation mode, with the tokenizer of `text`.

    Raises:
        ValueError: if a tower is unknown or has another architecture than Prismer's, or its weights do not fit it.
    """
    # the libraries draw initial weights, too, before they load others over them
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # the quicker one first, for its errors
        text_sizes, words, tokenizer = _read_roberta(str(text), text_weights)
        vision_sizes, pixels = _read_clip(vision, vision_weights)
        sizes = {**vision_sizes, **text_sizes}
        if image_size is not None:
            sizes["image_size"] = image_size
        named = {"name": _preset_of(sizes, experts), **sizes, "experts": tuple(experts), **changes}
        config = PrismerConfig(**named)
        torch.default_generator.manual_seed(seed)
        model = model_class(config, tokenizer)
    pixels[POSITIONS] = resize_positions(pixels[POSITIONS], config.grid)
    encoder, decoder = model.encoder, model.decoder
    towers = [encoder.stems["rgb"], encoder.ln_pre, encoder.ln_post, decoder.embeddings, decoder.head]
    towers += [module for stack in (encoder.blocks, decoder.layers) for block in stack for module in block.pretrained]
    inside = {id(tensor) for module in towers for tensor in module.parameters()}
    inside.add(id(encoder.positional_embedding))
    own = {key: tensor for key, tensor in model.named_parameters() if id(tensor) in inside}
    _fill({k: t for k, t in own.items() if k.startswith("encoder.")}, pixels, vision)
    _fill({k: t for k, t in own.items() if k.startswith("decoder.")}, words, str(text_weights or text))
    new = sum(1 for _ in model.parameters()) - len(own)
    _log.info("%d tensors come from %s and %s, %d are new", len(own), vision, text, new)
    return model.eval()


def is_preset(source: str | Path) -> bool:
    """Whether `source` names a preset that is built around CLIP and RoBERTa, and no folder."""
    return str(source).removesuffix("-z") in TOWERS and not Path(source).exists()


def from_preset(
    model_class: type[Model],
    name: str,
    *,
    image_size: int | None = None,
    experts: Sequence[str] | None = None,
    expert_text: Sequence[str] = (),
    seed: int = 0,
) -> Model:
    """Build a new model of a preset; what the hub's cache lacks of CLIP and RoBERTa is downloaded.

    Args:
        model_class: what is built.
        name: "base", "large" or "huge", each also with "-z" for a model without experts.
        image_size: RGB side in px; None takes the preset's.
        experts: None takes the preset's.
        expert_text: experts whose detections the decoder reads as text.
        seed: of the new parts.

    Raises:
        ValueError: if a tower is not on this machine and cannot be downloaded; the sentence names both.
    """
    config = preset(name)
    vision, tag, text = TOWERS[name.removesuffix("-z")]
    try:
        return from_backbones(
            model_class,
            vision,
            text,
            vision_weights=tag,
            experts=config.experts if experts is None else experts,
            image_size=image_size or config.image_size,
            expert_text=expert_text,
            seed=seed,
        )
    except InputError as error:
        raise InputError(f"{name} is built from open_clip's {vision} ({tag}) and {text}, and {error}") from None


def _fill(own: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into `own`, which they must fill completely."""
    wrong = sorted(set(own) ^ set(tensors))
    if wrong:
        verb = "has no" if wrong[0] in own else "has a"
        raise InputError(
            f"{source} {verb} {wrong[0]} (and {len(wrong) - 1} more such); give a CLIP ViT and a RoBERTa masked-LM"
        )
    with torch.no_grad():
        for key, tensor in tensors.items():
            if tensor.shape != own[key].shape:
                raise InputError(
                    f"{source} has {key} of shape {tuple(tensor.shape)}, a Prismer of its other sizes "
                    f"{tuple(own[key].shape)}; give a CLIP ViT and a RoBERTa masked-LM"
                )
            own[key].copy_(tensor)


def _preset_of(sizes: dict[str, Any], experts: Sequence[str]) -> str:
    """The name of the preset with these sizes, or "custom"."""
    for name, make in PRESETS.items():
        config = make()
        if all(getattr(config, field) == value for field, value in sizes.items() if field not in _FREE):
            return name if experts else f"{name}-z"
    return "custom"


def _read_clip(name: str, weights: str | Path | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The sizes of a vision tower as fields of PrismerConfig, and its tensors by our names."""
    try:
        import open_clip
    except ImportError:
        raise MachineError("open_clip reads CLIP and is not installed; run pip install open_clip_torch") from None

    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, 3) or ["ViT-B-16-quickgelu"]
        raise InputError(f"open_clip knows no model {name!r}; did you mean {' or '.join(close)}?")
    if weights is None:
        warnings.warn(
            f"the vision tower {name} is random; for a trained one give vision_weights, a file or a tag like 'openai'",
            stacklevel=4,
        )
    elif not Path(weights).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if str(weights) not in tags:
            listed = ", ".join(tags) or "none"
            raise InputError(f"vision_weights {weights} is neither a file nor a tag of {name}; its tags are {listed}")
        _download_clip(open_clip, name, str(weights))
    try:
        pretrained = None if weights is None else str(weights)
        model = open_clip.create_model(name, pretrained=pretrained, weights_only=True)
    except (RuntimeError, OSError, KeyError, AttributeError, pickle.UnpicklingError, SafetensorError) as error:
        # the second line of load_state_dict's message names the first fault
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        raise InputError(
            f"{weights} does not load as open_clip's {name} ({lines[min(1, len(lines) - 1)][:160]}); "
            "name the model that it was trained as, and give a state dict of all of it"
        ) from None
    sizes = _clip_sizes(open_clip, name, model.visual)
    tensors = {}
    for key, tensor in model.visual.state_dict(prefix="visual.").items():
        if key not in _NOT_TAKEN:
            tensors[from_clip(key) or key] = tensor
    # the first row belongs to the class token
    tensors[POSITIONS] = tensors[POSITIONS][1:].float()
    return sizes, tensors


def _download_clip(open_clip: ModuleType, name: str, tag: str) -> None:
    """Get the weights of a tag, unless they are on this machine.

    Raises:
        ValueError: if that is not possible.
        OSError: if the disk is full.
    """
    try:
        open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
    except (OSError, RuntimeError) as error:
        if is_disk_failure(error):
            raise
        # open_clip puts the last error of the hub's client behind its own
        reason = (str(error).rpartition("Last error: ")[2].strip().splitlines() or [type(error).__name__])[0][:120]
        raise InputError(
            f"the weights {tag} of open_clip's {name} are not on this machine and cannot be downloaded ({reason}); "
            f"check the connection and HF_HUB_OFFLINE, or give vision_weights, a file"
        ) from None


def _clip_sizes(open_clip: ModuleType, name: str, visual: nn.Module) -> dict[str, Any]:
    """Fields of PrismerConfig; a ValueError for a tower that is no plain CLIP ViT."""

    def refuse(why: str) -> ValueError:
        return InputError(f"{name} {why}; Prismer takes a plain CLIP ViT, such as ViT-B-16-quickgelu or ViT-H-14")

    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        raise refuse(f"is a {type(visual).__name__}")
    block = visual.transformer.resblocks[0]
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.MultiheadAttention):
        raise refuse(f"has an attention of its own ({type(attention).__name__})")
    activation = block.mlp.gelu
    exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
    if not exact and not isinstance(activation, open_clip.transformer.QuickGELU):
        raise refuse(f"has the activation {activation}")
    if visual.attn_pool is not None:
        raise refuse("pools by attention, and its last norm comes after that")
    if any(norm.eps != 1e-5 for norm in visual.modules() if isinstance(norm, nn.LayerNorm)):
        raise refuse("has layer norms whose eps is not 1e-5")
    height, width = visual.image_size
    if height != width or len(set(visual.patch_size)) != 1:
        raise refuse(f"reads images of {height} x {width} in patches of {visual.patch_size}")
    if not all(
        math.isclose(a, b, abs_tol=1e-4)
        for a, b in zip((*visual.image_mean, *visual.image_std), (*CLIP_MEAN, *CLIP_STD), strict=True)
    ):
        raise refuse("was trained on images of another mean or standard deviation than CLIP's")
    return dict(
        image_size=height,
        patch_size=visual.patch_size[0],
        vision_width=visual.conv1.out_channels,
        vision_depth=len(visual.transformer.resblocks),
        vision_heads=attention.num_heads,
        vision_activation="gelu" if exact else "quick_gelu",
    )


def _read_roberta(source: str, weights: str | Path | None) -> tuple[dict[str, Any], dict[str, Tensor], Tokenizer]:
    """The sizes of a RoBERTa as fields of PrismerConfig, its tensors by our names, and its tokenizer."""
    import transformers

    local = Path(source).is_dir()
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"text_weights {weights} is no file; give one, or leave it out to read those of {source}")
    known = _ROBERTA.get(source.split("/")[-1]) if weights is not None and not local else None
    if known is not None:
        config = transformers.RobertaConfig(**known, **_ROBERTA_COMMON)
    else:
        config = _of_transformers(transformers.AutoConfig.from_pretrained, source, local)
    sizes = _roberta_sizes(source, config)
    if weights is not None:
        stored = read_tensors(Path(weights))
    else:
        model, loading = _of_transformers(
            transformers.RobertaForMaskedLM.from_pretrained,
            source,
            local,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if loading["missing_keys"] or loading["mismatched_keys"]:
            first = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))[0]
            raise InputError(f"{source} lacks {first}; give a RoBERTa saved with its masked-LM head")
        stored = model.state_dict()
    # a tied tensor comes twice, under two names; the pooler and position_ids are not taken
    tensors = {ours: tensor for key, tensor in stored.items() if (ours := from_roberta(key)) is not None}
    if local and has_tokenizer(Path(source)):
        return sizes, tensors, Tokenizer.from_folder(source)
    if sizes["vocab_size"] == ROBERTA_VOCAB_SIZE:
        return sizes, tensors, Tokenizer.roberta()
    raise InputError(
        f"{source} has a vocabulary of {sizes['vocab_size']}, not RoBERTa's, and no tokenizer files; put them there"
    )


def _of_transformers(load: Callable, source: str, local: bool, **options: Any) -> Any:
    """What `load` of transformers returns; its errors as one sentence."""
    try:
        return load(source, local_files_only=local, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"transformers cannot load {source} ({reason}); give the folder of a RoBERTa masked-LM, or a hub id "
            "while there is a connection"
        ) from None


def _roberta_sizes(source: str, config: Any) -> dict[str, Any]:
    """Fields of PrismerConfig; a ValueError for a config of transformers that is not RoBERTa's."""
    required = dict(model_type="roberta", hidden_act="gelu", layer_norm_eps=1e-5, type_vocab_size=1)
    for field, value in required.items():
        found = getattr(config, field, None)
        if found != value:
            raise InputError(f"{source} has {field} {found!r}, Prismer's decoder has {value!r}; give a RoBERTa")
    return dict(
        text_width=config.hidden_size,
        text_depth=config.num_hidden_layers,
        text_heads=config.num_attention_heads,
        text_mlp_width=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        bos_id=config.bos_token_id,
        pad_id=config.pad_token_id,
        eos_id=config.eos_token_id,
        dropout=config.hidden_dropout_prob,
    )
