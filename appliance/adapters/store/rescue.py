"""Saves what can be saved from a damaged database: rows that still agree with their checksum, from both ends towards the damage."""

import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw

from appliance.adapters.store.database import FILE
from appliance.adapters.store.ledger import Ledger
from appliance.adapters.store.payloads import Codec
from appliance.adapters.store.schema import COLUMNS, insert
from appliance.adapters.store.segments import Segments

_WAITING = " ".join(("SELECT", ", ".join(COLUMNS), "FROM items NOT INDEXED WHERE reason IS NULL "))
_SEQ, _KEY, _KIND, _QUEUED, _SIZE, _CODEC, _CHECKSUM, _DATA = (
    COLUMNS.index(name) for name in ("seq", "okey", "kind", "queued_s", "size", "codec", "checksum", "data")
)


def rescue(ledger: Ledger, aside: Path) -> int:
    """Copy waiting items and counters into the new database, in one transaction; returns how many items. Raises: apsw.Error, OSError."""
    with suppress(apsw.Error, OSError):
        damaged = apsw.Connection(str(aside / FILE), flags=apsw.SQLITE_OPEN_READWRITE)  # its WAL has to be replayed
        try:
            return _copy(ledger, damaged, Segments(aside / "segments"))
        finally:
            damaged.close(True)
    return 0


def _copy(ledger: Ledger, damaged: apsw.Connection, files: Segments) -> int:
    ledger.begin()
    try:
        ledger.adopt(damaged)
        saved = 0
        for row in _rows(damaged):
            saved += _save(ledger, row, files)
        ledger.commit()
    except BaseException:
        ledger.rollback()
        raise
    return saved


def _rows(damaged: apsw.Connection) -> Iterator[tuple[Any, ...]]:
    """Upwards to the damage, then what is above it."""
    last = 0
    with suppress(apsw.Error):
        for row in damaged.execute(_WAITING + "ORDER BY seq"):
            yield row
            last = row[0]
        return
    above: list[tuple[Any, ...]] = []
    with suppress(apsw.Error):
        above.extend(damaged.execute(_WAITING + "AND seq > ? ORDER BY seq DESC", (last,)))
    yield from reversed(above)


def _save(ledger: Ledger, row: tuple[Any, ...], files: Segments) -> bool:
    seq, stored = row[_SEQ], row[_DATA]
    in_file = row[_CODEC] in (Codec.SEGMENT_RAW, Codec.SEGMENT_ZSTD)
    if in_file:
        try:
            stored = files.load(seq)
        except OSError:
            return False
    if zlib.crc32(stored) != row[_CHECKSUM]:
        return False
    before = ledger.connection.total_changes()
    ledger.connection.execute(insert(1), row)
    if ledger.connection.total_changes() == before:
        return False
    if in_file:
        ledger.keep(seq, stored)
    ledger.state.account(row[_KIND], 1, row[_SIZE])
    ledger.state.latest_s = max(ledger.state.latest_s, row[_QUEUED])
    ledger.state.next_seq = max(ledger.state.next_seq, seq + 1)
    ledger.promote([row[_KEY]])
    return True
