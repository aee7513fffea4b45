"""The event loop and the clocks of the simulation: virtual time without a selector, and nothing that depends on addresses or hashes.

1. Time jumps to the next timer when nothing is ready; timers of one moment run in the order in which they were set.
2. Tasks are numbered, and a set of tasks is walked by their numbers: asyncio's task groups cancel their children in the order of such a set.
3. What would go to a thread (`asyncio.to_thread`) is computed at once, and its answer takes `THREAD_S`.
"""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple, Unpack

from appliance.contract.deferral import Instant
from appliance.contract.errors import OursError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
THREAD_S = 0.000_5
STILL_STEPS = 1_000_000
"""So many steps in one moment have no end; a whole life of a fleet has some tens of thousands."""
WALL_S = 1_700_000_000.0
"""Seconds since the epoch at which virtual time starts, so that nothing depends on today."""


class _Numbered(asyncio.Task[Any]):
    """A task whose hash is its number."""

    number = 0

    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.BaseEventLoop):
    """A loop for `run_until_complete` alone; it has no sockets, threads or signals."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._soon: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count(1)
        self._moved_at = 0
        self.steps = 0

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def call_soon(self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None) -> asyncio.Handle:
        """See `asyncio.AbstractEventLoop`."""
        handle = asyncio.Handle(callback, args, self, context)
        self._soon.append(handle)
        return handle

    def call_soon_threadsafe(self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None) -> asyncio.Handle:
        """See `asyncio.AbstractEventLoop`; there are no other threads, but Ctrl-C comes this way."""
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See `asyncio.AbstractEventLoop`."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See `asyncio.AbstractEventLoop`."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing: a cancelled timer is passed over when its time comes."""

    def run_in_executor(self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts) -> asyncio.Future[T]:
        """Compute now, answer a little later (rule 3)."""
        del executor
        future: asyncio.Future[T] = self.create_future()
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 - it is the caller's, as from a thread
            self.call_later(THREAD_S, _fail, future, error)
        else:
            self.call_later(THREAD_S, _answer, future, result)
        return future

    def _run_once(self) -> None:
        """Called by `run_forever` until it is stopped."""
        soon = self._soon
        while not soon:
            if not self._timers:
                raise OursError("virtual_time", "nothing is ready and no timer is set: everybody waits for everybody")
            when, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled():
                if when > self._now:
                    self._now, self._moved_at = when, self.steps
                soon.append(timer)
        if self.steps - self._moved_at > STILL_STEPS:
            raise OursError("virtual_time", f"it stands still at {self._now} s: somebody wakes itself again and again")
        for _ in range(len(soon)):
            handle = soon.popleft()
            if not handle.cancelled():
                self.steps += 1
                handle._run()  # noqa: SLF001 - what asyncio's own loops do with their handles

    def create_task(
        self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], *, name: object = None, context: Context | None = None
    ) -> asyncio.Task[T]:
        """See `asyncio.AbstractEventLoop`."""
        task = _Numbered(coro, loop=self, name=None if name is None else str(name), context=context)
        task.number = next(self._numbers)
        return task


@dataclass(slots=True)
class SimClock:
    """Implements `Clock` for one machine; `offset_s` steps its wall clock, `reboot` starts its boot time anew. `trusted`: NTP has set it."""

    loop: SimLoop
    offset_s: float = 0.0
    booted_at: float = 0.0
    boots: int = 1
    trusted: bool = True

    def monotonic(self) -> float:
        """Seconds since boot."""
        return self.loop.time() - self.booted_at

    def wall(self) -> float:
        """Seconds since the epoch."""
        return WALL_S + self.loop.time() + self.offset_s

    async def sleep_until(self, deadline: float) -> None:
        """Return when `monotonic()` has reached the deadline."""
        await asyncio.sleep(deadline - self.monotonic())

    def reboot(self) -> None:
        """Begin another boot now; the wall clock is not trusted until NTP has set it."""
        self.booted_at = self.loop.time()
        self.boots += 1
        self.trusted = False

    def instant(self) -> Instant:
        """What the store reads."""
        return Instant(f"boot-{self.boots}", self.monotonic(), self.wall(), self.trusted)


def _answer(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
