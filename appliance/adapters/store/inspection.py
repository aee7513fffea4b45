"""What operators and callers may ask of a store; only reads, so it also works on a second connection while another process writes."""

from pathlib import Path
from typing import Any

import apsw
import msgspec

from appliance.adapters.store.ledger import counted, item_of
from appliance.adapters.store.payloads import Codec, Packer
from appliance.adapters.store.schema import FORMAT, FROM_ITEMS, ITEM
from appliance.adapters.store.segments import Segments
from appliance.contract.deferral import Fate, Item, State
from appliance.contract.errors import WorldError

LIST_LIMIT = 1_000


class Inspection:
    """Questions to a connection; the store's own, or a second one that only reads. Raises: apsw.Error, or WorldError from `open`."""

    def __init__(self, connection: apsw.Connection, segments: Segments) -> None:
        self._connection = connection
        self._segments = segments
        self._packer = Packer()

    @classmethod
    def open(cls, folder: Path) -> "Inspection":
        """A reader beside the owner of the store. Raises: WorldError (`no_store`, `format`)."""
        path = folder / "queue.db"
        if not path.exists():
            raise WorldError("no_store", "there is no queue here", where=str(folder), remedy="give the state directory of a device")
        try:
            connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
            connection.set_busy_timeout(2_000)
            found = connection.pragma("user_version")
        except apsw.Error as error:
            raise WorldError("disk", str(error), where=str(path), remedy="run as the owner of the state directory") from error
        if found != FORMAT:
            raise WorldError("format", f"the queue has format {found}, this program reads {FORMAT}", where=str(path))
        return cls(connection, Segments(folder / "segments"))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def list(self, *, dead: bool = False, kind: str = "", after: int = 0, limit: int = 100) -> tuple[Item, ...]:
        """Waiting items or dead letters with a `seq` above `after`, in the order of `seq`."""
        which = "IS NOT NULL" if dead else "IS NULL"
        rows = self._connection.execute(
            f"SELECT {ITEM} {FROM_ITEMS.format(hint='')} WHERE i.seq > :after AND i.reason {which} AND (:kind = '' OR i.kind = :kind) "
            "ORDER BY i.seq LIMIT :limit",
            {"after": after, "kind": kind, "limit": min(limit, LIST_LIMIT)},
        )
        return tuple(item_of(row) for row in rows)

    def fate(self, idem: str, leased: frozenset[int] = frozenset()) -> Fate | None:
        """What is known of a key; None: nothing, or no more. Raises: WorldError (`damaged`)."""
        row = self._connection.execute(f"SELECT i.reason, {ITEM} {FROM_ITEMS.format(hint='')} WHERE i.idem = ?", (idem,)).fetchone()
        if row is not None:
            reason, *columns = row
            item = item_of(tuple(columns))
            if reason is not None:
                return Fate(State.DEAD, item, reason)
            return Fate(State.SENDING if item.seq in leased else State.WAITING, item)
        row = self._connection.execute(
            "SELECT outcome, reason, codec, raw_len, checksum, data FROM done WHERE idem = ?", (idem,)
        ).fetchone()
        if row is None:
            return None
        outcome, reason, codec, raw_len, checksum, data = row
        result = None if data is None else self._packer.unpack(codec, raw_len, checksum, data)
        return Fate(State(outcome), None, reason, result)

    def payload(self, idem: str) -> bytes | None:
        """The payload of a waiting item or dead letter. Raises: WorldError (`damaged`), OSError."""
        row = self._connection.execute("SELECT seq, codec, raw_len, checksum, data FROM items WHERE idem = ?", (idem,)).fetchone()
        if row is None:
            return None
        seq, codec, raw_len, checksum, data = row
        if codec in (Codec.SEGMENT_RAW, Codec.SEGMENT_ZSTD):
            data = self._segments.load(seq)
        return self._packer.unpack(codec, raw_len, checksum, data)

    def counters(self) -> dict[str, Any]:
        """The counters as of the last commit, and the queue time of the oldest waiting item."""
        counters: dict[str, Any] = msgspec.to_builtins(counted(self._connection))
        oldest = self._connection.execute("SELECT queued_s FROM items WHERE reason IS NULL ORDER BY seq LIMIT 1").fetchone()
        return counters | {"oldest_queued_s": oldest[0] if oldest else None}
