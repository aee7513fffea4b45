"""Upstream: the ways to the same models elsewhere, in the cloud and at a neighbour (port `Upstream`): a deadline for each call, a breaker for all.

Fast failure is the point: while the link is down, partitioned, or the breaker is open, nobody waits for the network at all.
What calls took is remembered for the router: the cloud's own time for each model and stage, and the round trips.
"""

import random
from collections.abc import Callable, Mapping
from typing import Literal

import structlog

from appliance.contract.errors import ApplianceError, OursError, WorldError
from appliance.contract.inference import Answer, Array, Request, Tags
from appliance.contract.remote import AskHead, Computed, pack, unpack_answer
from appliance.contract.vocabulary import LinkState, Mode
from appliance.core.reach.affinity import Place, places
from appliance.core.reach.breaker import Breaker, BreakerSettings, Permit, State, Turned
from appliance.core.serve.profile import Estimate
from appliance.ports import Clock, Link

Stage = Literal["input", "features"]
THEIR_FAULTS = frozenset({"oversized", "malformed", "missing_input", "unknown_input", "unknown_output", "datatype", "shape", "batch"})
"""What is wrong with the request itself: it says nothing against the cloud."""
HOUR_S = 3600.0
GB = 1e9
PATIENCE_S = 3.0
"""Longer than the breaker's longest backoff: within it a trial has been made."""
FRESH_S = 60.0
"""A round trip that was measured longer ago says nothing of now."""
TAIL = 2.0
"""The 95th percentile of round trips, guessed from their mean (exponential tails would have 3, a calm link 1.2)."""


class Calls:
    """Inference frames to one callee, `where` in people's words: each bounded by `deadline_s` and by the caller's time, all behind one breaker.

    `deadline_s` includes the round trip; `state` tells how the way to the callee is, `version` which one of a model this device serves.

    Attributes:
        sent_bytes: the bytes of all frames that were sent, by stage.
    """

    def __init__(
        self,
        link: Link,
        clock: Clock,
        *,
        topic: str,
        where: str,
        deadline_s: float,
        state: Callable[[], LinkState],
        version: Callable[[str], str],
        chance: random.Random | None = None,
    ) -> None:
        self._link = link
        self._clock = clock
        self._topic = topic
        self._where = where
        self._deadline_s = deadline_s
        self._state = state
        self._version = version
        self._breaker = Breaker(BreakerSettings(deadline_s=deadline_s))
        self._closed_at = clock.monotonic()
        self._chance = chance or random.Random()  # noqa: S311 - jitter, not a secret
        self._took: dict[tuple[str, str], Estimate] = {}
        self._trip = Estimate()
        self._trip_at = 0.0
        self._log = structlog.get_logger()
        self.sent_bytes: dict[Stage, int] = {"input": 0, "features": 0}

    @property
    def state(self) -> LinkState:
        """How the way is; PARTITIONED while the session is down."""
        return self._state() if self._link.connected else LinkState.PARTITIONED

    @property
    def shut(self) -> bool:
        """Whether the breaker refuses now."""
        return not self._breaker.would_permit(self._clock.monotonic())

    @property
    def open(self) -> bool:
        """Whether a call would be made now."""
        return self.state is not LinkState.PARTITIONED and not self.shut

    @property
    def stands(self) -> bool:
        """Whether the way as a whole can be relied on: the link is up, and the breaker was not open all the last `PATIENCE_S`."""
        now = self._clock.monotonic()
        if self._breaker.state is State.CLOSED:
            self._closed_at = now
        return self.state is not LinkState.PARTITIONED and now - self._closed_at < PATIENCE_S

    @property
    def rtt_s(self) -> float:
        """Round trip without the callee's own time (about the 95th percentile); 0 if none was measured lately."""
        fresh = self._trip.count and self._clock.monotonic() - self._trip_at < FRESH_S
        return TAIL * self._trip.value if fresh else 0.0

    def took_s(self, model: str, stage: Stage) -> float | None:
        """The callee's own time for one sample; None if it was never asked."""
        estimate = self._took.get((model, stage))
        return estimate.value if estimate else None

    async def call(self, request: Request, stage: Stage, tensors: Mapping[str, Array], within_s: float) -> tuple[Computed, int]:
        """One call, and the bytes that left for it.

        Raises: WorldError (`partitioned`, `deadline`, `backlog_full`), TheirsError with the callee's reason.
        """
        started = self._clock.monotonic()
        permit = self._breaker.permit(started)
        if not isinstance(permit, Permit):
            what = f"the way to the {self._where} is shut after failures"
            raise WorldError("partitioned", what, where=self._where, retry_after_s=permit.retry_after_s)
        within_s = min(within_s, self._deadline_s)
        try:
            frame = self._frame(request, stage, tensors, within_s)
            self.sent_bytes[stage] += len(frame)
            computed = unpack_answer(await self._link.ask(self._topic, frame, timeout_s=within_s, qos=0))
        except ApplianceError as error:
            raise self._failed(permit, error) from error
        except BaseException:
            self._breaker.abandoned(permit, self._clock.monotonic())
            raise
        now = self._clock.monotonic()
        took_s = computed.head.took_ms / 1e3
        self._trip.observe(max(now - started - took_s, 0.0))
        self._trip_at = now
        self._took.setdefault((request.model, stage), Estimate()).observe(took_s / rows(tensors))
        self._tell(self._breaker.succeeded(permit, now - started, now, chance=self._chance.random()))
        return computed, len(frame)

    def _frame(self, request: Request, stage: Stage, tensors: Mapping[str, Array], within_s: float) -> bytes:
        head = AskHead(
            model=request.model,
            version=request.version or self._version(request.model),
            within_ms=within_s * 1e3,
            stage=stage,
            outputs=request.outputs,
            residency=request.tags.data_residency,
            accept_degradation=request.tags.accept_degradation,
        )
        return pack(head, tensors)

    def _failed(self, permit: Permit, error: ApplianceError) -> ApplianceError:
        """Report to the breaker whose fault it was, and say it in the desk's words."""
        now = self._clock.monotonic()
        if error.reason in THEIR_FAULTS or isinstance(error, OursError):
            self._breaker.abandoned(permit, now)
            return error
        self._tell(self._breaker.failed(permit, now, chance=self._chance.random()))
        if error.reason == "timeout":
            return WorldError("deadline", f"no answer within {self._deadline_s * 1e3:.0f} ms", where=self._where, retry_after_s=1.0)
        reason = error.reason if error.reason in {"backlog_full", "deadline", "worker_lost"} else "partitioned"
        return WorldError(reason, error.what, where=error.where or self._where, remedy=error.remedy, retry_after_s=1.0)

    def _tell(self, turned: Turned | None) -> None:
        if turned is not None:
            self._log.info(f"{self._where}_route_changed", state=turned.state, why=turned.why)


