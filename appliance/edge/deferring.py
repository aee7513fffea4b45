"""Deferring: requests that nobody can answer now, for callers who accept a promise. Committed first, promised then, answered when there is room.

1. The key of a promise is the request's id where it has one: a caller who asks again is promised the same, once.
2. A deferred request is computed when the queue of its model is short, so that it never takes the place of somebody who waits.
3. A refusal for good (a malformed request, a model that no longer takes it) makes it a dead letter with the reason; everything else is tried again.
4. The answer is kept with the key, for a day (core.reach.deferral); it is fetched as often as its caller likes.
"""

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import structlog

from appliance.contract.deferral import IDEM_LIMIT, PAYLOAD_LIMIT, Dropped, Fate, Kind, Leased, Parcel, State
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.inference import Answer, Promise, Request
from appliance.contract.remote import pack_request, pack_result, unpack_request, unpack_result
from appliance.core.reach.deferral import Failure, Policy, settle
from appliance.daily.settling import obey
from appliance.daily.taking import Taking
from appliance.ports import Outbox

TICK_S = 0.5
COMMIT_S = 4.0
"""A caller waits no longer for a promise: a disk that is slower has a fault, or minutes of work before it."""
LEASE_S = 120.0
AT_ONCE = 1
LATER = frozenset({"unknown_model"})
"""Refusals that a coming release may lift: a version that is not here yet."""


class Deferring:
    """The promises of this device. `compute` answers a request now; `calm` says whether there is room for one that can wait."""

    def __init__(
        self,
        outbox: Outbox,
        policies: Mapping[str, Policy],
        *,
        compute: Callable[[Request], Awaitable[Answer]],
        calm: Callable[[], bool],
        told: Callable[[Dropped], None],
        chance: random.Random | None = None,
        tick_s: float = TICK_S,
    ) -> None:
        self._outbox = outbox
        self._taking = Taking(outbox, (Kind.REQUEST,), items=AT_ONCE, lease_s=LEASE_S)
        self._policy = policies[Kind.REQUEST]
        self._compute = compute
        self._calm = calm
        self._told = told
        self._tick_s = tick_s
        self._chance = chance or random.Random()  # noqa: S311 - jitter, not a secret
        self._log = structlog.get_logger()

    async def promise(self, request: Request, why: ApplianceError) -> Promise:
        """Keep a request and promise its answer; returns after the commit.

        Raises: TheirsError (`oversized`, `idem`), WorldError (`queue_full`, `disk_full`, `disk`): then nothing is promised. A disk that took longer
        than `COMMIT_S` may still have kept it; the same id finds it.
        """
        idem = request.id or secrets.token_hex(16)
        if len(idem) > IDEM_LIMIT:
            raise TheirsError("idem", f"an id of {len(idem)} characters, at most {IDEM_LIMIT} can be promised", where="id")
        payload = await asyncio.to_thread(pack_request, replace(request, id=idem, caller=None), PAYLOAD_LIMIT)
        try:
            async with asyncio.timeout(COMMIT_S):
                stored = await self._outbox.put(Parcel(kind=Kind.REQUEST, idem=idem, payload=payload))
        except TimeoutError as error:
            what = f"the disk has not committed the request within {COMMIT_S:g} s"
            raise WorldError("disk", what, where=idem, remedy="ask again under the same id", retry_after_s=1.0) from error
        for each in stored.dropped:
            self._told(each)
        return Promise(idem, str(why.what), why.retry_after_s or 1.0)

    async def fetch(self, promise: str) -> Answer | Promise:
        """What became of a promise. Raises: TheirsError (`unknown_promise`), WorldError (`dropped`, `disk`)."""
        fate = await self._fate(promise)
        if fate.state is State.DELIVERED and fate.result is not None:
            return unpack_result(fate.result)
        if fate.state in {State.WAITING, State.SENDING}:
            return Promise(promise, "waits for room, for its model's version, or for the network")
        what = fate.reason or f"it is {fate.state}"
        raise WorldError("dropped", f"{promise} will not be answered: {what}", remedy="ask again under another id")

    async def revive(self, promise: str) -> None:
        """Try it now, also if it was a dead letter. Raises: TheirsError (`unknown_promise`)."""
        if not await self._outbox.revive(promise):
            raise _unknown(promise)

    async def drop(self, promise: str) -> None:
        """Give it up. Raises: TheirsError (`unknown_promise`)."""
        dropped = await self._outbox.drop(promise)
        if not dropped:
            raise _unknown(promise)
        for each in dropped:
            self._told(each)

    async def run(self, moved: Callable[[], None]) -> None:
        """Compute what was promised, when there is room; ends only by cancellation."""
        while True:
            moved()
            if not (self._calm() and await self._one()):
                await asyncio.sleep(self._tick_s)

    async def _one(self) -> bool:
        """Take one request and compute it; False if there was none."""
        taken = await self._taking.take()
        if taken is None:
            return False
        for each in taken.dropped:
            self._told(each)
        try:
            for leased in taken.items:
                await self._computed(leased)
        except WorldError as error:  # its lease ends by itself, and then it is computed again
            self._log.warning("outcome_not_kept", reason=error.reason, what=str(error))
            return False
        return bool(taken.items)

    async def _computed(self, leased: Leased) -> None:
        item = leased.item
        try:
            kept = unpack_request(leased.payload)
            tags = replace(kept.tags, timeout_s=None, slo_s=None, accept_stale=False, accept_deferral=False)
            answer = await self._compute(replace(kept, tags=tags))
            result = await asyncio.to_thread(pack_result, answer, PAYLOAD_LIMIT)
        except OursError:
            raise
        except ApplianceError as error:
            await self._failed(leased, error)
            return
        await self._outbox.acknowledge({item.seq: result})
        self._log.info("promise_kept", id=item.idem, attempts=item.attempts + 1)

    async def _failed(self, leased: Leased, error: ApplianceError) -> None:
        item = leased.item
        for_good = isinstance(error, TheirsError) and error.reason not in LATER
        decided = settle(
            item, Failure.REFUSED if for_good else Failure.UNREACHED, self._policy, self._outbox.now_s(), self._chance.random()
        )
        for each in await obey(self._outbox, item, decided, error, error.what):
            self._told(each)

    async def _fate(self, promise: str) -> Fate:
        fate = await self._outbox.fate(promise)
        if fate is None:
            raise _unknown(promise)
        return fate


def _unknown(promise: str) -> TheirsError:
    return TheirsError("unknown_promise", f"nothing is known of {promise[:64]!r}, or no longer", remedy="answers are kept for a day")
