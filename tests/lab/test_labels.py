"""Promises of the stream of shelf labels: repeatable, printable, degraded, and still readable."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from appliance.client.images import tensor_of
from appliance.contract.errors import WorldError
from appliance.lab import labels
from appliance.lab.reference import Reference

MODEL = Path(__file__).parents[2] / "build" / "models" / "label-reader.onnx"
needs_model = pytest.mark.skipif(not MODEL.is_file(), reason="scripts/fetch-models has not run")
FLOOR = 0.92  # the least share of labels read exactly; what is measured is in docs/own-model.md


@pytest.fixture(scope="module")
def reference() -> Reference:
    """The real model, in this process."""
    return Reference(MODEL)


def test_the_same_seed_gives_the_same_labels() -> None:
    """A label that was misread can be drawn again from its seed, and another seed gives others."""

    def drawn(seed: int) -> list[tuple[str, str, str, bytes]]:
        rng = random.Random(seed)
        return [(label.text, label.degradation, label.font, label.image.tobytes()) for label in (labels.draw(rng) for _ in range(12))]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_every_kind_of_degradation_and_font_appears() -> None:
    """Three hundred labels show all degradations and all installed fonts."""
    rng = random.Random(1)
    seen = [labels.draw(rng) for _ in range(300)]
    assert {label.degradation for label in seen} == set(labels.DEGRADATIONS)
    assert {label.font for label in seen} == set(labels.installed_fonts())
    assert min(Counter(label.degradation for label in seen).values()) > 20


def test_labels_are_visibly_degraded() -> None:
    """The heavy range of each degradation lies wholly beyond the light one, and no two neighbouring pixels of paper are alike."""
    for light, heavy in labels.DEGRADATIONS.values():
        assert heavy[0] > light[1] or heavy[1] < light[0]
    rng = random.Random(2)
    for _ in range(20):
        pixels = np.asarray(labels.draw(rng).image, dtype=np.float32)
        assert np.abs(np.diff(pixels[0], axis=0)).mean() > 0.5  # the top row is paper: only noise and light differ


def test_no_font_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a known font the error names the packages."""
    monkeypatch.setattr(labels, "_has_font", lambda _: False)
    labels.installed_fonts.cache_clear()
    try:
        with pytest.raises(WorldError, match="apt-get install fonts-dejavu-core fonts-liberation"):
            labels.draw(random.Random(1))
    finally:
        labels.installed_fonts.cache_clear()


@needs_model
def test_only_characters_that_the_reader_knows_are_printed(reference: Reference) -> None:
    """No label is unreadable for lack of a symbol in the dictionary."""
    rng = random.Random(3)
    printed = {symbol for _ in range(2000) for symbol in labels.print_text(rng)}
    assert printed - set(reference.classes) == set()


@needs_model
def test_the_reference_reads_most_labels_and_misses_no_model_silently(reference: Reference) -> None:
    """The real model reads ten of twelve labels; without a model the error says what to run."""
    rng = random.Random(4)
    drawn = [labels.draw(rng) for _ in range(12)]
    assert sum(reference.read(tensor_of(label.image)).strip() == label.text for label in drawn) >= 10
    with pytest.raises(WorldError, match="scripts/fetch-models"):
        Reference(MODEL.with_name("absent.onnx"))


@needs_model
@pytest.mark.slow
def test_the_floor_of_exact_readings_holds_overall(reference: Reference) -> None:
    """Of 200 labels at least 92 % are read exactly, and no kind of degradation is hopeless."""
    rng = random.Random(20)
    exact: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    for _ in range(200):
        label = labels.draw(rng)
        shown[label.degradation] += 1
        exact[label.degradation] += reference.read(tensor_of(label.image)).strip() == label.text
    assert exact.total() / shown.total() >= FLOOR
    assert all(exact[name] / shown[name] > 0.7 for name in shown)
