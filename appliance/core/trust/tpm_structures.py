"""The TPM structures that cross the wire: public areas, attestations and signatures.

1. Sources: TPMT_PUBLIC Part 2, 12.2.4; TPMS_ATTEST Part 2, 10.12.12; TPMT_SIGNATURE Part 2, 11.3.4;
   TPMS_NV_PUBLIC Part 2, 13.5; Name Part 1, 16.
2. Only what this appliance uses is accepted: RSA-2048, ECC P-256 and P-384, AES-CFB or no symmetric part, ECDSA, SHA-256 and SHA-384.
   An unknown algorithm is refused, not skipped, so nothing is ever checked half.
3. A name is the hash of the very bytes that were received; what was signed is never rebuilt from parsed fields.
"""

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from appliance.core.trust.tpm_wire import (
    HASHES,
    PCR_COUNT,
    Algorithm,
    Attribute,
    Curve,
    Hierarchy,
    NvAttribute,
    Reader,
    digest,
    malformed,
    sized,
    u16,
    u32,
)

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

CURVES: dict[Curve, ec.EllipticCurve] = {Curve.P256: ec.SECP256R1(), Curve.P384: ec.SECP384R1()}

RSA_BITS = 2048
RSA_EXPONENT = 65_537
"""The TPM's default, written as 0 in a public area (Part 2, 12.2.3.5)."""

COUNTER_BYTES = 8

_GENERATED = 0xFF54_4347
_QUOTE = 0x8018
_CERTIFY = 0x8017
_NV = 0x8014
_MAX_NAME = 66
_MAX_DATA = 66
_MAX_CONTENTS = 1024
_MAX_SELECTIONS = 16
_MAX_SELECT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Public:
    """A TPMT_PUBLIC of an asymmetric key.

    Attributes:
        raw: the structure as received.
        symmetric_bits: AES-CFB key size of a storage key, 0 for none.
        scheme: ECDSA, or NULL for a key without a fixed scheme.
        key: the usable public key; its point or modulus was checked.
    """

    raw: bytes
    kind: Algorithm
    name_algorithm: Algorithm
    attributes: Attribute
    auth_policy: bytes
    symmetric_bits: int
    scheme: Algorithm
    key: PublicKey

    @property
    def name(self) -> bytes:
        """The key's Name: algorithm and hash of the public area."""
        return u16(self.name_algorithm) + digest(self.name_algorithm, self.raw)

    def qualified_name(self, hierarchy: Hierarchy) -> bytes:
        """The Qualified Name that this key has as a primary key of `hierarchy` (Part 1, 16.5)."""
        return u16(self.name_algorithm) + digest(self.name_algorithm, u32(hierarchy) + self.name)


@dataclass(frozen=True, slots=True)
class ClockInfo:
    """TPMS_CLOCK_INFO: `clock_ms` counts powered-on time, `safe` is whether it can not have gone back."""

    clock_ms: int
    reset_count: int
    restart_count: int
    safe: bool


@dataclass(frozen=True, slots=True)
class Quoted:
    """What a quote states: the PCRs of each bank, and the digest over their values."""

    selections: tuple[tuple[int, frozenset[int]], ...]
    pcr_digest: bytes


@dataclass(frozen=True, slots=True)
class Certified:
    """What a certification states: the name of an object in the TPM, and its place in a hierarchy."""

    name: bytes
    qualified_name: bytes


@dataclass(frozen=True, slots=True)
class Contents:
    """What a certification of an NV index states: the index's Name, and what is there from `offset` on."""

    name: bytes
    offset: int
    contents: bytes


@dataclass(frozen=True, slots=True)
class Attest:
    """A TPMS_ATTEST; `extra_data` is the verifier's nonce."""

    raw: bytes
    signer: bytes
    extra_data: bytes
    clock: ClockInfo
    firmware_version: int
    stated: Quoted | Certified | Contents


def parse_public(content: bytes, where: str) -> Public:
    """Read a TPMT_PUBLIC of an RSA or ECC key. Raises: TheirsError (`malformed`)."""
    reader = Reader(content, where)
    kind = reader.algorithm(Algorithm.RSA, Algorithm.ECC)
    name_algorithm = reader.algorithm(*HASHES)
    attributes = Attribute(reader.u32())
    auth_policy = reader.sized(48)
    symmetric_bits = _symmetric(reader)
    scheme = reader.algorithm(Algorithm.NULL, Algorithm.ECDSA)
    if scheme is Algorithm.ECDSA:
        reader.algorithm(Algorithm.SHA256)
    key = _rsa(reader) if kind is Algorithm.RSA else _ecc(reader)
    reader.end()
    return Public(content, kind, name_algorithm, attributes, auth_policy, symmetric_bits, scheme, key)


