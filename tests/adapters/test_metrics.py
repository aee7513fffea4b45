"""What an operator scrapes: the names of the table, nothing that nobody fed, and cheap enough for every request."""

import timeit
from collections.abc import Callable

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from appliance.adapters.metrics import LATENCY_BUCKETS_S, METRICS, Meter
from appliance.contract.vocabulary import LinkState, Mode, Outcome

FEEDS: dict[str, Callable[[Meter], None]] = {
    "inference_latency_seconds": lambda meter: meter.answered("reader", Mode.FULL, 0.02),
    "inference_requests_total": lambda meter: meter.failed("reader", Outcome.MALFORMED),
    "inference_mode": lambda meter: meter.mode("reader", Mode.MINIMAL),
    "mode_changes_total": lambda meter: meter.shifted("reader", Mode.FULL, Mode.CONSTRAINED, "heat"),
    "pressure_ratio": lambda meter: meter.pressed("memory", 0.9),
    "batch_limit": lambda meter: meter.limited("reader", 4),
    "worker_losses_total": lambda meter: meter.lost("hang"),
    "worker_memory_bytes": lambda meter: meter.worker(0, 1 << 20, 1 << 10),
    "deferred_dropped_total": lambda meter: meter.dropped("telemetry", "expired"),
    "batch_utilization_ratio": lambda meter: meter.batch("reader", 0.5),
    "vram_fragmentation_ratio": lambda meter: meter.fragmented(0.25),
    "thermal_throttle_events_total": lambda meter: meter.throttled("oc1"),
    "model_version_freshness_seconds": lambda meter: meter.released("reader", 40.0),
    "partition_state": lambda meter: meter.link("region", LinkState.DEGRADED),
    "gradient_compression_ratio": lambda meter: meter.compressed(200.0),
}


def families(meter: Meter) -> dict[str, Family]:
    """What a scraper reads, by the name that the table gives it."""
    found = text_string_to_metric_families(meter.render().decode())
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in found}


def values(meter: Meter, name: str) -> dict[tuple[str, ...], float]:
    """A family's values by its labels' values."""
    return {tuple(sample.labels.values()): sample.value for sample in families(meter)[name].samples}


def test_what_nothing_feeds_is_absent() -> None:
    """A metric that is not measured here is not shown as zero."""
    assert Meter(lambda: 0.0).render() == b""


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_each_metric_appears_alone_when_it_is_fed(metric: object) -> None:
    """Feeding one shows it as the table says (type, help, labels), and nothing besides but the count that goes with an answer."""
    row = next(each for each in METRICS if each is metric)
    meter = Meter(lambda: 100.0)
    FEEDS[row.name](meter)
    seen = families(meter)
    assert set(seen) - {row.name} <= ({"inference_requests_total"} if row.name == "inference_latency_seconds" else set())
    assert (seen[row.name].type, seen[row.name].documentation) == (row.kind, row.says)
    for sample in seen[row.name].samples:
        assert set(sample.labels) - {"le"} == set(row.labels)


def test_the_table_is_what_was_promised() -> None:
    """The names are those that were promised, each with a feed, and a unit where it has one."""
    assert {metric.name for metric in METRICS} == set(FEEDS)
    assert {metric.name: metric.unit for metric in METRICS if metric.unit} == {
        "inference_latency_seconds": "seconds",
        "model_version_freshness_seconds": "seconds",
        "batch_utilization_ratio": "ratio",
        "pressure_ratio": "ratio",
        "worker_memory_bytes": "bytes",
        "vram_fragmentation_ratio": "ratio",
        "gradient_compression_ratio": "ratio",
    }


def test_latency_falls_into_its_bucket() -> None:
    """The buckets are the promised ones; a value on an edge belongs below it."""
    meter = Meter(lambda: 0.0)
    for seconds in (0.005, 0.03, 0.7):
        meter.answered("reader", Mode.FULL, seconds)
    samples = families(meter)["inference_latency_seconds"].samples
    buckets = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert tuple(float(edge) for edge in buckets)[:-1] == LATENCY_BUCKETS_S == (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
    assert list(buckets.values()) == [1, 1, 1, 2, 2, 2, 2, 3]
    assert {sample.value for sample in samples if sample.name.endswith("_sum")} == {0.735}
    assert not [sample.name for sample in samples if sample.name.endswith("_created")]


def test_outcomes_are_counted_by_model_and_reason() -> None:
    """Answers and refusals stand in one family, told apart by the vocabulary's words."""
    meter = Meter(lambda: 0.0)
    meter.answered("reader", Mode.FULL, 0.01)
    meter.answered("reader", Mode.CONSTRAINED, 0.01)
    for _ in range(3):
        meter.failed("-", Outcome.UNKNOWN_MODEL)
    assert values(meter, "inference_requests_total") == {("reader", "answered"): 2.0, ("-", "unknown_model"): 3.0}


def test_exactly_one_state_of_a_hop_is_set() -> None:
    """The three series of a hop say where it is now, whatever it was before."""
    meter = Meter(lambda: 0.0)
    for state in (LinkState.HEALTHY, LinkState.PARTITIONED, LinkState.DEGRADED):
        meter.link("region", state)
    assert values(meter, "partition_state") == {("region", "HEALTHY"): 0.0, ("region", "DEGRADED"): 1.0, ("region", "PARTITIONED"): 0.0}


def test_freshness_ages_between_feeds() -> None:
    """A release grows older with the wall clock alone, and never younger than new."""
    now = 100.0
    meter = Meter(lambda: now)
    meter.released("reader", 40.0)
    assert values(meter, "model_version_freshness_seconds") == {("reader",): 60.0}
    now = 30.0
    assert values(meter, "model_version_freshness_seconds") == {("reader",): 0.0}


def test_two_meters_share_nothing() -> None:
    """No global registry: a second daemon in the process counts for itself."""
    one, other = Meter(lambda: 0.0), Meter(lambda: 0.0)
    one.throttled("oc1")
    assert other.render() == b""


def test_an_answer_costs_a_few_microseconds() -> None:
    """Counting must not be felt: 5 µs is the budget (2 µs measured); ten times that would be a lookup gone wrong."""
    meter = Meter(lambda: 0.0)
    best = min(timeit.repeat(lambda: meter.answered("reader", Mode.FULL, 0.004), number=1000, repeat=5)) / 1000
    assert best < 50e-6
