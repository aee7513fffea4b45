"""Virtual time: an event loop whose clock jumps to the next timer when nothing is ready, so that an hour of a device takes a second.

What waits on a real file or thread is not waited for: use it only with parts that live in the loop. Two runs of the same program see the same
times, so a failure repeats exactly.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from appliance.contract.errors import OursError

T = TypeVar("T")
WALL_S = 1_700_000_000.0
"""Seconds since the epoch at which virtual time starts, so that nothing depends on today."""


class _Jump(selectors.DefaultSelector):
    """Never waits: tells its loop how far to jump instead."""

    skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        """Return what is ready now; if nothing is, note how long the loop wanted to wait."""
        ready: list[Any] = super().select(0)
        if not ready and timeout is None:
            raise OursError("virtual_time", "nothing is ready and no timer is set: everybody waits for everybody")
        if not ready and timeout:
            self.skipped_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` starts at 0 and moves only when nothing is left to do at the present moment."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jump.skipped_s


class VirtualClock:
    """Implements `Clock` on the running loop's time; `offset_s` steps the wall clock as an operator or NTP would."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def monotonic(self) -> float:
        """The loop's time."""
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        """Seconds since the epoch; moves with the loop, and by steps."""
        return WALL_S + self.monotonic() + self.offset_s

    async def sleep_until(self, deadline: float) -> None:
        """Return when `monotonic()` has reached the deadline."""
        await asyncio.sleep(deadline - self.monotonic())


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
