"""Shared memory and packets between daemon and child: laws, and what happens when the child lies."""

import asyncio
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.adapters.inference import protocol
from appliance.adapters.inference.arena import Arena, FreeList, Region, Segment
from appliance.adapters.inference.exchange import Exchange, Form
from appliance.adapters.inference.lanes import Lane, Pending
from appliance.adapters.inference.limits import Limits, RestartBudget
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.inference import Signature, TensorSpec
from appliance.contract.vocabulary import Datatype, Platform

SPEC = TensorSpec("x", Datatype.FP32, (-1, 4))
FORM_SIGNATURE = Signature(Platform.ONNX, (SPEC,), (TensorSpec("y", Datatype.FP32, (-1, 4)),))
X = np.arange(8, dtype=np.float32).reshape(2, 4)

sizes = st.integers(0, 1 << 40)
shapes = st.lists(st.integers(0, 1 << 20), max_size=protocol.AXES_MAX).map(tuple)
places = st.lists(st.tuples(sizes, shapes), max_size=8)


@given(sizes, sizes, st.integers(0, (1 << 63) - 1), places)
def test_packets_come_back_as_they_went(number: int, room: int, wanted: int, at: list[tuple[int, tuple[int, ...]]]) -> None:
    """Any batch message decodes to itself."""
    run, done = protocol.Run(number, 1, 2, room, 64, wanted, [(3, *one) for one in at]), protocol.Done(number, room, 0, at)
    assert protocol.decode_for_child(protocol.encode(run)) == run
    assert protocol.decode_for_daemon(protocol.encode(done)) == done


@given(st.binary(min_size=1, max_size=200))
def test_garbage_is_a_protocol_error_and_nothing_else(packet: bytes) -> None:
    """Whatever a broken child sends is decoded or refused, never an exception of another kind."""
    try:
        protocol.decode_for_daemon(packet)
    except OursError as error:
        assert error.reason == "protocol"  # noqa: PT017  (most packets raise, a lucky one may not)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_ranges_never_overlap_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    """Taken ranges are disjoint and inside; when all are given back, the whole size can be taken again."""
    free, taken = FreeList(100), list[tuple[int, int]]()
    for take, size in steps:
        if take:
            at = free.take(size)
            if at is not None:
                assert 0 <= at <= 100 - size
                assert all(at + size <= other or other + length <= at for other, length in taken)
                taken.append((at, size))
        elif taken:
            free.give(*taken.pop(size % len(taken)))
        assert free.used == sum(size for _, size in taken)
    for at, size in taken:
        free.give(at, size)
    assert free.take(100) == 0


def test_the_arena_grows_replaces_and_keeps_its_bound() -> None:
    """A larger region brings a larger segment, the smaller one goes when it is empty, and the bound holds."""
    alive: dict[int, int] = {}
    arena = Arena(8 << 20, lambda one, _fd: alive.update({one.number: one.ranges.size}), lambda one: alive.pop(one.number) and None)
    small = arena.take(1000)
    large = arena.take(3 << 20)
    assert small is not None
    assert large is not None
    assert len(alive) == 2
    assert arena.take(7 << 20) is None
    arena.give(small)
    assert list(alive) == [large.segment.number]
    arena.give(large)
    whole = arena.take(8 << 20)
    assert whole is not None
    assert sum(alive.values()) == arena.size == 8 << 20
    arena.close()


def test_a_child_cannot_truncate_what_the_daemon_maps() -> None:
    """The descriptor that a child gets is sealed against shrinking: no SIGBUS in the daemon."""
    kept: list[int] = []
    arena = Arena(1 << 20, lambda _one, fd: kept.append(os.dup(fd)), lambda _one: None)
    assert arena.take(10) is not None
    with pytest.raises(PermissionError):
        os.ftruncate(kept[0], 0)
    os.close(kept[0])
    arena.close()


def exchange() -> Exchange:
    return Exchange(1 << 20, lambda _one, _fd: None, lambda _one: None, lambda _one: None)


@pytest.mark.parametrize(
    "place", [(0, (2, 4)), (1 << 30, (2, 4)), (64, (1 << 20, 4)), (104, (2, 4))], ids=["inputs", "outside", "huge", "over the end"]
)
async def test_an_output_outside_its_room_is_not_read(place: protocol.Place) -> None:
    """A child cannot make the daemon read another batch's memory, nor beyond the arena."""
    through, form = exchange(), Form(FORM_SIGNATURE)
    form.rooms[(1, (2, 4))] = 64
    parcel = through.put(form, {"x": X}, ())
    assert parcel is not None
    with pytest.raises(OursError, match="outside"):
        through.open(parcel, protocol.Done(1, 0, 0, [place]), None)
    through.close()


