"""Ciphertext artifacts and small state files in one directory; every change is atomic and survives a power cut.

1. An artifact is named by its container hash and nothing else: 64 hex digits, so no name from the network becomes a path.
2. `HASH.part` is allocated whole at the first chunk, so a full disk is told at once and not after gigabytes.
3. A chunk is written, and every `SYNC_CHUNKS` chunks the file is synced *and then* its bits are written to `HASH.bits`: a bit on disk means that its
   chunk is on disk. A kill or a power cut loses at most the chunks since (8 MiB), never correctness. Bits only ever go from 0 to 1, so a torn write
   of them is still true.
4. `complete` hashes the whole file before it becomes `HASH.aem` by rename; file and directory are synced.
5. State files are replaced by rename after a sync; readable by the owner only.
6. A finished container is hashed once more per process before it counts as present: disks rot, and other systems may have been started from it.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import RLock

import structlog

from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.models import CHUNK_BYTES, CompiledArtifact

SYNC_CHUNKS = 32
"""8 MiB between syncs: what a kill costs to pull again, 70 ms on 1 GbE."""
_HASH = re.compile(r"[0-9a-f]{64}")
_STATE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_READ = 1_048_576

_log = structlog.get_logger(__name__)


class _Partial:
    """One container on its way: an open file, the bits of its chunks, and which of them the disk already knows."""

    def __init__(self, data: Path, bits: Path, size: int) -> None:
        self.chunks = -(-size // CHUNK_BYTES)
        self._size = size
        self._unsynced = 0
        self._present = bytearray(-(-self.chunks // 8))
        with ExitStack() as stack:
            self._data = _descriptor(stack, data)
            self._bits = _descriptor(stack, bits)
            self._prepare()
            self._files = stack.pop_all()

    def _prepare(self) -> None:
        if os.fstat(self._data).st_size == self._size:
            known = os.pread(self._bits, len(self._present), 0)
            self._present[: len(known)] = known
            return
        os.ftruncate(self._bits, 0)  # new, or cut by somebody: bits about another file mean nothing
        os.fsync(self._bits)
        os.ftruncate(self._data, 0)
        os.posix_fallocate(self._data, 0, self._size)

    def missing(self) -> list[int]:
        return [index for index in range(self.chunks) if not self._present[index // 8] >> (index % 8) & 1]

    def length(self, index: int) -> int:
        return min(CHUNK_BYTES, self._size - index * CHUNK_BYTES)

    def put(self, index: int, chunk: bytes) -> None:
        _write_all(self._data, chunk, index * CHUNK_BYTES)
        self._present[index // 8] |= 1 << (index % 8)
        self._unsynced += 1
        if self._unsynced >= SYNC_CHUNKS:
            self.sync()

    def sync(self) -> None:
        os.fdatasync(self._data)
        _write_all(self._bits, bytes(self._present), 0)
        self._unsynced = 0

    def close(self) -> None:
        self._files.close()


class Depot:
    """The port `Depot` over one directory, which one process owns; calls block, so loops run them in a thread."""

    def __init__(self, directory: Path) -> None:
        """Create the directory if it is absent. Raises: WorldError (`disk`)."""
        self._artifacts = directory / "artifacts"
        self._states = directory / "state"
        self._partials: dict[str, _Partial] = {}
        self._checked: set[str] = set()
        self._lock = RLock()
        with self._translated(directory):
            for folder in (self._artifacts, self._states):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def missing(self, artifact: CompiledArtifact) -> list[int]:
        """Indices of the chunks that are not yet on disk; a finished container with another hash is removed and missing again.

        Raises: TheirsError (`name`), WorldError (`disk`).
        """
        with self._lock, self._translated(self._path(artifact.container_sha256, "part")):
            return [] if self._finished(artifact) else self._partial(artifact).missing()

    def put(self, artifact: CompiledArtifact, index: int, chunk: bytes) -> None:
        """Store a chunk; the same one twice is harmless. Raises: TheirsError (`chunk`, `name`), WorldError (`disk`)."""
        with self._lock, self._translated(self._path(artifact.container_sha256, "part")):
            if self._finished(artifact):
                return
            partial = self._partial(artifact)
            if not 0 <= index < partial.chunks or len(chunk) != partial.length(index):
                wanted = f"{partial.length(index)} bytes" if 0 <= index < partial.chunks else f"an index below {partial.chunks}"
                raise TheirsError("chunk", f"chunk {index} has {len(chunk)} bytes, expected {wanted}", where=artifact.container_sha256)
            partial.put(index, chunk)

    def complete(self, artifact: CompiledArtifact) -> str:
        """Check the whole hash and return the container's path.

        Raises: TheirsError (`tampered`) and forgets the chunks; OursError (`incomplete`) while chunks are missing; WorldError (`disk`).
        """
        name = artifact.container_sha256
        path, part = self._path(name, "aem"), self._path(name, "part")
        with self._lock, self._translated(part):
            if self._finished(artifact):
                return str(path)
            partial = self._partial(artifact)
            if missing := partial.missing():
                raise OursError("incomplete", f"{len(missing)} of {partial.chunks} chunks are missing", where=str(part))
            partial.sync()
            seen = _hash(part)
            if seen != name:
                self._forget(name)
                raise TheirsError(
                    "tampered", f"the container has SHA-256 {seen}, the manifest says {name}", where=str(part), remedy="it is pulled anew"
                )
            self._partials.pop(name).close()
            part.rename(path)
            self._path(name, "bits").unlink(missing_ok=True)
            _sync_folder(self._artifacts)
            self._checked.add(name)
            return str(path)

    def drop(self, artifact: str) -> None:
        """Remove an artifact by its container hash; not an error if it is absent. Raises: TheirsError (`name`), WorldError (`disk`)."""
        path = self._path(artifact, "aem")
        with self._lock, self._translated(path):
            self._checked.discard(artifact)
            path.unlink(missing_ok=True)
            self._forget(artifact)

    def save(self, name: str, payload: bytes) -> None:
        """Replace a small state file. Raises: TheirsError (`name`), WorldError (`disk`)."""
        path = self._state(name)
        fresh = path.with_name(f".{name}.new")
        with self._lock, self._translated(path):
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                _write_all(descriptor, payload, 0)
                os.fsync(descriptor)
            except OSError:
                fresh.unlink()
                raise
            finally:
                os.close(descriptor)
            fresh.replace(path)
            _sync_folder(self._states)

    def load(self, name: str) -> bytes | None:
        """Read a small state file; None if there is none. Raises: TheirsError (`name`), WorldError (`disk`)."""
        path = self._state(name)
        with self._translated(path), suppress(FileNotFoundError):
            return path.read_bytes()
        return None

    def names(self, prefix: str) -> list[str]:
        """The names of all small state files that begin so, sorted. Raises: WorldError (`disk`)."""
        with self._translated(self._states):
            return sorted(path.name for path in self._states.iterdir() if path.name.startswith(prefix))

    def forget(self, name: str) -> None:
        """Remove a small state file; not an error if it is absent. Raises: WorldError (`disk`)."""
        path = self._state(name)
        with self._translated(path):
            path.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def read(self, artifact: str, index: int) -> bytes:
        """Read one chunk of a complete artifact. Raises: TheirsError (`unknown_artifact`, `chunk`), WorldError (`disk`)."""
        path = self._path(artifact, "aem")
        if not path.exists():
            raise TheirsError("unknown_artifact", "this artifact is not here", where=artifact[:64])
        with self._translated(path), path.open("rb") as file:
            file.seek(max(index, 0) * CHUNK_BYTES)
            chunk: bytes = file.read(CHUNK_BYTES)
        if not chunk:
            raise TheirsError("chunk", f"chunk {index} is outside the artifact", where=artifact[:64])
        return chunk

    def close(self) -> None:
        """Sync what is on its way and let go of it. Raises: WorldError (`disk`)."""
        with self._lock, self._translated(self._artifacts):
            while self._partials:
                _, partial = self._partials.popitem()
                try:
                    partial.sync()
                finally:
                    partial.close()

    def _finished(self, artifact: CompiledArtifact) -> bool:
        name = artifact.container_sha256
        path = self._path(name, "aem")
        if not path.exists():
            return False
        if name not in self._checked:
            seen = _hash(path)
            if seen != name:
                _log.warning("container_found_damaged", path=str(path), seen=seen, expected=name)
                path.unlink()
                return False
            self._forget(name)  # leftovers of a cut between the rename and the unlink
            self._checked.add(name)
        return True

    def _partial(self, artifact: CompiledArtifact) -> _Partial:
        name = artifact.container_sha256
        if name not in self._partials:
            self._checked.discard(name)
            try:
                self._partials[name] = _Partial(self._path(name, "part"), self._path(name, "bits"), artifact.container_size)
            except OSError:
                self._forget(name)
                raise
        return self._partials[name]

    def _forget(self, name: str) -> None:
        partial = self._partials.pop(name, None)
        if partial is not None:
            partial.close()
        self._path(name, "bits").unlink(missing_ok=True)
        self._path(name, "part").unlink(missing_ok=True)

    def _path(self, artifact: str, suffix: str) -> Path:
        if not _HASH.fullmatch(artifact):
            raise TheirsError("name", f"{artifact[:80]!r} is not a container hash: 64 of 0-9 and a-f")
        return self._artifacts / f"{artifact}.{suffix}"

    def _state(self, name: str) -> Path:
        if not _STATE.fullmatch(name):
            raise TheirsError("name", f"{name[:80]!r} is not a state file's name: 1 to 64 of a-z, 0-9, '.', '_', '-'")
        return self._states / name

    @contextmanager
    def _translated(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = _free_bytes(path)
            raise WorldError(
                "disk", f"{error.strerror or error}; {free} bytes are free", where=str(path), remedy="free space there, or check the disk"
            ) from error


def _descriptor(stack: ExitStack, path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, descriptor)
    return descriptor


def _write_all(descriptor: int, payload: bytes, offset: int) -> None:
    view = memoryview(payload)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _hash(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    for folder in (path, *path.parents):
        with suppress(OSError):
            stats = os.statvfs(folder)
            return stats.f_bavail * stats.f_frsize
    return 0
