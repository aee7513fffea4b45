"""Says where a request may go by its tags, before anybody asks what it costs.

API: `allowed(asked, offers) -> Allowed(offers, refusals)`; `Offer` is what one place could do for this model now.

1. Residency first: `device` never leaves the device, not as features either; `region` may also go to a neighbour or the region, never to the cloud.
   What is unknown as a residency is the strictest: a typing error must not export anybody's data.
2. A version that was asked for is answered by that version or not at all.
3. `accept_degradation` False: full mode only, and no feature split (its head saw features of another network).
4. Latency: predicted to answer within the SLO, which only this device may stretch, by `STRETCH`; and within the wall (`timeout_s`), which nobody may.
5. `max_cost`: no more than that, to the last digit.
6. Each refusal says why; the rules are looked at in this order, so a residency is named before a price.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from appliance.contract.inference import Tags
from appliance.contract.vocabulary import Mode

STRETCH = 1.5
"""How far the device may stretch the SLO (the route EDGE_CONSTRAINED)."""


class Place(StrEnum):
    """Where a request could be computed, nearest first."""

    EDGE = "edge"
    NEIGHBOUR = "neighbour"
    SPLIT = "split"
    CLOUD = "cloud"


RESIDENCY: Mapping[str, frozenset[Place]] = {
    "": frozenset(Place),
    "region": frozenset({Place.EDGE, Place.NEIGHBOUR}),
    "device": frozenset({Place.EDGE}),
}
STRICTEST = RESIDENCY["device"]


@dataclass(frozen=True, slots=True)
class Offer:
    """What one place could do: in this mode and version, after `latency_s` (predicted, with queue and round trip), for `cost` dollars."""

    place: Place
    mode: Mode
    version: str
    latency_s: float
    cost: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for: its tags, and the version (empty: the served one) and model's own SLO, which hold where the tags are silent."""

    tags: Tags
    version: str = ""
    slo_s: float = inf

    @property
    def within_s(self) -> float:
        """The SLO that holds for this request."""
        return self.slo_s if self.tags.slo_s is None else self.tags.slo_s


@dataclass(frozen=True, slots=True)
class Allowed:
    """The offers that break no rule, in their order; and for each of the others, why."""

    offers: tuple[Offer, ...]
    refusals: tuple[tuple[Offer, str], ...]


def places(residency: str) -> frozenset[Place]:
    """Where data with this residency may go."""
    return RESIDENCY.get(residency, STRICTEST)


def refusal(asked: Asked, offer: Offer) -> str:
    """Why this place may not answer; empty if it may."""
    tags = asked.tags
    wall_s = inf if tags.timeout_s is None else tags.timeout_s
    limit_s = min(asked.within_s * (STRETCH if offer.place is Place.EDGE else 1.0), wall_s)
    # The rules as a table, in the order in which they are named; written so that a latency or cost that is no number breaks them.
    rules = (
        (offer.place not in places(tags.data_residency), f"data residency {tags.data_residency!r}"),
        (bool(asked.version) and offer.version != asked.version, f"version {offer.version!r}, asked for {asked.version!r}"),
        (not tags.accept_degradation and (offer.mode is not Mode.FULL or offer.place is Place.SPLIT), f"mode {offer.mode} is degraded"),
        (not offer.latency_s <= limit_s, f"{offer.latency_s * 1e3:.0f} ms, limit {limit_s * 1e3:.0f} ms"),
        (tags.max_cost is not None and not offer.cost <= tags.max_cost, f"costs {offer.cost:.3g}, limit {tags.max_cost}"),
    )
    return next((why for broken, why in rules if broken), "")


def allowed(asked: Asked, offers: Iterable[Offer]) -> Allowed:
    """Part the offers into those that may answer and those that may not."""
    judged = [(offer, refusal(asked, offer)) for offer in offers]
    return Allowed(tuple(offer for offer, why in judged if not why), tuple((offer, why) for offer, why in judged if why))