async def test_spilled_outputs_are_read_once_and_their_room_is_remembered() -> None:
    """Outputs that did not fit come in a memfd; a memfd shorter than it says is refused; the next batch of that shape has room."""
    through, form = exchange(), Form(FORM_SIGNATURE)
    parcel = through.put(form, {"x": X}, ())
    assert parcel is not None
    assert parcel.room_bytes == 0
    fd = os.memfd_create("test")
    os.write(fd, X.tobytes())
    answer = through.open(parcel, protocol.Done(1, 0, 64, [(0, (2, 4))]), fd)
    assert np.array_equal(answer["y"], X)
    os.ftruncate(fd, 8)
    with pytest.raises(OursError, match="cut short"):
        through.open(parcel, protocol.Done(1, 0, 64, [(0, (2, 4))]), fd)
    os.close(fd)
    through.drop(parcel)
    again = through.put(form, {"x": X}, ())
    assert again is not None
    assert again.room_bytes == 64
    through.close()


async def test_who_waits_for_room_is_woken_or_told() -> None:
    """A full arena has no room for the next batch until one leaves; one that can never fit is refused; closing wakes everyone."""
    through = Exchange(4096, lambda _one, _fd: None, lambda _one: None, lambda _one: None)
    form = Form(FORM_SIGNATURE)
    big = np.zeros((200, 4), np.float32)
    first = through.put(form, {"x": big}, ())
    assert first is not None
    assert through.put(form, {"x": big}, ()) is None
    waiting = asyncio.create_task(through.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    through.drop(first)
    await waiting
    second = through.put(form, {"x": big}, ())
    assert second is not None
    last = asyncio.create_task(through.room())
    await asyncio.sleep(0)
    through.close()
    await last
    with pytest.raises(WorldError, match="gone"):
        through.put(form, {"x": big}, ())
    assert second.region.segment.ranges.used
    fresh = Exchange(4096, lambda _one, _fd: None, lambda _one: None, lambda _one: None)
    with pytest.raises(TheirsError, match="at most 4096"):
        fresh.put(form, {"x": np.zeros((1000, 4), np.float32)}, ())
    fresh.close()


async def test_outputs_that_would_not_fit_beside_the_inputs_spill() -> None:
    """A batch whose inputs fill the arena runs, also when the room that its outputs need is known by now."""
    through, form = Exchange(4096, lambda _one, _fd: None, lambda _one: None, lambda _one: None), Form(FORM_SIGNATURE)
    form.rooms[(1, (256, 4))] = 64
    parcel = through.put(form, {"x": np.zeros((256, 4), np.float32)}, ())
    assert parcel is not None
    assert parcel.room_bytes == 0
    through.close()


async def test_a_clock_starts_when_a_piece_comes_first() -> None:
    """Two pieces of 60 ms each with a deadline of 100 ms: the second is not overdue at 110 ms."""
    loop = asyncio.get_running_loop()
    overdue: list[Lane] = []
    lane = Lane(loop, overdue.append)
    for number in (1, 2):
        lane.add(Pending(number, "m", 0.1, loop.create_future()))
    await asyncio.sleep(0.06)
    lane.take(1)
    await asyncio.sleep(0.05)
    assert not overdue
    await asyncio.sleep(0.08)
    assert overdue == [lane]


async def test_an_answer_out_of_turn_is_refused() -> None:
    """Answers come in order; anything else is a broken child."""
    loop = asyncio.get_running_loop()
    lane = Lane(loop, lambda _lane: None)
    lane.add(Pending(1, "m", 1.0, loop.create_future()))
    two = lane.add(Pending(2, "m", 1.0, loop.create_future()))
    with pytest.raises(OursError, match="out of turn"):
        lane.take(2)
    assert lane.fail(lambda: WorldError("worker_lost", "gone")) == ("m",)
    with pytest.raises(WorldError):
        await two


def test_the_budget_repairs_at_once_then_backs_off_then_forgets() -> None:
    """Two losses are free, further ones wait 1, 2, 4, 4 s; after a quiet window all is new."""
    budget = RestartBudget(Limits(restarts=2, restart_window_s=30.0, backoff_s=1.0, backoff_max_s=4.0))
    assert [budget.lost(float(now)) for now in range(6)] == [0.0, 0.0, 1.0, 2.0, 4.0, 4.0]
    assert budget.lost(100.0) == 0.0


def test_regions_of_one_segment_are_apart() -> None:
    """Two batches in one segment get different offsets."""
    arena = Arena(1 << 20, lambda _one, _fd: None, lambda _one: None)
    one, two = arena.take(64), arena.take(64)
    assert isinstance(one, Region)
    assert isinstance(two, Region)
    assert isinstance(one.segment, Segment)
    assert one.segment is two.segment
    assert one.offset + 64 <= two.offset
    arena.close()
