"""Opens the database so that what it then says is true, and sets a damaged one aside.

1. WAL, synchronous FULL, no automatic checkpoints: the writer checkpoints between groups. One connection writes; others may read.
2. After an unclean stop `quick_check` reads everything once. Whatever is found in the WAL then is copied into the database before anything is
   acknowledged: a WAL that was read from the page cache alone proves nothing about the disk, and a duplicate is acknowledged without a new write.
3. The WAL is written full of zeros to 4 MiB: overwriting a file that has its size is cheaper to sync than growing it.
4. A damaged database moves to `damaged-N/` with its WAL and payload files; a new one starts empty, except for rows that still agree with their
   checksum. The store counts what lies aside.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import apsw

from appliance.adapters.store.disk import free_bytes
from appliance.adapters.store.schema import FORMAT, TABLES
from appliance.adapters.store.segments import sync_folder
from appliance.contract.errors import WorldError

FILE = "queue.db"
DAMAGE = (apsw.CorruptError, apsw.NotADBError)
WAL_FIRST_BYTES = 4 * 1_048_576
WAL_LIMIT_BYTES = 16 * 1_048_576
"""What the WAL may keep: large enough that hot pages are written to the database once for many commits."""
_STATEMENTS = 256
"""One insert for each size of a group, and the rest."""


def connect(folder: Path, *, check: bool, vfs: str = "") -> apsw.Connection:
    """Open or create. Raises: apsw.Error (CorruptError and NotADBError mean damage), OSError, WorldError (`format`)."""
    connection = apsw.Connection(str(folder / FILE), vfs=vfs or None, statementcachesize=_STATEMENTS)
    try:
        _configure(connection)
        if check:
            _check(connection)
        _create(connection, folder)
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        _lengthen(folder / f"{FILE}-wal")
    except BaseException:
        connection.close()
        raise
    return connection


def set_aside(folder: Path) -> Path:
    """Move database, WAL and payload files into the next free `damaged-N`."""
    aside = next(path for path in (folder / f"damaged-{number}" for number in count(1)) if not path.exists())
    aside.mkdir(mode=0o700)
    for name in (FILE, f"{FILE}-wal", f"{FILE}-shm", "segments"):
        with suppress(FileNotFoundError):
            (folder / name).rename(aside / name)
    (folder / "segments").mkdir(mode=0o700)
    sync_folder(folder)
    return aside


def quarantined(folder: Path) -> int:
    """How many damaged databases lie aside."""
    return sum(1 for path in folder.glob("damaged-*"))


def checkpoint(connection: apsw.Connection) -> bool:
    """Copy the WAL into the database; True if all of it went, so that the next commit starts the WAL anew. Raises: apsw.Error."""
    found, copied = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    return bool(found == copied)


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    """Turn SQLite's and the system's errors into WorldError (`disk`)."""
    try:
        yield
    except (apsw.Error, OSError) as error:
        raise foreign(error, folder) from error


def foreign(error: Exception, folder: Path) -> WorldError:
    """The WorldError for an exception of SQLite or the system."""
    try:
        free = f"{free_bytes(folder)} bytes are free"
    except OSError as unreadable:
        free = f"its file system cannot be read: {unreadable.strerror}"
    return WorldError("disk", f"{type(error).__name__}: {error}; {free}", where=str(folder), remedy="free space there, or check the disk")


def _configure(connection: apsw.Connection) -> None:
    connection.set_busy_timeout(2_000)
    if connection.pragma("journal_mode", "wal") != "wal":
        raise apsw.CantOpenError("the file system does not allow a write-ahead log")
    for name, value in (
        ("synchronous", "FULL"),
        ("wal_autocheckpoint", 0),
        ("journal_size_limit", WAL_LIMIT_BYTES),
        ("cache_size", -8192),
        ("cell_size_check", 1),
        ("trusted_schema", 0),
    ):
        connection.pragma(name, value)


def _check(connection: apsw.Connection) -> None:
    found = connection.execute("PRAGMA quick_check(1)").fetchall()
    if found != [("ok",)]:
        raise apsw.CorruptError(f"quick_check: {found[0][0]}")


def _create(connection: apsw.Connection, folder: Path) -> None:
    found = connection.pragma("user_version")
    if found == FORMAT:
        return
    if found:
        raise WorldError(
            "format", f"the queue has format {found}, this program reads {FORMAT}", where=str(folder), remedy="install its program"
        )
    with connection:
        connection.execute(TABLES + f"PRAGMA user_version = {FORMAT};").fetchall()


def _lengthen(wal: Path) -> None:
    """Best effort: without room the WAL grows as it is written."""
    with suppress(OSError):
        descriptor = os.open(wal, os.O_WRONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if free_bytes(wal.parent) > 4 * WAL_FIRST_BYTES:
                os.pwrite(descriptor, bytes(max(0, WAL_FIRST_BYTES - size)), size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
