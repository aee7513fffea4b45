"""What the loops ask of the world. Each Protocol is implemented by one adapter and, in tests, by one fake.

Adapters raise only `appliance.contract.errors`; anything foreign is translated at the border.
"""

import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.contract.attest import (
    Approval,
    Challenge,
    CountConsent,
    EnrolAsk,
    EnrolChallenge,
    Enrolled,
    EnrolProof,
    Evidence,
    Grant,
    Lease,
)
from appliance.contract.deferral import Accepted, Deferred, Dropped, Fate, Item, Parcel, Stats, Stored, Taken
from appliance.contract.inference import Answer, Array, Promise, Request, Signature, Tags
from appliance.contract.models import CompiledArtifact, Manifest, Release
from appliance.contract.vitals import BoardReading
from appliance.contract.vocabulary import Platform


class Clock(Protocol):
    """Time, so that a test can own it."""

    def monotonic(self) -> float:
        """Seconds that only grow and go on in suspend (CLOCK_BOOTTIME); the zero is arbitrary."""

    def wall(self) -> float:
        """Seconds since the epoch; may jump."""

    async def sleep_until(self, deadline: float) -> None:
        """Return when `monotonic()` has reached the deadline."""


class Board(Protocol):
    """The sensors of the machine."""

    def read(self) -> BoardReading:
        """Read all sensors now (well under 10 ms). Raises: WorldError if not even memory can be read."""


@dataclass(frozen=True, slots=True)
class Inbound:
    """One received message."""

    topic: str
    payload: bytes


class Link(Protocol):
    """A connection to the region's broker that heals itself; everything here returns within its timeout, connected or not."""

    @property
    def connected(self) -> bool:
        """Whether the broker's session is up now."""

    @property
    def rotations(self) -> int:
        """How many times the connection moved to a renewed SVID since start."""

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        """Publish. Raises: WorldError (`not_connected`, `timeout`), TheirsError (`not_authorised`: the broker refused)."""

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        """Send a request (`qos` 0 for chunks, where the answer is the acknowledgement) and return the answer's bytes.

        Raises: WorldError (`not_connected`, `timeout`), TheirsError with the peer's reason if it refused.
        """

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        """Subscribe; the message is acknowledged to the broker after `handler` returned. Call before `run`."""

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        """Answer requests on topics that match; an ApplianceError becomes a `Refused`. Call before `run`."""

    async def run(self) -> None:
        """Connect, reconnect with backoff, rotate with the SVID; ends only by cancellation."""


class Identity(Protocol):
    """The workload's SPIFFE identity; keys live in memory only."""

    @property
    def spiffe_id(self) -> str:
        """This workload's own SPIFFE ID."""

    @property
    def not_after(self) -> float:
        """When the present SVID expires, seconds since the epoch."""

    def client_context(self, peer: str) -> ssl.SSLContext:
        """A TLS 1.3 context with the present SVID that accepts only a server whose SPIFFE ID is `peer`.

        Raises: WorldError (`svid_expired`, `workload_api`).
        """

    async def renewed(self) -> None:
        """Return when a newer SVID than at the time of the call has arrived."""


@dataclass(frozen=True, slots=True)
class SealedKey:
    """What a device keeps on disk of its enrolment: nothing here is secret, losing it means enrolling again."""

    enrolled: Enrolled
    private: bytes
    leased_private: bytes = b""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a TPM shows now: PCRs (bank sha256), clock (powered-on milliseconds) and reset count."""

    pcr_values: Mapping[int, bytes]
    clock_ms: int
    reset_count: int


class Tpm(Protocol):
    """The device's TPM. Each call takes the TPM for itself, flushes what it loaded, and raises WorldError (`tpm`) on failure."""

    async def enrol_ask(self) -> EnrolAsk:
        """Read the EK certificate and the public parts of EK, AK and SRK."""

    async def prove(self, challenge: EnrolChallenge) -> EnrolProof:
        """Activate the credential and certify the SRK. Raises: TheirsError (`credential`) if it was not made for this TPM."""

    async def adopt(self, enrolled: Enrolled) -> SealedKey:
        """Import the sealed key. Raises: TheirsError (`srk_name`, `import`)."""

    async def evidence(self, sealed: SealedKey, challenge: Challenge) -> Evidence:
        """Start a salted policy session, quote over the nonce; the session waits for `unseal` (a later call replaces it)."""

    async def unseal(self, sealed: SealedKey, approval: Approval) -> bytes:
        """Satisfy the policy with the approval and return the 32-byte KEK.

        Raises: TheirsError (`policy`, `expired`, `signature`, `pcr`), with an operator's words in `what`.
        """

    async def look(self, pcrs: Sequence[int]) -> Sight:
        """Read PCRs, clock and reset count."""

    async def unseal_leased(self, sealed: SealedKey, grant: Grant, lease: Lease) -> bytes:
        """Satisfy the policy with a lease of the grant and return the 32-byte leased KEK; needs nobody but the TPM.

        Raises: TheirsError (`policy`, `signature`, `pcr`, `term`, `restarts`, `generation`, `srk_name`, `import`, `malformed`).
        """

    async def count_nonce(self, sealed: SealedKey, *, anew: bool) -> bytes:
        """Make the generation counter if there is none; if it never counted, or `anew`, open a session that waits for `count`.

        Returns the session's nonce, or nothing if there is no need. Raises: TheirsError (`malformed`), WorldError (`tpm`, `owner`).
        """

    async def count(self, sealed: SealedKey, consent: CountConsent) -> None:
        """Let the counter count once, in the session that waits. Raises: TheirsError (`expired`, `signature`, `malformed`)."""

    async def self_test(self) -> None:
        """Quote, and seal and unseal an object of the test's own. Raises: WorldError (`tpm`, `self_test`) that says what failed."""


class Weights(Protocol):
    """The container format of weights at rest; plaintext goes to anonymous memory only."""

    def open(self, container: str, artifact: CompiledArtifact, data_key: bytes) -> int:
        """Decrypt a container file (path) into a sealed memfd, check root and plaintext hash, return the descriptor.

        Raises: TheirsError (`tampered`, `wrong_key`), WorldError (`disk`, `memory`).
        """


class Depot(Protocol):
    """Ciphertext artifacts and small state files on disk; every change is atomic and survives a power cut."""

    def missing(self, artifact: CompiledArtifact) -> list[int]:
        """Indices of the chunks that are not yet on disk; empty when the container is complete and its hash agrees."""

    def put(self, artifact: CompiledArtifact, index: int, chunk: bytes) -> None:
        """Store a chunk. Raises: TheirsError (`chunk`) on a wrong size, WorldError (`disk`)."""

    def complete(self, artifact: CompiledArtifact) -> str:
        """Check the whole hash and return the container's path. Raises: TheirsError (`tampered`) and forgets the chunks."""

    def read(self, artifact: str, index: int) -> bytes:
        """Read one chunk of a complete artifact. Raises: TheirsError (`unknown_artifact`, `chunk`), WorldError (`disk`)."""

    def drop(self, artifact: str) -> None:
        """Remove an artifact by its container hash; not an error if it is absent."""

    def save(self, name: str, payload: bytes) -> None:
        """Store a small state file. Raises: WorldError (`disk`)."""

    def load(self, name: str) -> bytes | None:
        """Read a small state file; None if there is none."""

    def names(self, prefix: str) -> list[str]:
        """The names of all small state files that begin so, sorted."""

    def forget(self, name: str) -> None:
        """Remove a small state file; not an error if it is absent."""


