"""What happens to items in one transaction: put, take, settle. The rules are those of `core.reach.deferral`; `due` there is the reference of `take`.

1. A group of puts is one statement over up to 64 rows; duplicates are found by what is missing afterwards. A lone put that fits is one statement
   and its own transaction.
2. `take` writes the attempt before it is made: an item that kills the process is counted, and buried when its class has had enough.
3. Only heads are looked at, in rank order, and items whose lease or backoff runs are stepped over.
4. What is too old or damaged is never handed out. A damaged item becomes a dead letter: its row may still tell an operator something.
5. A delivered key is remembered for a day of queue time, with the receiver's answer while answers fit into 16 MiB.
"""

import heapq
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from appliance.adapters.store.ledger import Ledger, item_of
from appliance.adapters.store.room import EXPIRED, Room
from appliance.adapters.store.schema import COLUMNS, FROM_ITEMS, INSERT_ALONE, INSERT_KEYED, ITEM, ROWS_AT_ONCE, insert, listed
from appliance.adapters.store.segments import SEGMENT_BYTES
from appliance.contract.deferral import (
    AGEING_S,
    DEDUPE_HORIZON_S,
    IDEM_LIMIT,
    PAYLOAD_LIMIT,
    PRIORITIES,
    Dropped,
    Item,
    Leased,
    Parcel,
    State,
    Stored,
    Taken,
)
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError

RESULTS_BYTES = 96 * 1_048_576
"""Answers that are kept to be fetched; beyond it the oldest go, fetched or not, and say so. Some 180 label readings of half a MiB."""
ROW_BYTES = 256
"""What a row costs beside its payload, key and id: columns and six index entries, measured 180 to 300 bytes."""
_FORGET = 64
_HEAD, _TTL, _SIZE = (COLUMNS.index(name) for name in ("head", "ttl_s", "size"))


class _Candidate(NamedTuple):
    rank: float
    seq: int
    size: int
    attempts: int
    not_before_s: float


