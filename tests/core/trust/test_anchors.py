"""Which PCR values pass, and what an operator reads when they do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import TheirsError
from appliance.core.trust.anchors import QUOTED_PCRS, PcrPolicy
from tests.fakes.paper_tpm import GOOD_PCRS, refusal_of

REFERENCE = {pcr: [value] for pcr, value in GOOD_PCRS.items()}
STRICT = PcrPolicy("floor", allowed=REFERENCE)
LEARNING = PcrPolicy("lab", trust_on_first_use=True)


def test_the_refusal_names_the_pcr_and_both_values() -> None:
    """An operator sees which PCR, what it measures, what was expected and what was seen."""
    with pytest.raises(TheirsError) as refusal:
        STRICT.judge({**GOOD_PCRS, 11: bytes.fromhex("ab" * 32)}, {})
    expected = GOOD_PCRS[11].hex()[:12]
    assert refusal.value.reason == "pcr"
    assert refusal.value.what == f"PCR 11 differs (kernel image and boot phase): expected {expected}…, saw abababababab…"
    assert str(refusal.value).startswith("PCR policy floor: ")


def test_both_slots_are_accepted() -> None:
    """Several digests for one PCR: any of them passes, a third does not."""
    other = b"o" * 32
    policy = PcrPolicy("ab", allowed={**REFERENCE, 11: [GOOD_PCRS[11], other]})
    assert policy.judge({**GOOD_PCRS, 11: other}, {}) == {}
    with pytest.raises(TheirsError, match=r"expected .*… or 6f6f6f6f6f6f…, saw"):
        policy.judge({**GOOD_PCRS, 11: b"x" * 32}, {})


def test_a_zero_anchor_proves_nothing() -> None:
    """A boot that measured nothing is refused, unless the policy says so in as many words."""
    unmeasured = {**GOOD_PCRS, 0: bytes(32), 4: bytes(32)}
    with pytest.raises(TheirsError, match=r"PCR 0 \(firmware\) and PCR 4 \(boot loader\) was never extended") as refusal:
        LEARNING.judge(unmeasured, {})
    assert refusal.value.reason == "anchor"
    assert PcrPolicy("lab", trust_on_first_use=True, allow_zero_anchor=True).judge(unmeasured, {}) == unmeasured


def test_an_anchor_that_is_not_quoted_counts_as_zero() -> None:
    """A policy that forgets to quote its anchor refuses instead of passing."""
    with pytest.raises(TheirsError, match="PCR 0"):
        PcrPolicy("odd", pcrs=(11,), anchors=(0,), trust_on_first_use=True).judge({11: b"x" * 32}, {})


def test_first_use_is_learned_once() -> None:
    """The first values become the reference; later ones are compared, and learn nothing."""
    learned = LEARNING.judge(GOOD_PCRS, {})
    assert learned == GOOD_PCRS
    assert LEARNING.judge(GOOD_PCRS, learned) == learned
    with pytest.raises(TheirsError, match="PCR 7 differs"):
        LEARNING.judge({**GOOD_PCRS, 7: b"x" * 32}, learned)


def test_what_was_learned_counts_for_nothing_when_learning_is_off() -> None:
    """A strict policy without references refuses, even a device that once taught us some."""
    with pytest.raises(TheirsError) as refusal:
        PcrPolicy("strict").judge(GOOD_PCRS, GOOD_PCRS)
    assert refusal.value.reason == "pcr_reference"


def test_a_stated_reference_wins_over_a_learned_one() -> None:
    """An update that the operator approved is not held up by what was learned."""
    policy = PcrPolicy("mixed", allowed={11: [b"n" * 32]}, trust_on_first_use=True)
    assert policy.judge({**GOOD_PCRS, 11: b"n" * 32}, GOOD_PCRS) == GOOD_PCRS


@given(st.dictionaries(st.integers(0, 23), st.sampled_from([bytes(32), b"x" * 32, *GOOD_PCRS.values()])))
def test_nothing_but_the_reference_passes(values: dict[int, bytes]) -> None:
    """For any values under a strict policy: accepted if and only if they are the reference."""
    refusal = refusal_of(lambda: STRICT.judge(values, {}))
    assert (refusal is None) == (values == GOOD_PCRS)
    assert refusal is None or refusal.reason in {"pcr", "pcr_set", "anchor"}
    assert set(GOOD_PCRS) == set(QUOTED_PCRS)
