"""Captions and question/answer pairs that are true of a described scene, and whose answers cannot be guessed.

A scene is the `meta["scene"]` of `dataset.py`: "objects" with shape, colour, size, material, `screen` (column and row
of the centre as fractions of the image) and `distance` from the camera, and "signs" with a word. Signs are not objects:
they are neither counted nor used in relations. A relation is used only where it is beyond dispute, and the attributes
that name an object fit no other object.

A scene with "kinds" is a renamed one (rename.py): "kinds" are the names of the four shapes, in the order of ATTRIBUTES,
and the "shape" of each object is one of them. Questions about its shapes ask what an object is.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from prismer.dataloading.scenes.names import plural_of, sign_words, with_article

# of an object, in the order of English adjectives
ATTRIBUTES = {
    "size": ["small", "large"],
    "material": ["matte", "shiny"],
    "colour": ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "white"],
    "shape": ["sphere", "cube", "cylinder", "cone"],
}

_NUMBERS = ["no", "one", "two", "three", "four", "five"]
# least difference at which left/right (in image widths) and front/behind (in world units) are beyond dispute
_SIDEWAYS = 0.09
_DEEP = 0.9
_OPPOSITE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
_RELATIONS = list(_OPPOSITE)
_NUM_CAPTIONS = 5
# a tokenizer spells these words in one token each, and a caption has at most 30 tokens with its commas and its ends
_MAX_WORDS = 24
# the room that a name, or a word on a sign, takes in a renamed scene beyond its own words: a tokenizer spells it; and
# the room that a caption has there
_EXTRA_ROOM = 3
_MOST_ROOM = 30

# combinations of attributes that may name an object, short names first
_DESCRIPTIONS = [
    tuple(keys.split())
    for keys in (
        "shape, colour shape, size shape, material shape, size colour shape, material colour shape, "
        "size material shape, size material colour shape, "
        "colour, size, material, size colour, material colour, size material, size material colour"
    ).split(", ")
]


def relation_holds(relation: str, a: dict, b: dict) -> bool | None:
    """Whether object `a` is e.g. "left of" object `b`; None where the difference is too small to tell."""
    if relation in ("left of", "right of"):
        gap, enough = b["screen"][0] - a["screen"][0], _SIDEWAYS
    else:
        gap, enough = b["distance"] - a["distance"], _DEEP
    if abs(gap) < enough:
        return None
    return (gap > 0) == (relation in ("left of", "in front of"))


def write_captions(scene: dict, rng: np.random.Generator) -> list[str]:
    """Up to five different noun phrases of at most 24 words, in lower case; the first names every object.

    Args:
        scene: `meta["scene"]`.
        rng: draws the wording.
    """
    writers = [_caption_list, _caption_count, _caption_relation, _caption_relation, _caption_sign]
    if "kinds" in scene:
        # mostly everything from left to right: a model that says what it is told to should say all of it
        writers = [_caption_row, _caption_row, _caption_row, _caption_row, _caption_relation]
    captions: list[str] = []
    for writer in [*writers, *[writers[i] for i in rng.permutation(len(writers))] * 3]:
        caption = writer(scene, rng)
        if caption not in captions and _room(scene, caption) <= _limit(scene):
            captions.append(caption)
        if len(captions) == _NUM_CAPTIONS:
            break
    return captions


def write_questions(scene: dict, rng: np.random.Generator) -> list[dict]:
    """About a dozen different questions: {"question", "answers": [{"answer", "weight": 1.0}], "kind"}, in lower case.

    Kinds are "yes/no", "count", "colour", "shape" (in a renamed scene "name"), "relation" and "read" (of a held-out
    word, see names.py, "read unseen"). Each kind first draws the answer and then a question with that answer, so that
    the kind does not give the answer away.

    Args:
        scene: `meta["scene"]`.
        rng: draws questions, answers and wording.
    """
    plan = [
        (_ask_existence, 3),
        (_ask_count, 3),
        (_ask_attribute("colour"), 2),
        (_ask_attribute("shape"), 2),
        (_ask_relation, 2),
        (_ask_neighbour, 1),
        (_ask_reading, 2),
    ]
    questions: dict[str, dict] = {}
    for ask, number in plan:
        missing = number
        for _ in range(4 * number):
            asked = ask(scene, rng) if missing else None
            if asked and asked[0] not in questions:
                subject, question, answer, kind = asked
                questions[subject] = {
                    "question": question,
                    "answers": [{"answer": answer, "weight": 1.0}],
                    "kind": kind,
                }
                missing -= 1
    return list(questions.values())


# subject (no two questions share one), question, answer, kind
_Asked = tuple[str, str, str, str]


def _pick(rng: np.random.Generator, items: list) -> Any:
    return items[int(rng.integers(len(items)))]


def _matches(thing: dict, wanted: dict) -> bool:
    # a loop, since renamed scenes are described anew in every epoch: a generator takes twice as long
    for key, value in wanted.items():
        if thing[key] != value:
            return False
    return True


def _count(scene: dict, wanted: dict) -> int:
    return len([None for thing in scene["objects"] if _matches(thing, wanted)])


def _noun(wanted: dict, many: bool = False) -> str:
    """E.g. `small shiny red cube`, or `red objects` where no shape is given."""
    words = [wanted[key] for key in ATTRIBUTES if key in wanted and key != "shape"]
    kind = wanted.get("shape", "object")
    return " ".join([*words, plural_of(kind) if many else kind])


def _values(scene: dict, key: str) -> list[str]:
    """The values of an attribute; the shapes of a renamed scene have names."""
    return scene["kinds"] if key == "shape" and "kinds" in scene else ATTRIBUTES[key]


def _select(thing: dict, keys: tuple[str, ...]) -> dict:
    return {key: thing[key] for key in keys}


def _definite(scene: dict, thing: dict, rng: np.random.Generator, without: tuple[str, ...] = ()) -> str | None:
    """E.g. `the red cube`: attributes that only `thing` has, without those in `without`; None if there are none."""
    fitting = [
        keys for keys in _DESCRIPTIONS if not set(keys) & set(without) and _count(scene, _select(thing, keys)) == 1
    ]
    if "shape" not in without and any("shape" in keys for keys in fitting):
        fitting = [keys for keys in fitting if "shape" in keys]
    # mostly a short name, sometimes a longer one than needed
    fitting = fitting[: 2 + int(rng.integers(3))]
    return "the " + _noun(_select(thing, _pick(rng, fitting))) if fitting else None


def _indefinite(thing: dict, rng: np.random.Generator) -> str:
    """E.g. `a small red cube`; the colour and the shape are always named."""
    named = [keys for keys in _DESCRIPTIONS if "colour" in keys and "shape" in keys]
    return with_article(_noun(_select(thing, _pick(rng, named))))


def _room(scene: dict, text: str) -> int:
    """The room that a text takes, in words."""
    room = len(text.split())
    if "kinds" in scene:
        spelled = [*scene["kinds"], *(sign["word"] for sign in scene["signs"])]
        room += _EXTRA_ROOM * sum(text.count(word) for word in spelled)
    return room


def _limit(scene: dict) -> int:
    """The room that a caption has."""
    return _MOST_ROOM if "kinds" in scene else _MAX_WORDS


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sign_phrase(sign: dict, rng: np.random.Generator) -> str:
    phrases = ["a sign that says", "a sign saying", "a sign with the word"]
    return f"{_pick(rng, phrases)} {sign['word']}"


def _groups(scene: dict, keys: tuple[str, ...], rng: np.random.Generator) -> list[str]:
    """E.g. `two red cubes`, `a blue sphere`: the objects grouped by the attributes `keys`, in random order.

    In a renamed scene from left to right, for there is no other end to a list of many names.
    """
    objects = [scene["objects"][i] for i in rng.permutation(len(scene["objects"]))]
    if "kinds" in scene:
        objects.sort(key=lambda thing: thing["screen"][0])
    groups: dict[tuple, int] = {}
    for thing in objects:
        values = tuple(thing[key] for key in keys)
        groups[values] = groups.get(values, 0) + 1
    phrases = []
    for values, number in groups.items():
        noun = _noun(dict(zip(keys, values, strict=True)), many=number > 1)
        phrases.append(with_article(noun) if number == 1 else f"{_NUMBERS[number]} {noun}")
    return phrases


def _listing(scene: dict, rng: np.random.Generator, room: int) -> list[str]:
    """The objects in the room of `room` words, with as many attributes as fit."""
    rich = [("size", "material", "colour", "shape"), ("size", "colour", "shape"), ("material", "colour", "shape")]
    rich = [rich[i] for i in rng.permutation(3)]
    for keys in [*rich, ("colour", "shape"), ("shape",)]:
        phrases = _groups(scene, keys, rng)
        if _room(scene, _join(phrases)) <= room:
            break
    return phrases


def _caption_list(scene: dict, rng: np.random.Generator) -> str:
    """E.g. `a red cube, a small blue sphere and a sign that says open`."""
    signs = [_sign_phrase(sign, rng) for sign in scene["signs"]]
    room = _limit(scene) - sum(_room(scene, sign) + 1 for sign in signs)
    return _join(_listing(scene, rng, room) + signs)


def _caption_row(scene: dict, rng: np.random.Generator) -> str:
    """E.g. `two dogs, a kettle and a sign that says open`, from left to right; with colours if there is room."""
    signs = [_sign_phrase(sign, rng) for sign in sorted(scene["signs"], key=lambda sign: sign["screen"][0])]
    room = _limit(scene) - sum(_room(scene, sign) + 1 for sign in signs)
    for keys in ([("shape",)], [("colour", "shape"), ("shape",)])[int(rng.integers(2))]:
        listing = _groups(scene, keys, rng)
        if _room(scene, _join(listing)) <= room:
            break
    return _join(listing + signs)


def _caption_count(scene: dict, rng: np.random.Generator) -> str:
    """E.g. `three objects on the ground, namely a red cube ...`, `four objects and a sign that says open`."""
    number = len(scene["objects"])
    head = f"{_NUMBERS[number]} object{'s' * (number > 1)}"
    sign = _sign_phrase(scene["signs"][0], rng) if len(scene["signs"]) == 1 else None
    kind = int(rng.integers(4))
    if sign and kind == 0:
        return f"{head} and {sign}"
    if sign and kind == 1:
        return f"{sign} and {head} on the ground"
    if kind == 2:
        colours = {thing["colour"] for thing in scene["objects"]}
        if len(colours) == 1 and number > 1:
            return f"{_NUMBERS[number]} {colours.pop()} objects on the ground"
    listing = _join(_listing(scene, rng, _limit(scene) - 6))
    # no colon: cleaning removes it from captions
    return f"{head} on the ground, namely {listing}" if number > 1 else f"just one object, {listing}"


def _true_relations(scene: dict) -> Iterator[tuple[dict, str, dict]]:
    for a in scene["objects"]:
        for b in scene["objects"]:
            for relation in _RELATIONS:
                if a is not b and relation_holds(relation, a, b):
                    yield a, relation, b


def _caption_relation(scene: dict, rng: np.random.Generator) -> str:
    """E.g. `a large red sphere left of a small blue cube`."""
    relations = list(_true_relations(scene))
    if not relations:
        where = _pick(rng, ["on the ground", "standing on the ground", "that stands on the ground"])
        return f"{_indefinite(_pick(rng, scene['objects']), rng)} {where}"
    a, relation, b = _pick(rng, relations)
    wording = {"left of": "to the left of", "right of": "to the right of"}.get(relation, relation)
    return f"{_indefinite(a, rng)} {_pick(rng, [relation, wording])} {_indefinite(b, rng)}"


def _caption_sign(scene: dict, rng: np.random.Generator) -> str:
    """E.g. `a sign that says open behind a red cube`; without a sign, the number of objects of each kind."""
    if not scene["signs"]:
        keys = _pick(rng, [("shape",), ("colour", "shape"), ("size", "shape")])
        return _join(_groups(scene, keys, rng))
    sign = _pick(rng, scene["signs"])
    thing = _pick(rng, scene["objects"])
    if sign["distance"] - thing["distance"] < _DEEP:
        return f"{_indefinite(thing, rng)} and {_sign_phrase(sign, rng)}"
    if rng.integers(2):
        return f"{_sign_phrase(sign, rng)} behind {_indefinite(thing, rng)}"
    return f"{_indefinite(thing, rng)} in front of {_sign_phrase(sign, rng)}"


def _ask_existence(scene: dict, rng: np.random.Generator) -> _Asked | None:
    """Is there a red cube? For a "no", one attribute of an existing object is changed."""
    answer = _pick(rng, ["yes", "no"])
    kinds = [("colour", "shape")] * 4
    kinds += [("size", "shape"), ("material", "shape"), ("size", "colour")]
    kinds += [("size", "colour", "shape"), ("colour",), ("shape",)]
    keys = _pick(rng, kinds)
    wanted = _select(_pick(rng, scene["objects"]), keys)
    if answer == "no":
        key = _pick(rng, list(keys))
        others = [value for value in _values(scene, key) if _count(scene, {**wanted, key: value}) == 0]
        if not others:
            return None
        # hardest if the new attribute belongs to another object
        present = [value for value in others if _count(scene, {key: value})]
        wanted[key] = _pick(rng, present if present and rng.uniform() < 0.6 else others)
    one, many = with_article(_noun(wanted)), _noun(wanted, many=True)
    wording = ["is there {a}", "is there {a} in the picture", "do you see {a}", "can you see {a}", "are there any {b}"]
    return many, _pick(rng, wording).format(a=one, b=many) + "?", answer, "yes/no"


def _ask_count(scene: dict, rng: np.random.Generator) -> _Asked | None:
    """How many red objects are there? The number is drawn first, from those that some question has as its answer."""
    choices: dict[int, list[dict]] = {len(scene["objects"]): [{}]}
    kinds = [("colour",), ("shape",), ("size",), ("material",), ("size", "shape"), ("material", "shape")]
    for keys in kinds:
        for values in itertools.product(*(_values(scene, key) for key in keys)):
            wanted = dict(zip(keys, values, strict=True))
            choices.setdefault(_count(scene, wanted), []).append(wanted)
    number = _pick(rng, sorted(choices))
    noun = _noun(_pick(rng, choices[number]), many=True)
    wording = ["how many {} are there", "how many {} are in the picture", "how many {} do you see"]
    wording += ["what is the number of {}"]
    return f"number of {noun}", _pick(rng, wording).format(noun) + "?", str(number), "count"


def _ask_attribute(attribute: str) -> Callable[[dict, np.random.Generator], _Asked | None]:
    """What colour is the large cone? What shape is the green object? In a renamed scene: what is the green object?"""

    def ask(scene: dict, rng: np.random.Generator) -> _Asked | None:
        thing = _pick(rng, scene["objects"])
        name = _definite(scene, thing, rng, without=(attribute,))
        if len(scene["objects"]) == 1 and rng.integers(2):
            name = "the object"
        if name is None:
            return None
        subject = f"{attribute} of {name}"
        wording = [f"what {attribute} is {name}", f"what is the {subject}"]
        kind = attribute
        if attribute == "shape" and "kinds" in scene:
            wording, kind = [f"what is {name}", f"what kind of object is {name}"], "name"
        return subject, _pick(rng, wording) + "?", thing[attribute], kind

    return ask


def _ask_relation(scene: dict, rng: np.random.Generator) -> _Asked | None:
    """Is the red cube left of the blue sphere?"""
    relations = list(_true_relations(scene))
    if not relations:
        return None
    a, relation, b = _pick(rng, relations)
    answer = _pick(rng, ["yes", "no"])
    if answer == "no":
        relation = _OPPOSITE[relation]
    first, second = _definite(scene, a, rng), _definite(scene, b, rng)
    if first is None or second is None:
        return None
    wording = {"left of": "to the left of", "right of": "to the right of"}.get(relation, relation)
    question = f"is {first} {_pick(rng, [relation, wording])} {second}?"
    return f"{first} {relation} {second}", question, answer, "relation"


def _ask_neighbour(scene: dict, rng: np.random.Generator) -> _Asked | None:
    """What colour is the object left of the cone? Exactly one object must be there, and none too close to tell."""
    anchors = []
    for b in scene["objects"]:
        for relation in _RELATIONS:
            verdicts = [relation_holds(relation, a, b) for a in scene["objects"] if a is not b]
            if verdicts.count(True) == 1 and None not in verdicts:
                anchors.append((relation, b))
    if not anchors:
        return None
    relation, b = _pick(rng, anchors)
    name = _definite(scene, b, rng)
    if name is None:
        return None
    (a,) = (a for a in scene["objects"] if a is not b and relation_holds(relation, a, b))
    attribute = _pick(rng, ["colour", "shape"])
    subject = f"{attribute} of the object {relation} {name}"
    wording = [f"what {attribute} is the object {relation} {name}", f"what is the {subject}"]
    if attribute == "shape" and "kinds" in scene:
        wording = [f"what is {relation} {name}", f"what is the object {relation} {name}"]
    return subject, _pick(rng, wording) + "?", a[attribute], "relation"


def _ask_reading(scene: dict, rng: np.random.Generator) -> _Asked | None:
    """What does the sign say? With two signs, the question says which."""
    signs = scene["signs"]
    if not signs:
        return None
    sign = _pick(rng, signs)
    name = "the sign"
    if len(signs) == 2:
        leftmost = min(signs, key=lambda s: s["screen"][0])
        name = "the sign on the left" if sign is leftmost else "the sign on the right"
    wording = ["what does {} say", "what word is written on {}", "what is written on {}", "what word is on {}"]
    question = _pick(rng, wording).format(name) + "?"
    return question, question, sign["word"], "read unseen" if sign["word"] in sign_words()[1] else "read"
