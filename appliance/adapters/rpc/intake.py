"""Reads a call's message within bounds: size, time, and the memory that all messages share.

1. gRPC bounds one message (`limit_bytes`, before and after inflation) and gives it whole: nothing can be counted while it arrives.
2. A message that arrives at once, as one does from a caller with a reasonable line, is counted when it is there.
3. One that does not needs one of a few places for slow callers: so `slow_bodies` times the limit bounds what is half read, and a slow
   caller takes a place from slow callers only. Without a place the call ends at once.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from grpc import aio

from appliance.contract.errors import TheirsError, WorldError


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits beside the size of one message. Sizes in bytes, times in seconds.

    Attributes:
        bodies_bytes: all messages that wait for their answer, together (at least one largest message is let in).
        slow_bodies: messages that may be half read at a time, beside those that arrive within `prompt_s`.
        prompt_s: how long a message may take to arrive without being called slow.
        body_timeout_s: from the call's headers to the end of its message.
        calls: calls in flight; one more is refused.
        streams: calls in flight on one connection; the caller's library keeps one more waiting.
        connections: open connections; one more is closed at once.
        handshake_s: from the connection to the end of HTTP/2's settings.
        idle_s: how long a connection without a call stays open.
        close_s: how long `close` waits for cancelled calls to end.
    """

    bodies_bytes: int = 256 * 1024 * 1024
    slow_bodies: int = 8
    prompt_s: float = 0.05
    body_timeout_s: float = 30.0
    calls: int = 512
    streams: int = 128
    connections: int = 512
    handshake_s: float = 10.0
    idle_s: float = 300.0
    close_s: float = 0.5


class Intake:
    """Reads messages; what it returned is taken from the room until `done`."""

    def __init__(self, limit_bytes: int, bounds: Bounds) -> None:
        self._bounds = bounds
        self._room = max(bounds.bodies_bytes, limit_bytes)
        self._free = self._room
        self._slow = 0

    @property
    def free(self) -> int:
        """Bytes that nobody holds."""
        return self._free

    async def receive(self, context: "aio.ServicerContext[bytes, bytes]") -> bytes:
        """Return the call's message; the caller owes `done(message)`.

        Raises: TheirsError (`timeout`, `malformed`: there is none), WorldError (`backlog_full`).
        """
        reading = asyncio.ensure_future(context.read())
        try:
            await asyncio.wait((reading,), timeout=self._bounds.prompt_s)
            message = reading.result() if reading.done() else await self._wait_for(reading)
        finally:
            reading.cancel()
        if message is aio.EOF:
            raise TheirsError("malformed", "the call ended without a message")
        if len(message) > self._free:
            what = f"the messages of all calls in flight would exceed {self._room} bytes"
            raise WorldError("backlog_full", what, remedy="ask again later", retry_after_s=1.0)
        self._free -= len(message)
        return message

    async def _wait_for(self, reading: "asyncio.Future[Any]") -> Any:
        if self._slow >= self._bounds.slow_bodies:
            what = f"{self._slow} callers send slowly already, no more are let in"
            raise WorldError("backlog_full", what, remedy="ask again later", retry_after_s=1.0)
        self._slow += 1
        try:
            async with asyncio.timeout(self._bounds.body_timeout_s - self._bounds.prompt_s):
                return await reading
        except TimeoutError as error:
            raise TheirsError("timeout", f"the message did not arrive within {self._bounds.body_timeout_s:g} s") from error
        finally:
            self._slow -= 1

    def done(self, message: bytes) -> None:
        """Give a message's bytes back."""
        self._free += len(message)
