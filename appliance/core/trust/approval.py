"""Who may open a device's key: the sealed key names root, root delegates to a region, the region approves.

1. The sealed key's policy is PolicyAuthorize(root, reference) and never changes; `reference` binds every signature to one device and one epoch.
   A device has two keys with two references: one opens only by consents for one session, the other by leases. None opens by the other's.
2. Root signs a delegation: the policy PolicyAuthorize(region, reference), for leases with PolicyNV(counter == generation) after it.
   Another region, another key of this one, another generation is another delegation. The sealed key stays.
3. The region signs approvals of two kinds. A *session*, for one policy session of one TPM within 60 s:
   PolicyPCR(values) ; PolicySigned(region, reference, nonce of the session) ; PolicyCommandCode(Unseal).
4. A *lease*, for any session until it ends:
   PolicyPCR(values) ; PolicyCounterTimer(clock < D) ; PolicyCounterTimer(resetCount <= R) ; PolicyCommandCode(Unseal).
5. The generation counter counts only by root: PolicySigned(root, counter reference, nonce of the session) ; PolicyCommandCode(NV_Increment).
   A device's own root can remove and redefine it, but then it begins above its last value (TPM 2.0 Part 3, 31.3.1).
6. Signatures are ECDSA P-256 with SHA-256 over policy digest and reference (TPM 2.0 Part 3, 23.16), deterministic (RFC 6979): no randomness is needed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.attest import COUNTER_INDEX, Approval, CountConsent, Lease
from appliance.core.trust.policy import Policy, signed_consent
from appliance.core.trust.tpm_structures import name_counter, pack_signature, pack_verifier, parse_public
from appliance.core.trust.tpm_wire import Command

SESSION_S = 60
"""How long a session's consent holds, from the session's start, in seconds."""

_DOMAIN = b"appliance-lease-v1"
_LEASED_DOMAIN = b"appliance-leased-key-v1"
_COUNTER_DOMAIN = b"appliance-counter-v1"


@dataclass(frozen=True, slots=True)
class Delegation:
    """A region's policy digest and root's signature over it (TPMT_SIGNATURE)."""

    approved: bytes
    signature: bytes


def policy_reference(ek_name: bytes, epoch: int) -> bytes:
    """The policyRef of one device and one epoch of the key that opens only by consents for one session."""
    return hashlib.sha256(_DOMAIN + ek_name + epoch.to_bytes(8, "big")).digest()


def leased_reference(ek_name: bytes, epoch: int) -> bytes:
    """The policyRef of one device and one epoch of the key that opens by leases."""
    return hashlib.sha256(_LEASED_DOMAIN + ek_name + epoch.to_bytes(8, "big")).digest()


def counter_reference(ek_name: bytes) -> bytes:
    """The policyRef of one device's generation counter; it outlives epochs."""
    return hashlib.sha256(_COUNTER_DOMAIN + ek_name).digest()


def counter_policy(root_public: bytes, reference: bytes) -> bytes:
    """The authPolicy of a generation counter."""
    return Policy().signed(_key_name(root_public), reference).command_code(Command.NV_INCREMENT).digest


def counter_name(root_public: bytes, reference: bytes) -> bytes:
    """The Name of a generation counter that counted at least once."""
    return name_counter(COUNTER_INDEX, counter_policy(root_public, reference))


def guarding_policy(root_public: bytes, reference: bytes) -> bytes:
    """The authPolicy of a sealed key. `root_public` is a TPMT_PUBLIC."""
    return Policy().authorize(_key_name(root_public), reference).digest


def delegate(root: ec.EllipticCurvePrivateKey, region_public: bytes, reference: bytes) -> Delegation:
    """Let the region whose key is `region_public` (TPMT_PUBLIC) approve openings of the key behind `reference`."""
    policy = Policy().authorize(_key_name(region_public), reference)
    return Delegation(policy.digest, sign_policy(root, policy, reference))


def delegate_leases(
    root: ec.EllipticCurvePrivateKey, region_public: bytes, reference: bytes, *, counter: bytes, generation: int
) -> Delegation:
    """The same for leases, as long as the counter with this Name has the value `generation`."""
    policy = Policy().authorize(_key_name(region_public), reference).counter_is(counter, generation)
    return Delegation(policy.digest, sign_policy(root, policy, reference))


def consent_count(root: ec.EllipticCurvePrivateKey, reference: bytes, session_nonce: bytes) -> CountConsent:
    """Let the generation counter count once, in the session with this nonce, within 60 s. `reference` is the counter's."""
    return CountConsent(expiration_s=SESSION_S, signature=_sign(root, signed_consent(session_nonce, SESSION_S, reference)))


def approve_session(
    region: ec.EllipticCurvePrivateKey,
    reference: bytes,
    values: Mapping[int, bytes],
    session_nonce: bytes,
    *,
    expiration_s: int = SESSION_S,
) -> Approval:
    """Approve one unsealing, in the session with this nonce, while the PCRs have these values, until `expiration_s` after its start."""
    region_public = pack_verifier(region.public_key())
    policy = Policy().pcr(values).signed(_key_name(region_public), reference).command_code(Command.UNSEAL)
    return Approval(
        expiration_s=expiration_s,
        session_signature=_sign(region, signed_consent(session_nonce, expiration_s, reference)),
        approved=policy.digest,
        approved_signature=sign_policy(region, policy, reference),
    )


def approve_lease(
    region: ec.EllipticCurvePrivateKey,
    reference: bytes,
    label: str,
    values: Mapping[int, bytes],
    *,
    clock_before_ms: int,
    reset_count_max: int,
) -> Lease:
    """Approve unsealing in any session while the PCRs have these values, the clock is below and the reset count not above these."""
    policy = lease_policy(values, clock_before_ms, reset_count_max)
    return Lease(
        label=label,
        pcr_values=dict(values),
        clock_before_ms=clock_before_ms,
        reset_count_max=reset_count_max,
        approved=policy.digest,
        signature=sign_policy(region, policy, reference),
    )


def lease_policy(values: Mapping[int, bytes], clock_before_ms: int, reset_count_max: int) -> Policy:
    """What a lease approves."""
    timed = Policy().pcr(values).clock_below(clock_before_ms).resets_at_most(reset_count_max)
    return timed.command_code(Command.UNSEAL)


def sign_policy(key: ec.EllipticCurvePrivateKey, policy: Policy, reference: bytes) -> bytes:
    """Approve a policy for PolicyAuthorize (TPMT_SIGNATURE)."""
    return _sign(key, policy.digest + reference)


def _sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    return pack_signature(key.sign(content, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))


def _key_name(public: bytes) -> bytes:
    return parse_public(public, "signing key").name
