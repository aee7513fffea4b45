"""The client for asyncio: as `sync`, in all that it promises; any number of calls may run at once, over a bounded number of connections."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

from appliance.client.asking import Inputs, Options
from appliance.client.courses import TIMEOUT_S, Compute, Course, Courses, Exchange, Fallback, Lend, Pause, Step
from appliance.client.exchange import Address, Asked, LostError, Reply, ReplyReader
from appliance.client.frames import Frame, Lender
from appliance.client.results import Deferred, Result
from appliance.client.retrying import Policy
from appliance.contract.errors import ApplianceError, WorldError

__all__ = ["TIMEOUT_S", "AsyncAppliance", "Deferred", "Frame", "Policy", "Result"]

CONNECT_S = 2.0
LEND_S = 1.0
CONNECTIONS = 16
"""Open at once to one server; more callers wait for one of them."""

T = TypeVar("T")


class Channel(asyncio.BufferedProtocol):
    """One kept connection. Replies land where they stay; an end, or bytes that nobody asked for, make it unfit for another request."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._reader = ReplyReader(where)
        self._transport: asyncio.Transport | None = None
        self._reply: asyncio.Future[Reply] | None = None
        self.is_fit = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are transports in all but their class
        self.is_fit = True

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes."""
        self._take(nbytes)

    def eof_received(self) -> None:
        """Take the end: it completes a reply without a length."""
        self._take(0)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        self.is_fit = False
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(LostError("unreachable", f"no answer: {exc or 'the connection ended'}", where=self._where))

    async def exchange(self, parts: list[bytes | memoryview]) -> Reply:
        """Send a request and return its reply. Raises: TheirsError (`malformed`), LostError."""
        if self._transport is None:
            raise LostError("unreachable", "no answer: not connected", where=self._where)
        self._reply = asyncio.get_running_loop().create_future()
        try:
            self._transport.writelines(parts)
            reply = await self._reply
        except BaseException:
            self.is_fit = False
            raise
        else:
            self.is_fit = self.is_fit and reply.keep
            return reply
        finally:
            self._reply = None
            if not self.is_fit:
                self.abort()

    def abort(self) -> None:
        """Close at once; a server that still works on the request drops it."""
        self.is_fit = False
        if self._transport is not None:
            self._transport.abort()

    def _take(self, size: int) -> None:
        if self._reply is None or self._reply.done():
            self.abort()
            return
        try:
            reply = self._reader.filled(size)
        except ApplianceError as error:
            self._reply.set_exception(error)
            return
        if reply is not None:
            self._reply.set_result(reply)


class Pool:
    """The connections to one server."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[Channel] = []
        self._places = asyncio.Semaphore(CONNECTIONS)

    async def exchange(self, asked: Asked, deadline: float) -> Reply:
        """Send a request and return its reply. Raises: TheirsError (`malformed`), WorldError (`unreachable`; a LostError once it was sent)."""
        channel: Channel | None = None
        where = self._address.text
        try:
            async with asyncio.timeout(deadline - time.monotonic()), self._places:
                channel = self._kept() or await self._connected()
                reply = await channel.exchange(asked.render(self._address.host))
                if channel.is_fit:
                    self._idle.append(channel)
                return reply
        except TimeoutError as error:
            kind = WorldError if channel is None else LostError
            raise kind("unreachable", "no answer: it took too long", where=where) from error

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().abort()

    def _kept(self) -> Channel | None:
        while self._idle:
            channel = self._idle.pop()
            if channel.is_fit:
                return channel
        return None

    async def _connected(self) -> Channel:
        loop, address = asyncio.get_running_loop(), self._address
        try:
            async with asyncio.timeout(CONNECT_S):
                if address.path:
                    _, channel = await loop.create_unix_connection(lambda: Channel(address.text), address.path)
                else:
                    _, channel = await loop.create_connection(lambda: Channel(address.text), address.host, address.port)
        except OSError as error:  # a TimeoutError is one
            why = str(error) or "it took too long"
            raise WorldError("unreachable", f"no answer: {why}", where=address.text, remedy="is the daemon running?") from error
        return channel


class AsyncAppliance:
    """The appliance at `http://host:port` or `unix:/path/of/the/socket`, or several of them in order of preference; `sync.Appliance` says more.

    A fallback runs in a thread. Arrays and frames must not change while a call runs. It belongs to the loop in which it is used.
    """

    def __init__(
        self,
        server: str | Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S,
        policy: Policy | None = None,
        fallback: Fallback | None = None,
    ) -> None:
        self._courses = Courses(server, timeout_s=timeout_s, policy=policy or Policy(), fallback=fallback)
        self._pools = {each.text: Pool(each) for each in self._courses.servers}
        self._lenders = {each.text: Lender(each.frames) for each in self._courses.servers if each.frames}

    async def __aenter__(self) -> Self:
        """Nothing is opened until the first call."""
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Close the connections."""
        await self.close()

    async def close(self) -> None:
        """Close the connections; a later call opens them again."""
        for pool in self._pools.values():
            pool.close()
        for lender in self._lenders.values():
            lender.close()
        await asyncio.sleep(0)  # transports close in the loop's next round

    async def ready(self) -> bool:
        """As `Appliance.ready`."""
        return await self._run(self._courses.ready())

    async def metadata(self, model: str) -> dict[str, Any]:
        """As `Appliance.metadata`."""
        return await self._run(self._courses.metadata(model))

    async def infer(self, model: str, inputs: Inputs, **options: Unpack[Options]) -> Result:
        """As `Appliance.infer`; cancellation takes the request back."""
        return await self._run(self._courses.infer(model, inputs, options))

    async def submit(self, model: str, inputs: Inputs, **options: Unpack[Options]) -> Result | Deferred:
        """As `Appliance.submit`."""
        return await self._run(self._courses.submit(model, inputs, options))

    async def fetch(self, promise: Deferred | str, *, wait_s: float = 0.0) -> Result:
        """As `Appliance.fetch`."""
        return await self._run(self._courses.fetch(promise, wait_s))

    async def _run(self, course: Course[T]) -> T:
        outcome: Any = None
        raised: ApplianceError | None = None
        with contextlib.closing(course):
            while True:
                try:
                    step = course.send(outcome) if raised is None else course.throw(raised)
                except StopIteration as end:
                    value: T = end.value
                    return value
                outcome, raised = None, None
                try:
                    outcome = await self._done(step)
                except ApplianceError as error:
                    raised = error

    async def _done(self, step: Step) -> Any:
        match step:
            case Exchange():
                pool = self._pools.get(step.address.text) or self._pools.setdefault(step.address.text, Pool(step.address))
                return await pool.exchange(step.asked, step.deadline)
            case Lend():
                lender = self._lenders[step.address.text]
                if step.anew:
                    lender.close()
                return lender.name(step.frame) or await asyncio.to_thread(lender.lend, step.frame, LEND_S)
            case Pause():
                return await asyncio.sleep(step.seconds)
            case Compute():
                return await asyncio.to_thread(step.work)
