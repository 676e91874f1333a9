"""Names of tensors: ours <-> those of the published Prismer checkpoints, of CLIP and of RoBERTa.

A rule is a pair of patterns with the same groups; `to_published` and `from_published` read it in either direction. The
whole key table is in docs/architecture.md.
"""

import re
from collections.abc import Iterable

# what a placeholder of the rules stands for: a number, an expert, weight or bias, a tensor of a batch norm
_GROUPS = {
    "i": r"(\d+)",
    "e": r"(\w+)",
    "leaf": r"(weight|bias)",
    "norm": r"(weight|bias|running_mean|running_var|num_batches_tracked)",
}
_CLIP_BLOCK = (
    "ln_1.{leaf}",
    "ln_2.{leaf}",
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    "attn.out_proj.{leaf}",
    "mlp.c_fc.{leaf}",
    "mlp.c_proj.{leaf}",
)

# (ours, published)
_RULES: list[tuple[str, str]] = [
    ("encoder.positional_embedding", "expert_encoder.positional_embedding"),
    ("encoder.instance_embedding", "expert_encoder.instance_embedding"),
    ("encoder.stems.rgb.weight", "expert_encoder.conv1.rgb.weight"),
    *((f"encoder.stems.{{e}}.convs.{j}.weight", f"expert_encoder.conv1.{{e}}.{1 + 3 * j}.weight") for j in range(4)),
    *(
        (f"encoder.stems.{{e}}.norms.{j}.{{norm}}", f"expert_encoder.conv1.{{e}}.{2 + 3 * j}.{{norm}}")
        for j in range(4)
    ),
    ("encoder.stems.{e}.project.weight", "expert_encoder.conv1.{e}.13.weight"),
    ("encoder.blocks.{i}.adaptor.norm.{leaf}", "expert_encoder.transformer.resblocks.{i}.1.adaptor_ln.{leaf}"),
    ("encoder.blocks.{i}.adaptor.down.{leaf}", "expert_encoder.transformer.resblocks.{i}.1.adaptor.down_proj.{leaf}"),
    ("encoder.blocks.{i}.adaptor.up.{leaf}", "expert_encoder.transformer.resblocks.{i}.1.adaptor.up_proj.{leaf}"),
    *((f"encoder.blocks.{{i}}.{name}", f"expert_encoder.transformer.resblocks.{{i}}.0.{name}") for name in _CLIP_BLOCK),
    ("encoder.resampler.latents", "expert_encoder.resampler.latents"),
    *(
        (f"encoder.resampler.blocks.{{i}}.{name}", f"expert_encoder.resampler.perceiver_blocks.{{i}}.{name}")
        for name in (*_CLIP_BLOCK, "ln_ff.{leaf}")
    ),
    ("encoder.ln_pre.{leaf}", "expert_encoder.ln_pre.{leaf}"),
    ("encoder.ln_post.{leaf}", "expert_encoder.ln_post.{leaf}"),
    ("decoder.embeddings.word.weight", "text_decoder.roberta.embeddings.word_embeddings.weight"),
    ("decoder.embeddings.position.weight", "text_decoder.roberta.embeddings.position_embeddings.weight"),
    ("decoder.embeddings.token_type.weight", "text_decoder.roberta.embeddings.token_type_embeddings.weight"),
    ("decoder.embeddings.norm.{leaf}", "text_decoder.roberta.embeddings.LayerNorm.{leaf}"),
    *(
        (f"decoder.{ours}.{part}.{{leaf}}", f"text_decoder.roberta.encoder.{theirs}.{name}.{{leaf}}")
        for ours, theirs in (("layers.{i}", "layer.{i}.0"), ("extra", "output_layer"))
        for part, name in (
            ("attention.query", "attention.self.query"),
            ("attention.key", "attention.self.key"),
            ("attention.value", "attention.self.value"),
            ("attention.output", "attention.output.dense"),
            ("attention.norm", "attention.output.LayerNorm"),
            ("mlp.intermediate", "intermediate.dense"),
            ("mlp.output", "output.dense"),
            ("mlp.norm", "output.LayerNorm"),
        )
    ),
    *(
        (f"decoder.layers.{{i}}.{part}.{{leaf}}", f"text_decoder.roberta.encoder.layer.{{i}}.{name}.{{leaf}}")
        for part, name in (
            ("cross.query", "1.self.query"),
            ("cross.key", "1.self.key"),
            ("cross.value", "1.self.value"),
            ("cross.output", "1.output.dense"),
            ("cross.norm", "1.output.LayerNorm"),
            ("adaptor.down", "2.adaptor.down_proj"),
            ("adaptor.up", "2.adaptor.up_proj"),
            ("adaptor.norm", "2.adaptor_ln"),
        )
    ),
    ("decoder.head.dense.{leaf}", "text_decoder.lm_head.dense.{leaf}"),
    ("decoder.head.norm.{leaf}", "text_decoder.lm_head.layer_norm.{leaf}"),
    ("decoder.head.bias", "text_decoder.lm_head.bias"),
]

