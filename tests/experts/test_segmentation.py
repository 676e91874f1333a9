"""Proves that GrabCut fills boxes with the shapes in them, and that Mask2Former's class map follows its rule.

python -m pytest tests/experts/test_segmentation.py
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prismer.dataloading.experts.network import ExpertOutput, Images
from prismer.dataloading.experts.objects import NanoDet
from prismer.dataloading.experts.segmentation import (
    NETWORKS,
    BoxesGrabCut,
    Mask2FormerAde,
    Mask2FormerCoco,
    semantic_map,
)
from prismer.dataloading.experts.weights import MissingWeights

SIZE = 96


def scene(*shapes, noise=6):
    """A green image (3, SIZE, SIZE) uint8 with coloured rectangles (left, top, right, bottom)."""
    pixels = np.full((SIZE, SIZE, 3), (40, 120, 50), np.int64)
    for (left, top, right, bottom), colour in shapes:
        pixels[top:bottom, left:right] = colour
    pixels += np.random.default_rng(0).integers(-noise, noise + 1, pixels.shape)
    return torch.tensor(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def objects(*boxes):
    """The output of an object expert for boxes (box in pixels of the scene, class)."""
    return ExpertOutput(
        np.full((SIZE, SIZE), 255, np.uint8),
        table={i: class_id for i, (_, class_id) in enumerate(boxes)},
        boxes={i: (*(edge / SIZE for edge in box), 0.9) for i, (box, _) in enumerate(boxes)},
    )


def cut(pixels, found, label_size=SIZE):
    """The segmentation of a scene with those objects."""
    images = Images(pixels[None], [(SIZE, SIZE)], label_size)
    return BoxesGrabCut.load().predict(images, {"obj_detection": [found]})[0].plane


def test_grabcut_fills_the_shape_in_a_box():
    shape = (30, 20, 60, 70)
    plane = cut(scene((shape, (200, 40, 40))), objects(((24, 12, 68, 80), 17)))
    expected = np.full((SIZE, SIZE), 255, np.uint8)
    expected[20:70, 30:60] = 17
    assert (plane != expected).mean() < 0.01
    assert set(np.unique(plane)) == {17, 255}


def test_small_objects_lie_in_front():
    large, small = (10, 10, 85, 85), (40, 40, 60, 60)
    pixels = scene((large, (200, 40, 40)), (small, (30, 30, 220)))
    for order in (0, 1):
        boxes = [((5, 5, 90, 90), 3), ((36, 36, 64, 64), 8)]
        plane = cut(pixels, objects(*(boxes[::-1] if order else boxes)))
        assert (plane[44:56, 44:56] == 8).all(), order
        assert (plane[14:30, 14:80] == 3).all(), order


def test_the_map_may_be_smaller_than_the_image():
    plane = cut(scene(((30, 20, 60, 70), (200, 40, 40))), objects(((24, 12, 68, 80), 17)), 48)
    assert plane.shape == (48, 48)
    expected = np.full((48, 48), 255, np.uint8)
    expected[10:35, 15:30] = 17
    assert (plane != expected).mean() < 0.03


@pytest.mark.parametrize(
    "box",
    [(0, 0, SIZE, SIZE), (2, 1, 95, 95), (50, 50, 51, 52), (93, 93, 96, 96), (30, 30, 60, 60)],
    ids=["all", "almost all", "pixels", "corner", "like its surroundings"],
)
def test_a_box_that_cannot_be_cut_is_filled_with_an_ellipse(box):
    """The image is constant, the box has no surroundings, or it has only a few pixels."""
    left, top, right, bottom = box
    for noise in (0, 6):
        plane = cut(scene(noise=noise), objects((box, 4)))
        assert plane[(top + bottom) // 2, (left + right) // 2] == 4
        inside = plane[top:bottom, left:right] == 4
        assert inside.mean() > 0.5
        assert (plane == 4).sum() == inside.sum()


def test_the_same_image_gives_the_same_masks():
    import cv2

    pixels = scene(((30, 20, 60, 70), (60, 110, 60)), noise=60)
    found = objects(((24, 12, 68, 80), 1), ((10, 50, 40, 90), 2))
    first = cut(pixels, found)
    cv2.setRNGSeed(7)
    cv2.randu(np.zeros((50, 50), np.uint8), 0, 255)
    np.testing.assert_array_equal(first, cut(pixels, found))
    images = Images(torch.stack([scene(), pixels]), [(SIZE, SIZE)] * 2, SIZE)
    both = BoxesGrabCut.load().predict(images, {"obj_detection": [objects(((1, 1, 50, 50), 0)), found]})
    np.testing.assert_array_equal(first, both[1].plane)


def test_the_random_numbers_of_opencv_are_seeded_before_each_cut(monkeypatch):
    """Some versions of OpenCV initialise GrabCut's clusters from them."""
    import cv2

    calls, real = [], cv2.grabCut
    monkeypatch.setattr(cv2, "setRNGSeed", lambda seed: calls.append(seed))
    monkeypatch.setattr(cv2, "grabCut", lambda *a: (calls.append("cut"), real(*a)))
    cut(scene(), objects(((24, 12, 68, 80), 1), ((10, 50, 40, 90), 2)))
    assert calls == [0, "cut", 0, "cut"]


def test_an_image_without_boxes_is_background():
    plane = cut(scene(), objects())
    assert plane.shape == (SIZE, SIZE) and (plane == 255).all()


def test_grabcut_needs_the_object_expert_and_no_weights():
    images = Images(scene()[None], [(SIZE, SIZE)], SIZE)
    with pytest.raises(ValueError, match="ask for obj_detection too"):
        BoxesGrabCut.load().predict(images, {"depth": [ExpertOutput(np.zeros((SIZE, SIZE), np.uint8))]})
    with pytest.raises(ValueError, match="has no weights"):
        BoxesGrabCut.load("somewhere")


