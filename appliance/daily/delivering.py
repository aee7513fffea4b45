"""Delivering: what the durable queue holds for the neighbour above goes there when there is a way, and is deleted only on its receipt.

`core.reach.deferral` decides what a failure means and `replay` how fast; the store orders. Nothing is sent while the hop is partitioned: an
attempt that cannot succeed would only wait. A receipt names what the receiver has committed, so a lost receipt costs one repetition, which the
receiver recognises by its key.
"""

import asyncio
import itertools
import random
from collections.abc import Callable, Mapping

import structlog

from appliance.contract.codec import decode, encode
from appliance.contract.deferral import Deferred, Dropped, Kind, Leased, Parcel, Receipt, Stored, Taken
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.vocabulary import LinkState
from appliance.core.reach.deferral import Failure, Policy, settle
from appliance.core.reach.replay import ReplayPace
from appliance.daily.settling import obey
from appliance.daily.taking import Taking
from appliance.ports import Clock, Link, Outbox

KINDS = (Kind.RESULT, Kind.EVENT, Kind.TELEMETRY)
"""What goes upwards; deferred requests stay and are computed."""
WINDOW = 8
"""Items on their way at once: enough to fill a round trip, few enough to be repeated cheaply."""
TICK_S = 1.0
CAPACITY_BYTES_S = 1_250_000.0
"""10 Mbit/s, until somebody measures the link; replay uses half of it (core.reach.replay)."""
PASSING = frozenset({"busy", "internal", "disk", "queue_full", "draining", "not_ready"})
"""Refusals that are true now, not for ever: the item is tried again."""


class Delivering:
    """The sender's end of the queue. `told` hears of everything that is dropped; `policies` are by class."""

    def __init__(
        self,
        link: Link,
        clock: Clock,
        outbox: Outbox,
        *,
        topic: str,
        policies: Mapping[str, Policy],
        state: Callable[[], LinkState],
        told: Callable[[Dropped], None],
        ask_timeout_s: float,
        chance: random.Random | None = None,
    ) -> None:
        self._link = link
        self._clock = clock
        self._outbox = outbox
        self._taking = Taking(outbox, KINDS, items=WINDOW, lease_s=4 * ask_timeout_s)
        self._topic = topic
        self._policies = policies
        self._state = state
        self._told = told
        self._ask_timeout_s = ask_timeout_s
        self._pace = ReplayPace(CAPACITY_BYTES_S, now=clock.monotonic())
        self._wake = asyncio.Event()
        self._chance = chance or random.Random()  # noqa: S311 - jitter, not a secret
        self._log = structlog.get_logger()
        self.delivered = 0

    async def put(self, parcel: Parcel) -> Stored:
        """Keep a parcel until the neighbour has committed it; returns after our own commit. Raises: as `Outbox.put`."""
        stored = await self._outbox.put(parcel)
        self._tell(stored.dropped)
        self._wake.set()
        return stored

    async def run(self, moved: Callable[[], None]) -> None:
        """Deliver; ends only by cancellation."""
        while True:
            moved()
            self._wake.clear()
            if not (self._open and await self._round(moved)):
                try:
                    async with asyncio.timeout(TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    @property
    def _open(self) -> bool:
        return self._link.connected and self._state() is not LinkState.PARTITIONED

    async def _round(self, moved: Callable[[], None]) -> bool:
        """Take what is due and send it; False if there was nothing, or no way."""
        taken = await self._taking.take()
        if taken is None:
            return False
        self._tell(taken.dropped)
        if not taken.items:
            return False
        receipts: dict[int, bytes | None] = {}
        async with asyncio.TaskGroup() as group:
            for leased in taken.items:
                await self._paced(leased)
                moved()
                group.create_task(self._send(leased, taken, receipts))
        return bool(receipts) and await self._settled(receipts)

    async def _settled(self, receipts: dict[int, bytes | None]) -> bool:
        """Delete what was received; False if the disk fails, and then it is sent again when its lease is over."""
        try:
            self.delivered += await self._outbox.acknowledge(receipts)
        except WorldError as error:
            self._log.warning("receipts_not_kept", count=len(receipts), reason=error.reason, what=str(error))
            return False
        return True

    async def _paced(self, leased: Leased) -> None:
        """Wait until this item leaves room for live traffic."""
        size = len(leased.payload)
        for _ in itertools.count():
            if self._pace.take(size, self._clock.monotonic()):
                return
            await asyncio.sleep(self._pace.wait_s(size, self._clock.monotonic()))

    async def _send(self, leased: Leased, taken: Taken, receipts: dict[int, bytes | None]) -> None:
        item = leased.item
        message = Deferred(
            incarnation=self._outbox.incarnation,
            seq=item.seq,
            floor=taken.floor,
            item_kind=item.kind,
            idem=item.idem,
            payload=leased.payload,
            key=item.key,
        )
        try:
            receipt = decode(await self._link.ask(self._topic, encode(message), timeout_s=self._ask_timeout_s), Receipt)
        except OursError:
            raise
        except TheirsError as error:
            await self._failed(leased, Failure.FAILED if error.reason in PASSING else Failure.REFUSED, error)
        except ApplianceError as error:
            await self._failed(leased, Failure.UNREACHED, error)
        else:
            if receipt.idem == item.idem:
                receipts[item.seq] = receipt.result
            else:
                await self._failed(leased, Failure.FAILED, TheirsError("receipt", f"names {receipt.idem[:64]!r}"))

    async def _failed(self, leased: Leased, failure: Failure, error: ApplianceError) -> None:
        """Do what the rules say with an item that was not received."""
        item = leased.item
        decided = settle(item, failure, self._policies[item.kind], self._outbox.now_s(), self._chance.random())
        try:
            self._tell(await obey(self._outbox, item, decided, error, error.reason))
        except WorldError as disk:  # its lease ends by itself, and then it is sent again
            self._log.warning("failure_not_kept", seq=item.seq, reason=disk.reason, what=str(disk))

    def _tell(self, dropped: tuple[Dropped, ...]) -> None:
        for each in dropped:
            self._log.warning("item_dropped", seq=each.seq, kind=each.kind, idem=each.idem, reason=each.reason)
            self._told(each)
