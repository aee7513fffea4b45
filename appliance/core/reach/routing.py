"""Chooses the route of a request by its tags and by cost, and remembers the choice for 30 s.

API: `Router(settings)`; `.priced(prices)`, `.linked(uplink)`, `.able(model, prospect)` when something changed; `.route(model, version, tags, size_bytes, now)
-> Decision(route, cost, why, …)` for each request; `Decision.paid(sent_bytes)` is the cost once the bytes are known.

1. Residency, version, degradation, latency and `max_cost` are rules (`affinity`): what breaks one is no route, whatever the others cost.
2. The cloud is no route while the hop is PARTITIONED, its breaker is open, or the predicted time is above `cloud_deadline_s`.
3. EDGE_FULL is the full model here within the SLO; EDGE_CONSTRAINED is a cheaper mode, or up to 1.5x the SLO. Of the full answers the cheapest is taken;
   EDGE_CONSTRAINED where there is none, or where the cheapest costs more than `premium` times as much. Equal costs: the nearest.
4. Where nothing is allowed: DEFERRED if the caller accepts a promise, else REFUSED, with each place's reason.
5. A decision is cached for `memo_s` by model, version, tags and the size of the input (to the power of two), and decided again for a larger one, so that
   `max_cost` holds for actual bytes. Any change of price, capacity, link or mode forgets all; what moved less than `moved` is no change.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from enum import StrEnum
from math import inf
from typing import NamedTuple

from appliance.contract.inference import Tags
from appliance.contract.vocabulary import LinkState, Mode
from appliance.core.reach.affinity import Asked, Offer, Place, allowed
from appliance.core.reach.pricing import Cost, Prices, cloud_cost, edge_cost, split_cost


class Route(StrEnum):
    """Where, and how well, a request is answered."""

    EDGE_FULL = "edge_full"
    EDGE_CONSTRAINED = "edge_constrained"
    SPLIT = "split"
    CLOUD_FULL = "cloud_full"
    DEFERRED = "deferred"
    REFUSED = "refused"


ROUTES: Mapping[tuple[Place, bool], Route] = {
    (Place.EDGE, True): Route.EDGE_FULL,
    (Place.EDGE, False): Route.EDGE_CONSTRAINED,
    (Place.SPLIT, True): Route.SPLIT,
    (Place.CLOUD, True): Route.CLOUD_FULL,
}
"""By place, and whether the answer is full: by the full model (or its halves) and within the SLO. Only the device gives less."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """See the rules above. `memory` is how many decisions are remembered at most."""

    memo_s: float = 30.0
    premium: float = 4.0
    cloud_deadline_s: float = 0.150
    moved: float = 0.1
    memory: int = 4_096


@dataclass(frozen=True, slots=True)
class Edge:
    """What this device does for a model now: its mode, the predicted time of an answer with the queue, answers a second at most."""

    mode: Mode
    version: str
    latency_s: float
    answers_per_s: float


@dataclass(frozen=True, slots=True)
class Cloud:
    """What the cloud does for a model: seconds of its worker per sample; with the head: of the feature extractor here, and of the head there."""

    version: str
    duration_s: float
    features_s: float | None = None
    head_s: float = 0.0
    feature_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Prospect:
    """One model's possibilities. `sample_bytes`: the input of one sample; `slo_s` holds where the caller has none."""

    sample_bytes: int
    slo_s: float
    edge: Edge | None = None
    cloud: Cloud | None = None


@dataclass(frozen=True, slots=True)
class Uplink:
    """The way to the cloud: state of the worst hop, round trip (95th percentile), bytes a second, whether the breaker refuses."""

    state: LinkState
    rtt_s: float = 0.0
    bytes_s: float = inf
    breaker_open: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """A route until `until`. `cost` is predicted (0 where there is no answer), for an input of at most `size_bytes`; `why` is one phrase for people."""

    route: Route
    cost: float
    why: str
    until: float
    size_bytes: int
    terms: Cost

    def paid(self, sent_bytes: int) -> float:
        """The cost with the bytes that were really sent."""
        return self.terms.of(sent_bytes)


