"""Proves that each network gets the right pixels in batches that fit, and that requests are parsed and sorted.

python -m pytest tests/experts/test_labeller.py
"""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from prismer.config import prismer_tiny
from prismer.dataloading.experts import catalogue
from prismer.dataloading.experts.decode import GREY, ExpertPipeline, Geometry
from prismer.dataloading.experts.labeller import Labeller
from prismer.dataloading.experts.network import Images, intensity_outputs, min_max
from prismer.dataloading.experts.segmentation import BoxesGrabCut
from prismer.dataloading.experts.weights import MissingWeights
from prismer.dataloading.feed.dali import UndecodableImages
from prismer.dataloading.feed.image_batch import image_batch
from prismer.experts import EXPERTS
from tests.experts.stand_ins import Brightness, Halves


def jpeg(width: int, height: int, colour=(200, 30, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "JPEG", quality=95)
    return file.getvalue()


def test_one_decode_serves_every_geometry():
    stretched, fitted = Geometry(24), Geometry(32, keep_aspect=True)
    pipeline = ExpertPipeline({fitted, stretched}, batch_size=4)
    made = pipeline([jpeg(100, 50), jpeg(30, 90), jpeg(2, 400)])
    pixels, sizes = made[stretched]
    assert pixels.shape == (3, 3, 24, 24) and pixels.dtype == torch.uint8
    assert sizes == [(24, 24)] * 3
    assert (pixels[:, 0] > 190).all()
    pixels, sizes = made[fitted]
    assert pixels.shape == (3, 3, 32, 32)
    assert sizes == [(16, 32), (32, 11), (32, 1)]
    for image, (height, width) in zip(pixels, sizes, strict=True):
        assert (image[0, :height, :width] > 190).all()
        assert (image[:, height:] == GREY).all() and (image[:, :, width:] == GREY).all()


def test_pixels_are_resized_as_by_pillow():
    ramp = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], -1)).save(file, "JPEG", quality=95)
    pixels, _ = ExpertPipeline({Geometry(32)}, batch_size=1)([file.getvalue()])[Geometry(32)]
    exact = np.asarray(Image.open(file).convert("RGB").resize((32, 32), Image.BICUBIC)).astype(int)
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() - exact).max() <= 1


def test_a_broken_image_is_named_and_the_pipeline_goes_on():
    pipeline = ExpertPipeline({Geometry(16)}, batch_size=3)
    with pytest.raises(UndecodableImages) as error:
        pipeline([jpeg(9, 9), jpeg(99, 99)[:300], jpeg(9, 9)])
    assert set(error.value.reasons) == {1}
    assert pipeline([jpeg(9, 9)])[Geometry(16)][0].shape == (1, 3, 16, 16)


def test_the_padding_is_cut_off_intensities():
    maps = torch.zeros(2, 1, 8, 8)
    maps[0, :, :4] = 1
    maps[1, :, :, :2] = 0.5
    images = Images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [(16, 32), (32, 8)], 10)
    first, second = intensity_outputs(maps, images)
    assert first.plane.shape == (10, 10) and (first.plane == 255).all()
    assert (second.plane == 127).all()


def test_intensities_are_resized_with_aligned_corners_and_truncated():
    maps = torch.linspace(0, 1, 4).expand(1, 3, 4, 4)
    images = Images(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [(4, 4)], 7)
    plane = intensity_outputs(maps, images)[0].plane
    assert plane.shape == (7, 7, 3)
    assert plane[0, :, 0].tolist() == [int(255 * i / 6 + 1e-4) for i in range(7)]


def test_min_max_of_a_constant_map_is_zero():
    maps = torch.stack([torch.full((1, 2, 2), 7.0), torch.tensor([[[1.0, 2], [3, 5]]])])
    scaled = min_max(maps)
    assert (scaled[0] == 0).all()
    assert torch.equal(scaled[1, 0], torch.tensor([[0, 0.25], [0.5, 1]]))


def test_the_model_reads_the_labels():
    labeller = Labeller([Brightness(), Halves()], label_size=32)
    bright, dark = labeller([jpeg(60, 40, (255, 255, 255)), jpeg(60, 40, (0, 0, 0))])
    assert bright.meta["instances"] == {"0": 1} and dark.meta["instances"] == {"0": 0}
    config = prismer_tiny()
    batch = image_batch([jpeg(60, 40)] * 2, config, [bright, dark])
    half = config.label_size // 2
    assert batch.labels["depth"][0].float().mean() > 250 > batch.labels["depth"][1].float().mean()
    assert (batch.labels["obj_detection"][:, 0, :, :half] == 0).all()
    rows = batch.rows["obj_detection"][:, 0]
    assert rows[0] != rows[1] and (rows > 0).all()


@pytest.mark.parametrize("kind", ["path", "bytes", "pil", "array", "tensor"])
def test_every_source_of_an_image_can_be_labelled(tmp_path, kind):
    data = jpeg(60, 40)
    image = Image.open(io.BytesIO(data))
    array = np.asarray(image)
    (tmp_path / "photo.jpg").write_bytes(data)
    source = {
        "path": tmp_path / "photo.jpg",
        "bytes": data,
        "pil": image,
        "array": array,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
    }[kind]
    (labels,) = Labeller([Brightness()], label_size=8)([source])
    assert np.abs(labels.planes["depth"].astype(int) - 200).max() <= 3


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="photo.jpg cannot be labelled: the image is in no known"):
        Labeller([Brightness()], label_size=8)([tmp_path / "photo.jpg"])


