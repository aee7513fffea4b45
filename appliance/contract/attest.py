"""Enrolment and attestation: how a region learns to trust one TPM, and how it opens that device's key.

Byte fields are TPM 2.0 structures as marshalled by the TPM (Part 2), so that both sides check exactly what was signed:
`*_public` is a TPMT_PUBLIC, `*_attest` a TPMS_ATTEST, `*_signature` a TPMT_SIGNATURE. The order of the exchange:
EnrolAsk, EnrolChallenge, EnrolProof, Enrolled; then at each proof ChallengeAsk, Challenge, Evidence, Approval.
"""

import hashlib

import msgspec

from appliance.contract.codec import Message

COUNTER_INDEX = 0x0180_0100
"""The NV index of a TPM's generation counter: in the range that an owner may use (TCG Registry of Reserved TPM 2.0 Handles, 2.2.2)."""


class SealedObject(msgspec.Struct, frozen=True, kw_only=True):
    """A sealed key on its way into one TPM: contents of TPM2B_PUBLIC, TPM2B_PRIVATE, TPM2B_ENCRYPTED_SECRET, and the policyRef that rules it."""

    public: bytes
    duplicate: bytes
    seed: bytes
    policy_ref: bytes


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A region's consent to open the leased key without it, while these PCRs hold, for a time and a number of restarts.

    Attributes:
        label: which approved state this is, for a person, such as "slot B".
        clock_before_ms: the TPM's clock (powered-on milliseconds) must be below this.
        reset_count_max: the TPM's reset count must not be above this.
        approved: the policy digest of exactly these conditions and Unseal; `signature` is by the region's key.
    """

    label: str
    pcr_values: dict[int, bytes]
    clock_before_ms: int
    reset_count_max: int
    approved: bytes
    signature: bytes


class Grant(Message, frozen=True, tag="grant"):
    """All leases of one device as of one proof; the device keeps it on disk (nothing here is secret) and it replaces the one before.

    Attributes:
        epoch: of the key that the leases open.
        generation: the value of the TPM's counter at which the delegation holds; counting on ends every lease before.
        delegation, delegation_signature: root's consent to `region_public` at this generation.
        term_s: how long the leases hold from the proof on, in seconds. `restarts`: how many restarts they allow.
    """

    epoch: int
    generation: int
    region_public: bytes
    delegation: bytes
    delegation_signature: bytes
    term_s: float
    restarts: int
    leases: list[Lease]


class EnrolAsk(Message, frozen=True, tag="enrol_ask"):
    """A device shows its endorsement certificate (DER, leaf first), and its endorsement, attestation and storage keys."""

    ek_certificates: list[bytes]
    ek_public: bytes
    ak_public: bytes
    srk_public: bytes


class EnrolChallenge(Message, frozen=True, tag="enrol_challenge"):
    """A secret that only the TPM with this EK and this AK can recover, and a nonce for certifying the storage key."""

    ticket: str
    credential: bytes
    secret: bytes
    nonce: bytes


class EnrolProof(Message, frozen=True, tag="enrol_proof"):
    """The recovered secret, and the storage key certified by the attestation key over the nonce.

    `escrow`: the TPM's authorisations, encrypted to the region's escrow key by `appliance provision`; empty if there are none.
    """

    ticket: str
    secret: bytes
    certify_attest: bytes
    certify_signature: bytes
    escrow: bytes = b""


class Enrolled(Message, frozen=True, tag="enrolled"):
    """The device's key-encryption key, encrypted to its storage key for TPM2_Import, and the policy that guards it.

    Attributes:
        sealed_public, duplicate, seed: TPM2B_PUBLIC, TPM2B_PRIVATE and TPM2B_ENCRYPTED_SECRET contents.
        srk_name: the storage key's name; a device that computes another one must stop (a swapped key on the bus).
        policy_ref: binds every approval to this device and this key epoch.
        root_public, region_public: the signing keys (P-256) whose names the policy holds.
        delegation: the approved policy digest that root signed for this region, with its signature (TPMT_SIGNATURE).
        leased: a second key, which leases open; the first one opens only with a consent for one session, never offline.
        counter_ref: the policyRef under which root lets this TPM's generation counter count.
    """

    epoch: int
    sealed_public: bytes
    duplicate: bytes
    seed: bytes
    srk_name: bytes
    policy_ref: bytes
    root_public: bytes
    region_public: bytes
    delegation: bytes
    delegation_signature: bytes
    leased: SealedObject | None = None
    counter_ref: bytes = b""


class ChallengeAsk(Message, frozen=True, tag="challenge_ask"):
    """An enrolled device asks for a nonce to quote over. `counter_nonce`: of a policy session that waits to count on; empty if none does."""

    counter_nonce: bytes = b""


class CountConsent(msgspec.Struct, frozen=True, kw_only=True):
    """Root's consent to one increment of the generation counter, in one policy session (TPM2_PolicySigned)."""

    expiration_s: int
    signature: bytes


class Challenge(Message, frozen=True, tag="challenge"):
    """A single-use nonce (valid 60 s) and the PCRs (bank sha256) that the quote must cover; `count` answers a `counter_nonce`."""

    nonce: bytes
    pcrs: list[int]
    count: CountConsent | None = None


class Evidence(Message, frozen=True, tag="evidence"):
    """A quote over `quoted_nonce`, the PCR values it stands for, and the nonce of the policy session that waits for approval.

    `counter_attest`, `counter_signature`: the generation counter, certified over the same nonce (TPM2_NV_Certify); empty if there is none.
    """

    nonce: bytes
    quote_attest: bytes
    quote_signature: bytes
    pcr_values: dict[int, bytes]
    session_nonce: bytes
    counter_attest: bytes = b""
    counter_signature: bytes = b""


class Approval(Message, frozen=True, tag="approval"):
    """The region's consent to one unsealing in one policy session.

    Attributes:
        expiration_s: seconds after the session's start at which the consent ends (TPM2_PolicySigned).
        session_signature: by the region's key over session nonce and expiration (TPMT_SIGNATURE).
        approved: the policy digest that the session must have reached; `approved_signature` is by the region's key.
        region_public, delegation, delegation_signature: as of now, if the region's key was rotated since the enrolment; else empty.
        grant: the leases from now on; None: nothing may be opened offline.
    """

    expiration_s: int
    session_signature: bytes
    approved: bytes
    approved_signature: bytes
    region_public: bytes = b""
    delegation: bytes = b""
    delegation_signature: bytes = b""
    grant: Grant | None = None


def quoted_nonce(nonce: bytes, session_nonce: bytes) -> bytes:
    """What a quote is over: SHA-256 of the region's nonce (32 bytes) and the session's, so nobody can slip in another session."""
    return hashlib.sha256(nonce + session_nonce).digest()
