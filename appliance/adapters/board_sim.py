"""A board that does not exist (port `Board`): an RC thermal model with a stepping clock, or a recorded log played again.

1. Heat: C dT/dt = P - (T - ambient) / R, solved exactly over each step; P = idle + load * busy * (clock / full clock)^3 + injected.
   The cube: dynamic power is f V^2, and V rises about linearly with f over a DVFS ladder.
2. Clock: once per second one step down above `throttle_c`, one step up below `throttle_c` - 3; the ladder has ten steps, the lowest a third.
3. Load is a callable (0 to 1), or seconds of work reported by `busy`, spread over the time since the last reading.
4. Injection by method, or by a small JSON file: {"watts": 20, "memory_bytes": 4000000000, "ambient_c": 40}; a removed file ends it, a half-written
   one is ignored until it is whole.

Defaults are near an Orin Nano Super: 21.5 W at full load and 55 degrees (a recorded log); R, C and the ladder are fitted or assumed: synthetic.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from appliance.contract.errors import OursError
from appliance.contract.settings import Section
from appliance.contract.vitals import BoardReading

LADDER = tuple(round(0.325 + 0.075 * step, 3) for step in range(10))
STEP_S = 1.0
HYSTERESIS_C = 3.0
_MOST_STEPS = 3_600  # per reading: a day without readings is a coarser simulation, not a hang
_MOST_OWED_S = 10.0  # work reported ahead of time, as a batch is at its end, is spread over at most so long


class _Injection(msgspec.Struct, frozen=True):
    watts: float = 0.0
    memory_bytes: int = 0
    ambient_c: float | None = None


class SimBoard:
    """A simulated board. `monotonic` gives seconds; quantities carry their units in their names."""

    def __init__(
        self,
        monotonic: Callable[[], float],
        *,
        load: Callable[[], float] | None = None,
        control: str = "",
        ambient_c: float = 25.0,
        idle_w: float = 5.0,
        busy_w: float = 16.5,
        resistance_k_per_w: float = 1.4,
        capacity_j_per_k: float = 60.0,
        throttle_c: float = 99.0,
        full_clock_hz: float = 1.02e9,
        memory_mib: int = 7_607,
        resting_mib: int = 519,
    ) -> None:
        self._monotonic = monotonic
        self._load = load
        self._control = Path(control) if control else None
        self._control_seen: tuple[int, int] | None = None
        self._from_file = _Injection()
        self._from_methods = _Injection()
        self._ambient_c = ambient_c
        self._idle_w = idle_w
        self._busy_w = busy_w
        self._resistance = resistance_k_per_w
        self._capacity = capacity_j_per_k
        self._throttle_c = throttle_c
        self._full_clock_hz = full_clock_hz
        self._memory_total = memory_mib << 20
        self._memory_resting = resting_mib << 20
        self._temperature_c = ambient_c + idle_w * resistance_k_per_w
        self._step = len(LADDER) - 1
        self._since_step_s = 0.0
        self._owed_s = 0.0
        self._utilised = 0.0
        self._at = monotonic()

    @classmethod
    def from_settings(
        cls, sim: Section, monotonic: Callable[[], float] = time.monotonic, load: Callable[[], float] | None = None
    ) -> "SimBoard":
        """Make one from the section [sim] of a device's settings, whose keys are the parameters' names; `replay` is the caller's."""
        given = {name: value for name, value in msgspec.structs.asdict(sim).items() if name != "replay"}
        return cls(monotonic, load=load, **given)

    def busy(self, seconds: float) -> None:
        """Report work that was done, at the clock that it had."""
        self._owed_s = min(_MOST_OWED_S, self._owed_s + seconds)

    def inject(self, watts: float) -> None:
        """Add heat from outside (a blocked fan, the sun), until called again; negative cools."""
        self._advance()
        self._from_methods = msgspec.structs.replace(self._from_methods, watts=watts)

    def inject_memory(self, taken_bytes: int) -> None:
        """Take memory as another program would, until called again."""
        self._from_methods = msgspec.structs.replace(self._from_methods, memory_bytes=taken_bytes)

    @property
    def slowdown(self) -> float:
        """How much longer work takes at the present clock than at the full one; at least 1."""
        return 1.0 / LADDER[self._step]

    def read(self) -> BoardReading:
        """Simulate up to now and say what the sensors would."""
        self._advance()
        self._look_at_control()
        taken = self._memory_resting + self._from_file.memory_bytes + self._from_methods.memory_bytes
        causes = ["devfreq-17000000.gpu"] * (self._step < len(LADDER) - 1) + ["gpu-throttle-alert"] * (
            self._temperature_c > self._throttle_c
        )
        return BoardReading(
            temperatures_c={"tj": self._temperature_c},
            memory_total_bytes=self._memory_total,
            memory_available_bytes=min(self._memory_total, max(0, self._memory_total - taken)),
            throttle_causes=tuple(causes),
            gpu_clock_hz=LADDER[self._step] * self._full_clock_hz,
            gpu_clock_cap_hz=self._full_clock_hz,
            gpu_load=self._utilised,
            passive_trip_c=self._throttle_c,
        )

    def _advance(self) -> None:
        now = self._monotonic()
        elapsed, self._at = now - self._at, now
        if elapsed <= 0:
            return
        load = self._utilised = self._utilisation(elapsed)
        steps = min(_MOST_STEPS, math.ceil(elapsed / STEP_S))
        for _ in range(steps):
            self._warm(load, elapsed / steps)
            self._govern(elapsed / steps)

    def _utilisation(self, elapsed: float) -> float:
        if self._load:
            return min(1.0, max(0.0, self._load()))
        worked = min(elapsed, self._owed_s)
        self._owed_s -= worked
        return worked / elapsed

    def _warm(self, load: float, seconds: float) -> None:
        ambient = self._ambient_c if self._from_file.ambient_c is None else self._from_file.ambient_c
        watts = self._idle_w + load * self._busy_w * LADDER[self._step] ** 3 + self._from_file.watts + self._from_methods.watts
        settled = ambient + watts * self._resistance
        self._temperature_c = settled + (self._temperature_c - settled) * math.exp(-seconds / (self._resistance * self._capacity))

    def _govern(self, seconds: float) -> None:
        self._since_step_s += seconds
        if self._since_step_s < STEP_S:
            return
        self._since_step_s = 0.0
        if self._temperature_c > self._throttle_c:
            self._step = max(0, self._step - 1)
        elif self._temperature_c < self._throttle_c - HYSTERESIS_C:
            self._step = min(len(LADDER) - 1, self._step + 1)

    def _look_at_control(self) -> None:
        if not self._control:
            return
        try:
            status = self._control.stat()
            seen = (status.st_mtime_ns, status.st_size)
            if seen != self._control_seen:
                self._from_file = msgspec.json.decode(self._control.read_bytes(), type=_Injection)
                self._control_seen = seen
        except OSError:
            self._from_file, self._control_seen = _Injection(), None
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return  # half-written: the next reading looks again


class ReplayBoard:
    """Plays recorded readings, one every `interval_s`, from the first reading on and again from the start after the last."""

    def __init__(self, readings: Sequence[BoardReading], monotonic: Callable[[], float], interval_s: float = 1.0) -> None:
        if not readings or interval_s <= 0:
            raise OursError("replay", f"needs readings and a positive interval, got {len(readings)} and {interval_s}")
        self._readings = readings
        self._monotonic = monotonic
        self._interval_s = interval_s
        self._started = monotonic()

    def read(self) -> BoardReading:
        """The reading that was due now."""
        return self._readings[int((self._monotonic() - self._started) / self._interval_s) % len(self._readings)]
