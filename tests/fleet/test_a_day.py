"""One device's day on real parts: it serves what only its TPM could open, and what is killed comes back."""

import os
import signal
from pathlib import Path

import pytest

from appliance.lab.daemon import Device
from tests.fleet.conftest import MODEL, reads, running, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def children(pid: int) -> list[int]:
    """The processes that this one started."""
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def secrets_on_disk(folder: Path) -> list[str]:
    """Files below the folder that hold a plaintext block of the model, or a private key."""
    plain = MODEL.read_bytes()
    probes = [plain[at : at + 64] for at in range(4096, len(plain) - 64, len(plain) // 50)] + [b"PRIVATE KEY"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if any(probe in path.read_bytes() for probe in probes)]


async def lose_the_worker(device: Device) -> None:
    """Kill -9 of the inference child under load: service is back within 2 s."""
    assert device.unit.pid is not None
    [child] = children(device.unit.pid)
    os.kill(child, signal.SIGKILL)
    assert await until(reads(device, 1), 10) < 2
    await until(reads(device, 20), 10)
    assert children(device.unit.pid) != [child]


async def test_a_day() -> None:
    """Labels are read as onnxruntime reads them, through a dead worker, broker and daemon, and nothing secret is on disk."""
    async with running() as lab:
        device = lab.devices[0]
        await until(reads(device, 40), 30)
        await lose_the_worker(device)

        broker = next(unit for unit in lab.units if unit.name == "broker")
        broker.kill()
        await until(reads(device, 20), 15)

        async def linked() -> bool:
            status = await device.status()
            return status is not None and status["link"] == "HEALTHY" and broker.restarts > 0

        await until(linked, 20)

        device.unit.kill()
        await until(reads(device, 20), 30)
        assert device.unit.restarts == 1
        pulls = [line for line in device.unit.log.read_text().splitlines() if "pull_started" in line]
        assert len(pulls) == 1, "the model was pulled anew after a restart"

        score = device.stream.score
        assert score.failed == 0, score.reasons
        assert score.differing == 0
        assert score.exact >= 0.85 * score.labels  # few labels: the floor of 92 % is `make run`'s, over hundreds
        assert secrets_on_disk(lab.site.path / device.name) == []
        assert await device.unit.stop(timeout_s=5.0) == 0


async def test_local_serving_outlives_the_broker() -> None:
    """With the broker away for 10 s every label is read, and the link comes back by itself."""
    async with running() as lab:
        device = lab.devices[0]
        broker = next(unit for unit in lab.units if unit.name == "broker")
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGSTOP)  # worse than dead: connections stay open and nothing answers
        for _ in range(4):
            await until(reads(device, 15), 8)
        os.kill(broker.pid, signal.SIGKILL)

        async def linked() -> bool:
            status = await device.status()
            return status is not None and status["link"] == "HEALTHY" and broker.restarts > 0

        await until(linked, 20)
        assert device.stream.score.failed == 0
        assert device.stream.score.retried == 0
