"""The batcher's promises: work-conserving, short and paying waits, whole requests, padding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import OursError
from appliance.core.serve.backlog import Admitted, Backlog
from appliance.core.serve.batching import Batcher, Dispatch, Nothing, Wait
from appliance.core.serve.pace import Pace

CPU = Pace(tuple(0.0055 * n for n in range(9)), batch=1, measured=True)
"""PP-OCRv4 on one thread: batching gives nothing."""
ACCELERATOR = Pace((0.0, *(0.010 + 0.0003 * n for n in range(1, 9))), batch=8, measured=True)
"""Fixed cost of 10 ms per call: eight samples cost little more than one."""


def backlog(pace: Pace | None, count: int = 0, *, gap_s: float | None = None, deadline: float | None = None) -> Backlog[int]:
    """A backlog in which `count` requests have arrived at time 0, after arrivals with the given mean gap."""
    made = Backlog[int](8)
    made.pace = pace
    for index in range(count):
        words = {} if deadline is None else {"deadline": deadline}
        assert isinstance(made.offer(index, 0.0, **words), Admitted)
    if gap_s is not None:
        made.gap_s = gap_s
    return made


def test_nothing_without_a_worker_or_without_work() -> None:
    """No idle worker or no request: nothing to decide."""
    assert isinstance(Batcher().next_batch(backlog(CPU, 3), 0.0, 0), Nothing)
    assert isinstance(Batcher().next_batch(backlog(CPU), 0.0, 2), Nothing)


@pytest.mark.parametrize("pace", [None, CPU, ACCELERATOR, Pace(ACCELERATOR.latency_s, 8, measured=False)])
def test_a_lone_request_runs_at_once_on_any_hardware(pace: Pace | None) -> None:
    """Whatever the profile says, one request after a silence is dispatched in the same instant."""
    decision = Batcher().next_batch(backlog(pace, 1), 0.0, 1)
    assert isinstance(decision, Dispatch)
    assert decision.samples == 1


def test_where_batching_gives_nothing_no_batch_is_made() -> None:
    """On a CPU that gains nothing, eight waiting requests run one by one: the first answer comes eight times earlier."""
    decision = Batcher().next_batch(backlog(CPU, 8), 0.0, 1)
    assert isinstance(decision, Dispatch)
    assert decision.samples == 1


def test_where_batching_pays_a_burst_is_waited_for_but_not_for_long() -> None:
    """Arrivals 0.5 ms apart on an accelerator: wait for a silence of four gaps, at most for the fill wait, then go."""
    waiting, batcher = backlog(ACCELERATOR, 2, gap_s=0.0005), Batcher()
    assert batcher.next_batch(waiting, 0.0, 1) == Wait(0.002)
    decision = batcher.next_batch(waiting, 0.002, 1)
    assert isinstance(decision, Dispatch)
    assert decision.samples == 2


def test_a_full_batch_is_not_waited_for() -> None:
    """Eight of eight are there."""
    decision = Batcher().next_batch(backlog(ACCELERATOR, 8, gap_s=0.0005), 0.0, 1)
    assert isinstance(decision, Dispatch)
    assert decision.samples == 8


def test_the_fill_wait_is_counted_from_when_the_worker_began_to_wait() -> None:
    """New arrivals do not prolong it: with one each millisecond and a fill wait of 4 ms, the batch of five goes at 4 ms."""
    waiting, batcher, now = backlog(ACCELERATOR, 1, gap_s=0.001), Batcher(fill_wait_s=0.004), 0.0
    decision = batcher.next_batch(waiting, now, 1)
    while isinstance(decision, Wait):
        now = min(decision.until, now + 0.001)
        waiting.offer(0, now)
        decision = batcher.next_batch(waiting, now, 1)
    assert isinstance(decision, Dispatch)
    assert (decision.samples, now) == (5, pytest.approx(0.004))


def test_nobodys_deadline_is_spent_on_waiting() -> None:
    """The wait ends while the full batch can still be in time."""
    waiting = backlog(ACCELERATOR, 2, gap_s=0.002, deadline=0.015)
    decision = Batcher().next_batch(waiting, 0.0, 1)
    assert isinstance(decision, Wait)
    assert decision.until + ACCELERATOR.seconds(8) <= 0.015 + 1e-9


def test_nothing_is_waited_for_while_another_shape_waits() -> None:
    """There is other work for the worker."""
    waiting = backlog(ACCELERATOR, 1, gap_s=0.0005)
    waiting.offer(9, 0.0, shape="other")
    assert isinstance(Batcher().next_batch(waiting, 0.0, 1), Dispatch)


def test_a_guess_is_no_measurement() -> None:
    """A first guess of the roofline never makes a worker wait."""
    guessed = Pace(ACCELERATOR.latency_s, 8, measured=False)
    assert isinstance(Batcher().next_batch(backlog(guessed, 2, gap_s=0.0005), 0.0, 1), Dispatch)


def test_heat_cuts_the_batch() -> None:
    """The limit set from outside is kept."""
    batcher = Batcher()
    batcher.limit = 3
    decision = batcher.next_batch(backlog(ACCELERATOR, 8), 0.0, 1)
    assert isinstance(decision, Dispatch)
    assert decision.samples == 3


def test_fixed_shapes_are_padded_to_the_next_compiled_size() -> None:
    """Three requests run as four where 1, 4 and 8 were compiled, as three where nothing was; nine cannot run."""
    batcher = Batcher((1, 4, 8))
    decision = batcher.next_batch(backlog(None, 3), 0.0, 1)
    assert isinstance(decision, Dispatch)
    assert (decision.samples, decision.pad_to) == (3, 4)
    assert Batcher().padded(3) == 3
    with pytest.raises(OursError, match="largest compiled batch is 8"):
        batcher.padded(9)


@given(
    latencies=st.lists(st.floats(1e-6, 0.1), min_size=8, max_size=8).map(sorted),
    round_trips=st.lists(st.floats(0.0, 0.05), min_size=1, max_size=40),
)
def test_a_caller_that_asks_one_at_a_time_never_waits(latencies: list[float], round_trips: list[float]) -> None:
    """For any latencies that do not fall with the batch, and any pauses, a closed loop of one is dispatched at once every time."""
    waiting, batcher, now = backlog(Pace((0.0, *latencies), batch=8, measured=True)), Batcher(), 0.0
    for pause in round_trips:
        waiting.offer(0, now)
        decision = batcher.next_batch(waiting, now, 1)
        assert isinstance(decision, Dispatch)
        waiting.done(decision.number)
        now += latencies[0] + pause


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 0.003), st.integers(0, 1)), min_size=1, max_size=60),
    pace=st.sampled_from([None, CPU, ACCELERATOR]),
    fill_wait_s=st.floats(0, 0.02),
    gap_s=st.sampled_from([0.0002, 0.001, 1.0]),
)
def test_an_idle_worker_holds_nobody_longer_than_the_fill_wait(
    arrivals: list[tuple[float, int]], pace: Pace | None, fill_wait_s: float, gap_s: float
) -> None:
    """With a worker that is always idle, no request is dispatched later than the fill wait after it came, and all are."""
    waiting, batcher = backlog(pace, gap_s=gap_s), Batcher(fill_wait_s=fill_wait_s)
    now, sent = 0.0, 0

    def run(until: float) -> None:
        nonlocal sent, now
        while True:
            decision = batcher.next_batch(waiting, now, 1)
            if isinstance(decision, Dispatch):
                sent += len(decision.entries)
                assert all(now - entry.arrived <= fill_wait_s + 1e-9 for entry in decision.entries)
                waiting.done(decision.number)
            elif isinstance(decision, Wait) and decision.until <= until:
                assert decision.until > now
                now = decision.until
            else:
                return

    for pause, shape in arrivals:
        arrival = now + pause
        run(arrival)
        now = arrival
        assert isinstance(waiting.offer(0, now, shape=shape), Admitted)
        run(now)
    run(now + 1.0)
    assert sent == len(arrivals)
