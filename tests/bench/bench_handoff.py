"""What the way through a child process costs: microseconds per batch over the same run in this process, at 92 kB, 737 kB and 6 MB.

The model only tells its input's shape, so the run itself costs some 5 us and all else is hand-off: check, copy, two wake-ups, copy back.
Run: `python tests/bench/bench_handoff.py`; writes build/reports/handoff.json. Both ways alternate, so that the machine's moods hit both.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import uvloop
from onnx import TensorProto, helper

from appliance.adapters.inference.workers import Workers
from appliance.contract.inference import Array
from appliance.contract.vocabulary import Platform

REPORT = Path(__file__).parents[2] / "build" / "reports" / "handoff.json"
SHAPES = {"92kB": (1, 3, 48, 160), "737kB": (8, 3, 48, 160), "6MB": (1, 3, 720, 720)}
WARM, CALLS = 100, 2_000


def model() -> bytes:
    """A model that takes any image batch and returns its shape."""
    graph = helper.make_graph(
        [helper.make_node("Shape", ["x"], ["y"])],
        "shape",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [4])],
    )
    content: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return content


def descriptor(content: bytes) -> int:
    """Put a model where the engine takes it from."""
    fd = os.memfd_create("weights", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


async def measure(workers: Workers, session: Any, x: Array) -> tuple[list[float], list[float]]:
    """Seconds per call in a child and in this process, alternating."""
    away, here = [], []
    for call in range(WARM + CALLS):
        started = time.perf_counter()
        await workers.run("shape", {"x": x}, ())
        between = time.perf_counter()
        session.run(None, {"x": x})
        ended = time.perf_counter()
        if call >= WARM:
            away.append(between - started)
            here.append(ended - between)
    return away, here


async def main() -> dict[str, object]:
    """Measure all shapes; figures are microseconds."""
    content = model()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    report: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "loop": "uvloop",
        "onnx": onnx.__version__,
    }
    async with Workers() as workers:
        await workers.load("shape", Platform.ONNX, lambda: descriptor(content))
        for name, shape in SHAPES.items():
            away, here = await measure(workers, session, np.ones(shape, np.float32))
            base = float(np.percentile(here, 50))
            report[f"here_{name}_p50_us"] = round(base * 1e6, 1)
            for quantile in (50, 99):
                report[f"handoff_{name}_p{quantile}_us"] = round((float(np.percentile(away, quantile)) - base) * 1e6, 1)
            report[f"handoff_{name}_min_us"] = round((min(away) - base) * 1e6, 1)
    return report


if __name__ == "__main__":
    figures = uvloop.run(main())
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.write(REPORT.read_text())
