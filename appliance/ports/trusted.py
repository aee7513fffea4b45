"""What trust needs: the TPM, sealed weights, files at rest, signed metadata."""

from collections.abc import Mapping, Sequence
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
from appliance.contract.models import CompiledArtifact, Manifest, Release


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
        """Decrypt a container file (path) into a sealed memfd, check that it is the signed model, return the descriptor.

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
