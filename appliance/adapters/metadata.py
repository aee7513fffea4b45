"""Signed metadata (TUF, python-tuf's client) over releases that arrive as messages: nothing here ever touches the network.

1. The trust anchor is the root that was shipped with the device; newer roots are accepted only through the chain that it began (TUF spec 5.3).
2. Signatures, thresholds, versions, expiry and hashes are checked by `tuf.ngclient.Updater`; it is given only what the release carries.
3. Each verification works on a scratch copy of the trusted state: the updater keeps a new timestamp even when what follows fails. Only after
   everything agreed does the new state replace the old one, as one file by rename, after a sync.
4. All targets that the signed metadata names must be in the release, and no others; a target's name is that of its manifest.
5. Expiry is judged by the system's clock, as python-tuf does.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)

# The library builds `__all__` from `Name.__name__`, which mypy cannot read: the imports are public all the same.
from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]  # tuf re-exports them without saying so
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]  # as above

from appliance.contract.codec import decode
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.models import Manifest, Release

MAX_FILES = 512
"""Files in a release: several hundred manifests and a long life of root keys."""
_NAME = re.compile(r"(metadata|targets)/[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.json")
_BASE = "release:///metadata/"
_STATE = "trusted.msgpack"
_CONFIG = UpdaterConfig(
    max_root_rotations=64,
    max_delegations=1,
    root_max_length=65_536,
    timestamp_max_length=16_384,
    snapshot_max_length=65_536,
    targets_max_length=524_288,
)
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (ExpiredMetadataError, "expired"),
    (UnsignedMetadataError, "unsigned"),
    (BadVersionNumberError, "rollback"),
    (LengthOrHashMismatchError, "hash"),
    (DownloadHTTPError, "missing"),
    (RepositoryError, "malformed"),
    (DownloadError, "malformed"),
)
"""The first row that fits names the reason."""


class _Shelf(FetcherInterface):
    """Gives the updater the files of one release instead of a network."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = urlsplit(url).path.removeprefix("/")
        if path not in self._files:
            raise DownloadHTTPError(f"the release has no {path}", 404)
        return iter([self._files[path]])


class TrustedMetadata:
    """The port `Metadata`: the trusted state lives in one file of `directory`; `anchor` is the shipped root's bytes."""

    def __init__(self, directory: Path, anchor: bytes) -> None:
        """Create the directory if it is absent. Raises: WorldError (`disk`)."""
        self._directory = directory
        self._anchor = anchor
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _disk(directory, error) from error

    def verify(self, release: Release) -> list[Manifest]:
        """Check signatures, versions, expiry and hashes; return all manifests on offer, in the order of their names.

        Raises: TheirsError (`unsigned`, `rollback`, `expired`, `hash`, `malformed`, `missing`), WorldError (`disk`); nothing changed then.
        """
        _check_bounds(release)
        try:
            with tempfile.TemporaryDirectory(dir=self._directory, prefix=".scratch-") as scratch:
                before = self._unpack(Path(scratch))
                targets = self._refresh(Path(scratch), release)
                manifests = [_manifest(name, targets, release) for name in sorted(targets.targets)]
                _refuse_extras(targets, release)
                after = _pack(Path(scratch))
                if after != before:
                    self._replace(after)
        except OSError as error:
            raise _disk(self._directory, error) from error
        return manifests

    def _refresh(self, scratch: Path, release: Release) -> Targets:
        try:
            updater = Updater(str(scratch), _BASE, fetcher=_Shelf(release.files), config=_CONFIG, bootstrap=self._anchor)
            updater.refresh()
            return Metadata[Targets].from_file(str(scratch / "targets.json")).signed
        except (RepositoryError, DownloadError) as error:
            reason = next(reason for kind, reason in _REASONS if isinstance(error, kind))
            raise TheirsError(
                reason, str(error) or type(error).__name__, where="release metadata", remedy="the cloud must publish anew"
            ) from error

    def _unpack(self, scratch: Path) -> dict[str, bytes]:
        path = self._directory / _STATE
        if not path.exists():
            return {}
        try:
            files = msgspec.msgpack.decode(path.read_bytes(), type=dict[str, bytes])
        except msgspec.MsgspecError as error:
            remedy = "remove the file: protection against rollback then begins anew from the device's trust anchor"
            raise WorldError("disk", f"the trusted metadata is damaged: {error}", where=str(path), remedy=remedy) from error
        for name, content in files.items():
            target = scratch / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
        return files

    def _replace(self, files: dict[str, bytes]) -> None:
        fresh = self._directory / f"{_STATE}.new"
        with fresh.open("wb") as file:
            file.write(msgspec.msgpack.encode(files))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._directory / _STATE)
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check_bounds(release: Release) -> None:
    if len(release.files) > MAX_FILES:
        raise TheirsError("malformed", f"{len(release.files)} files, at most {MAX_FILES} are allowed", where="release")
    for name in release.files:
        if not _NAME.fullmatch(name):
            raise TheirsError("malformed", f"{name[:160]!r} is neither metadata/NAME.json nor targets/NAME.json", where="release")


def _manifest(name: str, targets: Targets, release: Release) -> Manifest:
    content = release.files.get(f"targets/{name}")
    if content is None:
        raise TheirsError("missing", "signed metadata names it, but the release does not carry it", where=f"targets/{name}")
    try:
        targets.targets[name].verify_length_and_hashes(content)
    except LengthOrHashMismatchError as error:
        raise TheirsError("hash", f"not the manifest that was signed: {error}", where=f"targets/{name}") from error
    try:
        manifest = decode(content, Manifest)
    except TheirsError as error:
        raise TheirsError("malformed", error.what, where=f"targets/{name}") from error
    expected = f"{manifest.model_id}-{manifest.token}.json"
    if name != expected:
        raise TheirsError("malformed", f"holds the manifest of {expected}", where=f"targets/{name}")
    return manifest


def _refuse_extras(targets: Targets, release: Release) -> None:
    for name in release.files:
        if name.startswith("targets/") and name.removeprefix("targets/") not in targets.targets:
            raise TheirsError("unsigned", "no signed metadata names this manifest", where=name)


def _pack(scratch: Path) -> dict[str, bytes]:
    """Everything that the updater trusts now, by path; `root.json` is only its link into the history."""
    paths = sorted(path for path in scratch.rglob("*.json") if not path.is_symlink())
    return {str(path.relative_to(scratch)): path.read_bytes() for path in paths}


def _disk(path: Path, error: OSError) -> WorldError:
    return WorldError("disk", f"trusted metadata cannot be kept: {error}", where=str(path), remedy="free space there, or check the disk")
