"""Puts load on a server: closed loops of callers who wait for their answer, and an open loop of arrivals that wait for nobody.

1. Closed: each caller has one connection and one request under way. A refused one comes back as its manners say: polite ones when
   `Retry-After-Ms` (or `Retry-After`) says, rude ones at once.
2. Open: requests arrive by a schedule, on as many connections as it takes, at most `most_connections`; beyond, they wait here, and that counts.
3. After the window a drain of `drain_s` waits for what is under way; what does not come is unfinished, which is a failure.
4. Nothing is retried behind the caller's back, and no time is taken from the event loop's clock, which stands still during a callback.
"""

import asyncio
import contextlib
import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from appliance.workshop.arrivals import poisson
from appliance.workshop.load_http import Done, Reply
from appliance.workshop.load_timer import Alarm
from appliance.workshop.summary import REFUSALS, Summary, Tally

MOST_CONNECTIONS = 1_024
DRAIN_S = 5.0
UNHINTED_S = 0.1
"""A polite caller who is refused without a hint comes back after so long."""
LOST_S = 0.01
"""Any caller whose request is lost pauses so long, or a dead server would be hammered by an empty loop."""
HEAD_START_S = 0.02
DRAIN_LOOK_S = 0.005


class Asker(Protocol):
    """One connection to the server under load (`load_http.HttpAsker`)."""

    def ask(self, done: Done) -> None:
        """Send the request; `done` is called once, later."""

    def close(self) -> None:
        """Close the connection."""


Opens = Callable[[], Asker]


class Manners(StrEnum):
    """What a caller does when it is refused."""

    POLITE = "polite"
    RUDE = "rude"


@dataclass(frozen=True, slots=True)
class Group:
    """Callers of one kind."""

    callers: int
    manners: Manners = Manners.POLITE


class _Caller:
    """One caller of a closed loop."""

    def __init__(self, asker: Asker, tally: Tally, manners: Manners) -> None:
        self._asker = asker
        self._tally = tally
        self._rude = manners is Manners.RUDE
        self._loop = asyncio.get_running_loop()
        self._began = 0.0
        self._pause: asyncio.TimerHandle | None = None
        self.waits = False

    def go(self) -> None:
        """Ask once more."""
        self.waits = True
        self._tally.offered += 1
        self._began = time.perf_counter()
        self._asker.ask(self._heard)

    def _heard(self, reply: Reply) -> None:
        now = time.perf_counter()
        self.waits = False
        self._tally.heard(self._began, now, reply)
        if now >= self._tally.until:
            return
        if reply.status in REFUSALS and not self._rude:
            self._pause = self._loop.call_later(UNHINTED_S if reply.retry_after_s is None else reply.retry_after_s, self.go)
        elif not reply.status:
            self._pause = self._loop.call_later(LOST_S, self.go)
        else:
            self.go()

    def stop(self) -> None:
        """Ask no more."""
        if self._pause is not None:
            self._pause.cancel()

    def close(self) -> None:
        """Ask no more, and hear no more."""
        self.stop()
        self._asker.close()


async def closed_loops(
    opens: Opens, groups: Mapping[str, Group], *, duration_s: float, slo_s: float, drain_s: float = DRAIN_S
) -> dict[str, Summary]:
    """Run groups of callers beside each other; each group's figures by its name."""
    tallies = {name: Tally(slo_s) for name in groups}
    callers = [_Caller(opens(), tallies[name], group.manners) for name, group in groups.items() for _ in range(group.callers)]
    with _undisturbed():
        began = time.perf_counter()
        for tally in tallies.values():
            tally.until = began + duration_s
        for caller in callers:
            caller.go()
        await asyncio.sleep(duration_s)
        for caller in callers:
            caller.stop()
        await _drained(lambda: not any(caller.waits for caller in callers), drain_s)
    for caller in callers:
        caller.close()
    return {name: tally.summary(duration_s) for name, tally in tallies.items()}


async def closed_loop(
    opens: Opens, callers: int, *, duration_s: float, slo_s: float, manners: Manners = Manners.POLITE, drain_s: float = DRAIN_S
) -> Summary:
    """Run callers of one kind."""
    return (await closed_loops(opens, {"all": Group(callers, manners)}, duration_s=duration_s, slo_s=slo_s, drain_s=drain_s))["all"]


class _Pool:
    """Connections for arrivals; the request that waited longest takes the next free one."""

    def __init__(self, opens: Opens, tally: Tally, most: int) -> None:
        self._opens = opens
        self._tally = tally
        self._most = most
        self._all: list[Asker] = []
        self._free: list[Asker] = []
        self._waiting: deque[float] = deque()
        self.under_way = 0

    def arrive(self, due: float) -> None:
        """A request that was due then wants to be sent."""
        self._tally.offered += 1
        if self._free:
            self._send(self._free.pop(), due)
        elif len(self._all) < self._most:
            self._all.append(self._opens())
            self._send(self._all[-1], due)
        else:
            self._waiting.append(due)

    def _send(self, asker: Asker, due: float) -> None:
        self.under_way += 1
        self._tally.sent(due, time.perf_counter())

        def heard(reply: Reply) -> None:
            self.under_way -= 1
            self._tally.heard(due, time.perf_counter(), reply)
            if self._waiting:
                self._send(asker, self._waiting.popleft())
            else:
                self._free.append(asker)

        asker.ask(heard)

    def idle(self) -> bool:
        """Whether everything was heard of."""
        return not self.under_way and not self._waiting

    def close(self) -> None:
        """Close all connections."""
        for asker in self._all:
            asker.close()


async def open_loop(
    opens: Opens,
    rate_per_s: float,
    *,
    duration_s: float,
    slo_s: float,
    seed: int,
    drain_s: float = DRAIN_S,
    most_connections: int = MOST_CONNECTIONS,
) -> Summary:
    """Let requests arrive at `rate_per_s` for `duration_s`, whatever the server does."""
    tally = Tally(slo_s)
    pool = _Pool(opens, tally, most_connections)
    with _undisturbed():
        began = time.perf_counter() + HEAD_START_S
        tally.until = began + duration_s
        await _release(began + poisson(rate_per_s, duration_s, seed), pool.arrive)
        await asyncio.sleep(max(tally.until - time.perf_counter(), 0.0))
        await _drained(pool.idle, drain_s)
    pool.close()
    return tally.summary(duration_s)


async def _release(due: npt.NDArray[np.float64], arrive: Callable[[float], None]) -> None:
    """Call `arrive` at each due time."""
    times: list[float] = due.tolist()
    times.reverse()
    over = asyncio.get_running_loop().create_future()

    def ring() -> None:
        now = time.perf_counter()
        while times and times[-1] <= now:
            arrive(times.pop())
        if times:
            alarm.at(times[-1])
        elif not over.done():
            over.set_result(None)

    with Alarm(ring) as alarm:
        alarm.at(times[-1] if times else 0.0)
        await over


async def _drained(idle: Callable[[], bool], within_s: float) -> None:
    for _ in range(int(within_s / DRAIN_LOOK_S)):
        if idle():
            return
        await asyncio.sleep(DRAIN_LOOK_S)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection in this process meanwhile: its pauses would be taken for the server's."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
