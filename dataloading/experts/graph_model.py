"""TensorFlow.js graph models without TensorFlow: converted once into one safetensors file, run by a small torch module.

`convert_graph` reads `model.json` and the weight file beside it (plain or float16), computes what depends on nothing
but constants, and writes the rest: steps as JSON in the header, weights as tensors. `GraphModel` runs the steps. Only
the operations of feed-forward image networks are known; the first axis of every tensor is the batch.
"""

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DTYPES = {"float32": "<f4", "float16": "<f2", "int32": "<i4", "bool": "|b1", "uint8": "|u1"}
# parameters of an operation that are inputs in the file: their place among the inputs, and what they are called here
_SETTINGS = {
    "Pad": {1: "paddings"},
    "PadV2": {1: "paddings", 2: "value"},
    "Transpose": {1: "perm"},
    "Reshape": {1: "shape"},
    "ConcatV2": {-1: "axis"},
    "ResizeBilinear": {1: "size"},
    "SplitV": {1: "sizes", 2: "axis"},
}


def convert_graph(model: Path, weights: Path, out: Path) -> None:
    """Write a graph model as one safetensors file.

    Args:
        model: the JSON file, of format "graph-model".
        weights: the only weight file of its manifest.
        out: the file to write; equal inputs give equal bytes.

    Raises:
        ValueError: if it is another kind of file, the weights are cut short, or an operation or setting is unknown.
    """
    from safetensors.torch import save_file

    described = json.loads(model.read_text())
    if described.get("format") != "graph-model" or len(described["weightsManifest"]) != 1:
        raise ValueError(f"{model.name} is no graph model with one weight file; convert it with TensorFlow.js")
    stored = _read_weights(described["weightsManifest"][0]["weights"], weights)
    nodes = {node["name"]: node for node in described["modelTopology"]["node"]}
    known: dict[str, np.ndarray] = {}
    steps, tensors, inputs = [], {}, []
    for name in _in_order(nodes):
        node = nodes[name]
        op, sources = node["op"], [_tidy(source) for source in node.get("input", [])]
        if op == "Placeholder":
            inputs.append(name)
        elif op == "Const":
            known[name] = stored[name]
        elif op in _CONSTANT and all(source in known for source in sources):
            known[name] = _CONSTANT[op](*(known[source] for source in sources))
        elif op in _OPS:
            steps.append(_step(node, sources, known, tensors))
        else:
            raise ValueError(
                f"{model.name} needs the operation {op}, which is not known here; known are {', '.join(sorted(_OPS))}"
            )
    outputs = [key.split(":")[0] for key in sorted(described["signature"]["outputs"])]
    graph = {"inputs": inputs, "outputs": outputs, "steps": steps}
    save_file(dict(sorted(tensors.items())), out, {"graph": json.dumps(graph)})


