"""Pulls one artifact over the link into the depot: the hands of `core.change.transfer`, the same on a device and in a region."""

import asyncio
from collections.abc import Callable

import structlog

from appliance.contract.codec import encode
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.models import ChunkAsk, CompiledArtifact
from appliance.core.change.transfer import Ask, Complete, GiveUp, Heard, Refused, Resumed, Transfer
from appliance.ports import Clock, Depot, Link

LONGEST_ASK_S = 30.0
"""A question outlives its first deadline, since a late answer is still an answer (core.change.transfer, rule 4)."""
RESUME_S = 2.0


class Pull:
    """One transfer from `topic` into the depot; `run` returns the path of the complete container."""

    def __init__(
        self, link: Link, depot: Depot, clock: Clock, topic: str, artifact: CompiledArtifact, *, moved: Callable[[], None]
    ) -> None:
        self._link = link
        self._depot = depot
        self._clock = clock
        self._topic = topic
        self._artifact = artifact
        self._moved = moved
        self._log = structlog.get_logger().bind(artifact=artifact.container_sha256[:12])

    async def run(self) -> str:
        """Pull what is missing, resuming where an earlier attempt ended.

        Raises: TheirsError (`tampered`, or the peer's refusal), WorldError (`disk`). Waits as long as the peer is away.
        """
        missing = await asyncio.to_thread(self._depot.missing, self._artifact)
        if missing:
            self._log.info("pull_started", chunks=len(missing), bytes=self._artifact.container_size)
            await self._transfer(missing)
            self._log.info("pull_finished", chunks=len(missing))
        return await asyncio.to_thread(self._depot.complete, self._artifact)

    async def _transfer(self, missing: list[int]) -> None:
        heard: asyncio.Queue[Heard | Refused] = asyncio.Queue()
        transfer = Transfer(missing)
        async with asyncio.TaskGroup() as group:
            commands = transfer.tick(self._clock.monotonic())
            while True:
                for command in commands:
                    match command:
                        case Ask(index=index):
                            group.create_task(self._ask(index, heard))
                        case Complete():
                            return
                        case GiveUp(reason=reason):
                            raise TheirsError(reason, "the peer will not serve this artifact", where=self._topic)
                        case _:
                            raise OursError("command", f"unknown command {command!r}")
                commands = await self._wait(transfer, heard)

    async def _wait(self, transfer: Transfer, heard: "asyncio.Queue[Heard | Refused]") -> list[Ask | Complete | GiveUp]:
        """Sleep until an answer, a deadline, or the time to look whether the link is back."""
        self._moved()
        deadline = transfer.deadline()
        now = self._clock.monotonic()
        sleep_s = RESUME_S if deadline is None else min(max(deadline - now, 0.0), RESUME_S)
        try:
            async with asyncio.timeout(sleep_s):
                event: Heard | Refused | Resumed | None = await heard.get()
        except TimeoutError:
            event = Resumed() if deadline is None and self._link.connected else None
        now = self._clock.monotonic()
        return transfer.tick(now) if event is None else transfer.feed(event, now)

    async def _ask(self, index: int, heard: "asyncio.Queue[Heard | Refused]") -> None:
        """One question; a lost one says nothing, since the plan has its own deadline."""
        try:
            chunk = await self._link.ask(
                self._topic, encode(ChunkAsk(artifact=self._artifact.container_sha256, index=index)), timeout_s=LONGEST_ASK_S, qos=0
            )
            await asyncio.to_thread(self._depot.put, self._artifact, index, chunk)
        except TheirsError as error:
            heard.put_nowait(Heard(index, ok=False) if error.reason == "chunk" else Refused(error.reason))
        except WorldError as error:
            if error.reason == "disk":
                raise
            heard.put_nowait(Heard(index, ok=False))
        else:
            heard.put_nowait(Heard(index, ok=True))
