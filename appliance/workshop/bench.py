"""The course that a server is sent over: closed loops, then open loops at shares of the capacity that these found, with CPU and memory beside.

1. Capacity is the best closed-loop rate of this course: each server is loaded by its own measure.
2. CPU is that of the server's process tree for each *answer*: what refusals cost is in it.
3. Memory is looked at once at rest and every `LOOK_S` under load, in a thread, so that looking is not taken for the server's latency.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec

from appliance.workshop.bench_tree import Tree, Usage
from appliance.workshop.load import Manners, Opens, closed_loop, open_loop
from appliance.workshop.summary import Summary

LOOK_S = 2.0
SECONDS_PER_HOUR = 3_600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What is run, and for how long. `loads` are shares of the capacity; `between` is called before each row, with its name."""

    duration_s: float = 10.0
    warm_s: float = 2.0
    slo_s: float = 0.15
    callers: tuple[int, ...] = (1, 8, 32)
    loads: tuple[float, ...] = (0.5, 0.8, 1.2)
    seed: int = 7
    say: Callable[[str], None] = field(default=lambda _text: None)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One load and what it did. `load` is a share of the capacity; exactly one of `callers` and `load` is given."""

    callers: int | None = None
    load: float | None = None
    rate_per_s: float | None = None
    summary: Summary
    cpu_us_per_answer: float | None = None
    pss_mib_max: float | None = None

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.callers} callers" if self.load is None else f"{100 * self.load:.0f} % load"


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """All rows of one course. `capacity_per_s` is the best closed-loop rate; memory of the whole process tree, in MiB."""

    capacity_per_s: float
    rows: list[Row]
    processes: int | None = None
    idle_pss_mib: float | None = None
    idle_rss_mib: float | None = None
    after_pss_mib: float | None = None

    def closed(self, callers: int) -> Summary | None:
        """The closed loop with so many callers."""
        return next((row.summary for row in self.rows if row.callers == callers), None)

    def opened(self, load: float) -> Summary | None:
        """The open loop at this share of the capacity."""
        return next((row.summary for row in self.rows if row.load == load), None)


class Watch:
    """Looks at a process tree while a load runs."""

    def __init__(self, tree: Tree | None) -> None:
        self._tree = tree
        self._began_s = 0.0
        self.cpu_s = 0.0
        self.most: float | None = None

    @contextlib.asynccontextmanager
    async def on(self) -> AsyncIterator[None]:
        """Count from here to the end."""
        if self._tree is None:
            yield
            return
        self._began_s = self._tree.cpu_s()
        looking = asyncio.create_task(self._look(self._tree))
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            self.cpu_s = self._tree.cpu_s() - self._began_s
            self._saw(self._tree.usage())

    async def _look(self, tree: Tree) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._saw(await asyncio.to_thread(tree.usage))

    def _saw(self, usage: Usage) -> None:
        if usage.pss_mib is not None:
            self.most = usage.pss_mib if self.most is None else max(self.most, usage.pss_mib)

    def us_per(self, answers: int) -> float | None:
        """CPU microseconds of the tree for each answer."""
        return round(self.cpu_s * 1e6 / answers, 1) if self._tree is not None and answers else None


async def closed_row(opens: Opens, tree: Tree | None, callers: int, course: Course) -> Row:
    """Run one closed loop; callers are polite."""
    watch = Watch(tree)
    async with watch.on():
        summary = await closed_loop(opens, callers, duration_s=course.duration_s, slo_s=course.slo_s, manners=Manners.POLITE)
    return Row(callers=callers, summary=summary, cpu_us_per_answer=watch.us_per(summary.answered), pss_mib_max=watch.most)


async def open_row(opens: Opens, tree: Tree | None, load: float, capacity_per_s: float, course: Course) -> Row:
    """Run one open loop at a share of the capacity."""
    watch = Watch(tree)
    rate = load * capacity_per_s
    async with watch.on():
        summary = await open_loop(opens, rate, duration_s=course.duration_s, slo_s=course.slo_s, seed=course.seed)
    cpu_us = watch.us_per(summary.answered)
    return Row(load=load, rate_per_s=round(rate, 2), summary=summary, cpu_us_per_answer=cpu_us, pss_mib_max=watch.most)


async def run_course(opens: Opens, tree: Tree | None, course: Course) -> Findings:
    """Send one server over the course."""
    course.say(f"warming up for {course.warm_s:g} s")
    await closed_loop(opens, min(course.callers[-1], 8), duration_s=course.warm_s, slo_s=course.slo_s)
    idle = await asyncio.to_thread(tree.usage) if tree is not None else None
    rows = []
    for callers in course.callers:
        course.say(f"{callers} callers for {course.duration_s:g} s")
        rows.append(await closed_row(opens, tree, callers, course))
    capacity = max(row.summary.answered_per_s for row in rows)
    for load in course.loads if capacity else ():
        course.say(f"{100 * load:.0f} % of {capacity:.1f} per second for {course.duration_s:g} s")
        rows.append(await open_row(opens, tree, load, capacity, course))
    after = await asyncio.to_thread(tree.usage) if tree is not None else None
    return Findings(
        capacity_per_s=capacity,
        rows=rows,
        processes=idle.processes if idle else None,
        idle_pss_mib=idle.pss_mib if idle else None,
        idle_rss_mib=idle.rss_mib if idle else None,
        after_pss_mib=after.pss_mib if after else None,
    )


def dollars_per_million(dollars_per_hour: float, answers_per_s: float) -> float | None:
    """What a million answers cost on a machine at this price, at this rate."""
    return round(dollars_per_hour / (answers_per_s * SECONDS_PER_HOUR) * 1e6, 4) if answers_per_s else None
