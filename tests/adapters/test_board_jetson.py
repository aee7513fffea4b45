"""Jetson sensors on fake trees, made from field reports of an Orin Nano Super (R36.5) and a Thor (R38.4); no board was at hand."""

from pathlib import Path

import pytest

from appliance.adapters.board_jetson import CLAMPED_READINGS, JetsonBoard
from appliance.contract.vitals import BoardReading

THERMAL = "sys/class/thermal/"
ORIN = {
    "proc/meminfo": "MemTotal:        7789568 kB\nMemAvailable:    3457024 kB\nNvMapMemUsed:    1048576 kB\n",
    THERMAL + "cooling_device0/type": "cpu-throttle-alert\n",
    THERMAL + "cooling_device0/cur_state": "0\n",
    THERMAL + "cooling_device1/type": "gpu-throttle-alert\n",
    THERMAL + "cooling_device1/cur_state": "0\n",
    THERMAL + "cooling_device2/type": "hot-surface-alert\n",
    THERMAL + "cooling_device2/cur_state": "0\n",
    THERMAL + "cooling_device3/type": "devfreq-17000000.gpu\n",
    THERMAL + "cooling_device3/cur_state": "0\n",
    THERMAL + "cooling_device4/type": "pwm-fan\n",
    THERMAL + "cooling_device4/cur_state": "3\n",
    "sys/class/hwmon/hwmon0/name": "ina3221\n",
    "sys/class/hwmon/hwmon0/oc1_event_cnt": "77\n",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon3/oc2_event_cnt": "2\n",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "27390\n",
    "sys/class/hwmon/hwmon3/oc3_throt_en": "1\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "1005000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "sys/devices/platform/bus@0/17000000.gpu/load": "990\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1728000\n",
    "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_cur_freq": "1728000\n",
}
THOR = {
    THERMAL + "cooling_device0/type": "soc012-throttle-alert\n",
    THERMAL + "cooling_device0/cur_state": "0\n",
    THERMAL + "cooling_device1/type": "devfreq-gpu-gpc-0\n",
    THERMAL + "cooling_device1/cur_state": "18\n",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "314000000\n",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "2601000\n",
    "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_cur_freq": "2601000\n",
}


class Plain:
    """Any board."""

    def read(self) -> BoardReading:
        return BoardReading(temperatures_c={"tj": 55.0}, memory_total_bytes=8, memory_available_bytes=4, memory_psi_some_avg10=1.5)


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_healthy_orin_is_read_in_full(tmp_path: Path) -> None:
    """Clock, cap, load, GPU memory and counters are there; a turning fan and a ticking oc3 raise nothing."""
    plant(tmp_path, ORIN)
    reading = JetsonBoard(Plain(), tmp_path).read()
    assert reading == BoardReading(
        temperatures_c={"tj": 55.0},
        memory_total_bytes=8,
        memory_available_bytes=4,
        memory_psi_some_avg10=1.5,
        throttle_causes=(),
        gpu_clock_hz=1.005e9,
        gpu_clock_cap_hz=1.02e9,
        gpu_load=0.99,
        gpu_memory_used_bytes=1 << 30,
        over_current_events={"oc1": 0, "oc2": 2, "oc3": 27390},
    )


def test_the_over_current_chip_is_found_by_name(tmp_path: Path) -> None:
    """After a reboot the chip has another number, and a stranger's file of the same name is not taken for it."""
    moved = {name.replace("hwmon3", "hwmon9"): text for name, text in ORIN.items()}
    plant(tmp_path, moved)
    assert JetsonBoard(Plain(), tmp_path).read().over_current_events == {"oc1": 0, "oc2": 2, "oc3": 27390}


@pytest.mark.parametrize(
    ("device", "cause"),
    [(0, "cpu-throttle-alert"), (1, "gpu-throttle-alert"), (2, "hot-surface-alert"), (3, "devfreq-17000000.gpu")],
)
def test_an_alert_is_told_by_the_kernels_name(tmp_path: Path, device: int, cause: str) -> None:
    """Each alert above 0, and the clamp of Orin's GPU, is one cause."""
    plant(tmp_path, ORIN | {THERMAL + f"cooling_device{device}/cur_state": "1\n"})
    assert JetsonBoard(Plain(), tmp_path).read().throttle_causes == (cause,)


def test_a_healthy_thor_is_not_throttled(tmp_path: Path) -> None:
    """Its GPU rests at cooling state 18 of 169; there is no over-current chip and no NvMap counter."""
    plant(tmp_path, THOR)
    reading = JetsonBoard(Plain(), tmp_path).read()
    assert (reading.throttle_causes, reading.gpu_clock_hz, reading.gpu_clock_cap_hz) == ((), 3.14e8, 1.575e9)
    assert (reading.over_current_events, reading.gpu_memory_used_bytes, reading.gpu_load) == (None, None, None)


def test_a_cpu_that_is_clamped_by_hardware_is_seen_after_three_readings(tmp_path: Path) -> None:
    """A Thor at 242 MHz that claims 2601 is clamped; one slow reading between good ones is only oc3's millisecond."""
    plant(tmp_path, THOR)
    board = JetsonBoard(Plain(), tmp_path)
    real = tmp_path / "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_cur_freq"
    seen = []
    for clock in ["242000\n", "2601000\n", *["242000\n"] * (CLAMPED_READINGS + 1), "2601000\n"]:
        real.write_text(clock)
        seen.append(board.read().throttle_causes)
    clamped = ("cpu-clock-clamped",)
    assert seen == [(), (), (), (), clamped, clamped, ()]


def test_nothing_but_a_plain_board_is_needed(tmp_path: Path) -> None:
    """Every file is optional: on an empty tree the plain reading comes through unchanged."""
    assert JetsonBoard(Plain(), tmp_path).read() == Plain().read()
