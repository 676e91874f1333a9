"""Normal networks: axes against scenes and planes that are known, ranges of spec 4.2, tiny random models.

pytest tests/experts/test_normal.py
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prismer.dataloading.experts import vit_trunk
from prismer.dataloading.experts.depth import VitSDepth
from prismer.dataloading.experts.network import Found, Images, MissingWeights
from prismer.dataloading.experts.normal import NETWORKS, DepthNormals, Sapiens2Normal, VitSNormal, normal_maps
from prismer.dataloading.experts.weights import weights_home
from prismer.dataloading.scenes.dataset import render_scene, scene_seed
from tests.experts.test_depth import assert_alone_equals_together, batch, save_trunk, tiny_depth_anything


def vectors(plane):
    """(h, w, 3) uint8 back to unit vectors."""
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
        # the length does not matter
        ((0.0, 3.0, 4.0), (127, 204, 229)),
    ],
)
def test_vectors_are_stored_truncated(n, stored):
    maps = torch.tensor(n).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    (found,) = normal_maps(maps, batch(8, 1, label_size=6))
    assert found.plane.shape == (6, 6, 3) and found.plane.dtype == np.uint8
    assert np.abs(found.plane.astype(int) - stored).max() <= 1 and tuple(found.plane[0, 0]) == stored


def test_storage_is_that_of_the_rendered_scenes():
    # our own renderer keeps (n + 1) * 127.5, truncated; a sky faces the camera
    plane = render_scene(scene_seed(0, "val", 0)).planes["normal"]
    maps = torch.from_numpy(vectors(plane)).permute(2, 0, 1)[None]
    (found,) = normal_maps(maps, batch(8, 1, label_size=plane.shape[0]))
    assert np.abs(found.plane.astype(int) - plane).max() <= 2


# -- slopes of depth -----------------------------------------------------------------------------------------------


def depth_of_plane(n, side=112):
    """The depth map (side, side) of a plane with unit normal n, as DepthNormals assumes the camera to be."""
    at = ((np.arange(side) + 0.5) * 2 / side - 1) * math.tan(math.radians(DepthNormals.FIELD / 2))
    # 1 / distance of the plane n . p = -1 along (x, -y, -1)
    inverse = -(n[0] * at[None, :] - n[1] * at[:, None] - n[2]) + 0 * at[:, None]
    assert inverse.min() > 0
    near, far = inverse.max(), inverse.min()
    return inverse, near, far


@pytest.mark.parametrize("n", [(0.0, 0.0, 1.0), (0.4, 0.0, 0.9), (-0.4, 0.0, 0.9), (0.0, 0.5, 0.85), (0.3, -0.4, 0.85)])
def test_slopes_of_a_plane(n):
    n = np.array(n) / np.linalg.norm(n)
    inverse, near, _ = depth_of_plane(n)
    # as stretched by a scene that reaches FAR times as far
    far = near / DepthNormals.FAR
    plane = ((inverse - far) / (near - far) * 255).astype(np.uint8)
    network = DepthNormals.load()
    (found,) = network.predict(batch(336, 1, label_size=112), {"depth": [Found(plane)]})
    middle = found.plane[8:-8, 8:-8]
    error = degrees(vectors(middle), n.astype(np.float32))
    assert np.median(error) < 4, f"median error {np.median(error):.1f} degrees"
    assert (np.sign(vectors(middle).mean((0, 1)))[np.abs(n) > 0.2] == np.sign(n)[np.abs(n) > 0.2]).all()


def test_slopes_of_rendered_scenes():
    scenes = [render_scene(scene_seed(0, "val", i)) for i in range(3)]
    size = scenes[0].planes["depth"].shape[0]
    known = {"depth": [Found(scene.planes["depth"]) for scene in scenes]}
    found = DepthNormals.load().predict(batch(336, 3, label_size=size), known)
    for one, scene in zip(found, scenes, strict=True):
        error = degrees(vectors(one.plane), vectors(scene.planes["normal"]))
        # edges of things are off
        assert np.median(error) < 6, f"median error {np.median(error):.1f} degrees"


def test_slopes_do_not_depend_on_the_batch():
    planes = [np.random.default_rng(i).integers(0, 256, (56, 56), dtype=np.uint8) for i in range(2)]
    network = DepthNormals.load()
    both = network.predict(batch(336, 2, 56), {"depth": [Found(p) for p in planes]})
    for plane, found in zip(planes, both, strict=True):
        (alone,) = network.predict(batch(336, 1, 56), {"depth": [Found(plane)]})
        assert np.array_equal(alone.plane, found.plane)


def test_slopes_need_depth():
    assert DepthNormals.card.needs == ("depth",) and DepthNormals.card.weights == "none"
    with pytest.raises(ValueError, match="ask for depth"):
        DepthNormals.load().predict(batch(336), {})
    with pytest.raises(ValueError, match="no weights"):
        DepthNormals.load("some/folder")


# -- networks ------------------------------------------------------------------------------------------------------


def test_small_network_from_a_folder(tmp_path):
    assert NETWORKS[0] is VitSNormal and VitSNormal.card.side == VitSDepth.card.side
    network = VitSNormal.load(save_trunk(tmp_path))
    images = batch(56, label_size=32)
    assert_alone_equals_together(network, images)
    for found in network.predict(images, {}):
        assert found.plane.shape == (32, 32, 3)
        assert np.abs(np.linalg.norm(found.plane / 127.5 - 1, axis=-1) - 1).max() < 0.5


def test_depth_and_normals_share_one_forward_pass(tmp_path):
    save_trunk(tmp_path)
    depth, normal = VitSDepth.load(tmp_path), VitSNormal.load(tmp_path)
    assert normal.version == depth.version
    calls = []
    depth._geometry.trunk._model.register_forward_hook(lambda *_: calls.append(1))
    images = batch(56)
    depth.predict(images, {})
    # the labeller makes a new tensor for every network
    normal.predict(Images(images.pixels[:], images.sizes, images.label_size), {})
    assert len(calls) == 1


class Answer(torch.nn.Module):
    def __init__(self, normals):
        super().__init__()
        self.normals = normals

    def forward(self, pixels):
        self.pixels = pixels
        return SimpleNamespace(normals=self.normals)


def test_sapiens_padding_is_cut_and_pixels_are_normalised():
    assert Sapiens2Normal.card.keep_aspect
    side = Sapiens2Normal.card.side
    normals = torch.zeros(1, 3, side, side)
    normals[:, 2] = 2.0
    # the padding below a wide picture looks down
    normals[:, :, side // 2 :] = torch.tensor([0.0, -1.0, 0.0]).view(3, 1, 1)
    model = Answer(normals)
    images = batch(side, 1)
    images.sizes = [(side // 2, side)]
    (found,) = Sapiens2Normal(model, "cpu", "1").predict(images, {})
    assert np.abs(found.plane.astype(int) - (127, 127, 255)).max() <= 1
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


def test_sapiens_from_a_folder(tmp_path):
    network = Sapiens2Normal.load(tiny_sapiens(tmp_path))
    assert len(network.version) == 12
    images = batch(Sapiens2Normal.card.side)
    images.sizes[1] = (1024, 512)
    assert_alone_equals_together(network, images)


def test_wrong_and_absent_folders(tmp_path, monkeypatch):
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
def test_fetched_trunk_knows_the_ground():
    scene = render_scene(scene_seed(0, "val", 1))
    pixels = torch.from_numpy(scene.rgb).permute(2, 0, 1)[None].float()
    pixels = torch.nn.functional.interpolate(pixels, (336, 336), mode="bilinear").to(torch.uint8)
    truth = scene.planes["normal"]
    (found,) = VitSNormal.load().predict(Images(pixels, [(336, 336)], truth.shape[0]), {})
    assert np.median(degrees(vectors(found.plane), vectors(truth))) < 20