def test_grabcut_takes_over_the_class_names_of_the_detector():
    network = BoxesGrabCut.load()
    detector = NanoDet(torch.nn.Identity(), "cpu", "test")
    detector.classes = ["cat", "red ball"]
    network.attach_input(detector)
    assert network.classes == ["cat", "red ball"] and BoxesGrabCut.load().classes == []
    detector.classes = [str(i) for i in range(256)]
    with pytest.raises(ValueError, match="nanodet-g has 256 classes"):
        network.attach_input(detector)


def written_out(classes, masks, side, size, label_size):
    """The rule, step by step: resize the masks to the input, cut off the padding, resize to the map, and sum."""
    height, width = size
    large = F.interpolate(masks[None], (side, side), mode="bilinear")[:, :, :height, :width]
    large = F.interpolate(large, (label_size, label_size), mode="bilinear")[0]
    scores = torch.zeros(classes.shape[1] - 1, label_size, label_size)
    for query in range(len(classes)):
        odds = classes[query].exp()
        for class_id in range(classes.shape[1] - 1):
            scores[class_id] += odds[class_id] / odds.sum() * torch.sigmoid(large[query])
    return scores.argmax(dim=0).numpy()


def smooth_masks(count, cells):
    return F.interpolate(torch.randn(1, count, 4, 4) * 6, (cells, cells), mode="bicubic")[0]


@pytest.mark.parametrize("size", [(480, 480), (480, 321), (250, 480)])
def test_the_class_map_equals_the_rule_written_out(size):
    classes, masks = torch.randn(9, 6) * 2, smooth_masks(9, 120)
    plane = semantic_map(classes, masks, 480, size, 64)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(semantic_map(classes, masks, 480, size, 64), plane)
    assert plane.dtype == np.uint8 and plane.shape == (64, 64)
    assert (plane != written_out(classes, masks, 480, size, 64)).mean() < 0.005


def test_a_query_of_no_object_does_not_show():
    """Three queries lie in known places; the fourth covers everything and has the class "no object"."""
    masks = torch.full((4, 120, 120), -20.0)
    # left, top right, bottom right
    masks[0, :, :40] = 20
    masks[1, :30, 40:] = 20
    masks[2, 30:, 40:] = 20
    masks[3] = 20
    classes = torch.full((4, 4), -20.0)
    classes[[0, 1, 2, 3], [2, 0, 1, 3]] = 20
    # the image fills the upper half of the square: 240 x 480
    plane = semantic_map(classes, masks, 480, (240, 480), 48)
    expected = np.full((48, 48), 2)
    expected[:24, 16:], expected[24:, 16:] = 0, 1
    np.testing.assert_array_equal(plane, expected)


def test_two_unsure_queries_of_a_class_outweigh_a_surer_one_of_another_class():
    classes = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.3, 0.55, 0.15]]).log()
    masks = torch.full((3, 8, 8), 3.0)
    masks[2, :, 4:] = -9
    plane = semantic_map(classes, masks, 32, (32, 32), 8)
    assert (plane[:, :4] == 1).all()
    # on the right the third query is nearly absent, so that the first one wins
    classes[0] = torch.tensor([0.7, 0.2, 0.1]).log()
    plane = semantic_map(classes, masks, 32, (32, 32), 8)
    assert (plane[:, :3] == 1).all() and (plane[:, 5:] == 0).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=480,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=7,
        id2label={i: f"stuff {i}" for i in range(12)},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_mask2former_gives_an_image_the_same_map_alone_and_in_a_batch(folder):
    network = Mask2FormerCoco.load(folder)
    assert network.classes == [f"stuff {i}" for i in range(12)] and len(network.version) == 12
    assert type(Mask2FormerAde.load(folder)) is Mask2FormerAde
    pixels = torch.randint(0, 256, (2, 3, 480, 480), dtype=torch.uint8)
    sizes = [(480, 300), (360, 480)]
    together = network.predict(Images(pixels, sizes, 32), {})
    for i, found in enumerate(together):
        assert found.plane.shape == (32, 32) and found.plane.max() < 12
        alone = network.predict(Images(pixels[i : i + 1], sizes[i : i + 1], 32), {})[0]
        assert (found.plane != alone.plane).mean() < 0.01


def test_mask2former_reads_normalised_rgb_with_zeros_as_padding(folder, monkeypatch):
    network = Mask2FormerCoco.load(folder)
    seen = []
    inner = network.model.forward

    def watch(pixel_values, **options):
        seen.append(pixel_values)
        return inner(pixel_values=pixel_values, **options)

    monkeypatch.setattr(network.model, "forward", watch)
    pixels = torch.zeros(1, 3, 480, 480, dtype=torch.uint8)
    # red
    pixels[:, 0] = 255
    network.predict(Images(pixels, [(200, 480)], 32), {})
    expected = (np.array([1, 0, 0]) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(seen[0][0, :, 199, 479], expected, rtol=1e-5)
    assert (seen[0][:, :, 200:] == 0).all()


def test_a_folder_with_another_segmenter_is_refused(folder, tmp_path):
    with pytest.raises(MissingWeights, match="seg=mask2former-coco@facebook/"):
        Mask2FormerCoco.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    with pytest.raises(ValueError, match="type segformer, mask2former-ade is mask2former"):
        Mask2FormerAde.load(tmp_path)


def test_grabcut_is_the_default():
    assert NETWORKS[0] is BoxesGrabCut
    assert all(network.info.expert == "seg" for network in NETWORKS)
