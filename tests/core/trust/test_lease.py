"""Leases as numbers and words: what is granted, what fits, what is refused, and when the next proof is due."""

import os

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.attest import Grant
from appliance.contract.errors import TheirsError, WorldError
from appliance.core.trust.anchors import PcrPolicy
from appliance.core.trust.approval import delegate_leases
from appliance.core.trust.escrow import Authorisations, disclose, enclose, escrow_public
from appliance.core.trust.lease import RENEWALS, Terms, choose, grant, renew_after_s, spell
from appliance.core.trust.tpm_structures import ClockInfo, pack_verifier
from appliance.core.trust.vault import lock, unlock
from appliance.ports import Sight
from tests.core.trust.test_attestation import RECORD
from tests.fakes.paper_tpm import GOOD_PCRS

ROOT, REGION = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
OTHER = {**GOOD_PCRS, 11: b"b" * 32}


def given_lease(term_s: float = 3600.0, restarts: int = 4, clock_ms: int = 10_000, resets: int = 7) -> Grant:
    delegation = delegate_leases(ROOT, pack_verifier(REGION.public_key()), b"r" * 32, counter=b"\0\x0b" + b"n" * 32, generation=5)
    return grant(
        Terms(term_s, restarts),
        {"slot A": GOOD_PCRS, "slot B": OTHER},
        ClockInfo(clock_ms, resets, 0, safe=True),
        region=REGION,
        reference=b"r" * 32,
        epoch=1,
        generation=5,
        delegation=delegation,
    )


def refused(kept: Grant, sight: Sight, epoch: int = 1) -> TheirsError:
    with pytest.raises(TheirsError) as refusal:
        choose(kept, epoch, sight)
    assert refusal.value.remedy
    return refusal.value


def test_a_lease_runs_from_the_quotes_own_clock() -> None:
    """D = clock + term, R = resets + restarts, for each approved state."""
    kept = given_lease()
    assert [(each.label, each.clock_before_ms, each.reset_count_max) for each in kept.leases] == [
        ("slot A", 3_610_000, 11),
        ("slot B", 3_610_000, 11),
    ]


@given(st.integers(0, 4_000_000), st.integers(0, 20), st.sampled_from([GOOD_PCRS, OTHER]))
def test_a_choice_keeps_the_bounds_to_the_millisecond(clock_ms: int, resets: int, values: dict[int, bytes]) -> None:
    """A lease is chosen exactly while clock < D and granted resets <= resets <= R, and it is the one of the present state."""
    sight = Sight(values, clock_ms, resets)
    if clock_ms < 3_610_000 and 7 <= resets <= 11:
        choice = choose(given_lease(), 1, sight)
        assert choice.lease.pcr_values == values
        assert choice.ends_after_s == pytest.approx((3_610_000 - clock_ms) / 1000)
        assert choice.restarts_left == 11 - resets
    else:
        assert refused(given_lease(), sight).reason in {"term", "restarts", "reset_count"}


def test_refusals_are_an_operators_words() -> None:
    """Each says what, with both numbers, and what to do."""
    kept = given_lease()
    assert refused(kept, Sight(GOOD_PCRS, 10_810_000, 7)).what == "the lease of 60 min ended 2 h ago, counted while powered on"
    assert refused(kept, Sight(GOOD_PCRS, 0, 12)).what == "the TPM was restarted 5 times since the region last saw it, 4 are allowed"
    assert "went back from 7 to 1" in refused(kept, Sight(GOOD_PCRS, 0, 1)).what
    third = refused(kept, Sight({**GOOD_PCRS, 11: b"c" * 32}, 0, 7)).what
    assert third.startswith(f"PCR 11 differs (kernel image and boot phase): expected {GOOD_PCRS[11].hex()[:12]}…, saw 636363636363…")
    assert third.endswith("compared with 'slot A', the nearest of 2 leases")
    assert refused(kept, Sight(GOOD_PCRS, 0, 7), epoch=2).reason == "lease_epoch"
    assert refused(msgspec.structs.replace(kept, leases=[]), Sight(GOOD_PCRS, 0, 7)).reason == "no_lease"


@given(st.floats(1.0, 1e6), st.floats(0.1, 1e7) | st.none())
def test_a_partition_begins_with_nearly_the_whole_term(cadence_s: float, term_s: float | None) -> None:
    """The next proof is due within the cadence and within a twentieth of the term."""
    due = renew_after_s(cadence_s, term_s)
    assert due <= cadence_s
    assert term_s is None or due <= term_s / RENEWALS


def test_durations_are_for_people() -> None:
    """Seconds, minutes, hours."""
    assert [spell(each) for each in (59.6, 600, 172_800)] == ["60 s", "10 min", "48 h"]


def test_images_are_states_that_belong_together() -> None:
    """Half of one image and half of another is refused by name; other PCRs are judged as before; each image gets a lease."""
    image_a, image_b = {4: GOOD_PCRS[4], 11: GOOD_PCRS[11]}, {4: b"4" * 32, 11: b"b" * 32}
    policy = PcrPolicy("slots", allowed={pcr: [value] for pcr, value in GOOD_PCRS.items()}, images={"slot A": image_a, "slot B": image_b})
    assert policy.judge(GOOD_PCRS, {}) == {}
    assert policy.judge({**GOOD_PCRS, **image_b}, {}) == {}
    with pytest.raises(TheirsError, match=r"PCR 11 differs .*'slot A' is the nearest of 2 approved images"):
        policy.judge({**GOOD_PCRS, 11: b"b" * 32}, {})
    with pytest.raises(TheirsError, match="PCR 7 differs"):
        policy.judge({**GOOD_PCRS, **image_b, 7: b"7" * 32}, {})
    assert policy.states(GOOD_PCRS) == {"slot A": GOOD_PCRS, "slot B": {**GOOD_PCRS, **image_b}}
    assert PcrPolicy("plain").states(GOOD_PCRS) == {"running": GOOD_PCRS}


def test_a_stored_record_holds_no_key() -> None:
    """Locked and packed, neither key is in the bytes; the vault's key brings both back, another one or another record does not."""
    key = os.urandom(32)
    stored = lock(RECORD, key, os.urandom(12))
    assert RECORD.kek not in msgspec.msgpack.encode(stored)
    assert RECORD.leased_kek not in msgspec.msgpack.encode(stored)
    assert unlock(stored, key) == RECORD
    assert unlock(RECORD, key) is RECORD
    for bent, tried in ((stored, os.urandom(32)), (msgspec.structs.replace(stored, device="dev-2"), key)):
        with pytest.raises(WorldError, match="another vault key, or a damaged record"):
            unlock(bent, tried)


def test_escrow_opens_for_its_key_only() -> None:
    """Back come the EK's name and both authorisations; another key or a changed byte gives a reason; nothing prints them."""
    key = os.urandom(32)
    held = Authorisations(lockout="l" * 32, owner="o" * 32)
    box = enclose(held, b"ek", escrow_public(key), os.urandom(32))
    assert disclose(box, key) == (b"ek", held)
    assert "l" * 32 not in repr(held)
    for bent, tried in ((box, os.urandom(32)), (box.replace(b'"ek_name":"ZWs="', b'"ek_name":"ZWw="'), key), (b"{}", key)):
        with pytest.raises(TheirsError, match="another escrow key, or changed bytes"):
            disclose(bent, tried)
