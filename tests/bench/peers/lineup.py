"""The peers: how each is started on one processor, asked, checked against the right answer, and stopped without a trace."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peers.grpc_asker import Calls, GrpcAsker, bytes_request
from peers.models import Model

from appliance.lab.ports import free_port
from appliance.workshop.bench_tree import Tree
from appliance.workshop.load import Opens
from appliance.workshop.load_http import HttpAsker, address, infer_request, request

HERE = Path(__file__).parent
VENVS = HERE.parents[2] / "build" / "peers"
READY_S, STOP_S = 40.0, 4.0
OCTETS = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Peer:
    """One competitor. `command` takes the folder of its environment's programs, the model's path and a port; `payload` gives its request.

    `bounded`: another configuration of one that is measured whole; only what it is there for is measured, overload.
    """

    name: str
    venv: str
    command: Callable[[Path, Path, int], list[str]]
    payload: Callable[[Model], bytes]
    environment: Mapping[str, str] = field(default_factory=dict)
    grpc: bool = False
    bounded: bool = False
    says: str = ""

    @property
    def programs(self) -> Path:
        """Where its environment's programs are."""
        return VENVS / self.venv / "bin"


@dataclass(frozen=True)
class Running:
    """A peer that answers. `equal`: whether its answer has the bytes of onnxruntime's."""

    opens: Opens
    tree: Tree
    start_s: float
    equal: bool


def _script(name: str) -> Callable[[Path, Path, int], list[str]]:
    return lambda programs, model, port: [str(programs / "python"), str(HERE / name), str(model), str(port)]


def _mlserver(programs: Path, model: Path, port: int) -> list[str]:
    folder = VENVS / "mlserver-run"
    folder.mkdir(parents=True, exist_ok=True)
    ports = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    server = {"host": "127.0.0.1", **ports, "parallel_workers": 1, "debug": False, "metrics_endpoint": None}
    (folder / "settings.json").write_text(json.dumps(server))
    card = {"name": "peer", "implementation": "mlserver_model.Peer", "max_batch_size": 8, "max_batch_time": 0.01}
    (folder / "model-settings.json").write_text(json.dumps({**card, "parameters": {"uri": str(model)}}))
    return [str(programs / "mlserver"), "start", str(folder)]


def _bentoml(programs: Path, _model: Path, port: int) -> list[str]:
    return [
        str(programs / "bentoml"),
        "serve",
        "bentoml_service:Peer",
        "--working-dir",
        str(HERE),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]


def _raw(path: str) -> Callable[[Model], bytes]:
    return lambda model: request(path, model.x.tobytes(), OCTETS)


def _base64(model: Model) -> bytes:
    body = json.dumps({"x": [base64.b64encode(model.x.tobytes()).decode()]}).encode()
    return request("/infer", body, {"Content-Type": "application/json"})


PEERS = (
    Peer("aiohttp", "aiohttp", _script("aiohttp_batcher.py"), _raw("/"), says="the batcher of about fifty lines, 10 ms fill wait"),
    Peer("aiohttp_bounded", "aiohttp", _script("aiohttp_batcher.py"), _raw("/"), {"EAGER": "1", "QMAX": "16"}, bounded=True, says="no wait, queue of 16"),
    Peer(
        "pytriton", "pytriton", _script("pytriton_server.py"), lambda model: infer_request("peer", {"x": model.x}),
        # a Python that was not built by the distribution must not meet the distribution's libpython
        {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or "", "PYTRITON_HOME": str(VENVS / "pytriton-home")}, says="HTTP, 10 ms",
    ),
    Peer("mlserver", "mlserver", _mlserver, lambda model: bytes_request("peer", model.x.tobytes()), {"PYTHONPATH": str(HERE)}, grpc=True,
         says="gRPC, one BYTES element, 10 ms"),
    Peer("litserve", "litserve", _script("litserve_server.py"), _raw("/predict"), says="raw bytes, 10 ms"),
    Peer("bentoml", "bentoml", _bentoml, _base64, says="base64 in JSON, no bound"),
    Peer("bentoml_bounded", "bentoml", _bentoml, _base64, {"LATENCY_MS": "150"}, bounded=True, says="max_latency_ms = 150"),
)  # fmt: skip


@contextlib.asynccontextmanager
async def running(peer: Peer, model: Model, cpu: int) -> AsyncIterator[Running]:
    """Start a peer on one processor and wait for its first answer. Raises: RuntimeError with the end of its log."""
    port = free_port()
    log = VENVS / f"{peer.name}-{model.name}.log"
    quiet = {"ORT_DISABLE_TELEMETRY": "1", "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(VENVS / "bentoml-home")}
    own = {**quiet, **peer.environment, "MODEL": str(model.path), "PATH": f"{peer.programs}:{os.environ['PATH']}"}
    began = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: ASYNC220 - starting takes a millisecond
            ["taskset", "-c", str(cpu), *peer.command(peer.programs, model.path, port)],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env={**os.environ, **own}, start_new_session=True, cwd=VENVS,
        )  # fmt: skip
    tree = Tree(process.pid)
    calls = Calls(port + 1, peer.payload(model)) if peer.grpc else None
    try:
        answer = await _first(peer, model, port, calls, process=process, log=log)
        start_s = time.perf_counter() - began
        equal = model.y in answer or base64.b64encode(model.y) in answer
        opens = _opens(peer, model, port, calls)
        yield Running(opens, tree, round(start_s, 2), equal)
    finally:
        if calls is not None:
            await calls.channel.close()
        await asyncio.to_thread(_stop, process, tree)


def _opens(peer: Peer, model: Model, port: int, calls: Calls | None) -> Opens:
    payload, where = peer.payload(model), address(f"http://127.0.0.1:{port}")
    return (lambda: HttpAsker(where, payload)) if calls is None else (lambda: GrpcAsker(calls))


async def _first(peer: Peer, model: Model, port: int, calls: Calls | None, *, process: "subprocess.Popen[bytes]", log: Path) -> bytes:
    problem = ""
    for _ in range(int(READY_S / 0.1)):
        if process.poll() is not None:
            break
        try:
            return await calls.once() if calls is not None else await asyncio.to_thread(_post, peer.payload(model), port)
        except Exception as error:  # noqa: BLE001 - whatever a server that is starting does to a client
            problem = f"{type(error).__name__}: {error}"
        await asyncio.sleep(0.1)
    tail = (await asyncio.to_thread(log.read_text, errors="replace"))[-600:]
    raise RuntimeError(f"no answer within {READY_S:g} s (exit code {process.poll()}): {problem}\n{tail}")


def _post(payload: bytes, port: int) -> bytes:
    head, _, body = payload.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{first.split()[1]}", body, headers)
    with urllib.request.urlopen(asked, timeout=10) as response:  # noqa: S310 - our own loopback address
        found: bytes = response.read()
        return found


def _stop(process: "subprocess.Popen[bytes]", tree: Tree) -> None:
    """SIGTERM to the group, then SIGKILL to whoever is left, and no shared memory stays behind."""
    pids = tree.pids()
    left = {name for pid in pids for name in _shared(pid)}
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    for name in left:
        Path(name).unlink(missing_ok=True)


def _shared(pid: int) -> set[str]:
    """The named shared memory that a process has mapped."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and "(deleted)" not in line}  # noqa: S108 - theirs
    return set()
