"""How large a batch may be while the board is throttled: cut at once with the clock, cut again if answers are late, grown slowly.

API: `ThermalLimit(ceiling, budget_s)`; `.clock(ratio, now)` at each reading (`pressure.clock_ratio`; None: cannot tell); `.ran(samples, started,
now)` after each batch; `.grow(now)` at `.deadline()`; each returns `Limit(batch, why) | None`. Give `.limit` to `Batcher.limit`.

1. A batch at clock ratio r takes 1/r of the time: below `SLOW` the limit is at most floor(ceiling x r), at once.
2. Late batches (longer than the budget, half of the SLO as in `profile`) `LATE_IN_A_ROW` times halve the limit. Batches that started before the last cut
   prove nothing about it. A batch of one cannot be cut.
   If the last change was growth, it was one step too far: only that step is taken back, and the wait for the next doubles up to `recover_max_s`.
3. After `recover_s` without a cut the limit grows by one, up to what the clock allows (additive increase, multiplicative decrease); a step that
   lasted until the next, or a faster clock, makes the wait short again.
4. 1 <= limit <= ceiling, always.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from appliance.contract.errors import OursError

SLOW = 0.95
LATE_IN_A_ROW = 2


class State(StrEnum):
    """Whether batches are as large as the profile wants, cut, or growing again."""

    NOMINAL = "nominal"
    SHRUNK = "shrunk"
    RECOVERING = "recovering"


class Change(StrEnum):
    """What happened to the limit."""

    CUT = "clock fell or answers late"
    GREW = "calm"
    FILLED = "ceiling reached"


TRANSITIONS: Mapping[tuple[State, Change], State] = {
    (State.NOMINAL, Change.CUT): State.SHRUNK,
    (State.SHRUNK, Change.CUT): State.SHRUNK,
    (State.RECOVERING, Change.CUT): State.SHRUNK,
    (State.SHRUNK, Change.GREW): State.RECOVERING,
    (State.RECOVERING, Change.GREW): State.RECOVERING,
    (State.SHRUNK, Change.FILLED): State.NOMINAL,
    (State.RECOVERING, Change.FILLED): State.NOMINAL,
}


@dataclass(frozen=True, slots=True)
class Limit:
    """Batches may have so many samples from now on."""

    batch: int
    why: str


class ThermalLimit:
    """The limit of one model. `ceiling` is its largest batch, `budget_s` the longest that a batch should take."""

    def __init__(self, ceiling: int, budget_s: float, *, recover_s: float = 1.0, recover_max_s: float = 60.0) -> None:
        if ceiling < 1 or budget_s <= 0:
            raise OursError("thermal", f"ceiling {ceiling}, budget {budget_s} s: both must be above 0")
        self.limit = ceiling
        self.state = State.NOMINAL
        self._ceiling = ceiling
        self._budget_s = budget_s
        self._recover_s = recover_s
        self._recover_max_s = recover_max_s
        self._wait_s = recover_s
        self._grown = False
        self._allowed = ceiling
        self._changed = -inf
        self._late = 0

    def clock(self, ratio: float | None, now: float) -> Limit | None:
        """Take the present clock ratio in (rule 1)."""
        if ratio is None:
            return None
        allowed = self._ceiling if ratio >= SLOW else max(1, int(self._ceiling * ratio))
        if allowed > self._allowed:
            self._wait_s = self._recover_s
        self._allowed = allowed
        if self.limit <= self._allowed:
            return None
        return self._set(self._allowed, Change.CUT, f"clock at {ratio:.0%} of its cap", now)

    def ran(self, samples: int, started: float, now: float) -> Limit | None:
        """Take a finished batch in (rule 2)."""
        if started < self._changed:
            return None
        took = now - started
        self._late = self._late + 1 if took > self._budget_s else 0
        if self._late < LATE_IN_A_ROW or min(samples, self.limit) == 1:
            return None
        target = min(samples, self.limit) // 2
        if self._grown and samples >= self.limit:
            target = self.limit - 1
            self._wait_s = min(2 * self._wait_s, self._recover_max_s)
        return self._set(target, Change.CUT, f"{samples} samples took {took * 1e3:.0f} ms", now)

    def grow(self, now: float) -> Limit | None:
        """Grow by one if it is time (rule 3)."""
        due = self.deadline()
        if due is None or now < due:
            return None
        if self._grown:
            self._wait_s = self._recover_s
        grown = self.limit + 1
        return self._set(grown, Change.FILLED if grown == self._ceiling else Change.GREW, "recovering", now)

    def deadline(self) -> float | None:
        """When `grow` will do something; None if the limit is as large as the clock allows."""
        return self._changed + self._wait_s if self.limit < self._allowed else None

    def _set(self, batch: int, change: Change, why: str, now: float) -> Limit:
        state = TRANSITIONS.get((self.state, change))
        if state is None:
            raise OursError("thermal", f"{change.name} is no event of state {self.state}")
        self.state, self.limit, self._changed, self._late = state, batch, now, 0
        self._grown = change is not Change.CUT
        return Limit(batch, why)
