"""What an answer costs at each place: the device by the hour over what it can do, the cloud by the second and by the byte.

API: `Prices(…)`; `edge_cost`, `split_cost`, `cloud_cost` give a `Cost`, whose `.of(sent_bytes)` is in dollars.

1. Edge: the device's price per hour over the answers that it can give in an hour (amortised: it is paid for, busy or not).
2. Cloud: spot price x duration + egress x the bytes that are really sent: the features for SPLIT, the input for CLOUD_FULL. SPLIT also pays the device for
   the time of the feature extractor.
3. A spot price older than `SPOT_MAX_AGE_S` is not trusted: the on-demand price counts, which is never below it.
"""

from dataclasses import dataclass

HOUR_S = 3_600.0
GB = 1e9
SPOT_MAX_AGE_S = 900.0


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars: per hour of one cloud worker (spot, seen at `at`, and on demand), per GB that leaves the site, per hour of this device."""

    spot_per_h: float
    on_demand_per_h: float
    egress_per_gb: float
    device_per_h: float
    at: float = 0.0

    def compute_per_s(self, now: float) -> float:
        """What a second of a cloud worker costs (rule 3)."""
        fresh = now - self.at <= SPOT_MAX_AGE_S
        return (self.spot_per_h if fresh else max(self.spot_per_h, self.on_demand_per_h)) / HOUR_S


@dataclass(frozen=True, slots=True)
class Cost:
    """What does not depend on the bytes, and what does."""

    fixed: float
    per_byte: float = 0.0

    def of(self, sent_bytes: float) -> float:
        """Dollars for an answer for which so many bytes left the site."""
        return self.fixed + self.per_byte * sent_bytes


def edge_cost(prices: Prices, answers_per_s: float, samples: float = 1.0) -> Cost:
    """On this device, which can give so many answers a second (above 0)."""
    return Cost(samples * prices.device_per_h / HOUR_S / answers_per_s)


def cloud_cost(prices: Prices, duration_s: float, now: float, samples: float = 1.0) -> Cost:
    """In the cloud, which computes for `duration_s` per sample."""
    return Cost(samples * prices.compute_per_s(now) * duration_s, prices.egress_per_gb / GB)


def split_cost(prices: Prices, features_s: float, head_s: float, now: float, samples: float = 1.0) -> Cost:
    """Features on the device in `features_s`, the head in the cloud in `head_s`, per sample."""
    return Cost(samples * (prices.device_per_h / HOUR_S * features_s + prices.compute_per_s(now) * head_s), prices.egress_per_gb / GB)
