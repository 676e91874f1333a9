"""The embedded dataset: ray-cast scenes with exact expert labels, captions and questions, in numpy only."""

import fcntl
import io
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from prismer.dataloading.scenes.captions_and_questions import write_captions, write_questions
from prismer.dataloading.scenes.exact_labels import OBJECT_CLASSES, SEG_CLASSES, describe, label_planes
from prismer.dataloading.scenes.layout import WORDS, sample_layout
from prismer.dataloading.scenes.names import sign_words as many_sign_words
from prismer.dataloading.scenes.raycast import cast, paint_image
from prismer.dataloading.store.shards import Sample, ShardWriter, read_index
from prismer.errors import InputError, shown

_SOURCE = "rendered scenes"
# to be raised with any change of what a seed looks like, so that no old dataset passes for a new one
_VERSION = 2


@dataclass(frozen=True)
class RenderedScene:
    """One image with its labels and texts.

    Attributes:
        rgb: (size, size, 3) uint8.
        planes: expert -> uint8 (label_size, label_size), normals with a last dimension of 3.
        meta: the sample's JSON: captions, questions, instances, words, boxes, size, source, licence, and `scene`, the
            description of every object and sign.
    """

    rgb: np.ndarray
    planes: dict[str, np.ndarray]
    meta: dict


def scene_seed(seed: int, split: str, index: int) -> int:
    """The seed of image `index` of a split; no two splits share seeds."""
    entropy = [seed, int.from_bytes(split.encode(), "little"), index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _check_sizes(size: int, label_size: int) -> None:
    if min(size, label_size) < 32:
        raise InputError(f"image size {size} and label size {label_size} must be at least 32; use 64 or more")


def render_scene(seed: int, size: int = 128, label_size: int = 128, vocabulary: Sequence[str] = WORDS) -> RenderedScene:
    """Render the scene of a seed; the scene and its texts do not depend on the sizes.

    Args:
        seed: any non-negative int; the same seed gives the same bytes.
        size: side of the image, px.
        label_size: side of the label maps, px.
        vocabulary: the words of its signs.

    Raises:
        ValueError: if a size is below 32 (an object could vanish).
    """
    _check_sizes(size, label_size)
    rng = np.random.default_rng(seed)
    layout = sample_layout(rng, vocabulary)
    fine = cast(layout.camera, layout.primitives, 2 * size)
    scene = describe(layout, size, fine)
    coarse = cast(layout.camera, layout.primitives, label_size)
    planes, instances, words, boxes = label_planes(layout, label_size, coarse)
    meta = {
        "captions": write_captions(scene, rng),
        "questions": write_questions(scene, rng),
        "instances": instances,
        "words": words,
        "boxes": boxes,
        "size": [size, size],
        "source": _SOURCE,
        "licence": "Apache-2.0",
        "scene": scene,
    }
    return RenderedScene(rgb=paint_image(layout, size, fine), planes=planes, meta=meta)


def render_dataset(
    folder: str | Path,
    train: int = 4000,
    val: int = 400,
    test: int = 400,
    seed: int = 0,
    size: int = 128,
    label_size: int = 128,
    workers: int | None = None,
    progress: bool = True,
    sign_words: str = "few",
) -> None:
    """Write the datasets folder/train, folder/val and folder/test; splits with these settings are kept.

    A split appears under its name only when it is complete. Processes that ask for the same folder wait for the first.
    Worker processes are spawned, so a script calls this below `if __name__ == "__main__":`, or with `workers=1`.

    Args:
        folder: made if absent.
        train, val, test: number of scenes; a split of 0 is not written.
        seed: two seeds share no scene, nor do the splits of one seed.
        size, label_size: sides of images and label maps, px.
        workers: processes that render, by default one per usable core; 1 renders in this process.
        progress: show a bar with the time left.
        sign_words: "few", the same 43 words for all splits; or "many", about 1,500, and for val and test also held-out
            ones, about which questions are of the kind "read unseen".

    Raises:
        ValueError: if a number is out of range, or a split was written with other settings.
    """
    _check_sizes(size, label_size)
    if min(train, val, test, seed) < 0 or (workers is not None and workers < 1):
        raise InputError(
            f"train {train}, val {val}, test {test}, seed {seed}, workers {workers}: "
            "numbers of scenes and the seed must be at least 0, workers at least 1"
        )
    if sign_words not in ("few", "many"):
        raise InputError(f"sign_words is {shown(sign_words)}; choose few or many")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".scenes.lock", "wb") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        missing = []
        # checked before anything is rendered: all or nothing
        for split, count in (("train", train), ("val", val), ("test", test)):
            about = {"renderer": _VERSION, "seed": seed, "split": split, "count": count}
            about |= {"size": size, "label_size": label_size}
            # datasets with few words are older than this setting
            about |= {"sign_words": sign_words} if sign_words != "few" else {}
            if count and not _is_complete(folder / split, about):
                missing.append(about)
        for about in missing:
            _write_split(folder, about, workers or len(os.sched_getaffinity(0)), progress)


