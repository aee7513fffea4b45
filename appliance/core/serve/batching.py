"""Decides what an idle worker runs next: at once by default, after a short wait only where measurement says that it pays.

API: `Batcher(compiled=())`; `.limit = n` from heat or profile (None: the pace's batch);
`.next_batch(backlog, now, idle_workers) -> Dispatch(entries, samples, pad_to, number) | Wait(until) | Nothing`.
Call `backlog.expire(now)` before it, and it again on each arrival, each return of a worker, and at `until`.

1. Work-conserving: an idle worker takes what waits. (Peers that always wait 10 ms answer a lone request in 17 ms instead of 5.5.)
2. It waits only if all of this holds: the pace is measured; the batch aimed at gives at least `gain` times the throughput of single
   samples; nothing of another shape waits; and the next arrival, expected after the mean gap g, saves more worker time than the
   n samples that wait lose together: n x g < L(n) + L(1) - L(n + 1). A caller that asks one at a time has g >= L(1), and
   L(1) >= L(1) + L(1) - L(2): it never waits, on any hardware.
3. A wait ends after `fill_wait_s`, after a silence of `SILENCE_GAPS` mean gaps (counted from when the worker became idle: its answers are what
   makes callers in a closed loop ask again), or when going on would miss a deadline.
4. The batch is the pace's, cut by `limit`. The head always goes, whole, even if it alone is larger.
5. Where the backend has fixed batch sizes, the rest is filled by repeating the first entry (the highest rank); else nothing is padded.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import inf
from typing import Generic, NamedTuple, TypeVar

from appliance.contract.errors import OursError
from appliance.core.serve.backlog import Backlog
from appliance.core.serve.pace import Pace
from appliance.core.serve.waitlist import Entry

T = TypeVar("T")

SILENCE_GAPS = 4.0
"""Of Poisson arrivals 2 % come later than four mean gaps; in a burst, such a silence is its end."""


class Dispatch(NamedTuple, Generic[T]):
    """Run these now, padded to `pad_to` samples by repeating `entries[0]`; report the end with `backlog.done(number)`."""

    entries: tuple[Entry[T], ...]
    samples: int
    pad_to: int
    number: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again at `until`, or earlier if a request arrives."""

    until: float


@dataclass(frozen=True, slots=True)
class Nothing:
    """No worker is idle or nothing waits; ask again when that changes."""


_NOTHING = Nothing()


class Batcher:
    """The batching of one model.

    Construction:
        compiled: ascending batch sizes that the backend accepts; empty means any.
        fill_wait_s: the longest that an idle worker waits (10 ms: Triton's customary queue delay).
        gain: how many times the single-sample throughput the batch must reach before waiting is considered.
    """

    def __init__(self, compiled: tuple[int, ...] = (), *, fill_wait_s: float = 0.010, gain: float = 1.1) -> None:
        self.limit: int | None = None
        self._compiled = compiled
        self._fill_wait_s = fill_wait_s
        self._gain = gain
        self._idle_since: float | None = None

    def next_batch(self, backlog: Backlog[T], now: float, idle_workers: int) -> Dispatch[T] | Wait | Nothing:
        """Decide for one idle worker; repeat until the answer is not a `Dispatch`."""
        if idle_workers < 1 or not backlog.waiting:
            self._idle_since = None
            return _NOTHING
        target = self._target(backlog)
        until = self._wait_until(backlog, now, target)
        if until > now:
            return Wait(until)
        self._idle_since = None
        batch = backlog.take(now, target)
        if batch is None:
            raise OursError("backlog", f"{backlog.waiting} samples wait, yet none can be taken")
        return Dispatch(batch.entries, batch.samples, self.padded(batch.samples), batch.number)

    def padded(self, samples: int) -> int:
        """The batch size that the backend will run for so many samples. Raises: OursError if none is large enough."""
        if not self._compiled:
            return samples
        index = bisect_left(self._compiled, samples)
        if index == len(self._compiled):
            raise OursError("batch_size", f"{samples} samples, but the largest compiled batch is {self._compiled[-1]}")
        return self._compiled[index]

    def _target(self, backlog: Backlog[T]) -> int:
        target = backlog.pace.batch if backlog.pace else backlog.max_batch
        return max(1, target if self.limit is None else min(target, self.limit))

    def _wait_until(self, backlog: Backlog[T], now: float, target: int) -> float:
        """Until when the worker should wait; -inf for not at all."""
        pace = backlog.pace
        if target == 1 or pace is None or not pace.measured or not self._pays(pace, target):
            return -inf
        head = backlog.head()
        have = backlog.waiting_like(head.shape) if head else 0
        if have >= target or backlog.waiting > have:
            return -inf
        if have * backlog.gap_s >= pace.seconds(have) + pace.seconds(1) - pace.seconds(have + 1):
            return -inf
        if self._idle_since is None:
            self._idle_since = now
        silent_since = max(self._idle_since, backlog.last_arrival)
        until = min(self._idle_since + self._fill_wait_s, silent_since + SILENCE_GAPS * backlog.gap_s)
        due = backlog.deadline()
        return until if due is None else min(until, due + pace.seconds(1) - pace.seconds(target))

    def _pays(self, pace: Pace, target: int) -> bool:
        return pace.seconds(1) * target >= self._gain * pace.seconds(target)
