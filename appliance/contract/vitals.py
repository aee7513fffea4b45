"""What a device says of itself: measured board readings, periodic vitals, and events worth telling once."""

from dataclasses import dataclass
from typing import ClassVar

import msgspec

from appliance.contract.codec import Message
from appliance.contract.vocabulary import LinkState, Mode


@dataclass(frozen=True, slots=True)
class BoardReading:
    """One reading of the board. Temperatures in degrees Celsius by zone name, memory in bytes, clocks in Hz.

    A quantity that this board cannot measure is None or absent, never zero.

    Attributes:
        throttle_causes: alerts that are raised now (`gpu-throttle-alert`, `hot-surface-alert`, …), by the kernel's name.
        over_current_events: cumulative counters since boot by name (`oc1`, `oc2`, `oc3`); core.serve.throttle says what they mean.
        gpu_memory_used_bytes: what this appliance's processes hold on the GPU; on a discrete one, what everybody holds.
        gpu_memory_total_bytes: all memory of a discrete GPU; None where the GPU uses the system's.
        largest_free_block_bytes: number times size of the largest free blocks (tegrastats `lfb 9x4MB`).
        passive_trip_c: the lowest passive trip point, as read from the zones.
        gpu_load: 0 to 1; a clock below its cap means throttling only under load.
    """

    temperatures_c: dict[str, float]
    memory_total_bytes: int
    memory_available_bytes: int
    throttle_causes: tuple[str, ...] = ()
    gpu_clock_hz: float | None = None
    gpu_clock_cap_hz: float | None = None
    memory_psi_some_avg10: float | None = None
    over_current_events: dict[str, int] | None = None
    gpu_memory_used_bytes: int | None = None
    gpu_memory_total_bytes: int | None = None
    largest_free_block_bytes: int | None = None
    passive_trip_c: float | None = None
    gpu_load: float | None = None

    @property
    def hottest_c(self) -> float | None:
        """The hottest zone, or None where no zone can be read."""
        return max(self.temperatures_c.values(), default=None)


class Vitals(Message, frozen=True, tag="vitals"):
    """A device's heartbeat: `seq` counts from 1 after each start, `interval_s` says when the next one is due.

    Latencies are of the last 30 s, in milliseconds; counters are since start. None means not measured. `mode` is the least of
    `modes`, which has one for each model; `why` says what made it. `capacity` is what it can answer of each model now, in samples a second.
    """

    limit: ClassVar[int] = 4_096
    device: str
    seq: int
    interval_s: float
    uptime_s: float
    mode: Mode
    link: LinkState
    model: str
    model_version: str
    answered: int
    failed: int
    rate_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    temperature_c: float | None
    memory_used_bytes: int
    memory_total_bytes: int
    rotations: int
    modes: dict[str, Mode] = msgspec.field(default_factory=dict)
    why: str = ""
    capacity: dict[str, float] = msgspec.field(default_factory=dict)


class Beat(Message, frozen=True, tag="beat"):
    """A sign of life of who stands above: region to its devices, cloud to its regions. `seq` counts from 1 after each start.

    `upstream` is how the sender's own way upwards is (the cloud has none: HEALTHY).
    """

    limit: ClassVar[int] = 512
    seq: int
    interval_s: float
    upstream: LinkState


class Ping(Message, frozen=True, tag="ping"):
    """Are you there? Asked when somebody has fallen silent; answered by the same."""

    limit: ClassVar[int] = 512
    id: int


class Event(Message, frozen=True, tag="event"):
    """Something that happened once: `what` is a past-tense phrase in snake_case, `fields` its data as text."""

    device: str
    seq: int
    at: float
    what: str
    fields: dict[str, str]
