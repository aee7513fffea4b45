"""The laws of placement: the load bound, minimal movement, and one result everywhere."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import OursError
from appliance.core.reach.ring import Ring

CAPACITIES = st.dictionaries(st.sampled_from([f"dev-{number}" for number in range(8)]), st.integers(1, 12), min_size=1, max_size=8)
KEYS = st.lists(st.text(max_size=4), max_size=120)


def ring_of(capacities: dict[str, int], slack_percent: int = 25) -> Ring:
    """A ring of these devices."""
    ring = Ring(slack_percent)
    for device, capacity in capacities.items():
        ring.register(device, capacity)
    return ring


@given(CAPACITIES, KEYS, st.integers(1, 100))
def test_the_bound_holds_after_each_placement(capacities: dict[str, int], keys: list[str], slack_percent: int) -> None:
    """Whatever the keys, all equal ones too: nobody has more than (1 + slack) x its share of the load, rounded up; and everything is placed."""
    ring, total = ring_of(capacities, slack_percent), sum(capacities.values())
    for number, key in enumerate(keys, 1):
        device = ring.place(str(number), key)
        assert device is not None
        share = (1 + slack_percent / 100) * number * capacities[device] / total
        assert ring.load(device) < share + 1 + 1e-9
    assert sum(ring.load(device) for device in ring.devices) == len(keys)
    assert all(ring.load(device) <= ring.bound(device) for device in ring.devices)


@given(CAPACITIES, KEYS, st.sampled_from(["joins", "leaves", "shrinks", "grows"]), st.integers(1, 12))
def test_only_the_changed_device_changes_anybodys_order(capacities: dict[str, int], keys: list[str], what: str, capacity: int) -> None:
    """Minimal movement: without that device, each key asks the others in the order in which it asked them before."""
    ring = ring_of(capacities)
    device = min(capacities) if what != "joins" else "newcomer"
    before = {key: [each for each in ring.order(key) if each != device] for key in keys}
    first = {key: next(ring.order(key)) for key in keys}
    if what == "leaves":
        ring.leave(device)
    else:
        old = capacities.get(device, 0)
        ring.register(device, {"joins": capacity, "shrinks": max(1, old - capacity), "grows": old + capacity}[what])
    for key in keys:
        assert [each for each in ring.order(key) if each != device] == before[key]
        now = next(ring.order(key), None)
        if what in {"joins", "grows"}:
            assert now in {first[key], device}
        elif first[key] != device:
            assert now == first[key]


@given(CAPACITIES, KEYS, st.lists(st.tuples(st.sampled_from([f"dev-{number}" for number in range(8)]), st.integers(0, 12)), max_size=5))
def test_rebalancing_moves_what_is_above_the_bounds_and_nothing_else(
    capacities: dict[str, int], keys: list[str], changes: list[tuple[str, int]]
) -> None:
    """After any changes: as many moves as there is surplus, then every bound holds, and a second rebalancing has nothing to do."""
    ring = ring_of(capacities)
    for number, key in enumerate(keys):
        ring.place(str(number), key)
    for device, capacity in changes:
        ring.register(device, capacity)
    if not any(ring._capacity.values()):
        assert ring.rebalance() == ()
        return
    surplus = sum(max(0, ring.load(device) - ring.bound(device)) for device in ring.devices)
    moves = ring.rebalance()
    assert len(moves) == surplus
    assert all(move.before != move.after for move in moves)
    assert all(ring.load(device) <= ring.bound(device) for device in ring.devices)
    assert ring.rebalance() == ()


@given(CAPACITIES, KEYS)
def test_what_a_leaving_device_held_is_placed_again_and_nothing_else_is_touched(capacities: dict[str, int], keys: list[str]) -> None:
    """The others keep theirs."""
    ring = ring_of(capacities)
    for number, key in enumerate(keys):
        ring.place(str(number), key)
    held = {device: set(ring._held[device]) for device in ring.devices}
    gone = ring.devices[0]
    assert set(ring.leave(gone)) == held[gone]
    assert {device: set(ring._held[device]) for device in ring.devices} == {each: held[each] for each in held if each != gone}
    assert ring.leave(gone) == ()


@given(CAPACITIES, st.lists(st.tuples(st.sampled_from([f"dev-{number}" for number in range(8)]), st.integers(0, 12)), max_size=10), KEYS)
def test_the_circle_has_no_memory(capacities: dict[str, int], changes: list[tuple[str, int]], keys: list[str]) -> None:
    """After any joins, growths and shrinks, keys ask as on a ring that was made with the last capacities."""
    ring, last = ring_of(capacities), {**capacities, **dict(changes)}
    for device, capacity in changes:
        ring.register(device, capacity)
    fresh = ring_of(dict(sorted(last.items())))
    assert ring._points == fresh._points
    assert [list(ring.order(key)) for key in keys] == [list(fresh.order(key)) for key in keys]


def test_shares_follow_capacity_not_presence() -> None:
    """An AGX with eight times a Nano's capacity is the first choice of about eight times as many keys."""
    ring = ring_of({"agx": 8, "nano": 1, "nx": 3})
    first = Counter(next(ring.order(f"key-{number}")) for number in range(12_000))
    for device, capacity in (("agx", 8), ("nano", 1), ("nx", 3)):
        assert first[device] == pytest.approx(1_000 * capacity, rel=0.3)


