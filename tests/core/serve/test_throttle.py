"""The watch's promises: real throttling is told once, the noise of oc3 never."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.vitals import BoardReading
from appliance.core.serve.throttle import Cleared, Raised, ThrottleWatch

BOARD = BoardReading(temperatures_c={}, memory_total_bytes=1, memory_available_bytes=1)


def counting(**counts: int) -> BoardReading:
    return replace(BOARD, over_current_events=counts)


def test_an_hour_of_the_usual_oc3_is_silence() -> None:
    """27,390 events in an hour, as on a healthy Orin Nano Super: no alert."""
    watch = ThrottleWatch()
    told = [event for second in range(3_600) for event in watch.observe(counting(oc1=0, oc2=0, oc3=int(second * 7.6)), float(second))]
    assert told == []


def test_oc3_above_its_rate_for_a_minute_is_told_once_and_cleared_once() -> None:
    """25 a second: told after 60 s, cleared 10 s after it ends."""
    watch = ThrottleWatch()
    told = []
    for second in range(200):
        told += [(second, event) for event in watch.observe(counting(oc3=25 * min(second, 100)), float(second))]
    assert [(second, type(event)) for second, event in told] == [(60, Raised), (110, Cleared)]
    assert told[0][1].cause == "over_current_peaks"


def test_a_burst_of_oc3_shorter_than_a_minute_is_silence() -> None:
    """50 s at 30/s and then rest."""
    watch = ThrottleWatch()
    assert [event for second in range(120) for event in watch.observe(counting(oc3=30 * min(second, 50)), float(second))] == []


def test_one_event_of_under_voltage_is_an_alert_with_its_remedy() -> None:
    """oc1 counts from the first event on, but not what happened before the first reading."""
    watch = ThrottleWatch()
    assert watch.observe(counting(oc1=7), 0.0) == []
    (raised,) = watch.observe(counting(oc1=8), 1.0)
    assert isinstance(raised, Raised)
    assert raised.cause == "under_voltage"
    assert "supply" in raised.remedy
    assert watch.causes == {"under_voltage"}
    assert watch.observe(counting(oc1=8), 5.0) == []
    assert watch.observe(counting(oc1=8), 11.0) == [Cleared("under_voltage", "oc1")]
    assert watch.causes == frozenset()


def test_a_counter_that_went_back_is_a_boot() -> None:
    """No alert for a reset; events after it count."""
    watch = ThrottleWatch()
    watch.observe(counting(oc2=100), 0.0)
    assert watch.observe(counting(oc2=1), 1.0) == []
    assert len(watch.observe(counting(oc2=2), 2.0)) == 1


def test_kernel_names_become_causes() -> None:
    """Each alert of the board has a name for a metric; an unknown one is not lost."""
    names = ("gpu-throttle-alert", "hot-surface-alert", "devfreq-17000000.gpu", "cpu-clock-clamped", "novel")
    told = ThrottleWatch().observe(replace(BOARD, throttle_causes=names), 0.0)
    assert [event.cause for event in told] == ["soctherm", "hot_surface", "software_clamp", "hardware_clamp", "unknown"]


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=60))
def test_raised_and_cleared_take_turns(steps: list[tuple[float, bool]]) -> None:
    """For any flicker, an alert is raised, cleared, raised, …; never twice, and two raises are more than 10 s apart."""
    watch, now, told = ThrottleWatch(), 0.0, []
    for wait, alert in steps:
        now += wait
        told += [(type(event), now) for event in watch.observe(replace(BOARD, throttle_causes=("tj-throttle-alert",) * alert), now)]
    assert [kind for kind, _ in told] == [Raised, Cleared] * (len(told) // 2) + [Raised] * (len(told) % 2)
    raised = [at for kind, at in told if kind is Raised]
    assert all(later - earlier >= 10.0 - 1e-9 for earlier, later in pairwise(raised))
