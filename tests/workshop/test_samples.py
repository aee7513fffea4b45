"""Sample sets: what is saved is read again, and what does not fit is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.contract.errors import TheirsError, WorldError
from appliance.workshop import graphs, samples
from tests.workshop.small_models import reader

INPUTS = graphs.session(reader()).get_inputs()


def picture(width: int, value: float) -> dict[str, Any]:
    return {"x": np.full((1, 3, 8, width), value, dtype=np.float32)}


def test_cases_of_several_shapes_come_back(tmp_path: Path) -> None:
    """Each with its answer; the commonest shape is the typical one."""
    cases = [(picture(24 if number % 3 else 16, number), f"text {number}") for number in range(30)]
    samples.save(tmp_path, cases)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    taken = samples.read(tmp_path, INPUTS, most=100)
    assert taken.expected is not None
    assert all(answer == f"text {int(sample['x'].flat[0])}" for sample, answer in zip(taken.judged, taken.expected, strict=True))
    assert taken.example_shapes == {"x": [3, 8, 24]}
    assert taken.typical["x"].shape == (1, 3, 8, 24)


def test_what_calibrates_is_not_judged(tmp_path: Path) -> None:
    """A quarter at most, and of the rest as many as asked for, spread over all files."""
    samples.save(tmp_path, [(picture(24, number), number) for number in range(80)])
    taken = samples.read(tmp_path, INPUTS, most=30)
    calibration, judged = ({float(each["x"].flat[0]) for each in group} for group in (taken.calibration, taken.judged))
    assert len(calibration) == 20
    assert len(judged) == 30
    assert not calibration & judged
    assert max(judged) > 70
    assert min(judged) < 10


def test_a_single_sample_will_do(tmp_path: Path) -> None:
    """It is judged, and calibrates as well: there is no other."""
    samples.save(tmp_path, [(picture(24, 1), 0)])
    taken = samples.read(tmp_path, INPUTS, most=10)
    assert len(taken.judged) == len(taken.calibration) == 1


GOOD = np.zeros((4, 3, 8, 24), dtype=np.float32)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"image": GOOD}, "has arrays image; the model's inputs are x"),
    "one more": ({"x": GOOD, "mask": GOOD}, "has arrays mask, x; the model's inputs are x"),
    "another type": ({"x": GOOD.astype(np.float64)}, "x is float64, the model takes float32"),
    "another rank": ({"x": GOOD[0]}, "x is [3, 8, 24], the model takes [?, 3, 8, ?]"),
    "another shape": ({"x": np.zeros((4, 1, 8, 24), dtype=np.float32)}, "x is [4, 1, 8, 24], the model takes [?, 3, 8, ?]"),
    "no samples": ({"x": GOOD[:0]}, "it counts the samples"),
    "answers missing": ({"x": GOOD, "expected": np.zeros(3)}, "3 expected answers for 4 samples"),
    "objects": ({"x": np.array([None, None])}, "not a file of arrays"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_samples_that_do_not_fit_are_named(tmp_path: Path, mistake: str) -> None:
    """File, array, and both shapes or types stand in the error."""
    arrays, what = MISTAKES[mistake]
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(TheirsError) as caught:
        samples.read(path, INPUTS, most=10)
    assert caught.value.reason == "samples"
    assert what in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_samples_are_named(tmp_path: Path) -> None:
    """No file, no archive, one bare array, an empty folder, answers in one of two files."""
    for name, content in (("text.npz", b"hello"), ("empty.npz", b""), ("cut.npz", b"PK\x03\x04 and no more")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TheirsError):
            samples.read(tmp_path / name, INPUTS, most=10)
    np.save(tmp_path / "bare.npy", GOOD)
    with pytest.raises(TheirsError, match="one array"):
        samples.read(tmp_path / "bare.npy", INPUTS, most=10)
    with pytest.raises(WorldError):
        samples.read(tmp_path / "nowhere.npz", INPUTS, most=10)
    (tmp_path / "folder").mkdir()
    with pytest.raises(TheirsError, match="there is no"):
        samples.read(tmp_path / "folder", INPUTS, most=10)
    np.savez(tmp_path / "folder" / "a.npz", x=GOOD)
    np.savez(tmp_path / "folder" / "b.npz", x=GOOD, expected=np.zeros(4))
    with pytest.raises(TheirsError, match="in some of the files only"):
        samples.read(tmp_path / "folder", INPUTS, most=10)
