"""How good a link is while it works: loss, round trips and suspicions, with hysteresis.

API: `Quality()`; `.suspected(at)`; `.received(seq)` for each heartbeat; `.answered(rtt_s, at)` and `.missed()` for whatever was asked of the peer;
`.fault(at) -> str` is why it is bad, or empty; `.clean(at)` is whether nothing is even close to bad; `.forgive()` after a change of state.

1. Bad: at least `SUSPICIONS` in `SUSPICION_S`; a mean loss above 5 %; a 95th percentile of round trips above 150 ms (the cloud time-out: such a link
   cannot carry a cloud answer). One gap is never enough.
2. Clean: loss below 3 % and the 95th percentile below 120 ms. Between the two nothing changes (hysteresis).
3. Loss is an exponential mean over about 100 heartbeats and questions: at 2 % true loss it stays below 5 % (three standard deviations). A question without
   answer counts as a loss, so a link that is dead in one direction shows. A gap of more than `OUTAGE` heartbeats was an outage, not loss.
4. Round trips older than `RTT_S` say nothing; fewer than `RTT_MIN` neither.
"""

from collections import deque

SUSPICIONS = 3
SUSPICION_S = 600.0
LOSS_ENTER, LOSS_LEAVE = 0.05, 0.03
RTT_ENTER_S, RTT_LEAVE_S = 0.150, 0.120
RTT_S = 120.0
RTT_MIN, RTT_MAX = 5, 64
OUTAGE = 5
_WEIGHT = 0.01


class Quality:
    """The quality of one link; it starts good."""

    def __init__(self) -> None:
        self.loss = 0.0
        self._seq: int | None = None
        self._suspicions: deque[float] = deque(maxlen=SUSPICIONS)
        self._rtts: deque[tuple[float, float]] = deque(maxlen=RTT_MAX)

    def suspected(self, at: float) -> None:
        """Count a suspicion."""
        self._suspicions.append(at)

    def received(self, seq: int) -> None:
        """Take a heartbeat's number in; gaps are losses, a number that went back is a restart of the peer or a repetition."""
        lost = seq - self._seq - 1 if self._seq is not None else 0
        self._seq = seq
        for _ in range(lost if 0 < lost <= OUTAGE else 0):
            self.missed()
        self.loss -= _WEIGHT * self.loss

    def answered(self, rtt_s: float, at: float) -> None:
        """Take the round trip of an answered question in."""
        self._rtts.append((at, rtt_s))
        self.loss -= _WEIGHT * self.loss

    def missed(self) -> None:
        """Count a heartbeat or an answer that did not come."""
        self.loss += _WEIGHT * (1 - self.loss)

    def rtt_p95_s(self, at: float) -> float | None:
        """The 95th percentile of recent round trips (nearest rank); None if there are too few."""
        recent = sorted(rtt_s for when, rtt_s in self._rtts if when > at - RTT_S)
        return recent[-(-95 * len(recent) // 100) - 1] if len(recent) >= RTT_MIN else None

    def fault(self, at: float) -> str:
        """Why the link is bad; empty if it is not."""
        if len(self._suspicions) == SUSPICIONS and self._suspicions[0] > at - SUSPICION_S:
            return f"{SUSPICIONS} suspicions in {at - self._suspicions[0]:.0f} s"
        if self.loss > LOSS_ENTER:
            return f"loss {self.loss:.1%}"
        rtt_s = self.rtt_p95_s(at) if self._rtts else None
        return f"round trip p95 {rtt_s * 1e3:.0f} ms" if rtt_s is not None and rtt_s > RTT_ENTER_S else ""

    def clean(self, at: float) -> bool:
        """Whether loss and round trips are below the lower marks."""
        rtt_s = self.rtt_p95_s(at) if self._rtts else None
        return self.loss < LOSS_LEAVE and (rtt_s is None or rtt_s < RTT_LEAVE_S)

    def forgive(self) -> None:
        """Forget the suspicions: the state that they led to is entered or left."""
        self._suspicions.clear()