def test_a_small_device_joining_moves_few_first_choices() -> None:
    """One of eleven units of capacity joins: about an eleventh of the keys change their first device, all of them to it."""
    ring, keys = ring_of({"a": 4, "b": 6}), [f"key-{number}" for number in range(5_000)]
    before = {key: next(ring.order(key)) for key in keys}
    ring.register("c", 1)
    moved = [key for key in keys if next(ring.order(key)) != before[key]]
    assert {next(ring.order(key)) for key in moved} == {"c"}
    assert len(moved) / len(keys) == pytest.approx(1 / 11, rel=0.4)


def test_equal_keys_stay_together_while_there_is_room() -> None:
    """A stream among many goes to one device; one that is most of the load overflows along its order, never past a device with room."""
    ring = ring_of({"a": 1, "b": 1, "c": 1})
    for number in range(300):
        ring.place(f"other-{number}", f"other-{number}")
    order = list(ring.order("camera"))
    room = ring.bound(order[0]) - ring.load(order[0])
    assert room > 5
    assert [ring.place(f"camera-{number}", "camera") for number in range(room)] == [order[0]] * room
    for number in range(room, 300):
        expected = next(device for device in order if ring.load(device) < ring.bound(device, 1))
        assert ring.place(f"camera-{number}", "camera") == expected


def test_avoided_draining_and_missing_devices_get_nothing() -> None:
    """Capacity 0 takes nothing; where everybody is avoided or draining, there is no place."""
    ring = ring_of({"a": 1, "b": 0})
    assert [ring.place(str(number), str(number)) for number in range(5)] == ["a"] * 5
    assert ring.place("x", "x", avoid={"a"}) is None
    assert Ring().place("x", "x") is None
    ring.register("a", 0)
    assert ring.place("y", "y") is None


def test_releasing_frees_the_place_and_late_reports_do_no_harm() -> None:
    """A ticket is placed once at a time."""
    ring = ring_of({"a": 1})
    ring.place("1", "k")
    with pytest.raises(OursError, match="is on a"):
        ring.place("1", "k")
    ring.release("1")
    ring.release("1")
    assert ring.load("a") == 0
    assert ring.place("1", "k") == "a"


def test_nonsense_is_refused() -> None:
    """Negative capacity, no slack."""
    with pytest.raises(OursError):
        Ring().register("a", -1)
    with pytest.raises(OursError):
        Ring(0)


SCRIPT = """
from appliance.core.reach.ring import Ring
ring = Ring()
for number in range(6):
    ring.register(f"dev-{number}", number)
print([ring.place(str(number), f"key-{number % 40}") for number in range(200)])
"""


def test_every_process_places_alike() -> None:
    """Two processes with other hash seeds: the same places."""
    runs = [
        subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert b"dev-5" in runs[0]
