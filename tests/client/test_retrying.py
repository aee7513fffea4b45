"""Laws of trying again: never too often, too soon, too late or elsewhere than allowed, whatever fails in whatever order."""

from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from appliance.client.retrying import ONCE, REMEDIES, RETURN_S, Attempts, Policy, Preference
from appliance.contract.errors import WorldError

DEADLINE = 10.0
FINAL = ("failed", "refused", "malformed", "dropped", "pending")

policies = st.builds(Policy, attempts=st.integers(1, 12), backoff_s=st.floats(0.001, 1), backoff_max_s=st.floats(0.001, 4))
failures = st.tuples(
    st.sampled_from(["busy", "unreachable"]),
    st.one_of(st.none(), st.floats(0, 3)),  # the server's hint
    st.floats(0, 2),  # how long the attempt took
    st.floats(0, 1),  # the dice
    st.booleans(),  # whether no other server may be asked
)
courses = st.tuples(policies, st.integers(1, 4), st.lists(failures, max_size=20))
Made = list[tuple[int, float, float]]


def walked(policy: Policy, servers: int, what: list[tuple[str, float | None, float, float, bool]], first: int = 0) -> Made:
    """Go through failures until it gives up; return the attempts as (server, begun, must be over)."""
    attempts, now, made = Attempts(policy, servers, DEADLINE, first=first), 0.0, []
    for reason, hint, took, chance, bound in what:
        made.append((attempts.server, now, attempts.until(now)))
        now = min(now + took, attempts.until(now))
        pause = attempts.failed(WorldError(reason, "x", retry_after_s=hint), now, chance, is_bound=bound)
        if pause is None:
            return made
        now += pause
    return made


@given(courses)
def test_never_more_often_than_allowed_nor_after_the_deadline(course: tuple[Policy, int, list]) -> None:
    """Attempts are bounded in number, each begins before the deadline, and must be over by it."""
    policy, servers, what = course
    made = walked(policy, servers, what)
    assert len(made) <= policy.attempts
    assert all(0 <= server < servers and begun < until <= DEADLINE for server, begun, until in made)


@given(policies, st.floats(0, 20), st.floats(0, 12), st.floats(0, 1))
def test_a_server_is_never_asked_before_it_said(policy: Policy, hint: float, now: float, chance: float) -> None:
    """After `busy` the same server waits at least as long as it said, and at most the longest pause more; not beyond the deadline."""
    pause = Attempts(policy, 1, DEADLINE).failed(WorldError("busy", "x", retry_after_s=hint), now, chance)
    if pause is None:
        assert policy.attempts == 1 or now + hint + policy.pause_s(0, chance) >= DEADLINE
    else:
        assert hint <= pause <= hint + policy.backoff_max_s
        assert now + pause < DEADLINE


@given(policies, st.integers(2, 5), st.integers(0, 4), st.integers(0, 30))
def test_every_server_is_tried_once_before_any_is_tried_again(policy: Policy, servers: int, first: int, count: int) -> None:
    """Where nobody is there, each is asked once without a pause, and after a pause all over again from the first."""
    assume(first < servers)
    made = walked(policy, servers, [("unreachable", None, 0.0, 0.5, False)] * count, first)
    for start in range(0, len(made), servers):
        group = made[start : start + servers]
        assert len({server for server, _, _ in group}) == len(group)
        assert len({begun for _, begun, _ in group}) == 1
        assert group[0][0] == (first if start == 0 else 0)
    for (_, before, _), (_, after, _) in pairwise(made[::servers]):
        assert after > before


@given(courses)
def test_what_was_perhaps_promised_is_asked_of_nobody_else(course: tuple[Policy, int, list]) -> None:
    """After a failure that binds, the same server is asked, or nobody."""
    policy, servers, what = course
    made = walked(policy, servers, what)
    for (server, _, _), (other, _, _), (_, _, _, _, bound) in zip(made, made[1:], what, strict=False):
        if bound:
            assert server == other


@given(courses)
def test_a_silent_server_leaves_time_for_another(course: tuple[Policy, int, list]) -> None:
    """While a server was not tried yet, an attempt takes at most half of the time that is left."""
    policy, servers, what = course
    seen: set[int] = set()
    for number, (server, begun, until) in enumerate(walked(policy, servers, what)):
        seen.add(server)
        if servers > 1 and number == 0 and policy.attempts > 1:
            assert until <= begun + (DEADLINE - begun) / 2
        if servers == 1 or number + 1 == policy.attempts:
            assert until == DEADLINE


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_pauses_double_up_to_their_bound(pauses: int, chance: float) -> None:
    """Full jitter: from nothing to twice the last bound, however often."""
    policy = Policy()
    assert 0 <= policy.pause_s(pauses, chance) <= policy.backoff_max_s
    assert policy.pause_s(pauses, 1.0) <= policy.pause_s(pauses + 1, 1.0)
    assert policy.pause_s(2, 1.0) == 4 * policy.backoff_s


def test_only_what_can_be_helped_is_tried_again() -> None:
    """A refusal, a broken answer and a server's own fault are final; so is everything for who asked for one attempt."""
    assert set(REMEDIES) == {"busy", "unreachable"}
    for reason in FINAL:
        assert Attempts(Policy(), 3, DEADLINE).failed(WorldError(reason, "x"), 0.0, 0.5) is None
    for reason in REMEDIES:
        assert Attempts(ONCE, 3, DEADLINE).failed(WorldError(reason, "x"), 0.0, 0.5) is None


def test_a_hint_beyond_the_deadline_sends_to_another_server() -> None:
    """Waiting would be in vain, and another server may have time."""
    attempts = Attempts(Policy(), 2, DEADLINE)
    assert attempts.failed(WorldError("busy", "x", retry_after_s=11.0), 0.0, 0.5) == 0.0
    assert attempts.server == 1
    assert attempts.failed(WorldError("busy", "x", retry_after_s=11.0), 0.1, 0.5) is None


def test_calls_return_to_the_first_server_after_a_while() -> None:
    """Who stepped in is asked until then; one call tries the first, the others wait for its success."""
    preference = Preference()
    preference.answered(1, 100.0)
    assert [preference.first(100.0), preference.first(100.0 + RETURN_S / 2)] == [1, 1]
    assert [preference.first(100.0 + RETURN_S), preference.first(101.0 + RETURN_S)] == [0, 1]
    preference.answered(0, 102.0 + RETURN_S)
    assert preference.first(103.0 + RETURN_S) == 0
