"""Reports that a person can read: a picture and a page for each experiment, a table of all, and the same as JSON."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

from tests.chaos.judging import P99_FACTOR, Outcome, p99
from tests.chaos.load import Sample, within
from tests.chaos.watch import Look

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path("build/reports/chaos")
TABLE = Path("build/reports/chaos.json")
BIN_S = 1.0
P99_BIN_S = 3.0
LINKS = {"PARTITIONED": 0, "DEGRADED": 1, "HEALTHY": 2}
LINE = 0.06
"""Devices of equal link state are drawn beside each other."""
COLUMNS = "| experiment | requests | success | by own device | p99 (baseline) | deepest queue | partitioned | settled after | verdict |"


def write(outcome: Outcome, samples: list[Sample], looks: list[Look]) -> None:
    """The picture and the page of one experiment."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not outcome.skipped:
        _draw(outcome, samples, looks)
    page = [f"# {outcome.name}", "", f"{outcome.what}.", "", COLUMNS, "|" + "---|" * 9, _row(outcome), ""]
    if not outcome.skipped:
        periods = (
            f"Baseline {outcome.fault_began - outcome.began:.0f} s, fault {outcome.fault_ended - outcome.fault_began:.0f} s (shaded), "
            f"afterwards {outcome.ended - outcome.fault_ended:.0f} s. Success and p99 are of all labels due from the fault's begin on; "
            f"the p99 they are held against is of all baselines of this run so far. Failures by reason: {outcome.reasons or 'none'}."
        )
        page += [periods, "", f"![timeline]({_slug(outcome)}.png)"]
    (FOLDER / f"{_slug(outcome)}.md").write_text("\n".join(page) + "\n")


def conclude(outcomes: list[Outcome], whole: dict[str, Any]) -> None:
    """The table of all experiments. `whole`: figures of the run as a whole."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps({"whole": whole, "experiments": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n")
    rows = [_row(outcome) for outcome in outcomes]
    facts = [f"- {name.replace('_', ' ')}: {value}" for name, value in whole.items()]
    (FOLDER / "README.md").write_text("\n".join(["# Chaos", "", COLUMNS, "|" + "---|" * 9, *rows, "", *facts]) + "\n")


def _slug(outcome: Outcome) -> str:
    return outcome.name.replace(" ", "-")


def _row(outcome: Outcome) -> str:
    if outcome.skipped:
        return f"| {outcome.name} | | | | | | | | skipped: {outcome.skipped} |"
    settled = "not" if outcome.settled_s is None else f"{outcome.settled_s:.1f} s"
    verdict = "kept" if not outcome.broken else "BROKEN: " + "; ".join(outcome.broken)
    return (
        f"| {outcome.name} | {outcome.requests} | {100 * outcome.success:.1f} % | {100 * outcome.own_share:.0f} % "
        f"| {outcome.p99_ms:.0f} ms ({outcome.baseline_p99_ms:.0f}) | {outcome.depth_max} | {outcome.partitioned_s:.0f} s "
        f"| {settled} | {verdict} |"
    )


def _draw(outcome: Outcome, samples: list[Sample], looks: list[Look]) -> None:
    zero = outcome.began
    figure, (success, latency, queue, link) = plt.subplots(4, 1, sharex=True, figsize=(10, 9), layout="constrained")
    figure.suptitle(f"{outcome.name}: {outcome.what}")
    times, values = _binned(outcome, samples, BIN_S, lambda some: 100 * sum(not one.reason for one in some) / len(some))
    success.step(times, values, where="post")
    success.axhline(95, color="tab:red", linestyle=":", label="promised")
    success.set(ylabel="answered, %", ylim=(0, 105))
    times, values = _binned(outcome, samples, P99_BIN_S, p99)
    latency.step(times, values, where="post", label=f"p99 of {P99_BIN_S:g} s")
    latency.axhline(P99_FACTOR * outcome.baseline_p99_ms, color="tab:red", linestyle=":", label=f"{P99_FACTOR:g} x baseline")
    latency.set(ylabel="latency, ms")
    for place, device in enumerate(sorted({look.device for look in looks})):
        mine = [look for look in looks if look.device == device and outcome.began <= look.at <= outcome.ended]
        queue.step(
            [look.at - zero for look in mine], [look.depth if look.depth is not None else float("nan") for look in mine], label=device
        )
        link.step(
            [look.at - zero for look in mine],
            [LINKS.get(look.link or "", float("nan")) + LINE * place for look in mine],
            where="post",
            label=device,
        )
    queue.set(ylabel="queued items")
    link.set(ylabel="link", xlabel="seconds", ylim=(-0.3, 2.3))
    link.set_yticks(list(LINKS.values()), [name.lower() for name in LINKS])
    for axis in (success, latency, queue, link):
        axis.axvspan(outcome.fault_began - zero, outcome.fault_ended - zero, color="tab:orange", alpha=0.2, label="fault")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper right", fontsize="x-small")
    figure.savefig(FOLDER / f"{_slug(outcome)}.png", dpi=90)
    plt.close(figure)


def _binned(outcome: Outcome, samples: list[Sample], width_s: float, value: Any) -> tuple[list[float], list[float]]:
    """Time from the beginning and a value for each bin that has samples."""
    times, values, at = [], [], outcome.began
    while at < outcome.ended:
        some = list(within(samples, at, at + width_s))
        if some:
            times.append(at - outcome.began)
            values.append(float(value(some)))
        at += width_s
    return times, values
