"""Payloads above 256 KiB in files of their own, one for each item: written and synced before the row that names them is committed.

1. File, then directory, are synced before `save` returns.
2. A file without a row is an orphan of a cut or of a rolled-back transaction; `sweep` removes it at open.
3. A name is a `seq`, so nothing from a caller becomes a path.
"""

import os
from collections.abc import Collection
from pathlib import Path

SEGMENT_BYTES = 262_144
"""Below this, a row in the database is as fast (facts: 64 KiB rows measured fine) and one thing fewer can go wrong."""


class Segments:
    """The folder of payload files. Methods raise OSError: the writer translates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        self._present = {int(path.stem) for path in folder.iterdir() if path.stem.isdecimal()}

    def save(self, seq: int, payload: bytes) -> None:
        """Write, sync, and sync the directory; nothing is left behind on failure."""
        path = self._path(seq)
        self._present.add(seq)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(payload)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        sync_folder(self._folder)

    def load(self, seq: int) -> bytes:
        """Read a whole file."""
        return self._path(seq).read_bytes()

    def remove(self, seq: int) -> None:
        """Remove; not an error if it is absent. Not synced: an orphan that comes back is swept at the next open."""
        if seq in self._present:
            self._path(seq).unlink(missing_ok=True)
            self._present.discard(seq)

    def sweep(self, known: Collection[int]) -> int:
        """Remove every file whose `seq` has no row; returns how many."""
        orphans = [path for path in self._folder.iterdir() if not path.stem.isdecimal() or int(path.stem) not in known]
        for path in orphans:
            path.unlink()
        return len(orphans)

    def _path(self, seq: int) -> Path:
        return self._folder / f"{seq}.payload"


def sync_folder(folder: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