class Metadata(Protocol):
    """Signed metadata with rollback protection (TUF); its trusted state survives restarts."""

    def verify(self, release: Release) -> list[Manifest]:
        """Check signatures, versions, expiry and hashes; return all manifests on offer.

        Raises: TheirsError (`unsigned`, `rollback`, `expired`, `hash`, `malformed`); nothing changed then.
        """


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that a worker holds: `key` is the name by which `run` and `unload` mean it."""

    key: str
    signature: Signature


class Share(Protocol):
    """Memory that a caller gave by descriptor, mapped here and known to every child."""

    @property
    def memory(self) -> memoryview:
        """The shared bytes, writable; arrays made over it travel to a child without a copy."""

    def close(self) -> None:
        """Forget it here and in the children; arrays over it must be gone. Idempotent."""


class Engine(Protocol):
    """Child processes that run models; a crash costs a process, not the daemon."""

    def share(self, fd: int, size: int) -> Share:
        """Map a memfd of a caller; the descriptor stays the caller's.

        Raises: TheirsError (`shared_memory`) if it is not sealed against shrinking (else its owner could fault this process), or shorter.
        """

    async def load(self, key: str, platform: Platform, weights: Callable[[], int]) -> LoadedModel:
        """Load a model from the descriptor that `weights()` returns; it is called again when a child is replaced.

        The engine closes each descriptor. Raises: TheirsError (`model`: the file is not loadable), WorldError (`worker_lost`).
        """

    async def run(self, key: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run one batch; empty `outputs` means all. Raises: WorldError (`worker_lost`), TheirsError (`model`)."""

    async def unload(self, key: str) -> None:
        """Forget a model and return its memory."""


class Upstream(Protocol):
    """The way to the same models in the cloud, while it is open."""

    def allows(self, tags: Tags) -> bool:
        """Whether a request with these tags may go there now: the route is up, and nothing forbids it."""

    async def infer(self, request: Request, within_s: float) -> Answer:
        """Answer by the full model in the cloud; returns within the time, always.

        Raises: WorldError (`partitioned`, `deadline`, `backlog_full`), TheirsError with the cloud's reason.
        """


class Notifier(Protocol):
    """The service manager (sd_notify); silent where there is none."""

    def ready(self) -> None:
        """READY=1."""

    def status(self, text: str) -> None:
        """STATUS=text, one line for `systemctl status`."""

    def watchdog(self) -> None:
        """WATCHDOG=1."""

    def stopping(self) -> None:
        """STOPPING=1."""

    @property
    def watchdog_s(self) -> float | None:
        """How often `watchdog` must be called, already halved; None if no watchdog is set."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a caller may know of a served model. `versions` has the newest first; `max_batch` is in rows of axis 0 and at least 1."""

    name: str
    versions: tuple[str, ...]
    signature: Signature
    ready: bool
    max_batch: int


class Desk(Protocol):
    """What the ingress asks of the serving loop; only `infer` may wait."""

    def live(self) -> bool:
        """Whether the loops of this process move."""

    def ready(self) -> bool:
        """Whether a request that comes now would be served."""

    def why_not_ready(self) -> str:
        """One sentence for a person; empty when ready."""

    def models(self) -> Sequence[str]:
        """Names of all models that are known here, ready or not."""

    def describe(self, model: str, version: str) -> ModelCard:
        """Describe a model; an empty version means the served one. Raises: TheirsError (`unknown_model`)."""

    async def load(self, model: str) -> None:
        """Serve a model that is known here but was unloaded; return when it serves.

        Raises: TheirsError (`unknown_model`: it was never released to this device, `model`), WorldError (`worker_lost`, `memory`).
        """

    async def unload(self, model: str) -> None:
        """Stop serving a model until `load` or the next release; requests that wait are answered. Raises: TheirsError (`unknown_model`)."""

    async def infer(self, request: Request) -> Answer | Promise:
        """Answer one request, or promise to (only where its tags accept that); its arrays may be read-only and unaligned.

        Cancellation means that the caller is gone.

        Raises: TheirsError (`unknown_model`, or a fault that `contract.admission.check` found),
        WorldError (`backlog_full`, `deadline`, `worker_lost`, `not_ready`, `draining`), with `retry_after_s` where it is known.
        """


