"""Proves that the table of experts describes the paper's six, and that a new expert needs only the table and a network.

python -m pytest tests/experts/test_experts.py
"""

import subprocess
import sys

import pytest

from prismer.dataloading.experts.catalogue import networks_of
from prismer.dataloading.sources.records import DatasetPaths
from prismer.experts import EXPERTS, PAPER_EXPERTS
from tests.experts.jobs import write_photos


@pytest.mark.parametrize(
    "name, kind, planes, channels, fill, table, is_smooth",
    [
        ("depth", "intensity", 1, 1, 0, None, True),
        ("normal", "intensity", 3, 3, 0, None, True),
        ("seg", "class", 1, 64, 255, None, False),
        ("edge", "intensity", 1, 1, 0, None, False),
        ("obj_detection", "object", 1, 64, 255, "instances", False),
        ("ocr_detection", "word", 1, 64, 255, "words", False),
    ],
)
def test_the_label_format_of_the_papers_experts(name, kind, planes, channels, fill, table, is_smooth):
    expert = EXPERTS[name]
    assert (expert.kind, expert.planes, expert.channels, expert.fill) == (kind, planes, channels, fill)
    assert (expert.table, expert.is_smooth) == (table, is_smooth)
    assert expert.is_ids == (kind != "intensity") and expert.has_classes == (kind in ("class", "object"))


def test_coco_segmentations_are_preferred_in_the_published_layout(tmp_path):
    for folder in ("seg_ade", "seg_coco", "depth"):
        (tmp_path / folder).mkdir()
    place = DatasetPaths(tmp_path, tmp_path, "photos")
    assert place.labels == {"depth": tmp_path / "depth/photos", "seg": tmp_path / "seg_coco/photos"}


def test_the_table_has_no_ambiguous_entry():
    assert PAPER_EXPERTS == tuple(EXPERTS)[:6]
    for field in ("code", "module", "title"):
        assert len({getattr(expert, field) for expert in EXPERTS.values()}) == len(EXPERTS), field
    tables = [expert.table for expert in EXPERTS.values() if expert.table]
    assert len(set(tables)) == len(tables)
    for name, expert in EXPERTS.items():
        assert (expert.table is not None) == (expert.kind in ("object", "word"))
        assert networks_of(name)


NEW_EXPERTS = """
import sys
from types import ModuleType

import numpy as np
from prismer.experts import EXPERTS, PAPER_EXPERTS, Expert

EXPERTS["saliency"] = Expert(code=7, module="saliency", title="saliency")
EXPERTS["material"] = Expert(code=8, module="materials", title="materials", kind="class")
EXPERTS["part"] = Expert(code=9, module="parts", title="parts", kind="object", table="parts")

from prismer.dataloading.experts.network import ExpertOutput, Network, NetworkInfo, intensity_outputs


def add(expert, module, predict, classes=()):
    info = NetworkInfo(
        name=module, expert=expert, summary="", licence="", trained_on="none", weights="none", side=32
    )
    network = type(module, (Network,), {"info": info, "predict": predict, "classes": list(classes)})
    network.load = classmethod(lambda cls, source=None, device="cpu": cls())
    network.__abstractmethods__ = frozenset()
    sys.modules[f"prismer.dataloading.experts.{module}"] = ModuleType(module)
    sys.modules[f"prismer.dataloading.experts.{module}"].NETWORKS = (network,)


def ids(images):
    return np.arange(images.label_size**2, dtype=np.int64).reshape(images.label_size, -1) * 4 // images.label_size**2


add("saliency", "saliency", lambda self, images, earlier: intensity_outputs(images.pixels[:, :1] / 255, images))
add("material", "materials", lambda self, images, earlier: [
    ExpertOutput((ids(images) // 2).astype(np.uint8)) for _ in range(len(images))
], ["metal", "wood"])
add("part", "parts", lambda self, images, earlier: [
    ExpertOutput(ids(images).astype(np.uint8), {i: i % 2 for i in range(4)}, {0: (0, 0, 1, 0.25, 0.5)})
    for _ in range(len(images))
], ["leg", "seat"])

from prismer import Prismer
from prismer.cli.main import main
from prismer.config import prismer_tiny
from prismer.dataloading.experts.labeller import Labeller

photos, out = sys.argv[1:]
names = "saliency,material,part"
assert main(["label", photos, "--out", out, "--experts", names, "--label-size", "64", "--preview"]) == 0
assert main(["data", "check", out]) == 0
photo = f"{photos}/photo-00000.jpg"
assert main(["show", photo, "--experts", names, "--model", "none", "--out", f"{out}/slide.png"]) == 0
assert prismer_tiny().experts == PAPER_EXPERTS
model = Prismer(prismer_tiny(experts=("depth", *names.split(",")))).eval()
(labels,) = Labeller.load(names.split(","), label_size=64)([photo])
assert labels.meta["parts"] == {"0": 0, "1": 1, "2": 0, "3": 1}
from prismer.dataloading.feed.image_batch import image_batch
batch = image_batch([photo], model.config, [labels])
assert batch.rows["material"][0, :3].tolist() == [1, 2, 0]
assert batch.rows["part"][0, :5].tolist() == [3, 4, 3, 4, 0]
print(tuple(model.encode(batch).shape))
"""


def test_a_new_expert_is_its_network_and_a_line_in_the_table(tmp_path):
    """A process adds three experts, labels images with them, checks and draws the maps, and encodes them."""
    photos = write_photos(tmp_path / "photos", 2)
    done = subprocess.run(
        [sys.executable, "-c", NEW_EXPERTS, str(photos), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 images labelled" in done.stdout and "no problems" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("(1, ")
