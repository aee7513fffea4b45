"""Hands a TPM's authorisations to its region so that only the region's escrow key reads them: X25519, HKDF-SHA256, AES-256-GCM.

1. An ephemeral key is used once; salt = ephemeral public || escrow public, info = label (the shape of RFC 9180, base mode).
2. The EK's name is in the box and is its additional data: a box that is put under another device does not open.
3. Who holds the lockout authorisation can clear the TPM, who holds the owner's can set its clock on. Neither opens a key.
"""

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from appliance.contract.errors import TheirsError

KEY_BYTES = 32
NONCE_BYTES = 12
_LABEL = b"appliance escrow v1"


class Authorisations(msgspec.Struct, frozen=True, kw_only=True):
    """What rules a TPM: the texts for TPM_RH_LOCKOUT and TPM_RH_OWNER; an empty one was not set."""

    lockout: str
    owner: str

    def __repr__(self) -> str:
        """No value: a traceback or a log must not hold it."""
        return "Authorisations(…)"


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """Authorisations on their way; nothing in it is secret to who lacks the escrow key."""

    ek_name: bytes
    ephemeral: bytes
    wrapped: bytes


def escrow_public(private: bytes) -> bytes:
    """The public key (32 bytes) of an escrow key (32 random bytes)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def enclose(held: Authorisations, ek_name: bytes, public: bytes, ephemeral: bytes) -> bytes:
    """Encrypt for the region's escrow key. `ephemeral`: 32 random bytes, never used again. Raises: TheirsError (`escrow_key`)."""
    own = escrow_public(ephemeral)
    cipher, nonce = _agree(ephemeral, public, own + public)
    return msgspec.json.encode(Box(ek_name=ek_name, ephemeral=own, wrapped=cipher.encrypt(nonce, msgspec.json.encode(held), ek_name)))


def disclose(payload: bytes, private: bytes) -> tuple[bytes, Authorisations]:
    """The EK's name and the authorisations. Raises: TheirsError (`escrow`, `escrow_key`)."""
    try:
        box = msgspec.json.decode(payload, type=Box)
        cipher, nonce = _agree(private, box.ephemeral, box.ephemeral + escrow_public(private))
        return box.ek_name, msgspec.json.decode(cipher.decrypt(nonce, box.wrapped, box.ek_name), type=Authorisations)
    except (InvalidTag, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TheirsError("escrow", "the box does not open: another escrow key, or changed bytes", where="escrow") from error


def _agree(private: bytes, public: bytes, salt: bytes) -> tuple[AESGCM, bytes]:
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a wrong length, or a point of low order
        raise TheirsError("escrow_key", f"not a usable X25519 key: {error}", where="escrow") from error
    material = HKDF(algorithm=SHA256(), length=KEY_BYTES + NONCE_BYTES, salt=salt, info=_LABEL).derive(shared)
    return AESGCM(material[:KEY_BYTES]), material[KEY_BYTES:]
