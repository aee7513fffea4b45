"""The local API speaks the Open Inference Protocol to a real client, and every fault of a caller is a 4xx that names it."""

import asyncio
import contextlib
import gzip
import json
import shutil
import socket as sockets
import tempfile
import threading
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.utils as triton_utils
import uvloop
from structlog.testing import capture_logs

from appliance.adapters.ingress import Bounds, Ingress
from appliance.adapters.ingress.body import Intake
from appliance.adapters.ingress.paths import Place, resolve
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.inference import Promise
from appliance.contract.vocabulary import Outcome
from tests.fakes.desk import DoublingDesk

LIMIT = 1 << 20
BOUNDS = Bounds(bodies_bytes=2 * LIMIT, connections=8, header_timeout_s=0.3, body_timeout_s=0.3, linger_s=0.2, close_s=0.2)
INFER = "POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\n"
X = np.array([[0.1, -2.5, 3.0e-8, 7.0]], np.float32)


class Served:
    """A running ingress with its desk, and what it told of requests that never reached the desk."""

    def __init__(self, ingress: Ingress, desk: DoublingDesk, socket: Path, refused: list[tuple[str, Outcome]]) -> None:
        self.ingress = ingress
        self.desk = desk
        self.socket = socket
        self.refused = refused

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect."""
        return await asyncio.open_connection("127.0.0.1", self.ingress.port)

    async def raw(self, request: bytes, *, unix: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Send bytes as they are and read one answer."""
        reader, writer = await (asyncio.open_unix_connection(str(self.socket)) if unix else self.open())
        writer.write(request)
        try:
            return await read_answer(reader)
        finally:
            writer.close()

    async def post(self, body: bytes, headers: str = "", path: str = "/v2/models/double/infer") -> tuple[int, dict[str, str], bytes]:
        return await self.raw(f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read one answer: status, headers in lower case, body."""
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(lines[0].split()[1]), headers, body


@contextlib.asynccontextmanager
async def running(*, promises: bool = False, **options: Any) -> AsyncIterator[Served]:
    """A served desk on both addresses."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    desk = DoublingDesk()
    refused: list[tuple[str, Outcome]] = []
    ingress = Ingress(
        desk,
        metrics=lambda: b"# nothing\n",
        status=lambda: {"mode": "A"},
        body_limit_bytes=LIMIT,
        bounds=BOUNDS,
        counter=desk if promises else None,
        refused=lambda model, outcome: refused.append((model, outcome)),
        **options,
    )
    await ingress.start("127.0.0.1", 0, folder / "api.sock")
    try:
        yield Served(ingress, desk, folder / "api.sock", refused)
    finally:
        await ingress.close()
        shutil.rmtree(folder)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with running() as served:
        yield served


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
    [("backlog_full", 429), ("worker_lost", 503), ("draining", 503), ("not_ready", 503), ("deadline", 503), ("disk", 503)],
)
async def test_the_worlds_fault_is_retryable(served: Served, reason: str, status: int) -> None:
    """429 and 503 say when to come back."""
    served.desk.error = WorldError(reason, "it failed", retry_after_s=0.25)
    seen, headers, _ = await served.post(request())
    assert seen == status
    if status in {429, 503}:
        assert headers["retry-after"] == "1"
        assert headers["retry-after-ms"] == "250"


async def test_a_time_that_ran_out_is_told_from_one_that_never_sufficed(served: Served) -> None:
    """A deadline refused on arrival has a hint and is 503; one that passed while the request waited has none and is 504."""
    served.desk.error = WorldError("deadline", "too late")
    status, headers, _ = await served.post(request())
    assert (status, "retry-after" in headers) == (504, False)


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


