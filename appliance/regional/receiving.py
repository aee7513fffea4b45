"""Receiving: what devices had promised to deliver. Committed here first, then acknowledged, then given its effect, exactly once.

The effect of an event or of telemetry is a record in the region's log and the gauges of `Gathering`; a receipt never waits for it. A region that dies
between a record and its commit writes the record again, with the same `number`: who reads the log counts each number once.
"""

import asyncio
from collections.abc import Callable

import structlog

from appliance.contract.codec import decode, encode
from appliance.contract.deferral import Accepted, Deferred, Kind, Receipt
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.vitals import Event
from appliance.ports import Inbound, Inbox, Link

TICK_S = 1.0
BATCH = 64


class Receiving:
    """The receiver's end of every device's queue."""

    def __init__(self, link: Link, inbox: Inbox, *, region: str) -> None:
        self._inbox = inbox
        self._arrived = asyncio.Event()
        self._log = structlog.get_logger()
        self._given = 0
        self.accepted = self.repeated = 0
        link.serve(f"v1/{region}/d/+/up/ask/deliver", self._deliver)

    async def _deliver(self, inbound: Inbound) -> bytes:
        message = decode(inbound.payload, Deferred)
        device = inbound.topic.split("/")[3]
        fresh = await self._inbox.accept(device, message)
        self.accepted += fresh
        self.repeated += not fresh
        self._arrived.set()
        return encode(Receipt(idem=message.idem, duplicate=not fresh))

    async def run(self, moved: Callable[[], None]) -> None:
        """Give effect to what was accepted, in order; ends only by cancellation."""
        while True:
            moved()
            self._arrived.clear()
            try:
                pending = await self._inbox.pending(limit=BATCH)
                for item in pending:
                    if item.number > self._given:  # else its commit failed, its effect did not
                        self._apply(item)
                        self._given = item.number
                if pending:
                    await self._inbox.applied(pending[-1].number)
                    continue
            except WorldError as error:
                self._log.warning("inbox_not_read", reason=error.reason, what=str(error))
            try:
                async with asyncio.timeout(TICK_S):
                    await self._arrived.wait()
            except TimeoutError:
                continue

    def _apply(self, item: Accepted) -> None:
        if item.kind != Kind.EVENT:
            self._log.info(
                "item_received",
                number=item.number,
                device=item.sender,
                kind=item.kind,
                idem=item.idem,
                size_bytes=len(item.payload),
            )
            return
        try:
            event = decode(item.payload, Event)
        except TheirsError as error:
            self._log.warning("event_refused", device=item.sender, what=str(error))
            return
        data = {f"data_{name}": value for name, value in event.fields.items()}
        self._log.info("device_event", number=item.number, device=item.sender, what=event.what, **data)
