"""Placing: a device that is full may have a request answered by a neighbour; consistent hashing with bounded loads says by which.

1. Devices register capacity in their vitals, by model, in samples a second; who falls silent, or has none, gets nothing.
2. At most `IN_FLIGHT` requests are with neighbours at a time, so that they take nobody's place for long; beyond that a request is refused at once.
3. A request goes to `ATTEMPTS` neighbours at most, one after the other, within its own time, and never back to who asked.
4. What must stay on its device is refused here too. A neighbour answers by itself or not at all (`edge.lending`), so nothing travels twice.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping

import structlog

from appliance.contract import topics
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.remote import AskHead, unpack_ask
from appliance.contract.vitals import Vitals
from appliance.core.reach.affinity import Place, places
from appliance.core.reach.ring import Ring
from appliance.ports import Inbound, Link

IN_FLIGHT = 8
"""Half of what the region's link serves at a time."""
ATTEMPTS = 2
TICK_S = 1.0
MOVED = 0.1
"""A capacity that moved by less is no news: the profile of an idle device breathes."""
PER_MINUTE = 60.0
UNIT = 600
"""Ten samples a second get the points of one unit of capacity on the ring."""
PASSING = frozenset({"backlog_full", "busy", "deadline", "degraded", "draining", "not_ready", "timeout", "not_connected", "unknown_model"})
"""Refusals of one neighbour after which another may still answer."""


class Placing:
    """The rings of one region, one for each model; `present` gives the newest vitals of all devices that are not silent."""

    def __init__(self, link: Link, present: Callable[[], Mapping[str, Vitals]], *, region: str) -> None:
        self._link = link
        self._present = present
        self._region = region
        self._rings: dict[str, Ring] = {}
        self._capacity: dict[tuple[str, str], float] = {}
        self._tickets = itertools.count(1)
        self._inside = 0
        self._log = structlog.get_logger()
        link.serve(f"v1/{region}/d/+/up/ask/neighbour", self._ask)

    async def run(self, moved: Callable[[], None]) -> None:
        """Follow the devices' capacities; ends only by cancellation."""
        while True:
            moved()
            self.follow()
            await asyncio.sleep(TICK_S)

    def follow(self) -> None:
        """Take in what every device can do now."""
        now = {(model, device): per_s for device, vitals in self._present().items() for model, per_s in vitals.capacity.items()}
        for model, device in self._capacity.keys() - now.keys():
            del self._capacity[model, device]
            self._rings[model].leave(device)
        for (model, device), per_s in now.items():
            before = self._capacity.get((model, device))
            if before is None or abs(per_s - before) > MOVED * before:
                self._capacity[model, device] = per_s
                ring = self._rings.setdefault(model, Ring(unit=UNIT))
                ring.register(device, max(0, round(per_s * PER_MINUTE)))
                self._log.debug("capacity_registered", device=device, model=model, per_s=round(per_s, 1))

    async def _ask(self, inbound: Inbound) -> bytes:
        """Have a request answered. Raises: TheirsError (`residency`, or a neighbour's refusal), WorldError (`backlog_full`, `deadline`)."""
        asker, head = inbound.topic.split("/")[3], unpack_ask(inbound.payload).head
        if Place.NEIGHBOUR not in places(head.residency):
            raise TheirsError("residency", f"data residency {head.residency!r} keeps it on its device", where="region")
        if self._inside >= IN_FLIGHT:
            raise WorldError("backlog_full", f"{self._inside} requests are with neighbours already", where="region")
        self._inside += 1
        try:
            async with asyncio.timeout(head.within_ms / 1e3):
                return await self._placed(asker, head, inbound.payload)
        except TimeoutError:
            raise WorldError("deadline", f"{head.within_ms:.0f} ms were over", where="region") from None
        finally:
            self._inside -= 1

    async def _placed(self, asker: str, head: AskHead, frame: bytes) -> bytes:
        ring, avoid = self._rings.get(head.model, Ring()), {asker}
        failed: ApplianceError = WorldError("backlog_full", f"no neighbour has room for {head.model}", where="region")
        for _ in range(ATTEMPTS):
            ticket = f"{next(self._tickets)}"
            device = ring.place(ticket, f"{head.model}:{asker}", avoid=avoid)
            if device is None:
                break
            avoid.add(device)
            try:
                return await self._link.ask(topics.lent(self._region, device), frame, timeout_s=head.within_ms / 1e3, qos=0)
            except (TheirsError, WorldError) as error:
                failed = error
                if error.reason not in PASSING:
                    break
            finally:
                ring.release(ticket)
        raise failed
