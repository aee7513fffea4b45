"""How close the device is to its limits in memory, heat and queue: numbers from 0 to 1, and severities that do not flicker.

1. Memory is the largest of: 1 - MemAvailable/MemTotal (unified memory: cudaMemGetInfo under-reports after big file reads); GPU bytes over
   their budget, which on a discrete GPU is all of its memory; PSI `some avg10`, where 10 % is HIGH; the absolute floor of 768 MiB (an
   eighth of a small machine), where CRITICAL begins; few large blocks, never more than a warning, since `lfb 1x4MB` was seen on a board
   that worked well.
2. Heat is the largest of: the distance to the passive trip as read from the zones, HIGH 10 degrees below it; real throttling
   (`throttle`), HIGH at least; a GPU clock below its cap while the GPU is busy (an idle one is slow by right).
3. The queue is HIGH when 2 % of requests are refused; a queue that is merely full is not, since it is bounded and in time.
4. What cannot be measured gives no pressure. Each number says which part made it.
5. A severity begins at `enter` and ends below `leave`: a value must move by the distance to change it twice.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from appliance.contract.vitals import BoardReading

FLOOR_BYTES = 768 << 20
FLOOR_FRACTION = 0.125
BUSY_LOAD = 0.5

Curve = tuple[tuple[float, float], ...]

PSI_PERCENT: Curve = ((0, 0), (10, 0.85), (40, 1))
FREE_BLOCK_MIB: Curve = ((0, 0.8), (64, 0))
FLOOR_RATIO: Curve = ((0, 1), (0.8, 1), (1, 0.95), (1.5, 0.8), (3, 0))
TRIP_MARGIN_C: Curve = ((0, 1), (3, 0.95), (10, 0.85), (50, 0))
CLOCK_RATIO: Curve = ((0.3, 1), (0.6, 0.85), (0.95, 0))
REFUSED_RATIO: Curve = ((0, 0), (0.02, 0.85), (0.5, 0.95))
FULL_QUEUE = 0.8
THROTTLED = 0.9


class Severity(IntEnum):
    """How bad a pressure is; the order is meant."""

    CALM = 0
    HIGH = 1
    CRITICAL = 2


@dataclass(frozen=True, slots=True)
class Band:
    """A severity begins at `enter` and ends below `leave`."""

    enter: float
    leave: float


BANDS: Mapping[Severity, Band] = {Severity.HIGH: Band(0.85, 0.75), Severity.CRITICAL: Band(0.95, 0.90)}


@dataclass(frozen=True, slots=True, order=True)
class Level:
    """A pressure from 0 to 1, and the part that made it with its measured value."""

    value: float
    why: str


@dataclass(frozen=True, slots=True)
class Strain:
    """The worst of all gauges; `kind` names it."""

    severity: Severity
    kind: str
    level: Level


def memory(reading: BoardReading, gpu_budget_bytes: int | None = None, floor_bytes: int = FLOOR_BYTES) -> Level:
    """The memory pressure of a board (rule 1); `gpu_budget_bytes` is what models may hold of a memory that the GPU shares with the system."""
    total, available = reading.memory_total_bytes, reading.memory_available_bytes
    floor = min(floor_bytes, FLOOR_FRACTION * total)
    free = f"{available >> 20} MiB of {total >> 20} available"
    parts = [
        Level(_unit(1 - available / total), free),
        Level(along(FLOOR_RATIO, available / floor), f"{free}, floor {int(floor) >> 20} MiB"),
    ]
    gpu_limit_bytes = reading.gpu_memory_total_bytes or gpu_budget_bytes
    if gpu_limit_bytes and reading.gpu_memory_used_bytes is not None:
        used, whose = reading.gpu_memory_used_bytes, "its own" if reading.gpu_memory_total_bytes else "a budget of"
        parts.append(Level(_unit(used / gpu_limit_bytes), f"GPU holds {used >> 20} MiB of {whose} {gpu_limit_bytes >> 20}"))
    if reading.memory_psi_some_avg10 is not None:
        psi = reading.memory_psi_some_avg10
        parts.append(Level(along(PSI_PERCENT, psi), f"tasks stalled on memory {psi:.1f} % of the time"))
    if reading.largest_free_block_bytes is not None:
        block = reading.largest_free_block_bytes / (1 << 20)
        parts.append(Level(along(FREE_BLOCK_MIB, block), f"largest free blocks {block:.0f} MiB"))
    return max(parts, key=_value)


def heat(reading: BoardReading, causes: Collection[str] = ()) -> Level:
    """The heat pressure of a board (rule 2); `causes` are those of `throttle.ThrottleWatch`."""
    parts = [Level(0.0, "cool")]
    if reading.passive_trip_c is not None and reading.hottest_c is not None:
        margin = reading.passive_trip_c - reading.hottest_c
        parts.append(Level(along(TRIP_MARGIN_C, margin), f"{reading.hottest_c:.1f} C, {margin:.1f} below the passive trip"))
    if causes:
        parts.append(Level(THROTTLED, f"throttled: {', '.join(sorted(causes))}"))
    ratio = clock_ratio(reading)
    if ratio is not None:
        parts.append(Level(along(CLOCK_RATIO, ratio), f"GPU clock at {ratio:.0%} of its cap under load"))
    return max(parts, key=_value)


def queue(waiting: int, max_waiting: int, refused_ratio: float) -> Level:
    """The queue pressure (rule 3); `refused_ratio` is of the requests of about the last second."""
    full = Level(FULL_QUEUE * _unit(waiting / max_waiting), f"{waiting} of {max_waiting} places taken")
    return max(full, Level(along(REFUSED_RATIO, refused_ratio), f"{refused_ratio:.0%} of requests refused"), key=_value)


def clock_ratio(reading: BoardReading) -> float | None:
    """GPU clock over its cap, at most 1, while the GPU is busy; None if it is idle or nobody can tell."""
    if reading.gpu_clock_hz is None or not reading.gpu_clock_cap_hz or (reading.gpu_load or 0.0) < BUSY_LOAD:
        return None
    return min(1.0, reading.gpu_clock_hz / reading.gpu_clock_cap_hz)


class Gauges:
    """Severities with hysteresis, one for each kind of pressure that is ever shown to it."""

    def __init__(self, bands: Mapping[Severity, Band] = BANDS) -> None:
        self._bands = bands
        self._severities: dict[str, Severity] = {}

    def observe(self, levels: Mapping[str, Level]) -> Strain:
        """Take new levels in by kind (`memory`, `heat`, `queue`) and return the worst; equally severe: the highest value."""
        strains = []
        for kind, level in levels.items():
            severity = self._severities[kind] = self._step(self._severities.get(kind, Severity.CALM), level.value)
            strains.append(Strain(severity, kind, level))
        return max(strains, key=lambda strain: (strain.severity, strain.level.value))

    def _step(self, present: Severity, value: float) -> Severity:
        held = [severity for severity, band in self._bands.items() if value >= (band.leave if severity <= present else band.enter)]
        return max(held, default=Severity.CALM)


def along(curve: Curve, x: float) -> float:
    """Linear interpolation along ascending points, constant outside."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (low, low_value), (high, high_value) in pairwise(curve):
        if x <= high:
            return low_value + (high_value - low_value) * (x - low) / (high - low)
    return curve[-1][1]


def _value(level: Level) -> float:
    return level.value


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))
