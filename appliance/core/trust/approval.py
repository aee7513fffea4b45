"""Who may open a device's key: the sealed key names root, root delegates to a region, the region approves.

1. The sealed key's policy is PolicyAuthorize(root, reference) and never changes; `reference` binds every signature to one device and one epoch.
2. Root signs a delegation: the policy PolicyAuthorize(region, reference). Another region, or another key of this one, is another delegation.
3. The region signs approvals. One kind exists: *session*, for one policy session of one TPM within 60 s:
   PolicyPCR(values) ; PolicySigned(region, reference, nonce of the session) ; PolicyCommandCode(Unseal).
4. A further kind (a lease) is one more function here that builds its `Policy` and signs it with `sign_policy`; a generation counter is one more
   assertion in `delegate`. Neither touches the sealed key.
5. Signatures are ECDSA P-256 with SHA-256 over policy digest and reference (TPM 2.0 Part 3, 23.16), deterministic (RFC 6979): no randomness is needed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.attest import Approval
from appliance.core.trust.policy import Policy, signed_consent
from appliance.core.trust.tpm_structures import pack_signature, pack_verifier, parse_public
from appliance.core.trust.tpm_wire import Command

SESSION_S = 60
"""How long a session's consent holds, from the session's start, in seconds."""

_DOMAIN = b"appliance-lease-v1"


@dataclass(frozen=True, slots=True)
class Delegation:
    """A region's policy digest and root's signature over it (TPMT_SIGNATURE)."""

    approved: bytes
    signature: bytes


def policy_reference(ek_name: bytes, epoch: int) -> bytes:
    """The policyRef of one device and one epoch of its key."""
    return hashlib.sha256(_DOMAIN + ek_name + epoch.to_bytes(8, "big")).digest()


def guarding_policy(root_public: bytes, reference: bytes) -> bytes:
    """The authPolicy of a sealed key. `root_public` is a TPMT_PUBLIC."""
    return Policy().authorize(_key_name(root_public), reference).digest


def delegate(root: ec.EllipticCurvePrivateKey, region_public: bytes, reference: bytes) -> Delegation:
    """Let the region whose key is `region_public` (TPMT_PUBLIC) approve openings of the key behind `reference`."""
    policy = Policy().authorize(_key_name(region_public), reference)
    return Delegation(policy.digest, sign_policy(root, policy, reference))


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


def sign_policy(key: ec.EllipticCurvePrivateKey, policy: Policy, reference: bytes) -> bytes:
    """Approve a policy for PolicyAuthorize (TPMT_SIGNATURE)."""
    return _sign(key, policy.digest + reference)


def _sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    return pack_signature(key.sign(content, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))


def _key_name(public: bytes) -> bytes:
    return parse_public(public, "signing key").name
