"""The router: a table of every rule, what a cached decision depends on, and that cost never beats a rule."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.inference import Tags
from appliance.contract.vocabulary import LinkState, Mode
from appliance.core.reach.affinity import Place
from appliance.core.reach.pricing import GB, SPOT_MAX_AGE_S, Prices, cloud_cost, edge_cost, split_cost
from appliance.core.reach.routing import ROUTES, Cloud, Decision, Edge, Prospect, Route, Router, Uplink

PRICES = Prices(spot_per_h=0.5, on_demand_per_h=2.0, egress_per_gb=0.09, device_per_h=0.05)
LINK = Uplink(LinkState.HEALTHY, rtt_s=0.030, bytes_s=5e6)
EDGE = Edge(Mode.FULL, "7", latency_s=0.040, answers_per_s=25.0)
CLOUD = Cloud("7", duration_s=0.005, features_s=0.010, head_s=0.003, feature_bytes=10_000)
PROSPECT = Prospect(150_000, slo_s=0.100, edge=EDGE, cloud=CLOUD)


@dataclass(frozen=True)
class Case:
    """One row: what is so, and the route that follows."""

    name: str
    expected: Route
    tags: Tags = field(default_factory=Tags)
    version: str = ""
    edge: Edge | None = EDGE
    cloud: Cloud | None = CLOUD
    link: Uplink = LINK
    prices: Prices = PRICES
    why: str = ""


LATE = replace(EDGE, latency_s=0.140)
CHEAP_CLOUD = replace(PRICES, spot_per_h=0.01, egress_per_gb=0.0)
CHEAP_EGRESS = replace(PRICES, device_per_h=5.0, egress_per_gb=0.2)
CASES = [
    Case("the device is cheapest", Route.EDGE_FULL, why="cheapest of edge"),
    Case("the cloud is cheapest", Route.CLOUD_FULL, prices=CHEAP_CLOUD),
    Case("egress makes features cheaper than the input", Route.SPLIT, prices=CHEAP_EGRESS),
    Case("the device is late, the cloud is not", Route.SPLIT, edge=LATE),
    Case(
        "... and there is no feature extractor",
        Route.CLOUD_FULL,
        edge=LATE,
        cloud=replace(CLOUD, features_s=None),
        prices=replace(PRICES, egress_per_gb=0.005),
    ),
    Case("... and the cloud costs 25 times as much", Route.EDGE_CONSTRAINED, edge=LATE, cloud=replace(CLOUD, features_s=None)),
    Case("the device is late and alone", Route.EDGE_CONSTRAINED, edge=LATE, cloud=None, why="no full answer within 100 ms"),
    Case(
        "... by more than half of the SLO", Route.REFUSED, edge=replace(EDGE, latency_s=0.151), cloud=None, why="edge: 151 ms, limit 150 ms"
    ),
    Case("a cheaper mode, and the cloud is not dear", Route.SPLIT, edge=replace(EDGE, mode=Mode.CONSTRAINED)),
    Case(
        "a cheaper mode, and the cloud costs more than the premium",
        Route.EDGE_CONSTRAINED,
        edge=replace(EDGE, mode=Mode.CONSTRAINED),
        prices=replace(PRICES, spot_per_h=40.0),
        why="above 4 x",
    ),
    Case(
        "... but degradation is not welcome",
        Route.CLOUD_FULL,
        Tags(accept_degradation=False),
        edge=replace(EDGE, mode=Mode.CONSTRAINED),
        prices=replace(PRICES, spot_per_h=40.0),
    ),
    Case("mode D: no capacity here", Route.SPLIT, edge=None),
    Case("residency: the cloud is cheaper and forbidden", Route.EDGE_FULL, Tags(data_residency="device"), prices=CHEAP_CLOUD),
    Case("residency: the device is late", Route.EDGE_CONSTRAINED, Tags(data_residency="region"), edge=LATE),
    Case("residency: no capacity here", Route.REFUSED, Tags(data_residency="device"), edge=None, why="cloud: data residency 'device'"),
    Case("... and a promise is welcome", Route.DEFERRED, Tags(data_residency="device", accept_deferral=True), edge=None),
    Case("partitioned", Route.EDGE_FULL, link=replace(LINK, state=LinkState.PARTITIONED), prices=CHEAP_CLOUD),
    Case(
        "partitioned, no capacity",
        Route.DEFERRED,
        Tags(accept_deferral=True),
        edge=None,
        link=Uplink(LinkState.PARTITIONED),
        why="partitioned",
    ),
    Case("degraded, but fast enough", Route.CLOUD_FULL, link=replace(LINK, state=LinkState.DEGRADED), prices=CHEAP_CLOUD),
    Case("breaker open", Route.EDGE_FULL, link=replace(LINK, breaker_open=True), prices=CHEAP_CLOUD),
    Case("slow link: features fit, the input does not", Route.SPLIT, edge=None, link=replace(LINK, bytes_s=1e6)),
    Case(
        "slow round trip: beyond the cloud's deadline",
        Route.REFUSED,
        Tags(slo_s=9.0),
        edge=None,
        link=replace(LINK, rtt_s=0.16),
        why="deadline 150 ms",
    ),
    Case("another version is only in the cloud", Route.CLOUD_FULL, version="8", cloud=replace(CLOUD, version="8", features_s=None)),
    Case("another version is nowhere", Route.DEFERRED, Tags(accept_deferral=True), version="9", why="version '7', asked for '9'"),
    Case("too dear for the caller", Route.REFUSED, Tags(max_cost=1e-9), why="costs"),
    Case("the device is cheap enough, the cloud is not", Route.EDGE_CONSTRAINED, Tags(max_cost=1e-6), edge=LATE),
    Case("a tight SLO of the caller", Route.EDGE_FULL, Tags(slo_s=0.041), prices=CHEAP_CLOUD),
    Case("a wall before everything", Route.REFUSED, Tags(timeout_s=0.010)),
    Case("no price known: the nearest", Route.EDGE_FULL, prices=Prices(0, 0, 0, 0)),
]


def router_of(case: Case) -> Router:
    """A router that knows what the case says."""
    router = Router()
    router.priced(case.prices)
    router.linked(case.link)
    router.able("m", replace(PROSPECT, edge=case.edge, cloud=case.cloud))
    return router


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rule(case: Case) -> None:
    """One row for each rule, with the words that an operator reads."""
    decision = router_of(case).route("m", case.version, case.tags, 150_000, 0.0)
    assert decision.route is case.expected
    assert case.why in decision.why
    assert decision.why


def test_every_route_is_in_the_table() -> None:
    """No route without a row; nothing that answers without a place."""
    assert {case.expected for case in CASES} == set(Route)
    assert set(ROUTES.values()) == set(Route) - {Route.DEFERRED, Route.REFUSED}


def test_an_unknown_model_goes_nowhere() -> None:
    """And says so."""
    assert "not known" in Router().route("m", "", Tags(), 1, 0.0).why


def decided(router: Router, now: float = 1.0, tags: Tags | None = None, size_bytes: int = 150_000) -> Decision:
    """One decision."""
    return router.route("m", "", tags or Tags(), size_bytes, now)


def test_a_decision_is_cached_for_thirty_seconds() -> None:
    """The same object until then, decided anew afterwards."""
    router = router_of(CASES[0])
    first = decided(router)
    assert decided(router, 30.9) is first
    assert router.decided == 1
    assert decided(router, 31.0) is not first


def test_a_cached_decision_falls_with_price_capacity_link_or_mode() -> None:
    """Each of them alone; the same values again, or a move below a tenth, change nothing."""
    changes = {
        "price": lambda router: router.priced(replace(PRICES, spot_per_h=0.51)),
        "state": lambda router: router.linked(replace(LINK, state=LinkState.DEGRADED)),
        "breaker": lambda router: router.linked(replace(LINK, breaker_open=True)),
        "round trip": lambda router: router.linked(replace(LINK, rtt_s=0.040)),
        "mode": lambda router: router.able("m", replace(PROSPECT, edge=replace(EDGE, mode=Mode.MINIMAL))),
        "capacity": lambda router: router.able("m", replace(PROSPECT, edge=replace(EDGE, latency_s=0.05))),
        "no capacity": lambda router: router.able("m", replace(PROSPECT, edge=None)),
        "gone": lambda router: router.gone("m"),
    }
    for name, change in changes.items():
        router = router_of(CASES[0])
        first = decided(router)
        router.priced(replace(PRICES, at=5.0))
        router.linked(replace(LINK, rtt_s=0.031))
        router.able("m", replace(PROSPECT, edge=replace(EDGE, latency_s=0.042)))
        assert decided(router) is first, name
        change(router)
        assert decided(router) is not first, name


def test_small_moves_add_up() -> None:
    """A queue that grows by 5 % ten times is noticed."""
    router, latency_s = router_of(CASES[0]), EDGE.latency_s
    first = decided(router)
    for _ in range(10):
        latency_s *= 1.05
        router.able("m", replace(PROSPECT, edge=replace(EDGE, latency_s=latency_s)))
    assert decided(router) is not first


def test_classes_of_tags_do_not_share_a_decision() -> None:
    """A cached cloud route is not given to a request that must stay."""
    router = router_of(CASES[1])
    assert decided(router).route is Route.CLOUD_FULL
    assert decided(router, tags=Tags(data_residency="device")).route is Route.EDGE_FULL


def test_max_cost_holds_for_the_actual_bytes() -> None:
    """A decision for a small input is not used for a larger one that would break the limit."""
    router = router_of(CASES[1])
    small = decided(router, size_bytes=140_000)
    limit = Tags(max_cost=small.cost * 1.001)
    assert decided(router, tags=limit, size_bytes=140_000).route is Route.CLOUD_FULL
    assert decided(router, tags=limit, size_bytes=200_000).route is Route.REFUSED
    assert decided(router, tags=limit, size_bytes=100_000).route is not None


def test_the_memory_is_bounded() -> None:
    """Callers that invent tags cannot make it grow."""
    router = router_of(CASES[0])
    for number in range(10_000):
        decided(router, tags=Tags(max_cost=1.0 + number))
    assert len(router._memo) <= 4_096


TAGS = st.builds(
    Tags,
    slo_s=st.none() | st.floats(0.001, 0.5),
    accept_degradation=st.booleans(),
    accept_deferral=st.booleans(),
    data_residency=st.sampled_from(["", "device", "region", "moon"]),
    max_cost=st.none() | st.floats(0, 1e-3),
)
EDGES = st.none() | st.builds(
    Edge, st.sampled_from([Mode.FULL, Mode.CONSTRAINED, Mode.MINIMAL]), st.just("7"), st.floats(0.001, 1), st.floats(0.1, 1e3)
)
CLOUDS = st.none() | st.builds(
    Cloud, st.just("7"), st.floats(0.001, 0.2), st.none() | st.floats(0.001, 0.2), st.floats(0, 0.1), st.integers(0, 10**6)
)
LINKS = st.builds(Uplink, st.sampled_from(LinkState), st.floats(0, 0.3), st.floats(1e4, 1e8), st.booleans())
PRICE = st.floats(0, 100)


@given(TAGS, EDGES, CLOUDS, LINKS, st.builds(Prices, PRICE, PRICE, PRICE, PRICE), st.integers(1, 10**7))
def test_cost_never_beats_a_rule(tags: Tags, edge: Edge | None, cloud: Cloud | None, link: Uplink, prices: Prices, size_bytes: int) -> None:  # noqa: PLR0917  # hypothesis passes them by position
    """For any world: residency, link, deadline and limits hold; a route says its cost and why; nowhere means that every place has a reason."""
    router = Router()
    router.priced(prices)
    router.linked(link)
    router.able("m", Prospect(150_000, 0.1, edge, cloud))
    decision = router.route("m", "", tags, size_bytes, 0.0)
    assert decision.why
    away = decision.route in {Route.SPLIT, Route.CLOUD_FULL}
    if away:
        assert tags.data_residency == ""
        assert cloud is not None
        assert link.state is not LinkState.PARTITIONED
        assert not link.breaker_open
    if decision.route is Route.SPLIT:
        assert tags.accept_degradation
    if decision.route is Route.EDGE_FULL:
        assert edge is not None
        assert edge.mode is Mode.FULL
    if decision.route is Route.EDGE_CONSTRAINED:
        assert edge is not None
        assert edge.mode is Mode.FULL or tags.accept_degradation
        assert edge.latency_s <= 1.5 * (tags.slo_s or 0.1)
    if decision.route not in {Route.DEFERRED, Route.REFUSED}:
        assert tags.max_cost is None or decision.cost <= tags.max_cost
    assert (decision.route is Route.DEFERRED) <= tags.accept_deferral


def test_costs_by_hand() -> None:
    """Edge amortised, cloud by the second and the byte, SPLIT by both; more samples cost more."""
    assert edge_cost(PRICES, 25.0).of(10**9) == pytest.approx(0.05 / 3_600 / 25)
    assert cloud_cost(PRICES, 0.005, 0.0).of(150_000) == pytest.approx(0.5 / 3_600 * 0.005 + 0.09 * 150_000 / GB)
    assert split_cost(PRICES, 0.010, 0.003, 0.0).of(10_000) == pytest.approx(
        0.05 / 3_600 * 0.010 + 0.5 / 3_600 * 0.003 + 0.09 * 10_000 / GB
    )
    assert cloud_cost(PRICES, 0.005, 0.0, samples=8).of(0) == pytest.approx(8 * 0.5 / 3_600 * 0.005)


def test_an_old_spot_price_is_not_trusted() -> None:
    """After a quarter of an hour the on-demand price counts."""
    assert PRICES.compute_per_s(SPOT_MAX_AGE_S) == pytest.approx(0.5 / 3_600)
    assert PRICES.compute_per_s(SPOT_MAX_AGE_S + 1) == pytest.approx(2.0 / 3_600)


def test_the_bytes_that_were_really_sent_are_paid() -> None:
    """Features that compressed well cost less than predicted."""
    decision = decided(router_of(CASES[2]))
    assert decision.route is Route.SPLIT
    assert decision.paid(10_000) == pytest.approx(decision.cost)
    assert decision.paid(1_000) == pytest.approx(decision.cost - 0.2 * 9_000 / GB)
    assert ROUTES[Place.EDGE, False] is Route.EDGE_CONSTRAINED
