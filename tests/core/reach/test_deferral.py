"""The laws of the durable queue's decisions: order, ageing, age over reboots, failures, forgetting."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.deferral import AGEING_S, DEDUPE_HORIZON_S, Instant, Item, Kind, Overflow, Policy
from appliance.core.reach.deferral import (
    CONSEQUENCES,
    POLICIES,
    Bury,
    Consequence,
    Epoch,
    Failure,
    Retry,
    age_s,
    due,
    expired,
    forgettable,
    mended,
    resumed,
    settle,
)

PUT = Instant("boot-1", 100.0, 1_000_000.0, trusted=True)
POLICY = Policy(Overflow.REJECT, 1_000)


def item(seq: int, key: str = "", priority: int = 5, queued_s: float = 0.0, **rest: float) -> Item:
    """An item without anything special."""
    return Item(seq, key, "event", priority, f"idem-{seq}", 10, PUT, queued_s, **rest)  # type: ignore[arg-type]  # floats fit them


ITEMS = st.lists(
    st.tuples(st.sampled_from(["", "a", "b", "c"]), st.integers(0, 9), st.floats(0, 1_000), st.floats(0, 1_000)), max_size=30
).map(lambda rows: [item(seq, key, priority, queued_s, not_before_s=later) for seq, (key, priority, queued_s, later) in enumerate(rows)])


@given(ITEMS, st.floats(0, 1_000), st.sets(st.integers(0, 30)), st.integers(1, 10))
def test_due_items_keep_every_rule(items: list[Item], now_s: float, leased: set[int], limit: int) -> None:
    """Nothing before its time, nothing leased, nothing past an earlier one of its key; in rank order, and nothing better was left out."""
    chosen = due(items, now_s, leased=leased, limit=limit).items
    assert len(chosen) <= limit
    assert list(chosen) == sorted(chosen, key=lambda each: (each.rank_s, each.seq))

    def eligible(each: Item) -> bool:
        earlier = [other for other in items if other.key == each.key and other.seq < each.seq]
        return each.not_before_s <= now_s and each.seq not in leased and (not each.key or not earlier)

    every = [each for each in items if eligible(each)]
    assert set(chosen) <= set(every)
    if len(chosen) < limit:
        assert set(chosen) == set(every)
    else:
        worst = max((each.rank_s, each.seq) for each in chosen)
        assert all((each.rank_s, each.seq) >= worst for each in every if each not in chosen)


@given(ITEMS, st.floats(0, 1_000))
def test_the_deadline_is_when_something_more_is_due(items: list[Item], now_s: float) -> None:
    """Nothing new before it, something at it; None: nothing ever without an event."""
    now = due(items, now_s, limit=99)
    if now.deadline is None:
        assert due(items, 1e9, limit=99).items == now.items
    else:
        assert now.deadline > now_s
        assert due(items, (now_s + now.deadline) / 2, limit=99).items == now.items or (now_s + now.deadline) / 2 == now.deadline
        assert len(due(items, now.deadline, limit=99).items) > len(now.items)


@given(ITEMS)
def test_draining_one_by_one_keeps_the_order_of_each_key(items: list[Item]) -> None:
    """With successes only: all go, those of a key in the order of seq."""
    waiting, sent = list(items), list[Item]()
    while waiting:
        [head] = due(waiting, 2_000, limit=1).items
        waiting.remove(head)
        sent.append(head)
    for key in "abc":
        seqs = [each.seq for each in sent if each.key == key]
        assert seqs == sorted(seqs)


def test_a_minute_of_waiting_is_worth_one_level() -> None:
    """A priority 6 that has waited for more than a minute goes before a fresh 5."""
    old = item(1, priority=6, queued_s=0)
    assert due([old, item(2, priority=5, queued_s=AGEING_S - 1)], 100).items[0].seq == 2
    assert due([old, item(2, priority=5, queued_s=AGEING_S + 1)], 100).items[0].seq == 1


@given(st.integers(0, 9), st.integers(0, 9), st.floats(0, 1e5))
def test_nothing_starves(low: int, high: int, wait_s: float) -> None:
    """After ten levels' worth of waiting an item goes before anything that comes new."""
    old = item(1, priority=low, queued_s=0)
    new = item(2, priority=high, queued_s=10 * AGEING_S + wait_s)
    assert due([new, old], 1e6).items[0] is old


