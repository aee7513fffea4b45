"""Silence is no refusal: what each answer means for a device's keys, as a machine and with the real loops of both sides on a paper TPM."""

from dataclasses import replace

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from appliance.contract import topics
from appliance.contract.attest import Grant
from appliance.contract.codec import decode, encode
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.models import KeyAsk
from appliance.core.trust.attester import FRESH_ROUNDS, REGION, TPM, Attester, Drop, Standing, Verdict
from appliance.core.trust.lease import Terms
from tests.fakes.paper_region import ARTIFACT, PaperSite
from tests.fakes.paper_tpm import GOOD_PCRS


async def ready(**changes: object) -> PaperSite:
    """A device that was proved once."""
    site = PaperSite(**changes)  # type: ignore[arg-type]
    await site.round()
    assert site.trusting.attested, site.trusting.refusal
    return site


async def test_a_round_opens_both_keys_and_keeps_leases() -> None:
    """The record's keys, in the first round, and the counter counted once."""
    site = await ready()
    assert site.port.unsealed == ["session", "leased"]
    assert site.port.counter
    assert site.port.counter[2] == 1
    assert decode(site.kept.files["leases.json"], Grant).leases[0].label == "running"
    assert await site.trusting.data_key(ARTIFACT) == b"k" * 32


async def test_a_record_on_the_regions_disk_holds_no_key() -> None:
    """Neither key of the device is in the region's file, nor the data key in the device's."""
    site = await ready()
    await site.trusting.data_key(ARTIFACT)
    stored = msgspec.json.decode(site.records.files["device-dev-1.json"])
    assert stored["kek"] == stored["leased_kek"] == ""
    site.restart_region()
    site.keys[ARTIFACT] = b"j" * 32
    site.kept.forget(f"key-{ARTIFACT[:32]}.json")
    await site.round()
    assert await site.trusting.data_key(ARTIFACT) == b"j" * 32


async def test_partitioned_restarts_open_four_times() -> None:
    """K = 4 restarts of TPM and daemon open by the kept lease; the fifth says why not; contact heals it."""
    site = await ready()
    await site.trusting.data_key(ARTIFACT)
    site.wire.down = True
    for _ in range(4):
        site.port.reboot()
        site.restart_device()
        await site.boot()
        assert await site.trusting.data_key(ARTIFACT) == b"k" * 32
        await site.round()
        assert site.trusting.attested
    site.port.reboot()
    site.restart_device()
    await site.boot()
    assert "restarted 5 times" in site.trusting.hint
    with pytest.raises(WorldError, match="may not open its models now: lease: the TPM was restarted 5 times"):
        await site.trusting.data_key(ARTIFACT)
    site.wire.down = False
    await site.round()
    assert await site.trusting.data_key(ARTIFACT) == b"k" * 32


async def test_the_key_is_dropped_when_the_term_ends() -> None:
    """By the daemon's own clock: at the last moment it is held, then no model may be opened, also none that was; contact heals it."""
    site = await ready(terms=Terms(600.0, 4), reattest_s=10.0)
    await site.trusting.data_key(ARTIFACT)
    site.wire.down = True
    site.wait(599.0)
    await site.tick()
    assert site.trusting.holds("lease")
    assert not site.trusting.holds("never")
    site.wait(1.0)
    await site.tick()
    assert not site.trusting.holds("lease")
    with pytest.raises(WorldError):
        site.trusting.kept_key(ARTIFACT)
    await site.round()
    assert site.trusting.refusal
    assert site.trusting.refusal.reason == "term"
    site.wire.down = False
    await site.round()
    assert site.trusting.kept_key(ARTIFACT) == b"k" * 32


async def test_what_must_never_open_offline_does_not() -> None:
    """Its data key is wrapped under the session key: after a restart in a partition the lease opens the other models and not this one."""
    site = PaperSite()
    site.online_only.add(ARTIFACT)
    site.keys["cd" * 32] = b"o" * 32
    await site.round()
    assert await site.trusting.data_key(ARTIFACT) == b"k" * 32
    assert await site.trusting.data_key("cd" * 32) == b"o" * 32
    site.wire.down = True
    site.restart_device()
    await site.boot()
    assert site.trusting.kept_key("cd" * 32) == b"o" * 32
    with pytest.raises(WorldError, match="may not open"):
        site.trusting.kept_key(ARTIFACT)


