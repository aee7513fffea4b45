"""The attestation exchange on a real software TPM: what opens the key, and every way in which it stays shut."""

import asyncio
import hashlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import msgspec
import pytest
from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CC, TPM2_SE
from tpm2_pytss.types import TPM2B_ENCRYPTED_SECRET, TPM2B_ID_OBJECT
from tpm2_pytss.utils import NVReadEK, create_ek_template

from appliance.adapters.tpm import EsysTpm
from appliance.adapters.tpm import esys as adapter
from appliance.adapters.tpm.objects import attestation_key, handles, hold, selection, unpack_public, unpack_signature
from appliance.contract.attest import Approval, Challenge
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.approval import approve_session, delegate
from appliance.core.trust.credential import make_credential
from appliance.core.trust.endorsement import _check_template
from appliance.core.trust.policy import Policy
from appliance.core.trust.tpm_structures import pack_verifier, parse_public
from appliance.core.trust.tpm_wire import Command
from appliance.lab import softtpm
from appliance.ports import SealedKey
from tests.fakes.soft_tpm import Region, Software, attest, enrol, held, opened, refused

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`


async def test_an_attested_device_opens_its_key(software: Software, tpm: EsysTpm, region: Region) -> None:
    """Enrol, attest, unseal: the device holds the very key that the region recorded; and again in a new session."""
    await software.boot(tpm)
    sealed = await enrol(tpm, region)
    assert region.record
    assert await opened(tpm, region, sealed) == region.record.kek
    assert await opened(tpm, region, sealed) == region.record.kek
    assert await held(tpm) == []


async def test_the_key_survives_reboot_and_power_cut(software: Software, tpm: EsysTpm, region: Region) -> None:
    """A session that waited is gone with the power, as the world's fault; the same image opens the same key after a new attestation."""
    software.restart()
    await software.boot(tpm)
    sealed = await enrol(tpm, region)
    kek = await opened(tpm, region, sealed)
    assert region.record
    count = region.record.reset_count
    waiting = await attest(tpm, region, sealed)
    software.restart()
    with pytest.raises(WorldError) as lost:
        await tpm.unseal(sealed, waiting.approval)
    assert lost.value.reason == "tpm"
    assert await held(tpm) == []
    await software.boot(tpm)
    assert await opened(tpm, region, msgspec.json.decode(msgspec.json.encode(sealed), type=SealedKey)) == kek
    assert region.record.reset_count == count + 1


async def test_many_power_cuts_do_not_lock_the_tpm(software: Software, region: Region) -> None:
    """Each cut counts as a wrong password against keys without noDA (three lock them): ours have it, so the sixth boot enrols and attests too."""
    for _ in range(6):
        region.record = None
        tpm = EsysTpm(software.tcti)
        assert await opened(tpm, region, await enrol(tpm, region))
        software.restart()
        await tpm.close()


async def test_another_image_is_refused_in_an_operators_words(tpm: EsysTpm, region: Region) -> None:
    """A changed kernel shows in PCR 11; the region says so, and approves nothing."""
    sealed = await enrol(tpm, region)
    await opened(tpm, region, sealed)
    assert region.record
    expected = region.record.pcr_values[11].hex()[:12]
    await tpm.extend(11, b"\xee" * 32)
    with pytest.raises(
        TheirsError, match=rf"PCR 11 differs \(kernel image and boot phase\): expected {expected}…, saw [0-9a-f]{{12}}…"
    ) as refusal:
        await attest(tpm, region, sealed)
    assert refusal.value.reason == "pcr"


async def test_a_boot_that_measured_nothing_is_refused(software: Software, tpm: EsysTpm, region: Region) -> None:
    """Zero anchors prove nothing; with the lab's measured boot they are not zero."""
    region.policy = PcrPolicy("strict", trust_on_first_use=True)
    software.restart()
    sealed = await enrol(tpm, region)
    with pytest.raises(TheirsError, match=r"PCR 0 \(firmware\) and PCR 4 \(boot loader\) was never extended") as refusal:
        await attest(tpm, region, sealed)
    assert refusal.value.reason == "anchor"
    await software.boot(tpm)
    assert await opened(tpm, region, sealed)


async def test_a_pcr_that_changes_after_the_quote_shuts_the_key(tpm: EsysTpm, region: Region) -> None:
    """The approval is for the quoted state; a PCR outside the set may move meanwhile."""
    sealed = await enrol(tpm, region)
    verdict = await attest(tpm, region, sealed)
    await tpm.extend(8, b"\xee" * 32)
    assert await tpm.unseal(sealed, verdict.approval)
    verdict = await attest(tpm, region, sealed)
    await tpm.extend(7, b"\xee" * 32)
    await refused(tpm, sealed, verdict.approval, "pcr", "PCRs changed since the quote")


async def test_a_pcr_that_changes_while_unsealing_shuts_the_key(tpm: EsysTpm, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any extended PCR between the policy and the unsealing makes the TPM refuse (0x128): attest again."""
    sealed = await enrol(tpm, region)
    verdict = await attest(tpm, region, sealed)
    original = adapter.pinned_storage_key

    def racing(esys: ESAPI, *args: Any) -> ESYS_TR:
        tpm._extend(esys, 10, b"\xee" * 32)
        return original(esys, *args)

    monkeypatch.setattr(adapter, "pinned_storage_key", racing)
    await refused(tpm, sealed, verdict.approval, "pcr", r"at unseal \(0x128\).*while the key was being opened")
    monkeypatch.undo()
    assert await opened(tpm, region, sealed)


async def test_an_approval_is_for_one_session(tpm: EsysTpm, region: Region) -> None:
    """Replayed in a later session it is refused, though nothing else changed."""
    sealed = await enrol(tpm, region)
    verdict = await attest(tpm, region, sealed)
    assert await tpm.unseal(sealed, verdict.approval)
    await refused(tpm, sealed, verdict.approval, "expired", "no policy session waits")
    await attest(tpm, region, sealed)
    await refused(tpm, sealed, verdict.approval, "signature", r"0x5db.*for another session")


async def test_a_rogue_region_opens_nothing(tpm: EsysTpm, region: Region) -> None:
    """Another key's approval; another key put in the region's place; with a forged delegation; with a forged root: each refused at its step."""
    sealed = await enrol(tpm, region)
    assert region.record
    rogue = Region(region.trusted, record=region.record)
    reference = region.record.reference
    own_root = pack_verifier(rogue.root.public_key())
    forged = delegate(rogue.root, rogue.public, reference)
    replaced = {"region_public": rogue.public}
    delegated = {**replaced, "delegation": forged.approved, "delegation_signature": forged.signature}
    for change, reason, told in (
        ({}, "signature", "0x5db"),
        (replaced, "policy", r"policy_authorize \(0x1c4\)"),
        (delegated, "signature", r"verify \(0x2db\)"),
        ({**delegated, "root_public": own_root}, "policy", r"unseal \(0x99d\)"),
    ):
        bent = msgspec.structs.replace(sealed.enrolled, **change)
        rogue.record = region.record
        verdict = await attest(tpm, rogue, sealed)
        await refused(tpm, SealedKey(enrolled=bent, private=sealed.private), verdict.approval, reason, told)


async def test_an_approval_for_another_device_or_epoch_opens_nothing(tpm: EsysTpm, region: Region) -> None:
    """The reference binds each signature to one EK and one epoch, even in the right session with the right state."""
    sealed = await enrol(tpm, region)
    assert region.record
    for change in ({"ek_name": b"\0\x0b" + b"x" * 32}, {"epoch": 2}):
        machine = region.attestation()
        evidence = await tpm.evidence(sealed, machine.ask(now=0.0, chance=os.urandom))
        other = msgspec.structs.replace(region.record, **change)
        approval = approve_session(region.key, other.reference, evidence.pcr_values, evidence.session_nonce)
        await refused(tpm, sealed, approval, "signature", "0x5db")


async def test_a_changed_term_is_refused(tpm: EsysTpm, region: Region) -> None:
    """The device can not give itself more time: the expiration is signed."""
    sealed = await enrol(tpm, region)
    verdict = await attest(tpm, region, sealed)
    await refused(tpm, sealed, msgspec.structs.replace(verdict.approval, expiration_s=3600), "signature", "another term")


@pytest.mark.slow
async def test_an_approval_expires(tpm: EsysTpm, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its term the TPM refuses the consent by its own clock, when it is shown and also when the key is opened."""
    sealed = await enrol(tpm, region)
    original = adapter.pinned_storage_key

    def slow(*args: Any) -> ESYS_TR:
        time.sleep(1.1)
        return original(*args)

    for late, told in (("shown", "policy_signed.*0x4e3"), ("used", "unseal.*0x9a3")):
        machine = region.attestation()
        evidence = await tpm.evidence(sealed, machine.ask(now=0.0, chance=os.urandom))
        assert region.record
        approval = approve_session(region.key, region.record.reference, evidence.pcr_values, evidence.session_nonce, expiration_s=1)
        if late == "shown":
            await asyncio.sleep(1.1)
        else:
            monkeypatch.setattr(adapter, "pinned_storage_key", slow)
        await refused(tpm, sealed, approval, "expired", told)


async def test_an_approval_for_other_pcrs_is_refused(tpm: EsysTpm, region: Region) -> None:
    """A valid approval by the region for another state does not fit this one."""
    sealed = await enrol(tpm, region)
    assert region.record
    machine = region.attestation()
    evidence = await tpm.evidence(sealed, machine.ask(now=0.0, chance=os.urandom))
    values = {**evidence.pcr_values, 11: b"x" * 32}
    approval = approve_session(region.key, region.record.reference, values, evidence.session_nonce)
    await refused(tpm, sealed, approval, "policy", "not what this device shows")


async def test_a_foreign_storage_key_stops_everything(tpm: EsysTpm, region: Region) -> None:
    """Pinned name and computed name differ: no import, no salted session, no unsealing under it; a blob for another SRK is not imported."""
    sealed = await enrol(tpm, region)
    foreign = msgspec.structs.replace(sealed.enrolled, srk_name=b"\0\x0b" + b"f" * 32)
    bent = SealedKey(enrolled=foreign, private=sealed.private)
    machine = region.attestation()
    for work in (tpm.adopt(foreign), tpm.evidence(bent, machine.ask(now=0.0, chance=os.urandom))):
        with pytest.raises(TheirsError, match="the TPM was cleared or exchanged") as refusal:
            await work
        assert refusal.value.reason == "srk_name"
    verdict = await attest(tpm, region, sealed)
    await refused(tpm, bent, verdict.approval, "srk_name", "its bus is tapped")
    verdict = await attest(tpm, region, sealed)
    tampered = bytes([sealed.private[0], sealed.private[1], sealed.private[2] ^ 1]) + sealed.private[3:]
    await refused(tpm, SealedKey(enrolled=sealed.enrolled, private=tampered), verdict.approval, "import", "not of this storage key")
    other = await enrol(tpm, region)
    mixed = msgspec.structs.replace(sealed.enrolled, duplicate=other.enrolled.duplicate)
    with pytest.raises(TheirsError) as refusal:
        await tpm.adopt(mixed)
    assert refusal.value.reason == "import"


async def test_a_cleared_tpm_is_noticed(software: Software, tpm: EsysTpm, region: Region) -> None:
    """TPM2_Clear gives a new SRK and a reset count from zero: the device stops, and so does the region for an old record."""
    software.restart()
    sealed = await enrol(tpm, region)
    await opened(tpm, region, sealed)
    assert region.record
    assert region.record.reset_count > 0
    await tpm._run(lambda esys: esys.clear(ESYS_TR.LOCKOUT))
    machine = region.attestation()
    with pytest.raises(TheirsError) as refusal:
        await tpm.evidence(sealed, machine.ask(now=0.0, chance=os.urandom))
    assert refusal.value.reason == "srk_name"
    before = region.record
    renewed = await enrol(tpm, region)
    assert region.record.epoch == before.epoch + 1
    region.record = msgspec.structs.replace(region.record, reset_count=before.reset_count)
    with pytest.raises(TheirsError, match="the reset count went back from") as refusal:
        await attest(tpm, region, renewed)
    assert refusal.value.reason == "reset_count"


async def test_a_credential_for_another_attestation_key_does_not_open(tpm: EsysTpm, region: Region) -> None:
    """EK and AK of one TPM only: the credential names the AK."""
    machine = region.enrolment()
    ask = await tpm.enrol_ask()
    challenge = machine.ask(ask, now=0.0, wall=time.time(), chance=os.urandom)
    foreign = make_credential(parse_public(ask.ek_public, "EK"), b"\0\x0b" + b"a" * 32, b"s" * 32, os.urandom)
    swapped = msgspec.structs.replace(challenge, credential=foreign.blob, secret=foreign.secret)
    mixed = msgspec.structs.replace(challenge, secret=foreign.secret)
    for bent in (swapped, mixed):
        with pytest.raises(TheirsError, match="made for another") as refusal:
            await tpm.prove(bent)
        assert refusal.value.reason == "credential"
    assert await held(tpm) == []


async def test_region_refusals_with_real_evidence(tpm: EsysTpm, region: Region) -> None:
    """Replayed nonce, late nonce, wrong ticket: refused by the machines with what a real TPM made."""
    sealed = await enrol(tpm, region)
    machine = region.attestation()
    evidence = await tpm.evidence(sealed, machine.ask(now=0.0, chance=os.urandom))
    machine.judge(evidence, now=1.0)
    with pytest.raises(TheirsError, match="a replay"):
        machine.judge(evidence, now=2.0)
    evidence = await tpm.evidence(sealed, machine.ask(now=0.0, chance=os.urandom))
    with pytest.raises(TheirsError, match="answered 61 s after"):
        machine.judge(evidence, now=61.0)
    enrolment = region.enrolment()
    proof = await tpm.prove(enrolment.ask(await tpm.enrol_ask(), now=0.0, wall=time.time(), chance=os.urandom))
    with pytest.raises(TheirsError, match="names no pending enrolment"):
        enrolment.prove(msgspec.structs.replace(proof, ticket="0" * 32), now=1.0, chance=os.urandom)


async def test_policy_digests_are_those_of_the_tpm(tpm: EsysTpm, region: Region) -> None:
    """A trial session computes the same digest as ours after each assertion, PolicyPCR to nested PolicyAuthorize."""
    sealed = await enrol(tpm, region)
    evidence = await tpm.evidence(sealed, region.attestation().ask(now=0.0, chance=os.urandom))
    reference, name = sealed.enrolled.policy_ref, parse_public(region.public, "region").name

    def trial(esys: ESAPI) -> list[bytes]:
        session = esys.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.TRIAL, None, TPM2_ALG.SHA256)
        seen = []
        try:
            esys.policy_pcr(session, b"", selection(sorted(evidence.pcr_values)))
            seen.append(bytes(esys.policy_get_digest(session)))
            key = esys.load_external(unpack_public(region.public), None, ESYS_TR.OWNER)
            assert bytes(esys.tr_get_name(key)) == name
            signature = unpack_signature(approve(evidence).session_signature)
            nonce = esys.trsess_get_nonce_tpm(session)
            esys.policy_signed(key, session, signature, nonce_tpm=nonce, policy_ref=reference, expiration=60)
            seen.append(bytes(esys.policy_get_digest(session)))
            esys.policy_command_code(session, TPM2_CC.Unseal)
            seen.append(bytes(esys.policy_get_digest(session)))
            ticket = unpack_signature(approve(evidence).approved_signature)
            digest = hashlib.sha256(seen[-1] + reference).digest()
            verified = esys.verify_signature(key, digest, ticket)
            esys.policy_authorize(session, seen[-1], name, verified, policy_ref=reference)
            seen.append(bytes(esys.policy_get_digest(session)))
            esys.flush_context(key)
        finally:
            esys.flush_context(session)
        return seen

    def approve(shown: Any) -> Approval:
        return approve_session(region.key, reference, shown.pcr_values, shown.session_nonce)

    pcr = Policy().pcr(evidence.pcr_values)
    signed = pcr.signed(name, reference)
    coded = signed.command_code(Command.UNSEAL)
    expected = [pcr.digest, signed.digest, coded.digest, coded.authorize(name, reference).digest]
    assert await tpm._run(trial) == expected
    assert approve(evidence).approved == coded.digest


async def test_an_ecc_endorsement_key_activates_our_credential(tpm: EsysTpm) -> None:
    """P-384 with SHA-384 and AES-256 (template H-3): the secret comes back."""

    def activate(esys: ESAPI) -> bytes:
        with adapter.ExitStack() as loaded:
            template = create_ek_template("EK-HIGH-ECC384", NVReadEK(esys))[1]
            ek = hold(esys, loaded, esys.create_primary(None, template, ESYS_TR.ENDORSEMENT)[0])
            public = parse_public(bytes(esys.read_public(ek)[0].publicArea.marshal()), "EK")
            _check_template(public)
            ak = attestation_key(esys, loaded)[0]
            made = make_credential(public, bytes(esys.tr_get_name(ak)), b"s" * 32, os.urandom)
            blob, secret = TPM2B_ID_OBJECT(made.blob), TPM2B_ENCRYPTED_SECRET(made.secret)
            return bytes(esys.activate_credential(ak, ek, blob, secret, session2=ESYS_TR.PASSWORD))

    assert await tpm._run(activate) == b"s" * 32


async def test_a_waiting_session_is_given_up(software: Software, region: Region) -> None:
    """Unanswered evidence frees its session after its time, and at close; the key then needs a new attestation."""
    tpm = EsysTpm(software.tcti, session_s=0.2)
    sealed = await enrol(tpm, region)
    verdict = await attest(tpm, region, sealed)
    assert len(await held(tpm)) == 1
    await asyncio.sleep(0.4)
    assert await held(tpm) == []
    await refused(tpm, sealed, verdict.approval, "expired", "attest again")
    await attest(tpm, region, sealed)
    await tpm.close()
    other = EsysTpm(software.tcti)
    assert await held(other) == []
    await other.close()


async def test_fifty_rounds_leave_nothing_behind(tpm: EsysTpm, region: Region) -> None:
    """Good, replayed, abandoned and broken rounds in turn: no session and no transient object stays in a TPM with room for three."""
    sealed = await enrol(tpm, region)
    assert region.record
    last = (await attest(tpm, region, sealed)).approval
    for turn in range(50):
        verdict = await attest(tpm, region, sealed)
        match turn % 4:
            case 0:
                assert await tpm.unseal(sealed, verdict.approval) == region.record.kek
            case 1:
                await refused(tpm, sealed, last, "signature", "0x5db")
            case 2:
                await refused(tpm, sealed, msgspec.structs.replace(verdict.approval, approved=b"x" * 32), "signature", "0x2db")
        last = verdict.approval
    assert len(await held(tpm)) <= 1
    assert await opened(tpm, region, sealed) == region.record.kek
    assert await held(tpm) == []


async def test_what_a_killed_process_left_is_swept(software: Software, region: Region) -> None:
    """A daemon that died with sessions and objects loaded does not lock its successor out."""
    with closing(ESAPI(software.tcti)) as dying:
        for _ in range(3):
            dying.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, None, TPM2_ALG.SHA256)
        with adapter.ExitStack() as kept:
            attestation_key(dying, kept)
            kept.pop_all()
        assert len(handles(dying)) == 4
    tpm = EsysTpm(software.tcti)
    assert await held(tpm) == []
    assert await opened(tpm, region, await enrol(tpm, region))
    await tpm.close()


async def test_an_absent_tpm_is_the_worlds_fault() -> None:
    """Nothing listens: WorldError with a hint, each time, and closing is no error."""
    tpm = EsysTpm(softtpm.tcti(softtpm.free_port()))
    for _ in range(2):
        with pytest.raises(WorldError, match="is the TPM there") as lost:
            await tpm.enrol_ask()
        assert lost.value.reason == "tpm"
    await tpm.close()


async def test_garbage_from_the_region_is_refused(tpm: EsysTpm, region: Region) -> None:
    """Approvals and sealed keys with cut, changed and overlong fields: one of our errors each time, never the key, nothing left behind."""
    sealed = await enrol(tpm, region)
    chance = random.Random(7)
    fields = ["sealed_public", "policy_ref", "root_public", "region_public", "delegation", "delegation_signature"]
    for name in [*fields, "session_signature", "approved", "approved_signature"] * 6:
        approval = (await attest(tpm, region, sealed)).approval
        if name in fields:
            bent = msgspec.structs.replace(sealed.enrolled, **{name: garble(getattr(sealed.enrolled, name), chance)})
            shown, given = SealedKey(enrolled=bent, private=sealed.private), approval
        else:
            shown, given = sealed, msgspec.structs.replace(approval, **{name: garble(getattr(approval, name), chance)})
        with pytest.raises(ApplianceError) as refusal:
            await tpm.unseal(shown, given)
        assert refusal.value.reason in {"malformed", "signature", "policy", "import", "tpm"}
        assert await held(tpm) == []


async def test_terms_and_pcrs_out_of_range_are_refused(tpm: EsysTpm, region: Region) -> None:
    """Numbers that no TPM structure can hold are the region's fault, not a crash."""
    sealed = await enrol(tpm, region)
    for term in (2**31, -(2**40)):
        approval = (await attest(tpm, region, sealed)).approval
        await refused(tpm, sealed, msgspec.structs.replace(approval, expiration_s=term), "malformed", "policy_signed")
    for pcrs in ([], [24], [-1, 0]):
        with pytest.raises(TheirsError, match="0 to 23 exist"):
            await tpm.evidence(sealed, Challenge(nonce=bytes(32), pcrs=pcrs))
    every = await tpm.evidence(sealed, Challenge(nonce=bytes(32), pcrs=list(range(24))))
    assert sorted(every.pcr_values) == list(range(24))


def garble(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    kinds: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :],
        lambda: content + chance.randbytes(2000),
        lambda: chance.randbytes(len(content)),
    ]
    return chance.choice(kinds)()


async def test_the_key_does_not_cross_the_bus_in_clear(software: Software, region: Region) -> None:
    """A tap between the device and its TPM sees the whole exchange, and not the key."""
    async with tapped(software.port) as (port, seen):
        tpm = EsysTpm(softtpm.tcti(port))
        kek = await opened(tpm, region, await enrol(tpm, region))
        await tpm.close()
    assert len(seen) > 5_000
    assert bytes.fromhex("0000015e") in seen
    assert kek not in seen


@asynccontextmanager
async def tapped(target: int) -> AsyncIterator[tuple[int, bytearray]]:
    """A relay before both ports of a software TPM that keeps what passes."""
    port, seen = softtpm.free_port(), bytearray()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while chunk := await source.read(4096):
            seen.extend(chunk)
            sink.write(chunk)
        sink.close()

    def relay(offset: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
        async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target + offset)
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

        return join

    servers = [await asyncio.start_server(relay(offset), "127.0.0.1", port + offset) for offset in (0, 1)]
    yield port, seen
    for server in servers:
        server.close()
        await server.wait_closed()
