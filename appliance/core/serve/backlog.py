"""Requests of one model that wait for a worker: ordered, bounded, and refused at once where waiting would be in vain.

API, in the order in which a loop uses it (`Pace` is in `pace`, `Entry` in `waitlist`; `now` is any monotonic time in seconds):
`Backlog[T](max_batch)`; `.pace = Pace(...)` whenever the measured profile moved;
`.offer(item, now, deadline=…, size=…, shape=…, priority=…, caller=…) -> Admitted(ticket, displaced) | Refused(reason, retry_after_s)`;
`.cancel(ticket)` when the caller is gone; `.expire(now) -> list[Entry]` at `.deadline()` and before each `Batcher.next_batch`;
`.done(number)` when the worker has returned or died; `.retry_after_s(now)` for displaced callers. `.waiting` and `.max_waiting` are in samples.

1. Order: by priority 0..9 less one level for each `AGEING_S` waited, then by arrival. Ageing is linear, so the order of two
   requests never changes while they wait and the key is a constant: arrival + priority x AGEING_S.
2. Back-pressure: at most 2x `max_batch` samples wait. A newcomer that ranks before waiting ones displaces the youngest of
   the worst level; it is told so at once. No neighbour of equal rank is ever displaced.
3. Admission by predicted finish: what cannot be answered by its deadline, or its SLO, is refused on arrival, with the seconds after which it
   could be, or None where even an idle device is too slow. Requests of a worse level do not count as ahead.
4. Deadlines expire by a timer at the latest start that could still be in time, not at dequeue (Triton #7512 shows why).
5. Hints are turns: each of the refused is told to come when a place is likely free for it, one after the other (`patience`). Who returns before its
   turn is refused while the workers have a batch to run, so asking more often wins nothing, and no worker idles for it. One that does it again
   and again should be told only when its turn has come (`Refused.hold`), and may then be offered once more. While somebody waits its turn,
   who never waited gives way above half of the places: else those who were just answered would keep all among themselves.
6. Only equal shapes batch; a request with a batch of its own stays whole. Cancelled and expired ones are forgotten in O(1).
"""

from collections.abc import Hashable
from dataclasses import dataclass
from math import inf
from typing import Generic, NamedTuple, TypeVar

from appliance.contract.errors import TheirsError
from appliance.contract.vocabulary import Outcome
from appliance.core.serve.pace import Pace
from appliance.core.serve.patience import Patience
from appliance.core.serve.waitlist import PRIORITIES, Entry, Waitlist

T = TypeVar("T")

AGEING_S = 1.0
"""Seconds of waiting that are worth one priority level: far above an SLO of 150 ms, so order is strict until something starves."""
DEFAULT_PRIORITY = 5
RETRY_UNMEASURED_S = 0.05
RETRY_MIN_S = 0.001
RETRY_MAX_S = 1.0
_GAP_WEIGHT = 0.2
_GAP_MIN_S, _GAP_MAX_S = 1e-5, 1.0
"""The usual gap between arrivals: a mean of gaps cut at twice the mean, so that the pause between two bursts does not hide the bursts."""


