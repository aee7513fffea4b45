"""What the way of a large frame to the model costs: in shared memory, and in the body, beside a request of 64 bytes; microseconds per call.

Client, daemon and inference child are three processes, as in life. The desk answers at once (`desk`), or hands the frame to a child whose model only
tells its shape (`child`): so all of the time is transport. The frame's bytes are written by its producer before; that is measured apart.
`floor` is 16 bytes to the same process and back over a bare Unix socket: what this machine, as busy as it is now, takes for two wake-ups.
Run: `python tests/bench/bench_frames.py`; writes build/reports/frames.json. All ways alternate, so that the machine's moods hit all.
Against a running daemon: `--server unix:/run/appliance/api.sock --model NAME --input NAME --shape 1,3,48,160`.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper

from appliance.adapters.inference.workers import Workers
from appliance.adapters.ingress import Ingress
from appliance.client.aio import AsyncAppliance
from appliance.client.sync import Appliance, Frame
from appliance.contract.frames import SOCKET
from appliance.contract.inference import Answer, Request, Signature, TensorSpec
from appliance.contract.vocabulary import Datatype, Mode, Platform
from appliance.ports import ModelCard

REPORT = Path(__file__).parents[2] / "build" / "reports" / "frames.json"
FRAME = (1, 1080, 1920, 3)
SMALL = (1, 4, 4, 4)
WARM, CALLS = 50, 1_000
BOUND_US = 200.0


def model() -> int:
    """A memfd with a model that takes any uint8 image batch and returns its shape."""
    graph = helper.make_graph(
        [helper.make_node("Shape", ["x"], ["y"])],
        "shape",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", "h", "w", "c"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [4])],
    )
    fd = os.memfd_create("weights", os.MFD_CLOEXEC)
    os.write(fd, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
    return fd


class ShapeDesk:
    """Two models: `desk` answers at once, `child` asks the engine."""

    def __init__(self, engine: Workers) -> None:
        self._engine = engine

    def live(self) -> bool:
        return True

    ready = live

    def why_not_ready(self) -> str:
        return ""

    def models(self) -> Sequence[str]:
        return ("desk", "child")

    def describe(self, model: str, _version: str) -> ModelCard:
        specs = (TensorSpec("x", Datatype.UINT8, (-1, -1, -1, -1)),), (TensorSpec("y", Datatype.INT64, (4,)),)
        return ModelCard(model, ("1",), Signature(Platform.ONNX, *specs), ready=True, max_batch=8)

    async def load(self, model: str) -> None:
        raise NotImplementedError(model)

    unload = load

    async def infer(self, request: Request) -> Answer:
        array = request.inputs["x"]
        outputs: Any = {"y": np.array(array.shape)} if request.model == "desk" else await self._engine.run("shape", request.inputs, ())
        return Answer(request.id, request.model, "1", outputs, Mode.FULL)


class Echo(asyncio.Protocol):
    """The floor: gives back what it gets."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


async def serve(folder: Path) -> None:
    """Be the daemon until stdin ends."""
    async with Workers() as engine:
        await engine.load("shape", Platform.ONNX, model)
        ingress = Ingress(ShapeDesk(engine), metrics=lambda: b"", status=dict, share=engine.share)
        await ingress.start("127.0.0.1", 0, folder / "api.sock", folder / SOCKET)
        await asyncio.get_running_loop().create_unix_server(Echo, str(folder / "echo"))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
        await ingress.close()


