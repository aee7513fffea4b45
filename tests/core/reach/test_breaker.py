"""The laws of the circuit breaker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import OursError
from appliance.core.reach.breaker import TRANSITIONS, Breaker, BreakerSettings, Permit, Refusal, State

SETTINGS = BreakerSettings()


def call(breaker: Breaker, now: float, *, works: bool, chance: float = 0.5) -> State:
    """One whole call; a refused one changes nothing."""
    permit = breaker.permit(now)
    if isinstance(permit, Permit):
        if works:
            breaker.succeeded(permit, 0.05, now)
        else:
            breaker.failed(permit, now, chance=chance)
    return breaker.state


def opened(now: float = 0.0) -> Breaker:
    """A breaker that five failures opened."""
    breaker = Breaker()
    for _ in range(5):
        call(breaker, now, works=False)
    assert breaker.state is State.OPEN
    return breaker


def test_five_failures_in_a_row_open_it_and_four_do_not() -> None:
    """A success in between starts the count again."""
    breaker = Breaker()
    for _ in range(3):
        for _ in range(4):
            assert call(breaker, 0, works=False) is State.CLOSED
        assert call(breaker, 0, works=True) is State.CLOSED
    for _ in range(4):
        assert call(breaker, 0, works=False) is State.CLOSED
    assert call(breaker, 0, works=False) is State.OPEN


def test_an_open_breaker_refuses_at_once_and_says_until_when() -> None:
    """No call goes out before the backoff is over."""
    breaker = opened()
    due = breaker.deadline()
    assert due is not None
    assert breaker.permit(due / 2) == Refusal(due - due / 2)
    assert not breaker.would_permit(due * 0.999)
    assert breaker.would_permit(due)


def test_one_trial_at_a_time() -> None:
    """While it is under way everybody else is refused; success closes for all."""
    breaker = opened()
    trial = breaker.permit(1.0)
    assert isinstance(trial, Permit)
    assert trial.trial
    assert isinstance(breaker.permit(1.0), Refusal)
    turned = breaker.succeeded(trial, 0.1, 1.1)
    assert turned is not None
    assert turned.state is State.CLOSED
    assert [isinstance(breaker.permit(1.1), Permit) for _ in range(3)] == [True] * 3


def test_an_answer_after_the_deadline_is_a_failure() -> None:
    """150 ms: nobody waited for it."""
    breaker = Breaker()
    for _ in range(5):
        permit = breaker.permit(0)
        assert isinstance(permit, Permit)
        breaker.succeeded(permit, 0.151, 0)
    assert breaker.state is State.OPEN


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_backoff_doubles_to_two_seconds_with_half_of_it_chance(chances: list[float]) -> None:
    """Each failed trial waits between half and all of 0.1, 0.2, 0.4, … 2 s."""
    breaker, now = Breaker(), 0.0
    for _ in range(4):
        call(breaker, now, works=False)
    for number, chance in enumerate(chances):
        call(breaker, now, works=False, chance=chance)
        due = breaker.deadline()
        assert due is not None
        whole = min(0.1 * 2**number, 2.0)
        assert whole / 2 - 1e-9 <= due - now <= whole + 1e-9
        assert due - now == pytest.approx(whole * (1 + chance) / 2)
        now = due


def test_a_success_makes_the_backoff_short_again() -> None:
    """After a trial that passed the next opening waits as the first did."""
    breaker, now = opened(), 0.0
    for works in (False, False, False, True):
        now = breaker.deadline() or now
        call(breaker, now, works=works)
    for _ in range(5):
        call(breaker, now, works=False, chance=1.0)
    assert breaker.deadline() == pytest.approx(now + 0.1)


def test_failures_of_the_past_do_not_open_what_a_trial_closed() -> None:
    """Calls that began before it opened and end after it closed are ignored, good or bad."""
    breaker = Breaker()
    old = [breaker.permit(0) for _ in range(10)]
    for _ in range(5):
        call(breaker, 0, works=False)
    for permit in old:
        assert isinstance(permit, Permit)
        assert breaker.succeeded(permit, 0.1, 0) is None
    assert breaker.state is State.OPEN
    assert call(breaker, 1, works=True) is State.CLOSED
    for permit in old:
        assert isinstance(permit, Permit)
        breaker.failed(permit, 1)
    assert breaker.state is State.CLOSED


def test_a_lost_or_abandoned_trial_makes_way() -> None:
    """A caller that left, or that never reported, does not block the breaker for ever; its late report is ignored."""
    breaker = opened()
    trial = breaker.permit(1.0)
    assert isinstance(trial, Permit)
    breaker.abandoned(trial, 1.01)
    second = breaker.permit(1.01)
    assert isinstance(second, Permit)
    assert isinstance(breaker.permit(1.5), Refusal)
    third = breaker.permit(1.01 + SETTINGS.trial_s)
    assert isinstance(third, Permit)
    assert breaker.failed(second, 2.1) is None
    breaker.abandoned(second, 2.1)
    assert isinstance(breaker.permit(2.1), Refusal)
    assert breaker.succeeded(third, 0.1, 2.1) is not None


STEPS = st.lists(st.tuples(st.floats(0, 3), st.sampled_from(["permit", "good", "late", "bad", "leave"]), st.floats(0, 1)), max_size=80)


@given(STEPS)
def test_turns_follow_the_table_and_it_always_opens_up_again(steps: list[tuple[float, str, float]]) -> None:
    """For any order of reports: states change along the table, an open one calls nobody, and by its deadline it lets a trial through."""
    breaker, now, permits = Breaker(), 0.0, list[Permit]()
    allowed = {(before, after) for (before, _), after in TRANSITIONS.items()}
    for wait, what, chance in steps:
        now += wait
        before = breaker.state
        if what == "permit":
            permit = breaker.permit(now)
            if isinstance(permit, Permit):
                permits.append(permit)
                assert permit.trial == (before is not State.CLOSED)
            else:
                assert permit.retry_after_s > 0
        elif permits:
            permit = permits.pop()
            turned = None
            if what == "good":
                turned = breaker.succeeded(permit, 0.01, now)
            elif what == "late":
                turned = breaker.succeeded(permit, 9.0, now, chance=chance)
            elif what == "bad":
                turned = breaker.failed(permit, now, chance=chance)
            else:
                breaker.abandoned(permit, now)
            assert (turned is not None) == (breaker.state is not before)
        assert breaker.state is before or (before, breaker.state) in allowed
        due = breaker.deadline()
        assert (due is None) == (breaker.state is State.CLOSED)
        assert due is None or due <= now + 2.0
        assert due is None or breaker.would_permit(max(due, now))


def test_a_chance_that_is_none_is_refused_and_changes_nothing() -> None:
    """Jitter above 1 would wait longer than the cap."""
    breaker = Breaker()
    permit = breaker.permit(0)
    assert isinstance(permit, Permit)
    with pytest.raises(OursError, match="chance"):
        breaker.failed(permit, 0, chance=1.5)
    assert breaker._failures == 0
