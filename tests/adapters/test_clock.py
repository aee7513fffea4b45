"""The system's clock as the loops use it."""

import asyncio
import time
from pathlib import Path

import pytest

from appliance.adapters.clock import LONGEST_NAP_S, SystemClock


def test_monotonic_counts_suspended_time() -> None:
    """The clock is CLOCK_BOOTTIME: it agrees with the kernel's uptime, which goes on in suspend."""
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert abs(SystemClock().monotonic() - uptime_s) < 0.5


def test_wall_is_the_time_of_day() -> None:
    """Seconds since the epoch, as certificates count."""
    assert abs(SystemClock().wall() - time.time()) < 0.5


async def test_sleeping_to_deadlines_does_not_drift() -> None:
    """After twenty periods the sleeper is late by one wake-up, not by twenty, and never early."""
    clock = SystemClock()
    start = clock.monotonic()
    for tick in range(1, 21):
        await clock.sleep_until(start + tick * 0.01)
        assert clock.monotonic() >= start + tick * 0.01
        await asyncio.sleep(0.002)  # work that would add up to 40 ms if each sleep counted from its own start
    assert clock.monotonic() - start < 0.2 + 0.03


async def test_a_long_sleep_is_made_of_short_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No nap is longer than the bound, so that a deadline that passed in suspend is noticed."""
    naps: list[float] = []
    now = [0.0]

    async def nap(seconds: float) -> None:
        naps.append(seconds)
        now[0] += seconds + 100.0 * (len(naps) == 3)  # the machine is suspended in the third nap

    clock = SystemClock()
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    monkeypatch.setattr("appliance.adapters.clock.asyncio.sleep", nap)
    await clock.sleep_until(60.0)
    monkeypatch.undo()
    assert naps == [0, LONGEST_NAP_S, LONGEST_NAP_S]


async def test_a_passed_deadline_still_yields() -> None:
    """A loop that is always late cannot starve the others."""
    ran = asyncio.Event()
    asyncio.get_running_loop().call_soon(ran.set)
    await SystemClock().sleep_until(0.0)
    assert ran.is_set()
