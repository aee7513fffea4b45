"""What one request costs the scheduler: microseconds for offer + next_batch + done, and for a refusal, at several depths.

Run: `python tests/bench/bench_backlog.py`; writes build/reports/backlog.json. The best of several rounds is reported: the machine is shared.
"""

import json
import sys
import time
from pathlib import Path

from appliance.core.serve.backlog import Admitted, Backlog, Refused
from appliance.core.serve.batching import Batcher, Dispatch
from appliance.core.serve.pace import Pace

REPORT = Path(__file__).parents[2] / "build" / "reports" / "backlog.json"
DEPTHS = (1, 16, 1_000)
ROUNDS, CALLS = 7, 5_000
SHAPE = (3, 48, 160)


def filled(depth: int, most: int) -> Backlog[None]:
    """A backlog of twice `most` places in which `depth` requests wait."""
    backlog = Backlog[None](most)
    backlog.pace = Pace(tuple(1e-5 * samples for samples in range(most + 1)), batch=1, measured=True)
    for _ in range(depth):
        assert isinstance(backlog.offer(None, 0.0, deadline=1e6, shape=SHAPE, caller="bench"), Admitted)
    return backlog


def offer_and_take(depth: int) -> float:
    """Seconds for one request in and one out, with a deadline, a shape and a caller, as the daemon does it."""
    backlog, batcher, now = filled(depth - 1, max(8, depth)), Batcher(), 0.0
    started = time.perf_counter()
    for _ in range(CALLS):
        now += 1e-4
        backlog.offer(None, now, deadline=now + 1e6, shape=SHAPE, caller="bench")
        decision = batcher.next_batch(backlog, now, 1)
        assert isinstance(decision, Dispatch)
        backlog.done(decision.number)
    return (time.perf_counter() - started) / CALLS


def refuse(depth: int) -> float:
    """Seconds for one refusal of a full backlog to a caller that asks again at once."""
    backlog = filled(2 * max(8, depth), max(8, depth))
    started = time.perf_counter()
    for _ in range(CALLS):
        assert isinstance(backlog.offer(None, 0.0, deadline=1e6, shape=SHAPE, caller="bench"), Refused)
    return (time.perf_counter() - started) / CALLS


def main() -> None:
    """Measure, print, write the report."""
    figures: dict[str, float] = {}
    for depth in DEPTHS:
        figures[f"offer_take_us_{depth}"] = round(min(offer_and_take(depth) for _ in range(ROUNDS)) * 1e6, 2)
        figures[f"refuse_us_{depth}"] = round(min(refuse(depth) for _ in range(ROUNDS)) * 1e6, 2)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(figures, indent=2) + "\n")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
