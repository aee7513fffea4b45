"""One transaction at a time over the tables: clocks and counters at its start, all or nothing at its end.

1. `state` (counters, next `seq`, queue time) is written in the transaction that changes it; after a rollback it is read back. A lone put leaves it as
   it was, and costs a page less: rows from the written `next_seq` on are not in the written counters yet, and `counted` adds them. After
   `UNCOUNTED` of them, before anything else changes a table, and at the end, it is written.
2. Leases are in memory only: after a crash every item is ready again (at least once; the receiver dedupes).
3. Queue time goes on where the last commit left it when the machine was rebooted, so it never runs backwards and never claims time that is not known
   to have passed. The wall clock is used by the TTL alone.
4. Payload files are removed after the commit that forgets them, and those of a rolled-back transaction at once.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import apsw
import msgspec

from appliance.adapters.store.payloads import Codec, Packer
from appliance.adapters.store.schema import FROM_ITEMS, ITEM, ROWS_AT_ONCE, listed
from appliance.adapters.store.segments import Segments
from appliance.contract.deferral import Dropped, Instant, Item
from appliance.contract.errors import WorldError

Row = tuple[Any, ...]
Bindings = Sequence[Any] | dict[str, Any]
UNCOUNTED = 64
"""So many rows at most are counted anew when the state is read."""
_NOT_SAVED = (-UNCOUNTED, 0)
"""`next_seq` and boot of which the disk may not know: the next put goes the long way."""
_UNKNOWN_BOOT = 1 << 20
"""A boot number above any that rows of a damaged store may have."""


class Counters(msgspec.Struct):
    """What the store knows of itself; `usage` is [items, bytes] by class, `drops` counts by `class:reason`."""

    incarnation: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)
    next_seq: int = 1
    boot_id: str = ""
    boot: int = 0
    base_s: float = 0.0
    latest_s: float = 0.0
    total_bytes: int = 0
    usage: dict[str, list[int]] = msgspec.field(default_factory=dict)
    dead: list[int] = msgspec.field(default_factory=lambda: [0, 0])
    results_bytes: int = 0
    drops: dict[str, int] = msgspec.field(default_factory=dict)

    def account(self, kind: str, items: int, size: int) -> None:
        """Add (or, negative, take away) waiting items of a class."""
        usage = self.usage.setdefault(kind, [0, 0])
        usage[0] += items
        usage[1] += size
        self.total_bytes += size


class Ledger:
    """The connection, and what must agree with it. Used by the writer's thread alone; raises apsw.Error and OSError, which the writer translates."""

    def __init__(self, connection: apsw.Connection, segments: Segments, clocks: Callable[[], Instant]) -> None:
        self.connection = connection
        self.segments = segments
        self.packer = Packer()
        self.leases: dict[int, float] = {}
        self.dropped: list[Dropped] = []
        self.now_s = 0.0
        self._clocks = clocks
        self._leased_before: dict[int, float] = {}
        self._created: list[int] = []
        self._forgotten: list[int] = []
        self._changes = 0
        self._saved = _NOT_SAVED
        self.state = self._load()
        self.now = clocks()
        self._read_clocks()

    def begin(self) -> None:
        """Start a transaction; `now` and `now_s` stand still until its end."""
        self._read_clocks()
        self._leased_before = dict(self.leases)
        self._changes = self.connection.total_changes()
        self.connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Write the counters if anything changed; when this returns, all of it is on the disk."""
        if self.connection.total_changes() != self._changes:
            self.state.latest_s = self.now_s
            self._save()
        self.connection.execute("COMMIT")
        for seq in self._forgotten:
            self.segments.remove(seq)
        self._forget_journal()

    def begin_alone(self) -> bool:
        """Start what one statement will do and commit by itself; False: it has to be a transaction, for the counters' sake."""
        self._read_clocks()
        seq, boot = self._saved
        self._leased_before = self.leases
        return self.state.boot == boot and self.state.next_seq - seq < UNCOUNTED

    def end_alone(self) -> None:
        """The statement has committed."""
        self.state.latest_s = self.now_s
        self._forget_journal()

    def settle(self) -> None:
        """Write the counters as they are. Raises: apsw.Error."""
        if self.state.next_seq != self._saved[0]:
            self._save()

    def rollback(self) -> None:
        """Undo everything since `begin`, in the tables and beside them."""
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")
        self.leases = self._leased_before
        for seq in self._created:
            self.segments.remove(seq)
        self._forget_journal()
        self._saved = _NOT_SAVED
        self.state = self._load()

    def one(self, sql: str, bindings: Bindings = ()) -> Row | None:
        """The first row of a query, or None."""
        row: Row | None = self.connection.execute(sql, bindings).fetchone()
        return row

    def items(self, rest: str, bindings: Bindings = (), hint: str = "") -> list[Item]:
        """The items of a query; `rest` is what follows FROM, with `i` for items and `t` for tries."""
        return [item_of(row) for row in self.connection.execute(f"SELECT {ITEM} {FROM_ITEMS.format(hint=hint)} {rest}", bindings)]

    def stash(self, seq: int, kind: str, payload: bytes, threshold: int) -> tuple[Codec, bytes, bytes]:
        """Pack a payload; return codec, stored bytes, and what goes into the row: nothing if a file has it."""
        codec, stored = self.packer.pack(kind, payload)
        if len(stored) <= threshold:
            return codec, stored, stored
        self.keep(seq, stored)
        return (Codec.SEGMENT_ZSTD if codec is Codec.ZSTD else Codec.SEGMENT_RAW), stored, b""

    def keep(self, seq: int, stored: bytes) -> None:
        """Write a payload's file; it goes if the transaction does."""
        self._created.append(seq)
        self.segments.save(seq, stored)

    def adopt(self, damaged: apsw.Connection) -> None:
        """Go on where a damaged store stopped, as far as it can be read; the incarnation is new, because `seq` may be given again."""
        try:
            row = damaged.execute("SELECT json FROM state").fetchone()
            old = msgspec.json.decode(row[0], type=Counters) if row else Counters()
        except (apsw.Error, msgspec.MsgspecError):
            self.state.boot = _UNKNOWN_BOOT
        else:
            self.state = Counters(
                next_seq=old.next_seq, boot_id=old.boot_id, boot=old.boot, base_s=old.base_s, latest_s=old.latest_s, drops=old.drops
            )
        self._read_clocks()

    def abandon(self, seq: int) -> None:
        """Forget the file of an item that did not enter, if it has one."""
        if seq in self._created:
            self.segments.remove(seq)

    def unpack(self, seq: int, codec: int, raw_len: int, checksum: int, data: bytes) -> bytes:
        """The payload of an item from its columns. Raises: WorldError (`damaged`)."""
        if codec in (Codec.SEGMENT_RAW, Codec.SEGMENT_ZSTD):
            try:
                data = self.segments.load(seq)
            except FileNotFoundError as error:
                raise WorldError("damaged", "the file of the payload is gone", where=str(error.filename)) from error
        return self.packer.unpack(codec, raw_len, checksum, data)

    def remove(self, items: Sequence[Item], *, dead: bool = False) -> None:
        """Delete items, let the next ones of their keys pass, and count."""
        for part in range(0, len(items), ROWS_AT_ONCE):
            seqs = [item.seq for item in items[part : part + ROWS_AT_ONCE]]
            self.connection.execute(listed("DELETE FROM items WHERE seq IN (#)", len(seqs)), seqs)
            self.connection.execute(listed("DELETE FROM tries WHERE seq IN (#)", len(seqs)), seqs)
        for item in items:
            self._forgotten.append(item.seq)
            self.leases.pop(item.seq, None)
            if dead:
                self.state.dead[0] -= 1
                self.state.dead[1] -= item.size_bytes
            else:
                self.state.account(item.kind, -1, -item.size_bytes)
        if not dead:
            self.promote({item.key for item in items})

    def promote(self, keys: Iterable[str]) -> None:
        """Make the first waiting item of each key its head."""
        for key in keys:
            if key:
                self.connection.execute(
                    "UPDATE items SET head = 1 WHERE seq = (SELECT min(seq) FROM items WHERE okey = ? AND okey <> '' AND reason IS NULL)",
                    (key,),
                )

    def count_drop(self, item: Item, reason: str) -> Dropped:
        """Count an accepted item that was not delivered, and note it for the caller."""
        label = f"{item.kind}:{reason}"
        self.state.drops[label] = self.state.drops.get(label, 0) + 1
        dropped = Dropped(item.seq, item.kind, item.idem, reason)
        self.dropped.append(dropped)
        return dropped

    def unreport(self) -> tuple[Dropped, ...]:
        """What was dropped since the last call, for the command that caused it."""
        dropped, self.dropped = tuple(self.dropped), []
        return dropped

    def _forget_journal(self) -> None:
        self._created, self._forgotten, self.dropped = [], [], []

    def _load(self) -> Counters:
        return counted(self.connection)

    def _save(self) -> None:
        self.connection.execute("INSERT OR REPLACE INTO state VALUES(1, ?)", (msgspec.json.encode(self.state).decode(),))
        self._saved = self.state.next_seq, self.state.boot

    def _read_clocks(self) -> None:
        reading = self._clocks()
        state = self.state
        if reading.boot_id != state.boot_id:
            state.boot_id, state.boot, state.base_s = reading.boot_id, state.boot + 1, state.latest_s - reading.boot_s
        self.now_s = max(state.base_s + reading.boot_s, state.latest_s)
        self.now = Instant(str(state.boot), reading.boot_s, reading.wall_s, reading.trusted)


def counted(connection: apsw.Connection) -> Counters:
    """The counters as of the last commit (rule 1), in one statement, so that a reader beside the writer sees one moment. Raises: apsw.Error."""
    query = (
        "SELECT s.json, i.kind, count(i.seq), sum(i.size), max(i.seq), max(i.queued_s) FROM state s "
        "LEFT JOIN items i ON i.seq >= s.json ->> '$.next_seq' GROUP BY i.kind"
    )
    counters: Counters | None = None
    for text, kind, items, size, seq, queued_s in connection.execute(query):
        counters = counters or msgspec.json.decode(text, type=Counters)
        if kind is not None:
            counters.account(kind, items, size)
            counters.next_seq = max(counters.next_seq, seq + 1)
            counters.latest_s = max(counters.latest_s, queued_s)
    return counters or Counters()


def item_of(row: Row) -> Item:
    """An `Item` from the columns `schema.ITEM`."""
    seq, key, kind, priority, idem, size, boot, boot_s, wall_s, trusted, queued_s, ttl_s, attempts, not_before_s = row
    put = Instant(str(boot), boot_s, wall_s, bool(trusted))
    return Item(seq, key, kind, priority, idem, size, put, queued_s, ttl_s, attempts, not_before_s)
