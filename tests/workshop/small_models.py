"""Small models for the workshop's tests: one attention in all the forms in which exporters write it, and a small reader of pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from appliance.contract.inference import Array

DEPTH, HEADS = 8, 2
FORMS = ("plain", "key_mask", "where", "where_swapped", "causal", "scaled_queries")


class Net:
    """Collects nodes and weights; names are counted."""

    def __init__(self, seed: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def tensor(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"w{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.tensor(self.rng.standard_normal(shape) / np.sqrt(shape[0]))

    def model(self, inputs: Mapping[str, tuple[int, list[Any]]], outputs: Mapping[str, list[Any]], opset: int = 17) -> Any:
        infos = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
        graph = helper.make_graph(self.nodes, "small", infos, results, self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def attention(form: str = "plain", *, opset: int = 17, longest: int = 64) -> Any:
    """`x` [N, L, DEPTH] to `y` of the same shape by one attention of HEADS heads; `key_mask` and both `where` take `mask` [N, L] int64 as well."""
    net = Net()
    split, join = net.tensor([0, 0, HEADS, DEPTH // HEADS], np.int64), net.tensor([0, 0, DEPTH], np.int64)
    queries, keys, values = (net.op("Reshape", net.op("MatMul", "x", net.weight(DEPTH, DEPTH)), split) for _ in range(3))
    queries, values = (net.op("Transpose", each, perm=[0, 2, 1, 3]) for each in (queries, values))
    keys = net.op("Transpose", keys, perm=[0, 2, 3, 1])
    scale = net.tensor(np.sqrt(DEPTH / HEADS))
    if form == "scaled_queries":
        queries = net.op("Div", queries, scale)
    scores = net.op("MatMul", queries, keys, out="scores")
    if form != "scaled_queries":
        scores = net.op("Div", scores, scale)
    scores = _masked(net, form, scores, longest)
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), values)
    joined = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), join)
    net.op("MatMul", joined, net.weight(DEPTH, DEPTH), out="y")
    inputs = {"x": (TensorProto.FLOAT, ["batch", "length", DEPTH])}
    if form in {"key_mask", "where", "where_swapped"}:
        inputs["mask"] = (TensorProto.INT64, ["batch", "length"])
    return net.model(inputs, {"y": ["batch", "length", DEPTH]}, opset)


def _masked(net: Net, form: str, scores: str, longest: int) -> str:
    if form == "key_mask":
        wide = net.op("Reshape", net.op("Cast", "mask", to=TensorProto.FLOAT), net.tensor([0, 1, 1, -1], np.int64))
        return net.op("Add", net.op("Mul", net.op("Sub", net.tensor(1.0), wide), net.tensor(-10_000.0)), scores)
    if form in {"where", "where_swapped"}:
        wide = net.op("Cast", net.op("Reshape", "mask", net.tensor([0, 1, 1, -1], np.int64)), to=TensorProto.BOOL)
        low = net.tensor(-np.inf)
        return net.op("Where", wide, scores, low) if form == "where" else net.op("Where", net.op("Not", wide), low, scores)
    if form == "causal":
        table = net.tensor(np.triu(np.full((longest, longest), -1e9), 1)[np.newaxis, np.newaxis])
        length = net.op("Slice", net.op("Shape", "x"), net.tensor([1], np.int64), net.tensor([2], np.int64))
        ends = net.op("Concat", length, length, axis=0)
        return net.op("Add", scores, net.op("Slice", table, net.tensor([0, 0], np.int64), ends, net.tensor([2, 3], np.int64)))
    return scores


def reader(classes: int = 6, *, dictionary: str = "a\nb\nc\nd") -> Any:
    """`x` [N, 3, 8, W] to `y` [N, W, classes], a softmax: convolutions, one of them depthwise, then products, the last of them wide."""
    net = Net(3)
    seen = net.op("Relu", net.op("Conv", "x", net.weight(16, 3, 3, 3), pads=[1, 1, 1, 1]))
    seen = net.op("Relu", net.op("Conv", seen, net.weight(16, 1, 3, 3), pads=[1, 1, 1, 1], group=16))
    seen = net.op("Relu", net.op("Conv", seen, net.weight(8, 16, 8, 1)))  # [N, 8, 1, W]
    steps = net.op("Transpose", net.op("Reshape", seen, net.tensor([0, 8, -1], np.int64)), perm=[0, 2, 1], out="steps")
    wide = net.op("Relu", net.op("MatMul", steps, net.weight(8, 256)))
    net.op("Softmax", net.op("MatMul", wide, net.weight(256, classes)), out="y", axis=-1)
    model = net.model({"x": (TensorProto.FLOAT, ["batch", 3, 8, "width"])}, {"y": ["batch", "width", classes]})
    helper.set_model_props(model, {"character": dictionary})
    return model


def sample(length: int, batch: int = 1, *, seed: int = 0, masked: bool = False, form: str = "plain") -> dict[str, Array]:
    """Inputs for `attention`; with `masked`, the last third of each sequence is padding where the form has a mask."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {"x": rng.standard_normal((batch, length, DEPTH)).astype(np.float32)}
    if form in {"key_mask", "where", "where_swapped"}:
        feeds["mask"] = np.ones((batch, length), dtype=np.int64)
        if masked:
            feeds["mask"][:, length - length // 3 :] = 0
    return feeds


def saved(model: Any, path: Path) -> Path:
    """Write a model as an engineer's exporter would."""
    path.write_bytes(model.SerializeToString())
    return path
