"""What `--data` names: one dataset, or several with an optional weight each, as in `a,b:0.2,s3://bucket/c`.

A single dataset is taken as it stands, whatever characters its name holds. Several are separated by commas. A number
behind the last colon of a place is its weight; in `https://host:8080/x` none follows, and the whole number behind a
URL's host alone is its port.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from prismer.errors import InputError, listed, shown

# the slots of the pattern that weights are counted in: a weight is a whole number of thousandths
SLOTS = 1000
_WEIGHTED = re.compile(r"(?P<place>.*):(?P<weight>[+-]?(\d{1,9}(\.\d{0,9})?|\.\d{1,9}))")
_HOST = re.compile(r"[A-Za-z0-9+.-]+://[^/]*")


@dataclass(frozen=True)
class Part:
    """One dataset of a run.

    Attributes:
        place: its folder or URL, which holds the splits.
        name: the end of the place, as long as it takes to tell it from the other places of the run.
        weight: as given; None without.
    """

    place: str
    name: str
    weight: Fraction | None = None


def parse_parts(data: str) -> list[Part]:
    """The datasets that a text names.

    Raises:
        ValueError: if a place is empty or is named twice, or the weights give a dataset no share; the message says how
            to correct it.
    """
    if "," not in data:
        return [Part(data, Path(data).name)]
    places, weights = zip(*map(_split_weight, data.split(",")), strict=True)
    if not all(places):
        raise InputError(f"data is {shown(data)}, which holds an empty place; name a folder between two commas")
    # a slash at the end names the same folder
    bare = [place.rstrip("/") for place in places]
    if twice := {place for place in bare if bare.count(place) > 1}:
        raise InputError(f"data names {listed(twice)} twice; name each dataset once")
    parts = [Part(*found) for found in zip(places, _names(bare), weights, strict=True)]
    slots_of(parts)
    return parts


def join_places(places: Sequence[str]) -> str:
    """The text that names the same datasets as a list does.

    Raises:
        ValueError: if an entry is no text, or holds a comma.
    """
    for place in places:
        if not isinstance(place, str):
            raise InputError(f"data holds {shown(place)}; it must be a list of texts such as coco or coco:0.2")
        if "," in place:
            raise InputError(f"data holds {shown(place)}, and commas separate datasets; rename or link the folder")
    return ",".join(places)


def slots_of(parts: Sequence[Part]) -> tuple[list[int | None], bool]:
    """How many of 1,000 samples each dataset gives.

    Returns:
        The number for each part, None for those without a weight, which share what is left; and whether it was rounded.

    Raises:
        ValueError: if a weight is not positive or below a thousandth, or nothing is left for a part without a weight.
    """
    given = [part.weight for part in parts if part.weight is not None]
    for part in parts:
        if part.weight is not None and part.weight <= 0:
            raise InputError(f"{part.place} has the weight {float(part.weight):g}; give a share above 0")
    all_weighted = len(given) == len(parts)
    # if every dataset has a weight, weights are relative
    exact = [weight * SLOTS / sum(given) if all_weighted else weight * SLOTS for weight in given]
    weighted = [part for part in parts if part.weight is not None]
    for part, slots in zip(weighted, exact, strict=True):
        if slots < 1:
            raise InputError(
                f"{part.place} has a share of {float(slots / SLOTS):g}; the smallest is {1 / SLOTS:g}, give it more"
            )
    whole = [int(slots) if all_weighted else int(slots + Fraction(1, 2)) for slots in exact]
    if all_weighted:
        # the slots that rounding down left go to the largest fractions
        by_fraction = sorted(range(len(exact)), key=lambda k: whole[k] - exact[k])
        for k in by_fraction[: SLOTS - sum(whole)]:
            whole[k] += 1
    elif sum(whole) >= SLOTS:
        first = next(part.place for part in parts if part.weight is None)
        raise InputError(
            f"the weights add up to {float(sum(given)):g}, which leaves nothing for {first}; give less than 1 in all, "
            f"or give every dataset a weight"
        )
    found = iter(whole)
    return [None if part.weight is None else next(found) for part in parts], whole != exact


def _split_weight(entry: str) -> tuple[str, Fraction | None]:
    entry = entry.strip()
    match = _WEIGHTED.fullmatch(entry)
    if match is None:
        return entry, None
    place, weight = match["place"], match["weight"]
    if weight.isdecimal() and _HOST.fullmatch(place) and not _WEIGHTED.fullmatch(place):
        return entry, None
    return place, Fraction(weight)


def _names(places: Sequence[str]) -> list[str]:
    """The last components of each place, as few as tell it from the others."""
    components = [[part for part in place.split("/") if part] or ["/"] for place in places]
    names = []
    for own in components:
        shared = [n for n in range(1, len(own)) if sum(other[-n:] == own[-n:] for other in components) > 1]
        names.append("/".join(own[-len(shared) - 1 :]))
    return names