class _Way(NamedTuple):
    """An offer and how its cost comes about."""

    offer: Offer
    terms: Cost


Key = tuple[str, str, Tags, int]


class Router:
    """The router of one device; without a price everything costs nothing, without an uplink there is no cloud."""

    def __init__(self, settings: RouterSettings | None = None) -> None:
        self._settings = settings or RouterSettings()
        self._prices = Prices(0.0, 0.0, 0.0, 0.0)
        self._uplink = Uplink(LinkState.PARTITIONED)
        self._prospects: dict[str, Prospect] = {}
        self._marks: dict[str, object] = {}
        self._memo: dict[Key, Decision] = {}
        self.decided = 0

    def priced(self, prices: Prices) -> None:
        """Take prices in; the same ones seen again keep what is cached."""
        self._prices = prices
        self._mark("/prices", astuple(prices)[:-1], 0.0)

    def linked(self, uplink: Uplink) -> None:
        """Take the state of the link in."""
        self._uplink = uplink
        self._mark("/uplink", astuple(uplink), self._settings.moved)

    def able(self, model: str, prospect: Prospect) -> None:
        """Take in what can be done for a model: its mode, its capacity, its speed."""
        self._prospects[model] = prospect
        self._mark(model, astuple(prospect), self._settings.moved)

    def gone(self, model: str) -> None:
        """Forget a model."""
        self._prospects.pop(model, None)
        self._marks.pop(model, None)
        self._memo.clear()

    def _mark(self, name: str, now: object, by: float) -> None:
        """Forget all decisions if this differs from what it was when decisions were last forgotten for it."""
        if name not in self._marks or not _near(self._marks[name], now, by):
            self._marks[name] = now
            self._memo.clear()

    def route(self, model: str, version: str, tags: Tags, size_bytes: int, now: float) -> Decision:
        """The route of one request, whose input has so many bytes."""
        key = (model, version, tags, size_bytes.bit_length())
        known = self._memo.get(key)
        if known is not None and now < known.until and size_bytes <= known.size_bytes:
            return known
        if len(self._memo) >= self._settings.memory:
            self._memo.clear()
        decision = self._memo[key] = self._decide(model, version, tags, size_bytes, now)
        return decision

    def _decide(self, model: str, version: str, tags: Tags, size_bytes: int, now: float) -> Decision:
        self.decided += 1
        until = now + self._settings.memo_s
        prospect = self._prospects.get(model)
        if prospect is None:
            return self._nowhere(tags, [f"{model} is not known here"], until, size_bytes)
        asked = Asked(tags, version, prospect.slo_s)
        ways, closed = self._ways(prospect, size_bytes, now)
        judged = allowed(asked, [way.offer for way in ways])
        open_ways = [way for way in ways if way.offer in judged.offers]
        if not open_ways:
            reasons = [*closed, *(f"{offer.place}: {why}" for offer, why in judged.refusals)]
            return self._nowhere(tags, reasons, until, size_bytes)
        way, why = self._choose(open_ways, asked)
        route = ROUTES[way.offer.place, _is_full(way.offer, asked)]
        return Decision(route, way.offer.cost, why, until, size_bytes, way.terms)

    def _choose(self, ways: list[_Way], asked: Asked) -> tuple[_Way, str]:
        """The cheapest full answer, or the constrained one (rule 3). `ways` are in order of nearness, and `min` keeps the first of equals."""
        full = [way for way in ways if _is_full(way.offer, asked)]
        less = [way for way in ways if not _is_full(way.offer, asked)]
        best = min(full, key=lambda way: way.offer.cost, default=None)
        cheap = min(less, key=lambda way: way.offer.cost, default=None)
        if best is None:
            way = less[0] if cheap is None else cheap
            return way, f"no full answer within {asked.within_s * 1e3:.0f} ms is allowed"
        if cheap is not None and best.offer.cost > self._settings.premium * cheap.offer.cost:
            return cheap, f"{best.offer.place} costs {best.offer.cost:.2g}, above {self._settings.premium:g} x {cheap.offer.cost:.2g}"
        return best, "cheapest of " + ", ".join(f"{way.offer.place} {way.offer.cost:.2g}" for way in full)

    def _nowhere(self, tags: Tags, reasons: list[str], until: float, size_bytes: int) -> Decision:
        route = Route.DEFERRED if tags.accept_deferral else Route.REFUSED
        return Decision(route, 0.0, "; ".join(reasons) or "no place has it", until, size_bytes, Cost(0.0))

    def _ways(self, prospect: Prospect, size_bytes: int, now: float) -> tuple[list[_Way], list[str]]:
        """What each place could do, nearest first; and why the others cannot (rule 2)."""
        samples = max(1.0, size_bytes / prospect.sample_bytes) if prospect.sample_bytes else 1.0
        ways, closed = [], []
        if prospect.edge is None:
            closed.append("edge: no capacity")
        else:
            edge, cost = prospect.edge, edge_cost(self._prices, prospect.edge.answers_per_s, samples)
            ways.append(_Way(Offer(Place.EDGE, edge.mode, edge.version, edge.latency_s, cost.of(0)), cost))
        unreachable = self._unreachable(prospect.cloud)
        if unreachable or prospect.cloud is None:
            closed.append(f"cloud: {unreachable}")
            return ways, closed
        for way in self._beyond(prospect.cloud, samples, size_bytes, now):
            if way.offer.latency_s <= self._settings.cloud_deadline_s:
                ways.append(way)
            else:
                closed.append(
                    f"{way.offer.place}: {way.offer.latency_s * 1e3:.0f} ms, deadline {self._settings.cloud_deadline_s * 1e3:.0f} ms"
                )
        return ways, closed

    def _unreachable(self, cloud: Cloud | None) -> str:
        if cloud is None:
            return "does not have it"
        if self._uplink.state is LinkState.PARTITIONED:
            return "partitioned"
        return "breaker open" if self._uplink.breaker_open else ""

    def _beyond(self, cloud: Cloud, samples: float, size_bytes: int, now: float) -> list[_Way]:
        ways, uplink = [], self._uplink
        if cloud.features_s is not None:
            sent = samples * cloud.feature_bytes
            cost = split_cost(self._prices, cloud.features_s, cloud.head_s, now, samples)
            latency_s = samples * (cloud.features_s + cloud.head_s) + uplink.rtt_s + sent / uplink.bytes_s
            ways.append(_Way(Offer(Place.SPLIT, Mode.CLOUD, cloud.version, latency_s, cost.of(sent)), cost))
        cost = cloud_cost(self._prices, cloud.duration_s, now, samples)
        latency_s = samples * cloud.duration_s + uplink.rtt_s + size_bytes / uplink.bytes_s
        ways.append(_Way(Offer(Place.CLOUD, Mode.FULL, cloud.version, latency_s, cost.of(size_bytes)), cost))
        return ways


def _near(old: object, new: object, by: float) -> bool:
    """Whether two records, as nested tuples, are alike: numbers to within the share `by`, all else exactly."""
    if isinstance(old, float) and isinstance(new, float):
        return old == new or abs(new - old) <= by * abs(old)
    if isinstance(old, tuple) and isinstance(new, tuple):
        return len(old) == len(new) and all(_near(one, other, by) for one, other in zip(old, new, strict=True))
    return old == new


def _is_full(offer: Offer, asked: Asked) -> bool:
    """Whether this is what was asked for: not a cheaper mode, and within the SLO."""
    return (offer.mode is Mode.FULL or offer.place is Place.SPLIT) and offer.latency_s <= asked.within_s
