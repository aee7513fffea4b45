"""The verdicts: what is right, what is cheaper, what is refused, and which of several is taken."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import TheirsError
from appliance.contract.vocabulary import Mode
from appliance.workshop import judging
from appliance.workshop.judging import Judged, Metric

FULL = Judged(Mode.FULL, "full", "", 0.95, 20.0, 1_000)
VERDICTS = (  # accuracy, latency, memory, what is said
    (0.95, 0.60, 0.50, ""),
    (0.94, 0.60, 1.30, ""),
    (0.95, 1.05, 0.50, ""),
    (0.93, 1.01, 0.99, "worse and not cheaper"),
    (0.93, 0.96, 0.96, "worse and not cheaper"),
    (0.95, 1.00, 1.00, "not cheaper"),
    (0.99, 0.99, 0.99, "not cheaper"),
    (0.95, 1.80, 0.30, "slower"),
    (0.80, 0.10, 0.10, "loses more than 0.050"),
)


@pytest.mark.parametrize(("accuracy", "latency", "memory", "said"), VERDICTS)
def test_verdict(accuracy: float, latency: float, memory: float, said: str) -> None:
    """One line of the rules each; the reason comes with all figures."""
    judged = Judged(Mode.MINIMAL, "small", "", accuracy, 1.0, 1, latency=latency, memory=memory)
    refused = judging.verdict(judged, FULL, most_loss=0.05).refused
    assert refused.startswith(said)
    assert bool(refused) == bool(said)
    if said:
        assert f"{latency:.2f}x the time, {memory:.2f}x the memory, accuracy {accuracy:.3f} against 0.950" in refused


shares = st.floats(0.05, 3.0)
judgements = st.builds(
    lambda accuracy, latency, memory: Judged(Mode.MINIMAL, "one", "", accuracy, 1.0, 1, latency=latency, memory=memory),
    st.floats(0, 1), shares, shares,
)  # fmt: skip


@given(judged=judgements)
def test_nothing_that_is_worse_and_not_cheaper_serves(judged: Judged) -> None:
    """The one promise that must hold for any figures: who is admitted is cheaper, and not slower, and not much worse."""
    if not judging.verdict(judged, FULL, most_loss=0.05).refused:
        assert min(judged.latency, judged.memory) <= 0.95
        assert judged.latency <= 1.1
        assert judged.accuracy >= 0.9 - 1e-9


@given(judged=st.lists(judgements, max_size=6))
def test_the_one_taken_is_never_clearly_dearer_than_another(judged: list[Judged]) -> None:
    """And noise below 5 % does not unseat the first."""
    taken = judging.best(judged)
    assert (taken is None) == (not judged)
    if taken is not None:
        assert all(taken.latency * taken.memory <= each.latency * each.memory / judging.CLEARLY**2 for each in judged)
        wobbling = [replace(taken, name="other", latency=taken.latency * 0.96)]
        assert judging.best([taken, *wobbling]) is taken


def test_refused_ones_are_never_taken() -> None:
    """However cheap."""
    cheap = replace(FULL, latency=0.01, refused="loses more than 0.050 of accuracy")
    assert judging.best([cheap]) is None


def test_a_step_that_a_lower_mode_beats_is_noted() -> None:
    """As accurate and no dearer below means that the step above is of no use."""
    above = replace(FULL, mode=Mode.CONSTRAINED, latency=0.9, memory=1.0, accuracy=0.94)
    below = replace(FULL, mode=Mode.MINIMAL, latency=0.5, memory=0.4, accuracy=0.94)
    assert "mode C is no less accurate and costs no more" in judging.doubt(above, below)
    assert judging.doubt(above, replace(below, accuracy=0.93)) == ""
    assert judging.doubt(above, replace(below, memory=1.1)) == ""


TEXT = {"character": "a\nb"}


def test_metric_is_told_from_what_is_expected() -> None:
    """Texts, class numbers, arrays like the answer, a gallery; without any of it, texts if there is a dictionary."""
    steps, vector = np.zeros((1, 5, 4), dtype=np.float32), np.zeros((1, 4), dtype=np.float32)
    assert judging.metric_for(TEXT, steps, list(np.array(["ab"])), gallery=False) is Metric.TEXT
    assert judging.metric_for({}, vector, list(np.array([3])), gallery=False) is Metric.CLASS
    assert judging.metric_for({}, vector, list(np.zeros((2, 4), dtype=np.float32)), gallery=False) is Metric.COSINE
    assert judging.metric_for({}, vector, list(np.array([3])), gallery=True) is Metric.NEAREST
    assert judging.metric_for(TEXT, steps, None, gallery=False) is Metric.TEXT
    assert judging.metric_for({}, steps, None, gallery=False) is Metric.COSINE
    with pytest.raises(TheirsError) as caught:
        judging.metric_for({}, vector, list(np.zeros((2, 7), dtype=np.float32)), gallery=False)
    assert "[7] for each sample, an answer is float32 [4]" in str(caught.value)


def test_grades() -> None:
    """Each metric takes the right answer and refuses a wrong one."""
    text = np.zeros((1, 3, 4), dtype=np.float32)
    text[0, [0, 1, 2], [1, 2, 3]] = 1  # a, b, space
    cases = (
        (Metric.TEXT, text, " ab", "ba"),
        (Metric.CLASS, np.array([[0.1, 0.9, 0.0]]), 1, 0),
        (Metric.CLASS, text, np.array([1, 2, 3]), np.array([1, 2, 0])),
        (Metric.NEAREST, np.array([[2.0, 0.1]]), 0, 1),
        (Metric.COSINE, np.array([[1.0, 0.0]]), np.array([2.0, 0.1]), np.array([0.0, 1.0])),
    )
    for metric, output, right, wrong in cases:
        read, grade = judging.grade_for(metric, TEXT, np.eye(2, dtype=np.float32), 0.98)
        assert grade(read(output), right)
        assert not grade(read(output), wrong)
    for metric, metadata in ((Metric.TEXT, {}), (Metric.NEAREST, TEXT)):
        with pytest.raises(TheirsError):
            judging.grade_for(metric, metadata, None, 0.98)
