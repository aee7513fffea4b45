"""Virtual time's promises: it jumps, it says when everybody waits for everybody, and Ctrl-C ends it."""

import asyncio
import os
import signal

import pytest

from appliance.contract.errors import OursError
from appliance.lab.simloop import WALL_S
from appliance.lab.virtual import VirtualClock, run


def test_an_hour_passes_at_once_and_threads_are_computed_in_place() -> None:
    """Both clocks move by the hour that was slept, and by nothing else."""

    async def hour() -> tuple[float, float]:
        clock = VirtualClock()
        await clock.sleep_until(3600.0)
        assert await asyncio.to_thread(int, "7") == 7
        return clock.monotonic(), clock.wall()

    assert run(hour()) == (pytest.approx(3600.0, abs=1e-3), pytest.approx(WALL_S + 3600.0, abs=1e-3))


def test_a_wait_that_nobody_will_end_is_told() -> None:
    """Instead of a hang: the loop knows that no timer is left."""

    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(OursError, match="everybody waits"):
        run(forever())


def test_ctrl_c_ends_it_as_it_ends_any_program() -> None:
    """The runner wakes its loop as from another thread; a loop without threads must bear that."""

    async def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(1.0)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run(interrupted())
    finally:
        signal.signal(signal.SIGINT, before)
