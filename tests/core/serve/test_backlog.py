"""The backlog's promises: order, bounds, admission, expiry, cancellation, patience."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.contract.errors import TheirsError
from appliance.contract.vocabulary import Outcome
from appliance.core.serve.backlog import AGEING_S, Admitted, Backlog, Refused
from appliance.core.serve.pace import Pace
from appliance.core.serve.patience import STRIKES
from appliance.core.serve.waitlist import Entry

LINEAR = Pace(tuple(0.010 * n for n in range(9)), batch=1, measured=True)
"""10 ms per sample, nothing gained by batching."""


def admitted(backlog: Backlog[str], item: str, now: float = 0.0, **words: object) -> Admitted[str]:
    outcome = backlog.offer(item, now, **words)  # type: ignore[arg-type] # test words
    assert isinstance(outcome, Admitted), outcome
    return outcome


def refused(outcome: object) -> Refused:
    assert isinstance(outcome, Refused), outcome
    return outcome


def items(backlog: Backlog[str], limit: int, now: float = 0.0) -> list[str]:
    batch = backlog.take(now, limit)
    return [entry.item for entry in batch.entries] if batch else []


def test_order_is_by_priority_then_by_age() -> None:
    """An urgent newcomer goes first; equals go as they came."""
    backlog = Backlog[str](8)
    for item, priority in [("a", 5), ("b", 5), ("urgent", 0), ("c", 5), ("bulk", 9)]:
        admitted(backlog, item, priority=priority)
    assert items(backlog, 8) == ["urgent", "a", "b", "c", "bulk"]


def test_waiting_is_worth_one_level_for_each_ageing_period() -> None:
    """A priority-9 request that waited a little longer than nine periods goes before a fresh priority 0, and not before."""
    for waited, first in [(9 * AGEING_S + 0.1, "old"), (9 * AGEING_S - 0.1, "fresh")]:
        backlog = Backlog[str](8)
        admitted(backlog, "old", 0.0, priority=9)
        admitted(backlog, "fresh", waited, priority=0)
        assert items(backlog, 1, waited) == [first]


def test_at_most_twice_the_batch_waits_counted_in_samples() -> None:
    """The bound is in samples, so one request of 8 weighs as much as eight of 1."""
    backlog = Backlog[str](8)
    admitted(backlog, "eight", size=8)
    for index in range(8):
        admitted(backlog, str(index))
    outcome = refused(backlog.offer("late", 0.0))
    assert outcome.reason is Outcome.BACKLOG_FULL
    assert outcome.retry_after_s is not None
    assert backlog.waiting == 16


def test_full_backlog_gives_its_worst_place_to_a_better_rank_and_tells_who_lost_it() -> None:
    """The youngest of the worst level is displaced; an equal is not."""
    backlog = Backlog[str](2)
    for index in range(3):
        admitted(backlog, f"bulk{index}", priority=9)
    admitted(backlog, "usual", priority=5)
    assert [entry.item for entry in admitted(backlog, "urgent", priority=0).displaced] == ["bulk2"]
    assert refused(backlog.offer("bulk3", 0.0, priority=9)).reason is Outcome.BACKLOG_FULL
    assert items(backlog, 9) == ["urgent", "usual", "bulk0", "bulk1"]


def test_displacing_is_all_or_nothing() -> None:
    """If not enough worse samples wait, nobody is displaced."""
    backlog = Backlog[str](2)
    admitted(backlog, "a", priority=0, size=2)
    admitted(backlog, "b", priority=0)
    admitted(backlog, "c", priority=9)
    refused(backlog.offer("two", 0.0, priority=4, size=2))
    assert len(backlog) == 3


def test_what_cannot_be_in_time_is_refused_on_arrival_with_the_time_it_lacks() -> None:
    """With 10 ms a sample, one running and three waiting, a newcomer ends at 50 ms: 45 is refused with 5 ms, 50 is not."""
    backlog = Backlog[str](8)
    backlog.pace = LINEAR
    admitted(backlog, "running")
    backlog.take(0.0, 1)
    for index in range(3):
        admitted(backlog, str(index))
    outcome = refused(backlog.offer("early", 0.0, deadline=0.045))
    assert outcome == Refused(Outcome.DEADLINE, pytest.approx(0.005))
    admitted(backlog, "fine", deadline=0.0501)


def test_a_deadline_that_even_an_idle_device_misses_has_no_retry_hint() -> None:
    """Waiting would not help, so none is suggested."""
    backlog = Backlog[str](8)
    backlog.pace = LINEAR
    assert refused(backlog.offer("hopeless", 0.0, deadline=0.009)) == Refused(Outcome.DEADLINE, None)
    assert refused(Backlog[str](8).offer("past", 1.0, deadline=1.0)) == Refused(Outcome.DEADLINE, None)


def test_worse_levels_do_not_count_as_ahead() -> None:
    """Bulk work does not make an urgent request late."""
    backlog = Backlog[str](8)
    backlog.pace = LINEAR
    for index in range(10):
        admitted(backlog, str(index), priority=9)
    refused(backlog.offer("usual", 0.0, priority=9, deadline=0.05))
    admitted(backlog, "urgent", priority=0, deadline=0.011)


def test_other_shapes_ahead_cost_their_own_batches() -> None:
    """Four shapes of one sample each are four batches, not one."""
    backlog = Backlog[str](8)
    backlog.pace = Pace(tuple([0.0] + [0.010] * 8), batch=8, measured=True)
    for shape in range(3):
        admitted(backlog, str(shape), shape=shape)
    refused(backlog.offer("other", 0.0, shape=9, deadline=0.035))
    admitted(backlog, "same", shape=9, deadline=0.041)


def test_expiry_is_a_timer_set_to_the_latest_useful_start() -> None:
    """The deadline is 100 ms, a sample takes 10: at 90 ms there is no point in waiting on."""
    backlog = Backlog[str](8)
    backlog.pace = LINEAR
    admitted(backlog, "a", deadline=0.100)
    admitted(backlog, "b")
    assert backlog.deadline() == pytest.approx(0.090)
    assert backlog.expire(0.089) == []
    assert [entry.item for entry in backlog.expire(0.0901)] == ["a"]
    assert backlog.deadline() is None
    assert items(backlog, 8) == ["b"]


def test_only_equal_shapes_batch_and_the_head_decides_which() -> None:
    """The batch is of the head's shape; the others keep their turn."""
    backlog = Backlog[str](8)
    for item, shape in [("a", 48), ("b", 96), ("c", 48), ("d", 96)]:
        admitted(backlog, item, shape=shape)
    assert items(backlog, 8) == ["a", "c"]
    assert items(backlog, 8) == ["b", "d"]


