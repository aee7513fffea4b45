"""`make chaos`: a fleet at peak load is broken in one way after the other, and every promise is counted. See docs/chaos.md.

One lab for all experiments: broker, region and cloud on this side, each device in a network namespace on a wire of its own.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.lab import faults
from appliance.lab.daemon import Lab, Plan
from appliance.lab.network import Network, why_not
from appliance.lab.site import claim
from tests.chaos import ledger, report
from tests.chaos.experiments import CLOCKED, EXPERIMENTS, SMALL, Experiment, World, running
from tests.chaos.judging import SETTLE_LIMIT_S, SETTLED_DEPTH, Outcome, judge
from tests.chaos.load import Load, Sample, within
from tests.chaos.watch import INTERVAL_S, Watch

MODEL = Path("build/models/label-reader.onnx")
SMALL_DISK_MIB = 64
FREE_MIB = 8
WARM_S = 6.0
FETCH_S = 30.0
CONNECTED = {"HEALTHY", "DEGRADED"}
"""A link is called healthy again only after a minute without a fault (core.reach.partition)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How big and how long. `pace` shortens every fault, for a smoke test."""

    devices: int = 4
    rate_per_s: float = 4.0
    submit_every_s: float = 2.0
    told_every_s: float = 0.5
    baseline_s: float = 10.0
    after_s: float = 8.0
    pace: float = 1.0


@dataclass(slots=True)
class Chaos:
    """One run: the world, its callers, its watch, and what came of it."""

    world: World
    load: Load
    watch: Watch
    scale: Scale
    outcomes: list[Outcome] = field(default_factory=list)
    baseline: list[Sample] = field(default_factory=list)

    async def experiment(self, experiment: Experiment) -> Outcome:
        """Baseline, fault, and until all is settled; then the verdict and the report."""
        loop = asyncio.get_running_loop()
        outcome = Outcome(experiment.name, experiment.what, loop.time(), skipped=experiment.why_not())
        self.outcomes.append(outcome)
        if not outcome.skipped:
            await asyncio.sleep(self.scale.baseline_s)
            outcome.fault_began = loop.time()
            self.baseline += within(self.load.samples, outcome.began, outcome.fault_began)
            async with experiment.fault(self.world):
                await asyncio.sleep(experiment.fault_s * self.scale.pace)
            outcome.fault_ended = loop.time()
            await self._settle(outcome)
            outcome.ended = loop.time()
            self._look_back(outcome)
            judge(outcome, list(within(self.load.samples, outcome.fault_began, outcome.ended)), self.baseline)
        report.write(outcome, self.load.samples, self.watch.looks)
        return outcome

    async def _settle(self, outcome: Outcome) -> None:
        """Wait until every queue is short, no link is partitioned and every event that was promised before has arrived."""
        loop, lab = asyncio.get_running_loop(), self.world.lab
        owed = ledger.promised(lab.devices, lab)
        while True:
            now = loop.time()
            if outcome.settled_s is None and self._calm() and not owed - ledger.accepted(lab).keys():
                outcome.settled_s = now - outcome.fault_ended
            spent_s = now - outcome.fault_ended
            if spent_s >= SETTLE_LIMIT_S or (outcome.settled_s is not None and spent_s >= self.scale.after_s):
                outcome.lost = len(owed - ledger.accepted(lab).keys())
                return
            await asyncio.sleep(INTERVAL_S)

    def _calm(self) -> bool:
        looks = [self.watch.latest(device.name) for device in self.world.lab.devices]
        return all(look is not None and look.link in CONNECTED and look.depth is not None and look.depth <= SETTLED_DEPTH for look in looks)

    def _look_back(self, outcome: Outcome) -> None:
        looks = [look for look in self.watch.looks if outcome.fault_began <= look.at <= outcome.ended]
        outcome.depth_max = max((look.depth or 0 for look in looks), default=0)
        outcome.partitioned_s = INTERVAL_S * sum(look.link == "PARTITIONED" for look in looks)


async def run(experiments: Sequence[Experiment], scale: Scale, folder: Path) -> tuple[list[Outcome], dict[str, Any]]:
    """Run experiments on one lab below `folder`; returns what came of each and of the whole. Raises: WorldError if the lab does not start."""
    network, clocks = Network(), dict[str, faults.Clock]()
    if not faults.why_no_clock() and scale.devices > CLOCKED:
        clocks[_name(CLOCKED)] = faults.Clock(folder)
    plan = Plan(
        devices=scale.devices,
        model=MODEL,
        rate_per_s=0.0,
        settings={"queue": {"free_mib": FREE_MIB}},
        network=network,
        told_every_s=scale.told_every_s,
        small_disks_mib={_name(SMALL): SMALL_DISK_MIB} if scale.devices > SMALL else {},
        environment={name: clock.environment for name, clock in clocks.items()},
        say=say,
    )
    async with contextlib.AsyncExitStack() as stack:
        lab = Lab(claim(folder / "lab"), plan, stack)
        await lab.open()
        load, watch = Load(lab, rate_per_s=scale.rate_per_s, submit_every_s=scale.submit_every_s), Watch(lab)
        stack.push_async_callback(load.close)
        chaos = Chaos(World(lab, network, clocks), load, watch, scale)
        async with running(watch.run()):
            async with running(load.run()):
                await asyncio.sleep(WARM_S)
                for experiment in experiments:
                    say(_told(await chaos.experiment(experiment)))
            whole = await _account(lab, load)
    whole["machine"] = f"{platform.machine()}, {os.cpu_count()} processors"
    whole["load"] = f"{scale.devices} devices, {scale.rate_per_s:g} labels/s each"
    report.conclude(chaos.outcomes, whole)
    return chaos.outcomes, whole


async def _account(lab: Lab, load: Load) -> dict[str, Any]:
    """Everything that was promised in this run, against what came of it."""
    missing = await load.fetched(FETCH_S)
    owed = ledger.promised(lab.devices, lab)
    for _ in range(int(FETCH_S / INTERVAL_S)):
        if not owed - ledger.accepted(lab).keys():
            break
        await asyncio.sleep(INTERVAL_S)
    await asyncio.sleep(2 * INTERVAL_S)  # what was accepted last has its effect
    return ledger.reckoning(lab, owed, len(load.promised.held), missing, load.promised.refused)


def broken(outcomes: Sequence[Outcome], whole: dict[str, Any]) -> list[str]:
    """All promises that were not kept, in words."""
    found = [f"{outcome.name}: {what}" for outcome in outcomes for what in outcome.broken]
    found += [f"{name}: {whole[name]}" for name in ledger.ZERO if whole[name]]
    return found


def say(text: str) -> None:
    """Tell whoever watches."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _name(place: int) -> str:
    return f"dev-{place + 1:03d}"


