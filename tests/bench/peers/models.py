"""The two models under test and their raw yardstick: onnxruntime in this process, with the session options of the product's worker.

HEAVY is the label reader with the reading done in the graph (ArgMax, Cast), so that an answer is int32 [N, 20] and not 0.5 MB: 92,160 bytes in,
80 out, about 5 ms. LIGHT is a perceptron 784-128-10: 3,136 bytes in, 40 out, about 7 us: what is measured with it is the server, not the model.
"""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from appliance.client.images import tensor_of
from appliance.lab.labels import draw
from appliance.workshop.summary import percentile

WIDTH = 160
SEED = 7
WARM_RUNS = 3


@dataclass(frozen=True)
class Model:
    """A model file, one sample for it, and the bytes of the right answer."""

    name: str
    path: Path
    x: npt.NDArray[np.float32]
    y: bytes


@dataclass(frozen=True)
class Raw:
    """What onnxruntime does alone: samples per second and the median, at batch 1 and 8."""

    b1_per_s: float
    b1_p50_ms: float
    b8_per_s: float
    b8_p50_ms: float


def heavy(source: Path, folder: Path) -> Model:
    """Append the reading to the label reader and fix its width."""
    model = onnx.load(source)
    graph = model.graph
    inner = graph.output[0].name
    graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 48, WIDTH]))
    graph.node.append(helper.make_node("ArgMax", [inner], ["classes"], axis=2, keepdims=0))
    graph.node.append(helper.make_node("Cast", ["classes"], ["y"], to=TensorProto.INT32))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.INT32, ["n", WIDTH // 8]))
    del graph.value_info[:]
    rng = random.Random(SEED)
    x = tensor_of(draw(rng).image)
    while x.shape[3] != WIDTH:
        x = tensor_of(draw(rng).image)
    return _kept("heavy", model, folder, x)


def light(folder: Path) -> Model:
    """Build the perceptron from a seed."""
    rng = np.random.default_rng(SEED)
    weights = {
        name: numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 28, name)
        for name, shape in (("w1", (784, 128)), ("b1", (128,)), ("w2", (128, 10)), ("b2", (10,)))
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["y"]),
        ],
        "light",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 784])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        list(weights.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return _kept("light", model, folder, rng.standard_normal((1, 784)).astype(np.float32))


def _kept(name: str, model: onnx.ModelProto, folder: Path, x: npt.NDArray[np.float32]) -> Model:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return Model(name, path, x, session(path).run(None, {"x": x})[0].tobytes())


def session(path: Path) -> "onnxruntime.InferenceSession":  # noqa: F821 - imported below, after telemetry is off
    """Open a model as the product's worker does."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # on by default, and read at import
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure_raw(model: Model, seconds: float, cpu: int) -> Raw:
    """Run it alone on one processor, half of the time at each batch size. Blocks: call it in a thread, which it binds to that processor."""
    os.sched_setaffinity(0, {cpu})
    bare = session(model.path)
    figures = []
    for batch in (1, 8):
        x = np.repeat(model.x, batch, axis=0)
        for _ in range(WARM_RUNS):
            bare.run(None, {"x": x})
        took: list[float] = []
        end = time.perf_counter() + seconds / 2
        while (began := time.perf_counter()) < end:
            bare.run(None, {"x": x})
            took.append(time.perf_counter() - began)
        figures += [batch * len(took) / sum(took), (percentile(sorted(took), 0.5) or 0.0) * 1e3]
    return Raw(*figures)
