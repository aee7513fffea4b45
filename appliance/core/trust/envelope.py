"""Wraps data keys for their two journeys: cloud to region under X25519, region to device under the key that only its TPM opens.

1. Region: `HKDF-SHA256(X25519(ephemeral, region), salt = ephemeral || region public, info = label)` gives an AES-256-GCM key and nonce; both are used
   once, because the ephemeral key is (the shape of RFC 9180, base mode).
2. Device: AES-256-GCM under the KEK with a random 96-bit nonce (NIST SP 800-38D: below 2^32 wraps per KEK).
3. The container's hash is the additional data of both: a key that was wrapped for one artifact does not open as another's.
4. An envelope says who may read, not who wrote: the sender is proven by mTLS, and a wrong data key by the container's commitment.
5. Private keys and randomness are arguments; failures carry no bytes.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from appliance.contract.errors import OursError, TheirsError
from appliance.contract.models import RegionKey, RegionKeyAsk, WrappedKey

KEY_BYTES = 32
NONCE_BYTES = 12
_LABEL = b"appliance region key v1"


def region_public(private: bytes) -> bytes:
    """Return the X25519 public key (32 bytes) of a private key (32 random bytes)."""
    return X25519PrivateKey.from_private_bytes(_sized("private key", private, KEY_BYTES)).public_key().public_bytes_raw()


def wrap_for_region(ask: RegionKeyAsk, data_key: bytes, ephemeral: bytes) -> RegionKey:
    """Encrypt a data key to the asking region. `ephemeral`: 32 random bytes, never used again.

    Raises: TheirsError (`public_key`) if the region's key is no point that can be used.
    """
    _sized("data key", data_key, KEY_BYTES)
    public = region_public(ephemeral)
    cipher, nonce = _agree(ephemeral, ask.public, public + ask.public)
    return RegionKey(artifact=ask.artifact, ephemeral=public, wrapped=cipher.encrypt(nonce, data_key, ask.artifact.encode()))


def unwrap_for_region(answer: RegionKey, artifact: str, private: bytes) -> bytes:
    """Return the data key of the artifact that was asked for.

    Raises: TheirsError (`public_key`, `unwrap`): another artifact, another recipient, or changed bytes.
    """
    cipher, nonce = _agree(private, answer.ephemeral, answer.ephemeral + region_public(private))
    return _opened(cipher, nonce, answer.wrapped, artifact, answer.artifact)


def wrap_for_device(artifact: str, data_key: bytes, *, kek: bytes, epoch: int, nonce: bytes, leased: bool = False) -> WrappedKey:
    """Encrypt a data key under a device's KEK. `kek`: 32 bytes; `nonce`: 12 random bytes; `leased`: which of the device's two KEKs it is."""
    _sized("data key", data_key, KEY_BYTES)
    cipher = AESGCM(_sized("KEK", kek, KEY_BYTES))
    return WrappedKey(
        artifact=artifact,
        epoch=epoch,
        nonce=nonce,
        wrapped=cipher.encrypt(_sized("nonce", nonce, NONCE_BYTES), data_key, artifact.encode()),
        leased=leased,
    )


def unwrap_for_device(answer: WrappedKey, artifact: str, kek: bytes) -> bytes:
    """Return the data key of the artifact that was asked for.

    Raises: TheirsError (`unwrap`): another artifact, another KEK (epoch), or changed bytes.
    """
    if len(answer.nonce) != NONCE_BYTES:
        raise TheirsError("unwrap", f"the nonce has {len(answer.nonce)} bytes, 12 are needed", where=artifact)
    return _opened(AESGCM(_sized("KEK", kek, KEY_BYTES)), answer.nonce, answer.wrapped, artifact, answer.artifact)


def _agree(private: bytes, public: bytes, salt: bytes) -> tuple[AESGCM, bytes]:
    try:
        shared = X25519PrivateKey.from_private_bytes(_sized("private key", private, KEY_BYTES)).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:  # a wrong length, or a point of low order (the shared secret would be zero)
        raise TheirsError("public_key", f"not a usable X25519 public key: {error}") from error
    material = HKDF(algorithm=SHA256(), length=KEY_BYTES + NONCE_BYTES, salt=salt, info=_LABEL).derive(shared)
    return AESGCM(material[:KEY_BYTES]), material[KEY_BYTES:]


def _opened(cipher: AESGCM, nonce: bytes, wrapped: bytes, artifact: str, said: str) -> bytes:
    if said != artifact:
        raise TheirsError("unwrap", f"the key is for artifact {said[:64]}", where=artifact, remedy="ask anew")
    try:
        data_key = cipher.decrypt(nonce, wrapped, artifact.encode())
    except InvalidTag as error:
        raise TheirsError(
            "unwrap", "the data key does not open: another recipient or epoch, or changed bytes", where=artifact, remedy="ask anew"
        ) from error
    if len(data_key) != KEY_BYTES:
        raise TheirsError("unwrap", f"the data key has {len(data_key)} bytes, 32 are needed", where=artifact)
    return data_key


def _sized(name: str, value: bytes, size: int) -> bytes:
    if len(value) != size:
        raise OursError("key_size", f"{name} has {len(value)} bytes, {size} are needed")
    return value