class GraphModel(nn.Module):
    """A converted graph, in fp32.

    Args:
        path: a file of `convert_graph`.

    Attributes:
        outputs: names of what `forward` returns.

    Raises:
        ValueError: if the file is something else.
    """

    def __init__(self, path: Path):
        super().__init__()
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                graph = (file.metadata() or {}).get("graph")
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error}); fetch it again") from None
        if graph is None:
            raise ValueError(f"{path} holds weights but no graph; fetch it again")
        graph = json.loads(graph)
        self.inputs, self.outputs, self._steps = graph["inputs"], graph["outputs"], graph["steps"]
        # names of graphs have dots and slashes, which modules may not have
        self._index = {name: f"w{i}" for i, name in enumerate(tensors)}
        for name, tensor in tensors.items():
            self.register_buffer(self._index[name], tensor)
        # intermediate maps are dropped after their last reader
        last = {source: i for i, step in enumerate(self._steps) for source in step["inputs"]}
        self._dead = [[] for _ in self._steps]
        for source, i in last.items():
            if source not in self._index and source not in self.outputs:
                self._dead[i].append(source)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the graph on a batch of any size: (B, ...) in, output name -> (B, ...) out."""
        values = dict(zip(self.inputs, inputs, strict=True))
        for step, dead in zip(self._steps, self._dead, strict=True):
            sources = [
                getattr(self, self._index[name]) if name in self._index else values[name] for name in step["inputs"]
            ]
            result = _OPS[step["op"]](*sources, **step["with"])
            if isinstance(result, tuple):
                for i, part in enumerate(result):
                    values[_tidy(f"{step['name']}:{i}")] = part
            else:
                values[step["name"]] = result
            for name in dead:
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}


def _read_weights(manifest: list[dict], path: Path) -> dict[str, np.ndarray]:
    data, offset, arrays = path.read_bytes(), 0, {}
    for entry in manifest:
        quantised = entry.get("quantization", {}).get("dtype")
        if quantised not in (None, "float16") or entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"the weight {entry['name']} is stored as {quantised or entry['dtype']}; "
                f"convert the model without quantisation or as float16"
            )
        dtype, count = np.dtype(_DTYPES[quantised or entry["dtype"]]), math.prod(entry["shape"])
        end = offset + count * dtype.itemsize
        if end > len(data):
            raise ValueError(f"{path.name} ends after {len(data)} bytes, inside of {entry['name']}; fetch it again")
        arrays[entry["name"]] = np.frombuffer(data, dtype, count, offset).reshape(entry["shape"])
        offset = end
    if offset != len(data):
        raise ValueError(f"{path.name} has {len(data)} bytes, its table says {offset}; fetch it again")
    return arrays


def _tidy(name: str) -> str:
    return name.removesuffix(":0").removeprefix("^")


def _in_order(nodes: dict[str, dict]) -> list[str]:
    """Names of nodes, each after those it reads; files do not promise that."""
    order: dict[str, None] = {}
    for name in nodes:
        waiting = [name]
        while waiting:
            sources = [source.split(":")[0].lstrip("^") for source in nodes[waiting[-1]].get("input", [])]
            missing = [source for source in sources if source not in order]
            if not missing:
                order.setdefault(waiting.pop())
            elif missing[-1] in waiting or missing[-1] not in nodes:
                raise ValueError(f"the graph is broken at {waiting[-1]}; fetch it again")
            else:
                waiting.append(missing[-1])
    return list(order)


def _step(node: dict, sources: list[str], known: dict[str, np.ndarray], tensors: dict) -> dict:
    """One operation with its settings as plain values; constants that it computes with go to `tensors`."""
    op = node["op"]
    settings = _ATTRIBUTES[op](node) if op in _ATTRIBUTES else {}
    taken = {place % len(sources): name for place, name in _SETTINGS.get(op, {}).items()}
    inputs = []
    for i, source in enumerate(sources):
        if i in taken and source not in known:
            raise ValueError(
                f"{node['name']} ({op}) computes its {taken[i]} at run time; only constants are known here"
            )
        if i in taken:
            settings[taken[i]] = known[source].tolist()
            continue
        if source in known:
            array = known[source]
            if op == "Conv2D":
                # (kh, kw, in, out) -> torch's (out, in, kh, kw)
                array = array.transpose(3, 2, 0, 1)
            tensors[source] = torch.tensor(np.ascontiguousarray(array))
        inputs.append(source)
    return {"name": node["name"], "op": op, "inputs": inputs, "with": settings}


def _convolution(node: dict) -> dict:
    dilations = _list(node, "dilations") or [1, 1, 1, 1]
    return {"stride": _window(node)["stride"], "dilation": dilations[1:3]}


def _pooling(node: dict) -> dict:
    return {"kernel": _list(node, "ksize")[1:3], **_window(node)}


def _window(node: dict) -> dict:
    layout, padding = (_text(node, key, default) for key, default in (("data_format", "NHWC"), ("padding", "?")))
    if (layout, padding) != ("NHWC", "VALID"):
        raise ValueError(
            f"{node['name']} ({node['op']}) is {layout} with {padding} padding; only NHWC with VALID is known here"
        )
    return {"stride": _list(node, "strides")[1:3]}


def _resize(node: dict) -> dict:
    attributes = node["attr"]
    aligned, half = (attributes.get(key, {}).get("b", False) for key in ("align_corners", "half_pixel_centers"))
    if aligned == half:
        raise ValueError(
            f"{node['name']} (ResizeBilinear) has neither aligned corners nor half-pixel centres: not known here"
        )
    return {"align_corners": aligned}


def _text(node: dict, key: str, default: str) -> str:
    stored = node["attr"].get(key, {}).get("s")
    return base64.b64decode(stored).decode() if stored else default


def _list(node: dict, key: str) -> list[int]:
    return [int(i) for i in node["attr"].get(key, {}).get("list", {}).get("i", [])]


def _leaky(node: dict) -> dict:
    return {"alpha": node["attr"].get("alpha", {}).get("f", 0.2)}


def _sparse_to_dense(places, shape, values, default) -> np.ndarray:
    dense = np.full(shape, default, dtype=np.int64)
    dense[tuple(places.T)] = values
    return dense


def _conv2d(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    # (B, h, w, C) is what torch calls channels-last: the permutations move nothing
    x = x.permute(0, 3, 1, 2)
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, None, stride, 0, dilation, groups).permute(0, 2, 3, 1)


def _pad(x: Tensor, paddings: list[list[int]], value: float = 0.0) -> Tensor:
    return F.pad(x, [n for pair in reversed(paddings) for n in pair], value=value)


def _max_pool(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel, stride).permute(0, 2, 3, 1)


def _bilinear(x: Tensor, size: list[int], align_corners: bool) -> Tensor:
    y = F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=align_corners)
    return y.permute(0, 2, 3, 1)


_CONSTANT: dict[str, Callable] = {"SparseToDense": _sparse_to_dense, "AddV2": np.add, "Identity": np.array}
_ATTRIBUTES: dict[str, Callable[[dict], dict]] = {
    "Conv2D": _convolution,
    "LeakyRelu": _leaky,
    "MaxPool": _pooling,
    "ResizeBilinear": _resize,
}
_OPS: dict[str, Callable] = {
    "Add": torch.add,
    "AddV2": torch.add,
    "ConcatV2": lambda *parts, axis: torch.cat(parts, axis),
    "Conv2D": _conv2d,
    "Identity": lambda x: x,
    "LeakyRelu": lambda x, alpha: F.leaky_relu(x, alpha),
    "MaxPool": _max_pool,
    "Pad": _pad,
    "PadV2": _pad,
    # graphs are written for one image
    "Reshape": lambda x, shape: x.reshape(x.shape[0], *shape[1:]),
    "ResizeBilinear": _bilinear,
    "Sigmoid": torch.sigmoid,
    "SplitV": lambda x, sizes, axis: x.split(sizes, axis),
    "Transpose": lambda x, perm: x.permute(perm),
}
