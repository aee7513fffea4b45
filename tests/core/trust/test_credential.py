"""What a region encrypts to a TPM opens with the private key and for the right name, and in no other way."""

import hashlib
import os

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.contract.attest import EnrolChallenge, Enrolled
from appliance.core.trust.credential import make_credential, wrap_sealed
from appliance.core.trust.tpm_structures import parse_public
from appliance.core.trust.tpm_wire import sized, u16, u32
from tests.fakes.paper_tpm import PaperTpm, derive, name_of, unprotect

TPM = PaperTpm()
EK = parse_public(TPM.ek_public, "EK")
SRK = parse_public(TPM.srk_public, "SRK")


def challenge(blob: bytes, secret: bytes) -> EnrolChallenge:
    return EnrolChallenge(ticket="", credential=blob, secret=secret, nonce=b"")


@settings(max_examples=20)
@given(st.binary(min_size=1, max_size=32))
def test_an_rsa_endorsement_key_opens_its_credential(secret: bytes) -> None:
    """OAEP, KDFa, CFB and HMAC of the library agree with ours."""
    made = make_credential(EK, name_of(TPM.ak_public), secret, os.urandom)
    assert TPM.activate(challenge(made.blob, made.secret)) == secret


def test_a_credential_for_another_name_does_not_open() -> None:
    """The name is under the integrity value: another AK gets nothing."""
    made = make_credential(EK, name_of(TPM.srk_public), b"s" * 32, os.urandom)
    with pytest.raises(InvalidSignature):
        TPM.activate(challenge(made.blob, made.secret))


def test_an_ecc_endorsement_key_opens_its_credential() -> None:
    """P-256: the seed comes from an ephemeral exchange."""
    made = make_credential(SRK, name_of(TPM.ak_public), b"s" * 32, os.urandom)
    x, y = made.secret[2:34], made.secret[36:]
    point = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1()).public_key()
    own = TPM.srk.public_key().public_numbers().x.to_bytes(32, "big")
    seed = ConcatKDFHash(hashes.SHA256(), 32, b"IDENTITY\0" + x + own).derive(TPM.srk.exchange(ec.ECDH(), point))
    assert unprotect(seed, name_of(TPM.ak_public), made.blob)[2:] == b"s" * 32


def test_the_sealed_key_has_the_measured_sizes_and_no_password() -> None:
    """78, 108 and 68 bytes as a TPM took them; attributes noDA and adminWithPolicy only."""
    sealed = wrap_sealed(SRK, b"p" * 32, b"k" * 32, os.urandom)
    assert (len(sealed.public), len(sealed.duplicate), len(sealed.seed)) == (78, 108, 68)
    assert sealed.public.startswith(u16(8) + u16(0x0B) + u32(0x480) + sized(b"p" * 32))


def test_the_sealed_key_opens_under_its_storage_key() -> None:
    """The holder of the SRK recovers the key, and the public part commits to it."""
    sealed = wrap_sealed(SRK, b"p" * 32, b"k" * 32, os.urandom)
    zero = b""
    enrolled = Enrolled(
        epoch=1, sealed_public=sealed.public, duplicate=sealed.duplicate, seed=sealed.seed, srk_name=zero, policy_ref=zero,
        root_public=zero, region_public=zero, delegation=zero, delegation_signature=zero,
    )  # fmt: skip
    assert TPM.unwrap(enrolled) == b"k" * 32
    with pytest.raises(InvalidSignature):
        PaperTpm().unwrap(enrolled)


def test_chance_is_the_only_source_of_randomness() -> None:
    """The same random bytes give the same credential and the same sealed key: nothing else is drawn."""

    def stream(count: int) -> bytes:
        return hashlib.shake_128(b"seed").digest(count)

    assert make_credential(EK, b"n" * 34, b"s", stream) == make_credential(EK, b"n" * 34, b"s", stream)
    assert wrap_sealed(SRK, b"p" * 32, b"k" * 32, stream) == wrap_sealed(SRK, b"p" * 32, b"k" * 32, stream)
    assert derive(b"k" * 32, b"STORAGE", b"", 16)
