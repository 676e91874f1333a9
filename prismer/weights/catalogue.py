"""The released checkpoints of Prismer by name: what each is, how large it is, and where the hub has it.

They are folders of one repository, and each folder holds one file of weights.
"""

from dataclasses import dataclass

HUB_REPOSITORY = "shikunl/prismer"
# as a model card spells it
PUBLISHED_LICENCE = "cc-by-nc-sa-4.0"


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A released checkpoint.

    Attributes:
        name: of its folder in the repository.
        task: what it was trained for.
        preset: the architecture; its RGB side differs.
        image_size: RGB side of its positional table, px.
        parameters: at that size, the tied matrix counted once.
        gigabytes: expected size of the download.
    """

    name: str
    task: str
    preset: str
    image_size: int
    parameters: int
    gigabytes: float

    @property
    def source(self) -> str:
        """The model as owner/name/folder of the hub."""
        return f"{HUB_REPOSITORY}/{self.name}"


# prefix of a name -> task, RGB side
_TASKS = {
    "pretrain": ("captions, zero-shot", 224),
    "caption": ("captions, COCO", 480),
    "vqa": ("questions, VQAv2", 480),
}
# kind and size -> preset, parameters at 224 px, parameters that a 480 px table adds, gigabytes
_SIZES = {
    ("prismer", "base"): ("base", 327_468_729, 704 * 768, 1.31),
    ("prismer", "large"): ("large", 967_146_713, 900 * 1024, 3.87),
    ("prismerz", "base"): ("base-z", 274_335_321, 704 * 768, 1.10),
    ("prismerz", "large"): ("large-z", 872_856_665, 900 * 1024, 3.49),
}


def _published() -> dict[str, PublishedModel]:
    found = {}
    for prefix, (task, side) in _TASKS.items():
        for (kind, size), (preset, parameters, more, gigabytes) in _SIZES.items():
            name = f"{prefix}_{kind}_{size}"
            found[name] = PublishedModel(
                name=name,
                task=task,
                preset=preset,
                image_size=side,
                parameters=parameters + (more if side == 480 else 0),
                gigabytes=gigabytes,
            )
    return found


PUBLISHED_MODELS = _published()