def test_requests_with_a_batch_of_their_own_stay_whole() -> None:
    """Three and then two fit into five; the next three wait; a head larger than the limit goes alone."""
    backlog = Backlog[str](8)
    for item, size in [("three", 3), ("two", 2), ("next", 3)]:
        admitted(backlog, item, size=size)
    assert items(backlog, 5) == ["three", "two"]
    assert items(backlog, 1) == ["next"]


def test_a_batch_does_not_grow_past_the_deadline_of_one_of_its_own() -> None:
    """With 10 ms a sample, a head due in 25 ms shares its batch with one other, not with three."""
    backlog = Backlog[str](8)
    backlog.pace = LINEAR
    admitted(backlog, "tight", deadline=0.025)
    for index in range(3):
        admitted(backlog, str(index))
    assert items(backlog, 8) == ["tight", "0"]


def test_cancelled_requests_cost_nothing_and_free_their_place() -> None:
    """A cancelled request is neither taken nor expired nor counted; cancelling twice is harmless."""
    backlog = Backlog[str](1)
    first = admitted(backlog, "gone", deadline=1.0)
    admitted(backlog, "stays", deadline=2.0)
    gone = backlog.cancel(first.ticket)
    assert isinstance(gone, Entry)
    assert backlog.cancel(first.ticket) is None
    assert backlog.deadline() == 2.0
    admitted(backlog, "new")
    assert items(backlog, 8) == ["stays", "new"]


