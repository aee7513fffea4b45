"""The policy digest of a TPM session, computed without a TPM.

1. A policy starts as 32 zero bytes; each assertion hashes the digest so far with its command code and what it asserts (TPM 2.0 Part 3, 23).
2. PolicySigned and PolicyAuthorize hash twice: first the key's name, then the policyRef (PolicyUpdate, Part 1, 19.7.5.3).
3. PolicyAuthorize forgets what came before it: whatever its key approves takes its place.
4. The result equals what the TPM's own trial session computes; tests/adapters/test_tpm.py compares them.

A further assertion (PolicyCounterTimer, PolicyNV) is one more method.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from appliance.core.trust.tpm_wire import DIGEST_BYTES, PCR_COUNT, Algorithm, Command, u16, u32

_SELECT_BYTES = PCR_COUNT // 8


def pcr_selection(pcrs: Iterable[int]) -> bytes:
    """Marshal a TPML_PCR_SELECTION of these PCRs (0 to 23) in the bank sha256."""
    bits = sum(1 << pcr for pcr in set(pcrs))
    return u32(1) + u16(Algorithm.SHA256) + bytes([_SELECT_BYTES]) + bits.to_bytes(_SELECT_BYTES, "little")


def pcr_digest(values: Mapping[int, bytes]) -> bytes:
    """SHA-256 over the values in ascending order of PCR, as a quote and PolicyPCR hold it."""
    return hashlib.sha256(b"".join(values[pcr] for pcr in sorted(values))).digest()


@dataclass(frozen=True, slots=True)
class Policy:
    """The digest after some assertions; each method returns the next one."""

    digest: bytes = bytes(DIGEST_BYTES)

    def pcr(self, values: Mapping[int, bytes]) -> "Policy":
        """The PCRs have these values (bank sha256)."""
        return self.then(u32(Command.POLICY_PCR) + pcr_selection(values) + pcr_digest(values))

    def signed(self, key_name: bytes, reference: bytes) -> "Policy":
        """The key with this name signed this session."""
        return self.then(u32(Command.POLICY_SIGNED) + key_name).then(reference)

    def command_code(self, command: Command) -> "Policy":
        """Only this command is allowed."""
        return self.then(u32(Command.POLICY_COMMAND_CODE) + u32(command))

    def authorize(self, key_name: bytes, reference: bytes) -> "Policy":
        """The key with this name approved the digest so far, whatever it is."""
        return Policy().then(u32(Command.POLICY_AUTHORIZE) + key_name).then(reference)

    def then(self, asserted: bytes) -> "Policy":
        """The digest after one more assertion, given as marshalled for hashing."""
        return Policy(hashlib.sha256(self.digest + asserted).digest())


def signed_consent(nonce_tpm: bytes, expiration_s: int, reference: bytes) -> bytes:
    """What the key of PolicySigned signs over: no cpHash, so the consent is for any command (Part 3, 23.3)."""
    return nonce_tpm + expiration_s.to_bytes(4, "big", signed=True) + reference
