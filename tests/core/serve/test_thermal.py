"""The promises of the thermal limit: within its bounds, down at once, up slowly, and the SLO holds at any steady clock."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from appliance.contract.errors import OursError
from appliance.core.serve.thermal import Limit, State, ThermalLimit

STEPS = st.lists(st.tuples(st.floats(0, 3), st.none() | st.floats(0, 1.2), st.integers(1, 16), st.floats(0, 0.3)), max_size=80)


def test_a_slower_clock_cuts_the_batch_at_once_in_proportion() -> None:
    """Half of the clock, half of the batch; the reason is told."""
    limit = ThermalLimit(16, 0.075)
    assert limit.clock(0.5, 1.0) == Limit(8, "clock at 50% of its cap")
    assert limit.state is State.SHRUNK
    assert limit.clock(0.5, 2.0) is None
    assert limit.clock(None, 3.0) is None


def test_small_dips_and_unknown_clocks_change_nothing() -> None:
    """96 % is within the noise."""
    limit = ThermalLimit(16, 0.075)
    assert limit.clock(0.96, 1.0) is None
    assert limit.clock(None, 1.0) is None
    assert limit.deadline() is None


def test_it_grows_by_one_each_second_up_to_what_the_clock_allows() -> None:
    """From 4 of 16: while the clock stays at a half, up to 8; after it has recovered, on to 16, then nominal."""
    limit, now = ThermalLimit(16, 0.075), 0.0
    limit.clock(0.25, now)
    limit.clock(0.5, now)
    while (due := limit.deadline()) is not None:
        now = due
        assert limit.grow(now)
    assert (limit.limit, now, limit.state) == (8, 4.0, State.RECOVERING)
    limit.clock(1.0, now)
    while (due := limit.deadline()) is not None:
        now = due
        assert limit.grow(now)
    assert (limit.limit, limit.state) == (16, State.NOMINAL)


def test_two_late_batches_halve_the_limit_and_one_does_not() -> None:
    """A single late batch may be noise; batches that began before the cut do not count against the smaller size."""
    limit = ThermalLimit(16, 0.075)
    assert limit.ran(16, 0.0, 0.08) is None
    assert limit.ran(16, 0.1, 0.15) is None
    assert limit.ran(16, 0.2, 0.28) is None
    assert limit.ran(16, 0.3, 0.38) == Limit(8, "16 samples took 80 ms")
    assert limit.ran(16, 0.35, 0.50) is None
    assert limit.ran(16, 0.36, 0.52) is None
    assert limit.limit == 8


def test_a_batch_of_one_cannot_be_cut() -> None:
    """However late."""
    limit = ThermalLimit(4, 0.01)
    assert [limit.ran(1, float(second), second + 0.5) for second in range(5)] == [None] * 5
    with pytest.raises(OursError, match="both must be above 0"):
        ThermalLimit(0, 0.01)


@given(STEPS, st.integers(1, 16))
def test_the_limit_stays_within_its_bounds_and_below_what_the_clock_allows(
    steps: list[tuple[float, float | None, int, float]], ceiling: int
) -> None:
    """For any clocks and latencies: 1 to the ceiling, never above floor(ceiling x ratio), growth by one, nominal exactly at the ceiling."""
    limit, now, allowed = ThermalLimit(ceiling, 0.075), 0.0, ceiling
    for wait, ratio, samples, took in steps:
        now += wait
        before = limit.limit
        grown = limit.grow(now)
        assert limit.limit == before + (grown is not None)
        limit.clock(ratio, now)
        if ratio is not None:
            allowed = ceiling if ratio >= 0.95 else max(1, int(ceiling * ratio))
        limit.ran(samples, now, now + took)
        now += took
        assert 1 <= limit.limit <= allowed <= ceiling
        assert (limit.state is State.NOMINAL) == (limit.limit == ceiling)


@settings(max_examples=25)
@given(st.floats(0.2, 1.0), st.floats(0.01, 0.015), st.integers(2, 32))
def test_at_any_steady_clock_late_batches_become_rare(ratio: float, per_sample: float, ceiling: int) -> None:
    """Full batches for four minutes at a clock of which no sensor tells: after two, at most two late batches in a minute, and none too small."""
    fits = 0.075 / (per_sample / ratio)
    assume(abs(fits - round(fits)) > 1e-6)  # a size that takes the budget to the last bit is late or not by rounding
    limit, now, late, sizes = ThermalLimit(ceiling, 0.075), 0.0, 0, set()
    while now < 240.0:
        limit.grow(now)
        took = per_sample / ratio * limit.limit
        if now > 120.0:
            late += took > 0.075
            sizes.add(limit.limit)
        limit.ran(limit.limit, now, now + took)
        now += took
    best = max(1, min(ceiling, int(fits)))
    assert late <= 6 or best == 1
    assert sizes <= {best, best + 1}
