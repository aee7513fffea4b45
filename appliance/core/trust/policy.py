"""The policy digest of a TPM session, computed without a TPM.

1. A policy starts as 32 zero bytes; each assertion hashes the digest so far with its command code and what it asserts (TPM 2.0 Part 3, 23).
2. PolicySigned and PolicyAuthorize hash twice: first the key's name, then the policyRef (PolicyUpdate, Part 1, 19.7.5.3).
3. PolicyAuthorize forgets what came before it: whatever its key approves takes its place.
4. PolicyCounterTimer and PolicyNV hash operand, offset and comparison first (Part 3, 23.10 and 23.9).
5. The result equals what the TPM's own trial session computes; tests/adapters/test_tpm.py compares them.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from appliance.core.trust.tpm_wire import DIGEST_BYTES, PCR_COUNT, Algorithm, Command, Comparison, TimeField, u16, u32, u64

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

    def clock_below(self, clock_ms: int) -> "Policy":
        """The TPM's clock is below this many powered-on milliseconds."""
        return self._timer(u64(clock_ms), TimeField.CLOCK, Comparison.BELOW)

    def resets_at_most(self, count: int) -> "Policy":
        """The TPM was reset at most so many times in its life."""
        return self._timer(u32(count), TimeField.RESET_COUNT, Comparison.AT_MOST)

    def counter_is(self, index_name: bytes, value: int) -> "Policy":
        """The NV counter with this Name has this value."""
        compared = hashlib.sha256(u64(value) + u16(0) + u16(Comparison.EQUAL)).digest()
        return self.then(u32(Command.POLICY_NV) + compared + index_name)

    def _timer(self, operand: bytes, offset: TimeField, comparison: Comparison) -> "Policy":
        compared = hashlib.sha256(operand + u16(offset) + u16(comparison)).digest()
        return self.then(u32(Command.POLICY_COUNTER_TIMER) + compared)

    def authorize(self, key_name: bytes, reference: bytes) -> "Policy":
        """The key with this name approved the digest so far, whatever it is."""
        return Policy().then(u32(Command.POLICY_AUTHORIZE) + key_name).then(reference)

    def then(self, asserted: bytes) -> "Policy":
        """The digest after one more assertion, given as marshalled for hashing."""
        return Policy(hashlib.sha256(self.digest + asserted).digest())


def signed_consent(nonce_tpm: bytes, expiration_s: int, reference: bytes) -> bytes:
    """What the key of PolicySigned signs over: no cpHash, so the consent is for any command (Part 3, 23.3)."""
    return nonce_tpm + expiration_s.to_bytes(4, "big", signed=True) + reference
