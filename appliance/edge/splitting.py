"""Splitting: the feature extractors of models that can be cut: loaded while the router wants them, measured, and unloaded when it no longer does.

1. An extractor is loaded and run once for measurement before it is offered: what it takes here, and how many bytes it really sends for a sample.
2. What does not load, or has inputs of unknown shape, is not tried again for `RETRY_S`.
3. At most two runs for each worker are inside at a time; more are refused at once, and go another way.
"""

import asyncio
import itertools
from collections.abc import Mapping
from math import inf
from typing import NamedTuple

import numpy as np
import structlog

from appliance.contract.admission import check
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.inference import DTYPES, Array, Request
from appliance.core.serve.profile import Estimate
from appliance.edge.lane import Hands
from appliance.edge.stand import Stand
from appliance.edge.upstream import rows

WARM_RUNS = 3
RETRY_S = 60.0
_numbers = itertools.count(1)


class Features(NamedTuple):
    """What an extractor takes here for one sample, and the bytes of its features."""

    seconds: float
    size: int


class _Extractor:
    """One model's extractor: `key` is the engine's name of it while it is loaded."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.key = ""
        self.size = 0
        self.took = Estimate()
        self.runs: set[asyncio.Future[None]] = set()
        self.moving = False
        self.again_at = -inf


class Splitting:
    """The extractors of all models, on the hands that serve them."""

    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._extractors: dict[str, _Extractor] = {}
        self._log = structlog.get_logger()

    def ready(self, stand: Stand) -> bool:
        """Whether this version's extractor is loaded."""
        found = self._extractors.get(stand.name)
        return found is not None and found.stand is stand and bool(found.key)

    def about(self, stand: Stand) -> Features | None:
        """What was measured of this version's extractor; None before, and while it cannot be loaded."""
        found = self._extractors.get(stand.name)
        if found is None or found.stand is not stand or not found.took.count or self._hands.clock.monotonic() < found.again_at:
            return None
        return Features(found.took.value, found.size)

    def want(self, stand: Stand, *, wanted: bool) -> None:
        """Load it, or give its memory back, beside whatever runs; another version's goes."""
        found = self._extractors.get(stand.name)
        if found is not None and found.stand is not stand and not found.moving:
            self.forget(stand.name)
            found = None
        if found is None and wanted and stand.extractor is not None:
            found = self._extractors[stand.name] = _Extractor(stand)
        if found is None or found.moving or bool(found.key) == wanted or (wanted and self._hands.clock.monotonic() < found.again_at):
            return
        found.moving = True
        self._hands.pool.spawn(self._load(found) if wanted else self._unload(found))

    def forget(self, model: str) -> None:
        """The model is served no longer, or by another version."""
        found = self._extractors.pop(model, None)
        if found is not None:
            self._hands.pool.spawn(self._unload(found))

    async def features(self, stand: Stand, request: Request) -> tuple[Mapping[str, Array], float]:
        """The features of a request, and the seconds that they took.

        Raises: TheirsError (malformed family), WorldError (`not_ready`, `backlog_full`, `worker_lost`).
        """
        found = self._extractors.get(stand.name)
        if found is None or not self.ready(stand) or stand.signature is None:
            raise WorldError("not_ready", "the feature extractor is not loaded", where=stand.name, retry_after_s=1.0)
        check(request, stand.signature, stand.limit)
        pool = self._hands.pool
        if len(found.runs) >= 2 * pool.size:
            raise WorldError(
                "backlog_full", f"{len(found.runs)} requests are in the feature extractor", where=stand.name, retry_after_s=0.05
            )
        ended = asyncio.get_running_loop().create_future()
        found.runs.add(ended)
        pool.busy += 1
        started = self._hands.clock.monotonic()
        try:
            features = await self._hands.engine.run(found.key, request.inputs, ())
        finally:
            took_s = self._hands.clock.monotonic() - started
            found.runs.discard(ended)
            ended.set_result(None)
            pool.busy -= 1
            pool.worked_s += took_s
            pool.freed()
        if took_s > 0:
            found.took.observe(took_s / rows(request.inputs))
        return features, took_s

    async def _load(self, found: _Extractor) -> None:
        stand, form = found.stand, found.stand.extractor
        key = f"{stand.name}@{stand.manifest.version}:D:{next(_numbers)}"
        try:
            if form is None:
                raise TheirsError("model", "has no feature extractor")
            await self._hands.engine.load(key, form.platform, form.weights)
            await self._measure(found, key)
        except ApplianceError as error:
            found.again_at = self._hands.clock.monotonic() + RETRY_S
            self._log.warning("extractor_not_loaded", model=stand.name, reason=error.reason, what=str(error))
            await self._hands.engine.unload(key)
        else:
            if self._extractors.get(stand.name) is not found:  # forgotten meanwhile
                await self._hands.engine.unload(key)
                return
            found.key = key
            self._log.info("extractor_loaded", model=stand.name, took_ms=round(found.took.value * 1e3, 1), feature_bytes=found.size)
        finally:
            found.moving = False

    async def _measure(self, found: _Extractor, key: str) -> None:
        """Run one typical sample. Raises: TheirsError (`shape`: there is none; `model`), WorldError."""
        shapes, signature = found.stand.manifest.example_shapes, found.stand.signature
        inputs = {}
        for spec in signature.inputs if signature else ():
            shape = tuple(shapes.get(spec.name, spec.shape[1:]))
            if any(size < 1 for size in shape):
                raise TheirsError("shape", f"no typical shape of input {spec.name} is known", remedy="name it in the card's example_shapes")
            inputs[spec.name] = np.zeros((1, *shape), DTYPES[spec.datatype])
        for _ in range(WARM_RUNS):
            started = self._hands.clock.monotonic()
            features = await self._hands.engine.run(key, inputs, ())
            found.took.observe(max(self._hands.clock.monotonic() - started, 1e-6))
        found.size = sum(array.nbytes for array in features.values())

    async def _unload(self, found: _Extractor) -> None:
        key, found.key = found.key, ""
        if found.runs:
            await asyncio.wait(found.runs)
        if key:
            await self._hands.engine.unload(key)
            self._log.info("extractor_unloaded", model=found.stand.name)
        found.moving = False
