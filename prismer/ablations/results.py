"""The results of finished runs: read, averaged over seeds, and compared with 95 % intervals.

Two intervals tell two kinds of chance apart. Over seeds: a t interval of the differences between runs of one seed,
which start from the same weights and see the same samples in the same order. Over images: a bootstrap of the validation
images, with the accuracies of an image averaged over the seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismer.ablations.catalogue import ACCURACY, Claim
from prismer.errors import InputError
from prismer.evaluation.vqa_accuracy import vqa_accuracy
from prismer.reading import read_json

# 97.5 % quantiles of Student's t with 1 to 10 degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_RESAMPLES = 2000

Interval = tuple[float, float]


def image_scores(rows: Sequence[dict]) -> dict[str, dict[str, list[float]]]:
    """For each kind of question and each image in order, the sum of accuracies ("right") and their number ("asked")."""
    found: dict[str, dict[str, list[float]]] = {}
    for i, row in enumerate(rows):
        for question in row.get("questions", ()):
            if not question["answers"]:
                continue
            none = dict(right=[0] * len(rows), asked=[0] * len(rows))
            kind = found.setdefault(question["kind"], none)
            right = kind["right"][i] + vqa_accuracy(question["prediction"], question["answers"])
            # most are whole numbers, and short in a file
            kind["right"][i] = round(right) if right == round(right) else round(right, 4)
            kind["asked"][i] += 1
    return found


@dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
        seed: of the run.
        scores: as `evaluation.scores` returns them.
        images: "accuracy" and "accuracy/KIND" -> (2, I) sums of accuracies and numbers of questions of each image.
        about: the other facts of the file.
    """

    seed: int
    scores: dict[str, float]
    images: dict[str, np.ndarray]
    about: dict[str, Any]

    @classmethod
    def load(cls, file: Path) -> "Result":
        """Read a file of stage.py.

        Raises:
            ValueError: if it is damaged.
        """
        values = read_json(file, dict, "delete it, and run the variant again")
        try:
            scores, kinds = values.pop("scores"), values.pop("images")
            images = {
                f"{ACCURACY}/{kind}": np.array([found["right"], found["asked"]], float)
                for kind, found in sorted(kinds.items())
            }
            if images:
                images[ACCURACY] = sum(images.values())
            return cls(int(values["seed"]), scores, images, values)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{file} is damaged; delete it, and run the variant again") from None


# variant -> seed -> result
Results = Mapping[str, Mapping[int, Result]]


def load_stage(results: Path, stage: str) -> dict[str, dict[int, Result]]:
    """The results of all finished runs of a stage."""
    found: dict[str, dict[int, Result]] = {}
    for file in sorted((results / stage).glob("*/seed-*.json")):
        result = Result.load(file)
        found.setdefault(file.parent.name, {})[result.seed] = result
    return found


def quantile_of_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; above ten degrees of freedom by a series that is exact to 0.003."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.372 / degrees + 2.82 / degrees**2


def mean_and_interval(values: Sequence[float]) -> tuple[float, Interval | None]:
    """The mean of independent values, and its 95 % t interval; None for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = quantile_of_t(len(values) - 1) * deviation / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the runs say about a claim.

    Attributes:
        claim: the sentence.
        seeds: those that all variants of the claim have.
        difference: the weighted sum of the accuracies, its mean over the seeds; None without a common seed.
        over_seeds: 95 % t interval over the seeds; None with a single one.
        over_images: 95 % bootstrap interval over the validation images.
    """

    claim: Claim
    seeds: Sequence[int]
    difference: float | None = None
    over_seeds: Interval | None = None
    over_images: Interval | None = None

    @property
    def verdict(self) -> str:
        """ "shown" or "contradicted" if both intervals agree, else "undecided"."""
        if self.difference is None:
            return "not run"
        if self.over_seeds is None or self.over_images is None:
            return "undecided"
        least = -self.claim.margin
        if min(self.over_seeds[0], self.over_images[0]) > least:
            return "shown"
        if max(self.over_seeds[1], self.over_images[1]) < least:
            return "contradicted"
        return "undecided"


def compare(claim: Claim, results: Results) -> Comparison:
    """Compare the variants of a claim by their accuracy.

    Raises:
        ValueError: if two results are of other validation images.
    """
    metric = claim.metric
    groups = {
        name: {seed: result for seed, result in results.get(name, {}).items() if metric in result.images}
        for name in claim.weights
    }
    seeds = sorted(set.intersection(*(set(group) for group in groups.values())))
    if not seeds:
        return Comparison(claim=claim, seeds=())
    differences = [
        sum(weight * groups[name][seed].scores[metric] for name, weight in claim.weights.items()) for seed in seeds
    ]
    mean, over_seeds = mean_and_interval(differences)
    first = next(iter(groups))
    asked = groups[first][seeds[0]].images[metric][1]
    right = np.zeros_like(asked)
    for name, weight in claim.weights.items():
        for seed in seeds:
            own, of = groups[name][seed].images[metric]
            if not np.array_equal(of, asked):
                raise InputError(
                    f"the results of {name} with seed {seed} are of other validation images than those of {first}; "
                    f"delete them, and run the variant again"
                )
            right += weight * own / len(seeds)
    return Comparison(
        claim=claim, seeds=seeds, difference=mean, over_seeds=over_seeds, over_images=_bootstrap(right, asked)
    )


def _bootstrap(right: np.ndarray, asked: np.ndarray) -> Interval:
    """The 95 % interval of sum(right) / sum(asked) over resampled images; the same numbers at every call."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(asked), np.full(len(asked), 1 / len(asked)), size=_RESAMPLES)
    low, high = np.quantile((counts @ right) / (counts @ asked), (0.025, 0.975))
    return float(low), float(high)
