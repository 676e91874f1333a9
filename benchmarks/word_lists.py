"""Texts of whole jobs: 3,128 answers, many of which begin alike, as those to questions about pictures do, 1,000
classes, and a few questions and captions. Made of word lists, always the same.
"""

import itertools

_COLOURS = (
    "red", "blue", "green", "white", "black", "yellow", "brown", "gray", "orange", "pink", "purple", "silver", "tan",
    "gold",
)  # fmt: skip
_THINGS = (
    "dog", "cat", "horse", "bird", "cow", "sheep", "bear", "elephant", "zebra", "giraffe", "car", "bus", "train",
    "truck", "boat", "plane", "bike", "motorcycle", "skateboard", "surfboard", "snowboard", "kite", "frisbee", "ball",
    "bat", "racket", "helmet", "hat", "shirt", "jacket", "tie", "umbrella", "backpack", "purse", "suitcase", "table",
    "chair", "couch", "bed", "bench", "desk", "lamp", "clock", "vase", "flower", "tree", "plant", "fence", "sign",
    "building", "tower", "bridge", "window", "door", "wall", "floor", "mirror", "toilet", "sink", "oven", "stove",
    "refrigerator", "microwave", "toaster", "laptop", "keyboard", "mouse", "phone", "remote", "camera", "television",
    "book", "newspaper", "box", "bag", "bottle", "cup", "glass", "plate", "bowl", "knife", "fork", "spoon", "banana",
    "apple", "carrot", "sandwich", "pizza", "cake", "donut", "hot dog", "salad", "fire hydrant", "traffic light",
    "stop sign", "parking meter", "teddy bear", "cell phone", "tennis racket", "baseball bat",
)  # fmt: skip
_PLURALS = ("people", "dogs", "cats", "birds", "cows", "cars", "boats", "chairs", "books", "trees", "signs", "windows")
_PLACES = (
    "table", "chair", "bed", "floor", "wall", "counter", "street", "road", "beach", "grass", "water", "snow", "field",
    "tree", "fence", "building", "car", "train", "left", "right", "plate", "shelf", "desk", "couch", "bench",
)  # fmt: skip
_KINDS = (
    "small", "large", "old", "new", "wooden", "metal", "plastic", "glass", "striped", "empty", "open", "broken", "wet",
    "dirty", "toy", "electric", "stuffed", "round",
)  # fmt: skip
_SAYINGS = (
    "yes", "no", "maybe", "not sure", "unknown", "nothing", "nobody", "none", "both", "neither", "can't tell", "man",
    "woman", "boy", "girl", "child", "eating", "sleeping", "standing", "sitting", "walking", "running", "playing",
    "talking on the phone", "playing video games", "playing baseball", "playing tennis", "flying a kite",
    "riding a horse", "riding a bike", "riding a skateboard", "waiting for the bus",
    "because it is raining and the street is wet",
    "morning", "afternoon", "evening", "night", "spring", "summer", "fall", "winter", "sunny", "cloudy", "rainy",
    "kitchen", "bathroom", "bedroom", "living room", "office", "restaurant", "park", "zoo", "airport", "train station",
    "baseball", "tennis", "soccer", "skiing", "surfing", "skateboarding", "frisbee", "wood", "metal", "brick",
)  # fmt: skip


def _made() -> list[str]:
    """Families of answers, one behind the other."""
    return [
        *_SAYINGS,
        *_COLOURS,
        *map(str, range(151)),
        *_THINGS,
        *(f"{a} and {b}" for a, b in itertools.permutations(_COLOURS, 2)),
        *(f"{n} {things}" for things in _PLURALS for n in range(2, 12)),
        *(f"{where} the {place}" for where in ("on", "in", "under", "behind", "next to") for place in _PLACES),
        *(f"{hour}:{minute:02}" for hour in range(1, 13) for minute in range(0, 60, 5)),
        *(f"{colour} {thing}" for thing in _THINGS for colour in _COLOURS),
        *(f"{kind} {thing}" for thing in _THINGS for kind in _KINDS),
    ]


def _first(texts: list[str], count: int) -> list[str]:
    distinct = list(dict.fromkeys(texts))
    assert len(distinct) >= count
    return distinct[:count]


ANSWERS = _first(_made(), 3128)
"""As many as the published list holds."""
CLASSES = _first([*_THINGS, *(f"{kind} {thing}" for kind in _KINDS for thing in _THINGS)], 1000)
QUESTIONS = [
    "What is the man in the red jacket holding in his left hand?",
    "How many people are sitting at the table near the window?",
    "What color is the car that is parked behind the white truck?",
    "Is the dog on the left side of the picture looking at the ball?",
    "Where is the woman with the umbrella going to cross the street?",
]
CAPTIONS = [
    "a man in a red jacket is standing next to a brown horse in a field",
    "two dogs play with a ball on the grass while a child watches them",
    "a white plate with a sandwich and a salad on a wooden table",
    "a group of people wait for a bus on the side of a wet street at night",
    "an old train with a blue engine crosses a bridge over the water",
]
