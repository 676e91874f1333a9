"""TensorFlow.js graph models: converted, run on batches, and refused with a sentence where something is unknown.
Run: pytest tests/experts/test_graph_model.py"""

import numpy as np
import pytest
import torch

from prismer.dataloading.experts.graph_model import GraphModel, convert_graph
from tests.experts.hand_made import Graph, small_graph


def test_graph_model(tmp_path):
    graph, run = small_graph(np.random.default_rng(0))
    convert_graph(*graph.write(tmp_path), tmp_path / "a.safetensors")
    convert_graph(*graph.write(tmp_path), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    model = GraphModel(tmp_path / "a.safetensors")
    x = torch.randn(3, 4, 19, 23)
    outputs = model(x)
    assert list(outputs) == ["out", "out_1"]
    for name, expected in zip(outputs, run(x), strict=True):
        torch.testing.assert_close(outputs[name], expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda g: g.nodes[-1].update(op="NonMaxSuppressionV5"), "operation NonMaxSuppressionV5"),
        (lambda g: g.nodes[-1]["input"].__setitem__(1, "sig"), "computes its perm at run time"),
        (lambda g: setattr(g, "data", g.data[:-2]), "ends after"),
        (lambda g: setattr(g, "data", g.data + b"ab"), "table says"),
        (lambda g: g.manifest[0].update(quantization={"dtype": "uint8"}), "stored as uint8"),
        (lambda g: g.nodes[-1]["input"].__setitem__(0, "nowhere"), "broken at turned"),
    ],
)
def test_graph_model_refuses(tmp_path, change, sentence):
    graph, _ = small_graph(np.random.default_rng(0))
    change(graph)
    with pytest.raises(ValueError, match=sentence):
        convert_graph(*graph.write(tmp_path), tmp_path / "a.safetensors")


def test_graph_model_refuses_same_padding(tmp_path):
    graph = Graph()
    graph.add("Placeholder", "x")
    graph.const("kernel", np.zeros((3, 3, 1, 1), np.float32))
    graph.add("Conv2D", "conv", "x", "kernel", **graph.window(1, padding="SAME"))
    graph.outputs = ("conv",)
    with pytest.raises(ValueError, match="NHWC with SAME padding"):
        convert_graph(*graph.write(tmp_path), tmp_path / "a.safetensors")
