"""What a region encrypts to a TPM that it has never touched: a credential for its EK, and a sealed key for its SRK.

1. A credential (Part 1, 24) opens only in a TPM that holds this EK *and* an object with this name: EK and AK are tied together.
2. A sealed key is made outside the TPM as a duplicate (Part 1, 23.3) under a storage key; TPM2_Import takes it in.
   It goes to the SRK, never to the EK: an EK outlives TPM2_Clear, and a kept blob would open again (docs/rooms/trust.md).
3. The object has no fixedTPM, no password (userWithAuth clear), and is ruled by its policy alone, also for administration.
4. Randomness is an argument: `chance(n)` gives n bytes. So OAEP and the ephemeral key are made here (RFC 8017, 7.1; FIPS 186-5, A.2.1).
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from appliance.core.trust.tpm_structures import Public
from appliance.core.trust.tpm_wire import HASHES, Algorithm, Attribute, digest, malformed, sized, u16, u32

Chance = Callable[[int], bytes]
"""A source of cryptographic random bytes, such as `os.urandom`."""

KEY_BYTES = 32

_AES_BLOCK_BYTES = 16
_EXTRA_SCALAR_BYTES = 8
_ORDERS = {
    "secp256r1": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    "secp384r1": int("F" * 48 + "C7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16),
}
"""Orders of the base points (SEC 2, 2.4.2 and 2.5.1)."""


@dataclass(frozen=True, slots=True)
class Credential:
    """Contents of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET for TPM2_ActivateCredential."""

    blob: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class Sealed:
    """Contents of TPM2B_PUBLIC, TPM2B_PRIVATE and TPM2B_ENCRYPTED_SECRET for TPM2_Import."""

    public: bytes
    duplicate: bytes
    seed: bytes


def make_credential(endorsement: Public, name: bytes, secret: bytes, chance: Chance) -> Credential:
    """Encrypt `secret` (at most 32 bytes) for the TPM that holds `endorsement` and an object called `name`."""
    seed, encrypted_seed = _share_seed(endorsement, b"IDENTITY\0", chance)
    return Credential(_protect(endorsement, seed, name, sized(secret)), encrypted_seed)


def wrap_sealed(parent: Public, auth_policy: bytes, secret: bytes, chance: Chance) -> Sealed:
    """Wrap `secret` (32 bytes) under the storage key `parent`, ruled by `auth_policy` (SHA-256)."""
    obfuscation = chance(KEY_BYTES)
    attributes = Attribute.NO_DA | Attribute.ADMIN_WITH_POLICY
    head = u16(Algorithm.KEYEDHASH) + u16(Algorithm.SHA256) + u32(attributes) + sized(auth_policy) + u16(Algorithm.NULL)
    public = head + sized(digest(Algorithm.SHA256, obfuscation + secret))
    sensitive = u16(Algorithm.KEYEDHASH) + sized(b"") + sized(obfuscation) + sized(secret)
    seed, encrypted_seed = _share_seed(parent, b"DUPLICATE\0", chance)
    name = u16(Algorithm.SHA256) + digest(Algorithm.SHA256, public)
    return Sealed(public, _protect(parent, seed, name, sized(sensitive)), encrypted_seed)


def derive_hmac(algorithm: Algorithm, key: bytes, label: bytes, context: bytes, length: int) -> bytes:
    """KDFa (Part 1, 11.4.10.2); `label` ends in NUL, `length` is in bytes, at most one hash."""
    return hmac.digest(key, u32(1) + label + context + u32(length * 8), HASHES[algorithm])[:length]


def _protect(parent: Public, seed: bytes, name: bytes, plain: bytes) -> bytes:
    """Encrypt, then authenticate, for a storage key that shares `seed` (Part 1, 24.5 and 23.3.2.3)."""
    if not parent.symmetric_bits:
        raise malformed("key", "can not protect anything: it has no symmetric algorithm")
    algorithm = parent.name_algorithm
    key = derive_hmac(algorithm, seed, b"STORAGE\0", name, parent.symmetric_bits // 8)
    encryptor = Cipher(algorithms.AES(key), CFB(bytes(_AES_BLOCK_BYTES))).encryptor()
    encrypted = encryptor.update(plain) + encryptor.finalize()
    mac_key = derive_hmac(algorithm, seed, b"INTEGRITY\0", b"", len(seed))
    return sized(hmac.digest(mac_key, encrypted + name, HASHES[algorithm])) + encrypted


def _share_seed(receiver: Public, label: bytes, chance: Chance) -> tuple[bytes, bytes]:
    """Make a seed as long as the receiver's name hash, and its encryption (Part 1, B.10.3 and C.6.3)."""
    if isinstance(receiver.key, rsa.RSAPublicKey):
        seed = chance(len(digest(receiver.name_algorithm, b"")))
        return seed, _encrypt_oaep(receiver.key, receiver.name_algorithm, label, seed, chance)
    curve = receiver.key.curve
    width = curve.key_size // 8
    scalar = int.from_bytes(chance(width + _EXTRA_SCALAR_BYTES), "big") % (_ORDERS[curve.name] - 1) + 1
    ephemeral = ec.derive_private_key(scalar, curve)
    point = ephemeral.public_key().public_numbers()
    x, y = point.x.to_bytes(width, "big"), point.y.to_bytes(width, "big")
    receiver_x = receiver.key.public_numbers().x.to_bytes(width, "big")
    shared = ephemeral.exchange(ec.ECDH(), receiver.key)
    return digest(receiver.name_algorithm, u32(1) + shared + label + x + receiver_x), sized(x) + sized(y)


def _encrypt_oaep(key: rsa.RSAPublicKey, algorithm: Algorithm, label: bytes, message: bytes, chance: Chance) -> bytes:
    """RSAES-OAEP (RFC 8017, 7.1.1) with `algorithm` for label and mask."""
    numbers = key.public_numbers()
    width = key.key_size // 8
    label_hash = digest(algorithm, label)
    padding = bytes(width - 2 * len(label_hash) - 2 - len(message))
    block = label_hash + padding + b"\x01" + message
    seed = chance(len(label_hash))
    masked = _xor(block, _mask(algorithm, seed, len(block)))
    masked_seed = _xor(seed, _mask(algorithm, masked, len(seed)))
    encoded = int.from_bytes(masked_seed + masked, "big")
    return pow(encoded, numbers.e, numbers.n).to_bytes(width, "big")


def _mask(algorithm: Algorithm, seed: bytes, length: int) -> bytes:
    """MGF1 (RFC 8017, B.2.1)."""
    blocks = -(-length // len(digest(algorithm, b"")))
    return b"".join(digest(algorithm, seed + u32(counter)) for counter in range(blocks))[:length]


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))
