"""Serving: the desk behind the ingress. It finds the model, the mode and the place for a request, and tells every caller.

Where routing finds a better place beyond this device, it is tried first. Where this device cannot answer in time, a request goes on by its tags: to a lesser mode
that is loaded, to a neighbour, to the cloud, to an older answer.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import structlog

from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.inference import Answer, Promise, Request
from appliance.contract.models import Manifest
from appliance.contract.outcomes import refused
from appliance.contract.vocabulary import Mode, Outcome
from appliance.core.reach.affinity import Place
from appliance.core.reach.routing import Decision
from appliance.core.serve.fallback import Fallback
from appliance.edge.lane import Hands, Lane
from appliance.edge.routing import ANYWHERE, Routing
from appliance.edge.stand import Form, Policy, Stand
from appliance.ports import ModelCard, Upstream

TICK_S = 1.0
MOVABLE = frozenset({"backlog_full", "deadline", "degraded", "worker_lost"})
"""Refusals after which another place may still answer."""
DEFERRABLE = MOVABLE | {"not_ready", "partitioned", "unknown_model"}
"""Refusals after which a promise makes sense: what is missing (room, a version, the network) may come."""
OVERLOADED = frozenset({"backlog_full", "deadline"})
"""Refusals of this device's own queue, after which a neighbour is asked."""
BEYOND = frozenset({Place.SPLIT, Place.CLOUD})
SLO_STRETCH = 1.5
"""An answer may take so many times the SLO that a caller named, where it set no time-out (issue 5: EDGE_CONSTRAINED)."""