def test_an_item_in_backoff_holds_the_later_ones_of_its_key_only() -> None:
    """Order is kept where it was asked for."""
    items = [item(1, "a", not_before_s=50), item(2, "a"), item(3, "b"), item(4)]
    assert {each.seq for each in due(items, 0, limit=9).items} == {3, 4}
    assert due(items, 0, limit=9).deadline == 50
    assert {each.seq for each in due(items, 0, limit=9, leased={3}).items} == {4}


INSTANTS = st.builds(Instant, st.sampled_from(["boot-1", "boot-2"]), st.floats(0, 1e6), st.floats(0, 2e9), trusted=st.booleans())


@given(INSTANTS, st.floats(0, 1e5), st.one_of(st.none(), st.floats(0, 1e5)), st.floats(-1e5, 1e5), st.floats(0, 1e5))
def test_nothing_expires_before_its_time(put: Instant, uptime_s: float, down_s: float | None, skew_s: float, ttl_s: float) -> None:
    """However the wall clock jumps while it is not trusted, in one boot or after a time down: the claimed age is never above the true one."""
    true_s = uptime_s + (down_s or 0.0)
    boot_id, boot_s = (put.boot_id, put.boot_s + uptime_s) if down_s is None else ("boot-3", uptime_s)
    now = Instant(boot_id, boot_s, put.wall_s + true_s + skew_s, trusted=False)
    assert 0 <= age_s(put, now) <= true_s + 1e-6
    if expired(replace(item(1), put=put, ttl_s=ttl_s), now):
        assert true_s >= ttl_s - 1e-6


def test_within_a_boot_the_wall_clock_does_not_matter() -> None:
    """NTP sets the clock 50 years forward: nothing expires; boot time alone counts."""
    fresh = replace(item(1), ttl_s=60.0)
    assert not expired(fresh, Instant("boot-1", 159.0, 9e9, trusted=True))
    assert expired(fresh, Instant("boot-1", 160.0, 0.0, trusted=False))


def test_over_a_reboot_trusted_clocks_count_and_others_wait() -> None:
    """A day off: known once both readings are trusted; else only the uptime is claimed."""
    day = replace(item(1), ttl_s=3_600.0)
    after = Instant("boot-2", 10.0, PUT.wall_s + 86_400, trusted=True)
    assert expired(day, after)
    assert not expired(day, replace(after, trusted=False))
    assert not expired(replace(day, put=replace(PUT, trusted=False)), after)
    assert expired(day, Instant("boot-2", 3_600.0, 0.0, trusted=False))
    assert not expired(replace(day, ttl_s=None), Instant("boot-2", 1e9, 1e10, trusted=True))


def test_a_clock_that_was_set_later_mends_the_readings_of_its_boot() -> None:
    """Put at boot with a clock of 1970; once synchronised the true time is known, and survives the next reboot."""
    put = Instant("boot-1", 10.0, 10.0, trusted=False)
    now = Instant("boot-1", 70.0, 2_000_060.0, trusted=True)
    known = mended(put, now)
    assert known == Instant("boot-1", 10.0, 2_000_000.0, trusted=True)
    assert age_s(known, Instant("boot-2", 5.0, 2_001_000.0, trusted=True)) == 1_000
    assert mended(put, replace(now, boot_id="boot-2")) is put
    assert mended(put, replace(now, trusted=False)) is put
    assert mended(PUT, replace(now, wall_s=5.0)) is PUT


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)), min_size=1, max_size=10))
def test_queue_time_only_grows_over_reboots(boots: list[tuple[float, float]]) -> None:
    """Whatever boot time each boot begins with: queue time goes on from the last one that was stored; a restart within a boot changes nothing."""
    epoch, latest_s = None, 0.0
    for number, (start_s, lasts_s) in enumerate(boots):
        now = Instant(f"boot-{number}", start_s, 0.0, trusted=False)
        epoch = resumed(epoch, latest_s, now)
        assert epoch.queue_s(start_s) == pytest.approx(latest_s, abs=1e-6)
        assert resumed(epoch, 7.0, now) is epoch
        latest_s = epoch.queue_s(start_s + lasts_s)
    assert isinstance(epoch, Epoch)