def test_an_early_returner_finds_no_place_and_later_comers_get_later_turns() -> None:
    """Who was refused and comes back before its turn is refused while there is work; in its turn it goes before who never waited."""
    backlog = Backlog[str](4)
    backlog.pace = LINEAR
    for index in range(8):
        admitted(backlog, str(index))
    hint = refused(backlog.offer("pushy", 0.0, caller="pushy")).retry_after_s
    assert hint is not None
    backlog.take(0.0, 3)
    early = refused(backlog.offer("pushy", 0.001, caller="pushy"))
    assert early.retry_after_s == pytest.approx(hint - 0.001)
    fresh = refused(backlog.offer("fresh", 0.001, caller="fresh"))
    assert fresh.retry_after_s is not None
    admitted(backlog, "nameless", 0.001)
    admitted(backlog, "pushy", hint + 0.001, caller="pushy")
    assert fresh.retry_after_s + 0.001 == pytest.approx(hint + LINEAR.seconds(1))
    backlog.take(hint + 0.001, 1)
    admitted(backlog, "fresh", 0.002 + fresh.retry_after_s, caller="fresh")


def test_an_early_returner_is_served_rather_than_a_worker_left_idle() -> None:
    """Where the workers would have nothing to do, the hold does not apply."""
    backlog = Backlog[str](4)
    backlog.pace = LINEAR
    for index in range(8):
        admitted(backlog, str(index))
    refused(backlog.offer("pushy", 0.0, caller="pushy"))
    backlog.take(0.0, 8)
    admitted(backlog, "pushy", 0.001, caller="pushy")


@pytest.mark.parametrize("words", [{"priority": 10}, {"priority": -1}, {"size": 0}, {"size": 9}])
def test_nonsense_is_the_callers_fault_and_changes_nothing(words: dict[str, int]) -> None:
    """A priority or batch size out of range raises, with the range in its text."""
    backlog = Backlog[str](8)
    with pytest.raises(TheirsError, match="expected"):
        backlog.offer("bad", 0.0, **words)  # type: ignore[arg-type] # both are ints
    assert backlog.waiting == 0


@given(st.floats(0.0, 0.5), st.integers(0, 16), st.integers(1, 8), st.integers(1, 4))
def test_hint_is_positive_bounded_and_grows_with_the_backlog(busy: float, waiting: int, batch: int, workers: int) -> None:
    """A hint is between 1 ms and 1 s, and never shorter with more waiting."""
    backlog = Backlog[str](8)
    backlog.pace = Pace(tuple(busy * n for n in range(9)), batch, workers, measured=True)
    hints = [backlog.retry_after_s(0.0)]
    for index in range(waiting):
        backlog.offer(str(index), 0.0)
        hints.append(backlog.retry_after_s(0.0))
    assert hints == sorted(hints)
    assert hints[0] >= 0.001
    assert hints[-1] <= 1.0


class BacklogMachine(RuleBasedStateMachine):
    """Any sequence of calls, beside a list that does the same slowly."""

    @initialize(max_batch=st.integers(1, 6), seconds=st.none() | st.floats(0.001, 0.2))
    def begin(self, max_batch: int, seconds: float | None) -> None:
        self.backlog = Backlog[int](max_batch)
        if seconds is not None:
            self.backlog.pace = Pace(tuple(seconds * n for n in range(max_batch + 1)), max_batch, measured=True)
        self.model: dict[int, Entry[int]] = {}
        self.now = 0.0
        self.count = 0

    @rule(
        wait=st.floats(0, 2),
        size=st.integers(1, 6),
        shape=st.integers(0, 2),
        priority=st.integers(0, 9),
        patience=st.none() | st.floats(0, 3),
        caller=st.none() | st.integers(0, 2),
    )
    def offer(self, *, wait: float, size: int, shape: int, priority: int, patience: float | None, caller: int | None) -> None:
        self.now += wait
        self.count += 1
        size = min(size, self.backlog.max_batch)
        deadline = inf if patience is None else self.now + patience
        outcome = self.backlog.offer(self.count, self.now, deadline=deadline, size=size, shape=shape, priority=priority, caller=caller)
        if isinstance(outcome, Admitted):
            rank = self.now + priority * AGEING_S
            for lost in outcome.displaced:
                assert lost == self.model.pop(lost.ticket)
                assert lost.rank > rank
            self.model[outcome.ticket] = Entry(outcome.ticket, self.count, size, shape, priority, self.now, deadline, rank)
        else:
            assert outcome.retry_after_s is None or outcome.retry_after_s > 0

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.model)))
        assert self.backlog.cancel(ticket) == self.model.pop(ticket)

    @rule(wait=st.floats(0, 2))
    def expire(self, wait: float) -> None:
        self.now += wait
        for entry in self.backlog.expire(self.now):
            assert entry == self.model.pop(entry.ticket)
        assert all(entry.deadline > self.now for entry in self.model.values())

    @rule(limit=st.integers(1, 8))
    def take(self, limit: int) -> None:
        expected = sorted(self.model.values(), key=lambda entry: (entry.rank, entry.ticket))
        batch = self.backlog.take(self.now, limit)
        if not expected:
            assert batch is None
            return
        assert batch is not None
        alike = [entry for entry in expected if entry.shape == expected[0].shape]
        assert list(batch.entries) == alike[: len(batch.entries)]
        assert batch.samples == sum(entry.size for entry in batch.entries)
        assert batch.samples <= limit or len(batch.entries) == 1
        for entry in batch.entries:
            del self.model[entry.ticket]
        self.backlog.done(batch.number)

    @invariant()
    def bounds_hold(self) -> None:
        assert self.backlog.waiting == sum(entry.size for entry in self.model.values()) <= self.backlog.max_waiting
        assert len(self.backlog) == len(self.model)
        head = self.backlog.head()
        assert head == min(self.model.values(), key=lambda entry: (entry.rank, entry.ticket), default=None)


