"""The laws of the verdict on a hop: what convicts, what never does, and how it comes back."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import OursError
from appliance.contract.vocabulary import LinkState
from appliance.core.reach.partition import OWN_PATH_S, SHARED_S, TRANSITIONS, Commands, Partition, PartitionSettings, Probe, Verdict
from appliance.core.reach.suspicion import THRESHOLD

PATIENCE_S = 5 + 3.0903 * 0.5


class Hop:
    """Drives a machine as a loop does: it is woken at its deadlines; everything that it said is kept with its time."""

    def __init__(self, settings: PartitionSettings | None = None) -> None:
        self.machine = Partition(settings)
        self.now = 0.0
        self.said: list[tuple[float, Probe | Verdict]] = []
        self.seq = 0

    def note(self, commands: Commands) -> None:
        """Keep what was said."""
        self.said += [(self.now, command) for command in commands]

    def wait(self, seconds: float) -> None:
        """Let time pass, with every deadline kept."""
        until = self.now + seconds
        while (due := self.machine.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self.note(self.machine.tick(self.now))
        self.now = until

    def beat(self, count: int = 1, every: float = 5.0) -> None:
        """Heartbeats, each after its interval."""
        for _ in range(count):
            self.wait(every)
            self.seq += 1
            self.note(self.machine.heard(self.now, seq=self.seq))

    @property
    def verdicts(self) -> list[tuple[float, LinkState]]:
        """When which state was declared."""
        return [(at, command.state) for at, command in self.said if isinstance(command, Verdict)]

    @property
    def probes(self) -> list[float]:
        """When probes went out."""
        return [at for at, command in self.said if isinstance(command, Probe)]


def healthy(settings: PartitionSettings | None = None) -> Hop:
    """A hop that two heartbeats made healthy, with its record empty."""
    hop = Hop(settings)
    hop.beat(2)
    assert hop.machine.state is LinkState.HEALTHY
    hop.said.clear()
    return hop


def test_it_starts_degraded_and_two_heartbeats_make_it_healthy() -> None:
    """Nothing being known, nothing is claimed."""
    hop = Hop()
    assert hop.machine.state is LinkState.DEGRADED
    hop.beat()
    assert hop.verdicts == []
    hop.beat()
    assert hop.verdicts == [(10.0, LinkState.HEALTHY)]


@pytest.mark.parametrize(("verdict_s", "probes"), [(OWN_PATH_S, 4), (SHARED_S, 7)])
def test_silence_is_suspected_then_probed_then_convicted(verdict_s: float, probes: int) -> None:
    """Probes each second from phi 3 on; four unanswered on a path of their own, seven on the shared stream."""
    hop = healthy(PartitionSettings(verdict_s=verdict_s))
    hop.wait(60)
    [(at, state)] = hop.verdicts
    assert state is LinkState.PARTITIONED
    assert at == pytest.approx(10 + PATIENCE_S + verdict_s, abs=1e-3)
    assert hop.probes == pytest.approx([10 + PATIENCE_S + number for number in range(probes)], abs=1e-3)
    assert f"{probes} probes unanswered" in hop.said[-1][1].why  # type: ignore[union-attr]  # the last is the verdict
    assert hop.machine.deadline() is None


@pytest.mark.parametrize("waited", [0.0, 1.5, 3.9, 6.8])
def test_one_answer_ends_the_suspicion_and_nobody_outside_sees_it(waited: float) -> None:
    """Up to the last moment: no verdict, and the silence is counted from the answer."""
    hop = healthy()
    hop.wait(PATIENCE_S + 0.01 + waited)
    assert hop.machine.suspecting
    probe = next(command for _, command in hop.said if isinstance(command, Probe))
    hop.note(hop.machine.answered(probe.id, hop.now))
    assert not hop.machine.suspecting
    assert hop.verdicts == []
    assert hop.machine.phi(hop.now + 1) < 0.1
    assert hop.machine.phi(hop.now + 20) > THRESHOLD


def test_a_late_heartbeat_ends_it_too() -> None:
    """Any packet does: a heartbeat, or anything without a number."""
    for seq in (3, None):
        hop = healthy()
        hop.wait(10)
        assert hop.machine.suspecting
        hop.note(hop.machine.heard(hop.now, seq=seq))
        assert not hop.machine.suspecting
        assert hop.verdicts == []


def test_the_cap_holds_whatever_phi_says() -> None:
    """A link so jittery that its patience and the probes would take longer is convicted after 20 s of silence."""
    hop = Hop(PartitionSettings(interval_s=5.0, phi=300.0))
    hop.beat(3)
    hop.said.clear()
    hop.wait(60)
    assert hop.verdicts == [(pytest.approx(35.0), LinkState.PARTITIONED)]


def test_two_heartbeats_bring_it_back_degraded_and_a_clean_minute_healthy() -> None:
    """Recovery is slow on purpose: the queue replays into it."""
    hop = healthy()
    hop.wait(100)
    hop.said.clear()
    hop.beat()
    assert hop.verdicts == []
    hop.beat()
    back = hop.now
    hop.beat(20)
    assert hop.verdicts == [(back, LinkState.DEGRADED), (pytest.approx(back + 60), LinkState.HEALTHY)]


def test_two_heartbeats_far_apart_are_not_a_return() -> None:
    """One packet a minute gets through: the hop stays partitioned."""
    hop = healthy()
    hop.wait(100)
    hop.said.clear()
    hop.beat(10, every=60.0)
    assert hop.verdicts == []


def test_packets_without_a_number_do_not_end_a_partition() -> None:
    """A stray answer is no return."""
    hop = healthy()
    hop.wait(100)
    for _ in range(10):
        hop.wait(1)
        hop.note(hop.machine.heard(hop.now))
    assert hop.machine.state is LinkState.PARTITIONED


def test_a_suspicion_during_recovery_starts_the_clean_minute_again() -> None:
    """Sixty seconds clean means without suspicion."""
    hop = healthy()
    hop.wait(100)
    hop.beat(2)
    hop.beat(8)
    hop.said.clear()
    hop.beat(1, every=9.0)
    suspected_at = hop.probes[0]
    hop.beat(30)
    assert hop.verdicts == [(pytest.approx(suspected_at + 60), LinkState.HEALTHY)]


def test_three_suspicions_in_ten_minutes_degrade() -> None:
    """One gap does not, two do not; then a clean minute heals."""
    hop = healthy()
    for _ in range(2):
        hop.beat(1, every=8.0)
        hop.beat(3)
    assert hop.verdicts == []
    hop.beat(1, every=8.0)
    assert [state for _, state in hop.verdicts] == [LinkState.DEGRADED]
    hop.beat(30)
    assert [state for _, state in hop.verdicts] == [LinkState.DEGRADED, LinkState.HEALTHY]


def test_slow_round_trips_degrade_and_fast_ones_heal_after_a_clean_minute() -> None:
    """The lower mark counts on the way back: 130 ms is not clean."""
    hop = healthy()
    for rtt_s, count, state in ((0.2, 20, LinkState.DEGRADED), (0.13, 100, LinkState.DEGRADED), (0.05, 100, LinkState.HEALTHY)):
        for _ in range(count):
            hop.beat()
            hop.note(hop.machine.measured(rtt_s, hop.now))
        assert hop.machine.state is state


def test_unanswered_questions_degrade_a_link_that_only_hears() -> None:
    """One-way loss: heartbeats arrive, nothing that we ask is answered."""
    hop = healthy()
    for _ in range(8):
        hop.beat()
        hop.note(hop.machine.missed(hop.now))
    assert hop.machine.state is LinkState.DEGRADED


def test_questions_that_a_partition_left_unanswered_do_not_slow_the_recovery() -> None:
    """A hundred of them, then two heartbeats and a clean minute."""
    hop = healthy()
    hop.wait(100)
    for _ in range(100):
        hop.note(hop.machine.missed(hop.now))
    hop.beat(15)
    assert hop.machine.quality.loss == 0
    assert hop.machine.state is LinkState.HEALTHY


@given(st.floats(1.1, 1e6), st.floats(0, PATIENCE_S + SHARED_S - 0.1))
def test_a_stalled_detector_convicts_nobody(stall_s: float, into: float) -> None:
    """Stopped at any moment for any time: the verdict comes later by exactly the stall, and a packet that waits in the socket prevents it."""
    awake, stalled, saved = healthy(), healthy(), healthy()
    awake.wait(60)
    for hop in (stalled, saved):
        hop.wait(into)
        due = hop.machine.deadline()
        assert due is not None
        hop.now = due + stall_s
    stalled.note(stalled.machine.tick(stalled.now))
    assert stalled.verdicts == [] or into > PATIENCE_S + SHARED_S - 1.5
    stalled.wait(60)
    assert stalled.verdicts == [(pytest.approx(awake.verdicts[0][0] + stall_s, rel=1e-9, abs=1e-4), LinkState.PARTITIONED)]
    saved.note(saved.machine.heard(saved.now, seq=3))
    assert saved.verdicts == []
    assert not saved.machine.suspecting


def test_an_interval_over_a_stall_is_not_learned() -> None:
    """A minute of SIGSTOP leaves the patience as it was."""
    hop = healthy()
    hop.beat(10)
    before = hop.machine._suspicion.patience_s
    hop.now += 60
    hop.note(hop.machine.heard(hop.now, seq=hop.seq + 12))
    assert hop.machine._suspicion.patience_s == before
    hop.seq += 12
    hop.beat(3)
    assert hop.verdicts == []


def test_after_a_stall_a_dead_peer_is_convicted_in_the_usual_time() -> None:
    """Mercy is not blindness."""
    hop = healthy()
    hop.now += 1_000
    hop.note(hop.machine.tick(hop.now))
    woke = hop.now
    hop.wait(30)
    [(at, state)] = hop.verdicts
    assert state is LinkState.PARTITIONED
    assert at == pytest.approx(woke + SHARED_S, abs=0.01)


def test_a_closed_session_is_a_suspicion_at_once_and_convicts_without_probes() -> None:
    """No probe can go; the verdict does not wait for phi."""
    hop = healthy()
    hop.wait(1)
    hop.note(hop.machine.session(up=False, now=hop.now))
    assert hop.machine.suspecting
    hop.wait(30)
    assert hop.probes == []
    assert hop.verdicts == [(pytest.approx(11 + SHARED_S), LinkState.PARTITIONED)]
    assert "session closed" in hop.said[-1][1].why  # type: ignore[union-attr]  # the last is the verdict


def test_a_session_that_comes_back_is_asked_before_it_is_judged() -> None:
    """Reconnected after 3 s: probes go at once, an answer ends it; no answer convicts after a full round."""
    for answered in (True, False):
        hop = healthy()
        hop.note(hop.machine.session(up=False, now=hop.now))
        hop.wait(3)
        hop.note(hop.machine.session(up=True, now=hop.now))
        assert hop.probes == [hop.now]
        if answered:
            hop.note(hop.machine.answered(1, hop.now))
            hop.beat(5)
            assert hop.verdicts == []
        else:
            hop.wait(30)
            assert hop.verdicts == [(pytest.approx(13 + SHARED_S), LinkState.PARTITIONED)]


def test_a_flapping_session_without_a_peer_behind_it_is_convicted_by_the_cap() -> None:
    """Reconnecting every 3 s is no evidence of life."""
    hop = healthy()
    for _ in range(20):
        hop.note(hop.machine.session(up=False, now=hop.now))
        hop.wait(1.5)
        hop.note(hop.machine.session(up=True, now=hop.now))
        hop.wait(1.5)
    assert hop.verdicts == [(pytest.approx(30.0), LinkState.PARTITIONED)]


@given(st.lists(st.floats(0.01, 5.0), min_size=5, max_size=80))
def test_a_peer_that_is_heard_in_time_is_never_convicted(gaps: list[float]) -> None:
    """Any rhythm, as long as no gap is above the interval."""
    hop = healthy()
    for gap in gaps:
        hop.beat(1, every=gap)
    assert LinkState.PARTITIONED not in [state for _, state in hop.verdicts]


EVENTS = st.lists(
    st.tuples(st.floats(0, 30), st.sampled_from(["beat", "packet", "answer", "missed", "slow", "up", "down", "none"])), max_size=60
)


def play(hop: Hop, what: str) -> None:
    """One event of any kind."""
    machine, now = hop.machine, hop.now
    if what == "beat":
        hop.seq += 1
        hop.note(machine.heard(now, seq=hop.seq))
    elif what in {"up", "down"}:
        hop.note(machine.session(up=what == "up", now=now))
    elif what != "none":
        calls = {
            "packet": lambda: machine.heard(now),
            "answer": lambda: machine.answered(1, now),
            "missed": lambda: machine.missed(now),
            "slow": lambda: machine.measured(0.4, now),
        }
        hop.note(calls[what]())


@given(EVENTS)
def test_verdicts_follow_the_table_and_silence_is_never_longer_than_the_cap(events: list[tuple[float, str]]) -> None:
    """For any input: a verdict changes the state along the table and says why; after 20 s without a packet the hop is PARTITIONED."""
    hop, heard, steps = Hop(), 0.0, {(before, after) for (before, _), after in TRANSITIONS.items()}
    state = hop.machine.state
    for wait, what in events:
        seen = len(hop.said)
        hop.wait(wait)
        if hop.now - heard >= 20 + 1e-6:
            assert hop.machine.state is LinkState.PARTITIONED
        play(hop, what)
        heard = hop.now if what in {"beat", "packet", "answer", "slow"} else heard
        for _, command in hop.said[seen:]:
            if isinstance(command, Verdict):
                assert (state, command.state) in steps
                assert command.why
                state = command.state
        assert state is hop.machine.state


@given(EVENTS)
def test_equal_inputs_give_equal_verdicts(events: list[tuple[float, str]]) -> None:
    """No clock, no chance."""
    one, other = Hop(), Hop()
    for wait, what in events:
        for hop in (one, other):
            hop.wait(wait)
            play(hop, what)
    assert one.said == other.said
    assert one.machine.deadline() == other.machine.deadline()


@given(EVENTS)
def test_deadlines_lie_ahead(events: list[tuple[float, str]]) -> None:
    """After a tick the next deadline is later than now: a loop that obeys never spins."""
    hop = Hop()
    for wait, what in events:
        hop.wait(wait)
        play(hop, what)
        hop.note(hop.machine.tick(hop.now))
        assert (hop.machine.deadline() or inf) > hop.now


def test_time_that_goes_back_is_an_error_and_changes_nothing() -> None:
    """A clock that jumps must not convict."""
    hop = healthy()
    before = (hop.machine.state, hop.machine.deadline())
    for call in (lambda: hop.machine.tick(1), lambda: hop.machine.heard(1), lambda: hop.machine.session(up=False, now=1)):
        with pytest.raises(OursError, match="time went from"):
            call()
    assert (hop.machine.state, hop.machine.deadline()) == before


def test_an_impossible_turn_is_an_error() -> None:
    """The table is the law for the machine itself too."""
    machine = Partition()
    machine.state = LinkState.PARTITIONED
    with pytest.raises(OursError, match="no event of state"):
        machine._turn(next(sign for sign in {sign for _, sign in TRANSITIONS} if sign.name == "FAULTY"), "", 0.0)