class Counter(Protocol):
    """What the ingress asks about promises."""

    async def fetch(self, promise: str) -> Answer | Promise:
        """The promised answer, or the promise again while it is not there yet.

        Raises: TheirsError (`unknown_promise`), WorldError (`dropped`: it will never be answered, and why).
        """

    async def revive(self, promise: str) -> None:
        """An operator's retry, now. Raises: TheirsError (`unknown_promise`)."""

    async def drop(self, promise: str) -> None:
        """An operator's drop. Raises: TheirsError (`unknown_promise`)."""


class Outbox(Protocol):
    """The durable queue at its sender. A call returns after its commit; all of them raise WorldError (`disk`) and then changed nothing.

    Nothing that was accepted is lost unless a `Dropped` says so: log and count each one.
    """

    @property
    def incarnation(self) -> str:
        """The name of this store's `seq` numbers; another one after its disk was lost."""

    def now_s(self) -> float:
        """Queue time now."""

    async def put(self, parcel: Parcel) -> Stored:
        """Keep a parcel until its receiver has committed it; the same `idem` again is a duplicate and changes nothing.

        Raises: TheirsError (`class`, `idem`, `priority`, `oversized`), WorldError (`queue_full`, `too_large`, `disk_full`, `disk`).
        """

    async def take(self, kinds: Collection[str] = ..., *, items: int = 64, size: int = 1_048_576, lease_s: float = 60.0) -> Taken:
        """Lease what is due now, in order, up to so many items and stored bytes (but at least one); the attempt is counted on disk first."""

    async def acknowledge(self, results: Mapping[int, bytes | None]) -> int:
        """Delete these `seq` and remember their keys, with the receiver's answers; returns how many were still here."""

    async def retry(self, seq: int, attempts: int, not_before_s: float) -> bool:
        """End a lease: not before this queue time again, and so many attempts count; False if the item is gone."""

    async def release(self, seqs: Iterable[int]) -> None:
        """End leases as if the items had not been taken."""

    async def bury(self, seq: int, reason: str) -> tuple[Dropped, ...]:
        """Make an item a dead letter; the later ones of its key may pass. The oldest dead letters go if there are too many."""

    async def expire(self) -> tuple[Dropped, ...]:
        """Delete what is too old; call it now and then while nothing is taken."""

    async def listing(self, *, dead: bool = False, kind: str = "", after: int = 0, limit: int = 100) -> tuple[Item, ...]:
        """Waiting items, or dead letters, with a `seq` above `after`."""

    async def fate(self, idem: str) -> Fate | None:
        """What is known of a key; None: nothing, or no longer."""

    async def revive(self, idem: str) -> bool:
        """An operator's retry: a dead letter waits again, a waiting item is due now; False if it is not here."""

    async def drop(self, idem: str) -> tuple[Dropped, ...]:
        """An operator's drop of an item or dead letter."""

    async def stats(self) -> Stats:
        """Sizes and counts."""


class Inbox(Protocol):
    """The durable queue at its receiver: each key of each sender takes effect once. All calls raise WorldError (`disk`)."""

    async def accept(self, sender: str, message: Deferred, forward: Parcel | None = None) -> bool:
        """Commit an item, and what is passed on because of it, in one transaction; False if it was accepted before. Then send the `Receipt`.

        `sender` is the name that the broker proved. Raises: as `Outbox.put` for `forward`, and nothing was accepted.
        """

    async def seen(self, sender: str, idem: str) -> bool:
        """Whether this key of this sender was accepted."""

    async def pending(self, *, after: int = 0, limit: int = 64) -> tuple[Accepted, ...]:
        """Accepted items whose effect is still to come, in the order of arrival. Raises: WorldError (`damaged`)."""

    async def applied(self, upto: int) -> None:
        """Forget the payloads up to this number; the keys stay."""