# second names under which published files store the same tensor
_TIED = {
    "decoder.embeddings.word.weight": "text_decoder.lm_head.decoder.weight",
    "decoder.head.bias": "text_decoder.lm_head.decoder.bias",
}
_UNTIED = {second: ours for ours, second in _TIED.items()}

# a buffer of old transformers versions, 0..513, without meaning here
IGNORED = "text_decoder.roberta.embeddings.position_ids"

_CLIP: list[tuple[str, str]] = [
    ("encoder.stems.rgb.weight", "visual.conv1.weight"),
    ("encoder.positional_embedding", "visual.positional_embedding"),
    *((f"encoder.blocks.{{i}}.{name}", f"visual.transformer.resblocks.{{i}}.{name}") for name in _CLIP_BLOCK),
    ("encoder.ln_pre.{leaf}", "visual.ln_pre.{leaf}"),
    ("encoder.ln_post.{leaf}", "visual.ln_post.{leaf}"),
]

# a masked-LM RoBERTa has the published names, but without a layer's sub-index; Prismer's additions have no source
_ROBERTA: list[tuple[str, str]] = [
    (ours, theirs.removeprefix("text_decoder.").replace("layer.{i}.0.", "layer.{i}."))
    for ours, theirs in _RULES
    if ours.startswith("decoder.") and not re.search(r"layer\.\{i\}\.[12]\.|output_layer", theirs)
]


def _compile(source: str, target: str) -> tuple[re.Pattern, str]:
    names = re.findall(r"\{(\w+)\}", source)
    pattern = re.escape(source)
    for name in names:
        pattern = pattern.replace(re.escape("{" + name + "}"), _GROUPS[name], 1)
        target = target.replace("{" + name + "}", rf"\{names.index(name) + 1}", 1)
    return re.compile(pattern), target


_TO = [_compile(ours, theirs) for ours, theirs in _RULES]
_FROM = [_compile(theirs, ours) for ours, theirs in _RULES]
_FROM_CLIP = [_compile(theirs, ours) for ours, theirs in _CLIP]
_FROM_ROBERTA = [_compile(theirs, ours) for ours, theirs in _ROBERTA]


def _translate(key: str, table: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, target in table:
        match = pattern.fullmatch(key)
        if match:
            return match.expand(target)
    return None


def is_published(names: Iterable[str]) -> bool:
    """Whether tensors have published names."""
    return any(name.startswith(("expert_encoder.", "text_decoder.")) for name in names)


def to_published(key: str) -> tuple[str, ...]:
    """The names of our tensor `key` in a published checkpoint: one, or two if it is stored twice.

    Raises:
        KeyError: if `key` is not a tensor of Prismer.
    """
    name = _translate(key, _TO)
    if name is None:
        raise KeyError(f"{key} is no tensor of Prismer")
    return (name, _TIED[key]) if key in _TIED else (name,)


def from_published(key: str) -> str | None:
    """Our name of a published checkpoint's tensor, or None for one without meaning or of another model."""
    return _UNTIED.get(key) or _translate(key, _FROM)


def from_clip(key: str) -> str | None:
    """Our name of a tensor of CLIP (OpenAI's or open_clip's names), or None for one that Prismer does not take.

    CLIP's positional table has a first row for the class token, which ours lacks.
    """
    return _translate(key, _FROM_CLIP)


def from_roberta(key: str) -> str | None:
    """Our name of a tensor of RoBERTa with a language-model head (transformers' names), or None for one not taken."""
    return _UNTIED.get(f"text_decoder.{key}") or _translate(key, _FROM_ROBERTA)
