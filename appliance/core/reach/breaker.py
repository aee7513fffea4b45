"""A circuit breaker for one callee (the cloud): after failures it refuses at once, and lets single calls through to find out when it works again.

API: `Breaker()`; `.permit(now) -> Permit(trial) | Refusal(retry_after_s)` before each call; then exactly one of `.succeeded(permit, took_s, now)`,
`.failed(permit, now, chance=…)` or `.abandoned(permit, now)` (the caller left: nothing is known); each returns `Turned(state, why) | None`. `.would_permit(now)`
asks without taking a trial. `.deadline()`: when an open breaker allows a trial.

1. CLOSED: `failures` in a row open it. A success in between starts the count again.
2. OPEN: every call is refused at once, with the seconds after which to ask, until the backoff is over. It doubles from `backoff_s` to
   `backoff_max_s` with each trial that failed; half of it is chance, so that a region's devices do not come back together. Chance is an argument.
3. HALF_OPEN: one call at a time is a trial. Success closes; failure opens again. A trial that was never reported is over after `trial_s`.
4. An answer after the deadline is a failure: nobody waited for it.
5. A call that began before the last turn says nothing about now, and is ignored: late failures of the past do not open a breaker that a trial closed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from appliance.contract.errors import OursError


class State(StrEnum):
    """Whether calls go through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Sign(StrEnum):
    """What was learned of the callee."""

    TRIPPED = "failures in a row"
    WAITED = "backoff over"
    PASSED = "trial passed"
    FAILED = "trial failed"


TRANSITIONS: Mapping[tuple[State, Sign], State] = {
    (State.CLOSED, Sign.TRIPPED): State.OPEN,
    (State.OPEN, Sign.WAITED): State.HALF_OPEN,
    (State.HALF_OPEN, Sign.PASSED): State.CLOSED,
    (State.HALF_OPEN, Sign.FAILED): State.OPEN,
}
_DOUBLINGS = 30


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """Times in seconds; see the rules above. `deadline_s` is the time of one call, with the round trip."""

    failures: int = 5
    deadline_s: float = 0.150
    backoff_s: float = 0.1
    backoff_max_s: float = 2.0
    trial_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Permit:
    """Call now, and report with this. `turn` is the breaker's count of turns at that time."""

    trial: bool
    turn: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Do not call: the callee is presumed dead, or a trial is under way."""

    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Turned:
    """The state from now on, for the log and the router."""

    state: State
    why: str


class Breaker:
    """The breaker of one callee; it starts closed."""

    def __init__(self, settings: BreakerSettings | None = None) -> None:
        self.state = State.CLOSED
        self._settings = settings or BreakerSettings()
        self._failures = self._opened = self._turn = 0
        self._open_until = self._trial_until = -inf

    def would_permit(self, now: float) -> bool:
        """Whether `permit` would let a call through; changes nothing."""
        return self._refusal(now) is None

    def permit(self, now: float) -> Permit | Refusal:
        """Ask for one call."""
        refusal = self._refusal(now)
        if refusal is not None:
            return refusal
        if self.state is State.CLOSED:
            return Permit(trial=False, turn=self._turn)
        if self.state is State.OPEN:
            self._set(Sign.WAITED, "")
        self._turn += 1  # an earlier trial, if there was one, is over
        self._trial_until = now + self._settings.trial_s
        return Permit(trial=True, turn=self._turn)

    def succeeded(self, permit: Permit, took_s: float, now: float, *, chance: float = 0.5) -> Turned | None:
        """The call was answered after `took_s` (rule 4)."""
        if took_s > self._settings.deadline_s:
            return self.failed(permit, now, chance=chance)
        if permit.turn != self._turn:
            return None
        self._failures = 0
        if not permit.trial:
            return None
        self._opened = 0
        return self._set(Sign.PASSED, f"answered in {took_s * 1e3:.0f} ms")

    def failed(self, permit: Permit, now: float, *, chance: float = 0.5) -> Turned | None:
        """The call failed or timed out. `chance` is uniform in 0 to 1. Raises: OursError (`chance`), and nothing changed."""
        if not 0 <= chance <= 1:
            raise OursError("chance", f"chance {chance}, expected 0 to 1")
        if permit.turn != self._turn:
            return None
        self._failures += 1
        if not permit.trial and self._failures < self._settings.failures:
            return None
        whole = min(self._settings.backoff_s * 2.0 ** min(self._opened, _DOUBLINGS), self._settings.backoff_max_s)
        self._opened += 1
        self._open_until = now + whole * (1 + chance) / 2
        return self._set(Sign.FAILED if permit.trial else Sign.TRIPPED, f"{self._failures} failures in a row")

    def abandoned(self, permit: Permit, now: float) -> None:
        """The caller left before there was a result: a trial makes way for the next."""
        if permit.trial and permit.turn == self._turn:
            self._trial_until = now

    def deadline(self) -> float | None:
        """When the next trial is allowed; None while closed."""
        if self.state is State.CLOSED:
            return None
        return self._open_until if self.state is State.OPEN else self._trial_until

    def _refusal(self, now: float) -> Refusal | None:
        due = self.deadline()
        return Refusal(due - now) if due is not None and now < due else None

    def _set(self, sign: Sign, why: str) -> Turned:
        state = TRANSITIONS.get((self.state, sign))
        if state is None:
            raise OursError("breaker", f"{sign.name} is no event of state {self.state}")
        self.state = state
        self._turn += 1
        if state is State.CLOSED:
            self._failures = 0
        return Turned(state, why)
