"""Changing: follows what the region offers; a release is verified, pulled, opened and mounted, or refused while the last good one serves on.

The order is the house's corridor: metadata, fence, constraints, pull, key, open, mount, keep. Whatever fails before `mount` changes nothing
that callers can see. What serves is remembered on disk as its manifest, so that a restart mounts it again without the network's help
beyond the key.
"""

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec
import structlog

from appliance.contract import topics
from appliance.contract.codec import decode, encode
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.models import CompiledArtifact, Manifest, Release, artifacts_of
from appliance.contract.vocabulary import Mode, Platform
from appliance.core.trust.fencing import Fence, fingerprint, unpack
from appliance.daily.pulling import Pull
from appliance.edge.serving import Serving
from appliance.edge.stand import Form
from appliance.edge.trusting import Trusting
from appliance.ports import Board, Clock, Depot, Inbound, Link, Metadata, Weights

FENCE_FILE = "fence.json"
SHELF_FILE = "shelf.json"
PREFERENCE = (Platform.ONNX, Platform.LITERT)
RETRY_S = 2.0
TICK_S = 0.5
NOT_YET = frozenset({"not_attested", "unknown_device", "unknown_artifact", "busy", "internal"})
"""What a region says that has just started again: true now, not for ever, and nothing against the release."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Corridor:
    """The hands that a release passes through, in the order in which they touch it."""

    metadata: Metadata
    depot: Depot
    weights: Weights
    board: Board


class Changing:
    """Which releases are known, which serve, and the one at work. `split`: feature extractors (mode D) are pulled too."""

    def __init__(
        self,
        link: Link,
        clock: Clock,
        corridor: Corridor,
        trusting: Trusting,
        serving: Serving,
        *,
        tell: Callable[[str, dict[str, str]], Awaitable[None]],
        region: str,
        device: str,
        split: bool = False,
    ) -> None:
        self._split = split
        self._link = link
        self._clock = clock
        self._corridor = corridor
        self._trusting = trusting
        self._serving = serving
        self._tell = tell
        self._topic = topics.chunk(region, device)
        self._region = region
        self._offers: asyncio.Queue[Inbound] = asyncio.Queue(maxsize=8)
        self._refused: dict[str, int] = {}
        self._deferred: dict[str, str] = {}
        self._stopped_at_term: dict[str, Manifest] = {}
        self._log = structlog.get_logger()
        link.on(topics.release(region), self._offered)

    async def _offered(self, inbound: Inbound) -> None:
        if self._offers.full():
            self._offers.get_nowait()  # a release carries everything on offer, so only the newest ones matter
        self._offers.put_nowait(inbound)

    async def run(self, moved: Callable[[], None]) -> None:
        """Mount what served before, then follow offers; ends only by cancellation."""
        shelf = self._shelf()
        wanted = list(shelf.values())
        while True:
            moved()
            wanted = await self._work(wanted + await self._lapsed(), moved)
            try:
                async with asyncio.timeout(RETRY_S if wanted else TICK_S):
                    offer = await self._offers.get()
            except TimeoutError:
                continue
            wanted = await self._verified(offer, wanted)

    async def _lapsed(self) -> list[Manifest]:
        """Unload the models whose release says `stop` and whose key may be held no longer; they are wanted again for when it may."""
        lapsed = [each for each in self._stopped_at_term.values() if not self._trusting.holds(each.offline)]
        for manifest in lapsed:
            del self._stopped_at_term[manifest.model_id]
            if self._serving.versions().get(manifest.model_id) == manifest.version:
                await self._serving.unload(manifest.model_id)
                self._log.warning("model_stopped_at_term", model=manifest.model_id, version=manifest.version)
                await self._tell("model_stopped_at_term", {"model": manifest.model_id, "version": manifest.version})
        return lapsed

    async def _verified(self, offer: Inbound, wanted: list[Manifest]) -> list[Manifest]:
        """The manifests on offer that are new here; an offer that does not verify leaves everything as it is."""
        try:
            release = decode(offer.payload, Release)
            manifests = await asyncio.to_thread(self._corridor.metadata.verify, release)
        except ApplianceError as error:
            self._log.error("release_refused", reason=error.reason, what=str(error))
            await self._tell("release_refused", {"reason": error.reason, "what": str(error)})
            return wanted
        serving = self._serving.versions()
        fresh = [
            manifest
            for manifest in manifests
            if serving.get(manifest.model_id) != manifest.version and self._refused.get(manifest.model_id) != manifest.token
        ]
        names = {manifest.model_id for manifest in fresh}
        return [manifest for manifest in wanted if manifest.model_id not in names] + fresh

    async def _work(self, wanted: list[Manifest], moved: Callable[[], None]) -> list[Manifest]:
        """Try each wanted release once; those that wait for the world are returned to be tried again."""
        later: list[Manifest] = []
        for manifest in wanted:
            moved()
            bound = self._log.bind(model=manifest.model_id, version=manifest.version)
            try:
                await self._install(manifest, moved)
            except (TheirsError, WorldError) as error:
                if isinstance(error, WorldError) or error.reason in NOT_YET:
                    self._defer(manifest, error)
                    later.append(manifest)
                    continue
                self._refused[manifest.model_id] = manifest.token
                bound.error("model_refused", reason=error.reason, what=str(error))
                await self._tell(
                    "model_refused", {"model": manifest.model_id, "version": manifest.version, "reason": error.reason, "what": str(error)}
                )
            else:
                self._deferred.pop(manifest.model_id, None)
                await self._tell("model_mounted", {"model": manifest.model_id, "version": manifest.version})
        return later

    def _defer(self, manifest: Manifest, error: ApplianceError) -> None:
        """Log why a release waits, once for each reason."""
        if self._deferred.get(manifest.model_id) != error.reason:
            self._deferred[manifest.model_id] = error.reason
            self._log.warning("model_deferred", model=manifest.model_id, version=manifest.version, reason=error.reason, what=str(error))

    async def _install(self, manifest: Manifest, moved: Callable[[], None]) -> None:
        admitted = self._fence().admit(manifest.model_id, manifest.token, fingerprint(manifest))
        self._check_memory(manifest)
        offered = {Mode.FULL: manifest.compiled_artifacts} | {
            mode: variant.compiled_artifacts for mode, variant in manifest.variants.items() if mode is not Mode.CLOUD or self._split
        }
        chosen = {mode: _choose(artifacts, manifest.model_id) for mode, artifacts in sorted(offered.items())}
        await asyncio.to_thread(self._corridor.depot.save, FENCE_FILE, admitted.pack())
        forms = {}
        for mode, (platform, artifact) in chosen.items():
            path = await Pull(self._link, self._corridor.depot, self._clock, self._topic, artifact, moved=moved).run()
            await self._trusting.data_key(artifact.container_sha256)
            weights = functools.partial(self._weights, path, artifact)
            os.close(await asyncio.to_thread(weights))  # what does not open is refused now, and not when heat asks for it
            accuracy = manifest.accuracy if mode is Mode.FULL else manifest.variants[mode].accuracy
            forms[mode] = Form(platform, weights, accuracy)
        await self._serving.mount(manifest, forms)
        if manifest.at_term == "stop":
            self._stopped_at_term[manifest.model_id] = manifest
        else:
            self._stopped_at_term.pop(manifest.model_id, None)
        await asyncio.to_thread(self._keep, manifest)

    def _weights(self, path: str, artifact: CompiledArtifact) -> int:
        """Open weights with the key as it may be had now: no copy of it waits for a worker's death, so a key that is dropped is gone."""
        return self._corridor.weights.open(path, artifact, self._trusting.kept_key(artifact.container_sha256))

    def _check_memory(self, manifest: Manifest) -> None:
        needed = manifest.edge_constraints.min_vram_gb
        present = self._corridor.board.read().memory_total_bytes / GIB
        if present < needed:
            raise TheirsError("too_large", f"needs {needed:g} GiB of memory, this board has {present:.1f}", where=manifest.model_id)

    def _keep(self, manifest: Manifest) -> None:
        """Remember what serves; drop the ciphertext that nothing refers to any more."""
        shelf = self._shelf()
        before = shelf.get(manifest.model_id)
        shelf[manifest.model_id] = manifest
        self._corridor.depot.save(SHELF_FILE, msgspec.json.encode([encode(kept).decode() for kept in shelf.values()]))
        used = {artifact.container_sha256 for kept in shelf.values() for artifact in artifacts_of(kept)}
        for artifact in artifacts_of(before) if before else ():
            if artifact.container_sha256 not in used:
                self._corridor.depot.drop(artifact.container_sha256)
                self._corridor.depot.forget(f"key-{artifact.container_sha256[:32]}.json")

    def _shelf(self) -> dict[str, Manifest]:
        kept = self._corridor.depot.load(SHELF_FILE)
        manifests = [decode(text.encode(), Manifest) for text in msgspec.json.decode(kept, type=list[str])] if kept else []
        return {manifest.model_id: manifest for manifest in manifests}

    def _fence(self) -> Fence:
        kept = self._corridor.depot.load(FENCE_FILE)
        return unpack(kept) if kept else Fence()


def _choose(artifacts: Mapping[Platform, CompiledArtifact], model: str) -> tuple[Platform, CompiledArtifact]:
    """The artifact for the platform that this device prefers. Raises: TheirsError (`platform`)."""
    for platform in PREFERENCE:
        if platform in artifacts:
            return platform, artifacts[platform]
    raise TheirsError("platform", f"compiled for {', '.join(artifacts)} only", where=model)
