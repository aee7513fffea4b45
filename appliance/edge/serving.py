"""Serving: joins the backlog and the batcher (which think) to the engine (which runs); the ingress asks it and nobody else.

A model is mounted under its name; the mounted version is one reference that is swapped between batches, so a new version takes over
without a gap and the old one is unloaded when its last batch has returned.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import structlog

from appliance.contract.admission import check
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.inference import Answer, Array, Request, Signature
from appliance.contract.models import Manifest
from appliance.contract.vocabulary import Mode, Outcome, Platform
from appliance.core.serve.backlog import Backlog, Refused
from appliance.core.serve.batching import Batcher, Dispatch, Wait
from appliance.core.serve.waitlist import Entry
from appliance.edge.tally import Tally
from appliance.ports import Clock, Engine, ModelCard

TICK_S = 1.0


@dataclass(slots=True)
class Waiting:
    """One admitted request and the future that its caller awaits."""

    request: Request
    arrived_s: float
    answer: "asyncio.Future[Answer]"


@dataclass(frozen=True, slots=True)
class Mounted:
    """One loaded version of a model."""

    key: str
    manifest: Manifest
    signature: Signature
    batchable: bool


@dataclass(slots=True)
class Stand:
    """Everything about one model name: what is mounted, who waits, what runs."""

    mounted: Mounted
    backlog: Backlog[Waiting]
    batcher: Batcher
    running: dict[str, int] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class Serving:
    """The desk behind the ingress. All times are the clock's monotonic seconds."""

    def __init__(
        self, engine: Engine, clock: Clock, tally: Tally, *, workers: int, max_batch: int, fill_wait_s: float, timeout_s: float
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._tally = tally
        self._workers = workers
        self._max_batch = max_batch
        self._fill_wait_s = fill_wait_s
        self._timeout_s = timeout_s
        self._stands: dict[str, Stand] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._log = structlog.get_logger()
        self.mode = Mode.FULL

    async def mount(self, manifest: Manifest, platform: Platform, weights: Callable[[], int]) -> None:
        """Load a version beside the one that serves, then swap; on failure the old one keeps serving.

        Raises: TheirsError (`model`), WorldError (`worker_lost`).
        """
        key = f"{manifest.model_id}@{manifest.version}"
        loaded = await self._engine.load(key, platform, weights)
        batchable = all(spec.shape[:1] == (-1,) for spec in (*loaded.signature.inputs, *loaded.signature.outputs))
        mounted = Mounted(key, manifest, loaded.signature, batchable)
        limit = min(self._max_batch, manifest.edge_constraints.max_batch_size) if batchable else 1
        stand = self._stands.get(manifest.model_id)
        if stand is None or stand.backlog.max_batch != limit:
            fresh = Stand(mounted, Backlog(limit), Batcher(fill_wait_s=self._fill_wait_s))
            self._stands[manifest.model_id] = fresh
            if stand is not None:
                self._spawn(self._retire(stand, stand.mounted.key, drain=True))
        else:
            old, stand.mounted = stand.mounted, mounted
            if old.key != key:
                self._spawn(self._retire(stand, old.key, drain=False))
        self._tally.mounted(manifest)
        self._log.info("model_mounted", model=manifest.model_id, version=manifest.version, platform=platform, max_batch=limit)

    async def _retire(self, stand: Stand, key: str, *, drain: bool) -> None:
        """Unload an old version once nothing waits for it and nothing runs on it."""
        while stand.running.get(key) or (drain and stand.backlog.waiting):
            self._pump(stand)
            await asyncio.sleep(0.05)
        await self._engine.unload(key)
        self._log.info("model_retired", key=key)

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
        return "" if self._stands else "no model has been opened yet; the log says what it waits for"

    def models(self) -> Sequence[str]:
        """The names of all mounted models."""
        return sorted(self._stands)

    def describe(self, model: str, version: str) -> ModelCard:
        """What a model takes and gives. Raises: TheirsError (`unknown_model`)."""
        stand = self._find(model, version)
        manifest = stand.mounted.manifest
        return ModelCard(
            name=model,
            versions=(manifest.version,),
            signature=stand.mounted.signature,
            ready=not self._draining,
            max_batch=stand.backlog.max_batch,
        )

    def busy(self) -> float:
        """The share (0..1) of workers that run a batch now."""
        return min(1.0, sum(sum(stand.running.values()) for stand in self._stands.values()) / self._workers)

    def versions(self) -> Mapping[str, str]:
        """The mounted version of each model."""
        return {name: stand.mounted.manifest.version for name, stand in self._stands.items()}

    async def infer(self, request: Request) -> Answer:
        """Answer one request, or say by whose fault not; returns by the request's deadline, always.

        Raises: TheirsError (malformed family, `unknown_model`), WorldError (`backlog_full`, `deadline`, `worker_lost`, `not_ready`, `draining`).
        """
        arrived = self._clock.monotonic()
        model = request.model if request.model in self._stands else "-"
        try:
            answer = await self._admitted(request, arrived)
        except ApplianceError as error:
            self._tally.failed(model, _outcome(error))
            raise
        except asyncio.CancelledError:
            self._tally.failed(model, Outcome.CANCELLED)
            raise
        self._tally.answered(model, self.mode, self._clock.monotonic() - arrived)
        return answer

    async def _admitted(self, request: Request, arrived: float) -> Answer:
        if self._draining:
            raise WorldError("draining", "the daemon is stopping", remedy="ask again in a few seconds", retry_after_s=2.0)
        stand = self._find(request.model, request.version)
        check(request, stand.mounted.signature, stand.backlog.max_batch)
        waiting = Waiting(request, arrived, asyncio.get_running_loop().create_future())
        limit_s = min(request.tags.timeout_s or self._timeout_s, self._timeout_s)
        first = next(iter(request.inputs.values()))
        offered = stand.backlog.offer(
            waiting,
            arrived,
            deadline=arrived + limit_s,
            size=first.shape[0] if stand.mounted.batchable else 1,
            shape=_shape(request),
            priority=request.tags.priority,
        )
        if isinstance(offered, Refused):
            raise _refusal(offered.reason, offered.retry_after_s)
        for entry in offered.displaced:
            _fail(entry, _refusal(Outcome.BACKLOG_FULL, stand.backlog.retry_after_s(arrived)))
        self._pump(stand)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            stand.backlog.cancel(offered.ticket)
            raise

    def _find(self, model: str, version: str) -> Stand:
        stand = self._stands.get(model)
        if stand is None:
            if not self._stands:
                raise WorldError("not_ready", self.why_not_ready(), where=model, retry_after_s=1.0)
            known = ", ".join(self.models())
            raise TheirsError("unknown_model", f"no model is called {model!r}", remedy=f"models here: {known}")
        present = stand.mounted.manifest.version
        if version and version != present:
            raise TheirsError("unknown_model", f"version {version!r} is not here", where=model, remedy=f"the version here is {present!r}")
        return stand

    def _pump(self, stand: Stand) -> None:
        """Expire, dispatch, and set the next timer: called on every arrival, return and timer."""
        now = self._clock.monotonic()
        for entry in stand.backlog.expire(now):
            _fail(entry, _refusal(Outcome.DEADLINE, None))
        until = inf
        while True:
            idle = self._workers - sum(stand.running.values())
            decision = stand.batcher.next_batch(stand.backlog, now, idle)
            if not isinstance(decision, Dispatch):
                until = decision.until if isinstance(decision, Wait) else inf
                break
            mounted = stand.mounted
            stand.running[mounted.key] = stand.running.get(mounted.key, 0) + 1
            self._spawn(self._run(stand, mounted, decision))
        self._set_timer(stand, min(until, stand.backlog.deadline() or inf), now)

    def _set_timer(self, stand: Stand, at: float, now: float) -> None:
        if stand.timer is not None:
            stand.timer.cancel()
            stand.timer = None
        if at != inf:
            stand.timer = asyncio.get_running_loop().call_later(max(at - now, 0.0), self._pump, stand)

    async def _run(self, stand: Stand, mounted: Mounted, batch: Dispatch[Waiting]) -> None:
        """Run one batch and tell every caller, whatever happens."""
        requests = [entry.item.request for entry in batch.entries]
        try:
            outputs = await self._engine.run(mounted.key, _join(requests, batch.pad_to - batch.samples), ())
        except ApplianceError as error:
            for entry in batch.entries:
                _fail(entry, error)
        else:
            self._tally.batch(requests[0].model, batch.samples / stand.backlog.max_batch)
            self._tell(mounted, batch, outputs)
        finally:
            stand.backlog.done(batch.number)
            stand.running[mounted.key] -= 1
            for entry in batch.entries:
                _fail(entry, WorldError("internal", "the batch ended without an answer"))
            self._pump(stand)

    def _tell(self, mounted: Mounted, batch: Dispatch[Waiting], outputs: Mapping[str, Array]) -> None:
        start = 0
        for entry in batch.entries:
            request, stop = entry.item.request, start + entry.size
            wanted = request.outputs or tuple(outputs)
            parts = {name: outputs[name][start:stop] if mounted.batchable else outputs[name] for name in wanted}
            start = stop
            if not entry.item.answer.done():
                entry.item.answer.set_result(Answer(request.id, request.model, mounted.manifest.version, parts, self.mode))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self, moved: Callable[[], None]) -> None:
        """Tick: expire what a lost timer might have left, and prove that this loop moves; ends only by cancellation."""
        while True:
            moved()
            for stand in tuple(self._stands.values()):
                self._pump(stand)
            await asyncio.sleep(TICK_S)

    async def drain(self, within_s: float) -> None:
        """Take nothing new, answer what was admitted, and return when that is done or the time is over."""
        self._draining = True
        deadline = self._clock.monotonic() + within_s
        while any(len(stand.backlog) or any(stand.running.values()) for stand in self._stands.values()):
            if self._clock.monotonic() >= deadline:
                break
            await asyncio.sleep(0.01)
        for stand in self._stands.values():
            if stand.timer is not None:
                stand.timer.cancel()


