"""The table of experts: what each label map is, and everything that differs from one expert to another.

Prismer, arXiv:2303.02506, section 3.2. Low-level labels (depth, surface normals, edges) are uint8 intensities.
High-level labels (segmentation, objects, words) are uint8 ids; a table turns each id into 64 features on the device.
"""

from dataclasses import dataclass
from typing import Literal

# the id of a high-level label map that means "nothing here"
BACKGROUND = 255

# features of a class name or word (CLIP text features after PCA)
FEATURE_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One kind of expert label.

    Attributes:
        code: the expert's number in label files (dataloading/store/label_maps.py); never change one or use it again.
        module: the file in dataloading/experts that defines the expert's networks.
        title: what people read above the expert's maps.
        kind: what a stored value is: an intensity; a class index; or the number of an object or a word in its image.
        planes: uint8 planes of a stored map: 1, or 3 for surface normals.
        table: the field of a sample's JSON that says what the ids stand for: the class index of an object, the text of
            a word. None for the other kinds.
        is_smooth: whether label files store the differences between rows, which makes smooth maps smaller.
        colours: the matplotlib colour map in which contact sheets draw intensities.
        folders: folder names in the label layout of Prismer's released code, the preferred one first; () is the
            expert's own name.
    """

    code: int
    module: str
    title: str
    kind: Literal["intensity", "class", "object", "word"] = "intensity"
    planes: int = 1
    table: str | None = None
    is_smooth: bool = False
    colours: str = "gray"
    folders: tuple[str, ...] = ()

    @property
    def is_ids(self) -> bool:
        """Whether the stored values are ids (high-level label) rather than intensities."""
        return self.kind != "intensity"

    @property
    def has_classes(self) -> bool:
        """Whether a dataset has a table of class names for this expert."""
        return self.kind in ("class", "object")

    @property
    def channels(self) -> int:
        """The number of channels that the expert's stem reads."""
        return FEATURE_WIDTH if self.is_ids else self.planes

    @property
    def fill(self) -> int:
        """The value of a pixel about which the expert says nothing: outside a rotated image, or without a map."""
        return BACKGROUND if self.is_ids else 0


# in the order in which their tokens enter the resampler (its output does not depend on the order)
EXPERTS: dict[str, Expert] = {
    "depth": Expert(code=1, module="depth", title="depth (near = bright)", is_smooth=True, colours="magma"),
    "normal": Expert(code=2, module="normal", title="surface normals", planes=3, is_smooth=True),
    "seg": Expert(
        code=3, module="segmentation", title="segmentation", kind="class", folders=("seg_coco", "seg_ade", "seg")
    ),
    "edge": Expert(code=4, module="edge", title="edges"),
    "obj_detection": Expert(code=5, module="objects", title="objects", kind="object", table="instances"),
    "ocr_detection": Expert(code=6, module="words", title="words", kind="word", table="words"),
}

# the experts of the paper and of its released checkpoints: those of a model by default
PAPER_EXPERTS = ("depth", "normal", "seg", "edge", "obj_detection", "ocr_detection")

# the experts whose detections have names, which a decoder can read as text
TEXT_EXPERTS = tuple(name for name, expert in EXPERTS.items() if expert.table)
