"""Greedy CTC decoding: from per-step class probabilities to text and a confidence.

1. Class 0 is the blank; the dictionary's lines follow; the last class is the space (PaddleOCR, `CTCLabelDecode`, `use_space_char`).
2. The best class of each step is taken, runs of the same class are one, blanks vanish (Graves et al. 2006, best path decoding).
3. The confidence is the mean of the kept steps' probabilities, 0.0 if nothing is kept (PaddleOCR's score).
4. An array that cannot be such probabilities raises `TheirsError`; nothing is guessed.
"""

from dataclasses import dataclass

import numpy as np

from appliance.contract.errors import TheirsError
from appliance.contract.inference import Array

BLANK = 0
_AXES = 3  # batch, step, class


@dataclass(frozen=True, slots=True)
class Reading:
    """A line of text, and how sure the model was of it (0 to 1)."""

    text: str
    confidence: float


def alphabet(character: str) -> tuple[str, ...]:
    """Turn a model's dictionary (metadata key `character`, one symbol a line) into its classes: blank, symbols, space.

    Raises: TheirsError (`dictionary`) if it is empty or holds an empty line.
    """
    symbols = character.removesuffix("\n").split("\n")
    symbols = [symbol.removesuffix("\r") for symbol in symbols]
    if not all(symbols):
        raise TheirsError("dictionary", f"line {symbols.index('') + 1} of {len(symbols)} is empty", where="metadata key `character`")
    return ("", *symbols, " ")


def decode(probabilities: Array, classes: tuple[str, ...]) -> list[Reading]:
    """Decode probabilities of shape [batch, step, class] into one reading for each of the batch.

    Raises: TheirsError (`shape`, `datatype`, `not_finite`).
    """
    _check(probabilities, classes)
    best = probabilities.argmax(axis=2)
    score = np.take_along_axis(probabilities, best[:, :, np.newaxis], axis=2)[:, :, 0].astype(np.float64)
    if not np.isfinite(score).all():  # argmax stops at the first NaN, so a NaN anywhere in a step shows here
        raise TheirsError("not_finite", "probabilities hold NaN or infinity", where="CTC input")
    kept = best != BLANK
    kept[:, 1:] &= best[:, 1:] != best[:, :-1]
    return [
        Reading("".join(classes[index] for index in row[mask].tolist()), float(sure[mask].mean()) if mask.any() else 0.0)
        for row, sure, mask in zip(best, score, kept, strict=True)
    ]


def _check(probabilities: Array, classes: tuple[str, ...]) -> None:
    if probabilities.ndim != _AXES:
        raise TheirsError("shape", f"expected [batch, step, class], got {list(probabilities.shape)}", where="CTC input")
    if probabilities.shape[2] != len(classes):
        what = f"the model has {probabilities.shape[2]} classes, its dictionary {len(classes)} with blank and space"
        raise TheirsError("shape", what, where="CTC input", remedy="the dictionary must be the one that the model was trained with")
    if not np.issubdtype(probabilities.dtype, np.floating):
        raise TheirsError("datatype", f"expected floating point, got {probabilities.dtype}", where="CTC input")
