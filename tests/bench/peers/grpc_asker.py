"""One caller of a gRPC server of the Open Inference Protocol; the request is encoded once, by hand, and answers are not decoded."""

import asyncio
from collections.abc import Iterator

import grpc
import grpc.aio

from appliance.workshop.load_http import Done, Reply

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT_S = 60.0
REFUSED = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}


def _varint(value: int) -> bytes:
    def parts() -> Iterator[int]:
        left = value
        while left > 127:
            yield left & 127 | 128
            left >>= 7
        yield left

    return bytes(parts())


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def bytes_request(model: str, data: bytes) -> bytes:
    """A ModelInferRequest with one input `x` of one BYTES element."""
    contents = _field(8, data)
    tensor = _field(1, b"x") + _field(2, b"BYTES") + _field(3, _varint(1)) + _field(5, contents)
    return _field(1, model.encode()) + _field(5, tensor)


class Calls:
    """One channel that all callers share."""

    def __init__(self, port: int, payload: bytes) -> None:
        most = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=most)
        self.call = self.channel.unary_unary(METHOD)
        self.payload = payload

    async def once(self) -> bytes:
        """Ask once and return the answer's bytes. Raises: grpc.aio.AioRpcError."""
        answer: bytes = await self.call(self.payload, timeout=TIMEOUT_S)
        return answer


class GrpcAsker:
    """One caller."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._task: asyncio.Task[None] | None = None

    def ask(self, done: Done) -> None:
        """Send the request."""
        self._task = asyncio.get_running_loop().create_task(self._ask(done))

    async def _ask(self, done: Done) -> None:
        try:
            await self._calls.once()
        except grpc.aio.AioRpcError as error:
            done(Reply(503 if error.code() in REFUSED else 500, reason=error.code().name))
        else:
            done(Reply(200))

    def close(self) -> None:
        """Hear no more."""
        if self._task is not None:
            self._task.cancel()
