"""A whole lab in a short directory of its own, and conditions to wait for."""

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from appliance.contract.errors import WorldError
from appliance.lab.daemon import Device, Lab, Plan
from appliance.lab.site import claim
from appliance.lab.spire import programs

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "build/models/label-reader.onnx"
BUNDLE = ROOT / "build/models/label-reader.bundle"

Condition = Callable[[], Awaitable[bool]]
Settings = Mapping[str, Mapping[str, object]]


@pytest.fixture
def spire() -> Path:
    """The folder with SPIRE's programs; where there are none, what to do about it."""
    try:
        return programs()
    except WorldError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The label reader's bundle of variants, which the lab serves unless told otherwise; built once per machine (half a minute)."""
    subprocess.run([ROOT / "scripts/build-variants"], check=True, cwd=ROOT)
    return BUNDLE


@contextlib.asynccontextmanager
async def running(
    *,
    rate_per_s: float = 8.0,
    reattest_s: float = 3600.0,
    model: Path = MODEL,
    settings: Settings | None = None,
    spire_ttl_s: float = 0.0,
    told_every_s: float = 0.0,
    environment: Mapping[str, Mapping[str, str]] | None = None,
) -> AsyncIterator[Lab]:
    """Run a lab with one device for a while, and leave nothing. `settings` go over the device's own; for the rest see `Plan`."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    try:
        async with contextlib.AsyncExitStack() as stack:
            plan = Plan(
                devices=1,
                model=model,
                rate_per_s=rate_per_s,
                reattest_s=reattest_s,
                settings=settings or {},
                spire_ttl_s=spire_ttl_s,
                told_every_s=told_every_s,
                environment=environment or {},
            )
            lab = Lab(claim(folder / "lab"), plan, stack)
            await lab.open()
            yield lab
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def until(condition: Condition, within_s: float) -> float:
    """Wait for a condition; return how long it took, in seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not await condition():
        assert loop.time() - began < within_s, f"not within {within_s} s"
        await asyncio.sleep(0.05)
    return loop.time() - began


def reads(device: Device, more: int) -> Condition:
    """So many more labels have been read."""
    wanted = device.stream.score.labels + more

    async def enough() -> bool:
        return device.stream.score.labels >= wanted

    return enough


def log_has(device: Device, *words: str, times: int = 1) -> Condition:
    """The device's log has so many lines with all these words."""

    async def told() -> bool:
        lines = device.unit.log.read_text().splitlines()
        return sum(all(word in line for word in words) for line in lines) >= times

    return told
