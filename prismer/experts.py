"""The catalogue of expert labels: what each map is, how many channels its stem reads (spec: Prismer, arXiv:2303.02506).

Low-level labels (depth, surface normals, edges) are uint8 intensities. High-level labels (segmentation, objects,
words) are uint8 ids per pixel that a table turns into 64 numbers per pixel on the device.
"""

from dataclasses import dataclass

BACKGROUND = 255
"""The id of a high-level label map that means "nothing here"."""

FEATURE_WIDTH = 64
"""Numbers per class or word in the semantics tables (CLIP text features after PCA)."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One kind of expert label.

    Attributes:
        planes: uint8 planes of the stored map: 1, or 3 for surface normals.
        channels: channels that the stem reads: `planes`, or FEATURE_WIDTH for ids.
        is_ids: whether the stored values are ids (high-level) and not intensities.
        fill: value of a pixel that the expert says nothing about (outside a rotated image, absent expert).
    """

    planes: int
    channels: int
    is_ids: bool
    fill: int


_LOW = dict(is_ids=False, fill=0)
_HIGH = dict(planes=1, channels=FEATURE_WIDTH, is_ids=True, fill=BACKGROUND)

EXPERTS: dict[str, Expert] = {
    "depth": Expert(planes=1, channels=1, **_LOW),
    "normal": Expert(planes=3, channels=3, **_LOW),
    "seg": Expert(**_HIGH),
    "edge": Expert(planes=1, channels=1, **_LOW),
    "obj_detection": Expert(**_HIGH),
    "ocr_detection": Expert(**_HIGH),
}
"""In the order in which their tokens enter the resampler (which is invariant to it)."""
