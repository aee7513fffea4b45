"""Turns folders of models into signed releases of encrypted artifacts, and serves their chunks and keys.

1. A model is a folder: `model.toml`, the full model's files and its variants' (`appliance.cloud.cards`); a head stays here.
2. A version names one content: the same version with other bytes, limits, variants or figures is refused; the same again changes nothing and
   costs no token.
3. Each artifact, of the full model and of each variant, is sealed with a fresh data key; key and manifest are stored before the release is signed.
4. Tokens come from one counter that only grows, and is stored before a token is used.
5. `publish_all` is all or nothing: a mistake in one folder leaves the present release as it is.
6. Only artifacts that were published here are served, by hash; older ones stay for devices that are still pulling them.
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from appliance.cloud import cards
from appliance.cloud.cards import CARD, ModelCard
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.models import CHUNK_BYTES, CompiledArtifact, EdgeConstraints, Manifest, RegionKey, RegionKeyAsk, Release, Variant
from appliance.contract.vocabulary import Mode, Platform
from appliance.core.trust.envelope import wrap_for_region

_BOOK = "published.json"
_log = structlog.get_logger(__name__)


class Repository(Protocol):
    """Signs what is on offer (`appliance.adapters.signing`)."""

    @property
    def release(self) -> Release:
        """What is on offer now."""

    def publish(self, manifests: Sequence[Manifest]) -> Release:
        """Offer exactly these manifests from now on."""

    def refresh(self) -> Release:
        """Prove that the offer is still today's."""


class State(Protocol):
    """Keeps small files, each replaced atomically (`appliance.ports.Depot` has these two)."""

    def save(self, name: str, payload: bytes) -> None:
        """Store a file."""

    def load(self, name: str) -> bytes | None:
        """Read a file; None if there is none."""


Seal = Callable[[Path, Path, bytes, bytes], CompiledArtifact]
"""`seal(source, destination, data_key, salt)`, as `appliance.adapters.sealed.seal`."""


class _Model(msgspec.Struct, frozen=True):
    """What a folder holds now, by mode and platform; A is the full model."""

    card: ModelCard
    files: dict[Mode, dict[Platform, Path]]
    hashes: dict[Mode, dict[Platform, str]]


class _Book(msgspec.Struct):
    """The stored state. `manifests` by model id and version; `keys` by container hash, secret: the file is the owner's only."""

    token: int = 0
    manifests: dict[str, dict[str, Manifest]] = {}
    keys: dict[str, bytes] = {}
    artifacts: dict[str, int] = {}
    """Container sizes by container hash."""


