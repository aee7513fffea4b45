"""A Linux machine's sensors, read from trees that the test builds."""

from pathlib import Path

import pytest

from appliance.adapters.board_generic import GenericBoard
from appliance.contract.errors import WorldError

MEMINFO = "MemTotal:        8000000 kB\nMemFree:          500000 kB\nMemAvailable:    4000000 kB\nHugePages_Total:       0\n"


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_everything_that_is_there_is_read(tmp_path: Path) -> None:
    """Memory in bytes, pressure, zones by type, chips by label, the lowest passive trip, the largest free blocks."""
    board = GenericBoard(
        plant(
            tmp_path,
            {
                "proc/meminfo": MEMINFO,
                "proc/pressure/memory": "some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=3.00 avg60=0 avg300=0 total=1\n",
                "proc/buddyinfo": "Node 0, zone  DMA  1 1 0 0\nNode 0, zone  Normal  9 9 3 0\n",
                "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
                "sys/class/thermal/thermal_zone0/temp": "52437\n",
                "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
                "sys/class/thermal/thermal_zone0/trip_point_0_temp": "99000\n",
                "sys/class/thermal/thermal_zone0/trip_point_1_type": "critical\n",
                "sys/class/thermal/thermal_zone0/trip_point_1_temp": "60000\n",
                "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp\n",
                "sys/class/thermal/thermal_zone1/temp": "60000\n",
                "sys/class/thermal/thermal_zone2/type": "x86_pkg_temp\n",
                "sys/class/thermal/thermal_zone2/temp": "61000\n",
                "sys/class/hwmon/hwmon0/name": "nvme\n",
                "sys/class/hwmon/hwmon0/temp1_input": "41850\n",
                "sys/class/hwmon/hwmon0/temp1_label": "Composite\n",
                "sys/class/hwmon/hwmon1/name": "cpu_thermal\n",
                "sys/class/hwmon/hwmon1/temp1_input": "52437\n",
            },
        )
    )
    reading = board.read()
    assert reading.temperatures_c == {"cpu": 52.437, "x86_pkg_temp": 60.0, "x86_pkg_temp 2": 61.0, "nvme Composite": 41.85}
    assert (reading.memory_total_bytes, reading.memory_available_bytes) == (8_000_000 * 1024, 4_000_000 * 1024)
    assert reading.memory_psi_some_avg10 == 12.5
    assert reading.passive_trip_c == 99.0
    assert reading.largest_free_block_bytes == 3 * 4 * 4096
    assert reading.hottest_c == 61.0


def test_what_is_absent_is_none_and_never_zero(tmp_path: Path) -> None:
    """With nothing but memory there is a reading without temperatures or pressure."""
    reading = GenericBoard(plant(tmp_path, {"proc/meminfo": MEMINFO})).read()
    assert reading.temperatures_c == {}
    assert (reading.memory_psi_some_avg10, reading.hottest_c, reading.passive_trip_c, reading.largest_free_block_bytes) == (None,) * 4


@pytest.mark.parametrize("value", ["-256000\n", "-273200\n", "", "n/a\n", "400000\n"])
def test_a_sensor_that_is_off_or_broken_is_left_out(tmp_path: Path, value: str) -> None:
    """A gated zone, an empty file and nonsense are no temperatures."""
    files = {
        "proc/meminfo": MEMINFO,
        "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
        "sys/class/thermal/thermal_zone2/temp": value,
    }
    assert GenericBoard(plant(tmp_path, files)).read().temperatures_c == {}


def test_a_file_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """An I/O error on one zone (a gated one answers EAGAIN) costs that zone only."""
    root = plant(tmp_path, {"proc/meminfo": MEMINFO, "sys/class/thermal/thermal_zone0/type": "cv1-thermal\n"})
    (root / "sys/class/thermal/thermal_zone0/temp").mkdir()  # reading a directory fails, for root too
    assert GenericBoard(root).read().temperatures_c == {}


def test_without_memory_there_is_no_reading(tmp_path: Path) -> None:
    """The one thing that must be readable is named, with the likely cause."""
    with pytest.raises(WorldError, match="ProcSubset") as caught:
        GenericBoard(tmp_path).read()
    assert caught.value.reason == "board"


def test_this_machine_can_be_read_quickly() -> None:
    """The real /proc and /sys give a sane reading."""
    reading = GenericBoard().read()
    assert 0 < reading.memory_available_bytes <= reading.memory_total_bytes


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_that_allows_less_than_the_machine_has_is_what_counts(version: int, tmp_path: Path) -> None:
    """Memory of a limited service (MemoryMax=) is its group's, page cache that can be dropped not counted; the tightest group decides."""
    write(tmp_path, "proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
    if version == 1:
        write(tmp_path, "proc/self/cgroup", "4:memory:/outer/inner\n3:cpuset:/\n")
        base, names = "sys/fs/cgroup/memory/outer", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        write(tmp_path, f"sys/fs/cgroup/memory/{names[0]}", "9223372036854771712\n")
    else:
        write(tmp_path, "proc/self/cgroup", "0::/outer/inner\n")
        base, names = "sys/fs/cgroup/outer", ("memory.max", "memory.current", "inactive_file")
        write(tmp_path, f"{base}/inner/memory.max", "max\n")
        write(tmp_path, f"{base}/inner/memory.current", "4096\n")
    write(tmp_path, f"{base}/{names[0]}", f"{512 << 20}\n")
    write(tmp_path, f"{base}/{names[1]}", f"{300 << 20}\n")
    write(tmp_path, f"{base}/memory.stat", f"cache 1\n{names[2]} {100 << 20}\n")
    reading = GenericBoard(tmp_path).read()
    assert (reading.memory_total_bytes, reading.memory_available_bytes) == (512 << 20, 312 << 20)