class Serving:
    """All models of this device. All times are the clock's monotonic seconds; `timeout_s` is the wall for a request that names none.

    Set `hint` to say, where there is no model, what trust waits for.
    """

    def __init__(
        self,
        hands: Hands,
        policy: Policy,
        *,
        timeout_s: float,
        stale_bytes: int = 0,
        upstream: Upstream | None = None,
        routing: Routing | None = None,
        neighbour: Upstream | None = None,
        promise: Callable[[Request, ApplianceError], Awaitable[Promise]] | None = None,
    ) -> None:
        self._hands = hands
        self._policy = policy
        self._timeout_s = timeout_s
        self._upstream = upstream
        self._routing = routing
        self._neighbour = neighbour
        self._promise = promise
        self._stale: Fallback[Answer] = Fallback(stale_bytes)
        self._stands: dict[str, Stand] = {}
        self._shelved: dict[str, tuple[Manifest, Mapping[Mode, Form]]] = {}
        self._draining = False
        self._used = (hands.clock.monotonic(), 0.0)
        self._log = structlog.get_logger()
        self.hint: Callable[[], str] = lambda: ""

    @property
    def stands(self) -> Sequence[Stand]:
        """Every model that is served."""
        return tuple(self._stands.values())

    @property
    def mode(self) -> Mode:
        """The least mode of all models."""
        return max((stand.mode for stand in self._stands.values()), default=Mode.FULL)

    async def mount(self, manifest: Manifest, forms: Mapping[Mode, Form]) -> None:
        """Load a version beside the one that serves, then swap; on failure the old one keeps serving.

        Raises: TheirsError (`model`), WorldError (`worker_lost`, `memory`).
        """
        stand = Stand(manifest, forms, self._hands, self._policy, cloud=self._upstream is not None)
        await stand.open(stand.mode, thorough=True)
        before = self._stands.get(manifest.model_id)
        self._stands[manifest.model_id] = stand
        self._shelved[manifest.model_id] = (manifest, forms)
        self._stale.clear()
        if before is not None:
            before.retire()
        self._hands.tally.mounted(manifest)
        try:
            await stand.ready_standby()
        except ApplianceError as error:  # a comfort, not a condition
            self._log.warning("standby_not_loaded", model=stand.name, reason=error.reason, what=str(error))

    async def load(self, model: str) -> None:
        """Serve a model again that was unloaded, or load it anew. Raises: TheirsError (`unknown_model`, `model`), WorldError."""
        known = self._shelved.get(model)
        if known is None:
            raise TheirsError("unknown_model", f"no model {model!r} was released to this device", remedy="publish it in the cloud")
        await self.mount(*known)

    async def unload(self, model: str) -> None:
        """Stop serving a model until `load` or its next release. Raises: TheirsError (`unknown_model`)."""
        self._find(model, "")
        self._stands.pop(model).retire()
        self._log.info("model_unloaded", model=model)

    def live(self) -> bool:
        """Whether the process can answer at all."""
        return True

    def ready(self) -> bool:
        """Whether at least one model is mounted and requests are taken."""
        return bool(self._stands) and not self._draining

    def why_not_ready(self) -> str:
        """One line for a person who wonders."""
        if self._draining:
            return "the daemon is stopping"
        return "" if self._stands else self.hint() or "no model has been opened yet; the log says what it waits for"

    def models(self) -> Sequence[str]:
        """The names of all models that are served."""
        return sorted(self._stands)

    def describe(self, model: str, version: str) -> ModelCard:
        """What a model takes and gives. Raises: TheirsError (`unknown_model`)."""
        stand = self._find(model, version)
        if stand.signature is None:
            raise OursError("stand", f"{model} is served, and was never opened")
        versions = (stand.manifest.version,)
        return ModelCard(name=model, versions=versions, signature=stand.signature, ready=not self._draining, max_batch=stand.limit)

    def busy(self) -> float:
        """The share (0..1) of workers that run a batch now."""
        pool = self._hands.pool
        return min(1.0, pool.busy / pool.size)

    def utilisation(self) -> float:
        """The share (0..1) of the workers' time that batches took since the last call."""
        pool, now = self._hands.pool, self._hands.clock.monotonic()
        (then, before), self._used = self._used, (now, pool.worked_s)
        return min(1.0, (pool.worked_s - before) / ((now - then) * pool.size)) if now > then else 0.0

    def roomy(self) -> bool:
        """Whether every queue is short: work that can wait would take nobody's place."""
        return all(lane.backlog.waiting <= lane.backlog.max_batch // 2 for lane in self._lanes())

    def profiles(self) -> Mapping[str, Sequence[str]]:
        """How long batches of each model take here, in words."""
        return {name: stand.profile.explain() for name, stand in self._stands.items() if stand.profile}

    def capacity(self) -> dict[str, float]:
        """What can be answered of each model here now, in samples a second; 0 in mode D, nothing where nothing is known."""
        speeds = {name: 0.0 if stand.mode is Mode.CLOUD else stand.speed() for name, stand in self._stands.items()}
        return {name: speed if isinstance(speed, float) else speed.per_s for name, speed in speeds.items() if speed is not None}

    def versions(self) -> Mapping[str, str]:
        """The mounted version of each model."""
        return {name: stand.manifest.version for name, stand in self._stands.items()}

    async def infer(self, request: Request) -> Answer | Promise:
        """Answer one request, or promise to where its tags accept that, or say by whose fault not; returns by the request's deadline.

        Raises: as `answer`; and what `promise` raises.
        """
        try:
            return await self.answer(request)
        except ApplianceError as error:
            if self._promise is None or not request.tags.accept_deferral or error.reason not in DEFERRABLE:
                raise
            promised = await self._promise(request, error)
            self._log.debug("promised", model=request.model, reason=error.reason)
            return promised

    async def answer(self, request: Request) -> Answer:
        """Answer one request, or say by whose fault not; returns by the request's deadline, always.

        Raises: TheirsError (malformed family, `unknown_model`),
        WorldError (`backlog_full`, `deadline`, `degraded`, `worker_lost`, `not_ready`, `draining`).
        """
        arrived = self._hands.clock.monotonic()
        model = request.model if request.model in self._stands else "-"
        try:
            answer = await self._answered(request, arrived)
        except ApplianceError as error:
            self._hands.tally.failed(model, refused(error))
            raise
        except asyncio.CancelledError:
            self._hands.tally.failed(model, Outcome.CANCELLED)
            raise
        self._hands.tally.answered(model, answer.mode, self._hands.clock.monotonic() - arrived)
        return answer

    async def _answered(self, request: Request, arrived: float) -> Answer:
        if self._draining:
            raise WorldError("draining", "the daemon is stopping", remedy="ask again in a few seconds", retry_after_s=2.0)
        stand = self._find(request.model, request.version)
        stand.offered += 1
        if not request.tags.accept_stale:
            return await self._fresh(stand, request, arrived)
        key = _key(request)
        try:
            answer = await self._fresh(stand, request, arrived)
        except WorldError:
            old = self._stale.find(key, self._hands.clock.monotonic())
            if old is None:
                raise
            kept = old.answer
            worth = None if kept.confidence is None else old.confidence  # what was never measured is not claimed of an old answer either
            return Answer(request.id, kept.model, kept.version, kept.outputs, kept.mode, "no fresh answer", worth, "stale", 0.0, old.age_s)
        size = sum(array.nbytes for array in answer.outputs.values())
        confidence = 1.0 if answer.confidence is None else answer.confidence
        self._stale.keep(key, answer, size, confidence, self._hands.clock.monotonic())
        return answer

    async def _fresh(self, stand: Stand, request: Request, arrived: float) -> Answer:
        """Answer where routing says, or here, or go on to where that is allowed."""
        tags, routing, places = request.tags, self._routing, ANYWHERE
        wall_s = tags.timeout_s or (tags.slo_s * SLO_STRETCH if tags.slo_s else self._timeout_s)
        deadline = arrived + min(wall_s, self._timeout_s)
        if routing is not None:
            chosen = routing.choose(stand, request)
            answer = await self._taken(routing, chosen, stand, request, deadline) if chosen is not None else None
            if answer is not None:
                return answer
            places = ANYWHERE if tags.max_cost is None else routing.affordable(stand, request)
            places = places if chosen is None else places - BEYOND
        failed: ApplianceError | None = None
        for lane in stand.places(tags) if Place.EDGE in places else ():
            try:
                return await lane.infer(request, arrived, deadline)
            except WorldError as error:
                failed = error
                if error.reason not in MOVABLE:
                    raise
        stand.refused += failed is not None and failed.reason == "backlog_full"
        return await self._elsewhere(request, deadline, failed or (_lesser(stand) if Place.EDGE in places else _costly(request)), places)

    async def _taken(self, routing: Routing, chosen: Decision, stand: Stand, request: Request, deadline: float) -> Answer | None:
        """The answer of the chosen route; None if it failed, and this device should go on by itself."""
        try:
            return await routing.take(chosen, stand, request, deadline - self._hands.clock.monotonic())
        except (TheirsError, WorldError) as error:
            self._log.debug("route_failed", model=stand.name, route=chosen.route, reason=error.reason)
            return None

    async def _elsewhere(self, request: Request, deadline: float, failed: ApplianceError, places: Collection[Place]) -> Answer:
        """Go on to a neighbour where this device is full, then to the cloud; `failed` is why it could not be answered here."""
        tags, neighbour, upstream = request.tags, self._neighbour, self._upstream
        left = deadline - self._hands.clock.monotonic()
        full = failed.reason in OVERLOADED and Place.NEIGHBOUR in places
        if neighbour is not None and full and left > 0 and neighbour.allows(tags):
            try:
                return await neighbour.infer(request, left)
            except (TheirsError, WorldError) as error:
                self._log.debug("neighbour_failed", model=request.model, reason=error.reason)
            left = deadline - self._hands.clock.monotonic()
        if upstream is not None and left > 0 and not BEYOND.isdisjoint(places) and upstream.allows(tags):
            return await upstream.infer(request, left)
        raise failed

    def _find(self, model: str, version: str) -> Stand:
        stand = self._stands.get(model)
        if stand is None:
            if not self._stands:
                raise WorldError("not_ready", self.why_not_ready(), where=model, retry_after_s=1.0)
            known = ", ".join(self.models())
            raise TheirsError("unknown_model", f"no model is called {model!r}", remedy=f"models here: {known}")
        present = stand.manifest.version
        if version and version != present:
            raise TheirsError("unknown_model", f"version {version!r} is not here", where=model, remedy=f"the version here is {present!r}")
        return stand

    async def run(self, moved: Callable[[], None]) -> None:
        """Tick: expire what a lost timer might have left, and prove that this loop moves; ends only by cancellation."""
        while True:
            moved()
            for lane in self._lanes():
                lane.pump()
            await asyncio.sleep(TICK_S)

    async def drain(self, within_s: float) -> None:
        """Take nothing new, answer what was admitted, and return when that is done or the time is over."""
        self._draining = True
        deadline = self._hands.clock.monotonic() + within_s
        while not all(lane.idle for lane in self._lanes()):
            if self._hands.clock.monotonic() >= deadline:
                break
            await asyncio.sleep(0.01)
        for lane in self._lanes():
            lane.close()

    def _lanes(self) -> list[Lane]:
        return list(self._hands.pool.lanes)


def _key(request: Request) -> bytes:
    """The hash of model and inputs under which an answer is kept for callers who accept old ones."""
    hashed = hashlib.sha256(repr((request.model, request.version, request.outputs)).encode())
    for name, array in sorted(request.inputs.items()):
        hashed.update(repr((name, array.shape, array.dtype.str)).encode())
        hashed.update(array.tobytes())
    return hashed.digest()


def _lesser(stand: Stand) -> WorldError:
    """Why nobody here may answer: the mode is less than the caller accepts, or there is only the cloud, and no way to it."""
    if stand.mode is Mode.CLOUD:
        return WorldError(
            "degraded", f"{stand.name} is left to the cloud ({stand.why}), and the cloud cannot be reached", retry_after_s=1.0
        )
    what = f"{stand.name} is served in mode {stand.mode} now ({stand.why})"
    return WorldError("degraded", what, remedy="accept degradation, or ask later", retry_after_s=5.0)


def _costly(request: Request) -> WorldError:
    """Nothing that is within the caller's limit can answer now."""
    what = f"no place answers for {request.tags.max_cost} dollars at most now"
    return WorldError("degraded", what, where=request.model, remedy="allow more, or ask later", retry_after_s=30.0)
