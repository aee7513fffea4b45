"""What became of every request of a load, and the figures of it.

1. Each request is one of: answered (200), refused (429, 503, 504), failed (another status, or lost with its connection), unfinished.
   None is left out: `offered` is their sum.
2. Latency runs from when a request was *due*, not from when it was sent: a generator that falls behind shows it (`lag_p99_ms`) and hides nothing.
3. Rates count only answers that came within the window; goodput only those that came within the SLO besides. What comes in the drain after
   the window is answered, but makes no rate.
4. Percentiles are nearest-rank over answered requests alone; refusals have their own.
"""

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from appliance.workshop.load_http import HTTP_OK, Reply

REFUSALS = frozenset({429, 503, 504})
SAMPLES_FOR_P999 = 1_000


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one load. None: there was nothing to measure it on.

    Attributes:
        hinted: the share of refusals that say when to come back.
        success: answered of all offered; alone it says nothing of latency, hence `in_slo`, the share of all offered that was answered in time.
        lag_p99_ms: how late the generator itself sent; where it nears the latencies, the generator is what was measured.
        modes: answers by the mode that made them, where the server says one.
    """

    window_s: float
    slo_ms: float
    offered: int
    answered: int
    refused: int
    failed: int
    unfinished: int
    answered_per_s: float
    goodput_per_s: float
    success: float | None
    in_slo: float | None
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    refusal_p50_ms: float | None
    refusal_p99_ms: float | None
    hinted: float | None
    lag_p99_ms: float | None
    modes: dict[str, int]
    reasons: dict[str, int]


def percentile(ordered: "list[float]", share: float) -> float | None:
    """The nearest-rank percentile of sorted values; None of nothing."""
    return ordered[max(math.ceil(len(ordered) * share), 1) - 1] if ordered else None


def _ms(values: "array[float]", share: float) -> float | None:
    found = percentile(sorted(values), share)
    return None if found is None else round(found * 1e3, 4)


@dataclass(slots=True)
class Tally:
    """Counts while a load runs. Times are of `time.perf_counter`; `until` is the end of the window."""

    slo_s: float
    until: float = math.inf
    offered: int = 0
    inside: int = 0
    good_inside: int = 0
    in_time: int = 0
    hinted: int = 0
    failed: int = 0
    latencies_s: "array[float]" = field(default_factory=lambda: array("d"))
    refusals_s: "array[float]" = field(default_factory=lambda: array("d"))
    lags_s: "array[float]" = field(default_factory=lambda: array("d"))
    modes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def sent(self, due: float, now: float) -> None:
        """A request that was due then is sent now."""
        self.lags_s.append(now - due)

    def heard(self, due: float, now: float, reply: Reply) -> None:
        """What became of a request that was due then."""
        latency_s = now - due
        if reply.status == HTTP_OK:
            self.latencies_s.append(latency_s)
            good = latency_s <= self.slo_s
            self.in_time += good
            if now <= self.until:
                self.inside += 1
                self.good_inside += good
            if reply.mode:
                self.modes[reply.mode] += 1
            return
        self.reasons[reply.reason] += 1
        if reply.status in REFUSALS:
            self.refusals_s.append(latency_s)
            self.hinted += reply.retry_after_s is not None
        else:
            self.failed += 1

    def summary(self, window_s: float) -> Summary:
        """The figures; whatever was offered and not heard of is unfinished."""
        answered, refused = len(self.latencies_s), len(self.refusals_s)
        return Summary(
            window_s=round(window_s, 3),
            slo_ms=self.slo_s * 1e3,
            offered=self.offered,
            answered=answered,
            refused=refused,
            failed=self.failed,
            unfinished=self.offered - answered - refused - self.failed,
            answered_per_s=round(self.inside / window_s, 2),
            goodput_per_s=round(self.good_inside / window_s, 2),
            success=_share(answered, self.offered),
            in_slo=_share(self.in_time, self.offered),
            p50_ms=_ms(self.latencies_s, 0.5),
            p99_ms=_ms(self.latencies_s, 0.99),
            p999_ms=_ms(self.latencies_s, 0.999) if answered >= SAMPLES_FOR_P999 else None,
            refusal_p50_ms=_ms(self.refusals_s, 0.5),
            refusal_p99_ms=_ms(self.refusals_s, 0.99),
            hinted=_share(self.hinted, refused),
            lag_p99_ms=_ms(self.lags_s, 0.99),
            modes=dict(self.modes),
            reasons=dict(self.reasons.most_common(8)),
        )


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 5) if whole else None
