"""The laws of admission to the durable queue."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.deferral import Bounds, Instant, Item, Overflow, Policy, Rules, Usage
from appliance.contract.errors import OursError
from appliance.core.reach.bounds import Admit, Refuse, admit, drop_rank
from appliance.core.reach.deferral import expired

NOW = Instant("boot", 1_000.0, 0.0, trusted=False)
RULES = Rules(
    {
        "kept": Policy(Overflow.REJECT, 300),
        "fading": Policy(Overflow.DROP_EXPIRED_FIRST, 300),
        "noise": Policy(Overflow.DROP_OLDEST_LOWEST_PRIO, 300),
    },
    Bounds(max_bytes=500, min_free_bytes=100),
)


def item(seq: int, kind: str, priority: int, size_bytes: int, age_s: float = 0.0) -> Item:
    """An item with a TTL of 60 s."""
    return Item(seq, "", kind, priority, str(seq), size_bytes, Instant("boot", 1_000.0 - age_s, 0.0, trusted=False), 0.0, ttl_s=60.0)


ROWS = st.tuples(st.sampled_from(sorted(RULES.policies)), st.integers(0, 9), st.integers(1, 120), st.sampled_from([0.0, 100.0]))


def offered(held: list[Item], newcomer: Item, disk_bytes: int) -> Admit | Refuse:
    """The decision, with the usage that these items make on a disk of that size."""
    total = sum(each.size_bytes for each in held)
    usage = Usage(total, sum(each.size_bytes for each in held if each.kind == newcomer.kind), disk_bytes - total)
    return admit(newcomer, usage, RULES, sorted(held, key=lambda each: drop_rank(each, RULES, NOW)), NOW)


@given(st.lists(ROWS, max_size=60), st.integers(150, 900))
def test_bounds_hold_whatever_comes(rows: list[tuple[str, int, int, float]], disk_bytes: int) -> None:
    """After each decision all three bounds hold; what is kept is never dropped; nothing more urgent goes for something less urgent."""
    held: list[Item] = []
    for seq, (kind, priority, size_bytes, age_s) in enumerate(rows):
        newcomer = item(seq, kind, priority, size_bytes, age_s)
        decision = offered(held, newcomer, disk_bytes)
        if isinstance(decision, Refuse):
            assert decision.reason in {"too_large", "queue_full", "disk_full"}
            assert decision.what
            continue
        for gone in decision.drop:
            assert RULES.policies[gone.kind].overflow is not Overflow.REJECT
            assert gone.priority >= priority or (gone.kind == "fading" and expired(gone, NOW))
        held = [each for each in held if each not in decision.drop] + [newcomer]
        total = sum(each.size_bytes for each in held)
        assert total <= RULES.bounds.max_bytes
        assert disk_bytes - total >= RULES.bounds.min_free_bytes
        for name, policy in RULES.policies.items():
            assert sum(each.size_bytes for each in held if each.kind == name) <= policy.max_bytes


@given(st.lists(ROWS, max_size=20), ROWS)
def test_nothing_is_dropped_without_need(rows: list[tuple[str, int, int, float]], new: tuple[str, int, int, float]) -> None:
    """Without the last dropped one the newcomer would not have fitted."""
    held: list[Item] = []
    for seq, row in enumerate(rows):
        decision = offered(held, item(seq, *row), 10_000)
        if isinstance(decision, Admit):
            held = [each for each in held if each not in decision.drop] + [item(seq, *row)]
    newcomer = item(99, *new)
    decision = offered(held, newcomer, 10_000)
    if isinstance(decision, Admit) and decision.drop:
        left = [each for each in held if each not in decision.drop[:-1]] + [newcomer]
        own = sum(each.size_bytes for each in left if each.kind == newcomer.kind)
        assert sum(each.size_bytes for each in left) > 500 or own > 300


def test_the_least_urgent_then_the_oldest_goes() -> None:
    """Of two with priority 8 the older; the more urgent stay."""
    held = [item(1, "noise", 5, 100), item(2, "noise", 8, 100), item(3, "noise", 8, 100)]
    assert offered(held, item(4, "noise", 5, 100), 10_000) == Admit((held[1],))


def test_expired_ones_go_first_where_the_class_says_so() -> None:
    """Even if they are more urgent than the newcomer; in the other class age alone is no reason."""
    old, fresh = item(1, "fading", 2, 150, age_s=61), item(2, "fading", 9, 150)
    assert offered([old, fresh], item(3, "fading", 9, 100), 10_000) == Admit((old,))
    old, fresh = item(1, "noise", 2, 150, age_s=61), item(2, "noise", 9, 150)
    assert offered([old, fresh], item(3, "noise", 9, 100), 10_000) == Admit((fresh,))


def test_telemetry_makes_way_for_a_promise_and_a_promise_for_nobody() -> None:
    """The whole store is full of noise: a result is kept. It is full of results: noise and results are refused."""
    noise = [item(seq, "noise", 8, 100) for seq in range(3)] + [item(seq, "fading", 8, 100) for seq in (3, 4)]
    decision = offered(noise, item(9, "kept", 3, 100), 10_000)
    assert isinstance(decision, Admit)
    assert len(decision.drop) == 1
    kept = [item(seq, "kept", 8, 100) for seq in range(3)]
    assert offered(kept, item(9, "kept", 0, 100), 10_000) == Refuse("queue_full", "class kept holds 300 of 300 bytes")
    refused = offered(kept, item(9, "noise", 0, 100), 350)
    assert isinstance(refused, Refuse)
    assert refused.reason == "disk_full"


def test_a_full_class_does_not_take_from_another() -> None:
    """The store has room, the class has not: only its own go, though others are less urgent."""
    own = [item(seq, "fading", 8, 100) for seq in (1, 2, 3)]
    assert offered([item(0, "noise", 9, 50), *own], item(9, "fading", 8, 100), 10_000) == Admit((own[0],))


def test_a_giant_displaces_nobody() -> None:
    """What can never fit is refused before anything is looked at."""
    refused = offered([item(1, "noise", 9, 100)], item(2, "noise", 0, 301), 10_000)
    assert isinstance(refused, Refuse)
    assert refused.reason == "too_large"


def test_candidates_are_read_no_further_than_needed() -> None:
    """A store of a million rows is not read to admit one."""
    read = 0

    def rows() -> Iterator[Item]:
        nonlocal read
        for seq in range(1_000):
            read += 1
            yield item(seq, "noise", 9, 100)

    assert isinstance(admit(item(2_000, "noise", 5, 150), Usage(300, 300, 10_000), RULES, rows(), NOW), Admit)
    assert read == 2
    assert isinstance(admit(item(2_001, "noise", 5, 150), Usage(0, 0, 10_000), RULES, rows(), NOW), Admit)
    assert read == 2


def test_unknown_classes_and_priorities_are_our_mistake() -> None:
    """They are made by this program, not by callers."""
    for wrong in (item(1, "unknown", 5, 1), item(1, "kept", 10, 1)):
        with pytest.raises(OursError):
            offered([], wrong, 10_000)
