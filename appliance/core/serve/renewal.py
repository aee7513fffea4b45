"""When a process that runs models is replaced by a fresh one because its memory is fragmented.

1. A process is fragmented when more than 15 % of what it holds is needed by nothing that is loaded in it (the figure is the assignment's), and
   that is at least 16 MiB: less is not worth a second process. On a GPU the same holds for what the driver says it holds there.
2. Only a resting process is judged: while it works it also holds what its batches need.
3. What a process holds above its need when it first rests after 100 batches is its own way of working, and counted as need: a fresh one would
   come to the same, and be renewed for nothing for ever. Before its first batch everything above its need is waste.
4. Renewal waits for a calm moment, and for room for a second copy of what is needed.
5. One process at a time, and each at most once per hour, failed attempts included.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

THRESHOLD = 0.15
WORTH_BYTES = 16 << 20
SETTLED_BATCHES = 100
PAUSE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Holding:
    """What one process holds; bytes. `pid` tells one process from its successor; None where nobody can tell."""

    worker: int
    pid: int | None
    held: int | None
    needed: int | None
    resting: bool
    batches: int
    gpu_held: int | None = None
    gpu_needed: int = 0


@dataclass(frozen=True, slots=True)
class Renew:
    """Renew the process of this worker, and tell `Renewal.done` when that is over. `why` is for people."""

    worker: int
    ratio: float
    why: str


@dataclass(slots=True)
class _Watch:
    """What is known of one worker. `own` is what its process holds above its need by its way of working, host and GPU (rule 3)."""

    pid: int | None = None
    own: tuple[int, int] | None = None
    after: float = -inf


class Renewal:
    """Watches all processes of one device and renews one at a time; `now` is in monotonic seconds."""

    def __init__(self, threshold: float = THRESHOLD, pause_s: float = PAUSE_S, worth_bytes: int = WORTH_BYTES) -> None:
        self._threshold = threshold
        self._pause_s = pause_s
        self._worth_bytes = worth_bytes
        self._watches: dict[int, _Watch] = {}
        self._renewing: int | None = None

    def observe(self, now: float, holdings: Iterable[Holding], *, calm: bool, room_bytes: int | None = None) -> Renew | None:
        """Take in what all processes hold; return the one to renew now. `room_bytes` None: nobody knows how much memory is free."""
        wanted = [found for holding in holdings if (found := self._judge(now, holding)) is not None]
        if self._renewing is not None or not calm or not wanted:
            return None
        holding, renew = max(wanted, key=lambda one: one[1].ratio)
        if room_bytes is not None and room_bytes < (holding.needed or 0):
            return None
        self._watches[renew.worker].after = now + self._pause_s
        self._renewing = renew.worker
        return renew

    def done(self, worker: int) -> None:
        """A renewal is over, whatever came of it. Raises: ValueError if none of this worker was under way."""
        if self._renewing != worker:
            raise ValueError(f"worker {worker} is not being renewed")
        self._renewing = None

    def _judge(self, now: float, holding: Holding) -> tuple[Holding, Renew] | None:
        watch = self._watches.setdefault(holding.worker, _Watch())
        if watch.pid != holding.pid:
            watch.pid, watch.own = holding.pid, None
        if holding.pid is None or not holding.resting:
            return None
        host, gpu = _above(holding.held, holding.needed), _above(holding.gpu_held, holding.gpu_needed)
        if watch.own is None and holding.batches >= SETTLED_BATCHES:
            watch.own = (host, gpu)
        if now < watch.after or (watch.own is None and holding.batches):
            return None
        own = watch.own or (0, 0)
        wastes = [
            (self._ratio(host - own[0], holding.held), f"{(holding.held or 0) >> 20} MiB of anonymous memory"),
            (self._ratio(gpu - own[1], holding.gpu_held), f"{(holding.gpu_held or 0) >> 20} MiB of GPU memory"),
        ]
        ratio, what = max(wastes)
        if ratio <= self._threshold:
            return None
        return holding, Renew(holding.worker, ratio, f"{ratio:.0%} of its {what} serves nothing that is loaded")

    def _ratio(self, waste: int, held: int | None) -> float:
        return waste / held if held and waste >= self._worth_bytes else 0.0


def _above(held: int | None, needed: int | None) -> int:
    """What is held above the need; nothing where one of them is not known."""
    return 0 if held is None or needed is None else max(0, held - needed)
