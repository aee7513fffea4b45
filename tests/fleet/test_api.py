"""What callers of a running device meet: the right bits, and a 4xx that names every mistake of theirs."""

import asyncio
import json
import signal

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton

from appliance.lab.daemon import Device
from tests.fleet.conftest import MODEL, reads, running, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

INFER = "/v2/models/label-reader/infer"
X = np.zeros((1, 3, 48, 160), np.float32)


def port_of(device: Device) -> int:
    [line] = [line for line in device.unit.log.read_text().splitlines() if '"event": "started"' in line]
    return int(json.loads(line)["port"])


def compare(port: int) -> list[bool]:
    """JSON and binary, three widths: equal to onnxruntime in this process, bit for bit?"""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
    output, same = session.get_outputs()[0].name, []
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    for binary in (True, False):
        for width in (160, 320, 480):
            x = np.random.default_rng(width).random((1, 3, 48, width), dtype=np.float32)
            tensor = triton.InferInput("x", x.shape, "FP32")
            tensor.set_data_from_numpy(x, binary_data=binary)
            wanted = [triton.InferRequestedOutput(output, binary_data=binary)]
            got = client.infer("label-reader", [tensor], outputs=wanted).as_numpy(output)
            expected = session.run(None, {"x": x})[0]
            same.append(np.array_equal(got.reshape(expected.shape), expected))
    client.close()
    return same


async def exchange(port: int, head: str, body: bytes) -> tuple[int, str]:
    """Send one request as it is; return status and error text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    async with asyncio.timeout(10):
        top = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line.split(":")[1]) for line in top.split("\r\n") if line.lower().startswith("content-length"))
        answer = await reader.readexactly(length)
    writer.close()
    return int(top.split()[1]), str(json.loads(answer).get("error", "")) if answer else ""


def request(path: str, body: bytes, *more: str, length: int | None = None) -> str:
    lines = [f"POST {path} HTTP/1.1", "Host: x", *more, f"Content-Length: {len(body) if length is None else length}", "", ""]
    return "\r\n".join(lines)


def tensors(array: np.ndarray, datatype: str = "FP32", **more: object) -> bytes:
    tensor = {"name": "x", "shape": list(array.shape), "datatype": datatype, "data": array.ravel().tolist(), **more}
    return json.dumps({"inputs": [tensor]}).encode()


def mistakes() -> list[tuple[str, bytes, int, str]]:
    """(head, body, status, a word that the error must have)."""
    binary = json.dumps(
        {"inputs": [{"name": "x", "shape": [1, 3, 48, 160], "datatype": "FP32", "parameters": {"binary_data_size": X.nbytes}}]}
    ).encode()
    channels, integers = tensors(np.zeros((1, 1, 48, 160), np.float32)), tensors(X.astype(np.int32), "INT32")
    header = f"Inference-Header-Content-Length: {len(binary)}"
    return [
        (request(INFER, channels), channels, 400, "'x'"),
        (request(INFER, integers), integers, 400, "INT32"),
        (request("/v2/models/none/infer", b"{}"), b"{}", 400, "inputs"),
        (request("/v2/models/none/infer", tensors(X)), tensors(X), 404, "none"),
        (request(INFER, binary + b"\0" * 9, header), binary + b"\0" * 9, 400, "'x'"),
        (request(INFER, b"", length=1 << 30), b"", 413, "bytes"),
        (request(INFER, b"\xff\x00garbage"), b"\xff\x00garbage", 400, "infer request"),
    ]


async def test_triton_gets_the_same_bits_and_mistakes_are_named() -> None:
    """Bit for bit in JSON and in binary; wrong shape, dtype, model, truncated, 1 GiB and garbage are 4xx; serving goes on."""
    async with running() as lab:
        device = lab.devices[0]
        port = port_of(device)
        assert await asyncio.to_thread(compare, port) == [True] * 6
        for head, body, status, word in mistakes():
            seen, text = await exchange(port, head, body)
            assert (seen, word in text) == (status, True), f"{head.splitlines()[0]}: {seen} {text}"
        await until(reads(device, 10), 10)
        assert device.stream.score.failed == 0


async def test_sigterm_answers_what_is_in_flight() -> None:
    """Requests that were taken are answered although the daemon is told to stop; it exits with 0 in under 5 s."""
    async with running(rate_per_s=1.0) as lab:
        device = lab.devices[0]
        port = port_of(device)
        body = tensors(np.zeros((4, 3, 48, 480), np.float32))
        waiting = [asyncio.create_task(exchange(port, request(INFER, body), body)) for _ in range(2)]

        async def running_now() -> bool:
            status = await device.status()
            return status is not None and device.unit.pid is not None and any(not task.done() for task in waiting)

        await until(running_now, 5)
        await asyncio.sleep(0.15)
        assert not all(task.done() for task in waiting), "too fast for this machine: nothing was in flight"
        loop = asyncio.get_running_loop()
        began = loop.time()
        code = await device.unit.stop(timeout_s=5.0)
        assert (code, loop.time() - began < 5) == (0, True)
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]
        assert code != -signal.SIGKILL


async def test_the_same_model_is_served_over_grpc_with_the_same_bits() -> None:
    """Triton's own gRPC client reads metadata and gets onnxruntime's bits; the answer's parameters say mode, route and why."""
    settings = {"serve": {"grpc": True, "grpc_port": 0}}
    async with running(rate_per_s=0.5, settings=settings) as lab:
        [line] = [line for line in lab.devices[0].unit.log.read_text().splitlines() if '"event": "started"' in line]
        port = int(json.loads(line)["grpc_port"])

        def ask() -> tuple[bool, dict[str, str]]:
            client = triton_grpc.InferenceServerClient(f"127.0.0.1:{port}")
            tensor = triton_grpc.InferInput("x", X.shape, "FP32")
            tensor.set_data_from_numpy(X)
            result = client.infer("label-reader", [tensor])
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
            output = session.get_outputs()[0].name
            same = np.array_equal(result.as_numpy(output), session.run(None, {"x": X})[0])
            told = {name: value.string_param for name, value in result.get_response().parameters.items()}
            client.close()
            return same, told

        same, told = await asyncio.to_thread(ask)
        assert same
        assert (told["mode"], told["route"]) == ("A", "edge")
        assert told["why"].startswith("nothing presses")
