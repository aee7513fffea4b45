"""What a person sees of the lab: a live table of the devices, and the summary at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from appliance.lab.stream import Score

MIB = 1 << 20
COLUMNS = ("device", "mode", "link", "model", "labels/s", "p50 ms", "p99 ms", "success", "exact", "temp °C", "memory MiB", "SVIDs")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def row(name: str, status: Mapping[str, Any] | None, score: Score) -> tuple[str, ...]:
    """One device: what it says of itself (None: not reachable now) beside what its callers measured."""
    rate, p50, p99, success = score.window()
    seen = status or {}
    version = f"{seen.get('model', '')} {seen.get('model_version', '')}".strip()
    used = seen.get("memory_used_bytes")
    exact = score.exact / score.full if score.full else None
    return (
        name,
        str(seen.get("mode", "-")),
        str(seen.get("link", "away")),
        version or "-",
        f"{rate:.1f}",
        _number(p50, ".1f"),
        _number(p99, ".1f"),
        _number(None if success is None else 100 * success, ".1f") + " %",
        _number(None if exact is None else 100 * exact, ".1f") + " %",
        _number(seen.get("temperature_c"), ".1f"),
        _number(used / MIB if used is not None else None, ".0f"),
        str(seen.get("rotations", "-")),
    )


def table(rows: Sequence[tuple[str, ...]], caption: str) -> Table:
    """All devices as a rich table."""
    drawn = Table(title="Appliance lab: reading shelf labels", caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="left" if index in {0, 1, 2, 3} else "right")
    for cells in rows:
        drawn.add_row(*cells)
    return drawn
