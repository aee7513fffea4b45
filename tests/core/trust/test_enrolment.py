"""The region's enrolment: only one whole TPM gets a record, and nothing that it is sent can break it."""

import os

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.contract.attest import EnrolAsk, EnrolChallenge, EnrolProof
from appliance.contract.errors import TheirsError, WorldError
from appliance.core.trust.approval import delegate, guarding_policy, policy_reference
from appliance.core.trust.enrolment import TICKET_S, Enrolment, Record, unpack
from appliance.core.trust.tpm_structures import pack_verifier
from appliance.core.trust.tpm_wire import sized
from tests.fakes.paper_tpm import GOOD_PCRS, WALL, PaperTpm, name_of, qualified, refusal_of, sign

ROOT = ec.generate_private_key(ec.SECP256R1())
ROOT_PUBLIC = pack_verifier(ROOT.public_key())
REGION_PUBLIC = pack_verifier(ec.generate_private_key(ec.SECP256R1()).public_key())
TPM = PaperTpm()
TRUSTED = TPM.maker.roots()
ASK = TPM.ask()


def machine(record: Record | None = None) -> Enrolment:
    return Enrolment("dev-1", root_public=ROOT_PUBLIC, trusted=TRUSTED, record=record)


def ask(enrolment: Enrolment, message: EnrolAsk = ASK, *, now: float = 0.0, taken: tuple[bytes, ...] = ()) -> EnrolChallenge:
    return enrolment.ask(message, now=now, wall=WALL, chance=os.urandom, taken=taken)


def enrol(tpm: PaperTpm, record: Record | None = None) -> Record:
    enrolment = machine(record)
    return enrolment.prove(tpm.prove(ask(enrolment, tpm.ask())), now=1.0, chance=os.urandom)


def refused(reason: str, enrolment: Enrolment, proof: EnrolProof, *, now: float = 1.0) -> TheirsError:
    with pytest.raises(TheirsError) as refusal:
        enrolment.prove(proof, now=now, chance=os.urandom)
    assert refusal.value.reason == reason
    assert enrolment.record is None
    return refusal.value


def test_a_whole_tpm_gets_one_record_and_its_key() -> None:
    """EK, AK, SRK of one ask end in one record; the device alone can unwrap the key that the record holds."""
    record = enrol(TPM)
    assert (record.ek_name, record.ak_name, record.srk_name) == tuple(map(name_of, (TPM.ek_public, TPM.ak_public, TPM.srk_public)))
    assert record.epoch == 1
    enrolled = record.enrolled(REGION_PUBLIC, delegate(ROOT, REGION_PUBLIC, record.reference))
    assert TPM.unwrap(enrolled) == record.kek
    assert enrolled.policy_ref == policy_reference(record.ek_name, 1)
    assert sized(guarding_policy(ROOT_PUBLIC, enrolled.policy_ref)) in enrolled.sealed_public


def test_another_attestation_key_in_the_proof_is_refused() -> None:
    """Keylime's mix (CVE-2022-1053): the EK was checked with one AK, the SRK is certified by another."""
    enrolment = machine()
    proof = TPM.prove(ask(enrolment))
    forged = msgspec.structs.replace(proof, certify_signature=sign(PaperTpm().ak, proof.certify_attest))
    assert "was not signed by this device's attestation key" in refused("certify", enrolment, forged).what


def test_a_storage_key_of_another_tpm_is_refused() -> None:
    """The AK must certify the very SRK that was shown, as a primary key of the owner hierarchy."""
    other = PaperTpm()
    for names in (
        sized(name_of(other.srk_public)) + sized(qualified(other.srk_public, 0x4000_0001)),
        sized(name_of(TPM.srk_public)) + sized(qualified(TPM.srk_public, 0x4000_000B)),
    ):
        enrolment = machine()
        challenge = ask(enrolment)
        attest = TPM.attest(0x8017, challenge.nonce, names)
        proof = msgspec.structs.replace(TPM.prove(challenge), certify_attest=attest, certify_signature=sign(TPM.ak, attest))
        refused("certify", enrolment, proof)


def test_a_wrong_secret_is_refused_and_spends_the_ticket() -> None:
    """Who can not open the credential gets one guess per ask."""
    enrolment = machine()
    proof = TPM.prove(ask(enrolment))
    refused("credential", enrolment, msgspec.structs.replace(proof, secret=b"g" * 32))
    refused("ticket", enrolment, proof)


def test_a_ticket_is_spent_by_its_proof() -> None:
    """The same proof again makes no second epoch."""
    enrolment = machine()
    proof = TPM.prove(ask(enrolment))
    record = enrolment.prove(proof, now=1.0, chance=os.urandom)
    with pytest.raises(TheirsError, match="used already"):
        enrolment.prove(proof, now=1.0, chance=os.urandom)
    assert enrolment.record is record


def test_a_made_up_ticket_leaves_the_pending_one_alone() -> None:
    """A stranger's guess does not disturb an enrolment under way."""
    enrolment = machine()
    proof = TPM.prove(ask(enrolment))
    refused("ticket", enrolment, msgspec.structs.replace(proof, ticket="0" * 32))
    assert enrolment.prove(proof, now=1.0, chance=os.urandom).epoch == 1


def test_a_late_proof_is_refused() -> None:
    """60 s, then a new ask is needed; the last moment counts as in time."""
    enrolment = machine()
    proof = TPM.prove(ask(enrolment))
    assert enrolment.deadline() == TICKET_S
    assert "answered 61 s after the challenge" in refused("expired", enrolment, proof, now=61.0).what
    assert machine_answers_at(TICKET_S)


def machine_answers_at(now: float) -> bool:
    enrolment = machine()
    return enrolment.prove(TPM.prove(ask(enrolment)), now=now, chance=os.urandom).epoch == 1


