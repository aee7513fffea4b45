"""The load generator against a server that answers, refuses, stalls, hangs up and forgets, on order: nothing is left out of the account."""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.workshop.arrivals import poisson
from appliance.workshop.load import Group, Manners, closed_loop, closed_loops, open_loop
from appliance.workshop.load_http import Address, HttpAsker, address, request
from appliance.workshop.load_timer import Alarm

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
HINTED = b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nRetry-After-Ms: 50\r\nContent-Length: 0\r\n\r\n"
BARE = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
BROKEN = b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"
HANG_UP, SILENCE = b"hang up", b""
PAYLOAD = request("/", b"x" * 100)
SLO_S = 0.1


class Target(NamedTuple):
    """A server, and how often it gave which answer."""

    where: Address
    gave: Counter[bytes]

    def asker(self) -> HttpAsker:
        return HttpAsker(self.where, PAYLOAD)


Answers = Callable[[int], Awaitable[bytes]]


@contextlib.asynccontextmanager
async def serving(answers: Answers) -> AsyncIterator[Target]:
    """Answer the n-th request (from 0) as `answers` says."""
    gave: Counter[bytes] = Counter()
    numbers = itertools.count()
    tasks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while True:
                await reader.readexactly(len(PAYLOAD))
                answer = await answers(next(numbers))
                gave[answer] += 1
                if answer == HANG_UP:
                    break
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the caller has gone
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    try:
        yield Target(address(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), gave)
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # for transports to end


def always(answer: bytes, after_s: float = 0.0) -> Answers:
    async def give(_number: int) -> bytes:
        await asyncio.sleep(after_s)
        return answer

    return give


async def test_every_request_of_an_open_loop_is_accounted_for() -> None:
    """Answered, refused with and without a hint, failed, lost and unfinished: each is what the server did, and they sum to what was offered."""
    kinds = [OK, OK, HINTED, BARE, BROKEN, HANG_UP, SILENCE]

    async def give(number: int) -> bytes:
        return kinds[number % len(kinds)]

    async with serving(give) as target:
        it = await open_loop(target.asker, 300, duration_s=0.5, slo_s=SLO_S, seed=3, drain_s=0.2)
    gave = target.gave
    assert it.offered == len(poisson(300, 0.5, 3)) == gave.total()
    assert (it.answered, it.refused) == (gave[OK], gave[HINTED] + gave[BARE])
    assert (it.failed, it.unfinished) == (gave[BROKEN] + gave[HANG_UP], gave[SILENCE])
    assert it.hinted == pytest.approx(gave[HINTED] / it.refused, abs=1e-4)
    assert it.success == pytest.approx(gave[OK] / it.offered, abs=1e-4)
    assert it.reasons == {"503": it.refused, "500": gave[BROKEN], "connection lost": gave[HANG_UP]}


async def test_latency_counts_from_when_a_request_was_due() -> None:
    """While the only connection stalls for 0.3 s, what is due waits here, and its wait is in the latency."""

    async def give(number: int) -> bytes:
        await asyncio.sleep(0.3 if number == 0 else 0)
        return OK

    async with serving(give) as target:
        it = await open_loop(target.asker, 200, duration_s=0.4, slo_s=SLO_S, seed=1, most_connections=1)
    assert it.answered == it.offered
    assert it.p50_ms is not None
    assert it.p50_ms > 50  # most of the 80 were due in the stall; from when they were sent, all but one take less than a millisecond
    assert it.in_slo is not None
    assert it.in_slo < 0.8
    assert it.lag_p99_ms is not None
    assert it.lag_p99_ms > 200


async def test_what_comes_after_the_window_makes_no_rate() -> None:
    """An answer in the drain is an answer and no throughput; one that comes later still is unfinished."""
    async with serving(always(OK, 0.3)) as target:
        late = await closed_loop(target.asker, 3, duration_s=0.1, slo_s=SLO_S, drain_s=1.0)
        never = await closed_loop(target.asker, 3, duration_s=0.05, slo_s=SLO_S, drain_s=0.05)
    assert (late.answered, late.answered_per_s, late.goodput_per_s, late.in_slo) == (3, 0, 0, 0)
    assert (never.offered, never.answered, never.unfinished, never.success) == (3, 0, 3, 0)


async def test_polite_callers_wait_as_told_and_rude_ones_do_not() -> None:
    """In 0.4 s a polite caller with a hint of 50 ms asks at most 9 times, a rude one very often."""
    async with serving(always(HINTED)) as target:
        found = await closed_loops(
            target.asker, {"polite": Group(1), "rude": Group(1, Manners.RUDE)}, duration_s=0.4, slo_s=SLO_S, drain_s=0.2
        )
    assert 3 <= found["polite"].refused <= 9
    assert found["rude"].refused > 10 * found["polite"].refused
    assert found["polite"].hinted == found["rude"].hinted == 1
    assert found["polite"].refusal_p99_ms is not None


async def test_a_dead_server_is_counted_and_not_hammered() -> None:
    """Where nobody listens every request fails, with a pause before the next."""
    async with serving(always(OK)) as target:
        pass
    it = await closed_loop(target.asker, 2, duration_s=0.2, slo_s=SLO_S)
    assert 2 <= it.failed == it.offered <= 50
    assert all("unreachable" in reason for reason in it.reasons)


async def test_an_alarm_rings_at_its_time_and_not_before() -> None:
    """The alarm is never early, and replaced orders do not ring."""
    rang: list[float] = []
    with Alarm(lambda: rang.append(time.perf_counter())) as alarm:
        due = time.perf_counter() + 0.01
        alarm.at(due - 0.009)
        alarm.at(due)
        await asyncio.sleep(0.1)
        alarm.at(0.0)
        await asyncio.sleep(0.05)
    assert len(rang) == 2
    assert rang[0] >= due


@given(st.floats(0.5, 5_000), st.floats(0.01, 2), st.integers(0, 2**31))
def test_arrivals_are_a_schedule(rate: float, duration_s: float, seed: int) -> None:
    """Due times ascend within the window, and the same seed gives the same ones."""
    due = poisson(rate, duration_s, seed)
    assert (np.diff(due) >= 0).all()
    assert ((due >= 0) & (due < duration_s)).all()
    assert np.array_equal(due, poisson(rate, duration_s, seed))


def test_arrivals_are_poisson() -> None:
    """Rate and variance of counts are those of a Poisson process, within four standard errors at 40,000 arrivals."""
    due = poisson(1_000, 40, 7)
    assert abs(len(due) - 40_000) < 4 * 200
    counts = np.bincount(due.astype(int), minlength=40)
    assert 0.2 < counts.var() / counts.mean() < 2.5  # even arrivals would have 0, and bursts of ten would have 10
    gaps = np.diff(due)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)
