"""Upstream: the way to the same models in the cloud (port `Upstream`): a deadline for each call, a breaker for all of them.

Fast failure is the point: while the link is down, partitioned, or the breaker is open, nobody waits for the network at all.
"""

import random
from collections.abc import Callable

import structlog

from appliance.contract import topics
from appliance.contract.errors import ApplianceError, OursError, WorldError
from appliance.contract.inference import Answer, Request, Tags
from appliance.contract.remote import AskHead, Computed, pack, unpack_answer
from appliance.contract.vocabulary import LinkState, Mode
from appliance.core.reach.breaker import Breaker, BreakerSettings, Permit, State, Turned
from appliance.ports import Clock, Link

THEIR_FAULTS = frozenset({"oversized", "malformed", "missing_input", "unknown_input", "unknown_output", "datatype", "shape", "batch"})
"""What is wrong with the request itself: it says nothing against the cloud."""
HOUR_S = 3600.0
PATIENCE_S = 3.0
"""Longer than the breaker's longest backoff: within it a trial has been made."""


class CloudRoute:
    """The cloud behind the region. `deadline_s` bounds each call, round trip included; `state` tells how the hop to the region is."""

    def __init__(
        self,
        link: Link,
        clock: Clock,
        *,
        region: str,
        device: str,
        deadline_s: float,
        state: Callable[[], LinkState],
        version: Callable[[str], str],
    ) -> None:
        self._link = link
        self._clock = clock
        self._topic = topics.infer(region, device)
        self._deadline_s = deadline_s
        self._state = state
        self._version = version
        self._breaker = Breaker(BreakerSettings(deadline_s=deadline_s))
        self._closed_at = clock.monotonic()
        self._chance = random.Random()  # noqa: S311 - jitter, not a secret
        self._log = structlog.get_logger()

    @property
    def stands(self) -> bool:
        """Whether the way as a whole can be relied on: the link is up, and the breaker was not open all the last `PATIENCE_S`."""
        now = self._clock.monotonic()
        if self._breaker.state is State.CLOSED:
            self._closed_at = now
        return self._up and now - self._closed_at < PATIENCE_S

    @property
    def _up(self) -> bool:
        return self._link.connected and self._state() is not LinkState.PARTITIONED

    def allows(self, tags: Tags) -> bool:
        """Whether a request with these tags may go to the cloud now."""
        return self._up and not tags.data_residency and self._breaker.would_permit(self._clock.monotonic())

    async def infer(self, request: Request, within_s: float) -> Answer:
        """Answer by the full model in the cloud, within both times.

        Raises: WorldError (`partitioned`, `deadline`, `backlog_full`), TheirsError with the cloud's reason.
        """
        started = self._clock.monotonic()
        permit = self._breaker.permit(started)
        if not isinstance(permit, Permit):
            raise WorldError(
                "partitioned", "the way to the cloud is shut after failures", where="cloud", retry_after_s=permit.retry_after_s
            )
        within_s = min(within_s, self._deadline_s)
        version = request.version or self._version(request.model)
        try:
            ask = AskHead(model=request.model, version=version, within_ms=within_s * 1e3, outputs=request.outputs)
            frame = await self._link.ask(self._topic, pack(ask, request.inputs), timeout_s=within_s, qos=0)
            computed = unpack_answer(frame)
        except ApplianceError as error:
            raise self._failed(permit, error) from error
        except BaseException:
            self._breaker.abandoned(permit, self._clock.monotonic())
            raise
        now = self._clock.monotonic()
        self._tell(self._breaker.succeeded(permit, now - started, now, chance=self._chance.random()))
        return _answer(request, computed)

    def _failed(self, permit: Permit, error: ApplianceError) -> ApplianceError:
        """Report to the breaker whose fault it was, and say it in the desk's words."""
        now = self._clock.monotonic()
        if error.reason in THEIR_FAULTS or isinstance(error, OursError):
            self._breaker.abandoned(permit, now)
            return error
        self._tell(self._breaker.failed(permit, now, chance=self._chance.random()))
        if error.reason == "timeout":
            return WorldError("deadline", f"no answer within {self._deadline_s * 1e3:.0f} ms", where="cloud", retry_after_s=1.0)
        reason = error.reason if error.reason in {"backlog_full", "deadline", "worker_lost"} else "partitioned"
        return WorldError(reason, error.what, where=error.where or "cloud", remedy=error.remedy, retry_after_s=1.0)

    def _tell(self, turned: Turned | None) -> None:
        if turned is not None:
            self._log.info("cloud_route_changed", state=turned.state, why=turned.why)


def _answer(request: Request, computed: Computed) -> Answer:
    head = computed.head
    cost = head.dollars_per_hour * head.took_ms / 1e3 / HOUR_S
    return Answer(request.id, request.model, head.version, computed.tensors, Mode.CLOUD, "asked the cloud", head.confidence, "cloud", cost)