class Admitted(NamedTuple, Generic[T]):
    """The request waits under `ticket`; `displaced` were pushed out for it and must be told `backlog_full`."""

    ticket: int
    displaced: tuple[Entry[T], ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing changed. `retry_after_s` is when it is worth asking again; None: not by waiting. `hold`: tell it only then (rule 5)."""

    reason: Outcome
    retry_after_s: float | None
    hold: bool = False


class Batch(NamedTuple, Generic[T]):
    """Taken entries of one shape, best rank first; `number` names the batch for `done`."""

    entries: tuple[Entry[T], ...]
    samples: int
    number: int


class Backlog(Generic[T]):
    """The waiting requests of one model. `max_batch` is the largest batch that the model can run."""

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self.max_waiting = 2 * max_batch
        self.pace: Pace | None = None
        self.gap_s = _GAP_MAX_S
        self.last_arrival = -inf
        self._next = 0
        self._line: Waitlist[T] = Waitlist()
        self._running: dict[int, float] = {}
        self._patience = Patience()

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._line.entries)

    @property
    def waiting(self) -> int:
        """How many samples wait."""
        return self._line.waiting

    def offer(
        self,
        item: T,
        now: float,
        *,
        deadline: float = inf,
        slo: float = inf,
        size: int = 1,
        shape: Hashable = None,
        priority: int = DEFAULT_PRIORITY,
        caller: Hashable = None,
    ) -> Admitted[T] | Refused:
        """Admit or refuse one request. Raises: TheirsError (`priority`, `batch_size`), and nothing changed.

        After `deadline` an answer is worthless, and the request expires; by `slo` it should come: what is predicted to miss it is refused,
        but once admitted a late answer is an answer.
        """
        if not 0 <= priority < PRIORITIES:
            raise TheirsError("priority", f"priority {priority}, expected 0 (highest) to {PRIORITIES - 1}")
        if not 1 <= size <= self.max_batch:
            raise TheirsError("batch_size", f"a batch of {size}, expected 1 to {self.max_batch}", remedy="split the request")
        line = self._line
        if caller is not None and line.waiting and (told := self._manners((caller, priority), size, now)):
            return told
        late = self._late_s(now, min(deadline, slo), size, shape, priority)
        if late > 0:  # the others who were refused come back too: not before half of the places are free
            after_s = late if late == inf else max(late, self.retry_after_s(now, size))
            return self._refuse(Outcome.DEADLINE, after_s, now, caller, priority)
        rank = now + priority * AGEING_S
        displaced = self._displace(rank, priority, size) if line.waiting + size > self.max_waiting else ()
        if displaced is None:
            return self._refuse(Outcome.BACKLOG_FULL, self.retry_after_s(now, size), now, caller, priority)
        ticket = self._next = self._next + 1
        due = deadline - self.pace.seconds(size) if self.pace else deadline
        line.insert(Entry(ticket, item, size, shape, priority, now, deadline, rank), due)
        gap = min(now - self.last_arrival, 2 * self.gap_s)
        self.gap_s = min(max(self.gap_s + _GAP_WEIGHT * (gap - self.gap_s), _GAP_MIN_S), _GAP_MAX_S)
        self.last_arrival = now
        if caller is not None:
            self._patience.admitted((caller, priority))
        return Admitted(ticket, displaced)

    def _manners(self, who: tuple[Hashable, int], size: int, now: float) -> Refused | None:
        """Who came back too early is refused while a worker has work; above half of the places who did not wait gives way to those who do."""
        patience, waiting = self._patience, self._line.waiting
        waited, held = patience.waited(who), patience.remaining_s(who, now)
        if held and waiting >= (self.pace.batch * self.pace.workers if self.pace else self.max_batch):
            return Refused(Outcome.BACKLOG_FULL, held, patience.deaf(who))
        if waited or waiting + size <= self.max_batch or not patience.others_wait(now):
            return None
        return self._refuse(Outcome.BACKLOG_FULL, self.retry_after_s(now, size), now, *who)

    def cancel(self, ticket: int) -> Entry[T] | None:
        """Forget a waiting request and return it; None if it no longer waits."""
        entry = self._line.entries.get(ticket)
        if entry is not None:
            self._line.remove(entry)
        return entry

    def deadline(self) -> float | None:
        """When `expire` has something to do next; None if nothing that waits can expire."""
        return self._line.next_due()

    def expire(self, now: float) -> list[Entry[T]]:
        """Remove and return the requests that can no longer be answered in time."""
        expired = []
        while (entry := self._line.pop_due(now)) is not None:
            expired.append(entry)
        return expired

    def head(self) -> Entry[T] | None:
        """The request whose turn it is; None if nothing waits."""
        return self._line.front()

    def waiting_like(self, shape: Hashable) -> int:
        """How many samples of this shape wait."""
        group = self._line.groups.get(shape)
        return group.samples if group else 0

    def take(self, now: float, limit: int) -> Batch[T] | None:
        """Take the head and, in order, what fits beside it: equal shape, `limit` samples, and nobody's deadline missed by growing."""
        line, pace = self._line, self.pace
        entry = line.front()
        if entry is None:
            return None
        taken: list[Entry[T]] = []
        samples, tightest = 0, inf
        while entry is not None:
            grown, tighter = samples + entry.size, min(tightest, entry.deadline)
            if taken and (grown > limit or (pace is not None and now + pace.seconds(grown) > tighter)):
                break
            line.remove(entry)
            taken.append(entry)
            samples, tightest = grown, tighter
            entry = line.next_like(entry.shape)
        number = self._next = self._next + 1
        self._running[number] = now + (pace.seconds(samples) if pace else 0.0)
        return Batch(tuple(taken), samples, number)

    def done(self, number: int) -> None:
        """The batch was answered or its worker is gone; unknown numbers are ignored, so a late report does no harm."""
        self._running.pop(number, None)

    def retry_after_s(self, now: float, size: int = 1) -> float:
        """Seconds until half of the places are free at the present pace: the hint for whom a full backlog refused or displaced."""
        pace = self.pace
        if pace is None:
            return RETRY_UNMEASURED_S
        batches = (self._line.waiting + size - self.max_batch) / pace.batch
        after_s = self._free_at(now, pace) - now + batches * pace.seconds(pace.batch) / pace.workers
        return min(max(after_s, RETRY_MIN_S), RETRY_MAX_S)

    def _displace(self, rank: float, priority: int, size: int) -> tuple[Entry[T], ...] | None:
        """Make room for `size` samples by removing what ranks behind `rank`, youngest of the worst level first; None if it cannot."""
        chosen: list[Entry[T]] = []
        missing = self._line.waiting + size - self.max_waiting
        if sum(self._line.level_samples[priority + 1 :]) < missing:  # nobody of a worse level, most of the time: a refusal must be cheap
            return None
        for entry in self._line.worst_first():
            if missing <= 0 or entry.priority <= priority:
                break
            if entry.rank > rank:
                chosen.append(entry)
                missing -= entry.size
        if missing > 0:
            return None
        for entry in chosen:
            self._line.remove(entry)
        return tuple(chosen)

    def _free_at(self, now: float, pace: Pace) -> float:
        return now if len(self._running) < pace.workers else max(now, min(self._running.values()))

    def _late_s(self, now: float, deadline: float, size: int, shape: Hashable, priority: int) -> float:
        """Seconds by which the predicted finish misses the deadline; inf if even an idle device would; 0 or less is in time."""
        if deadline == inf:
            return 0.0
        pace = self.pace
        if pace is None:
            return inf if deadline <= now else 0.0
        if now + pace.seconds(size) > deadline:
            return inf
        ahead = sum(self._line.level_samples[: priority + 1]) if self._line.waiting else 0
        same = min(ahead, self.waiting_like(shape)) if ahead else 0
        work_s = self._others_s(shape, pace) if ahead > same else 0.0
        whole, rest = divmod(same + size - 1, pace.batch)
        work_s += whole * pace.seconds(pace.batch)
        return self._free_at(now, pace) + work_s / pace.workers + pace.seconds(max(rest + 1, size)) - deadline

    def _others_s(self, shape: Hashable, pace: Pace) -> float:
        """Worker seconds for everything of other shapes that waits."""
        total = 0.0
        for other, group in self._line.groups.items():
            if other != shape:
                whole, rest = divmod(group.samples, pace.batch)
                total += whole * pace.seconds(pace.batch) + pace.seconds(rest)
        return total

    def _refuse(self, reason: Outcome, after_s: float, now: float, caller: Hashable, priority: int) -> Refused:
        if after_s == inf:
            return Refused(reason, None)
        after_s = min(max(after_s, RETRY_MIN_S), RETRY_MAX_S)
        if caller is not None:
            each_s = self.pace.seconds(self.pace.batch) / self.pace.batch / self.pace.workers if self.pace else 0.0
            until = min(self._patience.turn(priority, now + after_s, each_s), now + RETRY_MAX_S)
            after_s = min(max(self._patience.hold((caller, priority), until) - now, RETRY_MIN_S), RETRY_MAX_S)
        return Refused(reason, after_s)
