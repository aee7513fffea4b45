"""Virtual time: runs a coroutine on a loop whose clock jumps to the next timer when nothing is ready, so that an hour of a device takes a second.

What waits on a real file or thread is not waited for: use it only with parts that live in the loop. Two runs of the same program see the same
times, so a failure repeats exactly.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from appliance.lab.simloop import WALL_S, SimLoop

T = TypeVar("T")


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
    with asyncio.Runner(loop_factory=SimLoop) as runner:
        return runner.run(main)
