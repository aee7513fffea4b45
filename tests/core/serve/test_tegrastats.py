"""Recorded tegrastats lines of three boards, and made-up ones for what no record shows."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import TheirsError
from appliance.core.serve.tegrastats import MIB, Core, Rail, reading, readings, sample

# Recorded (MIT-licensed public log), R36.5; the list of cores is shortened.
ORIN_NANO = (
    "04-19-2026 01:31:54 RAM 4231/7607MB (lfb 1x4MB) CPU [0%@1728,12%@1728] EMC_FREQ 81%@3199 GR3D_FREQ 99%@[1005] NVDEC off NVJPG off "
    "NVJPG1 off VIC off OFA off APE 200 cpu@52.437C soc2@51.562C soc0@50.812C gpu@55.281C tj@55.281C soc1@49.281C VDD_IN 21546mW/8268mW "
    "VDD_CPU_GPU_CV 9261mW/2663mW VDD_SOC 6129mW/2838mW"
)
# Recorded on an AGX Orin 64 GB; lists are shortened.
AGX_ORIN = (
    "07-21-2025 16:33:42 RAM 17953/62841MB (lfb 9x4MB) SWAP 0/31420MB (cached 0MB) CPU [7%@1728,off,off] EMC_FREQ 12%@204 "
    "GR3D_FREQ 39%@[305,0] NVENC off PVA0_FREQ off APE 174 cpu@43.906C soc2@40.406C tj@43.906C soc1@40.437C VDD_GPU_SOC 2798mW/2798mW "
    "VDD_CPU_CV 799mW/799mW VIN_SYS_5V0 3315mW/3315mW"
)
# Recorded by NVIDIA on a Thor, R38.4; lists are shortened.
THOR = (
    "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,3%@972] EMC_FREQ 0%@2750 GR3D_FREQ @[314,314,314] NVENC0_FREQ @314 "
    "VIC off PVA0_FREQ off APE 300 cpu@37.343C tj@38.875C soc012@37.468C gpu@38.875C soc345@37.406C VDD_GPU 1962mW/1962mW "
    "VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW"
)


def test_an_orin_nano_line() -> None:
    """Every field of the line is where it belongs."""
    seen = sample(ORIN_NANO)
    assert seen.at == "04-19-2026 01:31:54"
    assert (seen.ram_used_bytes, seen.ram_total_bytes, seen.largest_blocks_bytes) == (4231 * MIB, 7607 * MIB, 4 * MIB)
    assert seen.cores == (Core(0, 1728), Core(12, 1728))
    assert (seen.emc_load_percent, seen.gpu_load_percent, seen.gpu_clocks_mhz) == (81, 99, (1005,))
    assert seen.temperatures_c == {"cpu": 52.437, "soc2": 51.562, "soc0": 50.812, "gpu": 55.281, "tj": 55.281, "soc1": 49.281}
    assert seen.rails == {"VDD_IN": Rail(21546, 8268), "VDD_CPU_GPU_CV": Rail(9261, 2663), "VDD_SOC": Rail(6129, 2838)}
    assert seen.swap_used_bytes is None


def test_an_agx_orin_line_with_swap_and_idle_cores() -> None:
    """Cores that are off are None, and a GPC that is off has clock 0."""
    seen = sample(AGX_ORIN)
    assert (seen.swap_used_bytes, seen.cores, seen.gpu_clocks_mhz) == (0, (Core(7, 1728), None, None), (305, 0))
    assert seen.largest_blocks_bytes == 36 * MIB
    assert set(seen.rails) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}


def test_a_thor_line_without_gpu_load() -> None:
    """Three clusters, no load; the encoder's clock is not taken for a zone."""
    seen = sample(THOR)
    assert (seen.gpu_load_percent, seen.gpu_clocks_mhz) == (None, (314, 314, 314))
    assert set(seen.temperatures_c) == {"cpu", "tj", "soc012", "gpu", "soc345"}
    assert seen.rails["VIN"] == Rail(19780, 19780)


def test_a_reading_says_what_the_board_would() -> None:
    """Available is what is not used, the clock is the fastest cluster's, and what the log does not tell is None."""
    nano, thor = reading(sample(ORIN_NANO)), reading(sample(THOR))
    assert (nano.memory_total_bytes, nano.memory_available_bytes) == (7607 * MIB, 3376 * MIB)
    assert (nano.gpu_clock_hz, nano.gpu_load, nano.hottest_c, nano.largest_free_block_bytes) == (1.005e9, 0.99, 55.281, 4 * MIB)
    assert (thor.gpu_load, thor.gpu_clock_cap_hz, thor.throttle_causes) == (None, None, ())


@pytest.mark.parametrize(
    ("line", "clocks", "load"),
    [
        ("RAM 1/2MB GR3D_FREQ 5%", (), 5),
        ("RAM 1/2MB GR3D_FREQ 5%@306", (306,), 5),
        ("RAM 1/2MB", (), None),
        ("RAM 1/2MB CPU [off]", (), None),
    ],
)
def test_synthetic_lines_may_lack_nearly_everything(line: str, clocks: tuple[int, ...], load: int | None) -> None:
    """Synthetic: only RAM is always there."""
    seen = sample(line)
    assert (seen.gpu_clocks_mhz, seen.gpu_load_percent, seen.temperatures_c, seen.rails) == (clocks, load, {}, {})
    assert (seen.at, seen.largest_blocks_bytes, reading(seen).gpu_clock_hz) == ("", None, clocks[0] * 1e6 if clocks else None)


def test_a_gated_zone_is_left_out() -> None:
    """Synthetic: -256 means off, and it must not be the temperature of anything."""
    assert sample("RAM 1/2MB cv0@-256C tj@-5.5C").temperatures_c == {"tj": -5.5}


def test_a_log_skips_comments_and_names_the_bad_line() -> None:
    """A marked synthetic log is read; a line without RAM is refused by number."""
    assert len(readings(f"# synthetic\n\n{ORIN_NANO}\n{THOR}\n")) == 2
    with pytest.raises(TheirsError) as caught:
        readings(f"{ORIN_NANO}\nhello\n")
    assert (caught.value.reason, caught.value.where) == ("tegrastats", "line 2")
    with pytest.raises(TheirsError, match="holds no line"):
        readings("# nothing\n")


@given(st.text(max_size=120), st.integers(0, 300), st.integers(0, 300))
def test_garbage_is_read_or_refused(garbage: str, start: int, end: int) -> None:
    """A cut line with garbage in it never raises anything but ours."""
    with contextlib.suppress(TheirsError):
        assert reading(sample(AGX_ORIN[:start] + garbage + AGX_ORIN[end:])).memory_total_bytes >= 0
