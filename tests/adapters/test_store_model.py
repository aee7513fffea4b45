"""The durable queue against a model in memory whose decisions are those of `core.reach`: any order of calls, reboots and crashes gives the same queue.

The model keeps core's `Item`s in a dictionary and asks `bounds.admit`, `deferral.due` and `deferral.expired`; the store has only its SQL.
"""

import asyncio
import random
import tempfile
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import apsw
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.adapters.store import Store
from appliance.contract.deferral import Bounds, Dropped, Instant, Item, Overflow, Parcel, Policy, Rules, Stored, Usage
from appliance.contract.errors import WorldError
from appliance.core.reach import bounds, deferral

T = TypeVar("T")
POLICIES = {
    "request": Policy(Overflow.REJECT, 3_000, priority=4, ttl_s=500.0, max_attempts=1_000),
    "event": Policy(Overflow.DROP_EXPIRED_FIRST, 2_400, priority=5, ttl_s=200.0, max_attempts=1_000),
    "telemetry": Policy(Overflow.DROP_OLDEST_LOWEST_PRIO, 2_400, priority=8, max_attempts=1_000),
}
RULES = Rules(POLICIES, Bounds(max_bytes=5_000, min_free_bytes=0))
KINDS = sorted(POLICIES)
FREE = 1 << 40


