"""The local API speaks the Open Inference Protocol to a real client, and every fault of a caller is a 4xx that names it."""

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from appliance.adapters.ingress import Ingress
from appliance.contract.errors import WorldError
from tests.fakes.desk import DoublingDesk

LIMIT = 1 << 20
X = np.array([[0.1, -2.5, 3.0e-8, 7.0]], np.float32)


class Served:
    """A running ingress with its desk."""

    def __init__(self, ingress: Ingress, desk: DoublingDesk, socket: Path) -> None:
        self.ingress = ingress
        self.desk = desk
        self.socket = socket

    async def raw(self, request: bytes, *, unix: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Send bytes as they are and read one answer."""
        opened = asyncio.open_unix_connection(str(self.socket)) if unix else asyncio.open_connection("127.0.0.1", self.ingress.port)
        reader, writer = await opened
        writer.write(request)
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        writer.close()
        return int(lines[0].split()[1]), headers, body

    async def post(self, body: bytes, headers: str = "", path: str = "/v2/models/double/infer") -> tuple[int, dict[str, str], bytes]:
        return await self.raw(f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    desk = DoublingDesk()
    ingress = Ingress(desk, metrics=lambda: b"# nothing\n", status=lambda: {"mode": "A"}, body_limit_bytes=LIMIT)
    await ingress.start("127.0.0.1", 0, folder / "api.sock")
    yield Served(ingress, desk, folder / "api.sock")
    await ingress.close()
    shutil.rmtree(folder)


def request(**changes: Any) -> bytes:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}
    return json.dumps({"inputs": [tensor]}).encode()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_tritons_client_works_unchanged(served: Served, binary: bool, compression: str | None) -> None:
    """Triton's client gets every bit of the answer, in JSON and in binary, compressed or not."""

    def ask() -> tuple[Any, Any, bool]:
        client = triton.InferenceServerClient(f"127.0.0.1:{served.ingress.port}")
        try:
            tensor = triton.InferInput("x", list(X.shape), "FP32")
            tensor.set_data_from_numpy(X, binary_data=binary)
            wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
            reply = client.infer("double", [tensor], outputs=wanted, request_id="7", request_compression_algorithm=compression)
            return reply.as_numpy("y"), reply.get_response(), client.is_model_ready("double") and client.is_server_live()
        finally:
            client.close()

    array, response, ready = await asyncio.to_thread(ask)
    assert np.array_equal(array.reshape(X.shape), X * np.float32(2))
    assert response["model_version"] == "1"
    assert response["parameters"]["mode"] == "A"
    assert ready


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (request(shape=[1, 5]), "input 'x'"),
        (request(shape=[1, 3], data=[1, 2, 3]), "'x'"),
        (request(datatype="INT32"), "FP32"),
        (request(datatype="FLOAT"), "FLOAT"),
        (request(name="z"), "'x' are missing"),
        (request(shape=[-1, 4]), "'x'"),
        (request(shape=[2**40, 2**40]), "'x'"),
        (request(data=["a", 2, 3, 4]), "'x'"),
        (b'{"inputs": []}', "input"),
        (b'{"inputs": 5}', "infer request"),
        (b"\x00\xff garbage", "infer request"),
        (b"[" * 100_000, "infer request"),
        (b"", "infer request"),
    ],
)
async def test_a_callers_fault_is_a_400_that_names_it(served: Served, body: bytes, named: str) -> None:
    """What is wrong stands in the answer, and the next request is served."""
    status, _, answer = await served.post(body)
    assert status == 400
    assert named in json.loads(answer)["error"]
    assert (await served.post(request()))[0] == 200


@pytest.mark.parametrize(
    ("headers", "body", "named"),
    [
        ("Inference-Header-Content-Length: 999\r\n", request(), "the body has"),
        ("Inference-Header-Content-Length: -1\r\n", request(), "Inference-Header-Content-Length"),
        ("Inference-Header-Content-Length: x\r\n", request(), "Inference-Header-Content-Length"),
        ("Content-Encoding: gzip\r\n", b"\x1f\x8bnot gzip", ""),
    ],
)
async def test_a_wrong_frame_is_refused(served: Served, headers: str, body: bytes, named: str) -> None:
    """Header lengths and encodings that do not agree with the body are 400."""
    status, _, answer = await served.post(body, headers)
    assert status == 400
    assert named in json.loads(answer)["error"]


