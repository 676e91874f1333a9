"""What is compared: the variants of the model, its training and its data, and the findings that rest on them.

The findings are those of the paper (Prismer, arXiv:2303.02506). A claim is a sum of accuracies with weights, such as
"baseline - variant", and a margin that the sum has to exceed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prismer.errors import InputError, shown
from prismer.experts import PAPER_EXPERTS, TEXT_EXPERTS

BASELINE = "baseline"
# of `evaluation.scores`: all questions, and with /KIND those of one kind
ACCURACY = "accuracy"
# what "does not hurt" and "does not help" mean: less than one point of accuracy
MARGIN = 0.01
# the places at which a variant can begin to differ from the baseline
TRAINING, FINE_TUNING, INFERENCE = "training", "fine-tuning", "inference"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change of the baseline.

    Attributes:
        name: as the command and the folders call it.
        change: what differs from the baseline, in words.
        begins: where it differs: from the first stage of training on, only in fine-tuning, or only at inference, on the
            trained baseline.
        config: fields of PrismerConfig that differ.
        network: a key of `networks.CHANGES` and its arguments; () leaves the modules as they are.
        feed: a key of `feeds.CHANGES` and its arguments; () leaves the samples as they are.
        settings: fields of TrainConfig that differ, in the stage at which the variant begins.
    """

    name: str
    change: str
    begins: str = TRAINING
    config: dict[str, Any] = field(default_factory=dict)
    network: tuple = ()
    feed: tuple = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as numbers: it is shown if the weighted sum of accuracies is above `-margin`.

    Attributes:
        text: the sentence.
        weights: variant -> its weight in the sum; the weights add up to 0.
        margin: 0 for "is better", MARGIN for "is not worse".
        metric: ACCURACY, or that of one kind of question.
    """

    text: str
    weights: dict[str, float]
    margin: float = 0.0
    metric: str = ACCURACY


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One ablation of the paper.

    Attributes:
        name: as the command calls it.
        text: what the paper found.
        variants: what is compared, beside the baseline.
        claims: what the runs are asked.
        two_stages: whether it needs pre-training and fine-tuning, also where other findings train in one stage.
    """

    name: str
    text: str
    variants: Sequence[Variant]
    claims: Sequence[Claim]
    two_stages: bool = False


BASE_VARIANT = Variant(name=BASELINE, change="the model of the paper")


def _better(text: str, higher: str, lower: str, margin: float = 0.0, metric: str = ACCURACY) -> Claim:
    """The claim that `higher` is above `lower`, or with a margin that it is not below."""
    return Claim(text=text, weights={higher: 1.0, lower: -1.0}, margin=margin, metric=metric)


def _adaptor(text: str, name: str, *network: Any) -> Variant:
    return Variant(name=name, change=text, network=network)


_ADAPTORS = Finding(
    name="adaptors",
    text="One plain residual MLP per layer is best; two per layer and gated ones are worse; a larger bottleneck is "
    "better.",
    variants=(
        _adaptor("no adaptors", "no-adaptor", "adaptor_none"),
        _adaptor("a second adaptor at the end of every layer", "two-adaptors", "adaptor_two"),
        _adaptor("each adaptor's branch times tanh of a learned gate, 0 at first", "gated-adaptor", "adaptor_gated"),
        _adaptor("hidden width 1/8 of the layer's", "adaptor-1_8", "adaptor_width", 0.125),
        _adaptor("hidden width 1/2 of the layer's", "adaptor-1_2", "adaptor_width", 0.5),
        _adaptor("hidden width twice the layer's", "adaptor-2", "adaptor_width", 2.0),
    ),
    claims=(
        _better("one adaptor per layer is better than none", BASELINE, "no-adaptor"),
        _better("one adaptor per layer is better than two", BASELINE, "two-adaptors"),
        _better("a plain adaptor is better than a gated one", BASELINE, "gated-adaptor"),
        Claim(
            text="wide adaptors (1, 2) are better than narrow ones (1/8, 1/2)",
            weights={BASELINE: 0.5, "adaptor-2": 0.5, "adaptor-1_2": -0.5, "adaptor-1_8": -0.5},
        ),
    ),
)