TestBacklogMachine = BacklogMachine.TestCase


def test_memory_follows_what_waits_not_what_ever_came() -> None:
    """After a hundred thousand cancelled requests the heaps hold a few hundred numbers and no item."""
    backlog = Backlog[str](8)
    admitted(backlog, "stays", priority=0, deadline=1e9)
    for index in range(100_000):
        backlog.cancel(admitted(backlog, "x", float(index), deadline=1e9).ticket)
    line = backlog._line
    assert len(line._due) < 200
    assert sum(len(group.heap) for group in line.groups.values()) < 200


def test_a_caller_deaf_to_refusals_is_told_only_when_its_hint_has_passed() -> None:
    """After `STRIKES` early returns in a row `hold` is said; each admission forgives half of them."""
    backlog: Backlog[str] = Backlog(1)
    for item in ("a", "b"):
        assert isinstance(backlog.offer(item, 0.0), Admitted)
    told = [backlog.offer("rude", 1e-4 * early, caller="x") for early in range(STRIKES + 3)]
    assert [isinstance(each, Refused) and each.hold for each in told] == [False] * STRIKES + [True] * 3
    assert isinstance(backlog.offer("other", 0.007, caller="y"), Refused)
    assert not getattr(backlog.offer("other", 0.008, caller="y"), "hold", True), "another caller's manners are its own"
    assert backlog.take(1.0, 2)
    assert isinstance(backlog.offer("rude", 2.0, caller="x"), Admitted)
    assert isinstance(backlog.offer("c", 2.0), Admitted)
    left = (STRIKES + 2) // 2
    again = [backlog.offer("rude", 2.0 + 1e-4 * early, caller="x") for early in range(STRIKES)]
    assert [isinstance(each, Refused) and each.hold for each in again].index(True) == STRIKES - left


def test_what_would_miss_its_slo_is_refused_but_what_was_admitted_is_not_expired_by_it() -> None:
    """An SLO decides on arrival only: nothing expires by it, and a deadline still does."""
    backlog: Backlog[str] = Backlog(2)
    backlog.pace = Pace((0.0, 0.1, 0.2), 1, measured=True)
    assert isinstance(backlog.offer("a", 0.0, slo=0.15), Admitted)
    late = backlog.offer("b", 0.0, slo=0.15)
    assert isinstance(late, Refused)
    assert (late.reason, late.retry_after_s) == (Outcome.DEADLINE, pytest.approx(0.05))
    assert backlog.deadline() is None
    assert backlog.expire(10.0) == []
    assert isinstance(backlog.offer("c", 10.0, deadline=10.5, slo=10.3), Admitted)
    assert backlog.deadline() == pytest.approx(10.4)
