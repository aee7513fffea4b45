"""What serving counts: the last half minute for the vitals, and everything for the metrics."""

from collections import deque
from typing import Protocol

from appliance.contract.models import Manifest
from appliance.contract.vocabulary import Mode, Outcome
from appliance.ports import Clock

WINDOW_S = 30.0
WINDOW_MAX = 20_000


class Meter(Protocol):
    """The part of the metrics that serving feeds."""

    def answered(self, model: str, mode: Mode, seconds: float) -> None:
        """One request was answered after so many seconds."""

    def failed(self, model: str, outcome: Outcome) -> None:
        """One request was not answered, and why."""

    def batch(self, model: str, utilization: float) -> None:
        """A batch ran with this share (0..1) of its largest size."""

    def released(self, model: str, released_at: float) -> None:
        """A version that was released at this wall time (seconds since the epoch) serves now."""


class Tally:
    """Counts since start, and latencies of the last `WINDOW_S` seconds."""

    def __init__(self, meter: Meter, clock: Clock) -> None:
        self._meter = meter
        self._clock = clock
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW_MAX)
        self.answered_total = 0
        self.failed_total = 0

    def answered(self, model: str, mode: Mode, seconds: float) -> None:
        """Count an answer."""
        self.answered_total += 1
        self._recent.append((self._clock.monotonic(), seconds))
        self._meter.answered(model, mode, seconds)

    def failed(self, model: str, outcome: Outcome) -> None:
        """Count a request that got no answer. A caller that left is not a failure of ours."""
        if outcome is not Outcome.CANCELLED:
            self.failed_total += 1
        self._meter.failed(model, outcome)

    def batch(self, model: str, utilization: float) -> None:
        """Count a batch."""
        self._meter.batch(model, utilization)

    def mounted(self, manifest: Manifest) -> None:
        """Note which release serves."""
        self._meter.released(manifest.model_id, manifest.released_at)

    def recent(self) -> tuple[float, float | None, float | None]:
        """Answers per second, p50 and p99 in milliseconds over the window; None where nothing was answered."""
        now = self._clock.monotonic()
        while self._recent and now - self._recent[0][0] > WINDOW_S:
            self._recent.popleft()
        if not self._recent:
            return 0.0, None, None
        ordered = sorted(seconds for _, seconds in self._recent)
        span = max(now - self._recent[0][0], 1.0)
        return len(ordered) / span, 1e3 * ordered[len(ordered) // 2], 1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