async def test_drain_waits_for_a_caller_who_reads_slowly(served: Served) -> None:
    """An answer of megabytes that was begun reaches its caller whole, though the daemon is told to stop in its middle."""
    ingress = Ingress(served.desk, metrics=lambda: bytes(16 << 20), status=dict)
    await ingress.start("127.0.0.1", 0, None)
    with sockets.socket() as sock:
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4_096)
        sock.connect(("127.0.0.1", ingress.port))
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(ingress.drain(5.0))
        await asyncio.sleep(0.1)
        assert not draining.done()
        status, _, body = await read_answer(reader)
        assert (status, len(body)) == (200, 16 << 20)
        await asyncio.wait_for(draining, 1.0)
        writer.close()
        await writer.wait_closed()
    await ingress.close()


async def test_the_unix_socket_serves_the_same(served: Served) -> None:
    """Both addresses reach the same desk, and the socket is not open to everybody."""
    status, _, body = await served.raw(b"GET /v2/models/double HTTP/1.1\r\nHost: x\r\n\r\n", unix=True)
    assert status == 200
    assert json.loads(body)["parameters"]["character"] == "a\nb"
    assert served.socket.stat().st_mode & 0o777 == 0o660


def chunked(body: bytes, headers: str = "") -> bytes:
    """An infer request whose body comes as one chunk, its size undeclared."""
    return f"{INFER}{headers}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


async def test_a_gigabyte_that_comes_anyway_is_cut_off(served: Served) -> None:
    """The refusal can be read while the rest is thrown away, and after a moment the connection is gone."""
    reader, writer = await served.open()
    writer.write(f"{INFER}Content-Length: 1073741824\r\n\r\n".encode())
    began = time.monotonic()
    status, headers, _ = await read_answer(reader)
    assert (status, headers["connection"]) == (413, "close")
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 5:
            writer.write(bytes(1024))
            await writer.drain()
            await asyncio.sleep(0.01)
    assert time.monotonic() - began < 2
    writer.close()


