"""Two programs, one software TPM: each finds it as if it were alone, and what a dead one left in it is gone."""

import asyncio
import contextlib
import shutil
import struct
from collections.abc import AsyncIterator

import pytest

from appliance.adapters.tpm import EsysTpm
from appliance.contract.errors import WorldError
from appliance.lab import turnstile
from appliance.lab.turnstile import Turnstile
from tests.fakes.soft_tpm import Software

pytestmark = pytest.mark.slow

STORAGE_KEY = bytes.fromhex("0023000b0003047200000006008000430010000300100000 0000".replace(" ", ""))
PASSWORD = bytes.fromhex("00000009400000090000000000")
OWNER = 0x40000001
CREATE_PRIMARY, FLUSH, GET_CAPABILITY = 0x131, 0x165, 0x17A
TRANSIENT = 0x80000000


class Agent:
    """Speaks as go-tpm does: one connection for each command."""

    def __init__(self, place: Turnstile) -> None:
        self._place = place

    async def command(self, code: int, body: bytes, tag: int = 0x8001) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self._place.socket))
        writer.write(struct.pack(">HII", tag, 10 + len(body), code) + body)
        answer = await reader.readexactly(10)
        answer += await reader.readexactly(struct.unpack(">HII", answer)[1] - 10)
        writer.close()
        assert struct.unpack(">HII", answer[:10])[2] == 0, answer.hex()
        return answer[10:]

    async def load(self) -> int:
        """Make a storage key and return its handle."""
        public = struct.pack(">H", len(STORAGE_KEY)) + STORAGE_KEY
        body = struct.pack(">I", OWNER) + PASSWORD + bytes.fromhex("000400000000") + public + bytes.fromhex("000000000000")
        return int(struct.unpack(">I", (await self.command(CREATE_PRIMARY, body, 0x8002))[:4])[0])

    async def flush(self, handle: int) -> None:
        await self.command(FLUSH, struct.pack(">I", handle))

    async def loaded(self) -> int:
        """How many objects the TPM holds."""
        found = await self.command(GET_CAPABILITY, struct.pack(">III", 1, TRANSIENT, 16))
        return int(struct.unpack(">I", found[5:9])[0])


@contextlib.asynccontextmanager
async def shared() -> AsyncIterator[tuple[Software, Agent, EsysTpm]]:
    software = Software()
    await asyncio.to_thread(software.start)
    place = Turnstile("127.0.0.1", software.port, software.state / "agent.sock")
    await place.open()
    tpm = EsysTpm(place.tcti)
    try:
        yield software, Agent(place), tpm
    finally:
        await tpm.close()
        await place.close()
        software.cut()
        shutil.rmtree(software.state)


async def test_a_program_waits_while_the_other_has_objects_in_the_tpm() -> None:
    """The daemon's work starts when the agent has flushed its last object, and not before; the same TPM answers both."""
    async with shared() as (_, agent, tpm):
        await tpm.enrol_ask()
        handle = await agent.load()
        waiting = asyncio.create_task(tpm.enrol_ask())
        await asyncio.sleep(0.5)
        assert not waiting.done()
        assert await agent.loaded() == 1
        await agent.flush(handle)
        async with asyncio.timeout(5):
            await waiting
        assert await agent.loaded() == 0


async def test_what_a_dead_program_left_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three objects of an agent that was killed fill a TPM; after a moment the daemon works, and the agent's next life has room again."""
    monkeypatch.setattr(turnstile, "ABANDONED_S", 0.5)
    async with shared() as (_, agent, tpm):
        for _ in range(3):
            await agent.load()
        async with asyncio.timeout(10):
            await tpm.enrol_ask()
        for _ in range(3):
            await agent.load()


async def test_a_power_cut_is_seen_by_both_and_outlived() -> None:
    """A call during which the TPM goes away fails as such, and the next one finds the TPM that is back."""
    async with shared() as (software, agent, tpm):
        await tpm.enrol_ask()
        await asyncio.to_thread(software.restart)
        with pytest.raises(WorldError):
            await tpm.enrol_ask()
        await tpm.enrol_ask()
        assert await agent.loaded() == 0
