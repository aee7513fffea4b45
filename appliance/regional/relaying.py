"""Relaying: takes the cloud's release, checks it as a device would, fetches the artifacts once, and only then offers it to its devices.

Devices pull from the region's disk, so a slow way to the cloud is walked once and a device never waits for it.
"""

import asyncio
from collections.abc import Callable, Mapping

import structlog

from appliance.contract import topics
from appliance.contract.codec import decode, encode
from appliance.contract.errors import ApplianceError, TheirsError
from appliance.contract.models import ChunkAsk, CompiledArtifact, Manifest, RegionKey, RegionKeyAsk, Release, artifacts_of
from appliance.contract.prices import Price
from appliance.contract.remote import unpack_ask
from appliance.core.trust.envelope import region_public, unwrap_for_region
from appliance.daily.pulling import Pull
from appliance.ports import Clock, Depot, Inbound, Link, Metadata

RELEASE_FILE = "release.json"
RETRY_S = 2.0
TICK_S = 0.5


class Relaying:
    """The newest good release, and the data keys of its artifacts (in memory only); `online_only` are those that no lease may open.

    `secret`: the region's X25519 private key (32 bytes), under which the cloud sends data keys.
    """

    def __init__(
        self, link: Link, clock: Clock, depot: Depot, metadata: Metadata, *, region: str, secret: bytes, ask_timeout_s: float
    ) -> None:
        self._link = link
        self._clock = clock
        self._depot = depot
        self._metadata = metadata
        self._region = region
        self._secret = secret
        self._ask_timeout_s = ask_timeout_s
        self._offers: asyncio.Queue[bytes] = asyncio.Queue(maxsize=8)
        self._artifacts: dict[str, CompiledArtifact] = {}
        self._keys: dict[str, bytes] = {}
        self.online_only: set[str] = set()
        self._log = structlog.get_logger()
        link.on(topics.upstream_release(region), self._offered)
        link.on(topics.upstream_price(region), self._priced)
        link.serve(f"v1/{region}/d/+/up/ask/chunk", self._chunk)
        link.serve(f"v1/{region}/d/+/up/ask/infer", self._infer)

    @property
    def keys(self) -> Mapping[str, bytes]:
        """Data keys by container hash, as far as the cloud has sent them."""
        return self._keys

    async def _offered(self, inbound: Inbound) -> None:
        if self._offers.full():
            self._offers.get_nowait()
        self._offers.put_nowait(inbound.payload)

    async def _chunk(self, inbound: Inbound) -> bytes:
        ask = decode(inbound.payload, ChunkAsk)
        if ask.artifact not in self._artifacts:
            raise TheirsError("unknown_artifact", "this region does not offer that artifact", where=ask.artifact[:64])
        return await asyncio.to_thread(self._depot.read, ask.artifact, ask.index)

    async def _priced(self, inbound: Inbound) -> None:
        """Hand a price on; one that cannot be told now is not told later, since the next one comes."""
        try:
            decode(inbound.payload, Price)
            await self._link.publish(topics.price(self._region), inbound.payload, retain=True, timeout_s=RETRY_S)
        except ApplianceError as error:
            self._log.warning("price_not_relayed", reason=error.reason, what=str(error))

    async def _infer(self, inbound: Inbound) -> bytes:
        """Hand an inference on to the cloud and its answer back; what is malformed, or must not leave the region, goes no further."""
        head = unpack_ask(inbound.payload).head
        if head.residency:
            raise TheirsError("residency", f"data residency {head.residency!r} keeps it from the cloud", where="region")
        within_s = head.within_ms / 1e3
        return await self._link.ask(topics.upstream_infer(self._region), inbound.payload, timeout_s=within_s, qos=0)

    async def run(self, moved: Callable[[], None]) -> None:
        """Offer what was offered before, then follow the cloud; ends only by cancellation."""
        pending = await asyncio.to_thread(self._depot.load, RELEASE_FILE)
        up = False
        while True:
            moved()
            if self._link.connected and not up:  # a broker that died may have lost what it retained
                pending = pending or await asyncio.to_thread(self._depot.load, RELEASE_FILE)
            up = self._link.connected
            if pending is not None and await self._relay(pending, moved):
                pending = None
            try:
                async with asyncio.timeout(RETRY_S if pending else TICK_S):
                    pending = await self._offers.get()
            except TimeoutError:
                continue

    async def _relay(self, payload: bytes, moved: Callable[[], None]) -> bool:
        """Verify, fetch, publish. False: the world failed, try again."""
        try:
            release = decode(payload, Release)
            manifests = await asyncio.to_thread(self._metadata.verify, release)
            for manifest in manifests:
                await self._fetch(manifest, moved)
            await self._link.publish(topics.release(self._region), encode(release), retain=True)
        except TheirsError as error:
            self._log.error("release_refused", reason=error.reason, what=str(error))
            return True
        except ApplianceError as error:
            self._log.debug("release_deferred", reason=error.reason, what=str(error))
            return False
        await asyncio.to_thread(self._depot.save, RELEASE_FILE, payload)
        self._log.info("release_relayed", models=[f"{manifest.model_id}@{manifest.version}" for manifest in manifests])
        return True

    async def _fetch(self, manifest: Manifest, moved: Callable[[], None]) -> None:
        for artifact in artifacts_of(manifest):
            name = artifact.container_sha256
            (self.online_only.add if manifest.offline == "never" else self.online_only.discard)(name)
            await Pull(self._link, self._depot, self._clock, topics.upstream_chunk(self._region), artifact, moved=moved).run()
            if name not in self._keys:
                ask = RegionKeyAsk(artifact=name, public=region_public(self._secret))
                answer = await self._link.ask(topics.upstream_key(self._region), encode(ask), timeout_s=self._ask_timeout_s)
                self._keys[name] = unwrap_for_region(decode(answer, RegionKey), name, self._secret)
            self._artifacts[name] = artifact
