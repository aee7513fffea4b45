"""A partition with power cuts, on a whole device: what a lease allows serves again at once, what it does not stays shut, and contact heals it."""

import asyncio
import json
import os
import signal
import time
from datetime import datetime

import pytest

from appliance.adapters.tpm import EsysTpm
from appliance.lab import softtpm
from appliance.lab.daemon import Device, Lab
from tests.fleet.conftest import log_has, reads, running, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

IMAGE = "appliance 0.1.0"
"""What the lab's devices boot."""


async def power_cut(device: Device) -> float:
    """Kill -9 of TPM and daemon; the TPM comes back and is measured, then the daemon starts. Returns when its process did (monotonic)."""
    restarts = device.tpm.restarts
    device.tpm.kill()

    async def back() -> bool:
        return device.tpm.restarts > restarts and device.tpm.pid is not None

    await until(back, 15)
    tpm = EsysTpm(device.tcti)
    for _ in range(100):
        try:
            await tpm.look([0])
            break
        except Exception:  # noqa: BLE001 - it does not listen yet
            await asyncio.sleep(0.05)
    await softtpm.measured_boot(tpm, IMAGE)
    await tpm.close()
    old = device.unit.pid
    device.unit.kill()

    async def started() -> bool:
        return device.unit.pid not in {None, old}

    await until(started, 15)
    return time.monotonic()


def opened_within(device: Device) -> float:
    """Seconds from the last `started` to the last `model_mounted` in the device's log."""
    lines = [json.loads(line) for line in device.unit.log.read_text().splitlines() if line.startswith("{")]
    stamps = {line["event"]: datetime.fromisoformat(line["timestamp"]) for line in lines}
    return (stamps["model_mounted"] - stamps["started"]).total_seconds()


async def partition(lab: Lab) -> int:
    """Freeze the broker: connections stay open and nothing answers. Returns its process."""
    broker = next(unit for unit in lab.units if unit.name == "broker")
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    return broker.pid


async def test_four_power_cuts_in_a_partition_and_not_a_fifth() -> None:
    """Each of four serves again within 2 s of its start and says how many are left; the fifth says why it does not; after contact it serves."""
    async with running() as lab:
        device = lab.devices[0]
        await until(reads(device, 20), 30)
        broker = await partition(lab)
        for cut in range(1, 5):
            began = await power_cut(device)
            await until(log_has(device, "lease_opened", f'"restarts_left": {4 - cut}'), 10)
            await until(reads(device, 3), 15)
            assert opened_within(device) < 2.0
            assert time.monotonic() - began < 6.0  # with the start of two Python processes, on whatever machine this is
        await power_cut(device)
        await until(log_has(device, "lease_refused", "restarted 5 times since the region last saw it, 4 are allowed"), 10)
        await asyncio.sleep(3)
        status = await device.status()
        assert status is not None
        assert status["model_version"] == ""
        os.kill(broker, signal.SIGCONT)
        await until(reads(device, 20), 40)
        assert device.stream.score.differing == 0