def parse_attest(content: bytes, where: str) -> Attest:
    """Read a TPMS_ATTEST of a quote, or of a certified key or NV index. Raises: TheirsError (`malformed`)."""
    reader = Reader(content, where)
    if reader.u32() != _GENERATED:
        raise malformed(where, "was not made inside a TPM: the magic is not TPM_GENERATED")
    kind = reader.u16()
    signer = reader.sized(_MAX_NAME)
    extra_data = reader.sized(_MAX_DATA)
    clock = ClockInfo(reader.u64(), reader.u32(), reader.u32(), reader.u8() == 1)
    firmware_version = reader.u64()
    stated: Quoted | Certified | Contents
    if kind == _QUOTE:
        stated = Quoted(_selections(reader), reader.sized(64))
    elif kind == _CERTIFY:
        stated = Certified(reader.sized(_MAX_NAME), reader.sized(_MAX_NAME))
    elif kind == _NV:
        stated = Contents(reader.sized(_MAX_NAME), reader.u16(), reader.sized(_MAX_CONTENTS))
    else:
        raise malformed(where, f"attests type 0x{kind:04x}, only quotes and certifications are accepted")
    reader.end()
    return Attest(content, signer, extra_data, clock, firmware_version, stated)


def parse_signature(content: bytes, where: str) -> bytes:
    """Read a TPMT_SIGNATURE (ECDSA, SHA-256) and return it in DER. Raises: TheirsError (`malformed`)."""
    reader = Reader(content, where)
    reader.algorithm(Algorithm.ECDSA)
    reader.algorithm(Algorithm.SHA256)
    r, s = (int.from_bytes(reader.sized(48), "big") for _ in range(2))
    reader.end()
    return encode_dss_signature(r, s)


def pack_signature(der: bytes) -> bytes:
    """Marshal a P-256 ECDSA signature (DER) as TPMT_SIGNATURE."""
    r, s = decode_dss_signature(der)
    return u16(Algorithm.ECDSA) + u16(Algorithm.SHA256) + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))


def pack_verifier(key: ec.EllipticCurvePublicKey) -> bytes:
    """Marshal a P-256 key as the TPMT_PUBLIC under which a TPM loads it to check signatures (ECDSA, SHA-256)."""
    numbers = key.public_numbers()
    head = u16(Algorithm.ECC) + u16(Algorithm.SHA256) + u32(Attribute.SIGN | Attribute.USER_WITH_AUTH) + sized(b"")
    parameters = u16(Algorithm.NULL) + u16(Algorithm.ECDSA) + u16(Algorithm.SHA256) + u16(Curve.P256) + u16(Algorithm.NULL)
    return head + parameters + sized(numbers.x.to_bytes(32, "big")) + sized(numbers.y.to_bytes(32, "big"))


def name_counter(index: int, auth_policy: bytes) -> bytes:
    """The Name of a counter that was written at least once, may be read by all and counts only under `auth_policy` (SHA-256)."""
    attributes = NvAttribute.POLICY_WRITE | NvAttribute.AUTH_READ | NvAttribute.NO_DA | NvAttribute.COUNTER | NvAttribute.WRITTEN
    return u16(Algorithm.SHA256) + digest(
        Algorithm.SHA256, u32(index) + u16(Algorithm.SHA256) + u32(attributes) + sized(auth_policy) + u16(COUNTER_BYTES)
    )


def _symmetric(reader: Reader) -> int:
    if reader.algorithm(Algorithm.AES, Algorithm.NULL) is Algorithm.NULL:
        return 0
    bits = reader.u16()
    if bits not in {128, 256}:
        raise malformed(reader.where, f"AES with {bits} bits")
    reader.algorithm(Algorithm.CFB)
    return bits


def _rsa(reader: Reader) -> rsa.RSAPublicKey:
    bits, exponent = reader.u16(), reader.u32()
    modulus = int.from_bytes(reader.sized(RSA_BITS // 8), "big")
    if bits != RSA_BITS or exponent not in {0, RSA_EXPONENT} or modulus.bit_length() != RSA_BITS:
        raise malformed(reader.where, f"an RSA key of {modulus.bit_length()} bits with exponent {exponent}; 2048 and 65537 are accepted")
    try:
        return rsa.RSAPublicNumbers(RSA_EXPONENT, modulus).public_key()
    except ValueError as error:
        raise malformed(reader.where, f"not an RSA key: {error}") from error


def _ecc(reader: Reader) -> ec.EllipticCurvePublicKey:
    code = reader.u16()
    curve = next((each for code_of, each in CURVES.items() if code_of == code), None)
    if curve is None:
        raise malformed(reader.where, f"curve 0x{code:04x}; P-256 and P-384 are accepted")
    reader.algorithm(Algorithm.NULL)
    x, y = (int.from_bytes(reader.sized(curve.key_size // 8), "big") for _ in range(2))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError as error:
        raise malformed(reader.where, f"not a point of {curve.name}: {error}") from error


def _selections(reader: Reader) -> tuple[tuple[int, frozenset[int]], ...]:
    count = reader.u32()
    if count > _MAX_SELECTIONS:
        raise malformed(reader.where, f"{count} PCR banks, at most {_MAX_SELECTIONS} are possible")
    return tuple(_selection(reader) for _ in range(count))


def _selection(reader: Reader) -> tuple[int, frozenset[int]]:
    bank = reader.u16()
    length = reader.u8()
    if length > _MAX_SELECT_BYTES:
        raise malformed(reader.where, f"a PCR selection of {length} bytes")
    bits = int.from_bytes(reader.take(length), "little")
    if bits >> PCR_COUNT:
        raise malformed(reader.where, f"selects PCRs above {PCR_COUNT - 1}")
    return bank, frozenset(pcr for pcr in range(PCR_COUNT) if bits >> pcr & 1)
