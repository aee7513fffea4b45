"""The watchdog's conscience: the service manager is told that we live only while every loop has moved.

1. A loop that is watched calls `moved(name)` at least every `stalled_s`; waiting for work counts, as long as the loop woke to wait again.
2. The ping comes from here and nowhere else; once a loop has stalled no ping is sent, and systemd restarts the service.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from appliance.ports import Clock, Notifier

CHECK_S = 1.0


class Loop(Protocol):
    """A named loop of a daemon: it calls `moved` at least once in the watchdog's patience, and ends only by cancellation."""

    async def run(self, moved: Callable[[], None]) -> None:
        """Run."""


class Pulse:
    """Which loops moved, and when."""

    def __init__(self, clock: Clock, notifier: Notifier, *, stalled_s: float) -> None:
        self._clock = clock
        self._notifier = notifier
        self._stalled_s = stalled_s
        self._moved: dict[str, float] = {}
        self._log = structlog.get_logger()
        self._told: frozenset[str] = frozenset()

    def moved(self, name: str) -> None:
        """Note that this loop made progress now; the first call begins to watch it."""
        self._moved[name] = self._clock.monotonic()

    def stalled(self) -> frozenset[str]:
        """The watched loops that have not moved for `stalled_s`."""
        now = self._clock.monotonic()
        return frozenset(name for name, at in self._moved.items() if now - at > self._stalled_s)

    async def run(self) -> None:
        """Ping the service manager while nothing is stalled; ends only by cancellation."""
        every_s = min(self._notifier.watchdog_s or CHECK_S, CHECK_S)
        while True:
            stalled = self.stalled()
            if not stalled:
                self._notifier.watchdog()
            if stalled != self._told:
                self._log.log(
                    40 if stalled else 20, "loops_stalled" if stalled else "loops_moved_again", loops=sorted(stalled or self._told)
                )
                self._told = stalled
            await asyncio.sleep(every_s)
