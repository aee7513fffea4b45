"""The promises of pressure: the right part wins, nothing unmeasured counts, severities do not flicker."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.vitals import BoardReading
from appliance.core.serve.pressure import BANDS, Gauges, Level, Severity, along, clock_ratio, heat, memory, queue

GIB = 1 << 30
CALM = BoardReading(temperatures_c={"tj": 45.0}, memory_total_bytes=8 * GIB, memory_available_bytes=6 * GIB)


def severity(level: Level) -> Severity:
    return Gauges().observe({"any": level}).severity


def test_a_calm_board_is_calm() -> None:
    """Plenty of memory, cool, empty queue."""
    for level in (memory(CALM), heat(CALM), queue(0, 16, 0.0)):
        assert severity(level) is Severity.CALM


@pytest.mark.parametrize(
    ("change", "expected", "why"),
    [
        ({"memory_available_bytes": int(1.1 * GIB)}, Severity.HIGH, "1126 MiB of 8192 available"),
        ({"memory_available_bytes": 768 << 20}, Severity.CRITICAL, "768 MiB of 8192 available, floor 768 MiB"),
        ({"memory_available_bytes": 0}, Severity.CRITICAL, "0 MiB"),
        ({"gpu_memory_used_bytes": int(3.5 * GIB)}, Severity.HIGH, "GPU holds 3584 MiB of a budget of 4096"),
        ({"gpu_memory_used_bytes": int(21.5 * GIB), "gpu_memory_total_bytes": 24 * GIB}, Severity.HIGH, "22016 MiB of its own 24576"),
        ({"gpu_memory_used_bytes": int(23.3 * GIB), "gpu_memory_total_bytes": 24 * GIB}, Severity.CRITICAL, "of its own 24576"),
        ({"gpu_memory_used_bytes": 12 * GIB, "gpu_memory_total_bytes": 24 * GIB}, Severity.CALM, "of its own 24576"),
        ({"memory_psi_some_avg10": 10.0}, Severity.HIGH, "10.0 % of the time"),
        ({"memory_psi_some_avg10": 60.0}, Severity.CRITICAL, "60.0 % of the time"),
        ({"largest_free_block_bytes": 0}, Severity.CALM, "largest free blocks 0 MiB"),
    ],
)
def test_each_part_of_memory_can_win(change: dict[str, float], expected: Severity, why: str) -> None:
    """The number comes from the worst part and says so."""
    level = memory(replace(CALM, **change), gpu_budget_bytes=4 * GIB)  # type: ignore[arg-type] # numbers
    assert why in level.why
    assert severity(level) is expected


def test_a_large_board_obeys_the_ratio_and_a_small_machine_a_smaller_floor() -> None:
    """64 GiB with 8 free is 87.5 % full; 1 GiB with 300 MiB free is not critical, with 128 it is."""
    large = replace(CALM, memory_total_bytes=64 * GIB, memory_available_bytes=8 * GIB)
    assert memory(large).value == pytest.approx(0.875)
    small = replace(CALM, memory_total_bytes=GIB, memory_available_bytes=300 << 20)
    assert severity(memory(small)) is Severity.CALM
    assert severity(memory(replace(small, memory_available_bytes=128 << 20))) is Severity.CRITICAL


@pytest.mark.parametrize(
    ("celsius", "expected"), [(60.0, Severity.CALM), (89.1, Severity.HIGH), (96.5, Severity.CRITICAL), (120.0, Severity.CRITICAL)]
)
def test_heat_is_the_distance_to_the_trip_that_the_board_told(celsius: float, expected: Severity) -> None:
    """With a passive trip at 99 degrees, HIGH begins at 89; without a known trip a temperature alone says nothing."""
    hot = replace(CALM, temperatures_c={"cpu": 40.0, "tj": celsius})
    assert severity(heat(replace(hot, passive_trip_c=99.0))) is expected
    assert severity(heat(hot)) is Severity.CALM


def test_throttling_is_high_even_when_cool() -> None:
    """A sagging supply throttles a cold board."""
    level = heat(CALM, causes={"under_voltage"})
    assert severity(level) is Severity.HIGH
    assert "under_voltage" in level.why


def test_a_slow_clock_counts_only_under_load() -> None:
    """An idle GPU at 30 % of its clock is no news; a busy one is in trouble."""
    slow = replace(CALM, gpu_clock_hz=306e6, gpu_clock_cap_hz=1020e6, gpu_load=0.1)
    assert clock_ratio(slow) is None
    assert severity(heat(slow)) is Severity.CALM
    assert severity(heat(replace(slow, gpu_load=0.9))) is Severity.CRITICAL


def test_a_full_queue_is_no_emergency_but_refusing_is() -> None:
    """The queue is bounded and in time; 2 % of refusals is HIGH, half is CRITICAL."""
    assert severity(queue(16, 16, 0.0)) is Severity.CALM
    assert severity(queue(16, 16, 0.021)) is Severity.HIGH
    assert severity(queue(16, 16, 0.5)) is Severity.CRITICAL


READINGS = st.builds(
    BoardReading,
    temperatures_c=st.dictionaries(st.sampled_from(["cpu", "gpu", "tj"]), st.floats(-50, 150)),
    memory_total_bytes=st.integers(1 << 20, 1 << 40),
    memory_available_bytes=st.integers(0, 1 << 40),
    gpu_clock_hz=st.none() | st.floats(0, 2e9),
    gpu_clock_cap_hz=st.none() | st.floats(0, 2e9),
    memory_psi_some_avg10=st.none() | st.floats(0, 100),
    gpu_memory_used_bytes=st.none() | st.integers(0, 1 << 40),
    gpu_memory_total_bytes=st.none() | st.integers(0, 1 << 40),
    largest_free_block_bytes=st.none() | st.integers(0, 1 << 40),
    passive_trip_c=st.none() | st.floats(0, 120),
    gpu_load=st.none() | st.floats(0, 1),
)


@given(READINGS, st.none() | st.integers(1, 1 << 40), st.sets(st.sampled_from(["soctherm", "over_current"])))
def test_pressures_are_between_0_and_1_for_any_reading(reading: BoardReading, budget: int | None, causes: set[str]) -> None:
    """Absent sensors, nonsense clocks, more available than total: still a number with a reason."""
    for level in (memory(reading, budget), heat(reading, causes)):
        assert 0 <= level.value <= 1
        assert level.why


@given(READINGS, st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_less_memory_is_never_less_pressure(reading: BoardReading, one: int, other: int) -> None:
    """Monotone in what is available."""
    less, more = sorted((one, other))
    assert memory(replace(reading, memory_available_bytes=less)).value >= memory(replace(reading, memory_available_bytes=more)).value


@given(READINGS, st.integers(1, 1 << 40), st.integers(0, 1 << 40), st.none() | st.integers(1, 1 << 40))
def test_a_discrete_gpu_presses_as_full_as_it_is_whatever_the_budget(
    reading: BoardReading, total: int, held: int, budget: int | None
) -> None:
    """The budget of a profile is of unified memory; the device's own memory counts to its last byte, and more held is never less pressure."""
    discrete = replace(reading, gpu_memory_total_bytes=total, gpu_memory_used_bytes=min(held, total))
    assert memory(discrete, budget).value >= min(held, total) / total
    assert memory(discrete, budget) == memory(discrete)
    assert memory(replace(discrete, gpu_memory_used_bytes=min(held + 1, total))).value >= memory(discrete).value


