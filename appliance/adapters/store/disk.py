"""What the store asks of its file system: that nobody else writes, how much is free, and a reserve for the day when nothing is.

1. The lock is an flock that the kernel drops with the process. Its file's one byte says whether the last owner stopped cleanly.
2. SQLite needs free space even to delete. The ballast is given up when a write finds the disk full, and taken back when space is plenty.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from appliance.contract.errors import WorldError

BALLAST_BYTES = 4 * 1_048_576
_RUNNING, _STOPPED = b"1", b"0"


class Lock:
    """The right to write, held until `release`. Raises: WorldError (`store_locked`), OSError."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.was_unclean = os.pread(self._descriptor, 1, 0) == _RUNNING
            self._mark(_RUNNING)
        except BlockingIOError:
            os.close(self._descriptor)
            raise WorldError(
                "store_locked", "another process holds the queue", where=str(folder), remedy="ask that process, or stop it first"
            ) from None
        except OSError:
            os.close(self._descriptor)
            raise

    def release(self, *, clean: bool) -> None:
        """Let go; `clean` spares the next owner the check of the whole database."""
        try:
            if clean:
                self._mark(_STOPPED)
        finally:
            os.close(self._descriptor)

    def _mark(self, mark: bytes) -> None:
        os.pwrite(self._descriptor, mark, 0)
        os.fsync(self._descriptor)


class Ballast:
    """A file of `BALLAST_BYTES` that stands for free space."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ballast"
        self._folder = folder
        self.held = self._path.exists()
        if not self.held:
            self.restore(0)

    def give_up(self) -> None:
        """Free its space."""
        self._path.unlink(missing_ok=True)
        self.held = False

    def restore(self, min_free_bytes: int) -> None:
        """Take the space back if more than `min_free_bytes` would be left; silently not, if not."""
        if free_bytes(self._folder) < min_free_bytes + BALLAST_BYTES:
            return
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, BALLAST_BYTES)
                self.held = True
            except OSError:
                self._path.unlink()
                raise
            finally:
                os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Bytes that this process may still write on the folder's file system. Raises: OSError."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize
