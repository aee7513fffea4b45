"""Modes on a whole device: an operator squeezes and heats the lab's boards, and callers notice nothing but the mode that an answer states."""

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from appliance.client.aio import AsyncAppliance
from appliance.client.results import Deferred
from appliance.client.retrying import ONCE
from appliance.contract.inference import Tags
from appliance.lab.daemon import Device, Lab
from tests.fleet.conftest import ROOT, Condition, log_has, reads, running, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

QUICK = {"modes": {"calm_s": 1.5, "relapse_s": 2.0}, "reach": {"cloud_deadline_ms": 2_000.0}}
"""Patience for a test; and a deadline for the cloud that a loaded machine, where it is a process beside the device, can keep."""
X = np.zeros((1, 3, 48, 160), np.float32)


def lab(world: Lab, *words: str) -> None:
    """Run `appliancectl lab …` on this lab."""
    command = [sys.executable, "-c", "from appliance.cli.appliancectl import main; main()", "lab", *words, "--state", str(world.site.path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


def serves(device: Device, modes: str) -> Condition:
    """The device says that it serves in one of these modes."""

    async def so() -> bool:
        return str((await device.status() or {}).get("mode", "?")) in modes

    return so


async def test_a_squeeze_walks_down_to_the_cloud_and_calm_walks_back_without_a_lost_label(bundle: Path) -> None:
    """A, B, C, D and back to A; labels are read all the time, each answer says its mode, each transition is told to the region once."""
    async with running(rate_per_s=6.0, model=bundle, settings=QUICK) as world:
        device = world.devices[0]
        await until(reads(device, 10), 30)
        await asyncio.to_thread(lab, world, "squeeze", "--to", "97")
        await until(serves(device, "D"), 20)
        await until(reads(device, 10), 30)
        await asyncio.to_thread(lab, world, "calm")
        await until(serves(device, "A"), 40)
        await until(reads(device, 10), 30)
        score = device.stream.score
        assert score.failed == 0, score.reasons
        assert score.modes["A"] >= 20
        assert score.modes["D"] >= 5
        assert score.differing == 0
        for before, after in ("AB", "BC", "CD", "DC", "CB", "BA"):
            assert await log_has(device, '"mode_changed"', f'"before": "{before}", "after": "{after}"')()
        region = (world.site.path / "log" / "region.log").read_text()
        assert region.count('"what": "mode_changed"') == 6


async def test_heat_shrinks_batches_and_steps_modes(bundle: Path) -> None:
    """A heated board: its temperature rises, the mode steps down before the trip, and labels are read all the while."""
    settings = {**QUICK, "sim": {"capacity_j_per_k": 2.0}}
    async with running(rate_per_s=6.0, model=bundle, settings=settings) as world:
        device = world.devices[0]
        await until(reads(device, 5), 30)
        await asyncio.to_thread(lab, world, "heat", "--watts", "60")
        await until(serves(device, "BCD"), 20)
        status = await device.status() or {}
        assert float(str(status["temperature_c"])) > 80
        assert "heat" in str(status["why"])
        await until(log_has(device, '"throttling_began"', '"software_clamp"'), 20)
        await until(log_has(device, '"batch_limited"'), 10)
        await asyncio.to_thread(lab, world, "calm")
        await until(serves(device, "A"), 60)
        assert device.stream.score.failed == 0, device.stream.score.reasons


async def test_a_promise_survives_the_death_of_the_daemon_and_is_kept_once(bundle: Path) -> None:
    """Nobody may answer by the full model on this device now: 202 and an id; the daemon is killed; in calm the answer is there, computed once."""
    strict = Tags(accept_degradation=False, data_residency="device")
    async with running(rate_per_s=1.0, model=bundle, settings=QUICK) as world:
        device = world.devices[0]
        await asyncio.to_thread(lab, world, "squeeze", "--to", "97")
        await until(serves(device, "CD"), 30)
        async with AsyncAppliance(f"unix:{device.socket}", policy=ONCE) as client:
            promised = await client.submit("label-reader", {"x": X}, tags=strict, id="promise-1")
            assert isinstance(promised, Deferred)
            assert promised.id == "promise-1"
            again = await client.submit("label-reader", {"x": X}, tags=strict, id="promise-1")
            assert isinstance(again, Deferred), "the same id is the same promise"
            device.unit.kill()
            await until(log_has(device, '"event": "started"', times=2), 30)
            await asyncio.to_thread(lab, world, "calm")
            got = await client.fetch("promise-1", wait_s=60.0)
            assert got.mode == "A"
            assert next(iter(got.outputs.values())).shape[0] == 1
            same = await client.fetch("promise-1", wait_s=5.0)
            assert np.array_equal(next(iter(same.outputs.values())), next(iter(got.outputs.values())))
        assert await log_has(device, '"promise_kept"', '"promise-1"')()
        assert not await log_has(device, '"promise_kept"', '"promise-1"', times=2)()
