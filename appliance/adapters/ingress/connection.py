"""One caller's connection, so that nobody holds one for nothing: a bound on their number and on the time that headers take.

aiohttp bounds an idle connection and, with it, a slow header by one and the same time (`keepalive_timeout`), answers what is not HTTP in
plain text and logs a traceback of each: hence this subclass of its protocol.
"""

import asyncio
from typing import Any, cast

from aiohttp import web

from appliance.adapters.ingress.bounds import Bounds
from appliance.adapters.ingress.replies import failure
from appliance.contract.openinference import error as error_body


def _last_words(status: str, text: str, reason: str, more: str = "") -> bytes:
    body = error_body(text, reason)
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


FULL = _last_words(
    "503 Service Unavailable",
    "too many connections are open; ask again later",
    "backlog_full",
    "Retry-After: 1\r\nRetry-After-Ms: 1000\r\n",
)
SLOW = _last_words("408 Request Timeout", "the request's headers did not arrive in time", "timeout")


class Connection(web.RequestHandler):
    """aiohttp's protocol with a bound on slow headers, and errors in our words."""

    __slots__ = ("_bounds", "_gate", "_impatience")

    def __init__(self, gate: "Gate", bounds: Bounds, *, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        super().__init__(gate, loop=loop, **options)
        self._gate = gate
        self._bounds = bounds
        self._impatience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Serve the connection, or refuse it where there are too many."""
        if self._gate.is_full():
            self._force_close = True  # nothing that still arrives is looked at
            stream = cast("asyncio.Transport", transport)  # uvloop's are transports in all but their class
            stream.write(FULL)
            stream.close()
            return
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Take bytes; the first ones of a request start the clock for its headers."""
        super().data_received(data)
        if self._waits_for_headers():
            if data and self._impatience is None:
                self._impatience = self._loop.call_later(self._bounds.header_timeout_s, self._give_up)
        elif self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    def _waits_for_headers(self) -> bool:
        """Whether whatever came last belongs to the headers of a next request: not while one is answered or its body thrown away."""
        return not self._messages and not self._force_close and (self._waiter is not None or self._request_count == 0)

    def _give_up(self) -> None:
        self._impatience = None
        if self.transport is not None and self._waits_for_headers():
            self.transport.write(SLOW)
            self.force_close()

    @property
    def is_answering(self) -> bool:
        """Whether a request is under way, to the last byte of its answer that has to wait for the caller."""
        return self._request_in_progress

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the clock with the connection."""
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what could not be read as HTTP; nothing is logged, for anybody can send garbage at any rate."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was under way already")
        lines = (message or str(exc or "")).strip().splitlines()
        response = failure(status, f"not a readable HTTP request: {lines[0][:200] if lines else 'unknown'}", "malformed")
        response.force_close()
        return response


class Gate(web.Server):
    """Makes connections up to a number."""

    def __init__(self, handler: Any, bounds: Bounds) -> None:
        super().__init__(handler, handler_cancellation=True)
        self._bounds = bounds

    def is_full(self) -> bool:
        """Whether one more connection would be too many."""
        return len(self._connections) >= self._bounds.connections

    def is_answering(self) -> bool:
        """Whether anybody still waits for the rest of an answer."""
        return any(each.is_answering for each in self.connections if isinstance(each, Connection))

    def __call__(self) -> web.RequestHandler:
        """Make the protocol of one connection."""
        bounds = self._bounds
        return Connection(
            self,
            bounds,
            loop=self._loop,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=bounds.keepalive_s,
            lingering_time=bounds.linger_s,
        )