@given(st.lists(st.floats(0, 1), max_size=200))
def test_changes_of_severity_are_bounded_by_the_variation_of_the_value(values: list[float]) -> None:
    """Every two changes of one severity cost twice its band: at most V / band + 1 changes each, for any input."""
    gauges = Gauges()
    seen = [Severity.CALM, *(gauges.observe({"memory": Level(value, "")}).severity for value in values)]
    variation = sum(abs(after - before) for before, after in zip([0.0, *values], values, strict=False))
    for severity, band in BANDS.items():
        changes = sum((before >= severity) != (after >= severity) for before, after in pairwise(seen))
        assert changes <= variation / (band.enter - band.leave) + 1 + 1e-9


def test_a_severity_holds_between_its_bands() -> None:
    """Entered at 0.85, held at 0.80, left at 0.74; CRITICAL falls to HIGH, not to CALM, at 0.88."""
    gauges = Gauges()
    steps = [(0.84, 0), (0.85, 1), (0.80, 1), (0.74, 0), (0.95, 2), (0.91, 2), (0.88, 1), (0.76, 1), (0.0, 0)]
    assert [gauges.observe({"heat": Level(value, "")}).severity for value, _ in steps] == [expected for _, expected in steps]


def test_the_worst_kind_is_named() -> None:
    """Severity first, then value; each kind has a gauge of its own."""
    strain = Gauges().observe({"memory": Level(0.2, "free"), "heat": Level(0.9, "hot"), "queue": Level(0.8, "full")})
    assert (strain.kind, strain.severity, strain.level.why) == ("heat", Severity.HIGH, "hot")


@given(st.floats(-10, 10))
def test_a_curve_stays_between_its_ends(x: float) -> None:
    """Interpolation never overshoots."""
    assert 0.0 <= along(((0, 0), (1, 0.5), (2, 1)), x) <= 1.0
