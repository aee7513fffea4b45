"""The durable queue of the simulation (ports `Outbox`, `Inbox`): the rules of core on tables in memory, commits that take time, and crashes.

1. `Disk` is what a crash leaves; everything else (leases, what was asked and not committed yet) is gone with its `SimStore`.
2. Commands are committed one after the other. A crash finds some of what waits committed, without anybody having heard of it.
3. A failing commit changes nothing. A commit may be the last thing that its machine does, or just not be done any more (`arm`).
4. `Bug` makes it break its promises, so that the simulation can be seen to find that.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf
from typing import Any, TypeVar

from appliance.contract.deferral import (
    Accepted,
    Deferred,
    Dropped,
    Fate,
    Instant,
    Item,
    Kind,
    Leased,
    Parcel,
    Rules,
    State,
    Stats,
    Stored,
    Taken,
    Usage,
)
from appliance.contract.errors import ApplianceError, OursError, WorldError
from appliance.core.reach.bounds import Admit, admit, drop_rank
from appliance.core.reach.deferral import Epoch, due, expired, resumed
from appliance.lab.simloop import SimLoop

T = TypeVar("T")
FREE_BYTES = 1 << 40


class Bug(StrEnum):
    """A promise that is broken on purpose."""

    ACK_BEFORE_COMMIT = "ack_before_commit"
    PROMISE_BEFORE_COMMIT = "promise_before_commit"
    NO_DEDUPE = "no_dedupe"
    DELETE_ON_PUBACK = "delete_on_puback"
    LEASE_KEPT = "lease_kept"
    KEYS_IGNORED = "keys_ignored"


@dataclass(slots=True)
class Row:
    """One item with its payload; a dead letter has a reason."""

    item: Item
    payload: bytes
    reason: str = ""


@dataclass(slots=True)
class Disk:
    """What is committed. `gone` tells of each dropped key why; `settled` counts how often a key was acknowledged."""

    incarnation: str
    next_seq: int = 1
    epoch: Epoch | None = None
    latest_s: float = 0.0
    rows: dict[int, Row] = field(default_factory=dict)
    done: dict[str, Fate] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    settled: Counter[str] = field(default_factory=Counter)
    accepted: dict[tuple[str, str], int] = field(default_factory=dict)
    pending: dict[int, Accepted] = field(default_factory=dict)
    number: int = 0
    kept_leases: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class DiskWeather:
    """How long a commit takes in the mean, and how often it fails."""

    commit_s: float = 0.003
    failing: float = 0.0


class SimStore:
    """One process's store. `crash` is called where a commit is the end of its machine."""

    def __init__(
        self,
        disk: Disk,
        rules: Rules,
        clocks: Callable[[], Instant],
        *,
        loop: SimLoop,
        chance: random.Random,
        weather: DiskWeather,
        crash: Callable[[], None],
        bugs: Collection[Bug] = (),
    ) -> None:
        self._disk = disk
        self._rules = rules
        self._clocks = clocks
        self._loop = loop
        self._chance = chance
        self._weather = weather
        self._crash = crash
        self._bugs = bugs
        self._leases: dict[int, float] = disk.kept_leases if Bug.LEASE_KEPT in bugs else {}
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._free_at = 0.0
        self._armed = ""
        self._alive = True
        self.failures = 0
        self._epoch = disk.epoch = resumed(disk.epoch, disk.latest_s, clocks())

    @property
    def incarnation(self) -> str:
        """See `ports.Outbox`."""
        return self._disk.incarnation

    def arm(self, when: str) -> None:
        """Crash `before` or `after` the next commit."""
        self._armed = when

    def kill(self) -> None:
        """The machine is dead (rule 2)."""
        self._alive = False
        for _ in range(self._chance.randint(0, len(self._waiting))):
            what, _future = self._waiting.popleft()
            try:
                what()
            except ApplianceError:
                continue

    def now_s(self) -> float:
        """See `ports.Outbox`."""
        return max(self._epoch.queue_s(self._clocks().boot_s), self._disk.latest_s)

    async def put(self, parcel: Parcel) -> Stored:
        """See `ports.Outbox`."""
        if Bug.PROMISE_BEFORE_COMMIT in self._bugs:
            self._submit(lambda: self._put(parcel)).add_done_callback(_forget)
            return Stored(self._disk.next_seq + len(self._waiting) - 1)
        return await self._do(lambda: self._put(parcel))

    async def take(self, kinds: Collection[str] = tuple(Kind), *, items: int = 64, size: int = 1_048_576, lease_s: float = 60.0) -> Taken:
        """See `ports.Outbox`."""
        return await self._do(lambda: self._take(kinds, items, size, lease_s))

    async def acknowledge(self, results: Mapping[int, bytes | None]) -> int:
        """See `ports.Outbox`."""
        return await self._do(lambda: self._acknowledge(results))

    async def retry(self, seq: int, attempts: int, not_before_s: float) -> bool:
        """See `ports.Outbox`."""
        return await self._do(lambda: self._retry(seq, attempts, not_before_s))

    async def release(self, seqs: Iterable[int]) -> None:
        """See `ports.Outbox`."""
        await self._do(lambda: self._release(tuple(seqs)))

    async def bury(self, seq: int, reason: str) -> tuple[Dropped, ...]:
        """See `ports.Outbox`."""
        return await self._do(lambda: self._bury(seq, reason))

    async def expire(self) -> tuple[Dropped, ...]:
        """See `ports.Outbox`."""
        return await self._do(self._sweep)

    async def listing(self, *, dead: bool = False, kind: str = "", after: int = 0, limit: int = 100) -> tuple[Item, ...]:
        """See `ports.Outbox`."""
        rows = [row for seq, row in sorted(self._disk.rows.items()) if seq > after and bool(row.reason) == dead]
        return await self._do(lambda: tuple(row.item for row in rows if kind in {"", row.item.kind})[:limit])

    async def fate(self, idem: str) -> Fate | None:
        """See `ports.Outbox`."""
        return await self._do(lambda: self._fate(idem))

    async def revive(self, idem: str) -> bool:
        """See `ports.Outbox`; operators sleep here."""
        raise OursError("simulation", "no operator retries here", where=idem)

    async def drop(self, idem: str) -> tuple[Dropped, ...]:
        """See `ports.Outbox`; operators sleep here."""
        raise OursError("simulation", "no operator drops here", where=idem)

    async def stats(self) -> Stats:
        """See `ports.Outbox`; what nothing here asks for is zero."""
        return await self._do(self._stats)

    async def accept(self, sender: str, message: Deferred, forward: Parcel | None = None) -> bool:
        """See `ports.Inbox`."""
        if forward is not None:
            raise OursError("simulation", "nothing is passed on here", where=sender)
        if Bug.ACK_BEFORE_COMMIT in self._bugs:
            self._submit(lambda: self._accept(sender, message)).add_done_callback(_forget)
            return (sender, message.idem) not in self._disk.accepted
        return await self._do(lambda: self._accept(sender, message))

    async def seen(self, sender: str, idem: str) -> bool:
        """See `ports.Inbox`."""
        return await self._do(lambda: (sender, idem) in self._disk.accepted)

    async def pending(self, *, after: int = 0, limit: int = 64) -> tuple[Accepted, ...]:
        """See `ports.Inbox`."""
        return await self._do(lambda: tuple(each for number, each in self._disk.pending.items() if number > after)[:limit])

    async def applied(self, upto: int) -> None:
        """See `ports.Inbox`."""
        await self._do(lambda: self._applied(upto))

    async def _do(self, what: Callable[[], T]) -> T:
        result: T = await self._submit(what)
        return result

    def _submit(self, what: Callable[[], T]) -> asyncio.Future[T]:
        if not self._alive:
            raise asyncio.CancelledError
        future: asyncio.Future[T] = self._loop.create_future()
        self._free_at = max(self._free_at, self._loop.time()) + self._weather.commit_s * (0.2 + self._chance.expovariate(1.0))
        self._waiting.append((what, future))
        self._loop.call_at(self._free_at, self._commit)
        return future

    def _commit(self) -> None:
        if not self._alive:
            return
        if self._armed == "before":
            self._crash()
            return
        what, future = self._waiting.popleft()
        answer, error = self._outcome(what)
        if self._armed:
            self._crash()
        elif not future.done():
            if error is None:
                future.set_result(answer)
            else:
                future.set_exception(error)

    def _outcome(self, what: Callable[[], Any]) -> tuple[Any, ApplianceError | None]:
        if self._weather.failing and self._chance.random() < self._weather.failing:
            self.failures += 1
            return None, WorldError("disk", "input/output error", where="simulated disk")
        self._disk.latest_s = self.now_s()
        try:
            return what(), None
        except ApplianceError as error:
            return None, error

    def _put(self, parcel: Parcel) -> Stored:
        disk, now_s = self._disk, self.now_s()
        known = disk.done.get(parcel.idem)
        if (known is not None and known.state is State.DELIVERED) or any(row.item.idem == parcel.idem for row in disk.rows.values()):
            return Stored(0, duplicate=True)
        policy = self._rules.policies[parcel.kind]
        priority = policy.priority if parcel.priority is None else parcel.priority
        ttl_s = policy.ttl_s if parcel.ttl_s is None else None if parcel.ttl_s == inf else parcel.ttl_s
        now, size = self._clocks(), len(parcel.payload)
        item = Item(disk.next_seq, parcel.key, parcel.kind, priority, parcel.idem, size, now, now_s, ttl_s)
        waiting = [row.item for row in disk.rows.values() if not row.reason]
        usage = Usage(
            sum(each.size_bytes for each in waiting), sum(each.size_bytes for each in waiting if each.kind == item.kind), FREE_BYTES
        )
        free = sorted((each for each in waiting if each.seq not in self._leases), key=lambda each: drop_rank(each, self._rules, now))
        verdict = admit(item, usage, self._rules, free, now)
        if not isinstance(verdict, Admit):
            raise WorldError(verdict.reason, verdict.what, where="simulated queue")
        dropped = tuple(self._lose(each, State.DROPPED, "room") for each in verdict.drop)
        disk.rows[item.seq] = Row(item, parcel.payload)
        disk.next_seq += 1
        return Stored(item.seq, dropped=dropped)

    def _lose(self, item: Item, state: State, reason: str) -> Dropped:
        self._disk.rows.pop(item.seq, None)
        self._leases.pop(item.seq, None)
        self._disk.done[item.idem] = Fate(state, None, reason)
        self._disk.gone[item.idem] = reason
        return Dropped(item.seq, item.kind, item.idem, reason)

    def _sweep(self) -> tuple[Dropped, ...]:
        now = self._clocks()
        old = [
            row.item
            for row in self._disk.rows.values()
            if row.item.ttl_s is not None and not row.reason and row.item.seq not in self._leases and expired(row.item, now)
        ]
        return tuple(self._lose(item, State.EXPIRED, "expired") for item in old)

    def _take(self, kinds: Collection[str], items: int, size: int, lease_s: float) -> Taken:
        disk, now_s = self._disk, self.now_s()
        for seq in [seq for seq, until_s in self._leases.items() if until_s <= now_s]:
            del self._leases[seq]
        dropped = list(self._sweep())
        waiting = [row.item for row in disk.rows.values() if not row.reason]
        if Bug.KEYS_IGNORED in self._bugs:
            waiting = [replace(item, key="") for item in waiting]
        chosen = due(waiting, now_s, leased=self._leases, limit=len(waiting))
        taken: list[Leased] = []
        for item in chosen.items:
            if item.kind not in kinds or len(taken) == items:
                continue
            if item.attempts >= self._rules.policies[item.kind].max_attempts:
                dropped += self._bury(item.seq, "attempts")
                continue
            row = disk.rows[item.seq]
            size -= item.size_bytes
            if size < 0 and taken:
                break
            taken.append(Leased(item, row.payload))
            row.item = replace(row.item, attempts=item.attempts + 1)
            self._leases[item.seq] = inf if Bug.LEASE_KEPT in self._bugs else now_s + lease_s
        return Taken(tuple(taken), min(disk.rows, default=disk.next_seq), chosen.deadline, tuple(dropped))

    def _acknowledge(self, results: Mapping[int, bytes | None]) -> int:
        found = 0
        for seq, result in results.items():
            row = self._disk.rows.get(seq)
            if row is not None and not row.reason:
                found += 1
                del self._disk.rows[seq]
                self._leases.pop(seq, None)
                self._disk.done[row.item.idem] = Fate(State.DELIVERED, None, "", result)
                self._disk.settled[row.item.idem] += 1
        return found

    def _retry(self, seq: int, attempts: int, not_before_s: float) -> bool:
        self._leases.pop(seq, None)
        row = self._disk.rows.get(seq)
        if row is None or row.reason:
            return False
        row.item = replace(row.item, attempts=attempts, not_before_s=not_before_s)
        return True

    def _release(self, seqs: Iterable[int]) -> None:
        for seq in seqs:
            row = self._disk.rows.get(seq)
            if self._leases.pop(seq, None) is not None and row is not None:
                row.item = replace(row.item, attempts=max(row.item.attempts - 1, 0))

    def _bury(self, seq: int, reason: str) -> tuple[Dropped, ...]:
        row = self._disk.rows.get(seq)
        if row is None or row.reason:
            return ()
        row.reason = reason
        self._leases.pop(seq, None)
        self._disk.gone[row.item.idem] = reason
        return (Dropped(seq, row.item.kind, row.item.idem, reason),)

    def _fate(self, idem: str) -> Fate | None:
        for seq, row in self._disk.rows.items():
            if row.item.idem == idem:
                return Fate(State.DEAD if row.reason else State.SENDING if seq in self._leases else State.WAITING, row.item, row.reason)
        return self._disk.done.get(idem)

    def _stats(self) -> Stats:
        rows = self._disk.rows.values()
        items = Counter(row.item.kind for row in rows if not row.reason)
        return Stats(dict(items), {}, sum(bool(row.reason) for row in rows), 0, len(self._leases), {}, None, FREE_BYTES, False, 0, 0, 0)

    def _accept(self, sender: str, message: Deferred) -> bool:
        disk, key = self._disk, (sender, message.idem)
        if key in disk.accepted and Bug.NO_DEDUPE not in self._bugs:
            return False
        disk.number += 1
        disk.accepted[key] = disk.number
        disk.pending[disk.number] = Accepted(disk.number, sender, message.item_kind, message.idem, message.payload)
        return True

    def _applied(self, upto: int) -> None:
        for number in [number for number in self._disk.pending if number <= upto]:
            del self._disk.pending[number]


def _forget(future: asyncio.Future[Any]) -> None:
    """Nobody waits for it."""
    if not future.cancelled():
        future.exception()
