"""The leased key on a real software TPM: each row of the refusal table in docs/rooms/trust.md, with the words that an operator reads.

Rows about consents for one session are in test_tpm.py.
"""

import asyncio
import random
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CC, TPM2_EO, TPM2_SE, TPMA_NV
from tpm2_pytss.types import TPM2B_ENCRYPTED_SECRET, TPM2B_NV_PUBLIC, TPM2B_PRIVATE, TPMS_NV_PUBLIC, TPMT_SYM_DEF_OBJECT

from appliance.adapters.tpm import EsysTpm, leasing
from appliance.adapters.tpm.objects import hold, persistent, pinned_storage_key, unpack_public
from appliance.adapters.tpm.refusals import step
from appliance.contract.attest import COUNTER_INDEX, Grant
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.approval import (
    approve_lease,
    consent_count,
    counter_name,
    counter_policy,
    counter_reference,
    delegate_leases,
    lease_policy,
)
from appliance.core.trust.lease import Terms
from appliance.core.trust.policy import Policy
from appliance.core.trust.tpm_structures import pack_verifier
from appliance.lab import softtpm
from appliance.ports import SealedKey
from tests.fakes.soft_tpm import Region, Software, attest, counted, enrol, held, lease_refused, leased, open_kept, opened, wire

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`


async def reboot(software: Software, tpm: EsysTpm, image: str = "image 1") -> None:
    """A power cut (kill -9, no TPM2_Shutdown), power on, and a measured boot; the adapter's connection breaks and heals."""
    software.restart()
    with suppress(WorldError):
        await tpm.look([0])
    await software.boot(tpm, image)


async def test_a_lease_opens_the_key_without_the_region(tpm: EsysTpm, region: Region) -> None:
    """The leased key is another one than the session's; the lease opens it again and again, and nothing stays loaded."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    assert region.record
    assert region.record.leased_kek != region.record.kek
    for _ in range(2):
        assert await open_kept(tpm, sealed, kept) == region.record.leased_kek
    assert await held(tpm) == []
    assert len(msgspec.json.encode(kept)) < 2_000


async def test_four_power_cuts_are_allowed_and_the_fifth_is_refused(software: Software, tpm: EsysTpm, region: Region) -> None:
    """K = 4: in a partition four restarts open the key, the fifth does not, by the device's words and by the TPM's; contact heals it."""
    await reboot(software, tpm)
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    assert region.record
    for _ in range(4):
        await reboot(software, tpm)
        assert await open_kept(tpm, sealed, kept) == region.record.leased_kek
    await reboot(software, tpm)
    told = "the TPM was restarted 5 times since the region last saw it, 4 are allowed"
    await lease_refused(tpm, sealed, kept, "restarts", told, by_tpm=False)
    await lease_refused(tpm, sealed, kept, "restarts", r"policy_resets \(0x126\).*restarted more often than the lease allows")
    again = await leased(tpm, region, sealed)
    assert await open_kept(tpm, sealed, again) == region.record.leased_kek


async def test_a_term_ends(tpm: EsysTpm, region: Region) -> None:
    """Past D by the TPM's own clock, whether time passed or somebody set the clock on; it can not be set back."""
    region.terms = Terms(1.0, 4)
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    assert await open_kept(tpm, sealed, kept)
    await asyncio.sleep(1.1)
    await lease_refused(tpm, sealed, kept, "term", r"the lease of 1 s ended \d s ago, counted while powered on", by_tpm=False)
    await lease_refused(tpm, sealed, kept, "term", r"policy_clock \(0x126\): the lease's term ended, by the TPM's clock")
    region.terms = Terms(3600.0, 4)
    kept = await leased(tpm, region, sealed)
    before = await tpm.look([0])
    await tpm._run(lambda esys: esys.clock_set(before.clock_ms + 3_700_000))
    await lease_refused(tpm, sealed, kept, "term", r"0x126")
    with pytest.raises(WorldError, match="0x1c4"):
        await tpm._run(lambda esys: stepped(lambda: esys.clock_set(before.clock_ms)))


def stepped(work: Any) -> Any:
    with step("test"):
        return work()


async def test_a_device_can_not_stretch_its_lease(tpm: EsysTpm, region: Region) -> None:
    """A later deadline, more restarts: the digest is another one than the region approved."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    lease = kept.leases[0]
    for change in ({"clock_before_ms": lease.clock_before_ms + 1}, {"reset_count_max": lease.reset_count_max + 1}):
        bent = msgspec.structs.replace(kept, leases=[msgspec.structs.replace(lease, **change)])
        await lease_refused(tpm, sealed, bent, "policy", r"policy_authorize \(0x1c4\): what was approved is not what this device shows")


async def test_another_image_is_named_by_its_pcr(software: Software, tpm: EsysTpm, region: Region) -> None:
    """Booted with another kernel: the refusal names PCR 11, what it measures, and both values; the TPM refuses by itself too."""
    await reboot(software, tpm)
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    expected = kept.leases[0].pcr_values[11].hex()[:12]
    await tpm.extend(11, b"\xee" * 32)
    told = rf"PCR 11 differs \(kernel image and boot phase\): expected {expected}…, saw [0-9a-f]{{12}}…"
    await lease_refused(tpm, sealed, kept, "pcr", told, by_tpm=False)
    await lease_refused(tpm, sealed, kept, "pcr", r"policy_pcr \(0x1c4\)")


async def test_both_slots_and_the_staged_release_are_leased_before_the_switch(software: Software, tpm: EsysTpm, region: Region) -> None:
    """One lease for each approved image; a switch to the other slot opens without the region, a third image does not."""
    await reboot(software, tpm, "slot A")
    slot_a = dict((await tpm.look([4, 11])).pcr_values)
    await reboot(software, tpm, "slot B")
    slot_b = dict((await tpm.look([4, 11])).pcr_values)
    await reboot(software, tpm, "slot A")
    staged = {4: slot_a[4], 11: b"\x77" * 32}
    images = {"slot A": slot_a, "slot B": slot_b, "release 5": staged}
    rest = await tpm.look([0, 1, 2, 3, 5, 7])
    await reboot(software, tpm, "slot B")
    other = await tpm.look([0, 1, 2, 3, 5, 7])
    for pcr in (0, 7):  # the lab's boot measures its image into all PCRs: here the image is all of them
        slot_a[pcr], slot_b[pcr], staged[pcr] = rest.pcr_values[pcr], other.pcr_values[pcr], rest.pcr_values[pcr]
    region.policy = PcrPolicy("slots", images=images, trust_on_first_use=True, allow_zero_anchor=True)
    await reboot(software, tpm, "slot A")
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    assert region.record
    assert [lease.label for lease in kept.leases] == ["slot A", "slot B", "release 5"]
    await reboot(software, tpm, "slot B")
    assert await open_kept(tpm, sealed, kept) == region.record.leased_kek
    assert (await attest(tpm, region, sealed)).approval.grant
    await reboot(software, tpm, "somebody's own")
    await lease_refused(tpm, sealed, kept, "pcr", r"PCR 0 differs \(firmware\).*the nearest of 3 leases", by_tpm=False)
    with pytest.raises(TheirsError, match="is the nearest of 3 approved images"):
        await attest(tpm, region, sealed)


async def test_a_rogue_region_leases_nothing(tpm: EsysTpm, region: Region) -> None:
    """A lease by a rogue key; with its key put in; with a delegation of its own; with a root of its own; a foreign lease with my reference."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    record = region.record
    assert record
    assert sealed.enrolled.leased
    rogue = Region(region.trusted, record=record)
    reference, counter = sealed.enrolled.leased.policy_ref, counter_name(record.root_public, counter_reference(record.ek_name))
    forged = delegate_leases(rogue.root, rogue.public, reference, counter=counter, generation=kept.generation)
    lease = kept.leases[0]
    times = {"clock_before_ms": lease.clock_before_ms, "reset_count_max": lease.reset_count_max}
    own = approve_lease(rogue.key, reference, "own", lease.pcr_values, **times)
    foreign = approve_lease(region.key, b"another device's".ljust(32), "foreign", lease.pcr_values, **times)
    delegated = {"region_public": rogue.public, "delegation": forged.approved, "delegation_signature": forged.signature}
    for change, reason, told in (
        ({"leases": [own]}, "signature", r"verify \(0x2db\)"),
        ({"leases": [own], "region_public": rogue.public}, "policy", r"policy_authorize \(0x1c4\)"),
        ({"leases": [own], **delegated}, "signature", r"verify \(0x2db\)"),
        ({"leases": [foreign]}, "signature", r"verify \(0x2db\).*not signed for this device"),
    ):
        await lease_refused(tpm, sealed, msgspec.structs.replace(kept, **change), reason, told)
    bent = msgspec.structs.replace(sealed.enrolled, root_public=pack_verifier(rogue.root.public_key()))
    own_root = SealedKey(enrolled=bent, private=sealed.private, leased_private=sealed.leased_private)
    await lease_refused(tpm, own_root, msgspec.structs.replace(kept, leases=[own], **delegated), "policy", r"unseal \(0x99d\)")


async def test_a_lease_does_not_open_the_session_key(tpm: EsysTpm, region: Region) -> None:
    """What must never open offline stays shut under every lease: its policy has another reference."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    enrolled = sealed.enrolled
    assert enrolled.leased
    strict = msgspec.structs.replace(enrolled.leased, public=enrolled.sealed_public)
    swapped = SealedKey(enrolled=msgspec.structs.replace(enrolled, leased=strict), private=b"", leased_private=sealed.private)
    await lease_refused(
        tpm, swapped, kept, "policy", r"unseal \(0x99d\): the approvals do not lead to the authority that the sealed key names"
    )
    own = msgspec.structs.replace(strict, policy_ref=enrolled.policy_ref)
    swapped = SealedKey(enrolled=msgspec.structs.replace(enrolled, leased=own), private=b"", leased_private=sealed.private)
    await lease_refused(tpm, swapped, kept, "signature", r"verify \(0x2db\)")


async def test_counting_on_ends_every_lease(tpm: EsysTpm, region: Region) -> None:
    """Root's one increment: the old lease is refused by the TPM, a new one opens; the region gives none before the counter counted."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    assert region.record
    machine = region.attestation()
    machine.revoke()
    region.record = machine.record
    with pytest.raises(TheirsError, match=r"its leases were ended, but its counter is still at \d+, not at \d+") as refusal:
        await attest(tpm, region, sealed)
    assert refusal.value.reason == "generation"
    assert await counted(tpm, region, sealed, anew=True)
    await lease_refused(tpm, sealed, kept, "generation", r"policy_generation \(0x126\).*counter counted on")
    again = await leased(tpm, region, sealed)
    assert again.generation == kept.generation + 1
    assert await open_kept(tpm, sealed, again) == region.record.leased_kek


async def test_only_root_counts_and_nobody_counts_back(tpm: EsysTpm, region: Region) -> None:
    """By the device 0x12f, by the owner 0x149, by another key's consent 0x5db; removed and made anew it begins above, and old leases stay ended."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    assert region.record
    reference = counter_reference(region.record.ek_name)

    def increment(auth: ESYS_TR | None) -> Any:
        def work(esys: ESAPI) -> None:
            with leasing.ExitStack() as loaded:
                esys.nv_increment(persistent(esys, loaded, COUNTER_INDEX), auth_handle=auth)

        return work

    for auth, code in ((None, "0x12f"), (ESYS_TR.OWNER, "0x149")):
        with pytest.raises(ApplianceError, match=code):
            await tpm._run(increment(auth))
    nonce = await tpm.count_nonce(sealed, anew=True)
    with pytest.raises(TheirsError, match=r"0x5db\): the consent to count is not root's"):
        await tpm.count(sealed, consent_count(region.key, reference, nonce))
    old = consent_count(region.root, reference, nonce)
    await tpm.count_nonce(sealed, anew=True)
    with pytest.raises(TheirsError, match="for another session"):
        await tpm.count(sealed, old)
    with pytest.raises(TheirsError, match="no session waits to count"):
        await tpm.count(sealed, old)
    assert await held(tpm) == []
    assert await open_kept(tpm, sealed, kept)

    def remove(esys: ESAPI) -> None:
        with leasing.ExitStack() as loaded:
            esys.nv_undefine_space(persistent(esys, loaded, COUNTER_INDEX))
            loaded.pop_all()

    await tpm._run(remove)
    await lease_refused(tpm, sealed, kept, "generation", "counter is gone")
    assert await counted(tpm, region, sealed)
    await lease_refused(tpm, sealed, kept, "generation", "0x126")
    assert (await leased(tpm, region, sealed)).generation > kept.generation


async def test_a_counter_of_the_devices_own_is_noticed(tpm: EsysTpm, region: Region) -> None:
    """An index that the device can write has another Name: the TPM refuses the delegation, and the region the proof."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)

    def swap(esys: ESAPI) -> None:
        with leasing.ExitStack() as loaded:
            esys.nv_undefine_space(persistent(esys, loaded, COUNTER_INDEX))
            loaded.pop_all()
        attributes = TPMA_NV.AUTHWRITE | TPMA_NV.AUTHREAD | TPMA_NV.NO_DA
        public = TPMS_NV_PUBLIC(nvIndex=COUNTER_INDEX, nameAlg=TPM2_ALG.SHA256, attributes=attributes, authPolicy=b"", dataSize=8)
        index = esys.nv_define_space(None, TPM2B_NV_PUBLIC(nvPublic=public))
        esys.nv_write(index, kept.generation.to_bytes(8, "big"))
        esys.tr_close(index)

    await tpm._run(swap)
    await lease_refused(tpm, sealed, kept, "policy", r"policy_authorize \(0x1c4\)")
    with pytest.raises(TheirsError, match="is not the one that only root can count") as refusal:
        await attest(tpm, region, sealed)
    assert refusal.value.reason == "counter"
    assert await counted(tpm, region, sealed)
    assert await open_kept(tpm, sealed, await leased(tpm, region, sealed))


async def test_a_rotated_region_key_needs_no_new_enrolment(tpm: EsysTpm, region: Region) -> None:
    """Root delegates to the new key: the same sealed keys open, by session and by lease; without root's word they do not."""
    sealed = await enrol(tpm, region)
    await leased(tpm, region, sealed)
    renewed = Region(region.trusted, root=region.root, record=region.record)
    verdict = await attest(tpm, renewed, sealed)
    assert renewed.record
    from appliance.core.trust.approval import delegate  # noqa: PLC0415 - beside its use

    delegation = delegate(region.root, renewed.public, renewed.record.reference)
    approval = msgspec.structs.replace(
        verdict.approval, region_public=renewed.public, delegation=delegation.approved, delegation_signature=delegation.signature
    )
    assert await tpm.unseal(sealed, wire(approval)) == renewed.record.kek
    assert verdict.approval.grant
    assert await open_kept(tpm, sealed, verdict.approval.grant) == renewed.record.leased_kek


async def test_a_pcr_that_races_is_tried_again(tpm: EsysTpm, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """IMA extends PCR 10 at any moment: 0x128 means once more, five times at most; PCR 16 and 23 never disturb."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    assert region.record
    original, races = leasing._assert_generation, 0

    def racing(limit: int, pcr: int) -> Any:
        def work(esys: ESAPI, *args: Any) -> None:
            nonlocal races
            original(esys, *args)
            if races < limit:
                races += 1
                tpm._extend(esys, pcr, b"\xee" * 32)

        return work

    monkeypatch.setattr(leasing, "_assert_generation", racing(4, 10))
    assert await open_kept(tpm, sealed, kept) == region.record.leased_kek
    assert races == 4
    races = 0
    monkeypatch.setattr(leasing, "_assert_generation", racing(9, 10))
    await lease_refused(tpm, sealed, kept, "pcr", r"unseal \(0x128\): PCRs changed while the key was being opened")
    assert races == 5
    races = 0
    monkeypatch.setattr(leasing, "_assert_generation", racing(9, 16))
    assert await open_kept(tpm, sealed, kept)
    assert races == 1


async def test_a_lease_is_for_unsealing_only_and_a_password_for_nothing(tpm: EsysTpm, region: Region) -> None:
    """TPM2_Duplicate under a valid lease 0x9a4; unsealing with an empty password 0x12f."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    enrolled = sealed.enrolled
    part = enrolled.leased
    assert part

    def duplicate(esys: ESAPI) -> None:
        with leasing.ExitStack() as loaded, step("duplicate"):
            session = esys.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, None, TPM2_ALG.SHA256)
            hold(esys, loaded, session)
            leasing._assert_lease(esys, session, kept.leases[0])
            lease, ref = kept.leases[0], part.policy_ref
            leasing.assert_authorized(esys, session, kept.region_public, lease.approved, lease.signature, reference=ref)
            leasing._assert_generation(esys, session, kept.generation)
            leasing.assert_authorized(esys, session, enrolled.root_public, kept.delegation, kept.delegation_signature, reference=ref)
            srk = pinned_storage_key(esys, loaded, enrolled)
            key = hold(esys, loaded, esys.load(srk, TPM2B_PRIVATE(sealed.leased_private), unpack_public(part.public)))
            esys.duplicate(key, ESYS_TR.NULL, None, TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL), session1=session)

    def password(esys: ESAPI) -> None:
        with leasing.ExitStack() as loaded, step("password"):
            srk = pinned_storage_key(esys, loaded, enrolled)
            esys.unseal(hold(esys, loaded, esys.load(srk, TPM2B_PRIVATE(sealed.leased_private), unpack_public(part.public))))

    for work, code in ((duplicate, "0x9a4"), (password, "0x12f")):
        with pytest.raises(ApplianceError, match=code):
            await tpm._run(work)
        assert await held(tpm) == []


async def test_a_policy_that_leaves_something_out_opens_nothing(tpm: EsysTpm, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PolicyPCR, without the counter: other digests than approved, whatever the device's software skips."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    monkeypatch.setattr(leasing, "_assert_generation", lambda *_: None)
    await lease_refused(tpm, sealed, kept, "policy", r"policy_authorize \(0x1c4\)")
    monkeypatch.undo()

    def no_pcr(esys: ESAPI, session: ESYS_TR, lease: Any) -> None:
        esys.policy_counter_timer(session, lease.clock_before_ms.to_bytes(8, "big"), TPM2_EO.UNSIGNED_LT, offset=8)
        esys.policy_counter_timer(session, lease.reset_count_max.to_bytes(4, "big"), TPM2_EO.UNSIGNED_LE, offset=16)
        esys.policy_command_code(session, TPM2_CC.Unseal)

    monkeypatch.setattr(leasing, "_assert_lease", no_pcr)
    await lease_refused(tpm, sealed, kept, "policy", r"policy_authorize \(0x1c4\)")


async def test_lease_digests_are_those_of_the_tpm(tpm: EsysTpm, region: Region) -> None:
    """A trial session computes the digests of lease, counter and counting policy as we do."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    lease, record = kept.leases[0], region.record
    assert record

    def trial(esys: ESAPI) -> list[bytes]:
        with leasing.ExitStack() as loaded:
            session = esys.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.TRIAL, None, TPM2_ALG.SHA256)
            hold(esys, loaded, session)
            leasing._assert_lease(esys, session, lease)
            seen = [bytes(esys.policy_get_digest(session))]
            leasing._assert_generation(esys, session, kept.generation)
            seen.append(bytes(esys.policy_get_digest(session)))
            counter = persistent(esys, loaded, COUNTER_INDEX)
            return [*seen, bytes(esys.nv_read_public(counter)[1]), bytes(esys.nv_read_public(counter)[0].nvPublic.authPolicy)]

    reference = counter_reference(record.ek_name)
    name = counter_name(record.root_public, reference)
    policy = lease_policy(lease.pcr_values, lease.clock_before_ms, lease.reset_count_max)
    counted_policy = Policy(policy.digest).counter_is(name, kept.generation)
    assert await tpm._run(trial) == [policy.digest, counted_policy.digest, name, counter_policy(record.root_public, reference)]


async def test_a_cleared_tpm_opens_nothing_with_what_was_kept(software: Software, tpm: EsysTpm, region: Region) -> None:
    """TPM2_Clear: the SRK's name is another, the kept import blob is refused (0x3df), the lease too; the region wants a new enrolment."""
    await reboot(software, tpm)
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    await tpm._run(lambda esys: esys.clear(ESYS_TR.LOCKOUT))
    await lease_refused(tpm, sealed, kept, "srk_name", "the TPM was cleared or exchanged, or its bus is tapped")
    with pytest.raises(TheirsError, match="the TPM was cleared or exchanged"):
        await tpm.adopt(sealed.enrolled)

    def import_again(esys: ESAPI) -> None:
        enrolled = sealed.enrolled
        with leasing.ExitStack() as loaded, step("import"):
            srk = hold(esys, loaded, esys.create_primary(None, srk_template(), ESYS_TR.OWNER)[0])
            duplicate, seed = TPM2B_PRIVATE(enrolled.duplicate), TPM2B_ENCRYPTED_SECRET(enrolled.seed)
            none = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
            esys.import_(srk, b"", unpack_public(enrolled.sealed_public), duplicate, seed, none)

    with pytest.raises(TheirsError, match="0x3df"):
        await tpm._run(import_again)
    before = region.record
    assert before
    renewed = await enrol(tpm, region)
    assert region.record
    assert region.record.generation is None
    fresh = await leased(tpm, region, renewed)
    assert await open_kept(tpm, renewed, fresh) == region.record.leased_kek
    sight = await tpm.look([0])
    assert sight.reset_count < kept.leases[0].reset_count_max - kept.restarts
    with pytest.raises(TheirsError, match="reset count went back") as refusal:
        await open_kept(tpm, renewed, msgspec.structs.replace(kept, epoch=renewed.enrolled.epoch))
    assert refusal.value.reason == "reset_count"


def srk_template() -> Any:
    from tpm2_pytss.constants import TPMA_OBJECT  # noqa: PLC0415 - beside its use
    from tpm2_pytss.types import TPM2B_PUBLIC  # noqa: PLC0415

    attributes = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.SENSITIVEDATAORIGIN | TPMA_OBJECT.USERWITHAUTH
    attributes |= TPMA_OBJECT.RESTRICTED | TPMA_OBJECT.DECRYPT | TPMA_OBJECT.NODA
    return TPM2B_PUBLIC.parse("ecc256:aes128cfb", objectAttributes=attributes)


async def test_the_self_test_passes_and_leaves_nothing(tpm: EsysTpm) -> None:
    """Quote and unseal on the test's own object; a broken connection is told as the world's fault."""
    await tpm.self_test()
    assert await held(tpm) == []
    absent = EsysTpm(softtpm.tcti(softtpm.free_port()))
    with pytest.raises(WorldError, match="is the TPM there"):
        await absent.self_test()
    await absent.close()


async def test_a_failing_self_test_says_what_failed(tpm: EsysTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPM that unseals something else is told as such, with what to do, before a restart needs it."""
    monkeypatch.setattr(ESAPI, "unseal", lambda *_args, **_more: b"something else")
    with pytest.raises(
        WorldError, match=r"TPM self-test: a sealed object opened as something else \(the next restart may not open the key"
    ) as told:
        await tpm.self_test()
    assert told.value.reason == "self_test"
    assert await held(tpm) == []


async def test_both_keys_survive_a_reenrolment_under_new_epochs(tpm: EsysTpm, region: Region) -> None:
    """A lease of an earlier epoch is refused in words; the new one opens the new key."""
    sealed = await enrol(tpm, region)
    kept: Grant = await leased(tpm, region, sealed)
    renewed = await enrol(tpm, region)
    with pytest.raises(TheirsError, match="the kept lease is for key epoch 1, this device has 2"):
        await open_kept(tpm, renewed, kept)
    await lease_refused(tpm, renewed, kept, "signature", r"verify \(0x2db\)")
    assert region.record
    assert await open_kept(tpm, renewed, await leased(tpm, region, renewed)) == region.record.leased_kek
    assert await opened(tpm, region, renewed) == region.record.kek


async def test_garbage_leases_open_nothing(tpm: EsysTpm, region: Region) -> None:
    """Every field of a grant and its lease cut, changed, random or out of range, on the real TPM: a reason each time, and nothing stays loaded."""
    sealed = await enrol(tpm, region)
    kept = await leased(tpm, region, sealed)
    chance, lease = random.Random(11), kept.leases[0]
    texts = ["region_public", "delegation", "delegation_signature"]
    for name in [*texts, "approved", "signature", "clock_before_ms", "reset_count_max", "generation", "pcr_values"] * 5:
        holder = kept if hasattr(kept, name) else lease
        value = getattr(holder, name)
        if isinstance(value, bytes):
            at = chance.randrange(len(value))
            flipped = value[:at] + bytes([value[at] ^ 1 << chance.randrange(8)]) + value[at + 1 :]
            bent: object = chance.choice([value[:at], flipped, chance.randbytes(len(value)), value + b"x", b""])
        elif isinstance(value, dict):
            bent = chance.choice([{}, {**value, 11: b"x" * 32}, {99: bytes(32)}, {0: b""}])
        else:
            bent = chance.choice([value + 1, -1, 2**70, 0])
        if bent == value:
            continue
        changed = msgspec.structs.replace(holder, **{name: bent})
        shown = changed if holder is kept else msgspec.structs.replace(kept, leases=[changed])
        with pytest.raises(TheirsError) as refusal:
            await tpm.unseal_leased(sealed, shown, shown.leases[0])
        assert refusal.value.reason in {"malformed", "signature", "policy", "pcr", "term", "restarts", "generation"}
        assert await held(tpm) == []
    assert await open_kept(tpm, sealed, kept)
