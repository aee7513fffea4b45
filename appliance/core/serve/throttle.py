"""Which throttling is real now, told from the alerts and counters of a board, raised once and cleared once.

1. An alert that the kernel raises is real as long as it stands; it counts as gone after `HOLD_S` without it, so a flickering one is one.
2. oc1 (under-voltage) and oc2 (average over-current): each new event is real for `HOLD_S`.
3. oc3 (instantaneous over-current) counts 1 to 30 times a second on an idle Orin Nano Super, each a millisecond at half clocks, some 0.5 % of
   the work: it is real only above `OC3_RATE` per second for `OC3_SUSTAINED_S`. (Field reports; NVIDIA's staff call it expected.)
4. A counter that went back was reset by a boot and starts anew; what happened before the first reading is not news.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from appliance.contract.vitals import BoardReading

HOLD_S = 10.0
OC3_RATE = 20.0
OC3_SUSTAINED_S = 60.0

CAUSES: Mapping[str, tuple[str, str]] = {
    "oc1": ("under_voltage", "the supply sags: check power adapter and cable"),
    "oc2": ("over_current", "average current above the module's limit: choose a lower power mode"),
    "oc3": ("over_current_peaks", "sustained current peaks: choose a lower power mode or a stronger supply"),
    "hot-surface-alert": ("hot_surface", "the enclosure's surface is too hot: check fan and airflow"),
    "*-throttle-alert": ("soctherm", "the chip's own thermal throttling: check fan and airflow"),
    "devfreq-*": ("software_clamp", "the kernel holds the GPU's clock down for heat"),
    "cpufreq-*": ("software_clamp", "the kernel holds the CPU's clock down for heat"),
    "cpu-clock-clamped": ("hardware_clamp", "the hardware holds the CPU's clock below what the kernel asked for: power-cycle the board"),
}
"""By the kernel's name (a pattern): the cause's name, fit for a metric label, and what an operator should do."""


@dataclass(frozen=True, slots=True)
class Raised:
    """A critical alert: this throttling has begun. `source` is the kernel's name, `remedy` an operator's words."""

    cause: str
    source: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Cleared:
    """This throttling has ended."""

    cause: str
    source: str


class ThrottleWatch:
    """Watches one board. `causes` holds the names of the causes that are real now."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._counted_at: float | None = None
        self._fast_since: float | None = None

    @property
    def causes(self) -> frozenset[str]:
        """The causes that are real now."""
        return frozenset(_explain(source)[0] for source in self._until)

    def observe(self, reading: BoardReading, now: float) -> list[Raised | Cleared]:
        """Take a reading in and say what has begun and what has ended."""
        seen = [*reading.throttle_causes, *self._counted(reading.over_current_events or {}, now)]
        told: list[Raised | Cleared] = []
        for source in seen:
            if source not in self._until:
                told.append(Raised(_explain(source)[0], source, _explain(source)[1]))
            self._until[source] = now + HOLD_S
        for source in [source for source, until in self._until.items() if until <= now]:
            del self._until[source]
            told.append(Cleared(_explain(source)[0], source))
        return told

    def _counted(self, counts: Mapping[str, int], now: float) -> list[str]:
        elapsed = None if self._counted_at is None else now - self._counted_at
        grown = {name: count - self._counts[name] for name, count in counts.items() if name in self._counts}
        self._counts, self._counted_at = dict(counts), now
        if not elapsed or elapsed <= 0:
            return []
        if grown.get("oc3", 0) / elapsed <= OC3_RATE:
            self._fast_since = None
        elif self._fast_since is None:
            self._fast_since = now - elapsed
        real = [name for name, growth in grown.items() if growth > 0 and name != "oc3"]
        sustained = self._fast_since is not None and now - self._fast_since >= OC3_SUSTAINED_S
        return [*real, "oc3"] if sustained else real


def _explain(source: str) -> tuple[str, str]:
    if source in CAUSES:
        return CAUSES[source]
    return next((words for pattern, words in CAUSES.items() if _matches(source, pattern)), ("unknown", f"the board reports {source}"))


def _matches(source: str, pattern: str) -> bool:
    head, star, tail = pattern.partition("*")
    return bool(star) and source.startswith(head) and source.endswith(tail)
