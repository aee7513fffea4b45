"""The samples that variants are judged on: `.npz` files with a model's inputs, and what a right answer is.

1. A sample set is one `.npz` file, or a folder of them (read in the order of their names) where samples differ in shape.
2. Each file holds one array for each input of the model, by its name; axis 0 counts the samples.
3. `expected` (optional, axis 0 likewise) is the right answer in the words of the metric: texts, class numbers, row numbers of `gallery`, or arrays.
4. `gallery` (optional, [rows, width]) is what the metric `nearest` looks the answer up in.
5. Without `expected`, the full model's answers are what the variants are held against.
6. The first samples only calibrate the quantisers, and are not judged.
"""

import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Array

EXPECTED, GALLERY = "expected", "gallery"
_TYPES: Mapping[str, str] = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(bool)": "bool",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip
_CALIBRATION_SHARE = 4
_CALIBRATION_MOST = 32

Sample = Mapping[str, Array]
"""One sample: each input with a batch axis of 1."""
Case = tuple[Sample, Any]
"""One sample and its expected answer."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What a model is judged on. `expected`: for each judged sample; None: agreement with the full model is measured.

    `typical` is the first judged sample of the commonest shape: what is timed, and what the release names as example.
    """

    calibration: Sequence[Sample]
    judged: Sequence[Sample]
    expected: Sequence[Any] | None
    gallery: Array | None

    @property
    def typical(self) -> Sample:
        """The first sample of the commonest shape."""
        shapes = [tuple(array.shape for array in sample.values()) for sample in self.judged]
        commonest = Counter(shapes).most_common(1)[0][0]
        return self.judged[shapes.index(commonest)]

    @property
    def example_shapes(self) -> dict[str, list[int]]:
        """For each input the shape of the typical sample without the batch axis."""
        return {name: list(array.shape[1:]) for name, array in self.typical.items()}


def save(folder: Path, cases: Iterable[Case]) -> None:
    """Write a sample set: one file for each shape that the cases have, so that they need not be alike. Raises: WorldError (`disk`)."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for inputs, answer in cases:
        groups.setdefault(tuple(sorted((name, array.shape) for name, array in inputs.items())), []).append((inputs, answer))
    for number, group in enumerate(groups[key] for key in sorted(groups)):
        arrays: dict[str, Any] = {name: np.concatenate([inputs[name] for inputs, _ in group]) for name in group[0][0]}
        arrays[EXPECTED] = np.array([answer for _, answer in group])
        path = folder / f"samples-{number}.npz"
        try:
            np.savez(path, **arrays)
        except OSError as error:
            raise WorldError("disk", f"cannot be written: {error.strerror}", where=str(path), remedy="free space there") from error


def read(path: Path, inputs: Sequence[Any], *, most: int) -> Samples:
    """Read samples for a model. `inputs`: as an onnxruntime session describes them; `most`: how many are judged, spread over the files.

    Raises: TheirsError (`samples`) if they do not fit the model, WorldError (`disk`).
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise TheirsError("samples", "there is no .npz file in it", where=str(path), remedy="see docs/variants.md for the format")
    samples: list[Sample] = []
    expected: list[Any] = []
    gallery: Array | None = None
    for file in files:
        arrays = _load(file)
        gallery = arrays.pop(GALLERY, gallery)
        answers = arrays.pop(EXPECTED, None)
        count = _check(file, arrays, inputs)
        if answers is not None and len(answers) != count:
            raise TheirsError("samples", f"{len(answers)} expected answers for {count} samples", where=str(file))
        samples += [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(count)]
        expected += [] if answers is None else list(answers)
    if expected and len(expected) != len(samples):
        raise TheirsError("samples", f"`{EXPECTED}` is in some of the files only", where=str(path), remedy="give it for all or for none")
    return _shared_out(samples, expected, gallery, most)


def _shared_out(samples: list[Sample], expected: list[Any], gallery: Array | None, most: int) -> Samples:
    """Take every n-th for calibration, and of the others as many as asked for, evenly: files need no shuffling."""
    held = min(_CALIBRATION_MOST, len(samples) // _CALIBRATION_SHARE)
    calibration = set(np.linspace(0, len(samples) - 1, held, dtype=int).tolist()) if held else set()
    others = [index for index in range(len(samples)) if index not in calibration]
    kept = [others[place] for place in np.unique(np.linspace(0, len(others) - 1, min(most, len(others)), dtype=int))]
    return Samples(
        calibration=[samples[index] for index in sorted(calibration)] or [samples[index] for index in kept[:1]],
        judged=[samples[index] for index in kept],
        expected=[expected[index] for index in kept] if expected else None,
        gallery=gallery,
    )


def _load(file: Path) -> dict[str, Array]:
    try:
        with file.open("rb") as stream:  # numpy leaves a file that it opened itself open where it is no archive
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise TheirsError("samples", "is one array, not an .npz with one for each input", where=str(file), remedy="numpy.savez")
            return dict(loaded)
    except OSError as error:
        raise WorldError("disk", f"cannot be read: {error.strerror or error}", where=str(file)) from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TheirsError(
            "samples", f"not a file of arrays: {error}", where=str(file), remedy="see docs/variants.md for the format"
        ) from error


def _check(file: Path, arrays: Mapping[str, Array], inputs: Sequence[Any]) -> int:
    """Hold arrays against a model's inputs; return how many samples there are."""
    names = {each.name for each in inputs}
    if arrays.keys() != names:
        what = f"has arrays {', '.join(sorted(arrays)) or 'of no name'}; the model's inputs are {', '.join(sorted(names))}"
        raise TheirsError("samples", what, where=str(file), remedy="name one array for each input, and the answers `expected`")
    for each in inputs:
        array = arrays[each.name]
        wanted = _TYPES.get(each.type, each.type)
        if array.dtype.name != wanted:
            raise TheirsError("samples", f"{each.name} is {array.dtype.name}, the model takes {wanted}", where=str(file))
        shape = [axis if isinstance(axis, int) else "?" for axis in each.shape]
        fits = array.ndim == len(shape) and all(axis in {"?", size} for axis, size in zip(shape[1:], array.shape[1:], strict=True))
        if not fits:
            raise TheirsError("samples", f"{each.name} is {list(array.shape)}, the model takes {shape}".replace("'", ""), where=str(file))
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1 or not min(counts):
        raise TheirsError("samples", f"axis 0 of its arrays is {sorted(counts)}; it counts the samples", where=str(file))
    return counts.pop()
