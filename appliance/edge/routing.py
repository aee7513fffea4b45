"""Routing: asks the router of `core.reach` where each request is answered best, and sends it there (port `Upstream`, for what may leave the device).

1. Until a price was heard nothing is weighed: nearest first, as `serving` has it. So it is for all whose data stays on the device or in the region.
2. Every `TICK_S` the router hears what it decides by: each model's mode and measured speed, the link and its breaker, the cloud's measured times. It remembers
   its decisions for 30 s, and forgets them when one of these moved by a tenth, or a mode, the link's verdict or the price changed.
3. The extractor of a model is wanted in mode D, where the router sends plain requests by it, and once in mode A so that it is measured at all; it goes when
   nobody wanted it for `IDLE_S`. In mode D it stays only if features cost less than the input or, without a price, are smaller. A pressed device (B, C) computes features only
   if that is less work for it than its mode.
4. A chosen route has the time that is left after what the device needs to answer by itself, so that a failure is answered here; where there is no time for
   both, it has all of it.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import structlog

from appliance.contract import topics
from appliance.contract.codec import decode
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import DTYPES, Answer, Request, Tags
from appliance.contract.prices import Price
from appliance.contract.vocabulary import Mode
from appliance.core.reach.affinity import Place
from appliance.core.reach.pricing import HOUR_S, SPOT_MAX_AGE_S, Prices, cloud_cost, edge_cost, split_cost
from appliance.core.reach.routing import Cloud, Decision, Edge, Prospect, Route, Router, RouterSettings, Uplink
from appliance.edge.splitting import Splitting
from appliance.edge.stand import Stand
from appliance.edge.upstream import CloudRoute, rows
from appliance.ports import Clock, Inbound, Link

TICK_S = 0.5
IDLE_S = 60.0
HEAD_SHARE = 0.05
"""The head's share of a model's work where nobody measured it: a cut is made late."""
RESERVE = 1.5
"""What the device keeps of a request's time to answer by itself, in units of its predicted time."""
PLAIN = Tags()
ANYWHERE = frozenset(Place)
HERE = frozenset({Route.EDGE_FULL, Route.EDGE_CONSTRAINED})


@dataclass(slots=True)
class _View:
    """What the router was told last of one model, and how long its extractor is wanted."""

    stand: Stand
    mode: Mode
    prospect: Prospect
    reserve_s: float
    wanted_until: float = -inf
    plain: Decision | None = None


