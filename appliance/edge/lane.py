"""A lane: one loaded form of a model (a version, in one mode), who waits for it and what runs on it.

All lanes of a device share its workers. A worker that becomes free goes to the lane whose head ranks first, so no model starves another.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Any

import numpy as np

from appliance.contract.admission import check
from appliance.contract.errors import ApplianceError, OursError, WorldError
from appliance.contract.inference import DTYPES, Answer, Array, Request, Signature, TensorSpec
from appliance.contract.models import Manifest
from appliance.contract.vocabulary import Mode, Outcome
from appliance.core.serve.backlog import Backlog, Refused
from appliance.core.serve.batching import Batcher, Dispatch, Wait
from appliance.core.serve.profile import Profile
from appliance.core.serve.thermal import ThermalLimit
from appliance.core.serve.waitlist import Entry
from appliance.edge.tally import Tally
from appliance.ports import Clock, Engine

WARM_RUNS = 3
SLO_SHARE = 0.85
"""Admission aims below the SLO: at all of it, half of what is admitted last is late (measured at 120 % load: p99 178 ms for an SLO of 150)."""
HELD_MOST = 256
"""Refusals that may be kept back at a time; each holds its request's body."""
LEAST_S = 1e-6
"""A timer that is nearer than two clocks agree on would ring before its time, again and again (seed 753 of the simulation never ended)."""
KEPT_S = 0.005
"""A turn that is nearer is waited for here: telling the caller and hearing it again costs more (of a light model, as much as an answer)."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One admitted request and the future that its caller awaits."""

    request: Request
    answer: "asyncio.Future[Answer]"


@dataclass(frozen=True, slots=True)
class Mounted:
    """One loaded form. `signature` is what callers see: axis 0 is free where requests share a batch, even if the file fixes it.

    Attributes:
        compiled: the batch sizes that the file accepts; empty means any.
        confidence: its measured accuracy (0 to 1); None if nobody measured it.
    """

    key: str
    manifest: Manifest
    mode: Mode
    signature: Signature
    batchable: bool
    compiled: tuple[int, ...] = ()
    confidence: float | None = None


@dataclass(slots=True)
class Pool:
    """The workers, and the lanes that want them. `worked_s` is what all batches took together, `held` how many refusals are kept back."""

    size: int
    busy: int = 0
    worked_s: float = 0.0
    held: int = 0
    lanes: "dict[Lane, None]" = field(default_factory=dict)
    tasks: "set[asyncio.Task[None]]" = field(default_factory=set)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it, and keep it alive until it is done."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def freed(self) -> None:
        """Offer a free worker to the lanes, best rank first."""
        if len(self.lanes) == 1:
            next(iter(self.lanes)).pump()
            return
        for lane in sorted(self.lanes, key=_rank):
            lane.pump()


@dataclass(frozen=True, slots=True)
class Hands:
    """What every lane works with. `slo_s` is how soon an answer should come: batches are sized for it."""

    engine: Engine
    clock: Clock
    tally: Tally
    pool: Pool
    slo_s: float
    fill_wait_s: float


