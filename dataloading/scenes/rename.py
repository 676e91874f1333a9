"""Other names for the shapes of a rendered scene, the same in its classes, captions, questions and answers.

A model that trains on renamed scenes cannot learn what a sphere is called: it is a dog in one image and a kettle in the
next. What it can learn is to say the name that its experts give. The image and its label maps stay as they are. The
boxes become less exact and less certain, since those of a detector on a photo are no better.
"""

from collections.abc import Callable, Sequence

import numpy as np

from prismer.dataloading.scenes.captions_and_questions import ATTRIBUTES, write_captions, write_questions
from prismer.errors import InputError

# the JSON of a sample, the class tables of its dataset and a generator -> the JSON and class tables of this sample
Rename = Callable[[dict, dict[str, list[str]], np.random.Generator], tuple[dict, dict[str, list[str]]]]

_SHAPES = ATTRIBUTES["shape"]
# the least confidence of a box, and how much wider boxes are than their objects in an image whose boxes are loose
_LEAST_SCORE = 0.4
_LOOSE_SHARE, _WIDEST = 0.3, 3.0


def has_shapes(classes: dict[str, list[str]]) -> bool:
    """Whether a dataset with these class tables holds rendered scenes."""
    return set(_SHAPES) <= set(classes.get("obj_detection", ()))


def rename_shapes(
    names: Sequence[str], meta: dict, classes: dict[str, list[str]], rng: np.random.Generator
) -> tuple[dict, dict[str, list[str]]]:
    """Draw a name for each shape, and write captions and questions with these names.

    Args:
        names: to draw from, see names.py.
        meta: the JSON of a sample. Without a scene, the sample stays as it is.
        classes: the class tables of its dataset.
        rng: draws names and texts.

    Returns:
        The JSON, whose "scene" also has "kinds", the names in the order of the shapes; and the class tables, in which
        the names stand in the places of the shapes, so that the ids in maps and tables stay valid.

    Raises:
        ValueError: if the scene is damaged.
    """
    scene = meta.get("scene")
    if scene is None:
        return meta, classes
    kinds = _draw(names, rng)
    new = dict(zip(_SHAPES, kinds, strict=True))
    try:
        objects = [{**thing, "shape": new[thing["shape"]]} for thing in scene["objects"]]
        scene = {**scene, "objects": objects, "kinds": kinds}
        texts = {"captions": write_captions(scene, rng), "questions": write_questions(scene, rng)}
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"the scene in its JSON is damaged ({error!r}); render the dataset again") from None
    renamed = {table: [new.get(name, name) for name in own] for table, own in classes.items()}
    boxes = {expert: _loosen(own, rng) for expert, own in meta["boxes"].items()} if "boxes" in meta else {}
    return {**meta, "scene": scene, **texts, **({"boxes": boxes} if boxes else {})}, renamed


def _loosen(boxes: dict[str, list[float]], rng: np.random.Generator) -> dict[str, list[float]]:
    """The boxes of one expert with drawn scores and, in some images, wider by a common factor."""
    wider = rng.uniform(1.0, _WIDEST) if rng.uniform() < _LOOSE_SHARE else 1.0
    loose = {}
    for i, (left, top, right, bottom, *_) in boxes.items():
        across, down = (right - left) * (wider - 1) / 2, (bottom - top) * (wider - 1) / 2
        edges = left - across, top - down, right + across, bottom + down
        score = rng.uniform(_LEAST_SCORE, 1.0)
        loose[i] = [*(round(float(min(max(edge, 0.0), 1.0)), 4) for edge in edges), round(float(score), 3)]
    return loose


def _draw(names: Sequence[str], rng: np.random.Generator) -> list[str]:
    """As many names as there are shapes, of which no two share a word: not `tree` and `apple tree`."""
    while True:
        kinds = [names[i] for i in rng.choice(len(names), len(_SHAPES), replace=False)]
        words = [word for kind in kinds for word in kind.split()]
        if len(set(words)) == len(words):
            return kinds
