"""The promises of renewal: waste is cleared, nothing else is touched, and no process is renewed for nothing twice."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.serve.renewal import PAUSE_S, SETTLED_BATCHES, THRESHOLD, WORTH_BYTES, Holding, Renew, Renewal

MIB = 1 << 20
WHOLE = Holding(worker=0, pid=10, held=100 * MIB, needed=100 * MIB, resting=True, batches=0)
TORN = replace(WHOLE, held=200 * MIB)

counts = st.integers(0, 400).map(lambda mib: mib * MIB)
holdings = st.builds(
    Holding,
    worker=st.integers(0, 2),
    pid=st.none() | st.integers(1, 3),
    held=st.none() | counts,
    needed=st.none() | counts,
    resting=st.booleans(),
    batches=st.sampled_from([0, 1, SETTLED_BATCHES, 10_000]),
    gpu_held=st.none() | counts,
    gpu_needed=counts,
)
moments = st.lists(
    st.tuples(
        st.floats(0, PAUSE_S),
        st.lists(holdings, max_size=3, unique_by=lambda one: one.worker),
        st.booleans(),
        st.none() | counts,
        st.booleans(),
    ),
    max_size=40,
)


def test_waste_is_cleared_and_the_reason_says_how_much() -> None:
    """Half of what a resting process holds is needed by nothing: it is renewed, and a person can read why."""
    told = Renewal().observe(0.0, [WHOLE, replace(TORN, worker=1)], calm=True)
    assert told == Renew(1, 0.5, "50% of its 200 MiB of anonymous memory serves nothing that is loaded")


def test_the_gpu_counts_by_itself() -> None:
    """A process whole on the host is renewed for what the driver says that it holds on the GPU."""
    told = Renewal().observe(0.0, [replace(WHOLE, gpu_held=1000 * MIB, gpu_needed=800 * MIB)], calm=True)
    assert told is not None
    assert (told.ratio, "GPU" in told.why) == (0.2, True)


@pytest.mark.parametrize(
    "holding",
    [
        WHOLE,
        replace(TORN, held=int(100 * MIB / (1 - THRESHOLD))),
        replace(TORN, held=16 * MIB - 1, needed=0),
        replace(TORN, resting=False),
        replace(TORN, batches=1),
        replace(TORN, pid=None),
        replace(TORN, held=None),
        replace(TORN, needed=None),
    ],
    ids=["whole", "at the threshold", "not worth it", "at work", "not settled", "none", "not measured", "not reported"],
)
def test_what_is_no_waste_is_left_alone(holding: Holding) -> None:
    """Only measured, resting, considerable waste of a process that has settled (or never worked) counts."""
    assert Renewal().observe(0.0, [holding], calm=True) is None


def test_it_waits_for_calm_and_for_room() -> None:
    """Not under pressure, and not without memory for a second copy; when both are there, at once."""
    renewal = Renewal()
    assert renewal.observe(0.0, [TORN], calm=False) is None
    assert renewal.observe(1.0, [TORN], calm=True, room_bytes=100 * MIB - 1) is None
    assert renewal.observe(2.0, [TORN], calm=True, room_bytes=100 * MIB) is not None


def test_done_without_a_renewal_is_refused() -> None:
    """An illegal event raises and changes nothing: the worker that is being renewed still is."""
    renewal = Renewal()
    assert renewal.observe(0.0, [TORN], calm=True) is not None
    with pytest.raises(ValueError, match="worker 1"):
        renewal.done(1)
    assert renewal.observe(1.0, [replace(TORN, worker=1)], calm=True) is None
    renewal.done(0)
    assert renewal.observe(2.0, [replace(TORN, worker=1)], calm=True) is not None


@given(moments)
def test_whatever_is_seen_the_bounds_hold(seen: list[tuple[float, list[Holding], bool, int | None, bool]]) -> None:
    """One at a time, each at most once per pause, only when calm, with room, at rest, and for waste that is worth it."""
    renewal, now, under_way = Renewal(), 0.0, None
    last: dict[int, float] = {}
    for passed_s, shown, calm, room, over in seen:
        now += passed_s
        if over and under_way is not None:
            renewal.done(under_way)
            under_way = None
        told = renewal.observe(now, shown, calm=calm, room_bytes=room)
        if told is None:
            continue
        holding = next(one for one in shown if one.worker == told.worker)
        assert under_way is None
        assert calm
        assert holding.resting
        assert room is None or room >= (holding.needed or 0)
        assert told.ratio > THRESHOLD
        assert max(told.ratio * (holding.held or 0), told.ratio * (holding.gpu_held or 0)) >= WORTH_BYTES - 1
        assert now - last.get(told.worker, -PAUSE_S) >= PAUSE_S
        last[told.worker], under_way = now, told.worker


@dataclass
class Sim:
    """A process that holds its need, its way of working (once it worked), and what it leaks per hour."""

    own: int
    leak: int
    pid: int = 1
    hours: int = 0

    def holding(self) -> Holding:
        held = 100 * MIB + self.own + self.leak * self.hours
        return Holding(0, self.pid, held, 100 * MIB, resting=True, batches=1000 * (1 + self.hours))

    def renewed(self) -> None:
        self.pid, self.hours = self.pid + 1, -1


def lived(sim: Sim, hours: int) -> list[int]:
    renewal, at = Renewal(), []
    for hour in range(hours):
        if renewal.observe(hour * PAUSE_S, [sim.holding()], calm=True) is not None:
            at.append(hour)
            sim.renewed()
            renewal.done(0)
        sim.hours += 1
    return at


@given(counts)
def test_a_way_of_working_is_no_waste(own: int) -> None:
    """However much a process holds while it works well, a day passes without a renewal."""
    assert lived(Sim(own, 0), 24) == []


@given(counts, st.integers(1, 200).map(lambda mib: mib * MIB))
def test_a_leak_is_bounded(own: int, leak: int) -> None:
    """Whatever leaks, what is wasted when it is renewed stays below a fifth of the whole and one more hour's leak."""
    sim, worst = Sim(own, leak), 0.0
    renewal = Renewal()
    for hour in range(200):
        waste, held = leak * sim.hours, sim.holding().held or 1
        worst = max(worst, (waste - leak) / held if waste > WORTH_BYTES + leak else 0.0)
        if renewal.observe(hour * PAUSE_S, [sim.holding()], calm=True) is not None:
            sim.renewed()
            renewal.done(0)
        sim.hours += 1
    assert worst <= 0.2
