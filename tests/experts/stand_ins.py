"""Networks without weights for tests of the engine: their maps are plain functions of the pixels they are given."""

import numpy as np

from prismer.dataloading.experts.network import Card, Found, Images, Network, intensities


class Brightness(Network):
    """Depth: the red channel, so that a test can see which pixels arrived."""

    card = Card(
        name="brightness",
        expert="depth",
        about="the red channel",
        licence="none",
        trained_on="none",
        weights="none",
        side=32,
    )
    version = "brightness-1"

    @classmethod
    def load(cls, source=None, device="cpu"):
        return cls()

    def predict(self, images: Images, known: dict) -> list[Found]:
        return intensities(images.pixels[:, :1].float() / 255, images, "depth")


class Halves(Network):
    """Objects: the left half is a thing of class 0, and of class 1 if the depth that was found is bright."""

    card = Card(
        name="halves",
        expert="obj_detection",
        about="the left half",
        licence="none",
        trained_on="none",
        weights="none",
        side=48,
        keep_aspect=True,
        reads=("depth",),
    )
    version = "halves-1"
    classes = ["dark thing", "bright thing"]

    @classmethod
    def load(cls, source=None, device="cpu"):
        return cls()

    def predict(self, images: Images, known: dict) -> list[Found]:
        found = []
        for i in range(len(images)):
            plane = np.full((images.label_size,) * 2, 255, np.uint8)
            plane[:, : images.label_size // 2] = 0
            bright = "depth" in known and known["depth"][i].plane.mean() > 127
            found.append(Found(plane, instances={0: int(bright)}, boxes={0: (0.0, 0.0, 0.5, 1.0, 0.9)}))
        return found
