"""Where a request may go: one rule after the other, and the one that nothing overrides."""

from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.inference import Tags
from appliance.contract.vocabulary import Mode
from appliance.core.reach.affinity import STRETCH, Asked, Offer, Place, allowed, places, refusal

ALL = [Offer(place, Mode.CLOUD if place is Place.SPLIT else Mode.FULL, "7", 0.1, 1e-5) for place in Place]
EVERYWHERE = set(Place)


def gone_to(asked: Asked, offers: list[Offer] | None = None) -> set[Place]:
    """The places that may answer."""
    return {offer.place for offer in allowed(asked, ALL if offers is None else offers).offers}


@pytest.mark.parametrize(
    ("residency", "where"),
    [
        ("", EVERYWHERE),
        ("device", {Place.EDGE}),
        ("region", {Place.EDGE, Place.NEIGHBOUR}),
        ("regoin", {Place.EDGE}),
        ("DEVICE", {Place.EDGE}),
        ("eu", {Place.EDGE}),
    ],
)
def test_residency(residency: str, where: set[Place]) -> None:
    """Device, region or anywhere; a word that nobody knows is the strictest, never the freest."""
    assert places(residency) == where
    assert gone_to(Asked(Tags(data_residency=residency))) == where


OFFERS = st.lists(
    st.builds(
        Offer,
        st.sampled_from(Place),
        st.sampled_from(Mode),
        st.sampled_from(["", "7", "8"]),
        st.floats(allow_nan=True, allow_infinity=True),
        st.floats(allow_nan=True, allow_infinity=True),
    ),
    max_size=10,
)
TAGS = st.builds(
    Tags,
    timeout_s=st.none() | st.floats(0, 1),
    slo_s=st.none() | st.floats(0, 1),
    accept_degradation=st.booleans(),
    accept_deferral=st.booleans(),
    data_residency=st.sampled_from(["", "device", "region", "moon"]),
    max_cost=st.none() | st.floats(0, 1),
)
ASKED = st.builds(Asked, TAGS, st.sampled_from(["", "7"]), st.floats(0, 1))


@given(ASKED, OFFERS)
def test_no_rule_is_ever_broken(asked: Asked, offers: list[Offer]) -> None:
    """For any request and any offers, nonsense numbers too: what is allowed keeps every tag, what is not is named with a reason."""
    judged = allowed(asked, offers)
    tags = asked.tags
    for offer in judged.offers:
        assert offer.place in places(tags.data_residency)
        assert asked.version in {"", offer.version}
        assert tags.accept_degradation or (offer.mode is Mode.FULL and offer.place is not Place.SPLIT)
        assert offer.latency_s <= asked.within_s * (STRETCH if offer.place is Place.EDGE else 1)
        assert tags.timeout_s is None or offer.latency_s <= tags.timeout_s
        assert tags.max_cost is None or offer.cost <= tags.max_cost
    assert len(judged.offers) + len(judged.refusals) == len(offers)
    assert all(why for _, why in judged.refusals)


@given(ASKED, OFFERS)
def test_what_is_refused_breaks_a_rule(asked: Asked, offers: list[Offer]) -> None:
    """Nothing is refused for no reason: the same offer without limits is allowed."""
    for offer, _ in allowed(asked, offers).refusals:
        if offer.latency_s == offer.latency_s:  # nan is no latency
            assert refusal(Asked(Tags()), offer) == ""


def test_each_rule_says_why() -> None:
    """The words that an operator reads, in the order of the rules."""
    offer = Offer(Place.CLOUD, Mode.FULL, "7", 0.2, 2e-5)
    slow = Tags(data_residency="device", slo_s=0.1, max_cost=1e-5)
    assert refusal(Asked(slow, "8"), offer) == "data residency 'device'"
    assert refusal(Asked(Tags(slo_s=0.1), "8"), offer) == "version '7', asked for '8'"
    assert refusal(Asked(Tags(slo_s=0.1, max_cost=1e-5)), offer) == "200 ms, limit 100 ms"
    assert refusal(Asked(Tags(max_cost=1e-5)), offer) == "costs 2e-05, limit 1e-05"
    assert refusal(Asked(Tags(accept_degradation=False)), Offer(Place.EDGE, Mode.MINIMAL, "7", 0.0, 0.0)) == "mode C is degraded"
    assert refusal(Asked(Tags(accept_degradation=False)), Offer(Place.SPLIT, Mode.FULL, "7", 0.0, 0.0)).endswith("is degraded")
    assert refusal(Asked(Tags(max_cost=1.0)), Offer(Place.EDGE, Mode.FULL, "7", 0.0, nan)).startswith("costs nan")


def test_only_the_device_stretches_the_slo_and_nobody_the_wall() -> None:
    """100 ms asked for: the device may take 150, the cloud may not; a time-out of 120 ms holds for both."""
    offers = [Offer(place, Mode.FULL, "7", 0.140, 0.0) for place in Place]
    assert gone_to(Asked(Tags(slo_s=0.1)), offers) == {Place.EDGE}
    assert gone_to(Asked(Tags(slo_s=0.1, timeout_s=0.12)), offers) == set()
    assert gone_to(Asked(Tags(), slo_s=0.1), offers) == {Place.EDGE}
    assert gone_to(Asked(Tags(slo_s=0.2), slo_s=0.1), offers) == EVERYWHERE
