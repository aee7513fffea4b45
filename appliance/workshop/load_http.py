"""HTTP/1.1 as cheaply as a load generator needs it: prebuilt request bytes, one request at a time on a connection that stays open.

1. TCP (`http://host:port`) or a Unix socket (`unix:/path`). A connection is opened when it is first needed, and again after it broke.
2. A request whose connection breaks is lost (`Reply.status` 0) and is not sent again: the caller counts it.
3. Of an answer are read: status, `Retry-After-Ms` or `Retry-After`, `Connection: close`, and what an appliance says of the mode or the reason.
   Bodies are delimited by `Content-Length` or by chunks; anything else is a lost answer.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import quote, urlsplit

from appliance.contract.errors import TheirsError
from appliance.contract.inference import DATATYPES, Array

HTTP_OK = 200
LONGEST_HINT_S = 3600.0
CONNECT_PAUSE_S = 0.002
CONNECT_ATTEMPTS = 500
"""A Unix socket whose backlog is full refuses at once, where TCP would wait: ask again for up to a second."""
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: *(\d+)")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_HINT = re.compile(rb"\r\nretry-after(-ms)?: *(\d+(?:\.\d+)?) *(?=\r\n|$)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_CHUNK = re.compile(rb"([0-9A-Fa-f]+)[^\r\n]*\r\n")
_REASON = re.compile(rb'"reason": ?"(\w+)"')
_MODE = re.compile(rb'"mode": ?"(\w)"')
_MODE_WITHIN = 512
"""The mode stands in the JSON that begins an appliance's answer; bytes beyond are not searched."""


class Reply(NamedTuple):
    """What came back. `status` 0: nothing did. `reason` says why it is no answer. `retry_after_s`: the hint of a refusal, None without one."""

    status: int
    retry_after_s: float | None = None
    mode: str = ""
    reason: str = ""


Done = Callable[[Reply], None]
_PLAIN = Reply(HTTP_OK)
_MODES = {mode.encode(): Reply(HTTP_OK, mode=mode) for mode in "ABCD"}


def request(path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, *, method: str = "POST") -> bytes:
    """Build the bytes of one request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: bench", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join((*lines, "", "")).encode() + body


def infer_request(model: str, inputs: Mapping[str, Array], parameters: Mapping[str, Any] | None = None) -> bytes:
    """Build an infer request of the Open Inference Protocol, all tensors in binary. Raises: TheirsError (`datatype`)."""
    tensors, parts = [], []
    for name, array in inputs.items():
        datatype = DATATYPES.get(array.dtype.newbyteorder("="))
        if datatype is None:
            raise TheirsError("datatype", f"arrays of {array.dtype} cannot be sent, only {', '.join(DATATYPES.values())}", where=name)
        parts.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        size = {"binary_data_size": len(parts[-1])}
        tensors.append({"name": name, "shape": list(array.shape), "datatype": datatype, "parameters": size})
    head = json.dumps({"inputs": tensors, "parameters": {**(parameters or {}), "binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return request(f"/v2/models/{quote(model, safe='')}/infer", b"".join((head, *parts)), headers)


class Address(NamedTuple):
    """Where a server listens: a Unix socket's path, or host and port."""

    path: str = ""
    host: str = ""
    port: int = 0


def address(server: str) -> Address:
    """Read `http://host:port` or `unix:/path`. Raises: TheirsError (`server`)."""
    if server.startswith("unix:"):
        return Address(path=server.removeprefix("unix:"))
    try:
        parts = urlsplit(server)
        if parts.scheme == "http" and parts.hostname:
            return Address(host=parts.hostname, port=parts.port or 80)
    except ValueError:  # a port or an IPv6 address that is none
        pass
    raise TheirsError("server", f"{server!r} is no address", remedy="write http://host:port or unix:/path")