def _told(outcome: Outcome) -> str:
    if outcome.skipped:
        return f"{outcome.name}: skipped, {outcome.skipped}"
    settled = "not settled" if outcome.settled_s is None else f"settled after {outcome.settled_s:.1f} s"
    return (
        f"{outcome.name}: {100 * outcome.success:.1f} % of {outcome.requests} answered, p99 {outcome.p99_ms:.0f} ms "
        f"(baseline {outcome.baseline_p99_ms:.0f}), deepest queue {outcome.depth_max}, {settled}"
        + "".join(f"\n    BROKEN: {what}" for what in outcome.broken)
    )


def main() -> int:
    """Run what the command line asks for; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=[each.name for each in EXPERIMENTS], help="only these experiments")
    parser.add_argument("--devices", type=int, default=Scale().devices)
    parser.add_argument("--rate", type=float, default=Scale().rate_per_s, help="labels per second for each device")
    parser.add_argument("--pace", type=float, default=1.0, help="shorten every fault by this factor")
    parser.add_argument("--keep", action="store_true", help="keep the lab's directory")
    arguments = parser.parse_args()
    reason = why_not()
    if reason:
        say(f"skipped: {reason}")
        return 0
    chosen = [each for each in EXPERIMENTS if not arguments.only or each.name in arguments.only]
    scale = Scale(devices=arguments.devices, rate_per_s=arguments.rate, pace=arguments.pace)
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    try:
        outcomes, whole = asyncio.run(run(chosen, scale, folder))
    finally:
        if arguments.keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    say("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in whole.items()))
    found = broken(outcomes, whole)
    say("\n".join([f"BROKEN {each}" for each in found]) or "all promises kept")
    say(f"{report.FOLDER}/README.md")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
