"""Real SPIRE gives the identities: a device proves by its TPM who it is, and no rotation, lost agent or lost server costs a request or a promise.

`make test` runs a few rotations; SPIRE_MINUTES=10 (`make spire`) the whole ten minutes, and writes build/reports/trust.json.
"""

import asyncio
import contextlib
import json
import os
import platform
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.client.aio import AsyncAppliance
from appliance.client.images import tensor_of
from appliance.client.results import Deferred
from appliance.contract.inference import Tags
from appliance.lab.daemon import MODEL as MODEL_NAME
from appliance.lab.daemon import Device, Lab
from appliance.lab.faults import Clock, why_no_clock
from appliance.lab.labels import draw
from appliance.lab.spire import Spire
from tests.chaos import ledger
from tests.fleet.conftest import Condition, log_has, reads, running, until

MINUTES = float(os.environ.get("SPIRE_MINUTES", "1.6"))
TTL_S = 60.0
SHORT_TTL_S = 20.0
"""For the tests of faults; SPIRE dates an SVID back by 10 s, so that agents renew it every 5 s or so."""
REPORT = Path(__file__).parent.parent.parent / "build/reports/trust.json"
NOBODY_IS_SO_FAST_S = 0.001

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 60 * MINUTES), pytest.mark.usefixtures("spire")]


class Promises:
    """Requests that are deferred, one a second, each fetched as soon as it is answered; a device keeps the latest answers only."""

    def __init__(self, device: Device) -> None:
        self.client = AsyncAppliance(f"unix:{device.socket}", timeout_s=5.0)
        self.made = self.kept = 0

    async def run(self) -> None:
        tensor = tensor_of(draw(random.Random(1)).image)
        tags = Tags(slo_s=NOBODY_IS_SO_FAST_S, data_residency="device")
        async with asyncio.TaskGroup() as group:
            while True:
                got = await self.client.submit(MODEL_NAME, {"x": tensor}, tags=tags)
                if isinstance(got, Deferred):
                    self.made += 1
                    group.create_task(self._fetch(got))
                await asyncio.sleep(1.0)

    async def _fetch(self, promise: Deferred) -> None:
        result = await self.client.fetch(promise, wait_s=20.0)
        self.kept += bool(result.outputs)


@contextlib.asynccontextmanager
async def background(promises: Promises) -> AsyncIterator[None]:
    task = asyncio.create_task(promises.run())
    try:
        yield
    finally:
        task.cancel()
        [ended] = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError), ended


def spire_of(lab: Lab) -> Spire:
    assert isinstance(lab.issuer, Spire)
    return lab.issuer


async def figure(device: Device, name: str) -> object:
    status = await device.status()
    assert status is not None, "the device does not answer"
    return status[name]


async def rotations(device: Device) -> int:
    return int(str(await figure(device, "rotations")))


def rotated(device: Device, to: int) -> Condition:
    async def enough() -> bool:
        return await rotations(device) >= to

    return enough


def identity(device: Device, *, ready: bool) -> Condition:
    """What the device says of its identity."""

    async def said() -> bool:
        found = await figure(device, "identity")
        assert isinstance(found, dict)
        return bool(found["ready"]) is ready

    return said


def says(device: Device, words: str) -> Condition:
    """The line for the service manager has these words."""

    async def said() -> bool:
        return words in device.unit.status

    return said


def whole(device: Device) -> Condition:
    """The identity is good again, and the link stands (it may count as degraded for some time after a partition)."""

    async def good() -> bool:
        return await identity(device, ready=True)() and await figure(device, "link") != "PARTITIONED"

    return good


def fetched(promises: Promises, number: int) -> Condition:
    """So many promises are kept."""

    async def enough() -> bool:
        return promises.kept >= number

    return enough


def report(**figures: object) -> None:
    found = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    found |= figures
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(found, indent=1) + "\n")


