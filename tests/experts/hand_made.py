"""Graph models and images made by hand for the tests of object experts."""

import base64
import json

import numpy as np
import torch
import torch.nn.functional as F

from prismer.dataloading.experts.network import Images


class Graph:
    """A TensorFlow.js graph model in the making."""

    def __init__(self):
        self.nodes, self.manifest, self.data, self.outputs = [], [], b"", {}

    def const(self, name, value, half=False):
        value = np.asarray(value)
        dtype = "float32" if value.dtype.kind == "f" else "int32"
        entry = {"name": name, "shape": list(value.shape), "dtype": dtype}
        if half:
            entry["quantization"] = {"dtype": "float16", "original_dtype": "float32"}
        self.manifest.append(entry)
        self.data += value.astype("<f2" if half else "<f4" if dtype == "float32" else "<i4").tobytes()
        self.nodes.append({"name": name, "op": "Const", "attr": {"dtype": {"type": "DT_FLOAT"}}})
        return name

    def add(self, op, name, *inputs, **attributes):
        self.nodes.append({"name": name, "op": op, "input": list(inputs), "attr": attributes})
        return name

    def window(self, *sizes, padding="VALID"):
        def text(word):
            return {"s": base64.b64encode(word.encode()).decode()}

        attributes = {"data_format": text("NHWC"), "padding": text(padding)}
        for key, size in zip(("strides", "ksize"), sizes, strict=False):
            attributes[key] = {"list": {"i": ["1", str(size), str(size), "1"]}}
        return attributes

    def write(self, folder, name="model"):
        folder.mkdir(parents=True, exist_ok=True)
        model = {
            "format": "graph-model",
            "signature": {"outputs": {f"{key}:0": {} for key in self.outputs}},
            "modelTopology": {"node": self.nodes},
            "weightsManifest": [{"paths": [f"{name}.bin"], "weights": self.manifest}],
        }
        (folder / f"{name}.json").write_text(json.dumps(model))
        (folder / f"{name}.bin").write_bytes(self.data)
        return folder / f"{name}.json", folder / f"{name}.bin"


def small_graph(rng):
    """Every operation of NanoDet once, and the same in torch."""
    graph = Graph()
    kernel = rng.standard_normal((3, 3, 4, 6)).astype(np.float16)
    bias = rng.standard_normal(6).astype(np.float16)
    # its nodes stand before what they read
    graph.add("Identity", "out", "split:1")
    graph.add("Identity", "out_1", "turned")
    graph.outputs = ("out", "out_1")
    graph.add("Placeholder", "x")
    graph.add("Pad", "padded", "x", graph.const("pads", [[0, 0], [0, 0], [1, 0], [2, 1]]))
    graph.add("PadV2", "lower", "padded", graph.const("pads2", [[0, 0], [0, 0], [0, 1], [0, 0]]), "low")
    graph.const("low", np.float32(-3))
    graph.add("Transpose", "last", "lower", graph.const("perm", [0, 2, 3, 1]))
    graph.const("kernel", kernel.astype(np.float32), half=True)
    graph.add("Conv2D", "conv", "last", "kernel", **graph.window(2))
    graph.add("Add", "biased", "conv", graph.const("bias", bias.astype(np.float32), half=True))
    graph.add("LeakyRelu", "act", "biased", alpha={"f": 0.1})
    graph.add("MaxPool", "pooled", "act", **graph.window(2, 3))
    up = {"align_corners": {"b": False}, "half_pixel_centers": {"b": True}}
    graph.add("ResizeBilinear", "up", "pooled", graph.const("size", [7, 9]), **up)
    graph.add("AddV2", "twice", "up", "up")
    graph.add("ConcatV2", "both", "up", "twice", graph.const("axis", 3))
    graph.add("SplitV", "split", "both", graph.const("parts", [5, 7]), graph.const("axis2", 3))
    graph.add("Sigmoid", "sig", "split")
    graph.const("places", [[1]])
    graph.add("SparseToDense", "dense", "places", graph.const("length", [3]), graph.const("v", [5]), "zero")
    graph.const("zero", 0)
    graph.add("AddV2", "shape", "dense", graph.const("rest", [1, 4, 35]))
    graph.add("Reshape", "flat", "sig", "shape")
    graph.add("Transpose", "turned", "flat", graph.const("perm2", [0, 2, 1]))

    def run(x):
        y = F.pad(F.pad(x, (2, 1, 1, 0)), (0, 0, 0, 1), value=-3.0)
        weight = torch.tensor(kernel.astype(np.float32)).permute(3, 2, 0, 1)
        y = F.leaky_relu(F.conv2d(y, weight, torch.tensor(bias.astype(np.float32)), 2), 0.1)
        y = F.interpolate(F.max_pool2d(y, 3, 2), (7, 9), mode="bilinear")
        y = torch.cat([y, 2 * y], dim=1).permute(0, 2, 3, 1)
        return y[..., 5:], y[..., :5].sigmoid().reshape(len(x), 9, 35).transpose(1, 2)

    return graph, run


def nanodet_graph(seed=0):
    """A graph with NanoDet's input and outputs: on each grid one convolution with random weights."""
    graph, rng = Graph(), np.random.default_rng(seed)
    graph.outputs = ("Identity", *(f"Identity_{i}" for i in range(1, 6)))
    graph.add("Placeholder", "input_1")
    graph.add("Transpose", "last", "input_1", graph.const("to_last", [0, 2, 3, 1]))
    graph.const("to_first", [0, 3, 1, 2])
    graph.const("turn", [0, 2, 1])
    graph.const("axis", 1)
    graph.const("parts", [80, 44])
    for i, stride in enumerate((8, 16, 32)):
        cells = (416 // stride) ** 2
        weight = rng.standard_normal((stride, stride, 3, 124)).astype(np.float32) / stride
        graph.add("Conv2D", f"c{i}", "last", graph.const(f"w{i}", weight, half=True), **graph.window(stride))
        graph.add("Transpose", f"t{i}", f"c{i}", "to_first")
        graph.add("SplitV", f"s{i}", f"t{i}", "parts", "axis")
        graph.add("Sigmoid", f"g{i}", f"s{i}")
        for part, width in (("", 80), (":1", 44)):
            source = f"g{i}" if width == 80 else f"s{i}:1"
            shape = graph.const(f"shape{i}_{width}", [1, width, cells])
            graph.add("Reshape", f"r{i}_{width}", source, shape)
            graph.add("Transpose", f"o{i}_{width}", f"r{i}_{width}", "turn")
            number = i if not part else i + 3
            graph.add("Identity", f"Identity_{number}" if number else "Identity", f"o{i}_{width}")
    return graph


def random_images(count=2, side=416, sizes=None):
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    return Images(pixels, sizes or [(side, side - 16 * i) for i in range(count)], 32)


def same_found(one, other):
    np.testing.assert_array_equal(one.plane, other.plane)
    assert one.instances == other.instances and one.boxes.keys() == other.boxes.keys()
    for i in one.boxes:
        np.testing.assert_allclose(one.boxes[i], other.boxes[i], atol=1e-5)
