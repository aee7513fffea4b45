"""Routes on real parts: two devices, a region and a cloud; a pressed device answers by the cloud, a full one by its neighbour, and what must stay stays."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from appliance.client.aio import AsyncAppliance
from appliance.client.results import Result
from appliance.client.retrying import ONCE
from appliance.contract.errors import ApplianceError
from appliance.contract.inference import Tags
from appliance.lab.daemon import Device, Lab, Plan
from appliance.lab.site import claim
from tests.fleet.conftest import ROOT, Condition, log_has, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MODEL = "label-reader"
SETTINGS = {
    "reach": {"cloud_deadline_ms": 2_000.0},
    "serve": {"max_batch": 1, "slo_ms": 2_000.0},
    "modes": {"calm_s": 0.5, "relapse_s": 1.0},
}
"""A deadline that processes on one loaded machine can keep; and a queue of two, so that a device is full soon."""
X = np.linspace(-1, 1, 3 * 48 * 320, dtype=np.float32).reshape(1, 3, 48, 320)


@contextlib.asynccontextmanager
async def fleet(model: Path) -> AsyncIterator[Lab]:
    """Two devices that nobody asks but this test, and a cloud that says what it computes."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    try:
        async with contextlib.AsyncExitStack() as stack:
            plan = Plan(devices=2, model=model, rate_per_s=0, settings=SETTINGS, cloud_settings={"log": {"level": "debug"}})
            lab = Lab(claim(folder / "lab"), plan, stack)
            await lab.open()
            yield lab
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def computed(lab: Lab) -> Counter[str]:
    """What arrived at the cloud and was computed there, by stage."""
    lines = (lab.site.path / "log" / "cloud.log").read_text().splitlines()
    return Counter(json.loads(line)["stage"] for line in lines if '"inference_computed"' in line)


async def ask(client: AsyncAppliance, tags: Tags) -> Result | ApplianceError:
    """One answer, or why there is none."""
    try:
        return await client.infer(MODEL, {"x": X}, tags=tags)
    except ApplianceError as error:
        return error


async def told(device: Device, key: str) -> object:
    """What a device says of itself under this name."""
    return (await device.status() or {}).get(key)


def serves(device: Device, mode: str) -> Condition:
    """It serves in this mode."""

    async def so() -> bool:
        return await told(device, "mode") == mode

    return so


async def squeeze(lab: Lab, name: str) -> None:
    """Take a board's memory, as an operator would."""
    words = ["lab", "squeeze", "--to", "97", "--device", name, "--state", str(lab.site.path)]
    command = [sys.executable, "-c", "from appliance.cli.appliancectl import main; main()", *words]
    await asyncio.to_thread(subprocess.run, command, check=True, cwd=ROOT, capture_output=True)


async def helped_by_a_neighbour(lab: Lab) -> None:
    """Twelve at once on a device that holds three: its neighbour takes some; none of it reaches the cloud."""
    device, neighbour = lab.devices

    async def both_told() -> bool:
        return bool(await told(device, "capacity")) and bool(await told(neighbour, "capacity"))

    await until(both_told, 10)
    await asyncio.sleep(3)  # the next vitals, and the region's next look at them
    before = computed(lab)
    routes: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncAppliance(f"unix:{device.socket}", policy=ONCE)) for _ in range(12)]
        for residency in ("region", "device"):
            for _ in range(3):
                tags = Tags(data_residency=residency, timeout_s=5.0)
                for got in await asyncio.gather(*(ask(client, tags) for client in clients)):
                    routes[f"{residency} {got.route if isinstance(got, Result) else 'refused'}"] += 1
                    assert isinstance(got, Result) or got.reason in {"busy", "backlog_full"}, got
    assert routes["region neighbour"] >= 1, routes
    assert routes["region edge"] >= 3, routes
    assert routes["device neighbour"] == 0, routes
    assert set(routes) <= {f"{residency} {what}" for residency in ("region", "device") for what in ("edge", "neighbour", "refused")}, routes
    assert computed(lab) == before


async def answered_by_the_cloud(lab: Lab) -> None:
    """In mode D features travel once the extractor is loaded; what must stay is refused, and nothing of it arrives."""
    device = lab.devices[0]
    async with AsyncAppliance(f"unix:{device.socket}", policy=ONCE) as client:
        await until(serves(device, "A"), 20)
        here = await client.infer(MODEL, {"x": X}, tags=Tags(data_residency="device"))
        assert (here.route, here.mode) == ("edge", "A")
        assert here.cost is not None
        assert here.cost > 0
        await squeeze(lab, device.name)
        await until(serves(device, "D"), 20)
        await until(log_has(device, '"extractor_loaded"'), 20)
        before = computed(lab)
        whole = await client.infer(MODEL, {"x": X}, tags=Tags(accept_degradation=False))
        split = await client.infer(MODEL, {"x": X})
        assert (whole.route, split.route) == ("cloud", "split"), (whole.why, split.why)
        assert whole.cost is not None
        assert split.cost is not None
        assert 0 < split.cost < whole.cost
        assert "cheapest of split" in split.why
        for got in (whole, split):
            name = next(iter(here.outputs))
            assert got.outputs[name].shape == here.outputs[name].shape
            assert np.allclose(got.outputs[name], here.outputs[name], atol=1e-3)
        assert computed(lab) - before == Counter(input=1, features=1)
        before = computed(lab)
        for residency in ("device", "region"):
            refused = await ask(client, Tags(data_residency=residency))
            assert isinstance(refused, ApplianceError) or refused.route == "neighbour"
        assert computed(lab) == before


async def test_routes(bundle: Path) -> None:
    """The neighbour first, while both are well; then the first device is pressed into mode D."""
    async with fleet(bundle) as lab:
        await helped_by_a_neighbour(lab)
        await answered_by_the_cloud(lab)
        assert await log_has(lab.devices[0], '"priced"')()
