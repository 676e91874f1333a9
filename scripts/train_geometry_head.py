"""Train the head that makes depth and normals from the features of the frozen ViT-S, on rendered scenes.

    prismer experts fetch vit-s-depth                             # the trunk, once
    python scripts/train_geometry_head.py render                  # scenes into runs/geometry/
    python scripts/train_geometry_head.py features                # the trunk's features of the scenes
    python scripts/train_geometry_head.py train                   # -> prismer/assets/geometry-head/
    python scripts/train_geometry_head.py check --photo motorcycle_left.png --disparity motorcycle_disp.npz

Normals are in camera axes (x right, y up, z towards the camera), as in the maps of the embedded dataset. Photographs
with measured disparity for `check` are in the wheel of scikit-image (skimage/data/motorcycle_*) and in Debian's package
opencv-doc (aloeL.jpg, aloeGT.png).
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from geometry_scenes import TARGET, render_scene
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from prismer.dataloading.experts.vit_trunk import (
    HEAD,
    HEAD_LAYERS,
    HEAD_SIDE,
    HEAD_WEIGHTS,
    NAME,
    GeometryHead,
    Trunk,
    trunk_folder,
)
from prismer.files import replacing, write_json

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "geometry"
RECIPE = "recipe.json"
# the number of scenes, the last ones, on which the head is evaluated
HELD_OUT = 100


def _array(name: str, shape: tuple, dtype) -> np.ndarray:
    """An array in a temporary file; `_finish` gives it its name."""
    WORK.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(WORK / f"{name}.partial", "w+", dtype=dtype, shape=shape)


def _finish(name: str, array: np.ndarray) -> None:
    array.flush()
    os.replace(WORK / f"{name}.partial", WORK / f"{name}.npy")


def _rendered(name: str) -> np.ndarray:
    path = WORK / f"{name}.npy"
    if not path.is_file():
        raise SystemExit(f"{path} is not there; run the stages render and features first")
    return np.load(path, mmap_mode="r")


def render_all(images: int, workers: int) -> None:
    """Render scenes 0 .. images - 1; the last HELD_OUT are held out."""
    made = {
        "rgb": _array("rgb", (images, HEAD_SIDE, HEAD_SIDE, 3), np.uint8),
        "inverse": _array("inverse", (images, TARGET, TARGET), np.float16),
        "normal": _array("normal", (images, 3, TARGET, TARGET), np.int8),
    }
    with ProcessPoolExecutor(workers) as pool:
        scenes = pool.map(render_scene, range(images), chunksize=8)
        for i, scene in enumerate(tqdm(scenes, total=images, desc="render", mininterval=5)):
            for array, value in zip(made.values(), scene, strict=True):
                array[i] = value
    for name, array in made.items():
        _finish(name, array)


def compute_features() -> None:
    """Run the frozen trunk once over all images."""
    rgb = _rendered("rgb")
    trunk = Trunk.load(trunk_folder(), HEAD_LAYERS)
    grid = HEAD_SIDE // trunk.patch
    array = _array("features", (len(rgb), len(HEAD_LAYERS), trunk.width, grid, grid), np.float16)
    for start in tqdm(range(0, len(rgb), 8), desc="features", unit="batch", mininterval=5):
        pixels = torch.from_numpy(rgb[start : start + 8]).permute(0, 3, 1, 2).contiguous()
        array[start : start + 8] = torch.stack(trunk.features(pixels), dim=1).numpy()
    _finish("features", array)


def _standardised(inverse: Tensor) -> Tensor:
    """Subtract from each map (B, h, w) its median, and divide by the mean distance from the median."""
    middle = inverse.flatten(1).median(1).values[:, None, None]
    return (inverse - middle) / (inverse - middle).abs().mean((1, 2), keepdim=True).clamp_min(1e-4)


def losses(depth: Tensor, normal: Tensor, inverse: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The losses of inverse depth up to scale and shift, of its gradients at four scales, and of normals.

    Args:
        depth: (B, 1, h, w) from the head, near is large.
        normal: (B, 3, h, w) unit vectors from the head.
        inverse: (B, h, w) true inverse distance.
        target: (B, 3, h, w) true normals.
    """
    error = _standardised(depth[:, 0]) - _standardised(inverse)
    edges = 0
    for step in (1, 2, 4, 8):
        part = error[:, ::step, ::step]
        edges = edges + (part[:, 1:] - part[:, :-1]).abs().mean() + (part[:, :, 1:] - part[:, :, :-1]).abs().mean()
    return {
        "depth": error.abs().clamp_max(3).mean(),
        "edges": 0.25 * edges,
        "normal": 1 - (normal * F.normalize(target, dim=1)).sum(1).mean(),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The rank correlation of two flat arrays; equal values have their mean rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def _evaluate(head: GeometryHead, batches: Iterable[tuple[list[Tensor], Tensor, Tensor]]) -> dict[str, float]:
    """Held-out scores: the rank correlation of depth in a scene, that of the row index, and angles of normals."""
    ours, rows, angles = [], [], []
    row = np.repeat(np.arange(TARGET), TARGET)
    head.eval()
    with torch.no_grad():
        for features, inverse, target in batches:
            depth, normal = head(features)
            cosine = (normal * F.normalize(target, dim=1)).sum(1).clamp(-1, 1)
            angles.append(torch.rad2deg(torch.acos(cosine)).flatten())
            for found, true in zip(depth[:, 0].numpy(), inverse.numpy(), strict=True):
                ours.append(spearman(found.ravel(), true.ravel()))
                rows.append(spearman(row, true.ravel()))
    head.train()
    angle = torch.cat(angles)
    return {
        "spearman": round(float(np.mean(ours)), 4),
        "spearman_of_the_row": round(float(np.mean(rows)), 4),
        "normal_median_degrees": round(angle.median().item(), 2),
        "normal_within_30_degrees": round((angle < 30).float().mean().item(), 4),
    }


def train(epochs: int, batch: int, peak: float, out: Path) -> None:
    """Train the head with AdamW and a cosine schedule with warm-up, and write it with its recipe."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    features, inverses, normals = (_rendered(name) for name in ("features", "inverse", "normal"))
    known = len(features) - HELD_OUT
    if known < batch:
        raise SystemExit(f"there are {len(features)} scenes, expected at least {HELD_OUT + batch}; render more")

    def load(rows: np.ndarray) -> tuple[list[Tensor], Tensor, Tensor]:
        maps = torch.from_numpy(features[rows].astype(np.float32))
        target = torch.from_numpy(normals[rows].astype(np.float32))
        return list(maps.unbind(1)), torch.from_numpy(inverses[rows].astype(np.float32)), target

    def evaluate() -> dict[str, float]:
        return _evaluate(
            head, (load(np.arange(i, min(i + 10, len(features)))) for i in range(known, len(features), 10))
        )

    head = GeometryHead(features.shape[2])
    optimiser = torch.optim.AdamW(head.parameters(), lr=peak, weight_decay=0.02)
    steps, began = epochs * (known // batch), time.time()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps, pct_start=0.05)
    bar = tqdm(total=steps, desc="train", mininterval=5)
    for epoch in range(epochs):
        order = rng.permutation(known)
        for start in range(0, known - batch + 1, batch):
            maps, inverse, target = load(np.sort(order[start : start + batch]))
            with torch.autocast("cpu", torch.bfloat16):
                depth, normal = head(maps)
            parts = losses(depth, normal, inverse, target)
            optimiser.zero_grad(set_to_none=True)
            sum(parts.values()).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            bar.update()
        scores = evaluate()
        last = {f"{name}_loss": round(value.item(), 4) for name, value in parts.items()}
        bar.write(json.dumps({"epoch": epoch + 1} | scores | last))
    bar.close()
    _write(head, out, scores, scenes=known, epochs=epochs, batch=batch, peak=peak, seconds=round(time.time() - began))


def _write(head: GeometryHead, out: Path, scores: dict, **training: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().to(torch.float32).contiguous() for key, value in head.state_dict().items()}
    with replacing(out / HEAD_WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
        os.chmod(partial, 0o644)
    recipe = {
        "script": "scripts/train_geometry_head.py",
        "trunk": NAME,
        "layers": HEAD_LAYERS,
        "side": HEAD_SIDE,
        "parameters": sum(value.numel() for value in tensors.values()),
        "sha256": hashlib.sha256((out / HEAD_WEIGHTS).read_bytes()).hexdigest(),
        "training": training | {"seed": 0},
        "held_out_scenes": {"count": HELD_OUT} | scores,
    }
    write_json(out / RECIPE, recipe)
    print(json.dumps(recipe, indent=2))


def check(photo: Path, disparity: Path, out: Path) -> None:
    """Print the rank correlation of a photograph's depth with its measured disparity, and add it to the recipe.

    Args:
        photo: an image file.
        disparity: an .npz file with one array, not finite where unknown; or a grey image, 0 where unknown.
        out: folder of the head.
    """
    trunk = Trunk.load(trunk_folder(), HEAD_LAYERS)
    head = GeometryHead(trunk.width)
    head.load_state_dict(load_file(out / HEAD_WEIGHTS))
    image = Image.open(photo).convert("RGB").resize((HEAD_SIDE, HEAD_SIDE), Image.BILINEAR, reducing_gap=None)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        depth, _ = head.eval()(trunk.features(pixels))
    if disparity.suffix == ".npz":
        true = next(iter(np.load(disparity).values())).astype(np.float32)
    else:
        true = np.asarray(Image.open(disparity).convert("L"), np.float32)
    known = np.isfinite(true) & (true > 0)
    found = F.interpolate(depth, true.shape, mode="bilinear", align_corners=False)[0, 0].numpy()
    row = np.repeat(np.arange(true.shape[0])[:, None], true.shape[1], axis=1)
    scores = {
        "spearman": round(spearman(found[known], true[known]), 4),
        "spearman_of_the_row": round(spearman(row[known], true[known]), 4),
    }
    print(json.dumps({photo.name: scores}))
    recipe = json.loads((out / RECIPE).read_text())
    recipe.setdefault("photographs", {})[photo.name] = scores
    write_json(out / RECIPE, recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("render", "features", "train", "check"))
    parser.add_argument("--images", type=int, default=2000, help="scenes to render (default %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="rendering processes")
    parser.add_argument("--epochs", type=int, default=12, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="default %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "prismer" / "assets" / HEAD, help="folder of the head")
    parser.add_argument("--photo", type=Path, help="check: a photograph")
    parser.add_argument("--disparity", type=Path, help="check: its disparity")
    args = parser.parse_args()
    if args.stage == "render":
        render_all(args.images, args.workers)
    elif args.stage == "features":
        compute_features()
    elif args.stage == "train":
        train(args.epochs, args.batch, args.lr, args.out)
    elif args.photo is None or args.disparity is None:
        parser.error("check needs --photo and --disparity")
    else:
        check(args.photo, args.disparity, args.out)


if __name__ == "__main__":
    main()
