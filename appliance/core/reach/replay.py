"""Paces the replay of the deferred queue so that it leaves the link to live traffic: a token bucket whose rate follows the link.

API: `ReplayPace(capacity_bytes_s)`; `.measured(capacity_bytes_s, now)` when the link was measured; `.live(size_bytes, now)` for each live
message; `.take(size_bytes, now) -> bool` before each replayed one; `.wait_s(size_bytes, now)` until it is worth asking again; `.rate(now)`.

1. The rate is at most `share` of the measured capacity, and at most what live traffic leaves of it: capacity - live; never less than `floor_share`,
   so that a saturated link drains the queue slowly rather than never.
2. Live traffic is a mean over `LIVE_S` (exponential): a burst slows the replay at once, its end frees it within seconds.
3. In any stretch of t seconds: at most rate x t + one burst + one message. A message larger than the burst goes when the bucket is full, and is
   paid off afterwards.
"""

from math import exp

from appliance.contract.errors import OursError

SHARE = 0.5
FLOOR_SHARE = 0.02
BURST_S = 0.25
LIVE_S = 2.0
LOOK_S = 0.5
"""The longest wait: live traffic may have ended meanwhile."""


class ReplayPace:
    """An empty bucket over a link of so many bytes a second. Raises: OursError (`capacity`) if that is not above 0."""

    def __init__(self, capacity_bytes_s: float, *, share: float = SHARE, floor_share: float = FLOOR_SHARE, now: float = 0.0) -> None:
        self._capacity = _positive(capacity_bytes_s)
        self._share = share
        self._floor_share = floor_share
        self._tokens = 0.0
        self._live = 0.0
        self._now = now

    def measured(self, capacity_bytes_s: float, now: float) -> None:
        """Take a new measurement of the link in. Raises: OursError (`capacity`), and nothing changed."""
        capacity = _positive(capacity_bytes_s)
        self._advance(now)
        self._capacity = capacity

    def live(self, size_bytes: int, now: float) -> None:
        """Count a live message."""
        self._advance(now)
        self._live += size_bytes / LIVE_S

    def rate(self, now: float) -> float:
        """Bytes a second that replay may use now."""
        self._advance(now)
        return self._rate()

    def take(self, size_bytes: int, now: float) -> bool:
        """Whether a message of this size may be replayed now; True pays for it."""
        self._advance(now)
        if self._tokens < self._price(size_bytes):
            return False
        self._tokens -= size_bytes
        return True

    def wait_s(self, size_bytes: int, now: float) -> float:
        """Seconds after which `take` is worth asking; 0 if it would say yes now, else at most `LOOK_S`."""
        self._advance(now)
        missing = self._price(size_bytes) - self._tokens
        return min(missing / self._rate(), LOOK_S) if missing > 0 else 0.0

    def _advance(self, now: float) -> None:
        """Fill the bucket at the rate that held since the last call, and let the live mean fade. Time that went back counts as none."""
        passed = max(0.0, now - self._now)
        self._now = max(self._now, now)
        self._tokens = min(self._tokens + passed * self._rate(), self._burst())
        self._live *= exp(-passed / LIVE_S)

    def _rate(self) -> float:
        left = min(self._share * self._capacity, self._capacity - self._live)
        return max(left, self._floor_share * self._capacity)

    def _burst(self) -> float:
        return self._share * self._capacity * BURST_S

    def _price(self, size_bytes: int) -> float:
        """The tokens that must be there: all of the message, or a full bucket. Less a rounding, so that a wait that was kept is enough."""
        return min(float(size_bytes), self._burst()) * (1 - 1e-9)


def _positive(capacity_bytes_s: float) -> float:
    if not capacity_bytes_s > 0:
        raise OursError("capacity", f"{capacity_bytes_s} bytes a second: must be above 0")
    return capacity_bytes_s