def _is_complete(folder: Path, about: dict) -> bool:
    """Whether the split exists; a split with other settings is an error."""
    if not folder.exists():
        return False
    if not (folder / "index.json").exists():
        raise InputError(f"{folder} exists but holds no dataset; delete it or choose another folder")
    found = read_index(folder)["about"]
    if found != about:
        raise InputError(
            f"{folder} holds scenes rendered with {found}, expected {about}; delete it or choose another folder"
        )
    return True


def _write_split(folder: Path, about: dict, workers: int, progress: bool) -> None:
    split, count = about["split"], about["count"]
    partial = folder / f".{split}.partial"
    # left by a killed run: under the lock no other process writes there
    shutil.rmtree(partial, ignore_errors=True)
    classes = {"seg": SEG_CLASSES, "obj_detection": OBJECT_CLASSES}
    bar = tqdm(total=count, desc=f"rendering {split}", unit="scene", disable=not progress)
    writer = ShardWriter(partial, classes=classes, source=_SOURCE, about=about)
    try:
        with writer, bar:
            for sample in _render_samples(about, workers):
                writer.write(sample)
                bar.update()
        os.replace(partial, folder / split)
    except BaseException:
        # the next run starts the split again; on a full disk these shards would only take its space
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _render_samples(about: dict, workers: int) -> Iterator[Sample]:
    """The samples of a split in order, from `workers` processes that stay close ahead of the writer."""
    chunks = [range(i, min(i + 8, about["count"])) for i in range(0, about["count"], 8)]
    if workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            yield from _render_chunk(about, chunk)
        return
    # spawned, not forked: the caller may have threads and a CUDA context
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running: deque = deque()
        for chunk in chunks:
            running.append(pool.submit(_render_chunk, about, chunk))
            if len(running) > 3 * workers:
                yield from running.popleft().result()
        for future in running:
            yield from future.result()


def _vocabulary(about: dict) -> Sequence[str]:
    """The words on the signs of a split; of those that are not for training, half are held out."""
    if "sign_words" not in about:
        return WORDS
    seen, held_out = many_sign_words()
    return (*WORDS, *seen) if about["split"] == "train" else (*seen[:: len(seen) // len(held_out)], *held_out)


def _render_chunk(about: dict, indices: range) -> list[Sample]:
    samples, vocabulary = [], _vocabulary(about)
    for index in indices:
        seed = scene_seed(about["seed"], about["split"], index)
        scene = render_scene(seed, about["size"], about["label_size"], vocabulary)
        jpeg = io.BytesIO()
        Image.fromarray(scene.rgb).save(jpeg, "JPEG", quality=92, subsampling=0)
        key = f"{about['split']}-{index:06d}"
        samples.append(Sample(key, jpeg.getvalue(), scene.planes, scene.meta))
    return samples