def cpu_s(pid: int) -> float:
    """Processor seconds of a process and its children so far."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(cpu_s(int(child)) for child in children)


class Bench:
    """Calls of several ways, in turns."""

    def __init__(self, ways: dict[str, Any]) -> None:
        self.ways = ways
        self.seconds: dict[str, list[float]] = {name: [] for name in ways}

    def run(self, calls: int) -> None:
        for call in range(WARM + calls):
            for name, ask in self.ways.items():
                started = time.perf_counter()
                ask()
                if call >= WARM:
                    self.seconds[name].append(time.perf_counter() - started)

    async def run_async(self, calls: int) -> None:
        for call in range(WARM + calls):
            for name, ask in self.ways.items():
                started = time.perf_counter()
                await ask()
                if call >= WARM:
                    self.seconds[name].append(time.perf_counter() - started)

    def told(self, prefix: str = "") -> dict[str, float]:
        figures = {}
        for name, seconds in self.seconds.items():
            for label, value in (("p50", np.percentile(seconds, 50)), ("p99", np.percentile(seconds, 99)), ("min", min(seconds))):
                figures[f"{prefix}{name}_{label}_us"] = round(float(value) * 1e6, 1)
        return figures


def ways_of(client: Any, model: str, name: str, frame: Frame, small: Frame) -> dict[str, Any]:
    """A frame by region, the same in the body, and what a small request costs."""
    body = frame.array.copy()
    return {
        f"{model}_region": partial(client.infer, model, {name: frame}),
        f"{model}_body": partial(client.infer, model, {name: body}),
        f"{model}_small": partial(client.infer, model, {name: small.array.copy()}),
    }


def echoed(echo: socket.socket) -> None:
    echo.sendall(bytes(16))
    echo.recv(16)


def by_cpu(pid: int, ask: Any, calls: int) -> float:
    """Processor microseconds per call, of client, daemon and child together."""
    before = cpu_s(pid) + time.process_time()
    for _ in range(calls):
        ask()
    return round((cpu_s(pid) + time.process_time() - before) / calls * 1e6, 1)


def produced_us(frame: Frame) -> float:
    """What it costs the producer to write a whole frame from memory that he has."""
    source = np.ones(FRAME, np.uint8)
    spent = []
    for _ in range(200):
        started = time.perf_counter()
        np.copyto(frame.array, source)
        spent.append(time.perf_counter() - started)
    return round(float(np.percentile(spent, 50)) * 1e6, 1)


async def asynchronously(server: str, frame: Frame, small: Frame, calls: int) -> dict[str, float]:
    async with AsyncAppliance(server) as client:
        bench = Bench({name: ask for name, ask in ways_of(client, "desk", "x", frame, small).items() if not name.endswith("body")})
        await bench.run_async(calls)
        return bench.told("async_")


def measured(server: str, pid: int, calls: int, echo: socket.socket) -> dict[str, float]:
    """All figures of our own daemon; the bodies come last, for they wash everything else out of the caches."""
    with Appliance(server) as client, Frame(FRAME, np.uint8) as frame, Frame(SMALL, np.uint8) as small:
        figures = {"frame_bytes": float(frame.nbytes), "produce_p50_us": produced_us(frame)}
        for model in ("desk", "child"):
            ways = ways_of(client, model, "x", frame, small)
            bodies = Bench({name: ask for name, ask in ways.items() if name.endswith("body")})
            bench = Bench({f"{model}_floor": partial(echoed, echo)} | {name: ask for name, ask in ways.items() if name not in bodies.ways})
            bench.run(calls)
            bodies.run(calls // 4)
            figures |= bench.told() | bodies.told()
            for way in ("region", "body"):
                figures[f"{model}_{way}_cpu_us"] = by_cpu(pid, ways[f"{model}_{way}"], calls)
            figures[f"{model}_body_over_region"] = round(figures[f"{model}_body_p50_us"] / figures[f"{model}_region_p50_us"], 1)
            figures[f"{model}_region_over_small"] = round(figures[f"{model}_region_p50_us"] / figures[f"{model}_small_p50_us"], 2)
        return figures | uvloop.run(asynchronously(server, frame, small, calls))


def own(calls: int) -> dict[str, float]:
    """Start a daemon of our own, measure, and end it."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    daemon = subprocess.Popen([sys.executable, __file__, "--serve", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "ready\n", "the daemon did not start"
        with socket.socket(socket.AF_UNIX) as echo:
            echo.connect(str(folder / "echo"))
            return measured(f"unix:{folder / 'api.sock'}", daemon.pid, calls, echo)
    finally:
        daemon.communicate()
        shutil.rmtree(folder)


def theirs(server: str, model: str, name: str, shape: tuple[int, ...], calls: int) -> dict[str, float]:
    """A running daemon and one of its models: region against body."""
    with Appliance(server) as client:
        spec = next(each for each in client.metadata(model)["inputs"] if each["name"] == name)
        dtype = {"FP32": np.float32, "FP16": np.float16, "UINT8": np.uint8, "INT8": np.int8}[spec["datatype"]]
        with Frame(shape, dtype) as frame:
            frame.array[...] = 0
            body = frame.array.copy()
            bench = Bench({"region": partial(client.infer, model, {name: frame}), "body": partial(client.infer, model, {name: body})})
            bench.run(calls)
            saved = bench.told()
            return saved | {"frame_bytes": float(frame.nbytes), "saved_p50_us": round(saved["body_p50_us"] - saved["region_p50_us"], 1)}


def main() -> int:
    """Measure and write the report; fails if the way of a frame to the child takes longer than its bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--server", help="a running daemon: unix:/path or http://host:port")
    parser.add_argument("--model", default="", help="with --server: the model to ask")
    parser.add_argument("--input", default="x", help="with --server: the name of its input")
    parser.add_argument("--shape", default="1,3,48,160", help="with --server: the input's shape")
    parser.add_argument("--calls", type=int, default=CALLS)
    asked = parser.parse_args()
    if asked.serve is not None:
        uvloop.run(serve(asked.serve))
        return 0
    if asked.server:
        shape = tuple(int(part) for part in asked.shape.split(","))
        figures = theirs(asked.server, asked.model, asked.input, shape, asked.calls)
        sys.stdout.write(json.dumps(figures, indent=1) + "\n")
        return 0
    figures = own(asked.calls)
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} processors", "loop": "uvloop", "onnx": onnx.__version__}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(machine | figures | {"bound_us": BOUND_US}, indent=1) + "\n")
    sys.stdout.write(REPORT.read_text())
    return int(figures["child_region_p50_us"] > BOUND_US)


if __name__ == "__main__":
    sys.exit(main())
