"""A stand: one model of this device, the forms that it may be served in, and the mode that is served now.

A change of mode is made like a change of version: the other form is loaded and warmed beside the one that serves, one reference is swapped
between batches, and the old form answers what it had admitted before its memory is given back.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from appliance.contract.errors import ApplianceError
from appliance.contract.inference import Signature, Tags
from appliance.contract.models import Manifest, Variant
from appliance.contract.vocabulary import Mode, Platform
from appliance.core.serve.board import BoardProfile, ModelCost
from appliance.core.serve.degradation import Degradation, DegradationSettings
from appliance.core.serve.pressure import Gauges
from appliance.core.serve.profile import Profile
from appliance.edge.lane import Hands, Lane, Mounted, served

_numbers = itertools.count(1)
AT_REST = "nothing presses"


@dataclass(frozen=True, slots=True)
class Form:
    """One form of a model: what runs it, how its weights are opened, and its measured accuracy (None: not measured)."""

    platform: Platform
    weights: Callable[[], int]
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """How stands are run: `standby` keeps the least local mode loaded, `times` is how patient degradation is, `board` guesses latencies."""

    max_batch: int
    times: DegradationSettings
    standby: bool = False
    board: BoardProfile | None = None


class Flow(NamedTuple):
    """How many requests came, and how many of them were refused."""

    offered: int = 0
    refused: int = 0


class Speed(NamedTuple):
    """How fast a model is answered here now: seconds for one sample without a queue, samples a second at most, seconds of what waits."""

    one_s: float
    per_s: float
    queue_s: float


class Stand:
    """One model. `forms` has at least mode A; mode D's, if it is there, is the `extractor` of features, which answers nobody by itself."""

    def __init__(self, manifest: Manifest, forms: Mapping[Mode, Form], hands: Hands, policy: Policy, *, cloud: bool) -> None:
        self.manifest = manifest
        self.forms: Mapping[Mode, Form] = {mode: form for mode, form in forms.items() if mode is not Mode.CLOUD}
        self.extractor = forms.get(Mode.CLOUD)
        self.lanes: dict[Mode, Lane] = {}
        self.mode: Mode = min(self.forms)
        self.why = AT_REST
        self.gauges = Gauges()
        self.degradation = Degradation({*forms, *([Mode.CLOUD] if cloud else [])}, policy.times)
        self.profile: Profile | None = None
        self.signature: Signature | None = None
        self.limit = 1
        self.offered = self.refused = 0
        self.moving = False
        self._seen = Flow()
        self._hands = hands
        self._policy = policy
        self._log = structlog.get_logger()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.model_id

    def places(self, tags: Tags) -> Iterator[Lane]:
        """The lanes that may answer these tags: the present mode first, then lesser ones that are loaded."""
        for mode in sorted(self.lanes):
            if mode >= self.mode and (mode is Mode.FULL or tags.accept_degradation):
                yield self.lanes[mode]

    def speed(self) -> Speed | None:
        """How fast the present mode answers, by measurement; None if nothing local serves, or nothing is known of it."""
        lane = self.lanes.get(self.mode)
        pace = lane.backlog.pace if lane is not None else None
        if lane is None or pace is None:
            return None
        per_s = pace.batch * pace.workers / pace.seconds(pace.batch)
        return Speed(pace.seconds(1), per_s, lane.backlog.waiting / per_s)

    def flow(self) -> Flow:
        """What came and was refused since the last call."""
        now = Flow(self.offered, self.refused)
        seen, self._seen = self._seen, now
        return Flow(now.offered - seen.offered, now.refused - seen.refused)

    async def open(self, mode: Mode, *, thorough: bool) -> None:
        """Load and warm the form of a mode, and serve it. Raises: TheirsError (`model`), WorldError (`worker_lost`, `memory`)."""
        form, manifest = self.forms[mode], self.manifest
        key = f"{manifest.model_id}@{manifest.version}:{mode}:{next(_numbers)}"
        loaded = await self._hands.engine.load(key, form.platform, form.weights)
        signature, batchable, compiled = served(loaded.signature)
        limit = min(self._policy.max_batch, manifest.edge_constraints.max_batch_size) if batchable else 1
        limit = max(limit, *compiled) if compiled else limit
        if self.profile is None:
            self.profile = Profile(limit, self._policy.board, _costs(manifest, self.forms), compiled)
            self.signature, self.limit = signature, limit
        mounted = Mounted(key, manifest, mode, signature, batchable, compiled, form.accuracy)
        lane = Lane(mounted, self._hands, limit=limit, profile=self.profile, why=self.why)
        try:
            await lane.warm(manifest.example_shapes, thorough=thorough)
        except ApplianceError:
            lane.close()
            await self._hands.engine.unload(key)
            raise
        self.lanes[mode] = lane
        self._log.info("model_mounted", model=self.name, version=manifest.version, mode=mode, platform=form.platform, max_batch=limit)

    async def shift(self, mode: Mode, why: str) -> None:
        """Serve in another mode from the next batch on. Raises: as `open`; the present mode then goes on."""
        before, self.why = self.why, why
        try:
            if mode is not Mode.CLOUD and mode not in self.lanes:
                await self.open(mode, thorough=False)
        except ApplianceError:
            self.why = before
            raise
        self.mode = mode
        for each, lane in tuple(self.lanes.items()):
            lane.why = why
            if each is not mode and not self._kept(each):
                self._hands.pool.spawn(self.lanes.pop(each).retire())

    async def ready_standby(self) -> None:
        """Load the least local form beside the present one, if the policy wants it. Raises: as `open`."""
        least = max(self.forms)
        if self._policy.standby and least not in self.lanes:
            await self.open(least, thorough=False)

    def retire(self) -> None:
        """Let every lane answer what it has, and go."""
        for lane in self.lanes.values():
            self._hands.pool.spawn(lane.retire())

    def _kept(self, mode: Mode) -> bool:
        return self._policy.standby and mode is max(self.forms) and mode > self.mode


def _costs(manifest: Manifest, forms: Mapping[Mode, Form]) -> dict[Mode, ModelCost]:
    """What each form asks of the board, as the manifest says; a form about which it says nothing has none."""
    costs = {}
    for mode, form in forms.items():
        about: Manifest | Variant | None = manifest if mode is Mode.FULL else manifest.variants.get(mode)
        if about is not None and about.flops is not None and about.activation_bytes is not None:
            size = about.compiled_artifacts[form.platform].size
            costs[mode] = ModelCost(flops=about.flops, weight_bytes=float(size), activation_bytes=about.activation_bytes)
    return costs
