"""The laws of the paced replay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import OursError
from appliance.core.reach.replay import BURST_S, FLOOR_SHARE, LIVE_S, LOOK_S, SHARE, ReplayPace

CAPACITY = 1_000_000.0


def drained(pace: ReplayPace, size_bytes: int, start: float, seconds: float) -> int:
    """Bytes that a greedy loop replays in that time."""
    now, sent = start, 0
    while now < start + seconds:
        if pace.take(size_bytes, now):
            sent += size_bytes
        else:
            now += max(pace.wait_s(size_bytes, now), 1e-6)
    return sent


@given(st.integers(20_000, 2_000_000))
def test_an_idle_link_is_used_to_its_share_and_no_further(size_bytes: int) -> None:
    """Over twenty seconds: half of the capacity, give or take one burst and one message; and no slower than that."""
    sent = drained(ReplayPace(CAPACITY), size_bytes, 0.0, 20.0)
    most = SHARE * CAPACITY * (20 + BURST_S) + size_bytes
    assert sent <= most
    assert sent >= SHARE * CAPACITY * 19 - 2 * size_bytes


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["live", "take", "ask"]), st.integers(1, 400_000)), max_size=200))
def test_any_stretch_is_bounded(steps: list[tuple[float, str, int]]) -> None:
    """Whatever the traffic: in every stretch at most the highest rate x time + a burst + a message; a wait that is kept suffices."""
    pace, now, sent = ReplayPace(CAPACITY), 0.0, list[tuple[float, int]]()
    for wait, what, size_bytes in steps:
        now += wait
        if what == "live":
            pace.live(size_bytes, now)
        elif what == "take" and pace.take(size_bytes, now):
            sent.append((now, size_bytes))
        elif what == "ask":
            assert 0 <= pace.wait_s(size_bytes, now) <= LOOK_S
        assert FLOOR_SHARE * CAPACITY <= pace.rate(now) <= SHARE * CAPACITY
    for first, (begin, _) in enumerate(sent):
        for end, _ in sent[first:]:
            within = sum(size for at, size in sent if begin <= at <= end)
            assert within <= SHARE * CAPACITY * (end - begin + BURST_S) + 400_000 + 1


def test_live_traffic_goes_first() -> None:
    """At 80 % live load replay gets a fifth; when it ends, half again within seconds; at full load a trickle, never nothing."""
    pace, now = ReplayPace(CAPACITY), 0.0
    for number in range(2_000):
        now = number / 100
        pace.live(8_000, now)
    assert pace.rate(now) == pytest.approx(0.2 * CAPACITY, rel=0.05)
    assert pace.rate(now + 3 * LIVE_S) == pytest.approx(SHARE * CAPACITY)
    for number in range(2_000):
        now = 100 + number / 100
        pace.live(20_000, now)
    assert pace.rate(now) == FLOOR_SHARE * CAPACITY
    assert drained(pace, 1_000, now, 1.0) > 0


def test_a_new_measurement_changes_the_rate_at_once() -> None:
    """A link that became slow is not flooded by what was saved up."""
    pace = ReplayPace(CAPACITY)
    pace.rate(100)
    pace.measured(CAPACITY / 100, 100)
    assert pace.rate(100) == SHARE * CAPACITY / 100
    assert drained(pace, 100, 100, 1.0) <= SHARE * CAPACITY / 100 * (1 + BURST_S) + 100


def test_a_message_larger_than_the_burst_goes_and_is_paid_off() -> None:
    """Otherwise it would wait for ever; afterwards everybody waits."""
    pace, big = ReplayPace(CAPACITY), 2_000_000
    assert not pace.take(big, 0.0)
    assert pace.take(big, 10.0)
    assert not pace.take(1, 10.1)
    assert not pace.take(1, 13.0)
    assert pace.take(1, 14.0)


@pytest.mark.parametrize("capacity", [0.0, -1.0, float("nan")])
def test_a_link_without_capacity_is_refused(capacity: float) -> None:
    """A share of nothing is no pace."""
    with pytest.raises(OursError):
        ReplayPace(capacity)
    pace = ReplayPace(CAPACITY)
    with pytest.raises(OursError):
        pace.measured(capacity, 1.0)
    assert pace.rate(1.0) == SHARE * CAPACITY