class Routing:
    """One device's routes. `models` gives what is served, `device_per_h` is what this device costs an hour."""

    def __init__(
        self,
        link: Link,
        clock: Clock,
        cloud: CloudRoute,
        splitting: Splitting,
        models: Callable[[], Sequence[Stand]],
        *,
        region: str,
        device_per_h: float,
        slo_s: float,
        deadline_s: float,
    ) -> None:
        self._clock = clock
        self._cloud = cloud
        self._splitting = splitting
        self._models = models
        self._device_per_h = device_per_h
        self._slo_s = slo_s
        self._router = Router(RouterSettings(cloud_deadline_s=deadline_s))
        self._prices: Prices | None = None
        self._views: dict[str, _View] = {}
        self._log = structlog.get_logger()
        link.on(topics.price(region), self._heard)

    @property
    def decided(self) -> int:
        """How often the router had to think."""
        return self._router.decided

    @property
    def stands(self) -> bool:
        """Whether the way to the cloud can be relied on now."""
        return self._cloud.stands

    def allows(self, tags: Tags) -> bool:
        """Whether a request with these tags may go to the cloud now."""
        return self._cloud.allows(tags)

    def choose(self, stand: Stand, request: Request) -> Decision | None:
        """The route beyond this device that should be taken first; None: this device, or whatever comes after it."""
        tags = request.tags
        if self._prices is None:
            return None
        view = self._views.get(stand.name)
        if view is None or view.mode is not stand.mode or view.stand is not stand:
            view = self._look(stand)
        if tags.data_residency:
            return None
        decision = self._router.route(stand.name, "", tags, _size(request), self._clock.monotonic())
        if decision.route is Route.SPLIT:
            view.wanted_until = self._clock.monotonic() + IDLE_S
            return decision if self._splitting.ready(stand) else None
        return decision if decision.route is Route.CLOUD_FULL else None

    def affordable(self, stand: Stand, request: Request) -> frozenset[Place]:
        """The places whose predicted cost is within the request's limit; a neighbour is taken to cost what this device costs."""
        limit = request.tags.max_cost
        if limit is None:
            return ANYWHERE
        costs = self._costs(stand, request)
        costs[Place.NEIGHBOUR] = costs[Place.EDGE]
        return frozenset(place for place, cost in costs.items() if cost <= limit)

    async def take(self, decision: Decision, stand: Stand, request: Request, left_s: float) -> Answer:
        """Go the chosen way, within the time that this device can spare. Raises: as `infer`."""
        view = self._views[stand.name]
        within_s = left_s - view.reserve_s
        if within_s < self._expected_s(decision.route, view.prospect.cloud, rows(request.inputs)):
            within_s = left_s  # there is no time for both
        if within_s <= 0:
            raise WorldError("deadline", "no time is left for another place", where=stand.name)
        if decision.route is Route.SPLIT:
            return await self._split(stand, request, within_s, decision.why)
        return await self._cloud.infer(request, within_s, why=decision.why)

    async def infer(self, request: Request, within_s: float) -> Answer:
        """Answer beyond this device, since it cannot: from features where that is cheaper, else from the input.

        Raises: WorldError (`partitioned`, `deadline`, `backlog_full`), TheirsError with the cloud's reason.
        """
        stand = next((each for each in self._models() if each.name == request.model), None)
        if stand is None:
            return await self._cloud.infer(request, within_s)
        why = self._cheaper_split(stand, request)
        if not why and Place.CLOUD not in self.affordable(stand, request):
            raise WorldError(
                "degraded", f"the cloud costs more than {request.tags.max_cost} dollars now", where=stand.name, retry_after_s=30.0
            )
        if not why:
            return await self._cloud.infer(request, within_s, why=f"asked the cloud: {stand.why}")
        return await self._split(stand, request, within_s, why)

    async def run(self, moved: Callable[[], None]) -> None:
        """Keep the router informed and the extractors where they are wanted; ends only by cancellation."""
        while True:
            moved()
            self.look()
            await asyncio.sleep(TICK_S)

    def look(self) -> None:
        """One round (rules 2 and 3)."""
        calls, now = self._cloud.calls, self._clock.monotonic()
        self._router.linked(Uplink(calls.state, calls.rtt_s, inf, calls.shut))
        models = self._models()
        for name in self._views.keys() - {stand.name for stand in models}:
            del self._views[name]
            self._router.gone(name)
            self._splitting.forget(name)
        for stand in models:
            view = self._look(stand)
            self._splitting.want(stand, wanted=self._wanted(stand, view, now))

    async def _heard(self, inbound: Inbound) -> None:
        try:
            price = decode(inbound.payload, Price)
        except TheirsError as error:
            self._log.warning("price_refused", what=str(error))
            return
        # the router trusts a spot price for SPOT_MAX_AGE_S: it is told an age after which exactly the price's own time is left
        left_s = min(price.valid_until - self._clock.wall(), SPOT_MAX_AGE_S)
        at = self._clock.monotonic() + left_s - SPOT_MAX_AGE_S
        if self._prices is None:
            self._log.info("priced", spot_per_h=price.spot_per_h, egress_per_gb=price.egress_per_gb)
        self._prices = Prices(price.spot_per_h, price.on_demand_per_h, price.egress_per_gb, self._device_per_h, at)
        self._cloud.egress_per_gb = price.egress_per_gb
        self._router.priced(self._prices)
        self.look()

    def _look(self, stand: Stand) -> _View:
        """Tell the router what can be done for one model now, and the lanes what to say of their answers."""
        speed, known = stand.speed(), self._views.get(stand.name)
        edge = Edge(stand.mode, stand.manifest.version, speed.one_s + speed.queue_s, speed.per_s) if speed else None
        if edge is None and stand.mode is not Mode.CLOUD:  # nothing is known of its speed: it is tried first, as if it were free
            edge = Edge(stand.mode, stand.manifest.version, 0.0, inf)
        prospect = Prospect(_sample_bytes(stand), self._slo_s, edge, self._beyond(stand))
        self._router.able(stand.name, prospect)
        view = _View(stand, stand.mode, prospect, RESERVE * edge.latency_s if edge else 0.0)
        if known is not None and known.stand is stand:
            view.wanted_until = known.wanted_until
        view.plain = self._router.route(stand.name, "", PLAIN, prospect.sample_bytes, self._clock.monotonic())
        self._tell_lanes(stand, view)
        self._views[stand.name] = view
        return view

    def _beyond(self, stand: Stand) -> Cloud:
        """What the cloud can do for a model: measured where it was asked, before that as the manifest says of the builder's machine."""
        manifest, calls = stand.manifest, self._cloud.calls
        told_s = (manifest.latency_ms or manifest.edge_constraints.target_latency_ms) / 1e3
        duration_s = calls.took_s(stand.name, "input") or told_s
        head_s = calls.took_s(stand.name, "features") or HEAD_SHARE * duration_s
        features, speed = self._splitting.about(stand), stand.speed()
        pressed = stand.mode not in {Mode.FULL, Mode.CLOUD}
        if features is None or (pressed and speed is not None and features.seconds > speed.one_s):
            return Cloud(manifest.version, duration_s)
        return Cloud(manifest.version, duration_s, features.seconds, head_s, features.size)

    def _wanted(self, stand: Stand, view: _View, now: float) -> bool:
        """Whether the extractor should be loaded (rule 3)."""
        if stand.extractor is None:
            return False
        features = self._splitting.about(stand)
        if stand.mode is Mode.CLOUD:
            if features is None or self._prices is None:
                return features is None or features.size < view.prospect.sample_bytes
            costs = self._priced(view.prospect, 1, view.prospect.sample_bytes, now)
            return costs[Place.SPLIT] <= costs[Place.CLOUD]
        route = view.plain.route if view.plain is not None and self._prices is not None else None
        unknown = features is None and self._prices is not None and stand.mode is Mode.FULL
        if route is Route.SPLIT or unknown:
            view.wanted_until = now + IDLE_S
        return now < view.wanted_until

    def _tell_lanes(self, stand: Stand, view: _View) -> None:
        """What answers of this device say of themselves from now on."""
        edge, prices = view.prospect.edge, self._prices
        here = view.plain.why if prices and view.plain and view.plain.route in HERE else ""
        cost = edge_cost(prices, edge.answers_per_s).of(0) if prices and edge and edge.answers_per_s < inf else None
        for mode, lane in stand.lanes.items():
            lane.cost, lane.here = (cost, here) if mode is stand.mode else (None, "")

    def _cheaper_split(self, stand: Stand, request: Request) -> str:
        """Why features are sent rather than the input; empty if they are not."""
        features = self._splitting.about(stand)
        if features is None or not self._splitting.ready(stand) or not request.tags.accept_degradation:
            return ""
        if self._prices is None:
            sent = features.size * rows(request.inputs)
            return f"{stand.why}; {sent} bytes of features, {_size(request)} of input" if sent < _size(request) else ""
        costs = self._costs(stand, request)
        whole, split = costs[Place.CLOUD], costs[Place.SPLIT]
        return f"{stand.why}; cheapest of split {split:.2g}, cloud {whole:.2g}" if split <= whole else ""

    async def _split(self, stand: Stand, request: Request, within_s: float, why: str) -> Answer:
        """Features here, the head there; the whole input where there are no features in time. Raises: as `infer`."""
        started = self._clock.monotonic()
        try:
            features, took_s = await self._splitting.features(stand, request)
        except WorldError as error:
            left_s = within_s - (self._clock.monotonic() - started)
            if left_s <= 0 or Place.CLOUD not in self.affordable(stand, request):
                raise
            return await self._cloud.infer(request, left_s, why=f"no features here: {error.what}")
        left_s = within_s - (self._clock.monotonic() - started)
        if left_s <= 0:
            raise WorldError("deadline", "the features took all the time that there was", where=stand.name)
        spent = self._device_per_h / HOUR_S * took_s if self._prices else 0.0
        return await self._cloud.finish(request, features, left_s, why=why, spent=spent)

    def _expected_s(self, route: Route, cloud: Cloud | None, samples: int) -> float:
        """How long a route will take, as the router has it."""
        if cloud is None:
            return inf
        own_s = (cloud.features_s or 0.0) + cloud.head_s if route is Route.SPLIT else cloud.duration_s
        return samples * own_s + self._cloud.calls.rtt_s

    def _costs(self, stand: Stand, request: Request) -> dict[Place, float]:
        view = self._views.get(stand.name) or self._look(stand)
        return self._priced(view.prospect, rows(request.inputs), _size(request), self._clock.monotonic())

    def _priced(self, prospect: Prospect, samples: int, size: int, now: float) -> dict[Place, float]:
        """Predicted dollars by place; infinite where it cannot be done, 0 where nothing is priced."""
        edge, cloud, prices = prospect.edge, prospect.cloud, self._prices
        costs = dict.fromkeys((Place.EDGE, Place.SPLIT, Place.CLOUD), 0.0)
        if prices is None:
            return costs
        costs[Place.EDGE] = edge_cost(prices, edge.answers_per_s, samples).of(0) if edge else inf
        costs[Place.SPLIT] = costs[Place.CLOUD] = inf
        if cloud is not None:
            costs[Place.CLOUD] = cloud_cost(prices, cloud.duration_s, now, samples).of(size)
        if cloud is not None and cloud.features_s is not None:
            split = split_cost(prices, cloud.features_s, cloud.head_s, now, samples)
            costs[Place.SPLIT] = split.of(samples * cloud.feature_bytes)
        return costs


def _size(request: Request) -> int:
    """The bytes of a request's input."""
    inputs = request.inputs
    return sum([array.nbytes for array in inputs.values()])


def _sample_bytes(stand: Stand) -> int:
    """The bytes of one typical sample; 0 if the model leaves its shape open and nobody named one."""
    signature, shapes, total = stand.signature, stand.manifest.example_shapes, 0
    for spec in signature.inputs if signature else ():
        shape = shapes.get(spec.name, spec.shape[1:])
        size = DTYPES[spec.datatype].itemsize
        for length in shape:
            size *= length
        if size <= 0:
            return 0
        total += size
    return total
