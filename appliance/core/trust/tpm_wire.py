"""The TPM's byte order, read with bounds and written back.

1. Integers are big-endian; a TPM2B is a 16-bit length and that many bytes (TPM 2.0 Part 1, 4.2 and Part 2, 10.4).
2. Every read is checked against what is left, and `end` demands that nothing is left: bytes that are not exactly one structure are refused.
3. Malformed bytes raise `TheirsError` (`malformed`), never anything else: they come from a network.
"""

import hashlib
from enum import IntEnum, IntFlag

from appliance.contract.errors import TheirsError

DIGEST_BYTES = 32
"""SHA-256, the one hash of our own policies, sessions and PCR bank."""

PCR_COUNT = 24
"""PCRs of a PC Client platform (PC Client Platform TPM Profile, 4.6)."""


class Algorithm(IntEnum):
    """TPM_ALG_ID (TPM 2.0 Part 2, 6.3), only those that are accepted here."""

    RSA = 0x0001
    AES = 0x0006
    KEYEDHASH = 0x0008
    SHA256 = 0x000B
    SHA384 = 0x000C
    NULL = 0x0010
    ECDSA = 0x0018
    ECC = 0x0023
    CFB = 0x0043


class Curve(IntEnum):
    """TPM_ECC_CURVE (Part 2, 6.4)."""

    P256 = 0x0003
    P384 = 0x0004


class Attribute(IntFlag):
    """TPMA_OBJECT (Part 2, 8.3)."""

    FIXED_TPM = 0x0000_0002
    FIXED_PARENT = 0x0000_0010
    SENSITIVE_DATA_ORIGIN = 0x0000_0020
    USER_WITH_AUTH = 0x0000_0040
    ADMIN_WITH_POLICY = 0x0000_0080
    NO_DA = 0x0000_0400
    RESTRICTED = 0x0001_0000
    DECRYPT = 0x0002_0000
    SIGN = 0x0004_0000


class NvAttribute(IntFlag):
    """TPMA_NV (Part 2, 13.4); the type is in bits 4 to 7."""

    POLICY_WRITE = 0x0000_0008
    COUNTER = 0x0000_0010
    AUTH_READ = 0x0004_0000
    NO_DA = 0x0200_0000
    WRITTEN = 0x2000_0000


class Hierarchy(IntEnum):
    """TPM_RH (Part 2, 7.4)."""

    OWNER = 0x4000_0001
    ENDORSEMENT = 0x4000_000B


class Command(IntEnum):
    """TPM_CC (Part 2, 6.5.2), those that appear in policies."""

    NV_INCREMENT = 0x0000_0134
    POLICY_NV = 0x0000_0149
    UNSEAL = 0x0000_015E
    POLICY_SIGNED = 0x0000_0160
    POLICY_AUTHORIZE = 0x0000_016A
    POLICY_COMMAND_CODE = 0x0000_016C
    POLICY_COUNTER_TIMER = 0x0000_016D
    POLICY_PCR = 0x0000_017F


class Comparison(IntEnum):
    """TPM_EO (Part 2, 6.8): how a policy compares what the TPM holds with an operand."""

    EQUAL = 0x0000
    BELOW = 0x0005
    AT_MOST = 0x0009


class TimeField(IntEnum):
    """Offsets in TPMS_TIME_INFO (Part 2, 10.11.6), big-endian: clock has 8 bytes, reset count 4."""

    CLOCK = 8
    RESET_COUNT = 16


HASHES = {Algorithm.SHA256: "sha256", Algorithm.SHA384: "sha384"}


def malformed(where: str, what: str) -> TheirsError:
    """The one refusal of this floor."""
    return TheirsError("malformed", what, where=where)


def u16(value: int) -> bytes:
    """Marshal a UINT16."""
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    """Marshal a UINT32."""
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    """Marshal a UINT64."""
    return value.to_bytes(8, "big")


def sized(content: bytes) -> bytes:
    """Marshal a TPM2B."""
    return u16(len(content)) + content


def digest(algorithm: Algorithm, content: bytes) -> bytes:
    """Hash with a TPM's hash algorithm (a key of `HASHES`)."""
    return hashlib.new(HASHES[algorithm], content).digest()


class Reader:
    """A cursor over one structure. `where` names the structure in refusals."""

    def __init__(self, content: bytes, where: str) -> None:
        self._content = content
        self._at = 0
        self.where = where

    def take(self, count: int) -> bytes:
        """Read exactly `count` bytes. Raises: TheirsError (`malformed`) if fewer are left."""
        left = len(self._content) - self._at
        if count > left:
            raise malformed(self.where, f"needs {count} bytes at offset {self._at}, has {left}")
        self._at += count
        return self._content[self._at - count : self._at]

    def uint(self, count: int) -> int:
        """Read an unsigned integer of `count` bytes."""
        return int.from_bytes(self.take(count), "big")

    def u8(self) -> int:
        """Read a UINT8."""
        return self.uint(1)

    def u16(self) -> int:
        """Read a UINT16."""
        return self.uint(2)

    def u32(self) -> int:
        """Read a UINT32."""
        return self.uint(4)

    def u64(self) -> int:
        """Read a UINT64."""
        return self.uint(8)

    def sized(self, limit: int) -> bytes:
        """Read a TPM2B of at most `limit` bytes."""
        count = self.u16()
        if count > limit:
            raise malformed(self.where, f"a field says {count} bytes, at most {limit} are possible")
        return self.take(count)

    def algorithm(self, *accepted: Algorithm) -> Algorithm:
        """Read a TPM_ALG_ID that must be one of `accepted`."""
        value = self.u16()
        for each in accepted:
            if value == each:
                return each
        raise malformed(self.where, f"algorithm 0x{value:04x} where one of {', '.join(each.name for each in accepted)} is accepted")

    def end(self) -> None:
        """Demand that nothing is left."""
        left = len(self._content) - self._at
        if left:
            raise malformed(self.where, f"{left} bytes too many")
