"""What each server is put through, ours and theirs alike, with raw onnxruntime before, between and after on the same processor."""

import asyncio
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from peers.models import Model, Raw, measure_raw

from appliance.workshop.bench import Course, Row, closed_row, open_row
from appliance.workshop.bench_tree import Tree
from appliance.workshop.load import Group, Manners, Opens, closed_loop, closed_loops

CROWD = 16
"""Polite and as many rude callers: together more than the 24 that a batch of 8 and a backlog of 16 hold."""


@dataclass(frozen=True)
class Script:
    """How long and how often. `rounds` of lone and eight callers, each between two runs of raw; then the rest once."""

    seconds: float
    open_seconds: float
    rounds: int = 1
    callers: tuple[int, ...] = (32,)
    loads: tuple[float, ...] = (0.5, 0.8, 1.2)
    crowd: bool = False


@dataclass
class Block:
    """All that was measured of one server and one model."""

    raws: list[Raw] = field(default_factory=list)
    lone: list[Row] = field(default_factory=list)
    eight: list[Row] = field(default_factory=list)
    rest: list[Row] = field(default_factory=list)
    crowd: dict[str, float] = field(default_factory=dict)
    idle: dict[str, Any] = field(default_factory=dict)
    growth_mib: float | None = None

    @property
    def capacity_per_s(self) -> float:
        """The best closed-loop rate: the median at 8 callers, or a larger crowd's."""
        closed = [row.summary.answered_per_s for row in self.rest if row.callers is not None]
        return max([statistics.median(row.summary.answered_per_s for row in self.eight), *closed])

    def figures(self) -> dict[str, Any]:
        """The figures that issue and docs speak of; None: not measured here."""
        raw_p50 = statistics.median(raw.b1_p50_ms for raw in self.raws)
        raw_b8 = statistics.median(raw.b8_per_s for raw in self.raws)
        lone = statistics.median(row.summary.p50_ms or float("inf") for row in self.lone)
        found: dict[str, Any] = {
            "raw_b1_p50_ms": round(raw_p50, 4),
            "raw_b1_per_s": round(statistics.median(raw.b1_per_s for raw in self.raws), 1),
            "raw_b8_per_s": round(raw_b8, 1),
            "raw_b8_per_s_range": [round(min(raw.b8_per_s for raw in self.raws), 1), round(max(raw.b8_per_s for raw in self.raws), 1)],
            "lone_p50_ms": round(lone, 4),
            "lone_p50_over_raw": round(lone / raw_p50, 4),
            "capacity_per_s": round(self.capacity_per_s, 2),
            "saturation_over_raw": round(statistics.median(row.summary.answered_per_s for row in self.eight) / raw_b8, 4),
            "eight_p99_ms": statistics.median(row.summary.p99_ms or float("inf") for row in self.eight),
            "memory_growth_overload": self.growth_mib,
            **self.idle,
            **self.crowd,
        }
        for row in self.rest:
            if row.load is not None:
                found |= self._opened(row, f"{100 * row.load:.0f}")
        return found

    def _opened(self, row: Row, name: str) -> dict[str, Any]:
        it = row.summary
        found = {
            f"rate_{name}_per_s": row.rate_per_s,
            f"p50_{name}_ms": it.p50_ms,
            f"p99_{name}_ms": it.p99_ms,
            f"p999_{name}_ms": it.p999_ms,
            f"goodput_{name}": round(it.goodput_per_s / self.capacity_per_s, 4),
            f"success_{name}": it.success,
            f"in_slo_{name}": it.in_slo,
        }
        if (row.load or 0) > 1:
            found |= {"refusal_p50_ms": it.refusal_p50_ms, "refusal_p99_ms": it.refusal_p99_ms, "refusal_hinted": it.hinted}
        return found

    def rows(self) -> list[Row]:
        """Everything, in the order of the table."""
        return [*self.lone, *self.eight, *self.rest]

    def plain(self) -> dict[str, Any]:
        """Figures and rows for JSON."""
        return {**self.figures(), "rows": msgspec.to_builtins(self.rows())}


async def put_through(
    opens: Opens, tree: Tree, model: Model, cpu: int, script: Script, *, slo_s: float, say: Callable[[str], None]
) -> Block:
    """Measure one server that answers already."""
    block = Block()

    async def raw() -> None:
        block.raws.append(await asyncio.to_thread(measure_raw, model, max(script.seconds * 0.6, 0.6), cpu))

    course = Course(duration_s=script.seconds, slo_s=slo_s)
    idle = await asyncio.to_thread(tree.usage)
    block.idle = {"processes": idle.processes, "idle_pss_mib": idle.pss_mib, "idle_rss_mib": idle.rss_mib}
    await closed_loop(opens, 8, duration_s=min(2.0, script.seconds), slo_s=slo_s)
    await raw()
    for number in range(script.rounds):
        say(f"round {number + 1} of {script.rounds}: raw, 1 caller, raw, 8 callers, {script.seconds:g} s each")
        block.lone.append(await closed_row(opens, tree, 1, course))
        await raw()
        block.eight.append(await closed_row(opens, tree, 8, course))
        await raw()
    for callers in script.callers:
        block.rest.append(await closed_row(opens, tree, callers, course))
    await _opened(opens, tree, block, script, slo_s=slo_s, say=say)
    if script.crowd:
        block.crowd = await _crowded(opens, block.capacity_per_s, script.seconds, slo_s)
    await raw()
    return block


async def _opened(opens: Opens, tree: Tree, block: Block, script: Script, *, slo_s: float, say: Callable[[str], None]) -> None:
    course = Course(duration_s=script.open_seconds, slo_s=slo_s)
    for load in script.loads:
        say(f"{100 * load:.0f} % of {block.capacity_per_s:.0f} per second, {script.open_seconds:g} s")
        before = (await asyncio.to_thread(tree.usage)).pss_mib
        row = await open_row(opens, tree, load, block.capacity_per_s, course)
        block.rest.append(row)
        if load > 1 and before is not None and row.pss_mib_max is not None:
            block.growth_mib = round(row.pss_mib_max - before, 1)


async def _crowded(opens: Opens, capacity_per_s: float, seconds: float, slo_s: float) -> dict[str, float]:
    """Polite callers beside as many rude ones. `fairness` 0.5: both kinds are answered alike; 0: the rude starve the polite."""
    groups = {"polite": Group(CROWD), "rude": Group(CROWD, Manners.RUDE)}
    found = await closed_loops(opens, groups, duration_s=seconds, slo_s=slo_s)
    polite, rude = found["polite"].answered_per_s, found["rude"].answered_per_s
    return {
        "fairness": round(polite / (polite + rude), 4) if polite + rude else 0.0,
        "crowd_goodput": round((found["polite"].goodput_per_s + found["rude"].goodput_per_s) / capacity_per_s, 4),
        "crowd_refused_per_s": round((found["polite"].refused + found["rude"].refused) / seconds, 1),
    }