class Lane:
    """The waiting and running requests of one loaded form. `why` says, in each answer, why this mode answers, `here` why this device does.

    `cost`: dollars for one sample; None where nobody prices it.
    """

    def __init__(self, mounted: Mounted, hands: Hands, *, limit: int, profile: Profile, why: str) -> None:
        self.mounted = mounted
        self.why = why
        self.here = ""
        self.cost: float | None = None
        self.running = 0
        self.backlog: Backlog[Waiting] = Backlog(limit)
        self.thermal = ThermalLimit(limit, hands.slo_s / 2)
        self._batcher = Batcher(mounted.compiled, fill_wait_s=hands.fill_wait_s)
        self._hands = hands
        self._profile = profile
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = inf
        self._gathering = False
        self._slo_s = inf
        self._repace()
        hands.pool.lanes[self] = None

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nothing runs."""
        return not self.running and not self.backlog.waiting

    async def infer(self, request: Request, arrived: float, deadline: float, *, held: bool = False) -> Answer:
        """Answer one request by its deadline, or refuse it at once; `held`: it was kept back once already.

        A caller that names no time is refused where the device's SLO would be missed, unless the model alone takes more than half of it.

        Raises: TheirsError (malformed family), WorldError (`backlog_full`, `deadline`, `worker_lost`).
        """
        check(request, self.mounted.signature, self.backlog.max_batch)
        waiting = Waiting(request, asyncio.get_running_loop().create_future())
        first = next(iter(request.inputs.values()))
        offered = self.backlog.offer(
            waiting,
            arrived,
            deadline=deadline,
            slo=inf if request.tags.timeout_s else arrived + self._slo_s,
            size=first.shape[0] if self.mounted.batchable else 1,
            shape=tuple([request.inputs[spec.name].shape[1:] for spec in self.mounted.signature.inputs]),
            priority=request.tags.priority,
            caller=request.caller,
        )
        if isinstance(offered, Refused):
            after_s = inf if offered.retry_after_s is None else offered.retry_after_s
            if (offered.hold or after_s <= KEPT_S) and not held and self._hands.pool.held < HELD_MOST:
                return await self._later(request, deadline, after_s)
            raise refusal(offered.reason, offered.retry_after_s)
        for entry in offered.displaced:
            _fail(entry, refusal(Outcome.BACKLOG_FULL, self.backlog.retry_after_s(arrived)))
        self._gather()
        timer = self._alarm(waiting, deadline) if request.tags.timeout_s else None
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self.backlog.cancel(offered.ticket)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _alarm(self, waiting: Waiting, deadline: float) -> asyncio.TimerHandle:
        """Tell a caller who named a time when it is over, also while its batch runs: the batch goes on for the others."""

        def over() -> None:
            if not waiting.answer.done():
                waiting.answer.set_exception(refusal(Outcome.DEADLINE, None))

        return asyncio.get_running_loop().call_later(max(0.0, deadline - self._hands.clock.monotonic()), over)

    async def _later(self, request: Request, deadline: float, after_s: float) -> Answer:
        """Keep a caller back who is deaf to refusals, or whose turn is near, until then or until its time is over; then treat it like anybody."""
        pool, clock = self._hands.pool, self._hands.clock
        pool.held += 1
        try:
            await asyncio.sleep(max(0.0, min(after_s, deadline - clock.monotonic())))
        finally:
            pool.held -= 1
        return await self.infer(request, clock.monotonic(), deadline, held=True)

    def _gather(self) -> None:
        """Pump once all callers that the loop heard in this round have been admitted: microseconds later, and they share a batch.

        A whole batch need not wait for the rest of the round, which would find the places taken. Without an idle worker nothing starts
        before one returns, which pumps: until then only somebody's time can be over.
        """
        if self._hands.pool.busy >= self._hands.pool.size:
            self._ring_by(self.backlog.deadline() or inf, self._hands.clock.monotonic())
        elif self.backlog.waiting >= self.backlog.max_batch:
            self.pump()
        elif not self._gathering:
            self._gathering = True
            asyncio.get_running_loop().call_soon(self.pump)

    def pump(self) -> None:
        """Expire, dispatch, and set the next timer: called after every round of arrivals, on each return and timer."""
        self._gathering = False
        pool, now = self._hands.pool, self._hands.clock.monotonic()
        for entry in self.backlog.expire(now):
            _fail(entry, refusal(Outcome.DEADLINE, None))
        until = inf
        self._batcher.limit = self.thermal.limit
        while True:
            decision = self._batcher.next_batch(self.backlog, now, pool.size - pool.busy)
            if not isinstance(decision, Dispatch):
                until = decision.until if isinstance(decision, Wait) else inf
                break
            self._start(decision)
        self._ring_by(min(until, self.backlog.deadline() or inf), now)

    async def warm(self, shapes: Mapping[str, Sequence[int]], *, thorough: bool) -> None:
        """Run synthetic samples before anybody waits, so that the first caller pays for nothing and the profile rests on measurement.

        `shapes` are of one sample by input, where the model leaves more than the batch free; what is still free then is not run.
        Raises: TheirsError (`model`), WorldError.
        """
        sizes = self._profile.warmup_batches() if thorough else self._profile.warmup_batches()[:1]
        signature = self.mounted.signature
        shapes = {spec.name: shapes.get(spec.name, spec.shape[1:]) for spec in signature.inputs}
        for size in WARM_RUNS * sizes if self._fits(shapes) else ():  # in turns: a bad moment of the machine is no one size's
            inputs = {spec.name: _zeros(spec, (size, *shapes[spec.name])) for spec in signature.inputs}
            started = self._hands.clock.monotonic()
            await self._hands.engine.run(self.mounted.key, inputs, ())
            self._learn(size, started)
        self._repace()

    async def retire(self) -> None:
        """Answer what was admitted, then give the memory back. Raises: nothing that stops the caller."""
        while not self.idle:
            self.pump()
            await asyncio.sleep(0.02)
        self.close()
        await self._hands.engine.unload(self.mounted.key)

    def close(self) -> None:
        """Take no worker any more."""
        self._hands.pool.lanes.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        inputs = self.mounted.signature.inputs
        return self.mounted.batchable and all(_fit(shapes[spec.name], spec.shape[1:]) for spec in inputs)

    def _ring_by(self, at: float, now: float) -> None:
        """Pump at `at`; a timer that rings earlier stays, and sets the next one: most requests cost no timer."""
        if self._timer is not None:
            if self._rings_at <= at:
                return
            self._timer.cancel()
            self._timer = None
        if at != inf:
            self._rings_at = at
            self._timer = asyncio.get_running_loop().call_later(max(at - now, LEAST_S), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.pump()

    def _start(self, batch: Dispatch[Waiting]) -> None:
        """Give one batch to the engine. Nobody awaits it: a task for each would cost a round of the loop at either end."""
        requests = [entry.item.request for entry in batch.entries]
        started = self._hands.clock.monotonic()
        self.running += 1
        self._hands.pool.busy += 1
        work: asyncio.Future[Mapping[str, Array]]
        try:
            joined = _join(requests, batch.pad_to - batch.samples)
            work = asyncio.ensure_future(self._hands.engine.run(self.mounted.key, joined, ()))
        except (ApplianceError, MemoryError) as error:
            work = asyncio.get_running_loop().create_future()
            work.set_exception(error)
        work.add_done_callback(partial(self._ran, batch, started))

    def _ran(self, batch: Dispatch[Waiting], started: float, work: asyncio.Future[Mapping[str, Array]]) -> None:
        """Tell every caller of a batch, whatever happened."""
        pool = self._hands.pool
        try:
            outputs = work.result()
        except ApplianceError as error:
            for entry in batch.entries:
                _fail(entry, error)
        except asyncio.CancelledError:  # the daemon ends while a child is away
            pass
        else:
            self._learn(batch.pad_to, started)
            self._hands.tally.batch(self.mounted.manifest.model_id, batch.samples / self.backlog.max_batch)
            self._tell(batch, outputs)
        finally:
            self.backlog.done(batch.number)
            pool.worked_s += self._hands.clock.monotonic() - started
            self.running -= 1
            pool.busy -= 1
            for entry in batch.entries:
                if not entry.item.answer.done():
                    _fail(entry, OursError("internal", "the batch ended without an answer"))
            pool.freed()

    def _learn(self, samples: int, started: float) -> None:
        """Take a batch's time into the profile and the thermal limit."""
        now = self._hands.clock.monotonic()
        self.thermal.ran(samples, started, now)
        if now > started and self._profile.observe(self.mounted.mode, samples, now - started):
            self._repace()

    def _repace(self) -> None:
        slo_s = self._hands.slo_s
        pace = self.backlog.pace = self._profile.pace(self.mounted.mode, slo_s, self._hands.pool.size)
        self._slo_s = slo_s * SLO_SHARE if pace is not None and pace.seconds(1) <= slo_s / 2 else inf

    def _tell(self, batch: Dispatch[Waiting], outputs: Mapping[str, Array]) -> None:
        start, mounted, cost = 0, self.mounted, self.cost
        why = f"{self.why}; {self.here}" if self.here else self.why
        for entry in batch.entries:
            request, stop = entry.item.request, start + entry.size
            wanted = request.outputs or tuple(outputs)
            parts = {name: outputs[name][start:stop] if mounted.batchable else outputs[name] for name in wanted}
            start = stop
            if not entry.item.answer.done():
                spent = None if cost is None else cost * entry.size
                entry.item.answer.set_result(
                    Answer(request.id, request.model, mounted.manifest.version, parts, mounted.mode, why, mounted.confidence, "edge", spent)
                )


