"""What makes a link bad, and what makes it clean again."""

from hypothesis import given
from hypothesis import strategies as st

from appliance.core.reach.quality import LOSS_ENTER, RTT_MIN, RTT_S, SUSPICION_S, Quality


def test_one_gap_is_never_enough() -> None:
    """Two suspicions are no fault; the third within ten minutes is."""
    quality = Quality()
    quality.suspected(0)
    quality.suspected(10)
    assert quality.fault(10) == ""
    quality.suspected(20)
    assert quality.fault(20) == "3 suspicions in 20 s"


@given(st.lists(st.floats(0, 5_000), min_size=1, max_size=40))
def test_suspicions_count_while_they_are_recent(times: list[float]) -> None:
    """A fault exactly when three are younger than ten minutes."""
    quality = Quality()
    for at in sorted(times):
        quality.suspected(at)
        recent = [each for each in times if at - SUSPICION_S < each <= at]
        if len(set(times)) == len(times):
            assert bool(quality.fault(at)) == (len(recent) >= 3)


def test_forgiven_suspicions_are_gone() -> None:
    """After a change of state the count starts again."""
    quality = Quality()
    for at in range(3):
        quality.suspected(at)
    quality.forgive()
    quality.suspected(4)
    assert quality.fault(4) == ""


@given(st.lists(st.booleans(), max_size=400))
def test_loss_is_a_share(arrived: list[bool]) -> None:
    """Whatever is lost: from 0 to 1."""
    quality = Quality()
    for seq, here in enumerate(arrived):
        if here:
            quality.received(seq)
        assert 0 <= quality.loss <= 1


def test_five_percent_shows_and_two_do_not() -> None:
    """Every 10th of 500 heartbeats lost is a fault; every 50th is not."""
    for every, bad in ((10, True), (50, False)):
        quality = Quality()
        for seq in range(500):
            if seq % every:
                quality.received(seq)
        assert (quality.loss > LOSS_ENTER) == bad
        assert bool(quality.fault(0)) == bad
        assert quality.clean(0) == (not bad)


def test_an_outage_and_a_restart_are_no_loss() -> None:
    """A gap of a hundred, or numbers that begin again, say nothing of the link's loss."""
    quality = Quality()
    for seq in (1, 2, 103, 104, 1, 2):
        quality.received(seq)
    assert quality.loss == 0


def test_questions_without_an_answer_show_a_dead_direction() -> None:
    """Heartbeats arrive, but nothing that is asked is answered: a fault within a few questions."""
    quality = Quality()
    for seq in range(6):
        quality.received(seq)
        quality.missed()
    assert quality.fault(0).startswith("loss")


def test_slow_round_trips_are_a_fault_while_they_are_recent() -> None:
    """p95 above 150 ms; too few, or too old, say nothing; between the marks it is neither bad nor clean."""
    quality = Quality()
    for _ in range(RTT_MIN - 1):
        quality.answered(0.3, 10)
    assert quality.fault(10) == ""
    quality.answered(0.3, 10)
    assert quality.fault(10) == "round trip p95 300 ms"
    assert quality.fault(10 + RTT_S) == ""
    between = Quality()
    for _ in range(20):
        between.answered(0.130, 1)
    assert between.fault(1) == ""
    assert not between.clean(1)


def test_the_percentile_is_the_nearest_rank() -> None:
    """Of 20 round trips one may be slow, of 20 two may not."""
    quality = Quality()
    for number in range(20):
        quality.answered(0.5 if number < 1 else 0.01, 1)
    assert quality.rtt_p95_s(1) == 0.01
    slow = Quality()
    for number in range(20):
        slow.answered(0.5 if number < 2 else 0.01, 1)
    assert slow.rtt_p95_s(1) == 0.5
