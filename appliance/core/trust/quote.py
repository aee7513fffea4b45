"""What a TPM states about itself, and whether to believe it.

1. An attestation key signs only what its TPM made (restricted) and never left it (fixedTPM, fixedParent, made inside): Part 1, 25.
2. It lives in the endorsement hierarchy: elsewhere a quote's reset count is obfuscated (facts of docs/rooms/trust.md). Its qualified name, which
   each statement carries, proves the place.
3. The storage key is a restricted decryption key and a primary key of the owner hierarchy; the attestation key certifies that it is there.
4. A generation counter counts if the attestation key certified it over the verifier's nonce, and its Name is the one that only root can count.
5. A quote counts if it carries the verifier's nonce, covers exactly the PCRs asked for in the bank sha256, and its digest is that of the values shown.
"""

import hmac
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.errors import TheirsError
from appliance.core.trust.policy import pcr_digest
from appliance.core.trust.tpm_structures import (
    COUNTER_BYTES,
    Attest,
    Certified,
    ClockInfo,
    Contents,
    Public,
    Quoted,
    parse_attest,
    parse_signature,
)
from appliance.core.trust.tpm_wire import DIGEST_BYTES, PCR_COUNT, Algorithm, Attribute, Hierarchy

_P256_BITS = 256
_AES_BITS = 128
_BORN_INSIDE = Attribute.FIXED_TPM | Attribute.FIXED_PARENT | Attribute.SENSITIVE_DATA_ORIGIN | Attribute.RESTRICTED


def check_attestation_key(key: Public) -> None:
    """Check rule 1. Raises: TheirsError (`ak_attributes`)."""
    if not _is_p256(key) or key.scheme is not Algorithm.ECDSA or key.symmetric_bits:
        raise TheirsError("ak_attributes", "is not a P-256 key for ECDSA with SHA-256", where="attestation key")
    _check_attributes(key, has=_BORN_INSIDE | Attribute.SIGN, lacks=Attribute.DECRYPT, reason="ak_attributes", where="attestation key")


def check_storage_key(key: Public) -> None:
    """Check rule 3, except for the certificate. Raises: TheirsError (`srk_attributes`)."""
    if not _is_p256(key) or key.scheme is not Algorithm.NULL or key.symmetric_bits != _AES_BITS:
        raise TheirsError("srk_attributes", "is not a P-256 storage key with AES-128", where="storage key")
    _check_attributes(key, has=_BORN_INSIDE | Attribute.DECRYPT, lacks=Attribute.SIGN, reason="srk_attributes", where="storage key")


def verify_certify(attest: bytes, signature: bytes, *, attestation: Public, storage: Public, nonce: bytes) -> None:
    """Check that `attestation` certified `storage` over `nonce`. Raises: TheirsError (`certify`, `malformed`)."""
    statement = _verified(attest, signature, attestation, nonce, "certify")
    if not isinstance(statement.stated, Certified):
        raise TheirsError("certify", "the attestation key signed something else than a certification", where="storage key")
    expected = Certified(storage.name, storage.qualified_name(Hierarchy.OWNER))
    if statement.stated != expected:
        raise TheirsError("certify", f"certified {statement.stated.name.hex()}, expected {expected.name.hex()}", where="storage key")


def verify_quote(attest: bytes, signature: bytes, *, attestation: Public, nonce: bytes, values: Mapping[int, bytes]) -> ClockInfo:
    """Check that `attestation` quoted `values` (PCR to 32 bytes) over `nonce`, and return the TPM's clock.

    Raises: TheirsError (`quote`, `malformed`).
    """
    if not values or any(pcr not in range(PCR_COUNT) or len(value) != DIGEST_BYTES for pcr, value in values.items()):
        raise TheirsError("malformed", "the PCR values are not 32 bytes each for PCRs 0 to 23", where="quote")
    statement = _verified(attest, signature, attestation, nonce, "quote")
    if not isinstance(statement.stated, Quoted):
        raise TheirsError("quote", "the attestation key signed something else than a quote", where="quote")
    if statement.stated.selections != ((Algorithm.SHA256, frozenset(values)),):
        raise TheirsError("quote", f"does not cover exactly the PCRs {', '.join(map(str, sorted(values)))} of bank sha256", where="quote")
    if not hmac.compare_digest(statement.stated.pcr_digest, pcr_digest(values)):
        raise TheirsError("quote", "the PCR values shown are not the ones that were quoted", where="quote")
    return statement.clock


def verify_counter(attest: bytes, signature: bytes, *, attestation: Public, nonce: bytes, name: bytes) -> int:
    """Check that `attestation` certified the counter called `name` over `nonce`, and return its value.

    Raises: TheirsError (`counter`, `malformed`).
    """
    statement = _verified(attest, signature, attestation, nonce, "counter")
    if not isinstance(statement.stated, Contents):
        raise TheirsError("counter", "the attestation key signed something else than an NV index", where="generation counter")
    if statement.stated.name != name:
        what = "is not the one that only root can count: another index, another policy, or other attributes"
        raise TheirsError("counter", what, where="generation counter", remedy="the device defines it anew")
    if statement.stated.offset or len(statement.stated.contents) != COUNTER_BYTES:
        raise TheirsError("counter", "was certified in part", where="generation counter")
    return int.from_bytes(statement.stated.contents, "big")


def _verified(attest: bytes, signature: bytes, key: Public, nonce: bytes, reason: str) -> Attest:
    """Check signature, signer's place and nonce, in this order, and return the statement."""
    der = parse_signature(signature, f"{reason} signature")
    if not isinstance(key.key, ec.EllipticCurvePublicKey):
        raise TheirsError(reason, "the attestation key is not an ECC key", where="attestation key")
    try:
        key.key.verify(der, attest, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise TheirsError(reason, "was not signed by this device's attestation key, or was altered", where=reason) from None
    statement = parse_attest(attest, reason)
    if statement.signer != key.qualified_name(Hierarchy.ENDORSEMENT):
        raise TheirsError(reason, "the attestation key is not a primary key of the endorsement hierarchy", where="attestation key")
    if not hmac.compare_digest(statement.extra_data, nonce):
        raise TheirsError(reason, "carries another nonce than the one asked for: a replay", where=reason)
    return statement


def _is_p256(key: Public) -> bool:
    return key.kind is Algorithm.ECC and key.key.key_size == _P256_BITS and key.name_algorithm is Algorithm.SHA256


def _check_attributes(key: Public, *, has: Attribute, lacks: Attribute, reason: str, where: str) -> None:
    missing = has & ~key.attributes
    excess = lacks & key.attributes
    if missing or excess:
        told = [f"lacks {each.name}" for each in missing] + [f"must not have {each.name}" for each in excess]
        raise TheirsError(reason, ", ".join(told), where=where)
