"""The laws of the score of silence, and the numbers that a naive form gets wrong."""

from math import inf, isfinite
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import OursError
from appliance.core.reach.suspicion import MIN_SD_SHARE, TAIL_Y, THRESHOLD, WINDOW, Suspicion, phi_of, y_of

GAPS = st.lists(st.floats(0.001, 100), max_size=60)


@pytest.mark.parametrize(("y", "phi"), [(0, 0.30103), (1, 0.79954), (3.0902, 3.0), (5, 6.5426), (8, 15.2061), (22, 106.841), (40, 349.437)])
def test_phi_is_that_of_the_normal_distribution(y: float, phi: float) -> None:
    """The values of tables, where the logistic form gives 7.3 for 5, 21.2 for 8 and infinity for 22."""
    assert phi_of(y) == pytest.approx(phi, abs=2e-3)


@given(st.floats(-1e6, 1e9))
def test_phi_is_finite_and_never_negative(y: float) -> None:
    """No OverflowError, no ValueError, whatever the silence."""
    assert 0 <= phi_of(y) < inf


@pytest.mark.parametrize("y", [-inf, inf, 1e200, -1e200])
def test_phi_of_the_extremes_is_no_error(y: float) -> None:
    """Even beyond what a float can square."""
    assert phi_of(y) >= 0


@given(st.floats(-30, 60), st.floats(1e-6, 10))
def test_phi_grows_with_silence(y: float, more: float) -> None:
    """Also across the point where the asymptote takes over."""
    assert phi_of(y) <= phi_of(y + more)


def test_the_asymptote_meets_the_exact_form() -> None:
    """At the joint both forms agree to a thousandth."""
    assert phi_of(TAIL_Y - 1e-9) == pytest.approx(phi_of(TAIL_Y), abs=1e-3)


@given(st.floats(0.01, 5_000))
def test_the_inverse_is_an_inverse(phi: float) -> None:
    """`phi_of(y_of(phi))` is phi."""
    assert phi_of(y_of(phi)) == pytest.approx(phi, rel=1e-6, abs=1e-6)


def test_a_threshold_that_is_none_is_refused() -> None:
    """A threshold of 0 would suspect always."""
    with pytest.raises(OursError):
        y_of(0)


@given(GAPS)
def test_the_crossing_is_where_phi_reaches_the_threshold(gaps: list[float]) -> None:
    """For any history: below before, at the threshold then."""
    suspicion, at = Suspicion(5.0), 0.0
    for gap in gaps:
        at += gap
        suspicion.heard(at)
    assert suspicion.phi(suspicion.crosses_at) == pytest.approx(THRESHOLD, abs=1e-3)
    assert suspicion.phi(at) <= THRESHOLD
    assert isfinite(suspicion.phi(at + 1e7))


@given(st.lists(st.floats(3.4, 6.5), min_size=1, max_size=300))
def test_patience_follows_the_window(gaps: list[float]) -> None:
    """Mean and deviation are those of the last intervals that ended no suspicion, with a floor under both; rounding does not add up."""
    suspicion, at, learned = Suspicion(5.0, window=5), 0.0, list[float]()
    suspicion.heard(at)
    for gap in gaps:
        at += gap
        if at < suspicion.crosses_at and gap <= suspicion.patience_s:
            learned.append(gap)
        suspicion.heard(at)
        if kept := learned[-5:]:
            assert suspicion.patience_s == pytest.approx(max(5.0, fmean(kept)) + y_of(THRESHOLD) * max(0.5, pstdev(kept)), abs=1e-6)


def test_heartbeats_that_come_bunched_do_not_make_the_kept_interval_suspect() -> None:
    """A young window that saw only a bunch (held up on a slow line) still grants the promised interval, and learns again."""
    suspicion, at = Suspicion(5.0), 10.0
    for _ in range(3):
        suspicion.heard(at)
        at += 0.01
    for _ in range(20):
        at += 5.0
        assert at < suspicion.crosses_at
        suspicion.heard(at)


def test_a_jittery_link_gets_more_patience_than_a_calm_one() -> None:
    """What adapts: intervals of 3 and 7 s in turn earn patience that a calm link does not get."""
    patience = []
    for jitter in (0.0, 1.4):
        suspicion, at = Suspicion(5.0), 0.0
        for number in range(WINDOW):
            at += 5.0 + (jitter if number % 2 else -jitter)
            suspicion.heard(at)
        patience.append(suspicion.patience_s)
    assert patience[1] > patience[0] + 2
    assert patience[0] == pytest.approx(5 + y_of(THRESHOLD) * MIN_SD_SHARE * 5, abs=1e-6)


@given(st.floats(7, 1e6))
def test_an_outage_is_not_learned(outage_s: float) -> None:
    """However long: the patience afterwards is as before."""
    suspicion = Suspicion(5.0)
    for number in range(20):
        suspicion.heard(5.0 * number)
    before = suspicion.patience_s
    suspicion.heard(95 + outage_s)
    assert suspicion.patience_s == before


def test_an_interval_over_a_stall_is_not_learned() -> None:
    """The loop says so; the next interval is learned again."""
    suspicion, calm = Suspicion(5.0), Suspicion(5.0)
    for each in (suspicion, calm):
        each.heard(0)
    suspicion.heard(6.0, learn=False)
    assert suspicion.patience_s == calm.patience_s
    suspicion.heard(12.0)
    assert suspicion.patience_s == pytest.approx(calm.patience_s + 1)


def test_any_packet_is_life_but_only_heartbeats_are_learned() -> None:
    """A thousand packets a second do not make a pause of a second look like a failure."""
    suspicion = Suspicion(5.0)
    at = 0.0
    for number in range(5_000):
        at = number / 100
        suspicion.heard(at, heartbeat=number % 500 == 0)
    assert suspicion.last_at == at
    assert suspicion.patience_s == pytest.approx(5 + y_of(THRESHOLD) * 0.5)
    assert suspicion.phi(at + 3) < 0.1
    assert suspicion.crosses_at == at + suspicion.patience_s


def test_a_lost_heartbeat_is_not_learned_though_traffic_went_on() -> None:
    """Ten seconds from heartbeat to heartbeat with packets between: no suspicion, and no interval either."""
    suspicion = Suspicion(5.0)
    suspicion.heard(0)
    for at in range(1, 10):
        suspicion.heard(at, heartbeat=False)
    suspicion.heard(10)
    assert suspicion.patience_s == pytest.approx(5 + y_of(THRESHOLD) * 0.5)


def test_a_suspicion_that_a_packet_ended_taints_the_interval() -> None:
    """Heartbeat, silence, suspicion, a probe's answer, heartbeat: this interval ends a suspicion too."""
    suspicion = Suspicion(5.0)
    suspicion.heard(0)
    suspicion.heard(6.2, heartbeat=False, learn=False)
    suspicion.heard(6.4)
    assert suspicion.patience_s == pytest.approx(5 + y_of(THRESHOLD) * 0.5)


@pytest.mark.parametrize(("interval_s", "window"), [(0.0, 200), (5.0, 0), (-1.0, 5)])
def test_nonsense_is_refused(interval_s: float, window: int) -> None:
    """An interval or window of nothing cannot be watched."""
    with pytest.raises(OursError):
        Suspicion(interval_s, window=window)


def test_the_score_is_scaled_by_the_deviation() -> None:
    """One deviation above the mean is phi 0.8, whatever the interval."""
    for interval_s in (0.1, 5.0, 3_600.0):
        assert Suspicion(interval_s).phi(interval_s * (1 + MIN_SD_SHARE)) == pytest.approx(phi_of(1), rel=1e-6)
