"""The pull planner against a peer and a network that are played by hypothesis, on a virtual clock."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.contract.errors import OursError
from appliance.contract.models import CHUNK_BYTES
from appliance.core.change.transfer import TRANSITIONS, Ask, Command, Complete, GiveUp, Heard, Pace, Progress, Refused, Resumed, Transfer


def asked(commands: list[Command]) -> list[int]:
    return [command.index for command in commands if isinstance(command, Ask)]


def test_the_window_opens_at_once_and_moves_with_answers() -> None:
    """Eight questions first, in order; each answer makes room for one."""
    transfer = Transfer(range(10))
    assert asked(transfer.tick(0.0)) == list(range(8))
    assert transfer.deadline() == 2.0
    assert transfer.tick(1.9) == []
    assert asked(transfer.feed(Heard(3, ok=True), 1.9)) == [8]
    assert transfer.outstanding == frozenset({0, 1, 2, 4, 5, 6, 7, 8})


def test_nothing_missing_is_complete_at_once_and_once() -> None:
    """An artifact that is already here needs no question."""
    transfer = Transfer([])
    assert transfer.tick(0.0) == [Complete()]
    assert transfer.tick(1.0) == []
    assert transfer.deadline() is None


def test_last_answer_completes_once() -> None:
    """Doubles of the last answer, a refusal or hope afterwards change nothing."""
    transfer = Transfer([7])
    assert transfer.tick(0.0) == [Ask(7)]
    assert transfer.feed(Heard(7, ok=True), 0.1) == [Complete()]
    for event in (Heard(7, ok=True), Heard(7, ok=False), Refused("late"), Resumed()):
        assert transfer.feed(event, 0.2) == []
    assert transfer.progress is Progress.COMPLETE


def test_deadlines_double_up_to_the_cap() -> None:
    """2, 4, 8, 16, 30, 30 s for the tries of one chunk."""
    transfer = Transfer([0], Pace(patience=100))
    now, waits = 0.0, []
    commands = transfer.tick(now)
    for _ in range(6):
        assert commands == [Ask(0)]
        until = transfer.deadline()
        assert until is not None
        waits.append(until - now)
        now = until
        commands = transfer.tick(now)
    assert waits == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_losses_narrow_the_window_and_answers_widen_it() -> None:
    """A slow link is asked for less: after eight losses one question is open; then one more for each answer."""
    transfer = Transfer(range(40), Pace(patience=100))
    transfer.tick(0.0)
    assert len(asked(transfer.tick(2.0))) == 1
    widths = []
    for _ in range(10):
        transfer.feed(Heard(min(transfer.outstanding), ok=True), 2.1)
        widths.append(len(transfer.outstanding))
    assert widths == [2, 3, 4, 5, 6, 7, 8, 8, 8, 8]


def test_silence_ends_in_a_stall_and_hope_ends_the_stall() -> None:
    """Without one answer it stops asking; `Resumed` starts it again, and so does a late answer."""
    for sign in (Resumed(), Heard(0, ok=True)):
        transfer = Transfer(range(20))
        questions = len(transfer.tick(0.0))
        while (until := transfer.deadline()) is not None:
            questions += len(transfer.tick(until))
        assert transfer.progress is Progress.STALLED
        assert questions <= 16 + 8
        assert transfer.outstanding == frozenset()
        assert transfer.tick(1e6) == []
        assert asked(transfer.feed(sign, 1e6))
        assert transfer.progress is Progress.PULLING


def test_late_answer_is_not_asked_for_again() -> None:
    """A chunk that arrives after its deadline counts, in the queue as well as in a stall."""
    transfer = Transfer(range(3), Pace(patience=3))
    transfer.tick(0.0)
    transfer.tick(2.0)
    assert transfer.progress is Progress.STALLED
    seen = transfer.feed(Heard(1, ok=True), 2.5)
    assert asked(seen)
    assert 1 not in asked(seen)
    transfer.feed(Heard(0, ok=True), 2.6)
    assert transfer.feed(Heard(2, ok=True), 2.7) == [Complete()]


def test_refusal_ends_it_with_the_peers_word() -> None:
    """Once; afterwards nothing is asked."""
    transfer = Transfer(range(3))
    transfer.tick(0.0)
    assert transfer.feed(Refused("unknown_artifact"), 0.1) == [GiveUp("unknown_artifact")]
    assert transfer.feed(Refused("unknown_artifact"), 0.2) == []
    assert transfer.feed(Heard(0, ok=True), 0.2) == []
    assert transfer.tick(9.0) == []
    assert (transfer.deadline(), transfer.progress) == (None, Progress.REFUSED)


def test_refusal_in_a_stall_ends_it_too() -> None:
    """An answer of any kind is an answer."""
    transfer = Transfer([0], Pace(patience=1))
    transfer.tick(0.0)
    transfer.tick(2.0)
    assert transfer.progress is Progress.STALLED
    assert transfer.feed(Refused("gone"), 3.0) == [GiveUp("gone")]


def test_foreign_chunk_is_an_error_that_changes_nothing() -> None:
    """A chunk that was never missing cannot be heard of, in any state."""
    transfer = Transfer([1, 2])
    transfer.tick(0.0)
    with pytest.raises(OursError):
        transfer.feed(Heard(0, ok=True), 0.1)
    assert transfer.outstanding == frozenset({1, 2})
    assert transfer.deadline() == 2.0


def test_bad_chunks_are_bounded_too() -> None:
    """A peer that answers at once with rubbish gets as many questions as one that is silent."""
    transfer = Transfer(range(4))
    questions = list(asked(transfer.tick(0.0)))
    count = len(questions)
    while questions:
        fresh = asked(transfer.feed(Heard(questions.pop(), ok=False), 0.0))
        count += len(fresh)
        questions += fresh
    assert transfer.progress is Progress.STALLED
    assert count <= 16 + 8


def test_final_states_have_no_way_out() -> None:
    """The table says so, and every state can be reached in it."""
    assert not [state for state, _ in TRANSITIONS if state in (Progress.COMPLETE, Progress.REFUSED)]
    assert {*TRANSITIONS.values()} == set(Progress)


@pytest.mark.parametrize("rate", [CHUNK_BYTES / 2, 100_000.0, 3e7])
def test_rate_holds_over_any_time(rate: float) -> None:
    """Bytes asked for never exceed one window plus rate x time, and the rate is used."""
    transfer = Transfer(range(60), Pace(rate=rate))
    now, count = 5.0, 0
    commands = transfer.tick(now)
    steps = 0
    while transfer.progress is Progress.PULLING:
        steps += 1
        assert steps < 1000
        for index in asked(commands):
            count += 1
            transfer.feed(Heard(index, ok=True), now)
        count += len(transfer.outstanding)
        for index in list(transfer.outstanding):
            transfer.feed(Heard(index, ok=True), now)
        assert count * CHUNK_BYTES <= 8 * CHUNK_BYTES + rate * (now - 5.0) + 60 * 1024
        until = transfer.deadline()
        if until is None:
            break
        now = until
        commands = transfer.tick(now)
    assert transfer.progress is Progress.COMPLETE
    assert now - 5.0 <= (52 * CHUNK_BYTES) / rate + 0.001


@settings(max_examples=150, deadline=None)
@given(
    chunks=st.sets(st.integers(0, 500), max_size=60),
    seed=st.integers(0, 2**32),
    loss=st.floats(0.0, 0.95),
    pace=st.builds(Pace, window=st.integers(1, 12), patience=st.integers(1, 20), rate=st.one_of(st.none(), st.floats(1e4, 1e9))),
)
def test_every_chunk_arrives_whatever_is_lost(chunks: set[int], seed: int, loss: float, pace: Pace) -> None:
    """For any loss below 100 %, doubles and delays included: it ends, with each chunk, never with more than a window open or a double in flight."""
    network = Network(random.Random(seed), loss)
    transfer = Transfer(sorted(chunks), pace)
    network.take(transfer.tick(0.0), transfer, pace.window)
    for _ in range(20_000):
        if transfer.progress is Progress.COMPLETE:
            break
        event, now = network.next(transfer)
        before = transfer.outstanding
        if event is None:
            commands = transfer.tick(now)
        else:
            commands = transfer.feed(event, now)
            ended = {event.index} if isinstance(event, Heard) else set()
            assert not set(asked(commands)) & (before - ended)
        network.take(commands, transfer, pace.window)
    assert transfer.progress is Progress.COMPLETE
    assert network.completions == 1
    assert network.delivered == chunks


class Network:
    """Loses, doubles, delays and spoils answers by chance; wakes the machine at its deadline, and resumes it when it has stalled."""

    def __init__(self, chance: random.Random, loss: float) -> None:
        self.chance = chance
        self.loss = loss
        self.now = 0.0
        self.wire: list[tuple[float, Heard]] = []
        self.delivered: set[int] = set()
        self.completions = 0

    def take(self, commands: list[Command], transfer: Transfer, window: int) -> None:
        indices = asked(commands)
        assert len(set(indices)) == len(indices)
        assert len(transfer.outstanding) <= window
        assert not set(indices) & self.delivered
        assert set(indices) <= transfer.outstanding
        self.completions += commands.count(Complete())
        for index in indices:
            if self.chance.random() >= self.loss:
                answer = Heard(index, ok=self.chance.random() > 0.1)
                self.wire += [(self.now + self.chance.expovariate(1.0), answer)] * self.chance.choice([1, 1, 2])

    def next(self, transfer: Transfer) -> tuple[Heard | Resumed | None, float]:
        self.wire.sort(key=lambda entry: entry[0], reverse=True)
        until = transfer.deadline()
        if self.wire and (until is None or self.wire[-1][0] <= until):
            at, event = self.wire.pop()
            self.now = max(self.now, at)
            if event.ok:
                self.delivered.add(event.index)
            return event, self.now
        if until is None:
            return Resumed(), self.now
        self.now = max(self.now, until)
        return None, self.now