def served(signature: Signature) -> tuple[Signature, bool, tuple[int, ...]]:
    """What callers may send of a loaded model: its signature, whether requests share a batch, and the batch sizes it was compiled for.

    A file that fixes axis 0 of everything to one number above 1 takes any smaller batch here: it is filled up (`Batcher`, rule 5).
    """
    tensors = (*signature.inputs, *signature.outputs)
    firsts = {spec.shape[:1] for spec in tensors}
    if firsts == {(-1,)}:
        return signature, True, ()
    if len(firsts) == 1 and (only := next(iter(firsts))) and only[0] > 1:
        inputs, outputs = tuple(map(_free, signature.inputs)), tuple(map(_free, signature.outputs))
        return replace(signature, inputs=inputs, outputs=outputs), True, (only[0],)
    return signature, False, ()


def refusal(reason: Outcome, retry_after_s: float | None) -> WorldError:
    """A refusal of the backlog, in an operator's words."""
    if reason is Outcome.DEADLINE:
        return WorldError(
            "deadline", "this request cannot be answered in time", remedy="allow more time or ask less", retry_after_s=retry_after_s
        )
    return WorldError(
        "backlog_full", "twice the largest batch is waiting already", remedy="ask again later", retry_after_s=retry_after_s or 0.05
    )


def _free(spec: TensorSpec) -> TensorSpec:
    return replace(spec, shape=(-1, *spec.shape[1:]))


def _rank(lane: Lane) -> float:
    head = lane.backlog.head()
    return inf if head is None else head.rank


def _fit(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a concrete shape is one that the model takes."""
    return len(shape) == len(wanted) and all(seen > 0 and want in {-1, seen} for seen, want in zip(shape, wanted, strict=True))


def _zeros(spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape, DTYPES[spec.datatype])


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
