"""Any Linux machine's sensors (port `Board`): plain files below /proc and /sys, each optional but /proc/meminfo.

Sources: proc(5) for meminfo and buddyinfo, the kernel's accounting/psi and thermal/sysfs-api documents, hwmon/sysfs-interface for `temp*_input`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from appliance.contract.errors import WorldError
from appliance.contract.vitals import BoardReading

COLDEST_C, HOTTEST_C = -50.0, 150.0
"""Outside of these a sensor is off or broken: a gated Jetson zone says -256, an empty ACPI zone -273.2."""
_NO_LIMIT = 1 << 60
"""What version 1 of control groups says where nothing is limited is a little below 2^63."""


class GenericBoard:
    """Reads memory, pressure and temperatures. `root` is where /proc and /sys are found, so that a test can bring its own."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._trip_c: float | None = None

    def read(self) -> BoardReading:
        """Read all sensors now. Raises: WorldError (`board`) if /proc/meminfo cannot be read."""
        memory = self._memory()
        total, available = memory["MemTotal"], memory["MemAvailable"]
        for limit, held in self._limits():
            total, available = min(total, limit), min(available, max(0, limit - held))
        return BoardReading(
            temperatures_c=self._zones() | self._hwmon(),
            memory_total_bytes=total,
            memory_available_bytes=available,
            memory_psi_some_avg10=self._pressure(),
            largest_free_block_bytes=self._largest_blocks(),
            passive_trip_c=self._passive_trip(),
        )

    def _memory(self) -> dict[str, int]:
        path = self._root / "proc/meminfo"
        found: dict[str, int] = {}
        for line in _text(path).splitlines():
            name, _, value = line.partition(":")
            words = value.split()
            if words and words[0].isdigit():
                found[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
        if not {"MemTotal", "MemAvailable"} <= found.keys():
            raise WorldError(
                "board", "MemTotal and MemAvailable cannot be read", where=str(path), remedy="mount /proc; ProcSubset=pid hides it"
            )
        return found

    def _limits(self) -> Iterator[tuple[int, int]]:
        """What the control groups around this process allow, and what they hold that cannot be dropped (cgroups(7), both versions)."""
        for line in _text(self._root / "proc/self/cgroup").splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:
                mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            elif "memory" in kinds.split(","):
                mount, names = "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            group = self._root / mount
            for part in (".", *Path(path.lstrip("/")).parts):
                group /= part
                limit, used = _number(_text(group / names[0])), _number(_text(group / names[1]))
                if limit is not None and used is not None and limit < _NO_LIMIT:
                    yield int(limit), int(used - _field(_text(group / "memory.stat"), names[2]))

    def _pressure(self) -> float | None:
        for word in _text(self._root / "proc/pressure/memory").partition("\n")[0].split():
            if word.startswith("avg10="):
                return _number(word.removeprefix("avg10="))
        return None

    def _largest_blocks(self) -> int | None:
        """Number times size of the free blocks of the highest order that has any, over all zones of memory."""
        rows = [line.partition("zone")[2].split()[1:] for line in _text(self._root / "proc/buddyinfo").splitlines()]
        by_order = [sum(int(count) for count in counts) for counts in zip(*rows, strict=False)]
        for order in range(len(by_order) - 1, -1, -1):
            if by_order[order]:
                return by_order[order] * os.sysconf("SC_PAGESIZE") << order
        return None

    def _passive_trip(self) -> float | None:
        """The lowest passive trip point, read until one was found: it is a constant of the board."""
        if self._trip_c is None:
            trips = [
                _celsius(kind.with_name(kind.name.replace("_type", "_temp")))
                for kind in (self._root / "sys/class/thermal").glob("thermal_zone*/trip_point_*_type")
                if _text(kind).strip() == "passive"
            ]
            self._trip_c = min((trip for trip in trips if trip is not None and trip > 0), default=None)
        return self._trip_c

    def _zones(self) -> dict[str, float]:
        """Temperatures by zone type without "-thermal"; a second zone of one type gets its number."""
        found: dict[str, float] = {}
        for zone in sorted((self._root / "sys/class/thermal").glob("thermal_zone*")):
            name = _text(zone / "type").strip().removesuffix("-thermal").removesuffix("_thermal")
            value = _celsius(zone / "temp")
            if name and value is not None:
                found[name if name not in found else f"{name} {zone.name.removeprefix('thermal_zone')}"] = value
        return found

    def _hwmon(self) -> dict[str, float]:
        """Temperatures of chips such as "nvme Composite"; mirrors of thermal zones are left out."""
        found: dict[str, float] = {}
        for chip in sorted((self._root / "sys/class/hwmon").glob("hwmon*")):
            name = _text(chip / "name").strip()
            if not name or name.endswith("_thermal"):
                continue
            for sensor in sorted(chip.glob("temp*_input")):
                channel = sensor.name.removesuffix("_input")
                value = _celsius(sensor)
                if value is not None:
                    found[f"{name} {_text(chip / f'{channel}_label').strip() or channel}"] = value
        return found


def _text(path: Path) -> str:
    """The file's text, or nothing: files come and go, and a gated sensor answers EAGAIN."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> float:
    """A number of a file of lines "name number"; 0 if it is not there."""
    return next((float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} ")), 0.0)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _celsius(path: Path) -> float | None:
    milli = _number(_text(path))
    if milli is None or not COLDEST_C <= milli / 1000 <= HOTTEST_C:
        return None
    return milli / 1000