def test_an_unreachable_receiver_is_no_fault_of_the_item() -> None:
    """A thousand time-outs during a partition bury nothing."""
    waiting = item(1)
    for number in range(1_000):
        settled = settle(waiting, Failure.UNREACHED, POLICY, float(number), 0.5)
        assert isinstance(settled, Retry)
        waiting = replace(waiting, attempts=settled.attempts, not_before_s=settled.not_before_s)
    assert waiting.attempts == 0


@given(st.lists(st.floats(0, 1), min_size=25, max_size=25))
def test_a_failing_item_backs_off_and_is_buried_after_its_attempts(chances: list[float]) -> None:
    """The wait doubles to its cap, half of it chance; the twentieth failure is the last."""
    waiting, now_s = item(1), 0.0
    for number, chance in enumerate(chances, 1):
        settled = settle(waiting, Failure.FAILED, POLICY, now_s, chance)
        if isinstance(settled, Bury):
            assert number == POLICY.max_attempts
            return
        whole = min(2.0 ** (number - 1), POLICY.backoff_max_s)
        assert whole / 2 <= settled.not_before_s - now_s + 1e-6
        assert settled.not_before_s - now_s <= whole + 1e-6
        waiting, now_s = replace(waiting, attempts=settled.attempts), settled.not_before_s
    pytest.fail("never buried")


def test_a_refused_item_is_buried_at_once() -> None:
    """The receiver will not change its mind; every failure has its consequence."""
    assert settle(item(1), Failure.REFUSED, POLICY, 0, 0) == Bury("refused")
    assert set(CONSEQUENCES) == set(Failure)
    assert set(CONSEQUENCES.values()) == set(Consequence)


@given(st.lists(st.sampled_from(["put", "send", "send_lost_ack", "day"]), max_size=80), st.randoms(use_true_random=False))
def test_no_resend_is_ever_applied_twice(steps: list[str], random: object) -> None:
    """Sender and receiver over lost acknowledgements and days of partition: every key is applied at most once, whenever it is sent again."""
    waiting: list[int] = []
    applied: dict[int, int] = {}
    remembered: dict[int, float] = {}
    seq, now_s = 0, 0.0
    for step in steps:
        if step == "put":
            seq += 1
            waiting.append(seq)
        elif step == "day":
            now_s += DEDUPE_HORIZON_S
        elif waiting:
            one = random.choice(waiting)  # type: ignore[attr-defined]  # hypothesis's Random
            floor = min(waiting)
            if one not in remembered:
                applied[one] = applied.get(one, 0) + 1
                remembered[one] = now_s
            if step == "send":
                waiting.remove(one)
            remembered = {key: at for key, at in remembered.items() if not forgettable(key, at, floor, now_s)}
    assert all(count == 1 for count in applied.values())


def test_what_is_acknowledged_is_forgotten_in_time() -> None:
    """The receiver's memory is bounded: below the floor and older than the horizon is gone, either alone is not enough."""
    assert forgettable(4, 0.0, 5, DEDUPE_HORIZON_S)
    assert not forgettable(5, 0.0, 5, DEDUPE_HORIZON_S)
    assert not forgettable(4, 1.0, 5, DEDUPE_HORIZON_S)


def test_what_was_promised_is_never_dropped() -> None:
    """Every class has a policy; requests and results are kept, only what describes the device may make way."""
    assert set(POLICIES) == set(Kind)
    assert {kind for kind, policy in POLICIES.items() if policy.overflow is Overflow.REJECT} == {Kind.REQUEST, Kind.RESULT}
