"""The metrics that an operator scrapes, in Prometheus' text format. A metric that nothing feeds yet is absent rather than zero."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client import Metric as Family
from prometheus_client.metrics import MetricWrapperBase

from appliance.contract.vocabulary import LinkState, Mode, Outcome

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table: name, type, what it says, its labels; the unit is the name's, as Prometheus wants it."""

    name: str
    kind: str
    says: str
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """`seconds`, `bytes`, `ratio`, or empty for a count and for a state."""
        last = self.name.rpartition("_")[2]
        return last if last in {"seconds", "bytes", "ratio"} else ""


METRICS = (
    Metric("inference_latency_seconds", "histogram", "Seconds from arrival to answer.", ("model", "mode")),
    Metric("inference_requests_total", "counter", "Requests by what became of them.", ("model", "reason")),
    Metric("inference_mode", "gauge", "1 for the mode in which a model is served, 0 for the others.", ("model", "mode")),
    Metric("mode_changes_total", "counter", "Changes of mode, by the pressure that made them.", ("model", "before", "after", "cause")),
    Metric("pressure_ratio", "gauge", "How close to its limit: 0.85 is high, 0.95 critical.", ("kind",)),
    Metric("batch_limit", "gauge", "The largest batch that heat allows now.", ("model",)),
    Metric("worker_losses_total", "counter", "Inference processes that were lost, by cause.", ("cause",)),
    Metric("worker_memory_bytes", "gauge", "Memory of an inference process (PSS), and of its shared tensors.", ("worker", "kind")),
    Metric("deferred_dropped_total", "counter", "Items of the durable queue that were dropped, by class and reason.", ("kind", "reason")),
    Metric("batch_utilization_ratio", "gauge", "Share of the largest batch that the last batch filled.", ("model",)),
    Metric("vram_fragmentation_ratio", "gauge", "Share of what a resting inference process holds that nothing loaded needs."),
    Metric("thermal_throttle_events_total", "counter", "How often the clock was lowered, by cause.", ("cause",)),
    Metric("model_version_freshness_seconds", "gauge", "Age of the release that serves.", ("model",)),
    Metric("partition_state", "gauge", "1 for the state that a hop is in, 0 for the others.", ("hop", "state")),
    Metric("gradient_compression_ratio", "gauge", "Raw size over sent size of model updates."),
)
"""Documented in docs/metrics.md; a test compares both."""


class Meter:
    """All metrics of one daemon, in a registry of its own. Label children are kept, so that a count costs a few microseconds."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._registry = CollectorRegistry()
        self._families: dict[str, MetricWrapperBase] = {}
        self._latency: dict[tuple[str, Mode], Histogram] = {}
        self._requests: dict[tuple[str, Outcome], Counter] = {}
        self._fill: dict[str, Gauge] = {}

    def answered(self, model: str, mode: Mode, seconds: float) -> None:
        """One request was answered after so many seconds."""
        child = self._latency.get((model, mode))
        if child is None:
            child = self._latency[model, mode] = self._histogram("inference_latency_seconds").labels(model, mode.value)
        child.observe(seconds)
        self._count(model, Outcome.ANSWERED)

    def failed(self, model: str, outcome: Outcome) -> None:
        """One request was not answered, and why."""
        self._count(model, outcome)

    def batch(self, model: str, utilization: float) -> None:
        """A batch ran with this share (0..1) of its largest size."""
        child = self._fill.get(model)
        if child is None:
            child = self._fill[model] = self._gauge("batch_utilization_ratio").labels(model)
        child.set(utilization)

    def released(self, model: str, released_at: float) -> None:
        """A version that was released at this wall time serves now; its age is computed at each scrape."""
        self._gauge("model_version_freshness_seconds").labels(model).set_function(lambda: max(self._wall() - released_at, 0.0))

    def link(self, hop: str, state: LinkState) -> None:
        """A hop is in this state now."""
        for each in LinkState:
            self._gauge("partition_state").labels(hop, each.value).set(float(each is state))

    def mode(self, model: str, mode: Mode) -> None:
        """A model is served in this mode now."""
        for each in Mode:
            self._gauge("inference_mode").labels(model, each.value).set(float(each is mode))

    def shifted(self, model: str, before: Mode, after: Mode, cause: str) -> None:
        """A model's mode changed, by this kind of pressure."""
        self._family("mode_changes_total", Counter).labels(model, before.value, after.value, cause).inc()

    def pressed(self, kind: str, ratio: float) -> None:
        """A pressure, 0 to 1."""
        self._gauge("pressure_ratio").labels(kind).set(ratio)

    def limited(self, model: str, batch: int) -> None:
        """The largest batch that heat allows a model now."""
        self._gauge("batch_limit").labels(model).set(batch)

    def lost(self, cause: str) -> None:
        """An inference process was lost."""
        self._family("worker_losses_total", Counter).labels(cause).inc()

    def worker(self, number: int, pss_bytes: int | None, arena_bytes: int) -> None:
        """What an inference process holds now."""
        family = self._gauge("worker_memory_bytes")
        family.labels(str(number), "arena").set(arena_bytes)
        if pss_bytes is not None:
            family.labels(str(number), "pss").set(pss_bytes)

    def dropped(self, kind: str, reason: str) -> None:
        """An item of the durable queue was given up."""
        self._family("deferred_dropped_total", Counter).labels(kind, reason).inc()

    def throttled(self, cause: str) -> None:
        """The clock was lowered once, by this cause."""
        family = self._family("thermal_throttle_events_total", Counter)
        family.labels(cause).inc()

    def fragmented(self, ratio: float) -> None:
        """Share (0..1) of what a resting process holds that nothing loaded in it needs."""
        self._gauge("vram_fragmentation_ratio").set(ratio)

    def compressed(self, ratio: float) -> None:
        """Raw size over sent size of the last model update."""
        self._gauge("gradient_compression_ratio").set(ratio)

    def render(self) -> bytes:
        """The exposition, Prometheus text format 0.0.4."""
        return generate_latest(self)

    def collect(self) -> Iterator[Family]:
        """The families as the table names them: without the `_created` series that the library adds to each counter."""
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family

    def _count(self, model: str, outcome: Outcome) -> None:
        child = self._requests.get((model, outcome))
        if child is None:
            child = self._requests[model, outcome] = self._family("inference_requests_total", Counter).labels(model, outcome.value)
        child.inc()

    def _histogram(self, name: str) -> Any:
        return self._family(name, functools.partial(Histogram, buckets=LATENCY_BUCKETS_S))

    def _gauge(self, name: str) -> Any:
        return self._family(name, Gauge)

    def _family(self, name: str, make: Callable[..., MetricWrapperBase]) -> Any:
        """The metric of this name, made when it is first fed."""
        found = self._families.get(name)
        if found is None:
            metric = next(each for each in METRICS if each.name == name)
            found = self._families[name] = make(metric.name, metric.says, metric.labels, registry=self._registry)
        return found
