"""What the way through a child process costs: microseconds per batch over the same run in this process, at 92 kB, 737 kB and 6 MB.

1. `handoff_*`: the model only tells its input's shape, so the run costs some 10 us and all else is hand-off: check, copy, two wake-ups, copy back.
2. `frame_*`: a camera's frame (1080p, uint8, 6.2 MB), once copied in and once read where it lies in a caller's shared memory; the model takes
   every 64th pixel of it. `whole_*` is the same with a model that reads every pixel (the largest value).

Run: `python tests/bench/bench_handoff.py`; writes build/reports/handoff.json. The ways alternate, so that the machine's moods hit all.
"""

import fcntl
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
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
FRAME = (1080, 1920, 3)
WARM, CALLS = 100, 2_000


def model(operator: str, kinds: tuple[int, int], shapes: tuple[list[int | str], list[int]], *constants: list[int]) -> bytes:
    """A model of one operator, whose further inputs are the constants."""
    names = [f"c{number}" for number in range(len(constants))]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *names], ["y"], **({"keepdims": 0} if operator == "ReduceMax" else {}))],
        operator,
        [helper.make_tensor_value_info("x", kinds[0], shapes[0])],
        [helper.make_tensor_value_info("y", kinds[1], shapes[1])],
        [helper.make_tensor(name, TensorProto.INT64, [len(one)], one) for name, one in zip(names, constants, strict=True)],
    )
    content: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return content


def session(content: bytes) -> Any:
    """The same model in this process."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def descriptor(content: bytes) -> int:
    """Put a model where the engine takes it from."""
    fd = os.memfd_create("weights", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


async def measure(workers: Workers, key: str, here: Any, arrays: Sequence[Array]) -> list[list[float]]:
    """Seconds per call: first in this process, then in a child with each of the arrays; alternating."""
    times: list[list[float]] = [[] for _ in range(1 + len(arrays))]
    for call in range(WARM + CALLS):
        took = []
        started = time.perf_counter()
        here.run(None, {"x": arrays[-1]})
        took.append(time.perf_counter() - started)
        for array in arrays:
            started = time.perf_counter()
            await workers.run(key, {"x": array}, ())
            took.append(time.perf_counter() - started)
        if call >= WARM:
            for series, one in zip(times, took, strict=True):
                series.append(one)
    return times


def figures(name: str, base: Sequence[float], away: Sequence[float]) -> dict[str, float]:
    """Microseconds over the same run in this process."""
    middle = float(np.percentile(base, 50))
    return {
        f"{name}_p50_us": round((float(np.percentile(away, 50)) - middle) * 1e6, 1),
        f"{name}_p99_us": round((float(np.percentile(away, 99)) - middle) * 1e6, 1),
        f"{name}_min_us": round((min(away) - middle) * 1e6, 1),
    }


def frames(workers: Workers) -> tuple[Array, Array]:
    """The same frame twice: in this process's memory, and in memory that a caller shares."""
    own = np.random.default_rng(7).integers(0, 255, FRAME, np.uint8)
    fd = os.memfd_create("frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, own.nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    lent = np.frombuffer(workers.share(fd, own.nbytes).memory, np.uint8).reshape(FRAME)
    os.close(fd)
    np.copyto(lent, own)
    return own, lent


def models() -> dict[str, bytes]:
    """The models by key."""
    byte = (TensorProto.UINT8, TensorProto.UINT8)
    sparse = [-(-side // step) for side, step in zip(FRAME, (8, 8, 1), strict=True)]
    return {
        "shape": model("Shape", (TensorProto.FLOAT, TensorProto.INT64), (["n", 3, "h", "w"], [4])),
        "frame": model("Slice", byte, (list(FRAME), sparse), [0, 0, 0], list(FRAME), [0, 1, 2], [8, 8, 1]),
        "whole": model("ReduceMax", byte, (list(FRAME), [])),
    }


async def main() -> dict[str, object]:
    """Measure all shapes."""
    report: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "loop": "uvloop",
        "onnx": onnx.__version__,
    }
    contents = models()
    async with Workers() as workers:
        for key, content in contents.items():
            await workers.load(key, Platform.ONNX, functools.partial(descriptor, content))
        for name, axes in SHAPES.items():
            here, away = await measure(workers, "shape", session(contents["shape"]), [np.ones(axes, np.float32)])
            report[f"here_{name}_p50_us"] = round(float(np.percentile(here, 50)) * 1e6, 1)
            report |= figures(f"handoff_{name}", here, away)
        pair = frames(workers)
        for key in ("frame", "whole"):
            here, copied, shared = await measure(workers, key, session(contents[key]), pair)
            report[f"here_{key}_p50_us"] = round(float(np.percentile(here, 50)) * 1e6, 1)
            report |= figures(f"{key}_copied", here, copied) | figures(f"{key}_shared", here, shared)
            report[f"{key}_shared_over_copied"] = round(float(np.percentile(shared, 50) / np.percentile(copied, 50)), 3)
    return report


if __name__ == "__main__":
    result = uvloop.run(main())
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(REPORT.read_text())