class Hungry(Brightness):
    """Runs out of memory with more than `room` images."""

    def __init__(self, room: int):
        self.room, self.batches = room, []

    def predict(self, images, earlier):
        self.batches.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().predict(images, earlier)


def test_a_network_out_of_memory_gets_half_as_many_images():
    images = [jpeg(20, 20, (20 * i, 0, 0)) for i in range(7)]
    network = Hungry(room=2)
    labeller = Labeller([network, Halves()], label_size=4, batch_size=8)
    planes = [labels.planes["depth"].mean() for labels in labeller(images)]
    assert network.batches == [7, 4, 2, 2, 2, 1]
    assert np.abs(np.array(planes) - 20 * np.arange(7)).max() < 3
    # the labeller remembers the batch size that fitted
    network.batches.clear()
    labeller(images[:4])
    assert network.batches == [2, 2]
    with pytest.raises(RuntimeError, match="brightness does not fit into the memory of cpu"):
        Labeller([Hungry(room=0)], label_size=4, batch_size=2)(images)


def test_speeds_count_the_images_of_each_network():
    labeller = Labeller([Brightness(), Halves()], label_size=8)
    labeller([jpeg(9, 9)] * 5)
    assert labeller.images == 5
    assert set(labeller.speeds()) == {"decoding", "brightness", "halves"}


def test_segmentation_takes_over_the_class_names_of_the_detector():
    assert Labeller([Halves(), BoxesGrabCut()]).classes == {"obj_detection": Halves.classes, "seg": Halves.classes}


@pytest.mark.parametrize("networks", [[], [Brightness, Brightness]])
def test_each_expert_has_one_network(networks):
    with pytest.raises(ValueError, match="one for each expert"):
        Labeller([network() for network in networks])


@pytest.fixture
def stand_ins(monkeypatch):
    """A catalogue of stand-ins: two networks for depth, one for objects, and one for words that needs objects.

    The weights of the network for words are missing.
    """

    class Other(Brightness):
        info = replace(Brightness.info, name="other")

    class Words(Brightness):
        info = replace(
            Brightness.info, name="words", expert="ocr_detection", inputs=("obj_detection",), inputs_required=True
        )

        @classmethod
        def load(cls, source=None, device="cpu"):
            if source is None:
                raise MissingWeights("the weights of words are not here; run `prismer experts fetch words`")
            return cls()

    table = {"depth": (Brightness, Other), "obj_detection": (Halves,), "ocr_detection": (Words,)}
    monkeypatch.setattr(catalogue, "networks_of", lambda expert: table[expert])
    monkeypatch.setattr(catalogue, "EXPERTS", {name: EXPERTS[name] for name in table})


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("all", ["brightness", "halves", "words"]),
        ("depth=other", ["other"]),
        (["depth=other", "all"], ["other", "halves", "words"]),
        (["ocr_detection", "obj_detection", "depth"], ["brightness", "halves", "words"]),
        ("depth=other@/a@b", ["other"]),
    ],
)
def test_requests_are_sorted_so_that_inputs_come_first(stand_ins, asked, expected):
    requests = catalogue.parse_requests(asked)
    assert [request.network.info.name for request in requests] == expected
    if "@" in asked:
        assert requests[0].source == "/a@b"


@pytest.mark.parametrize(
    "asked, message",
    [
        ("depth=nothing", "unknown network 'nothing' for depth; choose from brightness, other"),
        (["depth", "depth=other"], "depth is asked for twice"),
        ([], "no expert was asked for"),
    ],
)
def test_a_wrong_request_is_refused_in_one_sentence(stand_ins, asked, message):
    with pytest.raises(ValueError, match=message):
        catalogue.parse_requests(asked)


def test_an_unknown_expert_is_refused():
    with pytest.raises(ValueError, match="unknown expert 'taste'; choose from all, depth"):
        catalogue.parse_requests("taste")


def test_experts_with_weights_are_loaded_without_the_others(stand_ins):
    networks, missing = catalogue.load_networks("all")
    assert [network.info.name for network in networks] == ["brightness", "halves"]
    assert missing == ["ocr_detection: the weights of words are not here; run `prismer experts fetch words`"]
    with pytest.warns(UserWarning, match="experts fetch words"):
        assert len(Labeller.load("all").networks) == 2
    with pytest.raises(MissingWeights, match="which is not loaded"):
        catalogue.load_networks("ocr_detection=words@here")
    assert len(catalogue.load_networks(["obj_detection", "ocr_detection=words@here"])[0]) == 2


@pytest.mark.parametrize("expert", EXPERTS)
def test_every_network_is_described_completely(expert):
    networks = catalogue.networks_of(expert)
    names = [network.info.name for network in networks]
    assert len(set(names)) == len(names) >= 1
    for network in networks:
        info = network.info
        assert info.expert == expert and info.summary and info.licence and info.trained_on
        assert set(info.inputs) <= set(EXPERTS) - {expert} and (info.inputs or not info.inputs_required)
        assert (network.package is not None) == (info.weights == "fetched")
        assert catalogue.find_network(info.name) is network
