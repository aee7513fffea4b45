"""Keeps a device's keys unreadable in the region's record of it: only who also has the vault's key can read both.

1. AES-256-GCM with a random 96-bit nonce over both key-encryption keys; the additional data is device, epoch and EK, so a wrapped key that is
   moved to another record does not open (NIST SP 800-38D: below 2^32 wraps per key).
2. A record from before this rule, with its keys in clear, is read, and wrapped when it is next stored.
3. A copy of the records alone (a backup, a disk) opens nothing. Whoever is root on the region, or has a copy of the vault's key too, can read all.
"""

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from appliance.contract.errors import WorldError
from appliance.core.trust.credential import KEY_BYTES
from appliance.core.trust.enrolment import Record

NONCE_BYTES = 12


def lock(record: Record, key: bytes, nonce: bytes) -> Record:
    """The record as it may be stored. `key`: 32 bytes; `nonce`: 12 random bytes."""
    wrapped = nonce + AESGCM(key).encrypt(nonce, record.kek + record.leased_kek, _bound(record))
    return msgspec.structs.replace(record.without_key(), kek_wrapped=wrapped)


def unlock(record: Record, key: bytes) -> Record:
    """The record with its keys. Raises: WorldError (`vault_key`) if this is not the key that it was stored under."""
    if not record.kek_wrapped:
        return record
    nonce, wrapped = record.kek_wrapped[:NONCE_BYTES], record.kek_wrapped[NONCE_BYTES:]
    try:
        plain = AESGCM(key).decrypt(nonce, wrapped, _bound(record))
    except (InvalidTag, ValueError) as error:
        raise WorldError(
            "vault_key",
            "the keys in this record do not open: another vault key, or a damaged record",
            where=record.device,
            remedy="restore vault.key and the record from one backup, or remove the record and let the device enrol anew",
        ) from error
    return msgspec.structs.replace(record, kek=plain[:KEY_BYTES], leased_kek=plain[KEY_BYTES:], kek_wrapped=b"")


def _bound(record: Record) -> bytes:
    return msgspec.json.encode([record.device, record.epoch, record.ek_name])