class Outgoing:
    """The sender's side of a store."""

    def __init__(self, ledger: Ledger, room: Room, max_dead_bytes: int) -> None:
        self._ledger = ledger
        self._room = room
        self._max_dead_bytes = max_dead_bytes

    def put(self, parcels: Sequence[Parcel]) -> list[Stored | ApplianceError]:
        """Store all that may enter; each parcel has its own answer. Raises: OSError, apsw.Error, and then nothing is stored."""
        ledger = self._ledger
        answers: list[Stored | ApplianceError] = []
        rows: list[tuple[Any, ...]] = []
        slots: list[int] = []
        self._room.observe()
        for parcel in parcels:
            try:
                row = self._row(parcel)
                if not self._room.fits(parcel.kind, row[_SIZE]):
                    self._flush(rows, slots, answers)
                    self._squeeze(row)
            except ApplianceError as error:
                answers.append(error)
                continue
            ledger.state.account(parcel.kind, 1, row[_SIZE])
            rows.append(row)
            slots.append(len(answers))
            answers.append(Stored(row[0], dropped=ledger.unreport()))
            if len(rows) == ROWS_AT_ONCE:
                self._flush(rows, slots, answers)
        self._flush(rows, slots, answers)
        return answers

    def put_alone(self, parcel: Parcel) -> Stored | ApplianceError | None:
        """Store one parcel outside of a transaction; None: it needs one, and nothing is stored. Raises: OSError, apsw.Error, as `put`."""
        ledger = self._ledger
        self._room.observe()
        try:
            row = self._row(parcel)
        except ApplianceError as error:
            return error
        seq, size = row[0], row[_SIZE]
        if not self._room.fits(parcel.kind, size):
            ledger.abandon(seq)
            return None
        before = ledger.connection.total_changes()
        ledger.connection.execute(INSERT_KEYED if parcel.key else INSERT_ALONE, row)
        if ledger.connection.total_changes() == before:
            ledger.abandon(seq)
            return Stored(0, duplicate=True)
        ledger.state.account(parcel.kind, 1, size)
        return Stored(seq)

    def take(self, kinds: Iterable[str], items: int, size: int, lease_s: float) -> Taken:
        """Lease what is due."""
        ledger = self._ledger
        self._room.sweep()
        for seq in [seq for seq, until_s in ledger.leases.items() if until_s <= ledger.now_s]:
            del ledger.leases[seq]
        chosen, deadline = self._due(kinds, items, size)
        taken = self._lease(chosen)
        ledger.leases |= dict.fromkeys((leased.item.seq for leased in taken), ledger.now_s + lease_s)
        if len(taken) < len(chosen):
            deadline = ledger.now_s  # somebody behind the buried ones may go now
        ledger.connection.executemany(
            "INSERT OR REPLACE INTO tries VALUES(?, ?, ?)",
            [(each.item.seq, each.item.attempts + 1, each.item.not_before_s) for each in taken],
        )
        return Taken(tuple(taken), self.floor(), deadline, ledger.unreport())

    def acknowledge(self, results: Mapping[int, bytes | None]) -> int:
        """Delete what the receiver has committed, and remember its key; returns how many were still here."""
        ledger = self._ledger
        seqs = list(results)
        found: list[Item] = []
        for part in range(0, len(seqs), ROWS_AT_ONCE):
            some = seqs[part : part + ROWS_AT_ONCE]
            found += ledger.items(listed("WHERE i.seq IN (#) AND i.reason IS NULL", len(some)), some)
        ledger.remove(found)
        self._room.remember([item.idem for item in found if results[item.seq] is None], State.DELIVERED)
        for item in found:
            result = results[item.seq]
            if result is not None:
                self._keep_answer(item, result)
        self._forget()
        return len(found)

    def retry(self, seq: int, attempts: int, not_before_s: float) -> bool:
        """End a lease; the item waits until then, with so many attempts counted."""
        self._ledger.leases.pop(seq, None)
        known = self.waiting(seq) is not None
        if known:
            self._ledger.connection.execute("INSERT OR REPLACE INTO tries VALUES(?, ?, ?)", (seq, attempts, not_before_s))
        return known

    def release(self, seqs: Iterable[int]) -> None:
        """End leases as if the items had not been taken."""
        for seq in seqs:
            if self._ledger.leases.pop(seq, None) is not None:
                self._ledger.connection.execute("UPDATE tries SET attempts = max(attempts - 1, 0) WHERE seq = ?", (seq,))

    def bury(self, seq: int, reason: str) -> tuple[Dropped, ...]:
        """Make an item a dead letter; the later ones of its key may pass."""
        item = self.waiting(seq)
        if item is not None:
            self._bury(item, reason, reason)
        return self._ledger.unreport()

    def revive(self, idem: str) -> bool:
        """An operator's retry: a dead letter waits again with its old `seq`, a waiting item is due now."""
        ledger = self._ledger
        row = ledger.one("SELECT seq, reason IS NOT NULL, droppable FROM items WHERE idem = ?", (idem,))
        if row is None:
            return False
        seq, dead, _ = row
        ledger.connection.execute("DELETE FROM tries WHERE seq = ?", (seq,))
        if dead:
            item = ledger.items("WHERE i.seq = ?", (seq,))[0]
            ledger.connection.execute("UPDATE items SET reason = NULL WHERE seq = ?", (seq,))
            ledger.connection.execute(
                "UPDATE items SET head = 0 WHERE okey = ? AND okey <> '' AND reason IS NULL AND head = 1", (item.key,)
            )
            ledger.connection.execute("UPDATE items SET head = 1 WHERE seq = ? AND okey = ''", (seq,))
            ledger.promote([item.key])
            self._count_dead(item, -1)
            ledger.state.account(item.kind, 1, item.size_bytes)
        return True

    def discard(self, idem: str) -> tuple[Dropped, ...]:
        """An operator's drop: delete an item or a dead letter; counted as `operator`."""
        ledger = self._ledger
        found = ledger.items("WHERE i.idem = ?", (idem,))
        for item in found:
            row = ledger.one("SELECT reason IS NOT NULL FROM items WHERE seq = ?", (item.seq,))
            ledger.remove([item], dead=bool(row and row[0]))
            ledger.count_drop(item, "operator")
            self._room.remember([item.idem], State.DROPPED, "operator")
        return ledger.unreport()

    def expire(self) -> tuple[Dropped, ...]:
        """Housekeeping for times when nobody takes."""
        self._room.sweep()
        self._forget()
        return self._ledger.unreport()

    def floor(self) -> int:
        """The least `seq` that is held."""
        row = self._ledger.one("SELECT min(seq) FROM items")
        return row[0] if row and row[0] is not None else self._ledger.state.next_seq

    def waiting(self, seq: int) -> Item | None:
        """The waiting item with this `seq`."""
        found = self._ledger.items("WHERE i.seq = ? AND i.reason IS NULL", (seq,))
        return found[0] if found else None

    def _row(self, parcel: Parcel) -> tuple[Any, ...]:
        """The columns `schema.COLUMNS`; `head` is still open."""
        ledger, now = self._ledger, self._ledger.now
        policy = self._room.policy(parcel.kind)
        priority = policy.priority if parcel.priority is None else parcel.priority
        ttl_s = policy.ttl_s if parcel.ttl_s is None else None if parcel.ttl_s == math.inf else parcel.ttl_s
        _check(parcel, priority)
        seq = ledger.state.next_seq
        ledger.state.next_seq += 1
        codec, stored, data = ledger.stash(seq, parcel.kind, parcel.payload, SEGMENT_BYTES)
        size = len(stored) + len(parcel.idem) + len(parcel.key) + ROW_BYTES
        expires_s = None if ttl_s is None else now.boot_s + ttl_s
        rank = ledger.now_s + priority * AGEING_S
        return (
            seq, parcel.idem, parcel.key, parcel.kind, priority, 1, self._room.droppable(parcel.kind), rank, ledger.now_s, ttl_s, expires_s,
            int(now.boot_id), now.boot_s, now.wall_s, now.trusted, size, int(codec), len(parcel.payload), zlib.crc32(stored), data,
        )  # fmt: skip

    def _squeeze(self, row: tuple[Any, ...]) -> None:
        """Make room. Raises: WorldError as `Room.admit`."""
        ledger = self._ledger
        seq, idem, key, kind, priority = row[:5]
        if not self._known(idem):
            try:
                self._room.admit(Item(seq, key, kind, priority, idem, row[_SIZE], ledger.now, ledger.now_s, row[_TTL]))
            except WorldError:
                ledger.abandon(seq)
                raise

    def _known(self, idem: str) -> bool:
        query = "SELECT 1 FROM items WHERE idem = ?1 UNION ALL SELECT 1 FROM done WHERE idem = ?1 AND outcome = 'delivered'"
        return self._ledger.one(query, (idem,)) is not None

    def _flush(self, rows: list[tuple[Any, ...]], slots: list[int], answers: list[Stored | ApplianceError]) -> None:
        """Insert what was gathered; what was delivered before, or is held already, is a duplicate."""
        connection = self._ledger.connection
        if rows:
            idems = [row[1] for row in rows]
            query = listed("SELECT idem FROM done WHERE idem IN (#) AND outcome = 'delivered'", len(rows))
            delivered = {idem for (idem,) in connection.execute(query, idems)}
            ready = self._headed([row for row in rows if row[1] not in delivered] if delivered else rows)
            before = connection.total_changes()
            if ready:
                connection.execute(insert(len(ready)), [*chain.from_iterable(ready)])
            if connection.total_changes() - before != len(rows):
                self._disown(rows, slots, answers)
        rows.clear()
        slots.clear()

    def _headed(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The same rows, with `head` 0 where an earlier waiting item has the key."""
        keys = {row[2] for row in rows if row[2]}
        if not keys:
            return rows
        query = listed("SELECT DISTINCT okey FROM items WHERE okey IN (#) AND okey <> '' AND reason IS NULL", len(keys))
        held = {key for (key,) in self._ledger.connection.execute(query, [*keys])}
        headed = []
        for row in rows:
            headed.append((*row[:_HEAD], int(row[2] not in held), *row[_HEAD + 1 :]))
            if row[2]:
                held.add(row[2])
        return headed

    def _disown(self, rows: list[tuple[Any, ...]], slots: list[int], answers: list[Stored | ApplianceError]) -> None:
        """Take back what was counted for duplicates, and let the keys pass that they would have held."""
        ledger = self._ledger
        inside = {seq for (seq,) in ledger.connection.execute("SELECT seq FROM items WHERE seq >= ?", (rows[0][0],))}
        for row, slot in zip(rows, slots, strict=True):
            if row[0] not in inside:
                ledger.state.account(row[3], -1, -row[_SIZE])
                ledger.abandon(row[0])
                answers[slot] = Stored(0, duplicate=True)
        ledger.promote({row[2] for row in rows})

    def _due(self, kinds: Iterable[str], items: int, size: int) -> tuple[list[_Candidate], float | None]:
        ledger = self._ledger
        query = (
            "SELECT i.rank, i.seq, i.size, coalesce(t.attempts, 0), coalesce(t.not_before_s, 0.0) FROM items i INDEXED BY due "
            "LEFT JOIN tries t ON t.seq = i.seq WHERE i.head = 1 AND i.kind = ? ORDER BY i.rank, i.seq"
        )
        merged = heapq.merge(*(ledger.connection.execute(query, (kind,)) for kind in kinds))
        chosen: list[_Candidate] = []
        deadline, left = math.inf, size
        for candidate in map(_Candidate._make, merged):
            if candidate.seq in ledger.leases:
                deadline = min(deadline, ledger.leases[candidate.seq])
            elif candidate.not_before_s > ledger.now_s:
                deadline = min(deadline, candidate.not_before_s)
            elif len(chosen) == items or (chosen and candidate.size > left):
                break
            else:
                chosen.append(candidate)
                left -= candidate.size
        return chosen, None if deadline == math.inf else deadline

    def _lease(self, chosen: Sequence[_Candidate]) -> list[Leased]:
        """Fetch in one query; what is too old, worn out or damaged is set aside instead."""
        ledger, room = self._ledger, self._room
        query = f"SELECT {EXPIRED}, i.codec, i.raw_len, i.checksum, i.data, {ITEM} {FROM_ITEMS.format(hint='')} WHERE i.seq IN (#)"
        rows = {
            row[5]: row for row in ledger.connection.execute(listed(query, len(chosen)), [*room.clocks(), *(each.seq for each in chosen)])
        }
        taken: list[Leased] = []
        for candidate in chosen:
            row = rows[candidate.seq]
            item = item_of(row[5:])
            if row[0]:
                room.lose([item], State.EXPIRED, "expired")
            elif item.attempts >= room.policy(item.kind).max_attempts:
                self._bury(item, f"taken {item.attempts} times and never settled", "attempts")
            else:
                try:
                    taken.append(Leased(item, ledger.unpack(item.seq, *row[1:5])))
                except WorldError as error:
                    self._bury(item, error.what, "damaged")
        return taken

    def _bury(self, item: Item, reason: str, label: str) -> None:
        ledger = self._ledger
        ledger.connection.execute("UPDATE items SET reason = ?, head = 0 WHERE seq = ?", (reason, item.seq))
        ledger.leases.pop(item.seq, None)
        ledger.state.account(item.kind, -1, -item.size_bytes)
        ledger.promote([item.key])
        ledger.count_drop(item, label)
        self._count_dead(item, 1)
        while ledger.state.dead[1] > self._max_dead_bytes:
            oldest = ledger.items("WHERE i.reason IS NOT NULL ORDER BY i.seq LIMIT 1")[0]
            ledger.remove([oldest], dead=True)
            ledger.count_drop(oldest, "dead_letters_full")
            if not self._room.droppable(oldest.kind):
                self._room.remember([oldest.idem], State.DROPPED, "dead_letters_full")

    def _count_dead(self, item: Item, sign: int) -> None:
        self._ledger.state.dead[0] += sign
        self._ledger.state.dead[1] += sign * item.size_bytes

    def _keep_answer(self, item: Item, result: bytes) -> None:
        ledger = self._ledger
        codec, stored = ledger.packer.pack("answer", result)
        ledger.connection.execute(
            "INSERT OR REPLACE INTO done VALUES(NULL, ?, ?, ?, '', ?, ?, ?, ?, ?)",
            (item.idem, ledger.now_s, State.DELIVERED, len(stored), int(codec), len(result), zlib.crc32(stored), stored),
        )
        ledger.state.results_bytes += len(stored)
        while ledger.state.results_bytes > RESULTS_BYTES:
            oldest = ledger.one("SELECT n, size FROM done WHERE data IS NOT NULL ORDER BY n LIMIT 1")
            if oldest is None:
                raise OursError("results", f"{ledger.state.results_bytes} bytes of answers are counted, none is kept")
            ledger.connection.execute("UPDATE done SET data = NULL WHERE n = ?", oldest[:1])
            ledger.state.results_bytes -= oldest[1]

    def _forget(self) -> None:
        """Forget the oldest keys whose horizon is over."""
        ledger = self._ledger
        query = "SELECT n, CASE WHEN data IS NULL THEN 0 ELSE size END FROM (SELECT * FROM done ORDER BY n LIMIT ?) WHERE at_s <= ?"
        old: list[tuple[int, int]] = ledger.connection.execute(query, (_FORGET, ledger.now_s - DEDUPE_HORIZON_S)).fetchall()  # type: ignore[assignment]  # apsw types a column as anything
        for number, size in old:
            ledger.connection.execute("DELETE FROM done WHERE n = ?", (number,))
            ledger.state.results_bytes -= size


def _check(parcel: Parcel, priority: int) -> None:
    if not 1 <= len(parcel.idem) <= IDEM_LIMIT:
        raise TheirsError("idem", f"an idempotency key of {len(parcel.idem)} characters, expected 1 to {IDEM_LIMIT}")
    if not 0 <= priority < PRIORITIES:
        raise TheirsError("priority", f"priority {priority}, expected 0 (first) to {PRIORITIES - 1}", where=parcel.idem)
    if len(parcel.payload) > PAYLOAD_LIMIT:
        raise TheirsError("oversized", f"{len(parcel.payload)} bytes, at most {PAYLOAD_LIMIT} are kept", where=parcel.idem)