class HttpAsker(asyncio.Protocol):
    """One caller's connection; at most one request is under way."""

    def __init__(self, where: Address, payload: bytes) -> None:
        self._where = where
        self._payload = payload
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._needed = 0
        self._done: Done | None = None
        self._opening: asyncio.Task[None] | None = None

    def ask(self, done: Done) -> None:
        """Send the request; `done` is called once, later, never from within."""
        self._done = done
        if self._transport is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
        else:
            self._transport.write(self._payload)

    def close(self) -> None:
        """Close the connection; what is under way is answered by nobody."""
        self._done = None
        if self._opening is not None:
            self._opening.cancel()
        self._leave()

    async def _open(self) -> None:
        loop, where = asyncio.get_running_loop(), self._where
        reason = ""
        for _ in range(CONNECT_ATTEMPTS):
            try:
                if where.path:
                    await loop.create_unix_connection(lambda: self, where.path)
                else:
                    await loop.create_connection(lambda: self, where.host, where.port)
            except BlockingIOError:
                reason = "the server's backlog stays full"
                await asyncio.sleep(CONNECT_PAUSE_S)
                continue
            except OSError as error:
                reason = f"unreachable: {error.strerror or error}"
            else:
                reason = ""
            break
        if reason or self._transport is None:
            self._end(Reply(0, reason=reason or "closed at once"))
        else:
            self._transport.write(self._payload)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are transports in all but their class
        self._buffer, self._needed = b"", 0

    def connection_lost(self, _error: BaseException | None) -> None:
        """A request that was under way is lost."""
        self._transport = None
        self._end(Reply(0, reason="connection lost"))

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer."""
        if self._buffer:
            data = self._buffer + data
        if len(data) < self._needed:
            self._buffer = data
            return
        split = data.find(b"\r\n\r\n")
        if split < 0:
            self._buffer = data
            return
        end = _end_of_body(data, split)
        if end is None or len(data) < end:
            self._buffer, self._needed = data, end or 0
            return
        self._buffer, self._needed = b"", 0
        if end < 0 or len(data) > end:
            self._leave()
            self._end(Reply(0, reason="the answer's length is not what it says"))
            return
        self._end(self._read(data, split))

    def _read(self, data: bytes, split: int) -> Reply:
        status = int(data[9:12]) if data[9:12].isdigit() else 0
        if _CLOSE.search(data, 0, split):
            self._leave()
        if status == HTTP_OK:
            found = _MODE.search(data, split, split + _MODE_WITHIN)
            return _MODES.get(found[1], _PLAIN) if found else _PLAIN
        said = _REASON.search(data, split)
        reason = f"{status} {said[1].decode()}" if said else str(status)
        return Reply(status, _hint_s(data[:split]), reason=reason if status else "not HTTP")

    def _leave(self) -> None:
        """Let go of the connection; its end must not be taken for the next one's."""
        if self._transport is not None:
            self._transport.set_protocol(asyncio.Protocol())
            self._transport.abort()
            self._transport = None

    def _end(self, reply: Reply) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(reply)


def _end_of_body(data: bytes, split: int) -> int | None:
    """Where the answer ends; None if that is not known yet, -1 if it never will be."""
    found = _LENGTH.search(data, 0, split)
    if found:
        return split + 4 + int(found[1])
    if not _CHUNKED.search(data, 0, split):
        return -1
    place = split + 4
    while True:
        chunk = _CHUNK.match(data, place)
        if chunk is None:
            return None
        size = int(chunk[1], 16)
        place = chunk.end() + size + 2
        if not size:
            return place


def _hint_s(head: bytes) -> float | None:
    """Our milliseconds if given, else `Retry-After` in seconds; a date, which no server of this protocol sends, counts as no hint."""
    seconds = None
    for found in _HINT.finditer(head):
        value = float(found[2]) * (1e-3 if found[1] else 1.0)
        if found[1] or seconds is None:
            seconds = min(value, LONGEST_HINT_S)
        if found[1]:
            break
    return seconds
