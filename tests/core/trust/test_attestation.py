"""The region's verdict on a quote: fresh, of this device, of this state; nothing that it is sent can break it."""

import os
from dataclasses import replace

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule

from appliance.contract.attest import Challenge, Evidence
from appliance.contract.codec import decode, encode
from appliance.contract.errors import TheirsError
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.attestation import NONCE_S, Attestation
from appliance.core.trust.enrolment import Enrolment, Record
from appliance.core.trust.tpm_structures import pack_verifier
from tests.fakes.paper_tpm import GOOD_PCRS, WALL, PaperTpm, refusal_of, sign

ROOT = ec.generate_private_key(ec.SECP256R1())
REGION = ec.generate_private_key(ec.SECP256R1())
POLICY = PcrPolicy("floor", allowed={pcr: [value] for pcr, value in GOOD_PCRS.items()})
TPM = PaperTpm()


def enrol(tpm: PaperTpm) -> Record:
    enrolment = Enrolment("dev-1", root_public=pack_verifier(ROOT.public_key()), trusted=tpm.maker.roots())
    challenge = enrolment.ask(tpm.ask(), now=0.0, wall=WALL, chance=os.urandom)
    return enrolment.prove(tpm.prove(challenge), now=0.0, chance=os.urandom)


RECORD = enrol(TPM)


def machine(record: Record = RECORD, policy: PcrPolicy = POLICY) -> Attestation:
    return Attestation(record, region=REGION, policy=policy)


def challenge(attestation: Attestation, now: float = 0.0) -> Challenge:
    return attestation.ask(now=now, chance=os.urandom)


def refused(reason: str, attestation: Attestation, evidence: Evidence, now: float = 1.0) -> TheirsError:
    before = attestation.record
    with pytest.raises(TheirsError) as refusal:
        attestation.judge(evidence, now=now)
    assert refusal.value.reason == reason
    assert attestation.record is before
    return refusal.value


def test_a_fresh_good_quote_is_approved_for_its_session() -> None:
    """The approval is for 60 s, and each session gets another one."""
    attestation = machine()
    first = attestation.judge(TPM.evidence(challenge(attestation)), now=1.0)
    second = attestation.judge(TPM.evidence(challenge(attestation)), now=2.0)
    assert first.approval.expiration_s == 60
    assert first.approval.approved == second.approval.approved
    assert first.approval.session_signature != second.approval.session_signature
    assert first.record.reset_count == TPM.reset_count
    assert second.record is first.record


def test_a_nonce_is_spent_by_its_evidence() -> None:
    """A replay is refused, after a good verdict and after a refusal."""
    attestation = machine()
    evidence = TPM.evidence(challenge(attestation))
    attestation.judge(evidence, now=1.0)
    refused("nonce", attestation, evidence)
    bad = TPM.evidence(challenge(attestation), {**GOOD_PCRS, 11: b"x" * 32})
    refused("pcr", attestation, bad)
    refused("nonce", attestation, bad)


def test_a_newer_challenge_replaces_the_older() -> None:
    """At most one nonce is open, whatever a device asks for."""
    attestation = machine()
    old, new = challenge(attestation), challenge(attestation)
    refused("nonce", attestation, TPM.evidence(old))
    assert attestation.judge(TPM.evidence(new), now=1.0)


def test_late_evidence_is_refused() -> None:
    """60 s, the last moment included."""
    attestation = machine()
    evidence = TPM.evidence(challenge(attestation))
    assert attestation.deadline() == NONCE_S
    assert "answered 61 s after" in refused("expired", attestation, evidence, now=61.0).what
    assert attestation.judge(TPM.evidence(challenge(attestation)), now=NONCE_S)


def test_a_swapped_session_nonce_is_refused() -> None:
    """The quote is bound to its session: nobody gets an approval for a session of his own."""
    attestation = machine()
    evidence = msgspec.structs.replace(TPM.evidence(challenge(attestation)), session_nonce=b"s" * 32)
    assert "another nonce" in refused("quote", attestation, evidence).what
    short = msgspec.structs.replace(TPM.evidence(challenge(attestation)), session_nonce=b"s" * 31)
    refused("malformed", attestation, short)


def test_another_device_can_not_answer() -> None:
    """A quote by another TPM's attestation key, over the right nonce, is refused."""
    attestation = machine()
    other = PaperTpm()
    assert "attestation key" in refused("quote", attestation, other.evidence(challenge(attestation))).what


def test_values_that_were_not_quoted_are_refused() -> None:
    """Good values beside a quote over bad ones do not pass."""
    attestation = machine()
    bad = TPM.evidence(challenge(attestation), {**GOOD_PCRS, 11: b"x" * 32})
    assert "not the ones that were quoted" in refused("quote", attestation, msgspec.structs.replace(bad, pcr_values=GOOD_PCRS)).what


def test_a_quote_over_fewer_pcrs_is_refused() -> None:
    """The quote covers exactly what was asked for, not less beside the right values."""
    attestation = machine()
    fewer = {pcr: value for pcr, value in GOOD_PCRS.items() if pcr != 11}
    refused("pcr_set", attestation, TPM.evidence(challenge(attestation), fewer))
    evidence = msgspec.structs.replace(TPM.evidence(challenge(attestation), fewer), pcr_values=GOOD_PCRS)
    assert "does not cover exactly" in refused("quote", attestation, evidence).what


