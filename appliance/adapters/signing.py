"""The cloud's TUF repository: signs what is on offer, with Ed25519 keys behind securesystemslib's `Signer` (a file here, an HSM by the same seam).

1. Four roles, each with its own key: root says which keys count, targets what is offered, snapshot which targets belong together, timestamp that
   this is today's (TUF spec 2.1). Snapshot and timestamp carry the length and hash of what they name, so nothing can be mixed.
2. Versions only grow, across restarts: the whole repository is one file, replaced by rename after a sync, before a release leaves this module.
3. `refresh` signs a new timestamp, and anew whatever has spent half of its term; call it several times within the shortest term.
4. A key is replaced by `rotate`: the new root is signed by the old and the new root keys, so devices follow from the root that they know.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

# Both libraries build `__all__` from `Name.__name__`, which mypy cannot read: the imports are public all the same.
from securesystemslib.signer import CryptoSigner, Signer  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from appliance.contract.codec import decode, encode
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.models import Manifest, Release

ROLES = ("root", "targets", "snapshot", "timestamp")
_FILE = "release.json"
_COMPACT = JSONSerializer(compact=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How long each role's signature is good, in days: long for offline keys, short for the one that proves freshness."""

    root: float = 365.0
    targets: float = 90.0
    snapshot: float = 90.0
    timestamp: float = 1.0

    def of(self, role: str) -> timedelta:
        """Return a role's term."""
        return timedelta(days=float(getattr(self, role)))


