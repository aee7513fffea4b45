"""Judges a variant against the full model: how often it is right, what it costs, and whether it may be in the bundle.

1. A metric turns one answer into right or wrong; accuracy is the share of right ones. Metrics: `text` (CTC text equals, ends trimmed), `class`
   (argmax over the last axis equals), `nearest` (the row of the gallery with the highest cosine equals), `cosine` (with the expected array at
   least the threshold). Which one fits is told from the model and the samples unless a person says.
2. Cheaper means at most `CHEAPER` of the full model's time or of its memory: less of a difference is within what two builds on a busy machine
   measure for the same bytes.
3. Refused is what is not cheaper ("worse and not cheaper", or not better for anything); what is slower than the full model by more than `SLOWER`,
   because a device steps down to be relieved; and what loses more accuracy than the engineer allows.
4. Of several that pass for one mode the cheapest is taken: time x memory, and a later one must be `CLEARLY` cheaper to be taken before an earlier
   one, so that noise does not change the bundle.
5. A variant that is no more accurate than one for a lower mode, and neither faster nor smaller, is kept but noted: it is better than nothing only
   where the lower one cannot serve.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from appliance.contract.errors import TheirsError
from appliance.contract.inference import Array
from appliance.contract.vocabulary import Mode
from appliance.core.serve import ctc

CHEAPER = 0.95
SLOWER = 1.10
CLEARLY = 0.95
DICTIONARY = "character"
_TEXT_AXES = 3


class Metric(StrEnum):
    """How an answer is held against what is expected."""

    TEXT = "text"
    CLASS = "class"
    NEAREST = "nearest"
    COSINE = "cosine"


Grade = Callable[[Array, Any], bool]
"""`grade(output, expected)`: whether an answer (batch of 1) is right."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One variant as measured. `accuracy` 0 to 1; `latency` and `memory` are shares of the full model's; `refused` is empty if it may serve."""

    mode: Mode
    name: str
    how: str
    accuracy: float
    latency_ms: float
    memory_bytes: int
    latency: float = 1.0
    memory: float = 1.0
    refused: str = ""


def metric_for(metadata: Mapping[str, str], output: Array, expected: Sequence[Any] | None, *, gallery: bool) -> Metric:
    """Return the metric that fits. `output`: one answer of the full model.

    Raises: TheirsError (`samples`) if nothing fits what is expected.
    """
    if gallery:
        return Metric.NEAREST
    if expected is None:
        text = DICTIONARY in metadata and output.ndim == _TEXT_AXES
        return Metric.TEXT if text else Metric.COSINE
    first = np.asarray(expected[0])
    if first.dtype.kind == "U":
        return Metric.TEXT
    if np.issubdtype(first.dtype, np.integer) and first.shape == output.shape[1:-1]:
        return Metric.CLASS
    if np.issubdtype(first.dtype, np.floating) and first.shape == output.shape[1:]:
        return Metric.COSINE
    what = f"`expected` is {first.dtype} {list(first.shape)} for each sample, an answer is {output.dtype} {list(output.shape[1:])}"
    raise TheirsError("samples", what, remedy="give texts, class numbers, or arrays like the answers; or name the metric")


def grade_for(metric: Metric, metadata: Mapping[str, str], gallery: Array | None, threshold: float) -> tuple[Callable[[Array], Any], Grade]:
    """Return what reads an answer in the metric's words, and what compares it. Raises: TheirsError (`samples`)."""
    if metric is Metric.TEXT:
        if DICTIONARY not in metadata:
            raise TheirsError("samples", f"the model's metadata has no `{DICTIONARY}`: its answers cannot be read as text")
        classes = ctc.alphabet(metadata[DICTIONARY])
        return (lambda output: ctc.decode(output, classes)[0].text.strip()), _same_text
    if metric is Metric.CLASS:
        return (lambda output: output[0].argmax(axis=-1)), (lambda answer, expected: bool(np.array_equal(answer, expected)))
    if metric is Metric.NEAREST:
        if gallery is None:
            raise TheirsError("samples", "the metric `nearest` needs an array `gallery`")
        rows = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
        return (lambda output: int((rows @ output[0].ravel()).argmax())), (lambda answer, expected: bool(answer == int(expected)))
    return (lambda output: output[0]), (lambda answer, expected: _cosine(answer, np.asarray(expected)) >= threshold)


def verdict(judged: Judged, full: Judged, *, most_loss: float) -> Judged:
    """Return the same with `refused` set where it may not serve. `most_loss`: accuracy that may be lost, 0 to 1."""
    figures = f"{judged.latency:.2f}x the time, {judged.memory:.2f}x the memory, accuracy {judged.accuracy:.3f} against {full.accuracy:.3f}"
    reason = ""
    if min(judged.latency, judged.memory) > CHEAPER:
        reason = "worse and not cheaper" if judged.accuracy < full.accuracy else "not cheaper"
    elif judged.latency > SLOWER:
        reason = "slower, and a device steps down to be relieved"
    elif full.accuracy - judged.accuracy > most_loss:
        reason = f"loses more than {most_loss:.3f} of accuracy"
    return replace(judged, refused=f"{reason} ({figures})" if reason else "")


def best(judged: Sequence[Judged]) -> Judged | None:
    """Return the one to serve of several for one mode, in the order in which they were thought of; None if all are refused."""
    chosen: Judged | None = None
    for each in judged:
        if not each.refused and (chosen is None or each.latency * each.memory < CLEARLY * chosen.latency * chosen.memory):
            chosen = each
    return chosen


def doubt(judged: Judged, lower: Judged) -> str:
    """Return why a device would do better without this step, if the variant for a lower mode is no less accurate and costs no more."""
    beaten = lower.accuracy >= judged.accuracy and lower.latency <= judged.latency and lower.memory <= judged.memory
    theirs = f"{lower.latency:.2f}x the time, {lower.memory:.2f}x the memory, accuracy {lower.accuracy:.3f}"
    return f"mode {lower.mode} is no less accurate and costs no more ({theirs}): a device does better without this step" if beaten else ""


def _same_text(answer: Any, expected: Any) -> bool:
    return bool(answer == str(expected).strip())


def _cosine(one: Array, other: Array) -> float:
    left, right = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    if left.shape != right.shape:
        return 0.0
    length = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / length if length else float(np.array_equal(left, right))
