"""`make kills`: kill -9 of device, broker and region, one a round, under a load of promises; at the end every promise has exactly one effect.

1. A round kills one process at a random moment while events are on their way. The lab's own supervision starts it again.
2. It ends when what was promised after the kill has arrived: for a device its own events, for the broker and the region those of all devices. So
   every round has carried something over, and the next kill hits a fleet at work, maybe one that still resends.
3. What counts is by number: the events that a device noted as committed, the region's inbox, and the region's log, which is what an event is for.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from appliance.lab import units
from appliance.lab.daemon import Device, Lab, Plan
from appliance.lab.site import claim
from appliance.lab.telling import PROMISED
from appliance.lab.units import Unit
from tests.chaos import ledger
from tests.chaos.experiments import running
from tests.chaos.run import say
from tests.kills.asking import Asking, small_model

REPORT = Path("build/reports/kills.json")
QUEUE = Path("build/reports/queue.json")
DEVICES = 2
TOLD_EVERY_S = 0.05
ASK_EVERY_S = 0.5
HEARTBEAT_S = 0.5
PAUSE_S = 0.5
"""The next kill comes after up to so long, by chance."""
ROUND_S = 30.0
SETTLE_S = 30.0
POLL_S = 0.05
RESTART_S = (0.1, 0.2)
"""Pauses of the supervisor; its own grow to 5 s for a process that keeps dying, and here each one is killed every few seconds."""
ZERO = (*ledger.ZERO, "effects_out_of_order")


@dataclass(slots=True)
class Kills:
    """One run: the fleet, its callers, and how long each round took by victim."""

    lab: Lab
    asking: Asking
    chance: random.Random
    took_s: dict[str, list[float]] = field(default_factory=dict)
    stuck: list[str] = field(default_factory=list)

    async def round(self, number: int) -> None:
        """Kill one, and wait until promises are kept again."""
        await asyncio.sleep(self.chance.uniform(0.0, PAUSE_S))
        victims = [(device.unit, [device]) for device in self.lab.devices]
        victims += [(unit, self.lab.devices) for unit in self.lab.units if unit.name in {"broker", "region"}]
        kind = self.chance.choice(("device", "broker", "region"))
        unit, owed = self.chance.choice([each for each in victims if each[0].name.startswith("dev" if kind == "device" else kind)])
        marks = {device.name: _promised(self.lab, device) for device in owed}
        began = asyncio.get_running_loop().time()
        await _killed(unit)
        fine = await _until(lambda: self._beyond(marks), ROUND_S)
        self.took_s.setdefault(kind, []).append(asyncio.get_running_loop().time() - began)
        if not fine:
            self.stuck.append(f"round {number}: {unit.name} was killed, and {ROUND_S:g} s later nothing new had arrived")

    async def _beyond(self, marks: dict[str, str]) -> bool:
        """Whether something arrived that was promised after the marks."""
        return all(ledger.newest(self.lab, name) > mark for name, mark in marks.items())


async def run(rounds: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run a lab below `folder` through so many rounds; returns the account. Raises: WorldError if the lab does not start."""
    plan = Plan(
        devices=DEVICES,
        model=small_model(folder / "double.onnx"),
        rate_per_s=0.0,
        told_every_s=TOLD_EVERY_S,
        settings={"reach": {"heartbeat_s": HEARTBEAT_S, "retry_cap_s": 0.5}},
        say=say,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(mock.patch.object(units, "BACKOFF_S", RESTART_S))
        lab = Lab(claim(folder / "lab"), plan, stack)
        await lab.open()
        kills = Kills(lab, Asking(lab, ASK_EVERY_S), random.Random(seed))
        stack.push_async_callback(kills.asking.close)
        began = time.monotonic()
        async with running(kills.asking.run()):
            for number in range(1, rounds + 1):
                await kills.round(number)
                if number % 10 == 0:
                    say(f"round {number} of {rounds}, {time.monotonic() - began:.0f} s")
        whole = await _account(lab, kills)
    victims = {kind: len(took) for kind, took in sorted(kills.took_s.items())}
    middle = {kind: round(sorted(took)[len(took) // 2], 2) for kind, took in sorted(kills.took_s.items())}
    slowest = {kind: round(max(took), 2) for kind, took in sorted(kills.took_s.items())}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "rounds": rounds, "seed": seed, "took_s": round(time.monotonic() - began), "victims": victims,
        "arrives_again_s_p50": middle, "arrives_again_s_max": slowest, **whole, "stuck": kills.stuck,
    }  # fmt: skip


async def _account(lab: Lab, kills: Kills) -> dict[str, Any]:
    """Everything that was promised, against what came of it."""
    missing = await kills.asking.missing(SETTLE_S)
    owed = ledger.promised(lab.devices, lab)

    async def settled() -> bool:
        return not (owed - ledger.accepted(lab).keys()) and not (owed - ledger.effects(lab).keys())

    await _until(settled, SETTLE_S)
    asking = kills.asking
    counted = ledger.reckoning(lab, owed, len(asking.held), missing, asking.refused)
    return {**counted, "effects_out_of_order": ledger.effects_unordered(lab)}


def broken(whole: dict[str, Any]) -> list[str]:
    """All promises that were not kept, in words."""
    return [f"{name}: {whole[name]}" for name in ZERO if whole[name]] + whole["stuck"]


def write(whole: dict[str, Any]) -> None:
    """The report, and its summary in the queue's."""
    lost = whole["events_lost"] + whole["events_without_effect"] + whole["requests_lost"]
    twice = whole["events_accepted_twice"] + whole["events_with_effect_twice"] + whole["requests_computed_twice"]
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(whole, indent=1) + "\n")
    queue = json.loads(QUEUE.read_text()) if QUEUE.exists() else {}
    queue["kills"] = {"rounds": whole["rounds"], "victims": whole["victims"], "lost": lost, "twice": twice}
    QUEUE.write_text(json.dumps(queue, indent=1) + "\n")


def _promised(lab: Lab, device: Device) -> str:
    """The last key that a device has noted."""
    with contextlib.suppress(OSError, IndexError):
        return (lab.site.path / device.name / PROMISED).read_text().split()[-1]
    return ""


async def _killed(unit: Unit) -> None:
    """SIGKILL, as soon as the process is there."""

    async def lives() -> bool:
        return unit.pid is not None

    await _until(lives, ROUND_S)
    unit.kill()


async def _until(condition: Callable[[], Awaitable[bool]], within_s: float) -> bool:
    loop = asyncio.get_running_loop()
    end = loop.time() + within_s
    while not await condition():
        if loop.time() > end:
            return False
        await asyncio.sleep(POLL_S)
    return True


def main() -> int:
    """Run what the command line asks for; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("ROUNDS") or 200))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the lab's directory")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    try:
        whole = asyncio.run(run(arguments.rounds, arguments.seed, folder))
    finally:
        if arguments.keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    write(whole)
    say("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in whole.items()))
    found = broken(whole)
    say("\n".join([f"BROKEN {each}" for each in found]) or "all promises kept")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
