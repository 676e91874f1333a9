"""The exact expert labels and the description of a ray-cast scene, from a trace of its rays.

The pixel values of each map have the meaning that store/label_maps.py gives.
"""

import numpy as np

from prismer.dataloading.scenes.captions_and_questions import ATTRIBUTES
from prismer.dataloading.scenes.raycast import GROUND, SKY, Layout, Trace, board_letters, local_points
from prismer.experts import BACKGROUND

SEG_CLASSES = [*ATTRIBUTES["shape"], "sign", "ground", "sky"]
OBJECT_CLASSES = [*ATTRIBUTES["shape"], "sign"]

# distance at which depth labels are clipped; the sky has it too
_FAR = 24.0


def _owners(layout: Layout, part: np.ndarray) -> np.ndarray:
    """The index of the thing at each pixel; GROUND and SKY stay."""
    table = np.array([*(p.owner for p in layout.primitives), SKY, GROUND], np.int16)
    return table[part]


def _depth_map(t: np.ndarray) -> np.ndarray:
    """Inverse distance, near = bright, stretched to 0..255; the sky is _FAR away."""
    inverse = 1 / np.minimum(t, np.float32(_FAR))
    low, high = inverse.min(), inverse.max()
    return ((inverse - low) / (high - low) * 255).astype(np.uint8)


def _edge_map(owner: np.ndarray, t: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Dark lines on white where the thing, the distance or the normal jumps between neighbours."""
    edge = np.zeros(t.shape, np.float32)
    inverse = 1 / np.minimum(t, np.float32(_FAR))
    for ahead, behind in (
        (np.s_[1:, :], np.s_[:-1, :]),
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[1:, 1:], np.s_[:-1, :-1]),
        (np.s_[1:, :-1], np.s_[:-1, 1:]),
    ):
        jump = (owner[ahead] != owner[behind]).astype(np.float32)
        fold = 1 - (normal[:, ahead[0], ahead[1]] * normal[:, behind[0], behind[1]]).sum(0)
        jump = np.maximum(jump, fold > 0.3)
        step = np.abs(inverse[ahead] / inverse[behind] - 1)
        jump = np.maximum(jump, step > 0.15)
        straight = ahead[0] == slice(None) or ahead[1] == slice(None)
        for place in (ahead, behind):
            edge[place] += jump * (1.0 if straight else 0.5)
    return (255 - 255 * np.minimum(edge / 2, 1)).astype(np.uint8)


def bounding_box(mask: np.ndarray) -> list[int] | None:
    """[left, top, right, bottom] of the true pixels, right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def paint_boxes(boxes: list[list[int]], depth: np.ndarray) -> np.ndarray:
    """Box masks in depth order: an inner box lies in front; otherwise the brighter (nearer) box keeps the overlap."""
    areas = np.zeros((len(boxes), *depth.shape), bool)
    for area, (left, top, right, bottom) in zip(areas, boxes, strict=True):
        area[top:bottom, left:right] = True
    masks = areas.copy()
    brightness = [depth[area].mean() for area in areas]
    for i in range(len(boxes)):
        for j in range(i + 1, len(boxes)):
            overlap = areas[i] & areas[j]
            if not overlap.any():
                continue
            if (overlap == areas[i]).all() or (overlap == areas[j]).all():
                front, back = (i, j) if areas[i].sum() < areas[j].sum() else (j, i)
            elif brightness[i] != brightness[j]:
                front, back = (i, j) if brightness[i] > brightness[j] else (j, i)
            else:
                continue
            masks[back] &= ~masks[front]
    painted = np.full(depth.shape, BACKGROUND, np.uint8)
    for index, mask in enumerate(masks):
        painted[mask] = index
    return painted


def _overlap(a: list[int], b: list[int]) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _view_normals(layout: Layout, trace: Trace) -> np.ndarray:
    """Normals (3, n, n) in camera space; the normal of the sky faces the camera."""
    right, up, back = (sum(np.float32(axis[k]) * trace.normal[k] for k in range(3)) for axis in layout.camera.axes)
    return np.stack([right, up, np.where(trace.part == SKY, np.float32(1), back)])


def label_planes(layout: Layout, size: int, trace: Trace) -> tuple[dict[str, np.ndarray], dict, dict, dict]:
    """The six label maps, the tables of instances and words, and their boxes, from one ray per label pixel."""
    owner = _owners(layout, trace.part)
    view = _view_normals(layout, trace)
    shapes = [SEG_CLASSES.index(thing["shape"]) for thing in layout.things]
    # SKY and GROUND index from the end
    classes_of = np.array([*shapes, SEG_CLASSES.index("sky"), SEG_CLASSES.index("ground")], np.uint8)
    normal = ((np.clip(view, -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)
    depth = _depth_map(trace.t)
    boxes, classes = [], []
    for index, thing in enumerate(layout.things):
        box = bounding_box(owner == index)
        if box is not None and all(_overlap(box, kept) <= 0.95 for kept in boxes):
            boxes.append(box)
            classes.append(OBJECT_CLASSES.index(thing["shape"]))
    words = np.full((size, size), BACKGROUND, np.uint8)
    table, word_boxes = {}, []
    rays = layout.camera.rays(size)
    for index, primitive in enumerate(layout.primitives):
        if primitive.word is not None:
            mask, (x, y, z) = local_points(layout, trace, rays, index)
            _, inside = board_letters(primitive, x, y)
            words[mask] = np.where(inside & (z > 0.99), len(table), BACKGROUND)
            word_boxes.append(bounding_box(words == len(table)))
            table[str(len(table))] = primitive.word
    planes = {
        "depth": depth,
        "normal": np.ascontiguousarray(normal.transpose(1, 2, 0)),
        "seg": classes_of[owner],
        "edge": _edge_map(owner, trace.t, view),
        "obj_detection": paint_boxes(boxes, depth),
        "ocr_detection": words,
    }
    found = {"obj_detection": _shares(boxes, size), "ocr_detection": _shares(word_boxes, size)}
    return planes, {str(i): c for i, c in enumerate(classes)}, table, found


def _shares(boxes: list[list[int] | None], size: int) -> dict[str, list[float]]:
    """Boxes as the JSON of a sample stores them, by id; what is labelled exactly has the score 1."""
    return {str(i): [*(round(edge / size, 4) for edge in box), 1.0] for i, box in enumerate(boxes) if box}


def outline(layout: Layout) -> dict:
    """The scene in words and numbers as far as no ray is needed, which is all that captions and questions use."""
    found: dict[str, list[dict]] = {"objects": [], "signs": []}
    for index, thing in enumerate(layout.things):
        centre = next(p.centre for p in layout.primitives if p.owner == index)
        column, row, distance = layout.camera.project(centre[None])[0]
        entry = {
            **thing,
            "position": [round(float(v), 3) for v in centre],
            "screen": [round(float(column), 4), round(float(row), 4)],
            "distance": round(float(distance), 3),
        }
        found["signs" if thing["shape"] == "sign" else "objects"].append(entry)
    return found


def describe(layout: Layout, size: int, trace: Trace) -> dict:
    """The scene in words and numbers; boxes and pixel counts refer to the image, of 2 x 2 rays per pixel."""
    owner = _owners(layout, trace.part)
    scene = outline(layout)
    # signs come after objects
    for index, entry in enumerate([*scene["objects"], *scene["signs"]]):
        mask = owner == index
        left, top, right, bottom = bounding_box(mask)
        entry["box"] = [left // 2, top // 2, (right + 1) // 2, (bottom + 1) // 2]
        entry["pixels"] = round(int(mask.sum()) / 4)
    return scene