async def test_a_truncated_binary_tensor_is_named(served: Served) -> None:
    """Fewer bytes than the shape takes: the tensor's name and both numbers."""
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
    head = json.dumps({"inputs": [tensor]}).encode()
    status, _, answer = await served.post(head + b"\0" * 8, f"Inference-Header-Content-Length: {len(head)}\r\n")
    assert status == 400
    assert "'x': binary_data_size is 16, the body has 8 bytes left" in json.loads(answer)["error"]


async def test_a_gigabyte_is_refused_before_it_is_read(served: Served) -> None:
    """The declared size is enough: the answer comes though no byte of the body was sent."""
    status, _, answer = await served.raw(b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n")
    assert status == 413
    assert "larger than 1048576 bytes" in json.loads(answer)["error"]


async def test_an_undeclared_size_is_cut_at_the_limit(served: Served) -> None:
    """A chunked body that grows too large is refused while it grows."""
    chunk = b"10000\r\n" + b"a" * 65_536 + b"\r\n"
    head = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with contextlib.suppress(ConnectionError):
        status, _, _ = await served.raw(head + chunk * 20)
        assert status == 413
    assert (await served.post(request()))[0] == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v2/models/none/infer", "POST", 404),
        ("/v2/models/double/versions/9/infer", "POST", 404),
        ("/nothing", "GET", 404),
        ("/v2/health/live", "POST", 405),
    ],
)
async def test_what_is_not_there_is_said(served: Served, path: str, method: str, status: int) -> None:
    """Unknown models, versions, paths and methods: 404 and 405."""
    body = request() if method == "POST" else b""
    seen, _, answer = await served.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert seen == status
    assert json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("reason", "status"),
    [("backlog_full", 429), ("worker_lost", 503), ("draining", 503), ("not_ready", 503), ("deadline", 504), ("disk", 503)],
)
async def test_the_worlds_fault_is_retryable(served: Served, reason: str, status: int) -> None:
    """429 and 503 say when to come back."""
    served.desk.error = WorldError(reason, "it failed", retry_after_s=0.25)
    seen, headers, _ = await served.post(request())
    assert seen == status
    if status in {429, 503}:
        assert headers["retry-after"] == "1"
        assert headers["retry-after-ms"] == "250"


async def test_no_traceback_leaves(served: Served) -> None:
    """What was not foreseen is a 500 with an id, and nothing of the inside."""
    served.desk.error = RuntimeError("secret detail")
    status, _, answer = await served.post(request())
    assert status == 500
    assert b"secret" not in answer
    assert b"Traceback" not in answer


async def test_a_caller_that_hangs_up_cancels_its_request(served: Served) -> None:
    """The desk is told, so that the request can be dropped before it costs anything."""
    served.desk.gate = asyncio.Event()
    _, writer = await asyncio.open_connection("127.0.0.1", served.ingress.port)
    body = request()
    writer.write(f"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await asyncio.wait_for(served.desk.left.wait(), 2)


async def test_drain_answers_what_is_in_flight(served: Served) -> None:
    """On the way down, an admitted request is answered and a new one is not accepted."""
    served.desk.gate = asyncio.Event()
    waiting = asyncio.create_task(served.post(request()))
    await asyncio.sleep(0.1)
    draining = asyncio.create_task(served.ingress.drain(2.0))
    await asyncio.sleep(0.1)
    with pytest.raises(ConnectionRefusedError):
        await served.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    served.desk.gate.set()
    assert (await waiting)[0] == 200
    await asyncio.wait_for(draining, 1.0)


async def test_the_unix_socket_serves_the_same(served: Served) -> None:
    """Both addresses reach the same desk, and the socket is not open to everybody."""
    status, _, body = await served.raw(b"GET /v2/models/double HTTP/1.1\r\nHost: x\r\n\r\n", unix=True)
    assert status == 200
    assert json.loads(body)["parameters"]["character"] == "a\nb"
    assert served.socket.stat().st_mode & 0o777 == 0o660