def test_a_certification_is_no_quote() -> None:
    """A statement of another kind by the right key over the right nonce is refused."""
    attestation = machine()
    asked = challenge(attestation)
    evidence = TPM.evidence(asked)
    other = evidence.quote_attest.replace(b"\x80\x18", b"\x80\x17", 1)
    forged = msgspec.structs.replace(evidence, quote_attest=other, quote_signature=sign(TPM.ak, other))
    refused("malformed", attestation, forged)


def test_a_reset_count_that_went_back_is_refused() -> None:
    """TPM2_Clear and a restored TPM state are seen; a reboot is not held against a device."""
    attestation = machine(msgspec.structs.replace(RECORD, reset_count=TPM.reset_count + 4))
    assert "went back from 7 to 3" in refused("reset_count", attestation, TPM.evidence(challenge(attestation))).what
    rebooted = machine(msgspec.structs.replace(RECORD, reset_count=TPM.reset_count - 1))
    assert rebooted.judge(TPM.evidence(challenge(rebooted)), now=1.0).record.reset_count == TPM.reset_count


def test_first_use_is_kept_in_the_record() -> None:
    """What was learned survives the disk and binds the next quote; a refused quote teaches nothing."""
    attestation = machine(policy=replace(POLICY, allowed={}, trust_on_first_use=True))
    verdict = attestation.judge(TPM.evidence(challenge(attestation)), now=1.0)
    assert verdict.record.pcr_values == GOOD_PCRS
    again = machine(verdict.record, replace(POLICY, allowed={}, trust_on_first_use=True))
    refused("pcr", again, TPM.evidence(challenge(again), {**GOOD_PCRS, 5: b"x" * 32}))


def test_the_key_is_not_needed_to_attest() -> None:
    """A region whose store keeps the key apart attests all the same."""
    attestation = machine(RECORD.without_key())
    assert attestation.judge(TPM.evidence(challenge(attestation)), now=1.0).record.kek == b""


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["nonce", "quote_attest", "quote_signature", "session_nonce"]), st.data())
def test_mutated_evidence_is_refused_with_a_reason(part: str, data: st.DataObject) -> None:
    """Every byte of the evidence may be wrong: no approval, no other exception."""
    attestation = machine()
    evidence = TPM.evidence(challenge(attestation))
    original = getattr(evidence, part)
    at = data.draw(st.integers(0, len(original)))
    mutated = original[:at] + data.draw(st.binary(max_size=4)) + original[at + data.draw(st.integers(0, 4)) :]
    refusal = refusal_of(lambda: attestation.judge(msgspec.structs.replace(evidence, **{part: mutated}), now=1.0))
    assert (refusal is None) == (mutated == original)
    assert refusal is None or refusal.reason in {"nonce", "malformed", "quote"}


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(-1, 300), st.binary(max_size=40) | st.just(bytes(32)), max_size=10))
def test_odd_pcr_values_are_refused_with_a_reason(values: dict[int, bytes]) -> None:
    """Whatever values stand beside a good quote, only the quoted ones pass."""
    attestation = machine()
    evidence = msgspec.structs.replace(TPM.evidence(challenge(attestation)), pcr_values=values)
    with pytest.raises(TheirsError):
        attestation.judge(evidence, now=1.0)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_bytes_on_the_wire_are_refused(data: st.DataObject) -> None:
    """The JSON itself cut or changed: the codec or the machine refuses."""
    attestation = machine()
    evidence = TPM.evidence(challenge(attestation))
    wire = encode(evidence)
    at = data.draw(st.integers(0, len(wire)))
    mutated = wire[:at] + data.draw(st.binary(max_size=4)) + wire[at + data.draw(st.integers(0, 4)) :]
    refusal = refusal_of(lambda: attestation.judge(decode(mutated, Evidence), now=1.0))
    assert refusal is not None or decode(mutated, Evidence) == evidence
    assert refusal is None or refusal.what


class Exchange(RuleBasedStateMachine):
    """Challenges, evidence, replays and time in any order: an approval comes only for the newest unspent nonce in its time."""

    evidences = Bundle("evidences")

    def __init__(self) -> None:
        super().__init__()
        self.attestation = machine()
        self.now = 0.0
        self.newest = b""
        self.asked_at = 0.0

    @rule(target=evidences, good=st.booleans())
    def ask(self, good: bool) -> tuple[Evidence, bool]:
        """The device asks and quotes, in a good or a bad state."""
        asked = self.attestation.ask(now=self.now, chance=os.urandom)
        self.newest, self.asked_at = asked.nonce, self.now
        values = GOOD_PCRS if good else {**GOOD_PCRS, 4: b"x" * 32}
        return TPM.evidence(asked, values), good

    @rule(seconds=st.sampled_from([1.0, 59.0, 61.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds

    @rule(pair=evidences)
    def send(self, pair: tuple[Evidence, bool]) -> None:
        """Some evidence arrives, perhaps again, perhaps late."""
        evidence, good = pair
        due = evidence.nonce == self.newest and self.now - self.asked_at <= NONCE_S and good
        if evidence.nonce == self.newest:
            self.newest = b""
        refusal = refusal_of(lambda: self.attestation.judge(evidence, now=self.now))
        assert (refusal is None) == due, refusal


Exchange.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestExchange = Exchange.TestCase
