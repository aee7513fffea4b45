"""A small synchronous client: the Open Inference Protocol v2 over HTTP, on TCP or on a Unix socket, tensors in binary.

Errors are those of the appliance: `TheirsError` for what the caller did wrong, `WorldError` with reason `busy` (and `retry_after_s`) where asking
again helps, `unreachable` where nobody answers. One connection, kept open; not for several threads at once.
"""

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import numpy as np

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import DATATYPES, DTYPES, Array
from appliance.contract.openinference import HEADER_LENGTH
from appliance.contract.vocabulary import Datatype

TIMEOUT_S = 30.0
RETRYABLE = {429, 503}
HTTP_OK = 200
HTTP_SERVER_FAULT = 500


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
        parts = urlsplit(server)
        if parts.scheme != "http" or not parts.hostname:
            raise TheirsError("server", f"{server!r} is no address", remedy="write http://host:port or unix:/path")
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)

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
        found: dict[str, Any] = json.loads(body)
        return found

    def infer(self, model: str, inputs: Mapping[str, Array], *, parameters: Mapping[str, Any] | None = None) -> Result:
        """Ask for all outputs. `inputs` are arrays whose axis 0 is the batch.

        Raises: TheirsError (the server's text), WorldError (`busy`, `unreachable`, `failed`).
        """
        tensors, parts = [], []
        for name, array in inputs.items():
            raw = np.ascontiguousarray(array).tobytes()
            parts.append(raw)
            tensors.append(
                {"name": name, "shape": list(array.shape), "datatype": DATATYPES[array.dtype], "parameters": {"binary_data_size": len(raw)}}
            )
        head = json.dumps({"inputs": tensors, "parameters": {**(parameters or {}), "binary_data_output": True}}).encode()
        sent = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
        status, headers, body = self._exchange("POST", f"/v2/models/{quote(model, safe='')}/infer", b"".join((head, *parts)), sent)
        self._check(status, headers, body)
        return _result(body, int(headers.get(HEADER_LENGTH.lower(), len(body))))

    def _exchange(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        try:
            self._connection.request(method, path, body=body or None, headers=headers)
            response = self._connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, found, response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise WorldError("unreachable", f"no answer: {error}", where=self._server, remedy="is the daemon running?") from error

    def _check(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if status == HTTP_OK:
            return
        try:
            text = str(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            text = f"HTTP status {status}"
        if status in RETRYABLE:
            after_s = float(headers.get("retry-after-ms", "1000")) / 1e3
            raise WorldError("busy", text, where=self._server, retry_after_s=after_s)
        if status >= HTTP_SERVER_FAULT:
            raise WorldError("failed", text, where=self._server)
        raise TheirsError("refused", text, where=self._server)


def _result(body: bytes, length: int) -> Result:
    head = json.loads(body[:length])
    outputs: dict[str, Array] = {}
    at = length
    for output in head["outputs"]:
        dtype = DTYPES[Datatype(output["datatype"])]
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.array(output["data"], dtype)
        else:
            array = np.frombuffer(body, dtype, count=size // dtype.itemsize, offset=at)
            at += size
        outputs[output["name"]] = array.reshape(output["shape"])
    parameters = head.get("parameters", {})
    return Result(outputs, head.get("model_version", ""), str(parameters.get("mode", "")), parameters)
