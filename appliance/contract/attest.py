"""Enrolment and attestation: how a region learns to trust one TPM, and how it opens that device's key.

Byte fields are TPM 2.0 structures as marshalled by the TPM (Part 2), so that both sides check exactly what was signed:
`*_public` is a TPMT_PUBLIC, `*_attest` a TPMS_ATTEST, `*_signature` a TPMT_SIGNATURE. The order of the exchange:
EnrolAsk, EnrolChallenge, EnrolProof, Enrolled; then at each opening ChallengeAsk, Challenge, Evidence, Approval.
"""

import hashlib

from appliance.contract.codec import Message


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
    """The recovered secret, and the storage key certified by the attestation key over the nonce."""

    ticket: str
    secret: bytes
    certify_attest: bytes
    certify_signature: bytes


class Enrolled(Message, frozen=True, tag="enrolled"):
    """The device's key-encryption key, encrypted to its storage key for TPM2_Import, and the policy that guards it.

    Attributes:
        sealed_public, duplicate, seed: TPM2B_PUBLIC, TPM2B_PRIVATE and TPM2B_ENCRYPTED_SECRET contents.
        srk_name: the storage key's name; a device that computes another one must stop (a swapped key on the bus).
        policy_ref: binds every approval to this device and this key epoch.
        root_public, region_public: the signing keys (P-256) whose names the policy holds.
        delegation: the approved policy digest that root signed for this region, with its signature (TPMT_SIGNATURE).
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


class ChallengeAsk(Message, frozen=True, tag="challenge_ask"):
    """An enrolled device asks for a nonce to quote over."""


class Challenge(Message, frozen=True, tag="challenge"):
    """A single-use nonce (valid 60 s) and the PCRs (bank sha256) that the quote must cover."""

    nonce: bytes
    pcrs: list[int]


class Evidence(Message, frozen=True, tag="evidence"):
    """A quote over `quoted_nonce`, the PCR values it stands for, and the nonce of the policy session that waits for approval."""

    nonce: bytes
    quote_attest: bytes
    quote_signature: bytes
    pcr_values: dict[int, bytes]
    session_nonce: bytes


class Approval(Message, frozen=True, tag="approval"):
    """The region's consent to one unsealing in one policy session.

    Attributes:
        expiration_s: seconds after the session's start at which the consent ends (TPM2_PolicySigned).
        session_signature: by the region's key over session nonce and expiration (TPMT_SIGNATURE).
        approved: the policy digest that the session must have reached; `approved_signature` is by the region's key.
    """

    expiration_s: int
    session_signature: bytes
    approved: bytes
    approved_signature: bytes


def quoted_nonce(nonce: bytes, session_nonce: bytes) -> bytes:
    """What a quote is over: SHA-256 of the region's nonce (32 bytes) and the session's, so nobody can slip in another session."""
    return hashlib.sha256(nonce + session_nonce).digest()
