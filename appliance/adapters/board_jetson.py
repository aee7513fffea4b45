"""A Jetson's own sensors (Orin and Thor) on top of any board's: its alerts, its over-current counters, the GPU's clock, load and memory.

1. An alert is a `*-alert` cooling device with a state above 0, or the clamp of Orin's GPU (`devfreq-17000000.gpu`). `pwm-fan` above 0 is a fan
   at work, and Thor's `devfreq-gpu-gpc-0` rests at 18 of 169: neither counts.
2. Over-current counters come from the hwmon chip *named* `soctherm_oc`, whose number changes from boot to boot. They are given as read:
   what they mean (oc3 ticks all the time) is decided in the core.
3. Only cpuinfo_cur_freq tells a hardware clamp (a Thor stuck at 242 MHz went on claiming 2601): a CPU whose real clock is below half of the
   claimed one in three readings in a row raises `cpu-clock-clamped`, three because oc3 halves the clock for a millisecond at a time.
   The file is readable by root only unless bsp/jetson's tmpfiles line opened it.
4. Every file is optional. Sources: the kernel's tegra soctherm driver and public field reports (bsp/jetson/README.md).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from appliance.contract.vitals import BoardReading
from appliance.ports import Board

CLAMPED_RATIO = 0.5
CLAMPED_READINGS = 3

_ORIN_CLAMP = "devfreq-17000000.gpu"
_GPU_CLOCKS = ("sys/class/devfreq/17000000.gpu", "sys/class/devfreq/gpu-gpc-0", "sys/devices/gpu.0/devfreq/17000000.gpu")
_GPU_LOADS = ("sys/devices/platform/bus@0/17000000.gpu/load", "sys/devices/platform/17000000.gpu/load", "sys/devices/gpu.0/load")


class JetsonBoard:
    """Adds a Jetson's readings to those of `plain`, any Linux board; `root` is where /proc and /sys are found."""

    def __init__(self, plain: Board, root: Path = Path("/")) -> None:
        self._plain = plain
        self._root = root
        self._slow_readings = 0

    def read(self) -> BoardReading:
        """Read all sensors now. Raises: WorldError (`board`) if not even memory can be read."""
        clock, cap = self._gpu_clock()
        return replace(
            self._plain.read(),
            throttle_causes=tuple(sorted({*self._alerts(), *self._cpu_clamp()})),
            gpu_clock_hz=clock,
            gpu_clock_cap_hz=cap,
            gpu_load=self._gpu_load(),
            gpu_memory_used_bytes=self._gpu_memory(),
            over_current_events=self._over_current(),
        )

    def _alerts(self) -> Iterator[str]:
        for device in (self._root / "sys/class/thermal").glob("cooling_device*"):
            kind = _text(device / "type").strip()
            if (kind.endswith("-alert") or kind == _ORIN_CLAMP) and (_integer(device / "cur_state") or 0) > 0:
                yield kind

    def _over_current(self) -> dict[str, int] | None:
        """The counters oc1, oc2, … since boot; None where the chip is absent."""
        for chip in (self._root / "sys/class/hwmon").glob("hwmon*"):
            if _text(chip / "name").strip() == "soctherm_oc":
                counts = {path.name.removesuffix("_event_cnt"): _integer(path) for path in chip.glob("oc*_event_cnt")}
                return {name: count for name, count in sorted(counts.items()) if count is not None}
        return None

    def _cpu_clamp(self) -> Iterator[str]:
        slow = False
        for policy in (self._root / "sys/devices/system/cpu/cpufreq").glob("policy*"):
            real, claimed = _integer(policy / "cpuinfo_cur_freq"), _integer(policy / "scaling_cur_freq")
            slow = slow or (real is not None and claimed is not None and real < CLAMPED_RATIO * claimed)
        self._slow_readings = self._slow_readings + 1 if slow else 0
        if self._slow_readings >= CLAMPED_READINGS:
            yield "cpu-clock-clamped"

    def _gpu_clock(self) -> tuple[float | None, float | None]:
        """Present clock and present cap in Hz."""
        for place in _GPU_CLOCKS:
            clock, cap = _integer(self._root / place / "cur_freq"), _integer(self._root / place / "max_freq")
            if clock is not None:
                return float(clock), None if cap is None else float(cap)
        return None, None

    def _gpu_load(self) -> float | None:
        """0 to 1; the file counts per mille."""
        for place in _GPU_LOADS:
            load = _integer(self._root / place)
            if load is not None:
                return min(1.0, load / 1000)
        return None

    def _gpu_memory(self) -> int | None:
        """NvMapMemUsed in bytes; Orin's kernels have it, not always, Thor's never."""
        for line in _text(self._root / "proc/meminfo").splitlines():
            if line.startswith("NvMapMemUsed:"):
                return int(line.split()[1]) * 1024
        return None


def _text(path: Path) -> str:
    """The file's text, or nothing: files come and go, and a gated sensor answers EAGAIN."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _integer(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None