_RESAMPLER = Finding(
    name="resampler",
    text="A learned resampler is better than random sampling of tokens; RGB through it, too, hurts; more layers "
    "or latents do not help.",
    variants=(
        Variant(
            name="random-sampling",
            change="as many expert tokens as the resampler has latents, drawn at random (one fixed draw at inference)",
            network=("sampling_random",),
        ),
        Variant(name="no-resampler", change="all expert tokens enter the encoder", network=("sampling_none",)),
        Variant(name="rgb-resampled", change="RGB, too, passes the resampler", network=("sampling_rgb",)),
        *(
            Variant(name=f"layers-{n}", change=f"depth of the resampler: {n}", config={"resampler_depth": n})
            for n in (1, 2, 4)
        ),
        *(
            Variant(name=f"latents-{n}", change=f"number of latents: {n}", config={"num_latents": n})
            for n in (16, 64, 128)
        ),
    ),
    claims=(
        _better("a learned resampler is better than random sampling", BASELINE, "random-sampling"),
        _better("RGB through the resampler hurts", BASELINE, "rgb-resampled"),
        _better("1 layer is not worse than 4", "layers-1", "layers-4", MARGIN),
        _better("16 latents are not worse than 128", "latents-16", "latents-128", MARGIN),
    ),
)


def _freezing(stage: str, mode: str, frozen: str) -> Variant:
    name = {TRAINING: "pretrain", FINE_TUNING: "finetune"}[stage] + f"-frozen-{frozen}"
    when = {TRAINING: "pre-training", FINE_TUNING: "fine-tuning"}[stage]
    return Variant(name=name, change=f"{when} freezes {frozen}", begins=stage, settings={"freeze": mode})


_FREEZING = Finding(
    name="freezing",
    text="Frozen backbones in pre-training are better than full training; fine-tuning freezes the vision side alone.",
    variants=(
        _freezing(TRAINING, "none", "nothing"),
        _freezing(TRAINING, "freeze_vision", "vision"),
        _freezing(TRAINING, "freeze_lang", "language"),
        _freezing(FINE_TUNING, "none", "nothing"),
        _freezing(FINE_TUNING, "freeze_lang", "language"),
        _freezing(FINE_TUNING, "freeze_lang_vision", "both"),
    ),
    claims=(
        _better("frozen backbones in pre-training are better than none", BASELINE, "pretrain-frozen-nothing"),
        _better("frozen vision in fine-tuning is better than nothing frozen", BASELINE, "finetune-frozen-nothing"),
        _better("frozen vision in fine-tuning is better than both frozen", BASELINE, "finetune-frozen-both"),
        _better("frozen vision in fine-tuning is better than frozen language", BASELINE, "finetune-frozen-language"),
    ),
    two_stages=True,
)

_EXPERTS = Finding(
    name="experts",
    text="Accuracy rises with the number of experts and then levels off.",
    variants=tuple(
        Variant(
            name=f"experts-{n}",
            change=f"experts: {', '.join(PAPER_EXPERTS[:n])}" if n else "no experts: RGB alone",
            config={"experts": PAPER_EXPERTS[:n]},
        )
        for n in range(len(PAPER_EXPERTS) + 1)
    ),
    claims=(
        _better("six experts are better than none", "experts-6", "experts-0"),
        _better("three experts are better than none", "experts-3", "experts-0"),
        Claim(
            text="the first three experts gain more than the next three",
            weights={"experts-3": 2.0, "experts-0": -1.0, "experts-6": -1.0},
        ),
    ),
)

_SHARES = (25, 50, 75, 100)
_QUALITY = Finding(
    name="quality",
    text="Accuracy falls as a growing share of the depth maps is replaced by uniform noise.",
    variants=tuple(
        Variant(
            name=f"depth-noise-{share}",
            change=f"the depth maps of {share} % of the images are uniform noise, in training and evaluation",
            feed=("depth_noise", share),
        )
        for share in _SHARES
    ),
    claims=(
        # the slope of the line through five equidistant points, for the whole way from 0 to 100 %
        Claim(
            text="accuracy falls with the share of noise (slope of a line, from 0 to 100 %)",
            weights={
                BASELINE: 0.8,
                "depth-noise-25": 0.4,
                "depth-noise-50": 0.0,
                "depth-noise-75": -0.4,
                "depth-noise-100": -0.8,
            },
        ),
        _better("exact depth is better than noise alone", BASELINE, "depth-noise-100"),
    ),
)

