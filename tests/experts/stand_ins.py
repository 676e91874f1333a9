"""Networks without weights and batches of random pixels, for the tests of the experts."""

from pathlib import Path

import numpy as np
import torch

from prismer.dataloading.experts.network import ExpertOutput, Images, Network, NetworkInfo, intensity_outputs


class Brightness(Network):
    """Depth: the red channel, so that a test can see which pixels arrived."""

    info = NetworkInfo(
        name="brightness",
        expert="depth",
        summary="the red channel",
        licence="none",
        trained_on="none",
        weights="none",
        side=32,
    )
    version = "brightness-1"

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Brightness":
        return cls()

    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        return intensity_outputs(images.pixels[:, :1].float() / 255, images)


class Halves(Network):
    """Objects: one object in the left half, of class 1 if the depth map is bright and of class 0 otherwise."""

    info = NetworkInfo(
        name="halves",
        expert="obj_detection",
        summary="the left half",
        licence="none",
        trained_on="none",
        weights="none",
        side=48,
        keep_aspect=True,
        inputs=("depth",),
    )
    version = "halves-1"
    classes = ["dark thing", "bright thing"]

    @classmethod
    def load(cls, source: str | Path | None = None, device: str | torch.device = "cpu") -> "Halves":
        return cls()

    def predict(self, images: Images, earlier: dict[str, list[ExpertOutput]]) -> list[ExpertOutput]:
        outputs = []
        for i in range(len(images)):
            plane = np.full((images.label_size,) * 2, 255, np.uint8)
            plane[:, : images.label_size // 2] = 0
            bright = "depth" in earlier and earlier["depth"][i].plane.mean() > 127
            outputs.append(ExpertOutput(plane, table={0: int(bright)}, boxes={0: (0.0, 0.0, 0.5, 1.0, 0.9)}))
        return outputs


def random_images(
    side: int, count: int = 2, label_size: int = 32, sizes: list[tuple[int, int]] | None = None
) -> Images:
    """A batch of random pixels; by default the images fill the square."""
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    return Images(pixels, sizes or [(side, side)] * count, label_size)


def predict_alone(network: Network, images: Images, index: int) -> ExpertOutput:
    """The output for one image of a batch when it is the whole batch."""
    part = slice(index, index + 1)
    (output,) = network.predict(Images(images.pixels[part], images.sizes[part], images.label_size), {})
    return output


def assert_same_detections(one: ExpertOutput, other: ExpertOutput) -> None:
    """Compare maps and tables exactly, and boxes up to rounding."""
    np.testing.assert_array_equal(one.plane, other.plane)
    assert one.table == other.table and one.boxes.keys() == other.boxes.keys()
    for i in one.boxes:
        np.testing.assert_allclose(one.boxes[i], other.boxes[i], atol=1e-5)


def assert_alone_equals_together(network: Network, images: Images) -> None:
    """An image alone gets the same intensities as in a batch; a rounding may differ by one."""
    together = network.predict(images, {})
    for i, output in enumerate(together):
        alone = predict_alone(network, images, i)
        assert np.abs(alone.plane.astype(int) - output.plane.astype(int)).max() <= 1
    assert np.abs(together[0].plane.astype(int) - together[1].plane.astype(int)).max() > 1