def _shape(request: Request) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return tuple(sorted((name, array.shape[1:], array.dtype.str) for name, array in request.inputs.items()))


def _join(requests: Sequence[Request], padding: int) -> Mapping[str, Array]:
    """Stack the inputs of equal shape along the batch axis; padding repeats the first request's last sample."""
    if len(requests) == 1 and not padding:
        return requests[0].inputs
    joined = {}
    for name, first in requests[0].inputs.items():
        parts = [request.inputs[name] for request in requests] + [first[-1:]] * padding
        joined[name] = np.concatenate(parts)
    return joined


def _fail(entry: Entry[Waiting], error: ApplianceError) -> None:
    if not entry.item.answer.done():
        entry.item.answer.set_exception(error)


def _refusal(reason: Outcome, retry_after_s: float | None) -> WorldError:
    if reason is Outcome.DEADLINE:
        return WorldError(
            "deadline", "this request cannot be answered in time", remedy="allow more time or ask less", retry_after_s=retry_after_s
        )
    return WorldError(
        "backlog_full", "twice the largest batch is waiting already", remedy="ask again later", retry_after_s=retry_after_s or 0.05
    )


def _outcome(error: ApplianceError) -> Outcome:
    try:
        return Outcome(error.reason)
    except ValueError:
        return Outcome.MALFORMED if isinstance(error, TheirsError) else Outcome.INTERNAL
