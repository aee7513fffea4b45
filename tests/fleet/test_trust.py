"""What is not proven does not run, and what ran goes on: forged, tampered and unattested, against a whole device on real parts."""

import asyncio
import shutil
import time
from pathlib import Path

import msgspec
import pytest

from appliance.adapters.mqtt import LinkSettings, MqttLink, SessionSettings
from appliance.adapters.sealed import seal
from appliance.adapters.signing import Repository, file_signers
from appliance.adapters.spiffe import WorkloadIdentity
from appliance.adapters.tpm import EsysTpm
from appliance.contract import identities, topics
from appliance.contract.codec import decode, encode
from appliance.contract.models import CHUNK_BYTES, ChunkAsk, Manifest, Release
from appliance.contract.vocabulary import Platform
from appliance.lab.daemon import REGION, Lab
from appliance.ports import Inbound
from tests.fleet.conftest import MODEL, log_has, reads, running, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def false_region(lab: Lab, chunks: dict[str, bytes]) -> tuple[MqttLink, WorkloadIdentity, asyncio.Task[None]]:
    """Take the stopped region's place on the broker, under its true identity, and serve these containers."""
    identity = await WorkloadIdentity.open(f"unix:{lab.site.path}/id/region-{REGION}.sock")
    link = MqttLink(
        identity,
        LinkSettings(session=SessionSettings(port=lab.port)),
        client_id=identities.region_user(REGION),
        peer=identities.broker(REGION),
        answers=topics.upstream_answer(REGION),
    )

    async def chunk(inbound: Inbound) -> bytes:
        ask = decode(inbound.payload, ChunkAsk)
        return chunks[ask.artifact][ask.index * CHUNK_BYTES : (ask.index + 1) * CHUNK_BYTES]

    link.serve(f"v1/{REGION}/d/+/up/ask/chunk", chunk)
    task = asyncio.create_task(link.run())

    async def up() -> bool:
        return link.connected

    await until(up, 10)
    return link, identity, task


def next_release(lab: Lab, folder: Path) -> tuple[Release, str, bytes]:
    """The cloud's own keys sign version 4.0.1: a true release, its artifact's name and its container."""
    home = lab.site.path / "cloud"
    shutil.copytree(home / "state" / "repository", folder / "repository")
    repository = Repository.open_or_create(folder / "repository", file_signers(home / "keys"), time.time)
    files = repository.release.files
    [name] = [name for name in files if name.startswith("targets/")]
    old = decode(files[name], Manifest)
    artifact = seal(MODEL, folder / "container", bytes(range(32)), bytes(32))
    fresh = msgspec.structs.replace(old, version="4.0.1", token=old.token + 1, compiled_artifacts={Platform.ONNX: artifact})
    return repository.publish([fresh]), artifact.container_sha256, (folder / "container").read_bytes()


async def test_a_false_region_changes_nothing(tmp_path: Path) -> None:
    """An unsigned manifest and a tampered artifact of a true release are refused by name, and the good version answers all the while."""
    async with running() as lab:
        device = lab.devices[0]
        region = next(unit for unit in lab.units if unit.name == "region")
        await region.stop()
        release, artifact, container = await asyncio.to_thread(next_release, lab, tmp_path)
        broken = bytearray(container)
        broken[len(broken) // 2] ^= 1
        link, identity, task = await false_region(lab, {artifact: bytes(broken)})
        try:
            forged = {
                name: content.replace(b"4.0.1", b"6.6.6") if name.startswith("targets/") else content
                for name, content in release.files.items()
            }
            await link.publish(topics.release(REGION), encode(Release(files=forged)), retain=True)
            await until(log_has(device, "release_refused"), 10)
            await link.publish(topics.release(REGION), encode(release), retain=True)
            await until(log_has(device, "model_refused", "tampered"), 20)
            await until(reads(device, 20), 15)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await identity.close()
        status = await device.status()
        assert status is not None
        assert status["model_version"] == "4.0.0"
        assert device.stream.score.failed == 0


async def test_a_changed_boot_is_refused_while_the_good_model_serves() -> None:
    """After PCR 4 changed the region refuses the next proof and says which PCR; the loaded model goes on; a restart opens nothing."""
    async with running(reattest_s=5.0) as lab:
        device = lab.devices[0]
        tpm = EsysTpm(device.tcti)
        await tpm.extend(4, bytes(range(32)))
        await tpm.close()
        await until(log_has(device, "attestation_rejected", "PCR 4 differs"), 20)
        await until(reads(device, 20), 15)
        device.task.cancel()
        await asyncio.gather(device.task, return_exceptions=True)
        device.unit.kill()
        await until(log_has(device, "attestation_rejected", "PCR 4 differs", times=2), 20)
        status = await device.status()
        assert status is not None
        assert status["model_version"] == ""
