"""One device's day on real parts: it serves what only its TPM could open, and what is killed comes back."""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from appliance.lab.daemon import Device, Lab, Plan
from appliance.lab.site import claim

MODEL = Path(__file__).parent.parent.parent / "build/models/label-reader.onnx"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@contextlib.asynccontextmanager
async def running(rate_per_s: float = 8.0) -> AsyncIterator[Lab]:
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    try:
        async with contextlib.AsyncExitStack() as stack:
            lab = Lab(claim(folder / "lab"), Plan(devices=1, model=MODEL, rate_per_s=rate_per_s), stack)
            await lab.open()
            yield lab
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def until(condition: Callable[[], Awaitable[bool]], within_s: float) -> float:
    """Wait for a condition; returns how long it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not await condition():
        assert loop.time() - began < within_s, f"not within {within_s} s"
        await asyncio.sleep(0.05)
    return loop.time() - began


def reads(device: Device, more: int) -> Callable[[], Awaitable[bool]]:
    """A condition: so many more labels have been read."""
    wanted = device.stream.score.labels + more

    async def enough() -> bool:
        return device.stream.score.labels >= wanted

    return enough


async def test_a_day() -> None:
    """Labels are read as onnxruntime reads them, through a dead worker, a dead broker and a dead daemon, and nothing secret is on disk."""
    async with running() as lab:
        device = lab.devices[0]
        await until(reads(device, 40), 30)

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
        assert score.exact >= 0.85 * score.labels

        plain = MODEL.read_bytes()
        probes = [plain[at : at + 64] for at in range(4096, len(plain) - 64, len(plain) // 50)]
        for path in (lab.site.path / device.name).rglob("*"):
            if path.is_file() and not path.is_socket():
                written = path.read_bytes()
                assert not any(probe in written for probe in probes), f"{path} holds plaintext of the model"
                assert b"PRIVATE KEY" not in written, f"{path} holds a private key"

        assert await device.unit.stop(timeout_s=5.0) == 0
