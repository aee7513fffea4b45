"""serve.json for people: one table of all servers, one of the load on ours, and a picture."""

from pathlib import Path
from typing import Any

from appliance.workshop.report import number, percent, table

SHOWN = (
    ("lone p50 / raw", "lone_p50_over_raw", 2),
    ("8 callers / raw", "saturation_over_raw", 2),
    ("p99 at 80 %, ms", "p99_80_ms", 0),
    ("at, per s", "rate_80_per_s", 0),
    ("goodput at 120 % / capacity", "goodput_120", 2),
    ("refusal p99, ms", "refusal_p99_ms", 1),
    ("growth in overload, MiB", "memory_growth_overload", 0),
    ("idle PSS, MiB", "idle_pss_mib", 0),
    ("light: CPU µs/request", "cpu_us_per_request_light", 0),
)
LOADS = ("load", "answered/s", "in SLO/s", "p50 ms", "p99 ms", "p99.9 ms", "success", "refused", "refusal p99 ms", "CPU µs", "lag p99 ms")


def servers(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All that were measured, ours first."""
    ours = {"ours": found} if "lone_p50_over_raw" in found else {}
    return ours | found.get("peers", {})


def page(found: dict[str, Any]) -> str:
    """The page."""
    everybody = servers(found)
    rows = [[name, *(number(it.get(key), digits) for _, key, digits in SHOWN)] for name, it in everybody.items()]
    parts = [
        "# Serving, measured\n",
        f"{found['machine']}; {found['when']}; {found['seconds']:g} s for each load; SLO {found['slo_ms']:g} ms.\n",
        f"Server on processor {found['cpus']['server']}, load on {found['cpus']['load']}; {found['busy_cores']} cores were busy on average.\n",
        table(("server", *(title for title, _, _ in SHOWN)), rows),
    ]
    parts += [f"- {name}: {it['failed'].splitlines()[0]}\n" for name, it in everybody.items() if it.get("failed")]
    for name, it in everybody.items():
        for kind, figures in (("heavy", it), ("light", it.get("light", {}))):
            if figures.get("rows"):
                parts += [f"## {name}, {kind} model\n", _beside(figures), table(LOADS, [_load(row) for row in figures["rows"]])]
    return "\n".join(parts)


def _beside(figures: dict[str, Any]) -> str:
    crowd = ""
    if "fairness" in figures:
        crowd = f" Polite beside as many rude callers: {percent(figures['fairness'])} of the answers, {figures['crowd_goodput']} of capacity in SLO."
    return (
        f"Raw onnxruntime: {figures['raw_b1_p50_ms']} ms alone, {figures['raw_b8_per_s']}/s at batch 8 {figures['raw_b8_per_s_range']}. "
        f"First answer after {figures['start_s']} s; equal to raw: {figures['equal']}.{crowd}\n"
    )


def _load(row: dict[str, Any]) -> list[str]:
    it = row["summary"]
    name = f"{row['callers']} callers" if row["load"] is None else f"{100 * row['load']:.0f} %: {row['rate_per_s']:.0f}/s"
    speed = [number(it[key]) for key in ("answered_per_s", "goodput_per_s")] + [
        number(it[key], 2) for key in ("p50_ms", "p99_ms", "p999_ms")
    ]
    end = [number(it["refusal_p99_ms"], 2), number(row["cpu_us_per_answer"]), number(it["lag_p99_ms"], 2)]
    return [name, *speed, percent(it["success"]), str(it["refused"]), *end]


def picture(path: Path, found: dict[str, Any]) -> None:
    """One panel for each figure, one bar for each server."""
    import matplotlib as mpl  # noqa: PLC0415 - slow, and only needed at the end

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    everybody = servers(found)
    figure, axes = plt.subplots(3, 3, figsize=(14, 10), layout="constrained")
    for panel, (title, key, _) in zip(axes.flat, SHOWN, strict=True):
        values = [it.get(key) or 0 for it in everybody.values()]
        panel.barh(list(everybody), values, color=["tab:orange" if name == "ours" else "tab:blue" for name in everybody])
        panel.invert_yaxis()
        panel.set_title(title)
    figure.suptitle(f"{found['machine']}, {found['when']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