class CloudRoute:
    """The cloud behind the region, on `topics.infer`; for its calls the state is that of the hop and of the region's own way up.

    Attributes:
        egress_per_gb: what a GB costs that leaves the site, in dollars; 0 until a price was heard.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.egress_per_gb = 0.0

    @property
    def stands(self) -> bool:
        """Whether the way as a whole can be relied on; a single failure does not change it."""
        return self.calls.stands

    def allows(self, tags: Tags) -> bool:
        """Whether a request with these tags may go to the cloud now."""
        return Place.CLOUD in places(tags.data_residency) and self.calls.open

    async def infer(self, request: Request, within_s: float, *, why: str = "asked the cloud") -> Answer:
        """Answer by the full model in the cloud, within both times.

        Raises: WorldError (`partitioned`, `deadline`, `backlog_full`), TheirsError with the cloud's reason.
        """
        return await self._asked(request, "input", request.inputs, within_s, why=why, spent=0.0)

    async def finish(self, request: Request, features: Mapping[str, Array], within_s: float, *, why: str, spent: float) -> Answer:
        """Have features finished by the head in the cloud; `spent` dollars went into them here. Raises: as `infer`."""
        return await self._asked(request, "features", features, within_s, why=why, spent=spent)

    async def _asked(
        self, request: Request, stage: Stage, tensors: Mapping[str, Array], within_s: float, *, why: str, spent: float
    ) -> Answer:
        if Place.CLOUD not in places(request.tags.data_residency):
            raise OursError("residency", f"data with residency {request.tags.data_residency!r} was about to leave", where=request.model)
        computed, sent = await self.calls.call(request, stage, tensors, within_s)
        head = computed.head
        cost = spent + head.dollars_per_hour * head.took_ms / 1e3 / HOUR_S + sent * self.egress_per_gb / GB
        route = "cloud" if stage == "input" else "split"
        return Answer(request.id, request.model, head.version, computed.tensors, Mode.CLOUD, why, head.confidence, route, cost)


class NeighbourRoute:
    """Another device of the region, which the region chooses (`regional.placing`), on `topics.neighbour`; everything else as `CloudRoute`."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    @property
    def stands(self) -> bool:
        """Whether the way as a whole can be relied on."""
        return self.calls.stands

    def allows(self, tags: Tags) -> bool:
        """Whether a request with these tags may go to a neighbour now."""
        return Place.NEIGHBOUR in places(tags.data_residency) and self.calls.open

    async def infer(self, request: Request, within_s: float) -> Answer:
        """Answer by whichever neighbour has room. Raises: as `Calls.call`."""
        computed, _ = await self.calls.call(request, "input", request.inputs, within_s)
        head = computed.head
        why = f"this device is full; a neighbour: {head.why}" if head.why else "this device is full"
        return Answer(
            request.id,
            request.model,
            head.version,
            computed.tensors,
            head.mode or Mode.FULL,
            why,
            head.confidence,
            "neighbour",
            head.dollars,
        )


def rows(tensors: Mapping[str, Array]) -> int:
    """How many samples these tensors are, by axis 0 of the first."""
    first = next(iter(tensors.values()), None)
    return max(1, first.shape[0]) if first is not None and first.shape else 1
