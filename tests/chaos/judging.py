"""The promises, and whether an experiment kept them."""

from dataclasses import dataclass, field

from appliance.lab.stream import percentile
from tests.chaos.load import Sample

SUCCESS_FLOOR = 0.95
P99_FACTOR = 2.0
SETTLED_DEPTH = 2
"""Items in a queue that nobody waits for: one on its way up, one that was just promised."""
SETTLE_LIMIT_S = 25.0


@dataclass(slots=True)
class Outcome:
    """One experiment, in loop seconds, and what was measured in it. `broken` lists the promises that were not kept, in words."""

    name: str
    what: str
    began: float
    fault_began: float = 0.0
    fault_ended: float = 0.0
    ended: float = 0.0
    requests: int = 0
    success: float = 0.0
    own_share: float = 0.0
    p99_ms: float = 0.0
    baseline_p99_ms: float = 0.0
    baseline_success: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    depth_max: int = 0
    partitioned_s: float = 0.0
    settled_s: float | None = None
    lost: int = 0
    skipped: str = ""
    broken: list[str] = field(default_factory=list)


def judge(outcome: Outcome, samples: list[Sample], baseline: list[Sample]) -> None:
    """Fill in what callers saw from the fault on, against the baseline of the same run, and name what is broken."""
    good = [sample for sample in samples if not sample.reason]
    outcome.requests = len(samples)
    outcome.success = len(good) / len(samples) if samples else 0.0
    outcome.own_share = sum(sample.is_own for sample in good) / len(good) if good else 0.0
    outcome.p99_ms = p99(samples)
    outcome.baseline_p99_ms = p99(baseline)
    outcome.baseline_success = sum(not sample.reason for sample in baseline) / len(baseline) if baseline else 0.0
    for sample in samples:
        if sample.reason:
            outcome.reasons[sample.reason] = outcome.reasons.get(sample.reason, 0) + 1
    if outcome.baseline_success <= SUCCESS_FLOOR:
        outcome.broken.append(f"baseline {outcome.baseline_success:.3f}: this machine is too busy with other things to judge")
    if not outcome.success > SUCCESS_FLOOR:
        outcome.broken.append(f"success {outcome.success:.3f}, promised above {SUCCESS_FLOOR}")
    if not outcome.p99_ms < P99_FACTOR * outcome.baseline_p99_ms:
        outcome.broken.append(f"p99 {outcome.p99_ms:.0f} ms, promised below {P99_FACTOR:g} x {outcome.baseline_p99_ms:.0f} ms")
    if outcome.settled_s is None:
        outcome.broken.append(f"queues had not settled {SETTLE_LIMIT_S:g} s after the fault")
    if outcome.lost:
        outcome.broken.append(f"{outcome.lost} promised events had not arrived {SETTLE_LIMIT_S:g} s after the fault")


def p99(samples: list[Sample]) -> float:
    """The 99th percentile (ms) of all that were answered; 0 of nothing."""
    return percentile(sorted(sample.ms for sample in samples if not sample.reason), 0.99) or 0.0