class QueueMachine(RuleBasedStateMachine):
    """Every rule does one thing to both, and compares what they say."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.home = tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp")
        self.now = Instant("boot-0", 100.0, 1_700_000_000.0, trusted=True)
        self.boots = 0
        self.names = 0
        self.items: dict[int, Item] = {}
        self.dead: dict[int, Item] = {}
        self.leased: set[int] = set()
        self.delivered: set[str] = set()
        self.known: list[str] = []
        self.lost: list[tuple[str, str]] = []

    @initialize()
    def begin(self) -> None:
        self.store = self.open()

    def open(self) -> Store:
        store = Store(Path(self.home.name) / "q", RULES, bounds.admit, clocks=lambda: self.now)
        return self.do(store.__aenter__())

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.do(self.store.__aexit__(None, None, None))
        self.loop.close()
        self.home.cleanup()

    def core_now(self) -> Any:
        return Instant(self.now.boot_id, self.now.boot_s, self.now.wall_s, trusted=self.now.trusted)

    def expire(self, dropped: tuple[Dropped, ...]) -> None:
        """What the store says has expired must have expired for core; it may find less at a time, never more."""
        for each in dropped:
            assert each.reason == "expired"
            item = self.items.pop(each.seq)
            assert deferral.expired(item, self.core_now())
            assert each.seq not in self.leased

    @rule(
        kind=st.sampled_from(KINDS),
        key=st.sampled_from(["", "", "a", "b"]),
        priority=st.one_of(st.none(), st.integers(0, 9)),
        size=st.integers(0, 900),
        again=st.booleans(),
    )
    def put(self, kind: str, key: str, priority: int | None, size: int, *, again: bool) -> None:
        """Core decides who enters and who leaves; a known key is a duplicate."""
        self.names += 1
        idem = random.Random(self.names).choice(self.known) if again and self.known else f"{self.names:04}"
        parcel = Parcel(kind=kind, idem=idem, payload=random.Random(self.names).randbytes(size), key=key, priority=priority)
        held = {item.idem for item in (*self.items.values(), *self.dead.values())}
        if idem in held | self.delivered:
            assert self.do(self.store.put(parcel)).duplicate
            return
        policy = POLICIES[kind]
        stored = len(parcel.payload) + len(idem) + len(key) + 256
        now_s = self.store.now_s()
        item = Item(0, key, kind, policy.priority if priority is None else priority, idem, stored, self.core_now(), now_s, policy.ttl_s)
        usage = Usage(
            sum(each.size_bytes for each in self.items.values()),
            sum(each.size_bytes for each in self.items.values() if each.kind == kind),
            FREE,
        )
        core_rules = Rules(POLICIES, Bounds(max_bytes=RULES.bounds.max_bytes, min_free_bytes=0))
        candidates = sorted(
            (each for each in self.items.values() if each.seq not in self.leased),
            key=lambda each: bounds.drop_rank(each, core_rules, self.core_now()),
        )
        verdict = bounds.admit(item, usage, core_rules, candidates, self.core_now())
        (answer,) = self.do(gathered(self.store.put(parcel)))
        if isinstance(verdict, bounds.Refuse):
            assert isinstance(answer, WorldError)
            assert answer.reason == verdict.reason
            return
        assert isinstance(answer, Stored)
        assert {each.seq for each in answer.dropped} == {each.seq for each in verdict.drop}
        for each in answer.dropped:
            del self.items[each.seq]
        self.items[answer.seq] = replace(item, seq=answer.seq)
        self.known.append(idem)

    @rule(limit=st.integers(1, 4))
    def take(self, limit: int) -> None:
        """What is leased is what core's `due` chooses, in its order."""
        self.expire(self.do(self.store.expire()))
        for item in list(self.items.values()):
            if item.seq not in self.leased:
                assert not self.same_boot_expired(item)
        due = deferral.due(self.items.values(), self.store.now_s(), leased=self.leased, limit=limit)
        fresh = [item for item in due.items if not deferral.expired(item, self.core_now())]
        taken = self.do(self.store.take(KINDS, items=limit, size=1 << 30, lease_s=1e9))
        self.expire(taken.dropped)
        assert [each.item.seq for each in taken.items] == [item.seq for item in fresh]
        for each in taken.items:
            assert each.item.attempts == self.items[each.item.seq].attempts
            self.leased.add(each.item.seq)
            self.items[each.item.seq] = replace(self.items[each.item.seq], attempts=each.item.attempts + 1)
        assert taken.floor == min([*self.items, *self.dead], default=taken.floor)

    def same_boot_expired(self, item: Item) -> bool:
        return (
            item.put.boot_id == self.now.boot_id
            and deferral.expired(item, self.core_now())
            and self.now.boot_s - item.put.boot_s > (item.ttl_s or 0)
        )

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), what=st.sampled_from(["acknowledge", "retry", "release", "bury"]), wait_s=st.sampled_from([0.0, 5.0, 100.0]))
    def settle(self, data: st.DataObject, what: str, wait_s: float) -> None:
        """A leased item is delivered, waits again, is given back or buried."""
        seq = data.draw(st.sampled_from(sorted(self.leased)))
        self.leased.discard(seq)
        item = self.items[seq]
        if what == "acknowledge":
            assert self.do(self.store.acknowledge({seq: None})) == 1
            self.delivered.add(self.items.pop(seq).idem)
        elif what == "retry":
            until_s = self.store.now_s() + wait_s
            assert self.do(self.store.retry(seq, item.attempts, until_s))
            self.items[seq] = replace(item, not_before_s=until_s)
        elif what == "release":
            self.do(self.store.release([seq]))
            self.items[seq] = replace(item, attempts=item.attempts - 1)
        else:
            self.do(self.store.bury(seq, "refused"))
            self.dead[seq] = self.items.pop(seq)

    @precondition(lambda self: self.dead)
    @rule(data=st.data(), revive=st.booleans())
    def operate(self, data: st.DataObject, *, revive: bool) -> None:
        """A dead letter waits again, or is dropped."""
        seq = data.draw(st.sampled_from(sorted(self.dead)))
        item = self.dead.pop(seq)
        if revive:
            assert self.do(self.store.revive(item.idem))
            self.items[seq] = replace(item, attempts=0, not_before_s=0.0)
        else:
            assert [each.seq for each in self.do(self.store.drop(item.idem))] == [seq]

    @rule(seconds=st.sampled_from([1.0, 61.0, 150.0, 700.0]), step_s=st.sampled_from([0.0, 0.0, 3_600.0, -3_600.0]))
    def wait(self, seconds: float, step_s: float) -> None:
        """Time passes; the wall clock may be set."""
        self.now = replace(self.now, boot_s=self.now.boot_s + seconds, wall_s=self.now.wall_s + seconds + step_s)

    @rule(kind=st.sampled_from(["restart", "crash", "reboot"]))
    def restart(self, kind: str) -> None:
        """The process ends, cleanly or not, or the machine boots: leases are gone, nothing else is."""
        self.do(self.store.__aexit__(None, None, None))
        if kind != "restart":
            (Path(self.home.name) / "q" / "lock").write_bytes(b"1")
        if kind == "reboot":
            self.boots += 1
            self.now = Instant(f"boot-{self.boots}", 5.0, self.now.wall_s + 30.0, trusted=True)
        self.leased.clear()
        self.store = self.open()

    @invariant()
    def agrees(self) -> None:
        """The rows are the model's, the counters are the rows', and each key has exactly one head."""
        if not hasattr(self, "store"):
            return
        assert [item.seq for item in self.do(self.store.listing())] == sorted(self.items)
        assert [item.seq for item in self.do(self.store.listing(dead=True))] == sorted(self.dead)
        stats = self.do(self.store.stats())
        for kind in KINDS:
            sizes = [item.size_bytes for item in self.items.values() if item.kind == kind]
            assert (stats.items.get(kind, 0), stats.bytes.get(kind, 0)) == (len(sizes), sum(sizes))
        assert stats.dead_bytes == sum(item.size_bytes for item in self.dead.values())
        assert stats.leased == len(self.leased)
        connection = apsw.Connection(str(Path(self.home.name) / "q" / "queue.db"), flags=apsw.SQLITE_OPEN_READONLY)
        heads = {seq for (seq,) in connection.execute("SELECT seq FROM items WHERE head = 1")}
        connection.close()
        first = {item.key: item.seq for item in sorted(self.items.values(), key=lambda item: -item.seq) if item.key}
        assert heads == {item.seq for item in self.items.values() if not item.key} | set(first.values())


async def gathered(call: Coroutine[Any, Any, Stored]) -> list[Any]:
    """The answer or the exception."""
    return await asyncio.gather(call, return_exceptions=True)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