async def test_without_leases_nothing_opens_offline() -> None:
    """A region with a term of 0 gives none, and takes those that were kept."""
    site = await ready()
    assert "leases.json" in site.kept.files
    site.authorities = replace(site.authorities, terms=Terms(0.0, 0))
    site.restart_region()
    await site.round()
    assert "leases.json" not in site.kept.files
    site.restart_device()
    await site.boot()
    assert not site.trusting.attested


async def test_a_revoked_device_loses_keys_and_leases_and_its_counter_counts() -> None:
    """At the next proof: both keys, the kept leases, and by counting every copy of them; it comes back only when an operator says so."""
    site = await ready()
    copied = decode(site.kept.files["leases.json"], Grant)
    site.records.save("revoked-dev-1", b"stolen from shop 12\nticket 4711\n")
    await site.round()
    assert not site.trusting.attested
    assert "its region has revoked it: stolen from shop 12" in site.trusting.hint
    assert "leases.json" not in site.kept.files
    await site.round()
    sealed = site.trusting._kept.enrolment()
    assert sealed
    with pytest.raises(TheirsError, match="counter counted on"):
        await site.port.unseal_leased(sealed, copied, copied.leases[0])
    counted = site.port.counter
    for _ in range(5):
        await site.round()
    assert site.port.counter == counted
    with pytest.raises(TheirsError):
        await site.wire.ask(topics.key("eu-1", "dev-1"), encode(KeyAsk(artifact=ARTIFACT)))
    site.records.forget("revoked-dev-1")
    await site.round()
    assert site.trusting.attested
    assert decode(site.kept.files["leases.json"], Grant).generation == copied.generation + 1


async def test_a_revoked_device_can_not_enrol_again() -> None:
    """Losing the enrolment is no way around a revocation."""
    site = await ready()
    site.records.save("revoked-dev-1", b"stolen")
    site.kept.files.clear()
    site.restart_device()
    await site.round()
    assert "revoked it: stolen" in site.trusting.hint
    assert not site.trusting.attested


async def test_a_refused_state_takes_this_lease_and_leaves_the_other_slots() -> None:
    """Another boot loader: refused by its PCR, the keys go; back in the other slot its lease opens without the region."""
    images = {"slot A": {11: GOOD_PCRS[11]}, "slot B": {11: b"b" * 32}}
    site = await ready(images=images)
    del site.images["slot A"]
    await site.round()
    assert not site.trusting.attested
    assert "PCR 11 differs" in site.trusting.hint
    assert [lease.label for lease in decode(site.kept.files["leases.json"], Grant).leases] == ["slot B"]
    site.wire.down = True
    site.port.reboot(image={11: b"b" * 32})
    site.restart_device()
    await site.boot()
    assert site.trusting.attested


@pytest.mark.parametrize("reason", sorted({*(reason for reason, verdict in REGION.items() if verdict is Verdict.AGAIN), "unreachable"}))
async def test_silence_keeps_the_keys(reason: str) -> None:
    """Refusals that speak of the exchange, and no answer at all, change nothing that is held."""
    site = await ready()

    async def bend(*_: object) -> bytes:
        raise WorldError("timeout", "no answer") if reason == "unreachable" else TheirsError(reason, "something about the exchange")

    site.wire.bend = bend
    for _ in range(3):
        await site.round()
    assert site.trusting.attested
    assert site.trusting.refusal is None
    site.wire.bend = None
    await site.round()
    assert site.trusting._attester.standing is Standing.ATTESTED


async def test_an_unknown_device_enrols_anew() -> None:
    """A region that lost its records takes the device up again, under a new key."""
    site = await ready()
    before = site.kept.files["enrolment.json"]
    site.records.files.clear()
    site.restart_region()
    await site.round()
    assert not site.trusting.attested
    await site.round()
    assert site.trusting.attested
    assert site.kept.files["enrolment.json.old"] == before


