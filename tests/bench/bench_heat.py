"""A heat ramp on the simulated board, in virtual time: the real serving loop and guard, beside the same ramp without the guard.

The board is `SimBoard` at its defaults, whose clock falls above its trip and whose work takes longer at a lower clock; latencies and sizes of the
three forms are those of the label reader's kind (synthetic where no bundle was measured). Poisson requests at 70 % of the full clock's capacity, each
worth nothing after 150 ms. The air warms from 25 to 86 degrees, stays, and cools again. Writes build/reports/heat.json and heat.png.
"""

import asyncio
import json
import platform
import random
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from appliance.adapters.board_sim import SimBoard
from appliance.contract.errors import ApplianceError
from appliance.contract.inference import Request, Tags
from appliance.contract.models import EdgeConstraints, Manifest
from appliance.contract.vitals import BoardReading
from appliance.contract.vocabulary import Mode, Outcome, Platform
from appliance.core.serve.degradation import DegradationSettings
from appliance.edge.guarding import Guarding
from appliance.edge.lane import Hands, Pool
from appliance.edge.serving import Serving
from appliance.edge.stand import Form, Policy
from appliance.edge.tally import Tally
from appliance.lab.paced import PacedEngine
from appliance.lab.virtual import VirtualClock, run

SLO_S = 0.150
SAMPLE_S = {Mode.FULL: 0.00545, Mode.CONSTRAINED: 0.0042, Mode.MINIMAL: 0.0030}
"""Seconds for one sample at the full clock: A as measured for PP-OCRv4 (facts/serving.md); B and C assumed 0.77x and 0.55x."""
LOAD = 0.7
RAMP = ((0.0, 25.0), (120.0, 25.0), (420.0, 86.0), (900.0, 86.0), (1200.0, 25.0), (1500.0, 25.0))
"""Air temperature in degrees Celsius by time in seconds, linear between."""
AIR_C, KELVIN_PER_WATT = 25.0, 1.4
"""SimBoard's defaults: warmer air is the same as so many watts more."""
INTERVAL_S = 0.5
REPORTS = Path("build/reports")


class Silent:
    """A meter that counts nothing."""

    def answered(self, model: str, mode: Mode, seconds: float) -> None: ...
    def failed(self, model: str, outcome: Outcome) -> None: ...
    def batch(self, model: str, utilization: float) -> None: ...
    def released(self, model: str, released_at: float) -> None: ...
    def mode(self, model: str, mode: Mode) -> None: ...
    def shifted(self, model: str, before: Mode, after: Mode, cause: str) -> None: ...
    def pressed(self, kind: str, ratio: float) -> None: ...
    def limited(self, model: str, batch: int) -> None: ...
    def throttled(self, cause: str) -> None: ...


@dataclass
class Trace:
    """What one run saw: rows of (time, clock ratio, degrees, batch limit, mode, p99 ms of the last 10 s), and what became of requests."""

    rows: list[tuple[float, float, float, int, str, float]] = field(default_factory=list)
    asked: int = 0
    in_time: int = 0
    late: int = 0
    refused: int = 0
    hottest_c: float = 0.0
    shifts: int = 0

    @property
    def violations(self) -> float:
        """The share of requests that got no answer within the SLO."""
        return 1 - self.in_time / self.asked