async def test_nothing_is_lost_while_identities_rotate() -> None:
    """Under load, with SVIDs of 60 s, over `SPIRE_MINUTES`: every label is read, every event arrives once and in order, every promise is kept."""
    async with running(spire_ttl_s=TTL_S, told_every_s=0.25, reattest_s=30.0) as lab:
        device = lab.devices[0]
        assert "/spire/agent/tpm_devid/" in spire_of(lab).agents[device.name].log.read_text()
        promises = Promises(device)
        async with background(promises):
            await asyncio.sleep(60 * MINUTES)
            made = promises.made
            with contextlib.suppress(AssertionError):
                await until(fetched(promises, made), 20)
        moved = await rotations(device)
        told = ledger.promised(lab.devices, lab)

        async def arrived() -> bool:
            return not told - ledger.accepted(lab).keys()

        with contextlib.suppress(AssertionError):
            await until(arrived, 20)
        accepted = ledger.accepted(lab)
        lost = {
            "requests": device.stream.score.failed,
            "events": len(told - accepted.keys()),
            "promises": max(0, made - promises.kept),
        }
        await promises.client.close()
        restarts = {unit.name: unit.restarts for unit in lab.units if unit.restarts > 0}
        figures = {
            "minutes": MINUTES,
            "svid_ttl_s": TTL_S,
            "labels": device.stream.score.labels,
            "retried": device.stream.score.retried,
            "events": len(told),
            "promises": made,
            "lost": lost,
            "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        }
        print(json.dumps({"rotations": moved, **figures}))  # noqa: T201 - for whoever watches a run of ten minutes
        assert restarts == {}
        assert (
            moved >= 2 * MINUTES - 1
        )  # an agent renews at half life, 25 s or so after the last; the start of the run may have eaten most of one
        assert lost == {"requests": 0, "events": 0, "promises": 0}
        assert ledger.unordered(lab) == 0
        assert sum(accepted.values()) == len(accepted)
        assert len(told) > 60 * MINUTES
        assert made > 20 * MINUTES
        if "SPIRE_MINUTES" in os.environ:
            report(rotations=moved, lost=sum(lost.values()), spire=figures)


async def test_a_device_outlives_its_agent_its_server_and_its_clock(tmp_path: Path) -> None:
    """Agent killed, server gone, agent frozen for two lives of an SVID, wall clock stepped by an hour and back: labels are read all the while.

    The identity is red when it has expired; afterwards all is well without a human, a restart of the daemon, or the loss of an event.
    """
    clock = None if why_no_clock() else Clock(tmp_path)
    environment = {"dev-001": clock.environment} if clock else {}
    async with running(spire_ttl_s=SHORT_TTL_S, told_every_s=0.5, environment=environment) as lab:
        device, spire = lab.devices[0], spire_of(lab)
        agent, server = spire.agents[device.name], spire.server
        assert server is not None
        await until(rotated(device, 1), 30)

        agent.kill()
        await until(rotated(device, await rotations(device) + 2), 40)
        assert agent.restarts == 1

        server.hold()
        await until(identity(device, ready=False), 2 * SHORT_TTL_S)
        await until(says(device, "identity expired"), 5)
        await until(log_has(device, "svid_expired"), 10)
        await until(reads(device, 40), 30)
        server.release()
        await until(whole(device), 60)

        assert agent.pid is not None
        frozen = agent.pid
        os.kill(frozen, signal.SIGSTOP)
        try:
            await asyncio.sleep(2 * SHORT_TTL_S)
            assert await identity(device, ready=False)()
            await until(reads(device, 40), 30)
        finally:
            os.kill(frozen, signal.SIGCONT)
        await until(whole(device), 60)
        await until(rotated(device, await rotations(device) + 1), 30)

        if clock:
            back = clock.step(3600)
            await until(identity(device, ready=False), 5)
            await until(reads(device, 40), 30)
            back()
            await until(whole(device), 60)

        told = ledger.promised(lab.devices, lab)

        async def arrived() -> bool:
            return not told - ledger.accepted(lab).keys()

        await until(arrived, 30)
        assert device.stream.score.failed == 0
        assert device.unit.restarts == 0
