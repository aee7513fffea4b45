"""By whose fault, as HTTP says it: a refusal as a status, its headers and the protocol's error body; and how an answer leaves, in one write."""

import math
import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter

from appliance.contract.errors import ApplianceError, OursError, TheirsError
from appliance.contract.openinference import error as error_body

STATUS: Mapping[str, int] = {
    "forbidden": 403,
    "unknown_model": 404,
    "unknown_path": 404,
    "unknown_promise": 404,
    "unknown_region": 404,
    "method": 405,
    "timeout": 408,
    "dropped": 410,
    "oversized": 413,
    "encoding": 415,
    "backlog_full": 429,
    "unsupported": 501,
    "worker_lost": 503,
    "not_ready": 503,
    "draining": 503,
    "deadline": 504,
}
BUSY = 503
RETRYABLE = frozenset({429, BUSY})
CLOSING = frozenset({408, 413})
"""After these the rest of the request is not worth reading."""
DEFAULT_RETRY_S = 1.0
JSON = "application/json"


class Reply(web.StreamResponse):
    """An answer that is known whole: its head is written by us and leaves with the body in one piece. Header values are ours, never a caller's.

    aiohttp's own `Response` builds a multidict, looks for chunks, compression and cookies, and names its version: 20 us more of each answer.
    """

    def __init__(self, parts: Sequence[bytes | memoryview], headers: Mapping[str, str], status: int = 200) -> None:
        super().__init__(status=status)
        self._parts = parts
        self._lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        self._writer: AbstractStreamWriter | None = None

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Put the head together, now that it is known who asks how."""
        length = sum([len(part) for part in self._parts])
        major, minor = request.version
        alive = self._keep_alive = request.keep_alive and self._keep_alive is not False
        connection = _CONNECTION.get((minor, alive), "")
        head = f"HTTP/{major}.{minor} {_status(self.status)}\r\n{self._lines}Content-Length: {length}\r\n{_date(int(time.time()))}{connection}\r\n"
        body = () if request.method == hdrs.METH_HEAD else self._parts
        self._parts = (head.encode(), *body)
        self._writer = request.writer
        return self._writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Write all of it, and wait where the caller reads more slowly than we write."""
        if self._writer is not None:
            await self._writer.write(b"".join((*self._parts, data)))
            self._writer = None


_CONNECTION = {(1, False): "Connection: close\r\n", (0, True): "Connection: keep-alive\r\n"}
"""What is not the rule of HTTP/1.0 and 1.1 must be said; by minor version, and whether the connection stays."""


@lru_cache(maxsize=64)
def _status(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}"


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return f"Date: {formatdate(second, usegmt=True)}\r\n"


def ok(body: bytes = b"", content_type: str = JSON) -> Reply:
    """Answer 200; without a body there is no content type."""
    return Reply((body,), {hdrs.CONTENT_TYPE: content_type} if body else {})


def refusal(error: ApplianceError) -> Reply:
    """Answer an error: the caller's fault is 4xx, what may work later 429, 503 or 504 with `Retry-After`; ours must not come here."""
    status = STATUS.get(error.reason, 400 if isinstance(error, TheirsError) else 503)
    text = "an internal error" if isinstance(error, OursError) else str(error)
    headers = {}
    if error.reason == "deadline" and error.retry_after_s is not None:  # refused on arrival, with a hint: overload, not a time-out
        status = BUSY
    if status in RETRYABLE:
        headers = _later(DEFAULT_RETRY_S if error.retry_after_s is None else error.retry_after_s)
    if status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
        headers[hdrs.ACCEPT_ENCODING] = "gzip, deflate"
    return failure(status, text, error.reason, headers)


def accepted(body: bytes, retry_after_s: float) -> Reply:
    """Answer 202: not yet."""
    return Reply((body,), {hdrs.CONTENT_TYPE: JSON, **_later(retry_after_s)}, 202)


def _later(after_s: float) -> dict[str, str]:
    after_s = max(after_s, 0.0)
    return {"Retry-After": str(max(math.ceil(after_s), 1)), "Retry-After-Ms": str(math.ceil(after_s * 1e3))}


def failure(status: int, text: str, reason: str, headers: Mapping[str, str] | None = None) -> Reply:
    """Answer an error in the protocol's words."""
    body = error_body(text.encode(errors="replace").decode(), reason)
    response = Reply((body,), {hdrs.CONTENT_TYPE: JSON, **(headers or {})}, status)
    if status in CLOSING:
        response.force_close()
    return response