class Ramp:
    """One device on the ramp, with or without the guard."""

    def __init__(self, *, guarded: bool, seed: int = 7) -> None:
        self.guarded = guarded
        self.trace = Trace()
        self.recent: deque[tuple[float, float]] = deque()
        self.random = random.Random(seed)
        self.clock = VirtualClock()
        self.engine = PacedEngine(lambda mode, samples: SAMPLE_S[mode] * samples * self.board.slowdown)
        hands = Hands(self.engine, self.clock, Tally(Silent(), self.clock), Pool(1), SLO_S, 0.01)
        self.serving = Serving(hands, Policy(8, DegradationSettings()), timeout_s=5.0)
        self.board = SimBoard(self.clock.monotonic, load=self.serving.utilisation)
        self.guarding = Guarding(self.board, self.serving, self.clock, Silent(), tell=self._tell, interval_s=INTERVAL_S)

    async def _tell(self, what: str, _fields: dict[str, str]) -> None:
        self.trace.shifts += what == "mode_changed"

    async def run(self) -> Trace:
        """Play the whole ramp."""
        limits = EdgeConstraints(min_vram_gb=0, max_batch_size=8, target_latency_ms=10)
        manifest = Manifest(
            model_id="m",
            version="1",
            sha256="",
            token=1,
            compiled_artifacts={},
            edge_constraints=limits,
            released_at=0.0,
            example_shapes={"x": [2]},
        )
        modes = list(SAMPLE_S) if self.guarded else [Mode.FULL]
        await self.serving.mount(manifest, {mode: Form(Platform.ONNX, lambda: -1) for mode in modes})
        end = RAMP[-1][0]
        watching = asyncio.create_task(self._watch(end))
        asked: set[asyncio.Task[None]] = set()
        while self.clock.monotonic() < end:
            await asyncio.sleep(self.random.expovariate(LOAD / SAMPLE_S[Mode.FULL]))
            task = asyncio.create_task(self._ask())
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.gather(*asked)
        await watching
        return self.trace

    async def _ask(self) -> None:
        started = self.clock.monotonic()
        self.trace.asked += 1
        try:
            await self.serving.infer(Request("", "m", {"x": np.ones((1, 2), np.float32)}, tags=Tags(timeout_s=SLO_S)))
        except ApplianceError:
            self.trace.refused += 1
            return
        took = self.clock.monotonic() - started
        self.trace.in_time += took <= SLO_S
        self.trace.late += took > SLO_S
        self.recent.append((started, took))

    async def _watch(self, end: float) -> None:
        while (now := self.clock.monotonic()) < end:
            self.board.inject((float(np.interp(now, *zip(*RAMP, strict=True))) - AIR_C) / KELVIN_PER_WATT)
            reading = self.board.read()
            if self.guarded:
                await self.guarding.judge(reading)
            self._note(now, reading)
            await asyncio.sleep(INTERVAL_S)

    def _note(self, now: float, reading: BoardReading) -> None:
        while self.recent and now - self.recent[0][0] > 10:
            self.recent.popleft()
        took = [each for _, each in self.recent]
        stand = self.serving.stands[0]
        limit = min(lane.thermal.limit for lane in stand.lanes.values()) if stand.lanes else 0
        hottest = reading.hottest_c or 0.0
        self.trace.hottest_c = max(self.trace.hottest_c, hottest)
        p99 = float(np.percentile(took, 99)) * 1e3 if took else 0.0
        self.trace.rows.append((now, 1 / self.board.slowdown, hottest, limit, str(stand.mode), p99))


async def play(*, guarded: bool) -> Trace:
    """One ramp on one device."""
    return await Ramp(guarded=guarded).run()


def draw(runs: dict[str, Trace], path: Path) -> None:
    """One column for each run: temperature and clock, batch and mode, p99."""
    mpl.use("Agg")
    figure, axes = plt.subplots(4, len(runs), figsize=(6.5 * len(runs), 9), sharex=True, sharey="row", squeeze=False)
    for column, (name, trace) in enumerate(runs.items()):
        times, clocks, degrees, batches, modes, p99 = zip(*trace.rows, strict=True)
        for row, (values, label) in enumerate(
            (
                (degrees, "temperature, °C"),
                ([100 * clock for clock in clocks], "GPU clock, % of its cap"),
                (batches, "largest batch"),
                (p99, "p99 of 10 s, ms"),
            )
        ):
            axis = axes[row][column]
            axis.plot(times, values, lw=1.0, color=f"C{row}")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        for mode, shade in zip("ABC", ("#ffffff", "#ffe8b0", "#ffc9a0"), strict=True):
            for row in range(4):
                axes[row][column].fill_between(
                    times,
                    0,
                    1,
                    where=[each == mode for each in modes],
                    transform=axes[row][column].get_xaxis_transform(),
                    color=shade,
                    alpha=0.6,
                    lw=0,
                )
        axes[3][column].axhline(SLO_S * 1e3, color="black", lw=0.8, ls="--")
        axes[0][column].set_title(f"{name}: {trace.violations:.2%} of requests without an answer in 150 ms")
        axes[3][column].set_xlabel("seconds (yellow: mode B, orange: mode C)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run both ramps, print and write."""
    runs = {"with the guard": run(play(guarded=True)), "without": run(play(guarded=False))}
    REPORTS.mkdir(parents=True, exist_ok=True)
    figures = {
        name: {
            "asked": trace.asked,
            "violations": round(trace.violations, 5),
            "late": trace.late,
            "refused": trace.refused,
            "hottest_c": round(trace.hottest_c, 1),
            "lowest_clock": round(min(row[1] for row in trace.rows), 3),
            "mode_changes": trace.shifts,
            "modes_seen": "".join(sorted({row[4] for row in trace.rows})),
            "smallest_batch": min(row[3] for row in trace.rows),
        }
        for name, trace in runs.items()
    }
    report = {
        "violations": figures["with the guard"]["violations"],
        "violations_without": figures["without"]["violations"],
        "runs": figures,
        "virtual_seconds": RAMP[-1][0],
        "synthetic": "SimBoard's thermal model; latencies of B and C are assumed",
        "machine": f"virtual time on {platform.machine()}, Python {platform.python_version()}",
    }
    (REPORTS / "heat.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(runs, REPORTS / "heat.png")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
