"""Promises of the greedy CTC decoder."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import TheirsError
from appliance.core.serve import ctc

CLASSES = ctc.alphabet("a\nb\nc\n0\n$\n.\n")
SYMBOLS = "".join(CLASSES[1:])
texts = st.text(alphabet=SYMBOLS, max_size=12)


def steps_of(text: str, repeats: list[int], blanks: list[int]) -> list[int]:
    """Spell a text as CTC steps: each symbol repeated, blanks between, at least one between equal neighbours."""
    steps: list[int] = []
    for place, symbol in enumerate(text):
        index = CLASSES.index(symbol)
        gap = blanks[place % len(blanks)]
        steps += [0] * max(gap, 1 if steps and steps[-1] == index else 0)
        steps += [index] * repeats[place % len(repeats)]
    return steps + [0] * blanks[-1]


def probabilities_of(steps: list[int], sure: float = 0.9) -> np.ndarray:
    """One batch row in which each step's class has probability `sure`."""
    row = np.full((1, len(steps), len(CLASSES)), (1 - sure) / (len(CLASSES) - 1), dtype=np.float32)
    row[0, np.arange(len(steps)), steps] = sure
    return row


spellings = st.tuples(texts, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.lists(st.integers(0, 3), min_size=1, max_size=5))


@given(spellings)
def test_any_spelling_of_a_text_decodes_to_it(spelling: tuple[str, list[int], list[int]]) -> None:
    """Whatever repeats and blanks a model puts in, the text comes back."""
    steps = steps_of(*spelling)
    assert ctc.decode(probabilities_of(steps), CLASSES)[0].text == spelling[0]


@given(spellings, st.floats(0.5, 1.0))
def test_confidence_is_the_mean_of_kept_steps(spelling: tuple[str, list[int], list[int]], sure: float) -> None:
    """Equally sure steps give exactly that confidence, an empty reading gives 0."""
    reading = ctc.decode(probabilities_of(steps_of(*spelling), sure), CLASSES)[0]
    assert reading.confidence == pytest.approx(sure if spelling[0] else 0.0, abs=1e-6)


@given(st.lists(st.lists(st.integers(0, len(CLASSES) - 1), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 10_000))
def test_a_batch_decodes_like_its_rows_alone(rows: list[list[int]], seed: int) -> None:
    """Batching never changes a reading."""
    noise = np.random.default_rng(seed).random((len(rows), 6, len(CLASSES)), dtype=np.float32)
    batch = np.concatenate([probabilities_of(row) for row in rows]) + noise
    assert ctc.decode(batch, CLASSES) == [ctc.decode(row[np.newaxis], CLASSES)[0] for row in batch]


def test_confidence_ignores_blanks_and_repeats() -> None:
    """Only the first step of each kept run counts for the confidence."""
    batch = probabilities_of([1, 1, 0, 2])
    batch[0, 0, 1], batch[0, 1, 1], batch[0, 2, 0], batch[0, 3, 2] = 0.8, 0.99, 0.99, 0.6
    assert ctc.decode(batch, CLASSES)[0] == ctc.Reading("ab", pytest.approx(0.7, abs=1e-6))


def test_the_alphabet_is_blank_dictionary_space() -> None:
    """The dictionary's order is kept between blank and space, with either line ending."""
    assert ctc.alphabet("x\r\ny\r\n") == ("", "x", "y", " ")
    assert ctc.alphabet("x\ny") == ("", "x", "y", " ")


@pytest.mark.parametrize("character", ["", "\n", "a\n\nb"])
def test_a_broken_dictionary_is_refused(character: str) -> None:
    """An empty symbol would shift all later ones, so it is refused."""
    with pytest.raises(TheirsError, match="empty") as caught:
        ctc.alphabet(character)
    assert caught.value.reason == "dictionary"


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 7), np.float32), "shape"),
        (np.zeros((1, 2, 3, 8), np.float32), "shape"),
        (np.zeros((1, 2, 7), np.float32), "shape"),
        (np.zeros((1, 2, 8), np.int64), "datatype"),
        (np.full((1, 2, 8), np.nan, np.float32), "not_finite"),
    ],
)
def test_what_is_not_probabilities_is_refused(array: np.ndarray, reason: str) -> None:
    """A wrong rank, class count or type names itself instead of decoding to rubbish."""
    with pytest.raises(TheirsError) as caught:
        ctc.decode(array, CLASSES)
    assert caught.value.reason == reason


def test_no_steps_is_an_empty_reading() -> None:
    """A model that gives no steps has read nothing."""
    assert ctc.decode(np.zeros((2, 0, 8), np.float32), CLASSES) == [ctc.Reading("", 0.0)] * 2
