"""Plans the pull of one artifact's chunks: a window of questions, each with a deadline, until all are on disk.

1. At most `window` questions are open, and never two for one chunk (decision 5: 8 x 256 KiB fill 1 GbE; more gains nothing, measured).
2. A question is lost after its deadline: 2 s at first (decision 5), doubled at each new try of that chunk, at most `longest_s`.
3. A loss halves the present window, an answer adds one to it: a slow link is not flooded with what it has not yet delivered.
4. A late answer is an answer. A chunk that is here already is not asked for again, whoever brought it.
5. After `patience` losses without a single answer it stalls: it asks nothing more until `Resumed` (the link came back) or a late answer.
   So the number of questions without progress is bounded, whatever the peer does.
6. A refusal by the peer ends the transfer; the chunks that are on disk stay there for the next.
7. With a rate, questions spend bytes from a bucket that holds one window.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from appliance.contract.errors import OursError
from appliance.contract.models import CHUNK_BYTES

SLACK_BYTES = 1024
"""Forgiven to a question that the bucket owes: time is a float, and a deadline that is a rounding error away would spin."""


class Progress(StrEnum):
    """Where a transfer stands."""

    PULLING = "pulling"
    STALLED = "stalled"
    COMPLETE = "complete"
    REFUSED = "refused"


TRANSITIONS: dict[tuple[Progress, str], Progress] = {
    (Progress.PULLING, "all_heard"): Progress.COMPLETE,
    (Progress.PULLING, "peer_refused"): Progress.REFUSED,
    (Progress.PULLING, "patience_ended"): Progress.STALLED,
    (Progress.STALLED, "heard"): Progress.PULLING,
    (Progress.STALLED, "resumed"): Progress.PULLING,
    (Progress.STALLED, "peer_refused"): Progress.REFUSED,
}
"""State and cause to the next state; a pair that is not here changes nothing. Complete and refused are final."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Command: ask the peer for this chunk now; a `Heard` or `Refused` is owed, or none if it is lost."""

    index: int


@dataclass(frozen=True, slots=True)
class Complete:
    """Command: every chunk is here; check the whole. Given once."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Command: the peer will not serve this artifact; `reason` is its word. Given once."""

    reason: str


Command = Ask | Complete | GiveUp


@dataclass(frozen=True, slots=True)
class Heard:
    """Event: a question ended. `ok` means that the chunk is stored; otherwise it failed or was no good, and counts as lost."""

    index: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Event: the peer answered that it does not serve this artifact."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """Event: there is new reason to hope, such as a link that came back."""


Event = Heard | Refused | Resumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How hard to pull. `window` in chunks; `first_s`, `longest_s`: deadline of a chunk's first and of its slowest try; `patience` in losses.

    `rate`: bytes per second, None for no limit.
    """

    window: int = 8
    first_s: float = 2.0
    longest_s: float = 30.0
    patience: int = 16
    rate: float | None = None


class Transfer:
    """One artifact's pull. `missing`: the indices that are not on disk. Call `tick` once to begin, and whenever `deadline()` has come."""

    def __init__(self, missing: Sequence[int], pace: Pace = Pace()) -> None:
        self.progress = Progress.PULLING
        self._pace = pace
        self._chunks = frozenset(missing)
        self._queue = deque(sorted(self._chunks))
        self._open: dict[int, float] = {}
        self._heard: set[int] = set()
        self._tries: dict[int, int] = {}
        self._window = pace.window
        self._losses = 0
        self._tokens = float(pace.window * CHUNK_BYTES)
        self._refilled: float | None = None

    @property
    def outstanding(self) -> frozenset[int]:
        """The chunks that are asked for now."""
        return frozenset(self._open)

    def deadline(self) -> float | None:
        """When to call `tick` next, on the clock of `now`; None while only an event can help."""
        if self.progress is not Progress.PULLING:
            return None
        times = list(self._open.values())
        if self._queue and len(self._open) < self._window and self._pace.rate and self._refilled is not None:
            times.append(self._refilled + max(0.0, CHUNK_BYTES - self._tokens) / self._pace.rate)
        return min(times, default=None)

    def tick(self, now: float) -> list[Command]:
        """Time has passed: count what is lost, ask for what fits."""
        if self.progress is not Progress.PULLING:
            return []
        lost = [index for index, until in self._open.items() if until <= now]
        for index in lost:
            self._lose(index)
        return self._next(now)

    def feed(self, event: Event, now: float) -> list[Command]:
        """Take an event and return what to do. Raises: OursError (`chunk`) for a chunk that is not part of this transfer."""
        if isinstance(event, Heard) and event.index not in self._chunks:
            raise OursError("chunk", f"chunk {event.index} was never missing", where="transfer")
        if self.progress in (Progress.COMPLETE, Progress.REFUSED):
            return []
        match event:
            case Refused(reason):
                self._open.clear()
                self._move("peer_refused")
                return [GiveUp(reason)]
            case Resumed():
                self._losses = 0
                self._move("resumed")
            case Heard(index, ok=True):
                self._keep(index)
            case Heard(index):
                if index in self._open:
                    self._lose(index)
        return self._next(now)

    def _keep(self, index: int) -> None:
        if index in self._heard:
            return
        self._heard.add(index)
        if self._open.pop(index, None) is None:
            self._queue.remove(index)  # it came late, and was queued for another try
        self._losses = 0
        self._window = min(self._window + 1, self._pace.window)
        self._move("heard")

    def _lose(self, index: int) -> None:
        del self._open[index]
        self._queue.append(index)
        self._tries[index] = self._tries.get(index, 0) + 1
        self._window = max(1, self._window // 2)
        self._losses += 1

    def _next(self, now: float) -> list[Command]:
        if len(self._heard) == len(self._chunks):
            self._move("all_heard")
            return [Complete()]
        if self._losses >= self._pace.patience:
            self._queue.extend(self._open)  # their answers still count if they come
            self._open.clear()
            self._move("patience_ended")
        if self.progress is not Progress.PULLING:
            return []
        self._refill(now)
        asks: list[Command] = []
        while self._queue and len(self._open) < self._window and self._spend():
            index = self._queue.popleft()
            wait = min(self._pace.first_s * 2 ** min(self._tries.get(index, 0), 30), self._pace.longest_s)
            self._open[index] = now + wait
            asks.append(Ask(index))
        return asks

    def _refill(self, now: float) -> None:
        if self._pace.rate is not None and self._refilled is not None:
            full = float(self._pace.window * CHUNK_BYTES)
            self._tokens = min(full, self._tokens + (now - self._refilled) * self._pace.rate)
        self._refilled = now

    def _spend(self) -> bool:
        if self._pace.rate is None:
            return True
        if self._tokens < CHUNK_BYTES - SLACK_BYTES:
            return False
        self._tokens -= CHUNK_BYTES
        return True

    def _move(self, cause: str) -> None:
        self.progress = TRANSITIONS.get((self.progress, cause), self.progress)