_USELESS = Finding(
    name="useless",
    text="Further experts that predict noise do not hurt, and the model stays above RGB alone.",
    variants=(
        *(
            Variant(name=f"noise-experts-{n}", change=f"further experts of uniform noise: {n}", network=("noise", n))
            for n in (1, 2, 3)
        ),
        _EXPERTS.variants[0],
    ),
    claims=(
        _better("one expert of noise does not hurt", "noise-experts-1", BASELINE, MARGIN),
        _better("three experts of noise do not hurt", "noise-experts-3", BASELINE, MARGIN),
        _better("with three experts of noise the model is above RGB alone", "noise-experts-3", "experts-0"),
    ),
)


def _at_inference(name: str, change: str, *feed: Any) -> Variant:
    return Variant(name=name, change=change, begins=INFERENCE, feed=feed)


_INFERENCE = Finding(
    name="inference",
    text="Dropping experts at inference, or a segmentation expert with another label set, degrades the results.",
    variants=(
        *(_at_inference(f"drop-{name}", f"no {name} maps at inference", "drop", name) for name in PAPER_EXPERTS),
        _at_inference("drop-all", "no expert maps at inference", "drop", *PAPER_EXPERTS),
        _at_inference("other-seg", "the segmentation's classes have other names at inference", "other_segmentation"),
    ),
    claims=(
        Claim(
            text="dropping one expert degrades the results (mean of the six)",
            weights={BASELINE: 1.0, **{f"drop-{name}": -1 / len(PAPER_EXPERTS) for name in PAPER_EXPERTS}},
        ),
        _better("dropping all experts degrades the results", BASELINE, "drop-all"),
        _better("another label set for segmentation degrades the results", BASELINE, "other-seg"),
    ),
)

# the future work that the paper names; the kinds of questions are those of the rendered scenes
_TEXT = Finding(
    name="text",
    text="Not tried: experts give their detections as sequences of text. Here the decoder reads them.",
    variants=(
        Variant(
            name="maps-and-text",
            change="the decoder reads objects and words as text, too",
            config={"expert_text": TEXT_EXPERTS},
        ),
        Variant(
            name="text-for-maps",
            change="objects and words are text alone: their maps are left out",
            config={
                "expert_text": TEXT_EXPERTS,
                "experts": tuple(name for name in PAPER_EXPERTS if name not in TEXT_EXPERTS),
            },
        ),
    ),
    claims=(
        _better("text beside maps is better than maps alone", "maps-and-text", BASELINE),
        _better("text beside maps reads more words", "maps-and-text", BASELINE, metric=f"{ACCURACY}/read"),
        *(
            _better(f"text beside maps does not hurt: {kind}", "maps-and-text", BASELINE, MARGIN, f"{ACCURACY}/{kind}")
            for kind in ("colour", "count", "relation", "shape", "yes/no")
        ),
        _better("text is not worse than maps", "text-for-maps", BASELINE, MARGIN),
    ),
)

FINDINGS = (_ADAPTORS, _RESAMPLER, _FREEZING, _EXPERTS, _QUALITY, _USELESS, _INFERENCE, _TEXT)
VARIANTS = {BASELINE: BASE_VARIANT} | {variant.name: variant for finding in FINDINGS for variant in finding.variants}


def find_variant(name: str) -> Variant:
    """The variant of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in VARIANTS:
        raise InputError(f"there is no variant {shown(name)}; `python -m prismer.ablations list` names all")
    return VARIANTS[name]


def select(names: Sequence[str]) -> list[tuple[Finding, list[Variant]]]:
    """The findings and, for each, the variants that some names stand for; the baseline comes first in each.

    Args:
        names: of findings (all their variants) and of variants; "all" for everything.

    Raises:
        ValueError: if a name is unknown.
    """
    findings = {finding.name: finding for finding in FINDINGS}
    for name in names:
        if name != "all" and name not in findings:
            find_variant(name)
    chosen = []
    for finding in FINDINGS:
        whole = "all" in names or finding.name in names
        found = [variant for variant in finding.variants if whole or variant.name in names]
        if found or (BASELINE in names and not finding.two_stages):
            chosen.append((finding, [BASE_VARIANT, *found]))
    return chosen
