"""Models on their way from the cloud to a device: signed manifests, encrypted artifacts, chunks, keys."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import msgspec

from appliance.contract.codec import Message
from appliance.contract.vocabulary import Mode, Platform

CHUNK_BYTES = 262_144
"""256 KiB: the size at which a window of 8 fills 1 GbE while the broker stays small (docs/decisions/0005)."""


class EdgeConstraints(msgspec.Struct, frozen=True, kw_only=True):
    """What a device must offer, and what it promises, for a model. `target_latency_ms` is for one request at batch 1."""

    min_vram_gb: float
    max_batch_size: int
    target_latency_ms: float


class CompiledArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """One platform's model file and the encrypted container that carries it.

    Attributes:
        size, sha256: of the plaintext model file.
        container_size, container_sha256: of the encrypted container as it is pulled and stored; the hash names the artifact.
        root: SHA-256 over the container's header and all chunk tags (hex), see docs/rooms/trust.md.
    """

    size: int
    sha256: str
    container_size: int
    container_sha256: str
    root: str


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A cheaper form of a model, served in one of the modes B to D, as `appliancectl model variants build` measured it.

    Attributes:
        compiled_artifacts: as of the manifest; for mode D the feature extractor, whose outputs are the inputs of the head in the cloud.
        accuracy: share (0 to 1) of the builder's samples for which the answer was right; None: not measured.
        latency_ms: one sample, one thread, on the builder's machine; only its ratio to the full model's means something elsewhere.
        memory_bytes: by how much loading it grew a process on the builder's machine.
        flops, activation_bytes: operations and moved bytes of one sample of `example_shapes`: the roofline's first guess on a new board.
        how: what was done to the full model, in words.
    """

    compiled_artifacts: dict[Platform, CompiledArtifact]
    accuracy: float | None = None
    latency_ms: float | None = None
    memory_bytes: int | None = None
    flops: float | None = None
    activation_bytes: float | None = None
    how: str = ""


class Manifest(Message, frozen=True, tag="manifest"):
    """One release of one model; a signed target of the metadata. `token` only ever grows: an older one is refused.

    `offline`: "lease" opens under a lease without the region, "never" only with a fresh consent of it. `at_term`: what happens to a loaded
    model when the device may hold its key no longer: "keep" serves on what is open, "stop" unloads it (docs/rooms/trust.md).

    `accuracy` to `activation_bytes` are those of the full model (see `Variant`). `example_shapes` has for each input the
    shape of one typical sample without the batch axis: what the device warms up and profiles with.
    """

    limit: ClassVar[int] = 65_536
    model_id: str
    version: str
    sha256: str
    token: int
    compiled_artifacts: dict[Platform, CompiledArtifact]
    edge_constraints: EdgeConstraints
    released_at: float
    accuracy: float | None = None
    latency_ms: float | None = None
    memory_bytes: int | None = None
    flops: float | None = None
    activation_bytes: float | None = None
    example_shapes: dict[str, list[int]] = msgspec.field(default_factory=dict)
    variants: dict[Mode, Variant] = msgspec.field(default_factory=dict)
    offline: Literal["lease", "never"] = "lease"
    at_term: Literal["keep", "stop"] = "keep"


def artifacts_of(manifest: Manifest) -> Iterator[CompiledArtifact]:
    """Every artifact of a release, in whatever mode and for whatever platform."""
    yield from manifest.compiled_artifacts.values()
    for variant in manifest.variants.values():
        yield from variant.compiled_artifacts.values()


class Release(Message, frozen=True, tag="release"):
    """Everything on offer: the files of a TUF repository (`metadata/1.root.json`, `targets/NAME.json`, …) by path."""

    limit: ClassVar[int] = 1_048_576
    files: dict[str, bytes]


class ChunkAsk(Message, frozen=True, tag="chunk_ask"):
    """Ask for chunk `index` (from 0, of `CHUNK_BYTES`; the last may be shorter) of the artifact with this container hash."""

    limit: ClassVar[int] = 512
    artifact: str
    index: int


class KeyAsk(Message, frozen=True, tag="key_ask"):
    """A device asks for the data key of an artifact, wrapped by the key-encryption key that only its TPM opens."""

    limit: ClassVar[int] = 512
    artifact: str


class WrappedKey(Message, frozen=True, tag="wrapped_key"):
    """AES-256-GCM(KEK, nonce, data key); additional data is the artifact's container hash. `epoch` and `leased` name the KEK."""

    limit: ClassVar[int] = 1_024
    artifact: str
    epoch: int
    nonce: bytes
    wrapped: bytes
    leased: bool = False


class RegionKeyAsk(Message, frozen=True, tag="region_key_ask"):
    """A region asks the cloud for an artifact's data key, encrypted to this X25519 public key (32 bytes)."""

    limit: ClassVar[int] = 512
    artifact: str
    public: bytes


class RegionKey(Message, frozen=True, tag="region_key"):
    """The data key under X25519 + HKDF-SHA256 + AES-256-GCM; `ephemeral` is the sender's public key."""

    limit: ClassVar[int] = 1_024
    artifact: str
    ephemeral: bytes
    wrapped: bytes