class Publisher:
    """The cloud's offer. `models`: the folder of model folders; `containers`: where encrypted artifacts are kept; `wall`: seconds since the epoch."""

    def __init__(
        self,
        *,
        models: Path,
        containers: Path,
        state: State,
        repository: Repository,
        seal: Seal,
        wall: Callable[[], float],
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Read the stored state. Raises: TheirsError (`malformed`), WorldError (`disk`)."""
        self._models = models
        self._containers = containers
        self._state = state
        self._repository = repository
        self._seal = seal
        self._wall = wall
        self._random_bytes = random_bytes
        self._book = _read_book(state)

    def publish_all(self) -> Release:
        """Read all model folders and offer what they hold; an offer that is already that one is only proven fresh.

        Raises: TheirsError (`malformed`, `version_reused`, `model`), WorldError (`disk`); the release is as before then.
        """
        models = [_read_model(folder) for folder in self._folders()]
        _refuse_doubles(models)
        for model in models:
            self._check_version(model)
        manifests = [self._manifest(model) for model in models]
        offered = {name for name in self._repository.release.files if name.startswith("targets/")}
        if offered == {f"targets/{each.model_id}-{each.token}.json" for each in manifests}:
            return self._repository.refresh()
        return self._repository.publish(manifests)

    def refresh(self) -> Release:
        """Prove that the offer is still today's; call it several times within the shortest term. Raises as the repository."""
        return self._repository.refresh()

    def chunk(self, artifact: str, index: int) -> bytes:
        """Return one transport chunk of a container. Raises: TheirsError (`unknown_artifact`, `chunk`), WorldError (`disk`)."""
        size = self._book.artifacts.get(artifact)
        if size is None:
            raise _unknown(artifact)
        last = -(-size // CHUNK_BYTES) - 1
        if not 0 <= index <= last:
            raise TheirsError("chunk", f"there is no chunk {index}, the last is {last}", where=artifact)
        path = self._path(artifact)
        try:
            with path.open("rb", buffering=0) as file:
                chunk = os.pread(file.fileno(), CHUNK_BYTES, index * CHUNK_BYTES)
        except OSError as error:
            raise WorldError("disk", f"the container cannot be read: {error}", where=str(path)) from error
        if len(chunk) != min(CHUNK_BYTES, size - index * CHUNK_BYTES):
            raise WorldError(
                "disk", f"the container ends before byte {size}", where=str(path), remedy="publish the model under a new version"
            )
        return chunk

    def region_key(self, ask: RegionKeyAsk) -> RegionKey:
        """Return an artifact's data key, encrypted to the asking region. Raises: TheirsError (`unknown_artifact`, `public_key`)."""
        data_key = self._book.keys.get(ask.artifact)
        if data_key is None:
            raise _unknown(ask.artifact)
        return wrap_for_region(ask, data_key, self._random_bytes(32))

    def _folders(self) -> list[Path]:
        try:
            return sorted(card.parent for card in self._models.glob(f"*/{CARD}"))
        except OSError as error:
            raise WorldError("disk", str(error), where=str(self._models)) from error

    def _check_version(self, model: _Model) -> None:
        known = self._known(model)
        if known is None:
            return
        if _content(known) != _content(_described(model, known.token, known.released_at, _unsealed(model))):
            what = f"version {model.card.version} of {model.card.model_id} was published with other bytes, limits or figures"
            raise TheirsError("version_reused", what, where=_place(model), remedy="give it a new version")

    def _manifest(self, model: _Model) -> Manifest:
        """Return the manifest that this content already has, or seal it and make one."""
        known = self._known(model)
        if known is not None:
            return known
        artifacts = {mode: {platform: self._add(path) for platform, path in files.items()} for mode, files in model.files.items()}
        if {mode: {platform: each.sha256 for platform, each in made.items()} for mode, made in artifacts.items()} != model.hashes:
            raise WorldError(
                "model", "a model file changed while it was sealed", where=_place(model), remedy="publish again when it is written"
            )
        card = model.card
        self._book.token += 1
        manifest = _described(model, self._book.token, self._wall(), artifacts)
        self._book.manifests.setdefault(card.model_id, {})[card.version] = manifest
        self._state.save(_BOOK, msgspec.json.encode(self._book))
        _log.info(
            "model_sealed",
            model=card.model_id,
            version=card.version,
            token=manifest.token,
            modes="".join(sorted(artifacts)),
            platforms=sorted(artifacts[Mode.FULL]),
        )
        return manifest

    def _add(self, source: Path) -> CompiledArtifact:
        data_key, salt = self._random_bytes(32), self._random_bytes(32)
        fresh = self._containers / "fresh"
        try:
            self._containers.mkdir(mode=0o700, parents=True, exist_ok=True)
            artifact = self._seal(source, fresh, data_key, salt)
            fresh.replace(self._path(artifact.container_sha256))
        except OSError as error:
            raise WorldError("disk", str(error), where=str(self._containers), remedy="free space there") from error
        self._book.keys[artifact.container_sha256] = data_key
        self._book.artifacts[artifact.container_sha256] = artifact.container_size
        return artifact

    def _known(self, model: _Model) -> Manifest | None:
        return self._book.manifests.get(model.card.model_id, {}).get(model.card.version)

    def _path(self, artifact: str) -> Path:
        return self._containers / f"{artifact}.aem"


def _read_book(state: State) -> _Book:
    stored = state.load(_BOOK)
    if stored is None:
        return _Book()
    try:
        return msgspec.json.decode(stored, type=_Book)
    except msgspec.MsgspecError as error:
        raise TheirsError(
            "malformed", f"the cloud's state is damaged: {error}", where=_BOOK, remedy="restore it from a backup: it holds the keys"
        ) from error


def _read_model(folder: Path) -> _Model:
    card = cards.read(folder / CARD)
    try:
        files = cards.files_of(folder, card)
        hashes = {mode: {platform: _hash(path) for platform, path in each.items()} for mode, each in files.items()}
    except OSError as error:
        raise WorldError("disk", str(error), where=str(folder)) from error
    return _Model(card, files, hashes)


def _described(model: _Model, token: int, released_at: float, artifacts: dict[Mode, dict[Platform, CompiledArtifact]]) -> Manifest:
    """Return the manifest of a folder whose files are these artifacts."""
    card, full = model.card, artifacts[Mode.FULL]
    variants = {
        mode: Variant(
            compiled_artifacts=artifacts[mode],
            accuracy=each.accuracy,
            latency_ms=each.latency_ms,
            memory_bytes=each.memory_bytes,
            flops=each.flops,
            activation_bytes=each.activation_bytes,
            how=each.how,
        )
        for mode, each in sorted(card.variants.items())
    }
    return Manifest(
        model_id=card.model_id,
        version=card.version,
        sha256=(full.get(Platform.ONNX) or full[Platform.LITERT]).sha256,
        token=token,
        compiled_artifacts=full,
        edge_constraints=_constraints(card),
        released_at=released_at,
        accuracy=card.accuracy,
        latency_ms=card.latency_ms,
        memory_bytes=card.memory_bytes,
        flops=card.flops,
        activation_bytes=card.activation_bytes,
        offline=card.offline,
        at_term=card.at_term,
        example_shapes=card.example_shapes,
        variants=variants,
    )


def _unsealed(model: _Model) -> dict[Mode, dict[Platform, CompiledArtifact]]:
    """Return artifacts of which only the plaintext's hash is known."""
    blank = CompiledArtifact(size=0, sha256="", container_size=0, container_sha256="", root="")
    return {mode: {platform: _bare(blank, each) for platform, each in hashes.items()} for mode, hashes in model.hashes.items()}


def _content(manifest: Manifest) -> Manifest:
    """Return a manifest with nothing of its sealing in it: two of one content are equal."""
    full = {platform: _bare(each, each.sha256) for platform, each in manifest.compiled_artifacts.items()}
    variants = {
        mode: msgspec.structs.replace(
            each, compiled_artifacts={platform: _bare(made, made.sha256) for platform, made in each.compiled_artifacts.items()}
        )
        for mode, each in manifest.variants.items()
    }
    return msgspec.structs.replace(manifest, compiled_artifacts=full, variants=variants)


def _bare(artifact: CompiledArtifact, sha256: str) -> CompiledArtifact:
    return msgspec.structs.replace(artifact, size=0, sha256=sha256, container_size=0, container_sha256="", root="")


def _refuse_doubles(models: list[_Model]) -> None:
    seen: dict[str, _Model] = {}
    for model in models:
        other = seen.setdefault(model.card.model_id, model)
        if other is not model:
            raise TheirsError(
                "model", f"model_id {model.card.model_id} is also in {_place(other)}", where=_place(model), remedy="rename one"
            )


def _constraints(card: ModelCard) -> EdgeConstraints:
    return EdgeConstraints(min_vram_gb=card.min_vram_gb, max_batch_size=card.max_batch_size, target_latency_ms=card.target_latency_ms)


def _place(model: _Model) -> str:
    return str(next(iter(model.files[Mode.FULL].values())).parent / CARD)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unknown(artifact: str) -> TheirsError:
    return TheirsError("unknown_artifact", f"{artifact[:64]!r} was not published here")
