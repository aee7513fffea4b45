"""A small synchronous client: the Open Inference Protocol v2 over HTTP, on TCP or on a Unix socket, tensors in binary.

Errors are those of the appliance: `TheirsError` for what the caller did wrong, `WorldError` with reason `busy` (and `retry_after_s`) where asking
again helps, `unreachable` where nobody answers. An answer that breaks the protocol is a `TheirsError` (`malformed`): no other exception
escapes. One connection, kept open; not for several threads at once.
"""

import http.client
import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import DATATYPES, DTYPES, Array
from appliance.contract.openinference import HEADER_LENGTH
from appliance.contract.vocabulary import Datatype

TIMEOUT_S = 30.0
RETRYABLE = {429, 503}
HTTP_OK = 200
HTTP_SERVER_FAULT = 500
DEFAULT_RETRY_S = 1.0
LONGEST_RETRY_S = 3600.0
MAX_ANSWER_BYTES = 256 * 1024 * 1024
"""A whole answer is held in memory; a batch of 8 label readings is 13 MB."""


class _Output(msgspec.Struct):
    name: str
    datatype: Datatype
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)


class _Answer(msgspec.Struct):
    outputs: list[_Output]
    model_version: str = ""
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(frozen=True, slots=True)
class Result:
    """What came back: outputs by name, who made them, and in which mode."""

    outputs: Mapping[str, Array]
    model_version: str
    mode: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Appliance:
    """The appliance at `http://host:port` or `unix:/path/of/the/socket`."""

    def __init__(self, server: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._server = server
        if server.startswith("unix:"):
            self._connection: http.client.HTTPConnection = _UnixConnection(server.removeprefix("unix:"), timeout_s)
            return
        try:
            parts = urlsplit(server)
            host, port = parts.hostname if parts.scheme == "http" else None, parts.port or 80
        except ValueError:  # a port or an IPv6 address that is none
            host, port = None, 0
        if not host:
            raise TheirsError("server", f"{server!r} is no address", remedy="write http://host:port or unix:/path")
        self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)

    def __enter__(self) -> Self:
        """Nothing is opened until the first call."""
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; a later call opens it again."""
        self._connection.close()

    def ready(self) -> bool:
        """Whether requests are taken. Raises: WorldError (`unreachable`)."""
        return self._exchange("GET", "/v2/health/ready", b"", {})[0] == HTTP_OK

    def metadata(self, model: str) -> dict[str, Any]:
        """What the model takes and gives, and what its file says of itself (`parameters`). Raises: TheirsError, WorldError."""
        status, headers, body = self._exchange("GET", f"/v2/models/{quote(model, safe='')}", b"", {})
        self._check(status, headers, body)
        try:
            return msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise TheirsError("malformed", f"the model's metadata: {error}", where=self._server) from error

    def infer(self, model: str, inputs: Mapping[str, Array], *, parameters: Mapping[str, Any] | None = None) -> Result:
        """Ask for all outputs. `inputs` are arrays whose axis 0 is the batch.

        Raises: TheirsError (the server's text), WorldError (`busy`, `unreachable`, `failed`).
        """
        tensors, parts = [], []
        for name, array in inputs.items():
            datatype = DATATYPES.get(array.dtype.newbyteorder("="))
            if datatype is None:
                raise TheirsError("datatype", f"arrays of {array.dtype} cannot be sent, only {', '.join(DATATYPES.values())}", where=name)
            raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            parts.append(raw)
            tensors.append({"name": name, "shape": list(array.shape), "datatype": datatype, "parameters": {"binary_data_size": len(raw)}})
        head = json.dumps({"inputs": tensors, "parameters": {**(parameters or {}), "binary_data_output": True}}).encode()
        sent = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
        status, headers, body = self._exchange("POST", f"/v2/models/{quote(model, safe='')}/infer", b"".join((head, *parts)), sent)
        self._check(status, headers, body)
        try:
            return _result(body, headers.get(HEADER_LENGTH.lower()))
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError) as error:
            raise TheirsError("malformed", f"the answer: {error}", where=self._server) from error

    def _exchange(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        try:
            self._connection.request(method, path, body=body or None, headers=headers)
            response = self._connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            answer = _whole(response)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise WorldError("unreachable", f"no answer: {error}", where=self._server, remedy="is the daemon running?") from error
        return response.status, found, answer

    def _check(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if status == HTTP_OK:
            return
        try:
            text = str(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError, RecursionError):
            text = f"HTTP status {status}"
        if status in RETRYABLE:
            raise WorldError("busy", text, where=self._server, retry_after_s=_retry_after_s(headers))
        if status >= HTTP_SERVER_FAULT:
            raise WorldError("failed", text, where=self._server)
        raise TheirsError("refused", text, where=self._server)


def _whole(response: http.client.HTTPResponse) -> bytes:
    """Read the whole body. Raises: HTTPException if it is too large, or ends before its announced length."""
    body = response.read(MAX_ANSWER_BYTES + 1)
    if len(body) > MAX_ANSWER_BYTES:
        raise http.client.HTTPException(f"more than {MAX_ANSWER_BYTES} bytes")
    if response.length:
        raise http.client.HTTPException(f"the answer ends {response.length} bytes early")
    return body


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds until it is worth asking again: our milliseconds if given, else `Retry-After` in seconds, else one second."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            after_s = float(headers[name]) * unit_s
        except (KeyError, ValueError):  # absent, or a date, which no server of this protocol sends
            continue
        if 0 <= after_s <= LONGEST_RETRY_S:
            return after_s
    return DEFAULT_RETRY_S


def _result(body: bytes, length: str | None) -> Result:
    """Parse an answer. Raises: ValueError, TypeError, OverflowError or MsgspecError that says what is wrong with it."""
    at = len(body) if length is None else int(length)
    if not 0 <= at <= len(body):
        raise ValueError(f"{HEADER_LENGTH} is {at}, the body has {len(body)} bytes")
    answer = msgspec.json.decode(body[:at], type=_Answer)
    outputs: dict[str, Array] = {}
    for output in answer.outputs:
        dtype = DTYPES.get(output.datatype)
        if dtype is None:
            raise ValueError(f"output {output.name} has datatype {output.datatype}, which this client does not read")
        size = output.parameters.get("binary_data_size")
        if size is None and output.data is None:
            raise ValueError(f"output {output.name} has neither data nor a binary_data_size")
        if size is None:
            array = np.array(output.data, dtype)
        elif not isinstance(size, int) or not 0 <= size <= len(body) - at:
            raise ValueError(f"output {output.name} has binary_data_size {size}, {len(body) - at} bytes are left")
        else:
            array = np.frombuffer(body[at : at + size], dtype.newbyteorder("<"))  # the slice copies, so the array is aligned
            at += size
        outputs[output.name] = array.reshape(_checked(output, array.size))
    return Result(outputs, answer.model_version, str(answer.parameters.get("mode", "")), answer.parameters)


def _checked(output: _Output, size: int) -> list[int]:
    if min(output.shape, default=0) < 0 or math.prod(output.shape) != size:
        raise ValueError(f"output {output.name} has {size} elements for shape {output.shape}")
    return output.shape
