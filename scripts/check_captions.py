"""How far captions say what the experts found, and nothing else: two shares over the images of a dataset.

    prismer label photos --out data/photos
    prismer caption data/photos --out captions.jsonl
    python scripts/check_captions.py data/photos captions.jsonl

The first share is that of the kinds of objects, detected with confidence, that the caption names in the singular or the
plural. The second is that of the caption's content words that come from nowhere: neither from a detected object or
word, nor from the colours, sizes, materials, counts and places that scenes teach.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prismer.dataloading.feed.detections import clean_name
from prismer.dataloading.scenes.captions_and_questions import ATTRIBUTES
from prismer.dataloading.scenes.names import plural_of
from prismer.dataloading.store.shards import ShardDataset
from prismer.errors import InputError

CONFIDENT = 0.5
# words without content in the captions of scenes
FUNCTION_WORDS = set("a an and the of on in to at with that is are says saying just namely there".split())
NUMBERS = set("no one two three four five six seven eight nine ten".split())
PLACES = set("left right front behind ground standing stands".split())
# what stands for any object or word
GENERIC = set("object objects sign signs word words".split())
TAUGHT = NUMBERS | PLACES | {value for key in ("size", "material", "colour") for value in ATTRIBUTES[key]}


def found_by_experts(
    meta: dict, classes: dict[str, list[str]], least_score: float = 0.0
) -> tuple[list[str], list[str]]:
    """The kinds of the objects, each once, and the words that the experts found, in lower case.

    Args:
        meta: the JSON of a sample.
        classes: the class tables of its dataset.
        least_score: of the objects; one without a score counts as certain.
    """
    boxes = meta.get("boxes", {}).get("obj_detection", {})
    kinds = []
    for i, index in meta.get("instances", {}).items():
        score = boxes[i][4] if len(boxes.get(i, ())) > 4 else 1.0
        if score >= least_score:
            kinds.append(clean_name(classes["obj_detection"][index]))
    words = [clean_name(word, is_word=True) for word in meta.get("words", {}).values()]
    return list(dict.fromkeys(kinds)), list(dict.fromkeys(words))


def names(caption: str, kind: str) -> bool:
    """Whether a caption names a kind."""
    text = f" {' '.join(split_words(caption))} "
    return any(f" {form} " in text for form in (kind, plural_of(kind)))


def foreign_words(caption: str, kinds: Sequence[str], words: Sequence[str]) -> tuple[list[str], int]:
    """The content words of a caption that come from nowhere, and how many content words there are.

    Args:
        caption: as the model wrote it.
        kinds, words: everything that the experts found, with whatever confidence.
    """
    known = {part for kind in kinds for form in (kind, plural_of(kind)) for part in split_words(form)}
    known |= {part for word in words for part in split_words(word)} | TAUGHT
    if kinds or words:
        known |= GENERIC
    content = [word for word in split_words(caption) if word not in FUNCTION_WORDS]
    return [word for word in content if word not in known], len(content)


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, without the marks around them."""
    return [word for part in text.lower().split() if (word := part.strip(".,;:!?\"'()"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", help="the dataset that `prismer label` wrote")
    parser.add_argument("captions", type=Path, help="captions.jsonl of `prismer caption` on this dataset")
    args = parser.parse_args()
    dataset = ShardDataset(args.dataset)
    rows = [json.loads(line) for line in args.captions.read_text(encoding="utf-8").splitlines()]
    if len(rows) != len(dataset):
        raise InputError(f"{args.captions} has {len(rows)} lines for {len(dataset)} images; caption the whole dataset")
    named = detected = content = 0
    foreign: Counter[str] = Counter()
    for i, row in enumerate(rows):
        meta = dataset.meta(i)
        certain, _ = found_by_experts(meta, dataset.classes, CONFIDENT)
        detected += len(certain)
        missing = [kind for kind in certain if not names(row.get("caption", ""), kind)]
        named += len(certain) - len(missing)
        odd, total = foreign_words(row.get("caption", ""), *found_by_experts(meta, dataset.classes))
        foreign.update(odd)
        content += total
        print(f"{row['image']}: {row.get('caption', '(no caption)')}")
        if missing or odd:
            print(f"    not named: {', '.join(missing) or '-'}; from nowhere: {', '.join(odd) or '-'}")
    share = named / detected if detected else float("nan")
    print(f"{named} of {detected} kinds with a confidence of {CONFIDENT} or more are named: {share:.1%}")
    share = foreign.total() / content if content else float("nan")
    print(
        f"{foreign.total()} of {content} content words come from nowhere: {share:.1%} {dict(foreign.most_common(10))}"
    )


if __name__ == "__main__":
    main()
