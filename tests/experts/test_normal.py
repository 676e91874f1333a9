"""Proves the axes and the storage of normals, on planes and scenes whose normals are known, and that models are read.

Stored normals are (n + 1) * 127.5 (Prismer, arXiv:2303.02506, section 3.2, and its released code).

python -m pytest tests/experts/test_normal.py
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prismer.dataloading.experts import vit_trunk
from prismer.dataloading.experts.depth import VitSDepth
from prismer.dataloading.experts.network import ExpertOutput, Images
from prismer.dataloading.experts.normal import NETWORKS, DepthNormals, Sapiens2Normal, VitSNormal, normal_outputs
from prismer.dataloading.experts.weights import MissingWeights, weights_home
from prismer.dataloading.scenes.dataset import render_scene, scene_seed
from tests.experts.stand_ins import assert_alone_equals_together, random_images
from tests.experts.test_depth import save_trunk, tiny_depth_anything


def vectors(plane):
    """Convert (h, w, 3) uint8 back to unit vectors."""
    n = plane.astype(np.float32) / 127.5 - 1
    return n / np.linalg.norm(n, axis=-1, keepdims=True)


def degrees(a, b):
    return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))


# -- storage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "stored"),
    [
        ((0.0, 0.0, 1.0), (127, 127, 255)),
        ((1.0, 0.0, 0.0), (255, 127, 127)),
        ((0.0, -1.0, 0.0), (127, 0, 127)),
        # of any length
        ((0.0, 3.0, 4.0), (127, 204, 229)),
    ],
)
def test_a_vector_of_any_length_is_stored_as_three_bytes(n, stored):
    maps = torch.tensor(n).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    (output,) = normal_outputs(maps, random_images(8, 1, label_size=6))
    assert output.plane.shape == (6, 6, 3) and output.plane.dtype == np.uint8
    assert np.abs(output.plane.astype(int) - stored).max() <= 1 and tuple(output.plane[0, 0]) == stored


def test_normals_are_stored_as_in_the_rendered_scenes():
    # the renderer stores (n + 1) * 127.5, truncated; its sky faces the camera
    plane = render_scene(scene_seed(0, "val", 0)).planes["normal"]
    maps = torch.from_numpy(vectors(plane)).permute(2, 0, 1)[None]
    (output,) = normal_outputs(maps, random_images(8, 1, label_size=plane.shape[0]))
    assert np.abs(output.plane.astype(int) - plane).max() <= 2


# -- slopes of depth -----------------------------------------------------------------------------------------------


def depth_of_plane(n, side=112):
    """Inverse distances (side, side) of a plane with unit normal n, seen by the camera that DepthNormals assumes."""
    at = ((np.arange(side) + 0.5) * 2 / side - 1) * math.tan(math.radians(DepthNormals.FIELD / 2))
    # 1 / distance of the plane n . p = -1 along (x, -y, -1)
    inverse = -(n[0] * at[None, :] - n[1] * at[:, None] - n[2]) + 0 * at[:, None]
    assert inverse.min() > 0
    near, far = inverse.max(), inverse.min()
    return inverse, near, far


@pytest.mark.parametrize("n", [(0.0, 0.0, 1.0), (0.4, 0.0, 0.9), (-0.4, 0.0, 0.9), (0.0, 0.5, 0.85), (0.3, -0.4, 0.85)])
def test_the_slopes_of_a_plane_give_its_normal(n):
    n = np.array(n) / np.linalg.norm(n)
    inverse, near, _ = depth_of_plane(n)
    # stretched over the range of a scene whose farthest point is FAR times as far away as the nearest
    far = near / DepthNormals.FAR
    plane = ((inverse - far) / (near - far) * 255).astype(np.uint8)
    network = DepthNormals.load()
    (output,) = network.predict(random_images(336, 1, label_size=112), {"depth": [ExpertOutput(plane)]})
    middle = output.plane[8:-8, 8:-8]
    error = degrees(vectors(middle), n.astype(np.float32))
    assert np.median(error) < 4, f"median error {np.median(error):.1f} degrees"
    assert (np.sign(vectors(middle).mean((0, 1)))[np.abs(n) > 0.2] == np.sign(n)[np.abs(n) > 0.2]).all()


def test_the_slopes_of_rendered_scenes_give_their_normals():
    scenes = [render_scene(scene_seed(0, "val", i)) for i in range(3)]
    size = scenes[0].planes["depth"].shape[0]
    known = {"depth": [ExpertOutput(scene.planes["depth"]) for scene in scenes]}
    found = DepthNormals.load().predict(random_images(336, 3, label_size=size), known)
    for one, scene in zip(found, scenes, strict=True):
        error = degrees(vectors(one.plane), vectors(scene.planes["normal"]))
        # a median, because the slopes at the edges of objects are wrong
        assert np.median(error) < 6, f"median error {np.median(error):.1f} degrees"


def test_slopes_do_not_depend_on_the_rest_of_the_batch():
    planes = [np.random.default_rng(i).integers(0, 256, (56, 56), dtype=np.uint8) for i in range(2)]
    network = DepthNormals.load()
    both = network.predict(random_images(336, 2, 56), {"depth": [ExpertOutput(p) for p in planes]})
    for plane, output in zip(planes, both, strict=True):
        (alone,) = network.predict(random_images(336, 1, 56), {"depth": [ExpertOutput(plane)]})
        assert np.array_equal(alone.plane, output.plane)


def test_slopes_need_a_depth_map():
    assert (
        DepthNormals.info.inputs == ("depth",)
        and DepthNormals.info.inputs_required
        and DepthNormals.info.weights == "none"
    )
    with pytest.raises(ValueError, match="ask for depth"):
        DepthNormals.load().predict(random_images(336), {})
    with pytest.raises(ValueError, match="no weights"):
        DepthNormals.load("some/folder")


# -- networks ------------------------------------------------------------------------------------------------------


def test_the_small_network_is_read_from_a_folder(tmp_path):
    assert NETWORKS[0] is VitSNormal and VitSNormal.info.side == VitSDepth.info.side
    network = VitSNormal.load(save_trunk(tmp_path))
    images = random_images(56, label_size=32)
    assert_alone_equals_together(network, images)
    for output in network.predict(images, {}):
        assert output.plane.shape == (32, 32, 3)
        assert np.abs(np.linalg.norm(output.plane / 127.5 - 1, axis=-1) - 1).max() < 0.5


def test_depth_and_normals_share_one_forward_pass(tmp_path):
    save_trunk(tmp_path)
    depth, normal = VitSDepth.load(tmp_path), VitSNormal.load(tmp_path)
    assert normal.version == depth.version
    calls = []
    depth._geometry.trunk._model.register_forward_hook(lambda *_: calls.append(1))
    images = random_images(56)
    depth.predict(images, {})
    # the labeller makes a new tensor for each network
    normal.predict(Images(images.pixels[:], images.sizes, images.label_size), {})
    assert len(calls) == 1


class Answer(torch.nn.Module):
    """Returns given normals and keeps the pixels that it received."""

    def __init__(self, normals):
        super().__init__()
        self.normals = normals

    def forward(self, pixels):
        self.pixels = pixels
        return SimpleNamespace(normals=self.normals)


def test_sapiens_reads_normalised_pixels_and_its_padding_is_cut_off():
    assert Sapiens2Normal.info.keep_aspect
    side = Sapiens2Normal.info.side
    normals = torch.zeros(1, 3, side, side)
    normals[:, 2] = 2.0
    # the padding below a wide image looks down
    normals[:, :, side // 2 :] = torch.tensor([0.0, -1.0, 0.0]).view(3, 1, 1)
    model = Answer(normals)
    images = random_images(side, 1)
    images.sizes = [(side // 2, side)]
    (output,) = Sapiens2Normal(model, "cpu", "1").predict(images, {})
    assert np.abs(output.plane.astype(int) - (127, 127, 255)).max() <= 1
    expected = (images.pixels[:, 2] / 255 - 0.406) / 0.225
    assert (model.pixels[:, 2] - expected).abs().max() < 1e-5


def tiny_sapiens(folder):
    from transformers import Sapiens2Config, Sapiens2ForNormalEstimation

    config = Sapiens2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_first_full_attention_layers=1,
        num_last_full_attention_layers=1,
        patch_size=64,
        num_register_tokens=2,
        image_size=[1024, 768],
        num_labels=3,
        head_config=dict(upsample_out_channels=[16, 8], conv_out_channels=[8]),
    )
    Sapiens2ForNormalEstimation(config).save_pretrained(folder)
    return folder


def test_sapiens_is_read_from_a_folder(tmp_path):
    network = Sapiens2Normal.load(tiny_sapiens(tmp_path))
    assert len(network.version) == 12
    images = random_images(Sapiens2Normal.info.side)
    images.sizes[1] = (1024, 512)
    assert_alone_equals_together(network, images)


def test_missing_and_foreign_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match="prismer experts fetch vit-s-depth"):
        VitSNormal.load()
    with pytest.raises(ValueError, match="sapiens2"):
        Sapiens2Normal.load(tiny_depth_anything(tmp_path / "a"))
    with pytest.raises(MissingWeights, match="sapiens2-normal"):
        Sapiens2Normal.load(tmp_path / "empty")


@pytest.mark.skipif(
    not (weights_home() / vit_trunk.NAME).is_dir(), reason="no trunk; run `prismer experts fetch vit-s-normal`"
)
def test_the_fetched_trunk_sees_the_normals_of_a_rendered_scene():
    scene = render_scene(scene_seed(0, "val", 1))
    pixels = torch.from_numpy(scene.rgb).permute(2, 0, 1)[None].float()
    pixels = torch.nn.functional.interpolate(pixels, (336, 336), mode="bilinear").to(torch.uint8)
    truth = scene.planes["normal"]
    (output,) = VitSNormal.load().predict(Images(pixels, [(336, 336)], truth.shape[0]), {})
    assert np.median(degrees(vectors(output.plane), vectors(truth))) < 20
