"""Phi-accrual: a score for how unusual the silence of a peer is, by the intervals of its heartbeats (Hayashibara et al. 2004).

API: `Suspicion(interval_s)`; `.heard(at, heartbeat=…, learn=…)` at each packet; `.phi(at)`; `.crosses_at` is when phi reaches the threshold if the silence goes on;
`phi_of(y)` and `y_of(phi)` convert between the score and standard deviations.

1. phi = -log10 P(a longer interval), for a normal distribution of the last `WINDOW` intervals between heartbeats. Evidence of life is *any* packet: silence
   is counted from the last one; but only heartbeats are learned, else busy traffic would make a pause of a second look like a failure.
2. In erfc form, and by its asymptote from `TAIL_Y` on: smooth to phi of thousands, never an error. (The logistic form of Akka is off by 40 % at 8 standard
   deviations, infinite at 22, and in Python raises OverflowError or ValueError; measured.)
3. The standard deviation is at least 10 % of the interval (0.5 s for 5 s). Without it a calm link makes a millisecond look like an outage.
4. Intervals that end a suspicion or overlap a stall of this process are not learned: outages in the window raise the 99th percentile of detection
   from 12 s to a minute and more (measured). Intervals longer than the threshold end a suspicion, whether or not anybody looked in time.
5. The mean is at least the promised interval. Heartbeats that were held up arrive bunched; a young window that learned from them would suspect every
   interval that is kept, and so never learn one again (found by the simulation: DEGRADED for good).
6. It is a score, not a probability: at 2 % loss a gap of 10 s is a 2 % event, where phi claims 10^-20. It suspects; `partition` asks.
"""

from collections import deque
from math import erfc, log, log10, pi, sqrt

from appliance.contract.errors import OursError

WINDOW = 200
"""About 17 minutes of heartbeats: 1000, as in the paper, is slow to adapt (measured)."""
THRESHOLD = 3.0
MIN_SD_SHARE = 0.1
TAIL_Y = 25.0
PHI_MAX = 1e6


def phi_of(y: float) -> float:
    """-log10 of the chance of a value more than `y` standard deviations above the mean; 0 or more, finite for every finite y up to 1e150."""
    if y < TAIL_Y:
        return max(0.0, -log10(0.5 * erfc(y / sqrt(2))))
    return y * y / (2 * log(10)) + log10(y) + log10(2 * pi) / 2


def y_of(phi: float) -> float:
    """The y whose `phi_of` is `phi`, by bisection. Raises: OursError (`phi`) if it is not above 0 and below `PHI_MAX`."""
    if not 0 < phi < PHI_MAX:
        raise OursError("phi", f"threshold {phi}, expected above 0 and below {PHI_MAX:.0f}")
    low, high = -40.0, sqrt(2 * log(10) * phi) + 1
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if phi_of(middle) < phi else (low, middle)
    return high


class Suspicion:
    """The silence of one peer that promised a heartbeat each `interval_s`; `at` is any time in seconds that only grows, here of the start."""

    def __init__(self, interval_s: float, at: float = 0.0, *, threshold: float = THRESHOLD, window: int = WINDOW) -> None:
        if interval_s <= 0 or window < 1:
            raise OursError("suspicion", f"interval {interval_s} s, window {window}: both must be above 0")
        self.last_at = at
        self._interval_s = interval_s
        self._min_sd_s = MIN_SD_SHARE * interval_s
        self._y = y_of(threshold)
        self._beat_at: float | None = None
        self._off: deque[float] = deque(maxlen=window)
        self._sum = self._squares = 0.0
        self._learned = 0
        self._mean_s, self._sd_s = interval_s, self._min_sd_s
        self.crosses_at = at + self.patience_s

    @property
    def patience_s(self) -> float:
        """Seconds of silence at which phi reaches the threshold."""
        return self._mean_s + self._y * self._sd_s

    def phi(self, at: float) -> float:
        """The score of the silence so far."""
        return phi_of((at - self.last_at - self._mean_s) / self._sd_s)

    def heard(self, at: float, *, heartbeat: bool = True, learn: bool = True) -> None:
        """Take a packet in; `learn` False: the silence before it was a suspicion or a stall (rule 4)."""
        if heartbeat:
            if learn and self._beat_at is not None and at < self.crosses_at:
                self._learn(at - self._beat_at)
            self._beat_at = at
        elif not learn:
            self._beat_at = None
        self.last_at = at
        self.crosses_at = at + self.patience_s

    def _learn(self, interval_s: float) -> None:
        """Keep the window's sums; they are of differences to the promised interval, and made anew once a window, so that rounding never adds up."""
        if interval_s > self.patience_s:
            return
        off, window = interval_s - self._interval_s, self._off
        if len(window) == window.maxlen:
            gone = window[0]
            self._sum -= gone
            self._squares -= gone * gone
        window.append(off)
        self._sum += off
        self._squares += off * off
        self._learned += 1
        if self._learned % WINDOW == 0:
            self._sum, self._squares = sum(window), sum(each * each for each in window)
        mean = self._sum / len(window)
        self._mean_s = self._interval_s + max(0.0, mean)
        self._sd_s = max(self._min_sd_s, sqrt(max(0.0, self._squares / len(window) - mean * mean)))
