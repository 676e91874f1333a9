"""Other names for the shapes of a rendered scene, the same in its classes, captions, questions and answers.

A model that trains on renamed scenes cannot learn what a sphere is called: it is a dog in one image and a kettle in the
next. What it can learn is to say the name that its experts give. The image and its label maps stay as they are.
"""

from collections.abc import Callable, Sequence

import numpy as np

from prismer.dataloading.scenes.captions_and_questions import ATTRIBUTES, write_captions, write_questions
from prismer.errors import InputError

# the JSON of a sample, the class tables of its dataset and a generator -> the JSON and class tables of this sample
Rename = Callable[[dict, dict[str, list[str]], np.random.Generator], tuple[dict, dict[str, list[str]]]]

_SHAPES = ATTRIBUTES["shape"]


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
    return {**meta, "scene": scene, **texts}, renamed


def _draw(names: Sequence[str], rng: np.random.Generator) -> list[str]:
    """As many names as there are shapes, of which no two share a word: not `tree` and `apple tree`."""
    while True:
        kinds = [names[i] for i in rng.choice(len(names), len(_SHAPES), replace=False)]
        words = [word for kind in kinds for word in kind.split()]
        if len(set(words)) == len(words):
            return kinds
