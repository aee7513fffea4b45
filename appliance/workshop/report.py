"""Measured figures for people: Markdown tables, and pictures where matplotlib is installed (it is no part of the product)."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.workshop.bench import Findings, dollars_per_million
from appliance.workshop.bench_soak import Sample

NONE = "-"
COLUMNS = (
    "load", "offered/s", "answered/s", "within SLO/s", "p50 ms", "p99 ms", "p99.9 ms", "success", "refused",
    "refusal p99 ms", "with Retry-After", "CPU µs/answer", "PSS MiB",
)  # fmt: skip
NO_PICTURE = "no picture: matplotlib is not installed (pip install matplotlib)"


def number(value: float | None, digits: int = 1) -> str:
    """A figure for a table; a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share as per cent."""
    return NONE if share is None else f"{100 * share:.1f} %"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def rows_of(findings: Findings) -> list[list[str]]:
    """The rows of `COLUMNS` for one server."""
    rows = []
    for row in findings.rows:
        it = row.summary
        offered = row.rate_per_s if row.rate_per_s is not None else it.offered / it.window_s
        speed = (number(offered), number(it.answered_per_s), number(it.goodput_per_s))
        latency = (number(it.p50_ms, 2), number(it.p99_ms, 2), number(it.p999_ms, 2))
        refusals = (percent(it.success), str(it.refused), number(it.refusal_p99_ms, 2), percent(it.hinted))
        rows.append([row.name, *speed, *latency, *refusals, number(row.cpu_us_per_answer), number(row.pss_mib_max)])
    return rows


def prices(findings: Findings, dollars_per_hour: float) -> str:
    """What a million answers cost: at capacity, and within the SLO at each open load."""
    rows = [["at capacity", number(findings.capacity_per_s), number(dollars_per_million(dollars_per_hour, findings.capacity_per_s), 3)]]
    for row in findings.rows:
        if row.load is not None:
            rate = row.summary.goodput_per_s
            rows.append([f"{row.name}, within SLO", number(rate), number(dollars_per_million(dollars_per_hour, rate), 3)])
    return table(("rate", "answers/s", f"dollars per million at ${dollars_per_hour:g}/h"), rows)


def device_page(title: str, facts: Mapping[str, str], findings: Findings, dollars_per_hour: float) -> str:
    """The page of `appliance bench`."""
    first = findings.rows[0].summary
    memory = (
        f"Idle: {number(findings.idle_pss_mib)} MiB PSS, {number(findings.idle_rss_mib)} MiB RSS in {findings.processes} processes; "
        f"after the last load {number(findings.after_pss_mib)} MiB PSS.\n"
        if findings.idle_pss_mib is not None
        else "Memory and CPU of the server were not read: it runs elsewhere, or as another user (`--pid`, and run as that user or as root).\n"
    )
    return "\n".join(
        [
            f"# {title}\n",
            *(f"- {name}: {value}" for name, value in facts.items()),
            f"\nCapacity (best closed loop): {findings.capacity_per_s:.1f} answers/s. SLO: {first.slo_ms:g} ms.\n",
            table(COLUMNS, rows_of(findings)),
            memory,
            prices(findings, dollars_per_hour),
        ]
    )


def device_picture(path: Path, findings: Findings) -> bool:
    """Draw latency and goodput by load; False, and no file, without matplotlib."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    names = [row.name for row in findings.rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    places = range(len(names))
    left.bar([x - 0.2 for x in places], [row.summary.p50_ms or 0 for row in findings.rows], 0.4, label="p50")
    left.bar([x + 0.2 for x in places], [row.summary.p99_ms or 0 for row in findings.rows], 0.4, label="p99")
    left.axhline(findings.rows[0].summary.slo_ms, color="black", linestyle=":", label="SLO")
    left.set(ylabel="ms, answered requests", xticks=list(places), yscale="log", title="latency from the scheduled arrival")
    right.bar([x - 0.2 for x in places], [row.summary.answered_per_s for row in findings.rows], 0.4, label="answered")
    right.bar([x + 0.2 for x in places], [row.summary.goodput_per_s for row in findings.rows], 0.4, label="within SLO")
    right.axhline(findings.capacity_per_s, color="black", linestyle=":", label="capacity")
    right.set(ylabel="per second", xticks=list(places), title="throughput")
    for axes in (left, right):
        axes.set_xticklabels(names, rotation=25)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def soak_picture(path: Path, samples: Sequence[Sample]) -> bool:
    """Draw memory, latency and answered share over the hours; False, and no file, without matplotlib."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    hours = [each.at_s / 3600 for each in samples]
    figure, axes = pyplot.subplots(3, 1, figsize=(11, 8), sharex=True, layout="constrained")
    axes[0].plot(hours, [each.pss_mib for each in samples])
    axes[0].set_ylabel("PSS MiB")
    axes[1].plot(hours, [each.summary.p50_ms for each in samples], label="p50")
    axes[1].plot(hours, [each.summary.p99_ms for each in samples], label="p99")
    axes[1].legend()
    axes[1].set_ylabel("ms")
    axes[2].plot(hours, [each.summary.in_slo for each in samples])
    axes[2].set(ylabel="share within SLO", xlabel="hours")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _pyplot() -> Any:
    """Matplotlib without a screen; None where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib as mpl  # noqa: PLC0415 - optional, and slow to import

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt
