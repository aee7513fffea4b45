"""When a call is made again, where, and after how long. No I/O: the clock and the dice are arguments, all times are seconds.

1. Again only where it can help and hurts nobody: the server is `busy` (it refused, nothing was done), or `unreachable`. An inference has no
   effect, so it may be repeated; a request that may end in a promise carries an id, under which a server keeps one promise.
2. `busy`: the same server, never before it said (`Retry-After-Ms`), plus jitter, so that those who were refused together do not return together.
   If that is too late, another server that was not yet tried.
3. `unreachable`: the next server that was not yet tried, at once. If none is left, all of them from the first, after a pause. But where a promise
   may have been made (the answer was lost), only the server that may have made it.
4. The pause doubles from `backoff_s` to `backoff_max_s`, and is taken by chance from 0 to that ("full jitter": AWS Architecture Blog, Exponential
   Backoff And Jitter, 2015).
5. Nothing begins at or after the deadline, and never more than `attempts` times. If another server is left, one attempt may take half of what is
   left: a server that is silent does not take all the time.
6. Calls begin at the server that answered last; `RETURN_S` after it stepped in, at the first again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from appliance.contract.errors import ApplianceError

RETURN_S = 30.0
_DOUBLINGS = 40


class Remedy(StrEnum):
    """What helps against a failure."""

    WAIT = "wait"
    MOVE = "move"


REMEDIES: Mapping[str, Remedy] = {"busy": Remedy.WAIT, "unreachable": Remedy.MOVE}
"""Any other failure is final."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient a client is; times in seconds. `attempts` counts the first one too."""

    attempts: int = 8
    backoff_s: float = 0.05
    backoff_max_s: float = 2.0

    def pause_s(self, pauses: int, chance: float) -> float:
        """The pause after `pauses` others; `chance` is 0 to 1."""
        return chance * min(self.backoff_max_s, self.backoff_s * 2.0 ** min(pauses, _DOUBLINGS))


ONCE = Policy(attempts=1)
"""For a caller that has its own way with failures."""


class Attempts:
    """One call's attempts. `server` is the index of the one to ask now."""

    def __init__(self, policy: Policy, servers: int, deadline: float, *, first: int = 0) -> None:
        self.server = first
        self._policy = policy
        self._servers = servers
        self._deadline = deadline
        self._made = 0
        self._pauses = 0
        self._tried: set[int] = set()

    def until(self, now: float) -> float:
        """When the attempt that begins now must be over."""
        is_last = self._next() is None or self._made + 1 >= self._policy.attempts
        return self._deadline if is_last else now + (self._deadline - now) / 2

    def failed(self, error: ApplianceError, now: float, chance: float, *, is_bound: bool = False) -> float | None:
        """Return after how long to ask `server`, None to give up. `is_bound`: no other server may be asked (rule 3)."""
        self._made += 1
        remedy = REMEDIES.get(error.reason)
        if remedy is None or self._made >= self._policy.attempts:
            return None
        other = None if is_bound else self._next()
        pause_s = self._policy.pause_s(self._pauses, chance)
        if remedy is Remedy.WAIT:
            pause_s += max(error.retry_after_s or 0.0, 0.0)
        elif other is not None:
            return self._moved(other, now)
        elif not is_bound:
            self._tried.clear()
            self.server = 0
        if now + pause_s < self._deadline:
            self._pauses += 1
            return pause_s
        return self._moved(other, now)

    def _next(self) -> int | None:
        """Another server that was not yet tried."""
        return next((each for each in range(self._servers) if each != self.server and each not in self._tried), None)

    def _moved(self, other: int | None, now: float) -> float | None:
        if other is None or now >= self._deadline:
            return None
        self._tried.add(self.server)
        self.server = other
        return 0.0


class Preference:
    """Where calls begin (rule 6)."""

    def __init__(self) -> None:
        self._server = 0
        self._since = 0.0

    def first(self, now: float) -> int:
        """The index of the server to begin with."""
        if self._server and now - self._since >= RETURN_S:
            self._since = now  # one call tries the first; the others stay where they are answered until it was found well
            return 0
        return self._server

    def answered(self, server: int, now: float) -> None:
        """Note who answered."""
        if server != self._server:
            self._server, self._since = server, now