async def test_a_rotated_region_key_changes_nothing_for_the_device() -> None:
    """The same enrolment opens under the new key, by session and by lease; the leases of the old one go on until they end."""
    site = await ready()
    enrolment = site.kept.files["enrolment.json"]
    old = decode(site.kept.files["leases.json"], Grant)
    site.authorities = replace(site.authorities, region=ec.generate_private_key(ec.SECP256R1()))
    site.restart_region()
    await site.round()
    assert site.trusting.attested
    assert site.kept.files["enrolment.json"] == enrolment
    assert decode(site.kept.files["leases.json"], Grant).region_public != old.region_public
    sealed = site.trusting._kept.enrolment()
    assert sealed
    assert await site.port.unseal_leased(sealed, old, old.leases[0])


async def test_a_failed_self_test_is_told_once_and_before_it_matters() -> None:
    """Log, event and hint, while everything still serves; when it passes again the hint goes."""
    site = await ready()
    heard: list[str] = []

    async def tell(what: str, data: dict[str, str]) -> None:
        heard.append(f"{what}: {data['what']}")

    site.trusting.tell = tell
    site.port.broken = "a sealed object opened as something else"
    for _ in range(3):
        await site.trusting._self_test()
    assert heard == ["tpm_self_test_failed: TPM self-test: a sealed object opened as something else"]
    assert "opened as something else" in site.trusting.hint
    assert site.trusting.attested
    site.port.broken = ""
    await site.trusting._self_test()
    assert site.trusting.hint == ""


async def test_damaged_files_cost_a_round_and_no_more() -> None:
    """Whatever is on the device's disk, it starts, and is proved again."""
    for name in ("leases.json", "enrolment.json", f"key-{ARTIFACT[:32]}.json"):
        site = await ready()
        await site.trusting.data_key(ARTIFACT)
        site.kept.files[name] = site.kept.files[name][: len(site.kept.files[name]) // 2]
        site.restart_device()
        await site.boot()
        await site.round()
        assert await site.trusting.data_key(ARTIFACT) == b"k" * 32


class Life(RuleBasedStateMachine):
    """Any order of proofs, silences, refusals and time: a key is held only in its term, and only the region's word or the own TPM takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.attester = Attester(cadence_s=100.0, self_test_s=3600.0, now=0.0)
        self.leased_until = self.session_until = -1.0

    @rule(term_s=st.sampled_from([None, 50.0, 1000.0]))
    def attested(self, term_s: float | None) -> None:
        """A good round."""
        self.attester.attested(now=self.now, began=self.now, term_s=term_s)
        self.session_until = self.now + FRESH_ROUNDS * 100.0
        self.leased_until = self.now + term_s if term_s else self.leased_until
        assert self.attester.due <= self.now + 100.0

    @rule(seconds=st.sampled_from([0.5, 49.0, 60.0, 500.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, and the loop looks."""
        self.now += seconds
        self.attester.tick(now=self.now)

    @rule()
    def silence(self) -> None:
        """No answer: nothing that is held changes, and the next try is at most 10 s away."""
        held = (self.attester.leased_until, self.attester.session_until, self.attester.standing)
        self.attester.unreachable(now=self.now)
        assert held == (self.attester.leased_until, self.attester.session_until, self.attester.standing)
        assert self.now < self.attester.due <= self.now + 10.0

    @rule(reason=st.sampled_from([*REGION, *TPM, "revoked", "quote", "something new"]), by_region=st.booleans())
    def refused(self, reason: str, by_region: bool) -> None:
        """A refusal: by the table."""
        verdict, commands = self.attester.refused(reason, now=self.now, by_region=by_region)
        if any(isinstance(command, Drop) for command in commands):
            assert self.attester.standing is Standing.REFUSED
            self.leased_until = self.session_until = -1.0
        else:
            assert verdict in {Verdict.AGAIN, Verdict.COUNT}

    @invariant()
    def nothing_outlives_its_term(self) -> None:
        """What the machine holds is what the model says."""
        self.attester.tick(now=self.now)
        assert (self.attester.leased_until is not None) == (self.now < self.leased_until)
        assert (self.attester.session_until is not None) == (self.now < self.session_until)
        assert self.attester.deadline() >= min(self.attester.due, self.attester.test_due, self.now)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLife = Life.TestCase