def file_signer(path: Path) -> Signer:
    """Load an Ed25519 key (PKCS#8 PEM), or make one with mode 0600 where there is none.

    Raises: WorldError (`disk`), TheirsError (`key`) if the file is no such key.
    """
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(path, CryptoSigner.generate_ed25519().private_bytes)
        pem = path.read_bytes()
    except OSError as error:
        raise WorldError("disk", f"no signing key: {error}", where=str(path)) from error
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise TheirsError("key", f"not an unencrypted PKCS#8 PEM key: {error}", where=str(path)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise TheirsError("key", "not an Ed25519 key", where=str(path))
    return CryptoSigner(key)


def file_signers(directory: Path) -> dict[str, Signer]:
    """Load or make `ROLE.pem` for all four roles. Raises: WorldError (`disk`), TheirsError (`key`)."""
    return {role: file_signer(directory / f"{role}.pem") for role in ROLES}


class Repository:
    """Signed metadata and its targets. `signers` by role (`ROLES`); `wall` returns seconds since the epoch."""

    def __init__(self, directory: Path, signers: Mapping[str, Signer], wall: Callable[[], float], terms: Terms = Terms()) -> None:
        """Take over what `create` or an earlier run left; prefer `create` and `open_or_create`."""
        self._path = directory / _FILE
        self._signers = dict(signers)
        self._wall = wall
        self._terms = terms
        self._files: dict[str, bytes] = {}

    @classmethod
    def create(cls, directory: Path, signers: Mapping[str, Signer], wall: Callable[[], float], terms: Terms = Terms()) -> Self:
        """Begin a repository with an empty offer. Raises: WorldError (`disk`), OursError (`exists`)."""
        repository = cls(directory, signers, wall, terms)
        if repository._path.exists():
            raise OursError("exists", "a repository is here already", where=str(repository._path))
        root = Root(version=1, expires=repository._expiry("root"), consistent_snapshot=False)  # a release is one message: it cannot be torn
        for role in ROLES:
            root.add_key(repository._signers[role].public_key, role)
        files = {"metadata/1.root.json": repository._sign(root, "root")}
        repository._commit(repository._chain(files, Targets(version=1)))
        return repository

    @classmethod
    def open_or_create(cls, directory: Path, signers: Mapping[str, Signer], wall: Callable[[], float], terms: Terms = Terms()) -> Self:
        """Go on with the repository in `directory`, or begin one. Raises: WorldError (`disk`), TheirsError (`malformed`, `key`)."""
        repository = cls(directory, signers, wall, terms)
        try:
            if not repository._path.exists():
                return cls.create(directory, signers, wall, terms)
            repository._files = decode(repository._path.read_bytes(), Release).files
        except OSError as error:
            raise WorldError("disk", str(error), where=str(repository._path)) from error
        repository._check_signers()
        return repository

    @property
    def anchor(self) -> bytes:
        """The newest root: what a device that is made today ships with."""
        return self._files[f"metadata/{self._version_of_root()}.root.json"]

    @property
    def release(self) -> Release:
        """What is on offer now."""
        return Release(files=dict(self._files))

    def publish(self, manifests: Sequence[Manifest]) -> Release:
        """Offer exactly these manifests from now on. Raises: WorldError (`disk`), TheirsError (`oversized`, `malformed`)."""
        targets = self._load(Targets, "targets")
        targets.targets.clear()
        files = {path: content for path, content in self._files.items() if path.startswith("metadata/")}
        for manifest in manifests:
            name, content = f"{manifest.model_id}-{manifest.token}.json", encode(manifest)
            targets.targets[name] = TargetFile.from_data(name, content, ["sha256"])
            files[f"targets/{name}"] = content
        targets.version += 1
        return self._commit(self._chain(files, targets))

    def refresh(self) -> Release:
        """Prove that the offer is still today's; what has spent half its term is signed anew. Raises as `publish`."""
        files = dict(self._files)
        root, targets, snapshot = (self._load(Root, "root"), self._load(Targets, "targets"), self._load(Snapshot, "snapshot"))
        if self._stale(root):
            root.version += 1
            files[f"metadata/{root.version}.root.json"] = self._sign(root, "root")
        if self._stale(targets) or self._stale(snapshot):
            targets.version += 1
            return self._commit(self._chain(files, targets))
        return self._commit(self._stamp(files))

    def rotate(self, role: str, signer: Signer) -> Release:
        """Replace a role's key: devices that know the present root follow. Raises as `publish`."""
        root = self._load(Root, "root")
        before = self._signers[role]
        root.revoke_key(before.public_key.keyid, role)
        root.add_key(signer.public_key, role)
        root.version += 1
        self._signers[role] = signer
        also = [before] if role == "root" else []
        targets = self._load(Targets, "targets")
        targets.version += 1
        files = dict(self._files) | {f"metadata/{root.version}.root.json": self._sign(root, "root", also)}
        try:
            return self._commit(self._chain(files, targets))
        except BaseException:
            self._signers[role] = before
            raise

    def _check_signers(self) -> None:
        root = self._load(Root, "root")
        for role in ROLES:
            if self._signers[role].public_key.keyid not in root.roles[role].keyids:
                raise TheirsError(
                    "key",
                    f"the root does not name the key given for {role}",
                    where=str(self._path),
                    remedy="give the key that it was made with",
                )

    def _chain(self, files: dict[str, bytes], targets: Targets) -> dict[str, bytes]:
        """Sign targets, then the snapshot that names them, then the timestamp."""
        files["metadata/targets.json"] = self._sign(targets, "targets")
        snapshot = self._next(Snapshot, "snapshot", files)
        snapshot.meta["targets.json"] = MetaFile.from_data(targets.version, files["metadata/targets.json"], ["sha256"])
        files["metadata/snapshot.json"] = self._sign(snapshot, "snapshot")
        return self._stamp(files)

    def _stamp(self, files: dict[str, bytes]) -> dict[str, bytes]:
        timestamp = self._next(Timestamp, "timestamp", files)
        content = files["metadata/snapshot.json"]
        snapshot = Metadata[Snapshot].from_bytes(content).signed
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, content, ["sha256"])
        files["metadata/timestamp.json"] = self._sign(timestamp, "timestamp")
        return files

    def _sign(self, signed: Signed, role: str, also: Sequence[Signer] = ()) -> bytes:
        signed.expires = self._expiry(role)
        metadata: Metadata[Any] = Metadata(signed)
        for signer in (self._signers[role], *also):
            metadata.sign(signer, append=True)
        return metadata.to_bytes(_COMPACT)

    def _next(self, kind: type[Any], role: str, files: Mapping[str, bytes]) -> Any:
        """The role's metadata with its next version; version 1 where there is none."""
        if f"metadata/{role}.json" not in files:
            return kind(version=1)
        signed = self._load(kind, role)
        signed.version += 1
        return signed

    def _load(self, kind: type[Any], role: str) -> Any:
        name = f"{self._version_of_root()}.root" if role == "root" else role
        path = f"metadata/{name}.json"
        try:
            return Metadata[kind].from_bytes(self._files[path]).signed  # type: ignore[valid-type] # the role is chosen at run time
        except (KeyError, DeserializationError) as error:
            raise self._damaged(f"no usable {path}: {error}") from error

    def _version_of_root(self) -> int:
        versions = [
            int(number) for path in self._files if (number := path.removeprefix("metadata/").removesuffix(".root.json")).isdecimal()
        ]
        if not versions:
            raise self._damaged("there is no root in it")
        return max(versions)

    def _damaged(self, what: str) -> TheirsError:
        return TheirsError(
            "malformed", what, where=str(self._path), remedy="restore the repository from a backup: versions must not go back"
        )

    def _stale(self, signed: Signed) -> bool:
        return signed.expires - self._now() < self._terms.of(signed.type) / 2

    def _expiry(self, role: str) -> datetime:
        return self._now() + self._terms.of(role)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(int(self._wall()), UTC)

    def _commit(self, files: dict[str, bytes]) -> Release:
        release = Release(files=files)
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(self._path, encode(release))
        except OSError as error:
            raise WorldError("disk", f"the release cannot be kept: {error}", where=str(self._path), remedy="free space there") from error
        self._files = files
        return release


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
