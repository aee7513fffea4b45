"""The promises of stale answers: bounded, honest about age, worth less every second."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import OursError
from appliance.core.serve.fallback import ENTRY_BYTES, Fallback, Stale


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def test_an_old_answer_says_how_old_it_is_and_what_it_is_worth() -> None:
    """After one half-life, half of the confidence; even at once it is a `Stale`."""
    kept = Fallback[str](10_000, half_life_s=60)
    kept.keep(key(1), "milk 1.29", 9, 0.9, now=100.0)
    assert kept.find(key(1), 160.0) == Stale("milk 1.29", 60.0, pytest.approx(0.45))
    assert kept.find(key(1), 100.0) == Stale("milk 1.29", 0.0, 0.9)
    assert kept.find(key(2), 100.0) is None


def test_too_old_is_gone() -> None:
    """Beyond the greatest age there is no answer, and its bytes are free."""
    kept = Fallback[str](10_000, max_age_s=600)
    kept.keep(key(1), "x", 1, 1.0, 0.0)
    assert kept.find(key(1), 600.1) is None
    assert (len(kept), kept.held_bytes) == (0, 0)


def test_the_least_recently_used_goes_first() -> None:
    """Finding an answer keeps it."""
    kept = Fallback[int](2 * (ENTRY_BYTES + 100))
    kept.keep(key(1), 1, 100, 1.0, 0.0)
    kept.keep(key(2), 2, 100, 1.0, 0.0)
    assert kept.find(key(1), 1.0)
    kept.keep(key(3), 3, 100, 1.0, 2.0)
    assert [bool(kept.find(key(number), 2.0)) for number in (1, 2, 3)] == [True, False, True]


def test_a_larger_newer_answer_takes_the_place_of_the_older_one() -> None:
    """Even if the new one is too large to be kept, the old one is not given in its place."""
    kept = Fallback[str](ENTRY_BYTES + 100)
    kept.keep(key(1), "old", 10, 1.0, 0.0)
    kept.keep(key(1), "new, far too large", 1_000, 1.0, 1.0)
    assert kept.find(key(1), 1.0) is None
    kept.keep(key(1), "small", 10, 1.0, 2.0)
    kept.clear()
    assert (len(kept), kept.held_bytes) == (0, 0)


@pytest.mark.parametrize(("name", "confidence", "size"), [(b"short", 0.5, 1), (key(1), 1.5, 1), (key(1), -0.1, 1), (key(1), 0.5, -1)])
def test_nonsense_raises_and_changes_nothing(name: bytes, confidence: float, size: int) -> None:
    """A key that is no SHA-256, a confidence outside 0 to 1, a negative size."""
    kept = Fallback[str](10_000)
    kept.keep(key(1), "before", 1, 1.0, 0.0)
    with pytest.raises(OursError):
        kept.keep(name, "x", size, confidence, 1.0)
    assert kept.find(key(1), 0.0) == Stale("before", 0.0, 1.0)


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3_000), st.floats(0, 1), st.floats(0, 100), st.booleans()), max_size=80),
    st.integers(0, 8_000),
)
def test_bytes_are_bounded_and_answers_are_the_latest_kept(steps: list[tuple[int, int, float, float, bool]], most: int) -> None:
    """For any sequence: never above the bound; what is found is the last one kept for this key, never worth more than it was."""
    kept, latest, now = Fallback[int](most), dict[int, tuple[int, float, float]](), 0.0
    for serial, (number, size, confidence, wait, finding) in enumerate(steps):
        now += wait
        if finding:
            stale = kept.find(key(number), now)
            if stale:
                answer, worth, at = latest[number]
                assert (stale.answer, stale.age_s) == (answer, now - at)
                assert 0 <= stale.confidence <= worth
                assert stale.age_s <= 600
        else:
            kept.keep(key(number), serial, size, confidence, now)
            latest[number] = (serial, confidence, now)
        assert 0 <= kept.held_bytes <= most
        assert kept.held_bytes >= ENTRY_BYTES * len(kept)
