"""The port `Tpm` on a paper TPM: it keeps the rules of a real one (policies, clock, counter, three sessions) in plain Python, fast enough for thousands.

What tests/adapters/ proves of a real software TPM is what is imitated here: each check that a TPM makes, and its refusal.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract.attest import (
    Approval,
    Challenge,
    CountConsent,
    EnrolAsk,
    EnrolChallenge,
    Enrolled,
    EnrolProof,
    Evidence,
    Grant,
    Lease,
    quoted_nonce,
)
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.core.trust.approval import counter_name, counter_policy, lease_policy
from appliance.core.trust.policy import Policy, signed_consent
from appliance.core.trust.tpm_structures import parse_public, parse_signature
from appliance.core.trust.tpm_wire import Command, sized
from appliance.ports import SealedKey, Sight
from tests.fakes.paper_tpm import GOOD_PCRS, PaperTpm, name_of, sign

SESSIONS = 3


class PaperPort:
    """One TPM that a device and its reboots share. `unsealed` counts keys that were given out, `session_keys` and `leased_keys` are the true ones."""

    def __init__(self, paper: PaperTpm | None = None) -> None:
        self.paper = paper or PaperTpm()
        self.pcrs = {pcr: GOOD_PCRS.get(pcr, bytes(32)) for pcr in range(24)}
        self.counter: tuple[bytes, bytes, int] | None = None
        self.highest = 0
        self.sessions: dict[str, bytes] = {}
        self.most_sessions = 0
        self.unsealed: list[str] = []
        self.broken = ""
        self._asked: EnrolAsk | None = None

    def reboot(self, *, image: dict[int, bytes] | None = None) -> None:
        """A power cut: sessions die, the reset count grows."""
        self.sessions.clear()
        self.paper.reset_count += 1
        self.pcrs.update(image or {})

    def _session(self, what: str) -> bytes:
        self.sessions.clear()  # a later call replaces what waits, as in the adapter
        self.sessions[what] = os.urandom(32)
        self.most_sessions = max(self.most_sessions, len(self.sessions))
        if len(self.sessions) > SESSIONS:
            raise WorldError("tpm", "out of sessions (0x903)")
        return self.sessions[what]

    async def enrol_ask(self) -> EnrolAsk:
        self._asked = self._asked or self.paper.ask()
        return self._asked

    async def prove(self, challenge: EnrolChallenge) -> EnrolProof:
        try:
            return self.paper.prove(challenge)
        except Exception as error:
            raise TheirsError("credential", f"the challenge does not open: {type(error).__name__}", remedy="enrol anew") from error

    async def adopt(self, enrolled: Enrolled) -> SealedKey:
        self._check_srk(enrolled)
        if enrolled.leased is None:
            raise TheirsError("import", "there is no leased key")
        own = self._import(enrolled.sealed_public, enrolled.duplicate, enrolled.seed)
        leased = enrolled.leased
        return SealedKey(enrolled=enrolled, private=own, leased_private=self._import(leased.public, leased.duplicate, leased.seed))

    def _import(self, public: bytes, duplicate: bytes, seed: bytes) -> bytes:
        class Part:
            sealed_public = public

        part: Any = Part()
        part.duplicate, part.seed = duplicate, seed
        try:
            return self.paper.unwrap(part)
        except Exception as error:
            raise TheirsError("import", "the sealed key was made for another storage key, or was altered (0x3df)") from error

    async def evidence(self, sealed: SealedKey, challenge: Challenge) -> Evidence:
        self._check_srk(sealed.enrolled)
        if not challenge.pcrs or any(pcr not in range(24) for pcr in challenge.pcrs):
            raise TheirsError("malformed", f"asks for PCRs {challenge.pcrs}")
        values = {pcr: self.pcrs[pcr] for pcr in challenge.pcrs}
        nonce = self._session("evidence")
        made = self.paper.evidence(challenge, values, nonce)
        self._quoted = values
        if self.counter is None or not self.counter[2]:
            return made
        name, _, value = self.counter
        attest = self.paper.attest(0x8014, quoted_nonce(challenge.nonce, nonce), sized(name) + bytes(2) + sized(value.to_bytes(8, "big")))
        fields = {field: getattr(made, field) for field in made.__struct_fields__}
        return Evidence(**{**fields, "counter_attest": attest, "counter_signature": sign(self.paper.ak, attest)})

    async def unseal(self, sealed: SealedKey, approval: Approval) -> bytes:
        nonce = self.sessions.pop("evidence", None)
        if nonce is None:
            raise TheirsError("expired", "no policy session waits")
        enrolled = sealed.enrolled
        public = approval.region_public or enrolled.region_public
        delegation = (approval.delegation, approval.delegation_signature) if approval.region_public else None
        approved, root_signature = delegation or (enrolled.delegation, enrolled.delegation_signature)
        values = self._quoted
        if any(self.pcrs[pcr] != value for pcr, value in values.items()):
            raise TheirsError("pcr", "PCRs changed since the quote (0x1c4)")
        if not -(2**31) <= approval.expiration_s < 2**31:
            raise TheirsError("malformed", "policy_signed: no such term")
        _verify(public, approval.session_signature, signed_consent(nonce, approval.expiration_s, enrolled.policy_ref), "0x5db")
        policy = Policy().pcr(values).signed(name_of(public), enrolled.policy_ref).command_code(Command.UNSEAL)
        self._authorize(policy, approval.approved, approval.approved_signature, public, enrolled.policy_ref)
        nested = Policy().authorize(name_of(public), enrolled.policy_ref)
        self._authorize(nested, approved, root_signature, enrolled.root_public, enrolled.policy_ref)
        self._guard(enrolled.sealed_public, enrolled, enrolled.policy_ref)
        self.unsealed.append("session")
        return sealed.private

    async def unseal_leased(self, sealed: SealedKey, grant: Grant, lease: Lease) -> bytes:
        enrolled, leased = sealed.enrolled, sealed.enrolled.leased
        self._check_srk(enrolled)
        if leased is None:
            raise TheirsError("no_lease", "no leased key")
        if any(self.pcrs.get(pcr) != value for pcr, value in lease.pcr_values.items()):
            raise TheirsError("pcr", "PCRs differ (0x1c4)")
        try:
            policy = lease_policy(lease.pcr_values, lease.clock_before_ms, lease.reset_count_max)
            counted = Policy().authorize(name_of(grant.region_public), leased.policy_ref)
            counted = counted.counter_is(self.counter[0] if self.counter else b"", grant.generation)
        except OverflowError as error:
            raise TheirsError("malformed", "a number that no TPM structure holds") from error
        if self.paper.clock_ms >= lease.clock_before_ms:
            raise TheirsError("term", "the lease's term ended (0x126)")
        if self.paper.reset_count > lease.reset_count_max:
            raise TheirsError("restarts", "restarted more often (0x126)")
        self._authorize(policy, lease.approved, lease.signature, grant.region_public, leased.policy_ref)
        if self.counter is None or self.counter[2] != grant.generation:
            raise TheirsError("generation", "the counter counted on (0x126)")
        self._authorize(counted, grant.delegation, grant.delegation_signature, enrolled.root_public, leased.policy_ref)
        self._guard(leased.public, enrolled, leased.policy_ref)
        self.unsealed.append("leased")
        return sealed.leased_private

    async def look(self, pcrs: Sequence[int]) -> Sight:
        if not pcrs or any(pcr not in range(24) for pcr in pcrs):
            raise TheirsError("malformed", f"PCRs {pcrs}")
        return Sight({pcr: self.pcrs[pcr] for pcr in pcrs}, self.paper.clock_ms, self.paper.reset_count)

    async def count_nonce(self, sealed: SealedKey, *, anew: bool) -> bytes:
        enrolled = sealed.enrolled
        try:
            policy = counter_policy(enrolled.root_public, enrolled.counter_ref)
        except TheirsError as error:
            raise TheirsError("malformed", f"root: {error}") from error
        if self.counter is None or self.counter[1] != policy:
            self.counter = (counter_name(enrolled.root_public, enrolled.counter_ref), policy, 0)
        return self._session("count") if anew or not self.counter[2] else b""

    async def count(self, sealed: SealedKey, consent: CountConsent) -> None:
        nonce = self.sessions.pop("count", None)
        if nonce is None or self.counter is None:
            raise TheirsError("expired", "no session waits to count")
        if not -(2**31) <= consent.expiration_s < 2**31:
            raise TheirsError("malformed", "count: no such term")
        reference = sealed.enrolled.counter_ref
        _verify(sealed.enrolled.root_public, consent.signature, signed_consent(nonce, consent.expiration_s, reference), "0x5db")
        self.highest += 1
        self.counter = (*self.counter[:2], self.highest)

    async def self_test(self) -> None:
        if self.broken:
            raise WorldError("self_test", self.broken, where="TPM self-test")

    def _check_srk(self, enrolled: Enrolled) -> None:
        if enrolled.srk_name != name_of(self.paper.srk_public):
            raise TheirsError("srk_name", "the TPM was cleared or exchanged")

    def _authorize(self, reached: Policy, approved: bytes, signature: bytes, public: bytes, reference: bytes) -> None:
        """PolicyAuthorize: the signature first, as VerifySignature comes first on a real one."""
        _verify(public, signature, approved + reference, "0x2db")
        if reached.digest != approved:
            raise TheirsError("policy", "what was approved is not what this device shows (0x1c4)")

    def _guard(self, public: bytes, enrolled: Enrolled, reference: bytes) -> None:
        if public[10:42] != Policy().authorize(name_of(enrolled.root_public), reference).digest:
            raise TheirsError("policy", "the approvals do not lead to the authority (0x99d)")


def _verify(public: bytes, signature: bytes, content: bytes, code: str) -> None:
    try:
        key = parse_public(public, "signing key").key
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise TheirsError("malformed", "not an ECC key")
        key.verify(parse_signature(signature, "signature"), content, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, OursError) as error:
        raise TheirsError("signature", f"not signed by the key that it names ({code})") from error


def digest(content: bytes) -> bytes:
    """SHA-256, as a boot stage measures."""
    return hashlib.sha256(content).digest()