def test_a_certificate_out_of_date_stops_the_ask() -> None:
    """The wall clock is an argument, and it is used."""
    with pytest.raises(TheirsError, match="check this machine's clock"):
        machine().ask(ASK, now=0.0, wall=0.0, chance=os.urandom)


@pytest.mark.parametrize(
    ("part", "attributes", "told"),
    [
        ("ak", 0x0004_0472, "lacks RESTRICTED"),
        ("ak", 0x0005_0470, "lacks FIXED_TPM"),
        ("ak", 0x0007_0472, "must not have DECRYPT"),
        ("srk", 0x0003_0462, "lacks FIXED_PARENT"),
        ("srk", 0x0002_0472, "lacks RESTRICTED"),
    ],
)
def test_a_key_that_could_leave_or_sign_anything_is_refused(part: str, attributes: int, told: str) -> None:
    """An unrestricted AK would sign forged quotes; a movable SRK would take the key along."""
    tpm = PaperTpm()
    setattr(tpm, f"{part}_attributes", attributes)
    with pytest.raises(TheirsError, match=told) as refusal:
        ask(machine(), tpm.ask())
    assert refusal.value.reason == f"{part}_attributes"


def test_an_attestation_key_in_the_owner_hierarchy_is_refused() -> None:
    """Its quotes would hide the reset count."""
    tpm = PaperTpm()
    tpm.ak_hierarchy = 0x4000_0001
    enrolment = machine()
    proof = tpm.prove(ask(enrolment, tpm.ask()))
    assert "endorsement hierarchy" in refused("certify", enrolment, proof).what


def test_enrolling_again_makes_a_new_key_and_keeps_the_lessons() -> None:
    """A new epoch with a new key; learned PCRs stay; the reset count stays with the same SRK and starts anew with another."""
    first = msgspec.structs.replace(enrol(TPM), pcr_values=GOOD_PCRS, reset_count=9)
    second = enrol(TPM, first)
    assert (second.epoch, second.pcr_values, second.reset_count) == (2, GOOD_PCRS, 9)
    assert second.kek != first.kek
    assert second.reference != first.reference
    cleared = PaperTpm()
    assert (enrol(cleared, first).reset_count, enrol(cleared, first).pcr_values) == (0, GOOD_PCRS)


def test_a_device_keeps_its_tpm_and_a_tpm_its_device() -> None:
    """Another TPM under an enrolled name, and an enrolled TPM under another name, are refused."""
    record = enrol(TPM)
    other = PaperTpm(ek="other")
    with pytest.raises(TheirsError) as changed:
        ask(machine(record), other.ask())
    assert changed.value.reason == "ek_changed"
    with pytest.raises(TheirsError) as taken:
        ask(machine(), taken=(record.ek_name,))
    assert taken.value.reason == "ek_taken"


def test_the_record_survives_the_disk_and_hides_its_key() -> None:
    """JSON and back is equal; the key can be kept apart and is never printed."""
    record = msgspec.structs.replace(enrol(TPM), pcr_values=GOOD_PCRS)
    assert unpack(record.pack()) == record
    apart = unpack(record.without_key().pack())
    assert (apart.kek, apart.leased_kek) == (b"", b"")
    assert apart.with_key(record.kek, record.leased_kek) == record
    for key in (record.kek, record.leased_kek):
        assert key.hex() not in repr(record)
        assert repr(key)[2:-1] not in repr(record)


@given(st.data())
def test_a_damaged_record_is_not_taken_for_a_good_one(data: st.DataObject) -> None:
    """A cut file is told as damaged, by a WorldError that says what to do."""
    packed = PACKED
    with pytest.raises(WorldError, match="damaged"):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])


PACKED = enrol(TPM).pack()
FIELDS = st.sampled_from(["ek_public", "ak_public", "srk_public", "certificate"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # the library warns of odd certificates before it refuses them
@settings(max_examples=200, deadline=None)
@given(FIELDS, st.data())
def test_a_mutated_ask_is_refused_with_a_reason(part: str, data: st.DataObject) -> None:
    """Every byte of an ask may be wrong: refused, or challenged so that only the true TPM could answer; never another exception."""
    original = ASK.ek_certificates[0] if part == "certificate" else getattr(ASK, part)
    mutated = mutate(original, data)
    message = msgspec.structs.replace(ASK, **({"ek_certificates": [mutated]} if part == "certificate" else {part: mutated}))
    refusal = refusal_of(lambda: ask(machine(), message))
    assert refusal is None or refusal.reason in {
        "malformed",
        "ek_certificate",
        "ek_mismatch",
        "ek_template",
        "ak_attributes",
        "srk_attributes",
    }


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["ticket", "secret", "certify_attest", "certify_signature"]), st.data())
def test_a_mutated_proof_is_refused_with_a_reason(part: str, data: st.DataObject) -> None:
    """Every byte of a proof may be wrong: no record, no other exception."""
    enrolment = machine()
    proof = TPM.prove(ask(enrolment))
    original = getattr(proof, part)
    mutated = mutate(original, data) if isinstance(original, bytes) else data.draw(st.text(max_size=40))
    changed = msgspec.structs.replace(proof, **{part: mutated})
    refusal = refusal_of(lambda: enrolment.prove(changed, now=1.0, chance=os.urandom))
    assert (refusal is None) == (mutated == original) == (enrolment.record is not None)
    assert refusal is None or refusal.reason in {"malformed", "ticket", "credential", "certify"}


def mutate(content: bytes, data: st.DataObject) -> bytes:
    at = data.draw(st.integers(0, len(content)))
    return content[:at] + data.draw(st.binary(max_size=4)) + content[at + data.draw(st.integers(0, 4)) :]
