"""Offering: tells every region what is on offer, again when its metadata was renewed, and hands out chunks and keys."""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from appliance.cloud.publishing import Publisher
from appliance.contract import topics
from appliance.contract.codec import decode, encode
from appliance.contract.errors import ApplianceError
from appliance.contract.models import ChunkAsk, RegionKeyAsk, Release
from appliance.ports import Inbound, Link

OFFER_EVERY_S = 3600.0
TICK_S = 1.0


class Offering:
    """One release and the regions that are to hear of it."""

    def __init__(self, link: Link, publisher: Publisher, release: Release, regions: Sequence[str]) -> None:
        self._link = link
        self._publisher = publisher
        self._release = release
        self._regions = regions
        self._log = structlog.get_logger()
        for region in regions:
            link.serve(topics.upstream_chunk(region), self._chunk)
            link.serve(topics.upstream_key(region), self._key)

    async def _chunk(self, inbound: Inbound) -> bytes:
        ask = decode(inbound.payload, ChunkAsk)
        return await asyncio.to_thread(self._publisher.chunk, ask.artifact, ask.index)

    async def _key(self, inbound: Inbound) -> bytes:
        return encode(self._publisher.region_key(decode(inbound.payload, RegionKeyAsk)))

    async def run(self, moved: Callable[[], None]) -> None:
        """Offer to every region until each has heard, and anew every hour; ends only by cancellation."""
        pending = list(self._regions)
        waited_s = 0.0
        while True:
            moved()
            if waited_s >= OFFER_EVERY_S:
                self._release = await asyncio.to_thread(self._publisher.refresh)
                pending, waited_s = list(self._regions), 0.0
            for region in tuple(pending):
                try:
                    await self._link.publish(topics.upstream_release(region), encode(self._release), retain=True)
                except ApplianceError as error:
                    self._log.debug("offer_deferred", region=region, reason=error.reason)
                else:
                    pending.remove(region)
                    self._log.info("release_offered", region=region)
            await asyncio.sleep(TICK_S)
            waited_s += TICK_S
