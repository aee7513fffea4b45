"""A TPM on paper and its maker: what a device sends in an attestation, made with plain cryptography, so that tests can bend every part of it.

Its crypto is written with other primitives than the code under test (library OAEP, KBKDF, ConcatKDF), so that both can not be wrong alike.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache

from cryptography import x509
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier

from appliance.contract.attest import Challenge, EnrolAsk, EnrolChallenge, Enrolled, EnrolProof, Evidence, quoted_nonce
from appliance.contract.errors import TheirsError
from appliance.core.trust.endorsement import EK_CERTIFICATE
from appliance.core.trust.tpm_structures import pack_signature
from appliance.core.trust.tpm_wire import sized, u16, u32

NOW = datetime(2026, 6, 1, tzinfo=UTC)
WALL = NOW.timestamp()
GOOD_PCRS = {pcr: hashlib.sha256(b"measured %d" % pcr).digest() for pcr in (0, 1, 2, 3, 4, 5, 7, 11)}

EK_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")


@cache
def rsa_key(which: str) -> rsa.RSAPrivateKey:
    """An RSA key by name; making one takes a tenth of a second, so tests share them."""
    assert which
    return rsa.generate_private_key(65_537, 2048)


def ecc_public(key: ec.EllipticCurvePublicKey, attributes: int, *, scheme: bool, storage: bool) -> bytes:
    """TPMT_PUBLIC of a P-256 key."""
    numbers = key.public_numbers()
    symmetric = u16(6) + u16(128) + u16(0x43) if storage else u16(0x10)
    signing = u16(0x18) + u16(0x0B) if scheme else u16(0x10)
    point = sized(numbers.x.to_bytes(32, "big")) + sized(numbers.y.to_bytes(32, "big"))
    return u16(0x23) + u16(0x0B) + u32(attributes) + sized(b"") + symmetric + signing + u16(3) + u16(0x10) + point


def name_of(public: bytes) -> bytes:
    """A Name with SHA-256."""
    return u16(0x0B) + hashlib.sha256(public).digest()


def qualified(public: bytes, hierarchy: int) -> bytes:
    """The qualified name of a primary key."""
    return u16(0x0B) + hashlib.sha256(u32(hierarchy) + name_of(public)).digest()


def derive(key: bytes, label: bytes, context: bytes, length: int) -> bytes:
    """KDFa by the library."""
    place = CounterLocation.BeforeFixed
    return KBKDFHMAC(hashes.SHA256(), Mode.CounterMode, length, 4, 4, place, label, context, None).derive(key)


def unprotect(seed: bytes, name: bytes, blob: bytes) -> bytes:
    """Open the outer wrap of a credential or duplicate; the integrity value must fit."""
    mac, encrypted = blob[2:34], blob[34:]
    check = HMAC(derive(seed, b"INTEGRITY", b"", 32), hashes.SHA256())
    check.update(encrypted + name)
    check.verify(mac)
    decryptor = Cipher(algorithms.AES(derive(seed, b"STORAGE", name, 16)), CFB(bytes(16))).decryptor()
    return decryptor.update(encrypted) + decryptor.finalize()


def refusal_of(call: Callable[[], object]) -> TheirsError | None:
    """The refusal that a call ends in, or None if it is accepted; any other exception escapes and fails the test."""
    try:
        call()
    except TheirsError as error:
        return error
    return None


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """TPMT_SIGNATURE over content."""
    return pack_signature(key.sign(content, ec.ECDSA(hashes.SHA256())))


@dataclass
class Maker:
    """A TPM maker with a root and an intermediate authority. The fields bend what it issues."""

    not_before: datetime = NOW - timedelta(days=30)
    not_after: datetime = NOW + timedelta(days=3650)
    purposes: tuple[ObjectIdentifier, ...] = (EK_CERTIFICATE,)
    issuer_is_ca: bool = True
    root_path_length: int | None = None
    issuer_signs: bool = True
    leaf_is_ca: bool = False
    leaf_encrypts: bool = True
    names_tpm: bool = True
    odd_extension: bool = False
    hash_algorithm: hashes.HashAlgorithm = field(default_factory=hashes.SHA256)

    def roots(self) -> list[bytes]:
        """The root, and the intermediate that helps to reach it."""
        return [self._root().public_bytes(Encoding.DER), self._issuer().public_bytes(Encoding.DER)]

    def certify(self, ek: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
        """An EK certificate in DER."""
        builder = self._builder("dev-1", "issuer", ek)
        builder = builder.add_extension(x509.BasicConstraints(ca=self.leaf_is_ca, path_length=None), critical=True)
        builder = builder.add_extension(usage(encrypts=self.leaf_encrypts), critical=True)
        if self.purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.purposes), critical=False)
        maker = x509.Name([x509.NameAttribute(ObjectIdentifier("2.23.133.2.1"), "id:00001014")])
        named = x509.DirectoryName(maker) if self.names_tpm else x509.DNSName("dev-1")
        builder = builder.add_extension(x509.SubjectAlternativeName([named]), critical=True)
        if self.odd_extension:
            builder = builder.add_extension(x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00"), critical=True)
        return builder.sign(rsa_key("issuer"), self.hash_algorithm).public_bytes(Encoding.DER)

    def _root(self) -> x509.Certificate:
        builder = self._builder("root", "root", rsa_key("root").public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=self.root_path_length), critical=True)
        return builder.add_extension(usage(signs=True), critical=True).sign(rsa_key("root"), hashes.SHA256())

    def _issuer(self) -> x509.Certificate:
        builder = self._builder("issuer", "root", rsa_key("issuer").public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=self.issuer_is_ca, path_length=None), critical=True)
        return builder.add_extension(usage(signs=self.issuer_signs), critical=True).sign(rsa_key("root"), hashes.SHA256())

    def _builder(self, subject: str, issuer: str, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        first, second = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (subject, issuer))
        builder = x509.CertificateBuilder().subject_name(first).issuer_name(second).public_key(key).serial_number(7)
        return builder.not_valid_before(self.not_before).not_valid_after(self.not_after)


def usage(*, signs: bool = False, encrypts: bool = False) -> x509.KeyUsage:
    """A key usage with one or two bits."""
    return x509.KeyUsage(
        digital_signature=not signs and not encrypts,
        content_commitment=False,
        key_encipherment=encrypts,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


class PaperTpm:
    """EK (RSA-2048), AK and SRK (P-256) of one device; attributes may be bent before use."""

    def __init__(self, maker: Maker | None = None, *, ek: str = "ek") -> None:
        self.maker = maker or Maker()
        self.ek = rsa_key(ek)
        self.ak = ec.generate_private_key(ec.SECP256R1())
        self.srk = ec.generate_private_key(ec.SECP256R1())
        self.ak_attributes = 0x0005_0472
        self.srk_attributes = 0x0003_0472
        self.ak_hierarchy = 0x4000_000B
        self.reset_count = 3
        self.clock_ms = 2_000

    @property
    def ek_public(self) -> bytes:
        """TPMT_PUBLIC, template L-1."""
        head = u16(1) + u16(0x0B) + u32(0x0003_00B2) + sized(EK_POLICY) + u16(6) + u16(128) + u16(0x43) + u16(0x10)
        return head + u16(2048) + u32(0) + sized(self.ek.public_key().public_numbers().n.to_bytes(256, "big"))

    @property
    def ak_public(self) -> bytes:
        """TPMT_PUBLIC of the attestation key."""
        return ecc_public(self.ak.public_key(), self.ak_attributes, scheme=True, storage=False)

    @property
    def srk_public(self) -> bytes:
        """TPMT_PUBLIC of the storage key."""
        return ecc_public(self.srk.public_key(), self.srk_attributes, scheme=False, storage=True)

    def ask(self) -> EnrolAsk:
        """Ask for enrolment."""
        certificates = [self.maker.certify(self.ek.public_key())]
        return EnrolAsk(ek_certificates=certificates, ek_public=self.ek_public, ak_public=self.ak_public, srk_public=self.srk_public)

    def activate(self, challenge: EnrolChallenge) -> bytes:
        """TPM2_ActivateCredential."""
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\0")
        seed = self.ek.decrypt(challenge.secret, oaep)
        return unprotect(seed, name_of(self.ak_public), challenge.credential)[2:]

    def attest(self, kind: int, extra: bytes, stated: bytes) -> bytes:
        """TPMS_ATTEST."""
        clock = self.clock_ms.to_bytes(8, "big") + u32(self.reset_count) + u32(0) + b"\x01"
        head = u32(0xFF54_4347) + u16(kind) + sized(qualified(self.ak_public, self.ak_hierarchy)) + sized(extra)
        return head + clock + bytes(8) + stated

    def prove(self, challenge: EnrolChallenge) -> EnrolProof:
        """Return the secret and certify the storage key."""
        names = sized(name_of(self.srk_public)) + sized(qualified(self.srk_public, 0x4000_0001))
        attest = self.attest(0x8017, challenge.nonce, names)
        secret = self.activate(challenge)
        return EnrolProof(ticket=challenge.ticket, secret=secret, certify_attest=attest, certify_signature=sign(self.ak, attest))

    def unwrap(self, enrolled: Enrolled) -> bytes:
        """TPM2_Import and TPM2_Unseal, if the TPM were to ignore the policy."""
        x = enrolled.seed[2:34]
        point = ec.EllipticCurvePublicNumbers(
            int.from_bytes(x, "big"), int.from_bytes(enrolled.seed[36:], "big"), ec.SECP256R1()
        ).public_key()
        own = self.srk.public_key().public_numbers().x.to_bytes(32, "big")
        seed = ConcatKDFHash(hashes.SHA256(), 32, b"DUPLICATE\0" + x + own).derive(self.srk.exchange(ec.ECDH(), point))
        return unprotect(seed, name_of(enrolled.sealed_public), enrolled.duplicate)[-32:]

    def evidence(self, challenge: Challenge, values: Mapping[int, bytes] | None = None, session_nonce: bytes | None = None) -> Evidence:
        """Quote PCR values for a policy session."""
        shown = dict(GOOD_PCRS if values is None else values)
        session = session_nonce or os.urandom(32)
        bits = sum(1 << pcr for pcr in shown)
        over = hashlib.sha256(b"".join(shown[pcr] for pcr in sorted(shown))).digest()
        stated = u32(1) + u16(0x0B) + b"\x03" + bits.to_bytes(3, "little") + sized(over)
        attest = self.attest(0x8018, quoted_nonce(challenge.nonce, session), stated)
        return Evidence(
            nonce=challenge.nonce,
            quote_attest=attest,
            quote_signature=sign(self.ak, attest),
            pcr_values=shown,
            session_nonce=session,
        )
