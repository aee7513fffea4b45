"""Answering: the full models in the cloud, for devices that are too hot, too full, or without the right version.

1. What waits is bounded: `waiting` requests for each worker; beyond that a request is refused at once, so that a device goes on by itself.
2. A request whose time is over is not computed.
3. Features are answered by the head that belongs to the same version's extractor; its place is beside the model (`head.onnx`).
"""

import asyncio
import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from appliance.cloud import cards
from appliance.contract.admission import check
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.inference import Request, Signature
from appliance.contract.remote import AnswerHead, Ask, pack, unpack_ask
from appliance.contract.vocabulary import Mode, Platform
from appliance.ports import Engine, Inbound

TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """One model that the cloud computes: files of the whole and, where it can be split, of its head; `confidence` as measured."""

    model: str
    version: str
    platform: Platform
    whole: Path
    head: Path | None = None
    confidence: float | None = None


@dataclass(slots=True)
class _Ready:
    served: Served
    signatures: dict[str, Signature] = field(default_factory=dict)


class Answering:
    """The models, and who computes now. `dollars_per_hour` is what one worker's machine costs, told with each answer."""

    def __init__(self, engine: Engine, served: tuple[Served, ...], *, workers: int, waiting: int, dollars_per_hour: float) -> None:
        self._engine = engine
        self._models = {(each.model, each.version): _Ready(each) for each in served}
        self._free = asyncio.Semaphore(workers)
        self._places = workers * (1 + waiting)
        self._inside = 0
        self._dollars_per_hour = dollars_per_hour
        self._log = structlog.get_logger()

    def priced(self, dollars_per_hour: float) -> None:
        """Take in what one worker's machine costs from now on."""
        self._dollars_per_hour = dollars_per_hour

    async def infer(self, inbound: Inbound) -> bytes:
        """Answer one frame. Raises: TheirsError (`malformed`, `unknown_model`, …), WorldError (`backlog_full`, `deadline`, `worker_lost`)."""
        arrived = time.monotonic()
        ask = unpack_ask(inbound.payload)
        ready = self._models.get((ask.head.model, ask.head.version))
        signature = ready.signatures.get(ask.head.stage) if ready else None
        if ready is None or signature is None:
            raise self._unknown(ask)
        request = Request("", ask.head.model, ask.tensors, ask.head.version, ask.head.outputs)
        check(request, signature)
        if self._inside >= self._places:
            raise WorldError("backlog_full", f"{self._inside} requests are inside already", where="cloud", retry_after_s=0.1)
        self._inside += 1
        try:
            return await self._computed(ask, ready.served, arrived + ask.head.within_ms / 1e3)
        finally:
            self._inside -= 1

    async def _computed(self, ask: Ask, served: Served, deadline: float) -> bytes:
        try:
            async with asyncio.timeout(deadline - time.monotonic()), self._free:
                started = time.monotonic()
                outputs = await self._engine.run(_key(served, ask.head.stage), ask.tensors, ask.head.outputs)
        except TimeoutError:
            raise WorldError("deadline", f"{ask.head.within_ms:.0f} ms were over before it was answered", where="cloud") from None
        self._log.debug("inference_computed", model=served.model, stage=ask.head.stage)
        head = AnswerHead(
            version=served.version,
            took_ms=(time.monotonic() - started) * 1e3,
            dollars_per_hour=self._dollars_per_hour,
            confidence=served.confidence,
        )
        return pack(head, outputs)

    async def run(self, moved: Callable[[], None]) -> None:
        """Load everything once, then prove that this loop moves; ends only by cancellation. A model that does not load is told and left out."""
        for ready in self._models.values():
            moved()
            for stage, path in _files(ready.served).items():
                try:
                    loaded = await self._engine.load(
                        _key(ready.served, stage), ready.served.platform, functools.partial(os.open, path, os.O_RDONLY)
                    )
                except ApplianceError as error:
                    self._log.error("model_not_answered", model=ready.served.model, stage=stage, reason=error.reason, what=str(error))
                else:
                    ready.signatures[stage] = loaded.signature
                    self._log.info("model_answered", model=ready.served.model, version=ready.served.version, stage=stage)
        while True:
            moved()
            await asyncio.sleep(TICK_S)

    def _unknown(self, ask: Ask) -> ApplianceError:
        have = ", ".join(f"{model} {version}" for (model, version), ready in self._models.items() if ready.signatures) or "nothing yet"
        what = f"{ask.head.model} {ask.head.version} is not computed here from its {ask.head.stage}"
        return TheirsError("unknown_model", what, where="cloud", remedy=f"computed here: {have}")


def served_from(models: Path) -> tuple[Served, ...]:
    """What lies in the cloud's model folder, one entry for each folder with a card. Raises: TheirsError (`malformed`, `model`), WorldError (`disk`)."""
    found = []
    for card_path in sorted(models.glob(f"*/{cards.CARD}")):
        folder, card = card_path.parent, cards.read(card_path)
        full = cards.files_of(folder, card)[Mode.FULL]
        platform = Platform.ONNX if Platform.ONNX in full else Platform.LITERT
        found.append(Served(card.model_id, card.version, platform, full[platform], cards.head_of(folder, card), card.accuracy))
    return tuple(found)


def _files(served: Served) -> Mapping[str, Path]:
    return {"input": served.whole} | ({"features": served.head} if served.head else {})


def _key(served: Served, stage: str) -> str:
    return f"{served.model}@{served.version}:{stage}"