async def test_a_json_part_that_is_too_large_is_413(served: Served) -> None:
    """The status is the same whichever of the two limits is met."""
    big = Ingress(served.desk, metrics=bytes, status=dict, body_limit_bytes=64 << 20)
    await big.start("127.0.0.1", 0, None)
    try:
        status, _, answer = await Served(big, served.desk, served.socket, []).post(b" " * (17 << 20))
    finally:
        await big.close()
    assert status == 413
    assert "binary_data_size" in json.loads(answer)["error"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00garbage\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /v2 HTTP/9.9\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nA: " + b"a" * 20_000 + b"\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_refused_in_json_and_unlogged(served: Served, garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Anybody can send garbage at any rate: it is answered with a 400 that closes, and costs no line in the log."""
    status, _, answer = await served.raw(garbage)
    assert status == 400
    assert json.loads(answer)["error"].startswith("not a readable HTTP request")
    assert caplog.records == []
    assert (await served.post(request()))[0] == 200


async def test_broken_chunks_are_refused(served: Served) -> None:
    """Framing that breaks in the middle of a body is the caller's fault, and nothing is logged."""
    with capture_logs() as logs:
        status, _, answer = await served.raw(f"{INFER}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode())
    assert status == 400
    assert json.loads(answer)["reason"] == "malformed"
    assert logs == []


async def test_headers_that_trickle_are_cut_off(served: Served) -> None:
    """A byte now and then does not hold a connection (slowloris); the next caller is served."""
    reader, writer = await served.open()
    began = time.monotonic()
    writer.write(b"GET /v2 HTTP/1.1\r\n")
    answer = asyncio.create_task(read_answer(reader))
    while not answer.done() and time.monotonic() - began < 3:
        await asyncio.sleep(0.05)
        writer.write(b"a")
    status, _, body = await answer
    assert (status, json.loads(body)["reason"]) == (408, "timeout")
    assert 0.2 < time.monotonic() - began < 1.5
    writer.close()
    assert (await served.post(request()))[0] == 200


async def test_headers_in_pieces_are_served_in_time(served: Served) -> None:
    """The clock runs for headers only: a slow start, then a request, then a long wait for its answer, are all fine."""
    served.desk.gate = asyncio.Event()
    reader, writer = await served.open()
    head = f"{INFER}Content-Length: {len(request())}\r\n\r\n".encode()
    writer.write(head[:20])
    await asyncio.sleep(0.1)
    writer.write(head[20:] + request())
    await asyncio.sleep(0.5)
    served.desk.gate.set()
    assert (await read_answer(reader))[0] == 200
    writer.write(head + request())
    assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_a_body_that_does_not_come_is_a_408(served: Served) -> None:
    """A body that is announced and not sent is given up, and says how much of it came."""
    status, headers, answer = await served.raw(f"{INFER}Content-Length: 100\r\n\r\n12345".encode())
    assert (status, headers["connection"]) == (408, "close")
    assert "within 0.3 s; 5 bytes did" in json.loads(answer)["error"]
    assert served.refused == [("double", Outcome.MALFORMED)]


async def test_too_many_connections_are_turned_away(served: Served) -> None:
    """One more than the bound is told to come back, and may as soon as another has left."""
    held = [await served.open() for _ in range(BOUNDS.connections)]
    await asyncio.sleep(0.05)
    status, headers, answer = await served.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, headers["retry-after"], json.loads(answer)["reason"]) == (503, "1", "backlog_full")
    held.pop()[1].close()
    await asyncio.sleep(0.05)
    assert (await served.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
    for _, writer in held:
        writer.close()


def test_the_daemons_own_loop_keeps_the_bounds() -> None:
    """uvloop, on which the daemon runs, has transports of its own: the bounds hold there too."""

    async def scenes() -> None:
        for scene in (
            test_too_many_connections_are_turned_away,
            test_headers_that_trickle_are_cut_off,
            test_a_gigabyte_that_comes_anyway_is_cut_off,
            test_the_unix_socket_serves_the_same,
            test_a_hung_desk_does_not_hold_the_shutdown,
        ):
            async with running() as served:
                await scene(served)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenes())


async def test_all_bodies_together_are_bounded(served: Served) -> None:
    """What waits for its answer counts; the request too many is told when to come back, and room returns with the answers."""
    served.desk.gate = asyncio.Event()
    pad = b" " * (LIMIT - len(request()))
    waiting = [asyncio.create_task(served.post(request() + pad)) for _ in range(2)]
    await asyncio.sleep(0.2)
    status, headers, _ = await served.post(request())
    assert (status, headers["retry-after"]) == (429, "1")
    assert served.refused == [("double", Outcome.BACKLOG_FULL)]
    served.desk.gate.set()
    assert [(await each)[0] for each in waiting] == [200, 200]
    assert (await served.post(request() + pad))[0] == 200


@pytest.mark.parametrize("way", ["cut", "gone", "bomb", "late"])
async def test_no_bytes_are_lost_from_the_reserve(served: Served, way: str) -> None:
    """However a request ends, its bytes come back: after many of them the largest body still fits."""
    for _ in range(3):
        reader, writer = await served.open()
        if way == "cut":
            writer.write(chunked(bytes(LIMIT + 1)))
        elif way == "gone":
            writer.write(f"{INFER}Content-Length: {LIMIT}\r\n\r\n".encode() + bytes(LIMIT - 1))
        elif way == "late":
            writer.write(f"{INFER}Content-Length: 9\r\n\r\n12345".encode())
        else:
            body = gzip.compress(bytes(4 * LIMIT))
            writer.write(f"{INFER}Content-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        if way == "gone":
            await asyncio.sleep(0.1)
        else:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                assert (await read_answer(reader))[0] in {408, 413}
        writer.close()
    await asyncio.sleep(0.1)
    assert served.ingress._intake._reserve.free == 2 * LIMIT
    assert (await served.post(request()))[0] == 200


async def test_inflating_does_not_stop_the_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that takes long to inflate does so beside the loop; a small one is not worth a thread."""
    inflated, where = Intake._inflated, []

    def slowly(self: Intake, body: bytes, encoding: str) -> bytearray:
        where.append(threading.current_thread() is threading.main_thread())
        return inflated(self, body, encoding)

    monkeypatch.setattr(Intake, "_inflated", slowly)
    rng = np.random.default_rng(7)
    large = request()[:-1] + b', "pad": "' + rng.bytes(20_000).hex().encode() + b'"}'
    for body in (request(), large):
        assert (await served.post(gzip.compress(body), "Content-Encoding: gzip\r\n"))[0] == 200
    assert where == [True, False]


async def test_a_refusal_before_the_body_does_not_start_the_headers_clock(served: Served) -> None:
    """The rest of a refused body is not taken for the slow headers of a next request."""
    reader, writer = await served.open()
    writer.write(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
    assert (await read_answer(reader))[0] == 404
    writer.write(bytes(50))
    await asyncio.sleep(0.05)
    writer.write(bytes(50))
    await asyncio.sleep(BOUNDS.header_timeout_s + 0.2)
    writer.write(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await read_answer(reader))[0] == 200
    writer.close()


@pytest.mark.parametrize(
    ("encoding", "body", "status", "named"),
    [
        ("gzip", gzip.compress(request()), 200, ""),
        ("GZIP", gzip.compress(request()), 200, ""),
        ("deflate", zlib.compress(request() + b" " * 200_000), 200, ""),
        ("gzip", gzip.compress(request())[:-9], 400, "cut short"),
        ("gzip", gzip.compress(request()) + b"more", 400, "more bytes follow"),
        ("gzip", gzip.compress(bytes(LIMIT + 1)), 413, "when inflated"),
        ("deflate", request(), 400, "not deflate"),
        ("br", request(), 415, "use gzip, deflate or none"),
        ("gzip, gzip", request(), 415, "'gzip, gzip' is not supported"),
    ],
)
async def test_compressed_bodies_are_inflated_within_the_limit(served: Served, encoding: str, body: bytes, status: int, named: str) -> None:
    """gzip and deflate as Triton's client sends them; what is cut, overlong, too large or unknown is told apart."""
    seen, _, answer = await served.post(body, f"Content-Encoding: {encoding}\r\n")
    assert seen == status
    assert named in json.loads(answer).get("error", "")


async def test_a_chunked_request_is_served(served: Served) -> None:
    """A size that is not declared is no fault while it stays below the limit."""
    assert (await served.raw(chunked(request())))[0] == 200


async def test_a_careful_caller_is_told_to_continue(served: Served) -> None:
    """`Expect: 100-continue` is answered at once, so that curl does not wait a second before each larger body."""
    reader, writer = await served.open()
    writer.write(f"{INFER}Expect: 100-continue\r\nContent-Length: {len(request())}\r\n\r\n".encode())
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 0.3) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(request())
    assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_a_refused_caller_keeps_its_connection(served: Served) -> None:
    """A 4xx of a body that was read costs no reconnect."""
    reader, writer = await served.open()
    for body, status in ((b"garbage", 400), (request(), 200), (request(shape=[9]), 400), (request(), 200)):
        writer.write(f"{INFER}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert (await read_answer(reader))[0] == status
    writer.close()


async def test_what_never_reached_the_desk_is_told(served: Served) -> None:
    """Refusals of the ingress are counted by the desk's own model names: a caller's text never becomes a label."""
    await served.post(b"garbage")
    await served.post(b"garbage", path="/v2/models/thought-up/infer")
    await served.post(request())
    await served.post(request(shape=[2, 2]))  # the desk's own refusal, which the desk counts
    assert served.refused == [("double", Outcome.MALFORMED), ("-", Outcome.MALFORMED)]


async def test_our_own_fault_says_nothing_of_the_inside(served: Served) -> None:
    """A broken invariant is a 500 like any other surprise, logged once under the id that the caller gets."""
    served.desk.error = OursError("output", "secret detail")
    with capture_logs() as logs:
        status, _, answer = await served.post(request())
    assert status == 500
    assert b"secret" not in answer
    assert [entry["event"] for entry in logs] == ["request_failed"]
    assert logs[0]["id"] in json.loads(answer)["error"]


async def test_a_hung_desk_does_not_hold_the_shutdown(served: Served) -> None:
    """Drain ends at its bound and close soon after, though an answer never came; the caller sees its connection end."""
    served.desk.gate = asyncio.Event()
    waiting = asyncio.create_task(served.post(request()))
    await asyncio.sleep(0.1)
    began = time.monotonic()
    await served.ingress.drain(0.2)
    await served.ingress.close()
    assert 0.2 <= time.monotonic() - began < 1.5
    assert served.desk.left.is_set()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await waiting


async def test_while_draining_callers_are_sent_away_after_their_answer(served: Served) -> None:
    """A kept connection is closed with its next answer, so that nobody relies on a process that ends."""
    reader, writer = await served.open()
    writer.write(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert "connection" not in (await read_answer(reader))[1]
    await served.ingress.drain(1.0)
    writer.write(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await read_answer(reader))[1]["connection"] == "close"
    writer.close()


async def test_a_dead_processs_socket_is_replaced_and_a_living_ones_is_not(served: Served) -> None:
    """A socket file without a listener is what a crash left; one with a listener, or another kind of file, is somebody's."""
    folder = served.socket.parent
    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(folder / "dead"))
    (folder / "precious").write_text("mine")
    other = Ingress(served.desk, metrics=bytes, status=dict)
    await other.start("127.0.0.1", 0, folder / "dead")
    for path, why in ((served.socket, "another process serves it"), (folder / "precious", "not a socket"), (folder / ("a" * 120), "107")):
        with pytest.raises(WorldError, match=why):
            await other.start("127.0.0.1", 0, path)
    await other.close()
    assert (folder / "precious").read_text() == "mine"
    assert not (folder / "dead").exists()
    assert (await served.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", unix=True))[0] == 200


async def test_a_taken_port_is_named(served: Served) -> None:
    """The error says which address, and what to do."""
    with pytest.raises(WorldError, match=rf"127.0.0.1:{served.ingress.port}: cannot listen.*\[serve\]"):
        await Ingress(served.desk, metrics=bytes, status=dict).start("127.0.0.1", served.ingress.port, None)


def changing(change: str, body: bytes = b"", headers: str = "", model: str = "double") -> bytes:
    """A request to load or unload a model."""
    head = f"POST /v2/repository/models/{model}/{change} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_models_are_changed_through_the_unix_socket(served: Served) -> None:
    """Whom the file's permissions let in may unload and load a model; metadata say so there, and the index follows."""
    assert "model_repository" in json.loads((await served.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", unix=True))[2])["extensions"]
    unload = changing("unload", b'{"parameters": {"unload_dependents": false}}')
    assert (await served.raw(unload, unix=True))[0] == 200
    assert (await served.raw(b"GET /v2/models/double/ready HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 503
    index = {"name": "double", "version": "1", "state": "UNAVAILABLE", "reason": "it is not loaded"}
    for body, rows in ((b"", [index]), (b'{"ready": false}', [index]), (b'{"ready": true}', [])):
        assert json.loads((await served.post(body, path="/v2/repository/index"))[2]) == rows
    assert (await served.post(b'{"ready": "maybe"}', path="/v2/repository/index"))[0] == 400
    assert (await served.raw(changing("load", b"{}"), unix=True))[0] == 200
    assert (await served.raw(changing("load", model="none"), unix=True))[0] == 404
    assert served.desk.changes == [("unload", "double"), ("load", "double")]
    assert len(json.loads((await served.post(b'{"ready": true}', path="/v2/repository/index"))[2])) == 1


@pytest.mark.parametrize("change", ["load", "unload"])
@pytest.mark.parametrize(("repository", "tcp", "unix"), [("socket", 403, 200), ("everywhere", 200, 200), ("nowhere", 403, 403)])
async def test_only_an_open_listener_changes_models(change: str, repository: str, tcp: int, unix: int) -> None:
    """The setting and the listener decide before anything is read, and a refusal says where it may be done."""
    async with running(repository=repository) as served:
        for way, expected in ((False, tcp), (True, unix)):
            served.desk.changes.clear()
            status, _, body = await served.raw(changing(change), unix=way)
            assert status == expected
            assert served.desk.changes == ([(change, "double")] if expected == 200 else [])
            if expected == 403:
                assert ("use the Unix socket" if repository == "socket" else "serve.repository") in json.loads(body)["error"]
                assert json.loads(body)["reason"] == "forbidden"
            extensions = json.loads((await served.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", unix=way))[2])["extensions"]
            assert ("model_repository" in extensions) == (expected == 200)


async def test_a_web_page_changes_no_models() -> None:
    """A page in a browser on this machine can reach loopback, but not without naming itself."""
    async with running(repository="everywhere") as served:
        status, _, body = await served.raw(changing("unload", headers="Origin: http://evil.example\r\n"))
        assert status == 403
        assert "web page" in json.loads(body)["error"]
        assert served.desk.changes == []


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"parameters": {"config": "{}"}}', "'config' would replace what was released"),
        (b'{"parameters": {"file:1/model.onnx": "aGVsbG8="}}', "'file:1/model.onnx'"),
        (b'{"parameters": 5}', "load request"),
        (b"[" * 100_000, "load request"),
        (b"\xff", "load request"),
    ],
)
async def test_a_load_never_brings_its_own_files(served: Served, body: bytes, named: str) -> None:
    """Triton's overrides would serve what nobody signed: they are refused, and nothing is loaded."""
    status, _, answer = await served.raw(changing("load", body), unix=True)
    assert status == 400
    assert named in json.loads(answer)["error"]
    assert served.desk.changes == []


async def test_tritons_client_loads_and_unloads() -> None:
    """Where it is open, Triton's client changes what is served."""
    async with running(repository="everywhere") as served:

        def ask() -> None:
            client = triton.InferenceServerClient(f"127.0.0.1:{served.ingress.port}")
            try:
                client.unload_model("double")
                assert not client.is_model_ready("double")
                client.load_model("double")
                assert client.is_model_ready("double")
                assert client.get_model_repository_index()[0]["state"] == "READY"
                with pytest.raises(triton_utils.InferenceServerException, match="would replace"):
                    client.load_model("double", config="{}")
            finally:
                client.close()

        await asyncio.to_thread(ask)


async def test_a_load_that_fails_says_why(served: Served) -> None:
    """What the desk says of it is the answer."""
    served.desk.error = WorldError("memory", "it needs 900 MiB, 300 are free", where="double", remedy="unload another model")
    status, headers, body = await served.raw(changing("load"), unix=True)
    assert (status, headers["retry-after"]) == (503, "1")
    assert "900 MiB" in json.loads(body)["error"]


async def test_a_promise_is_made_and_kept() -> None:
    """Who accepts deferral may get 202 and an id; what is fetched by it is the promise again, the answer, or why there will be none."""
    desk = DoublingDesk()
    desk.promise = Promise("p/1", "no route", 2.5)
    ingress = Ingress(desk, metrics=bytes, status=dict, counter=desk)
    await ingress.start("127.0.0.1", 0, None)
    served = Served(ingress, desk, Path(), [])
    fetch = b"GET /v2/deferred/p%2F1 HTTP/1.1\r\nHost: x\r\n\r\n"
    try:
        assert (await served.post(request()))[0] == 200
        for seen in (await served.post(request()[:-1] + b', "parameters": {"accept_deferral": true}}'), await served.raw(fetch)):
            assert (seen[0], seen[1]["retry-after"], seen[1]["retry-after-ms"]) == (202, "3", "2500")
            assert json.loads(seen[2]) == {"id": "p/1", "why": "no route"}
        desk.promise = None
        status, headers, body = await served.raw(fetch)
        assert (status, body[int(headers["inference-header-content-length"]) :]) == (200, np.ones(4, np.float16).tobytes())
        for error, expected in ((WorldError("dropped", "too old"), 410), (TheirsError("unknown_promise", "nothing is known of it"), 404)):
            desk.error = error
            assert (await served.raw(fetch))[0] == expected
    finally:
        await ingress.close()


async def test_without_a_counter_nothing_is_promised(served: Served) -> None:
    """A device that makes no promises knows none."""
    status, _, body = await served.raw(b"GET /v2/deferred/p HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, json.loads(body)["reason"]) == (404, "unknown_promise")


async def test_callers_are_told_apart(served: Served) -> None:
    """Requests of one connection have one caller, those of another another, for the backlog's fairness."""
    reader, writer = await served.open()
    for _ in range(2):
        writer.write(f"{INFER}Content-Length: {len(request())}\r\n\r\n".encode() + request())
        assert (await read_answer(reader))[0] == 200
    await served.post(request())
    writer.close()
    first, again, another = (each.caller for each in served.desk.asked)
    assert first == again != another


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("/v2", Place("server", "GET")),
        ("/v2/", Place("server", "GET")),
        ("/metrics?x=1", Place("metrics", "GET")),
        ("/v2/models/a%2Fb%20c/infer", Place("infer", "POST", "a/b c")),
        ("/v2/models/m/versions/3", Place("model", "GET", "m", "3")),
        ("/v2/models/m/versions/3/ready", Place("model_ready", "GET", "m", "3")),
        ("/v2/models/versions/infer", Place("infer", "POST", "versions")),
        ("/v2/repository/models/a%2Fb/load", Place("load", "POST", "a/b")),
        ("/v2/repository/models/m/unload/", Place("unload", "POST", "m")),
        ("/v2/repository/models/m/remove", None),
        ("/v2/repository/models//load", None),
        ("/v2/models/m/infer/more", None),
        ("/v2/models//infer", None),
        ("/v2/models/m/versions", None),
        ("/v2/models/m/versions/3/4", None),
        ("/v2/models", None),
        ("//v2", None),
        ("", None),
        ("/v2/models/\udc80/infer", None),
    ],
)
def test_addresses_mean_what_the_protocol_says(target: str, place: Place | None) -> None:
    """Models and versions are taken from the path, escapes undone; what is not in the protocol is nothing."""
    assert resolve(target) == place


async def test_the_rest_of_the_protocol_answers(served: Served) -> None:
    """Metadata, index, metrics, status and readiness, each in its words; HEAD wherever GET is."""

    async def get(path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        return await served.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    assert json.loads((await get("/v2"))[2])["extensions"] == ["binary_tensor_data", "parameters"]
    assert json.loads((await get("/v2/repository/index", "POST"))[2]) == [
        {"name": "double", "version": "1", "state": "READY", "reason": ""}
    ]
    status, headers, body = await get("/metrics")
    assert (status, headers["content-type"], body) == (200, "text/plain; version=0.0.4; charset=utf-8", b"# nothing\n")
    assert json.loads((await get("/status"))[2]) == {"mode": "A"}
    assert (await get("/v2/models/double/versions/1"))[0] == 200
    assert (await served.raw(b"HEAD /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
    status, headers, _ = await get("/v2/models/double/infer")
    assert (status, headers["allow"]) == (405, "POST")
    served.desk.is_ready = False
    status, headers, body = await get("/v2/health/ready")
    assert (status, headers["retry-after"], json.loads(body)["error"]) == (503, "1", "no model yet")


@pytest.mark.parametrize("what", ["retry", "drop"])
async def test_an_operator_has_a_say_in_a_promise_only_where_the_repository_is_open(what: str) -> None:
    """`retry` and `drop` reach the queue through the Unix socket, and are forbidden on TCP like load and unload."""
    target = f"POST /v2/deferred/abc%2F1/{what} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
    async with running(promises=True) as served:
        assert (await served.raw(target))[0] == 403
        assert served.desk.operated == []
        assert (await served.raw(target, unix=True))[0] == 200
        assert served.desk.operated == [(what, "abc/1")]
