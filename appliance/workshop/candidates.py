"""Ideas for the modes B to D of one model, each built only when its turn comes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.contract.errors import TheirsError
from appliance.contract.vocabulary import Mode
from appliance.workshop import cutting, graphs, quantised, windowed
from appliance.workshop.judging import Metric
from appliance.workshop.jury import Candidate
from appliance.workshop.samples import Samples
from appliance.workshop.windowed import Window

HEAD = "head.onnx"
_LEAST_WINDOW = 8
"""Shorter blocks cost more in moving than they spare in computing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an engineer asks for; None or empty: what fits is found or measured.

    Attributes:
        model_id, version, min_vram_gb, max_batch_size, target_latency_ms: as in `model.toml`.
        metric, output, threshold: how answers are judged (`judging`); the output is the first unless named.
        mild: one of `quantised.QUANTISERS` that is tried for mode B as well; for models that spend little on attention.
        student: a distilled model with the same inputs and outputs for mode C, instead of smaller weights.
        features: the tensor to cut at for mode D.
        window, reach, sinks: positions in a block of mode B, blocks seen on each side, first positions seen by all.
        most: how many samples are judged at most.
        rounds: how many pairs of runs are timed for each candidate.
        most_loss: accuracy (0 to 1) that a variant may lose.
    """

    model_id: str = ""
    version: str = "1.0.0"
    min_vram_gb: float | None = None
    max_batch_size: int = 8
    target_latency_ms: float | None = None
    metric: Metric | None = None
    output: str = ""
    threshold: float = 0.98
    mild: str = ""
    student: Path | None = None
    features: str = ""
    window: int | None = None
    reach: int = 1
    sinks: int = 1
    most: int = 200
    rounds: int = 31
    most_loss: float = 0.05


@dataclass(frozen=True, slots=True)
class Idea:
    """A candidate that is not built yet. `asked`: the engineer named it, so that it must work."""

    mode: Mode
    name: str
    build: Callable[[], Candidate]
    asked: bool = False


class Ideas:
    """What to try for one model (`full`, a `ModelProto`), written into `scratch`."""

    def __init__(self, full: Any, taken: Samples, order: Order, scratch: Path) -> None:
        self._full, self._samples, self._order, self._scratch = full, taken, order, scratch
        self._prepared: Any = None

    def all(self) -> Iterator[Idea]:
        """Yield the ideas, mode by mode; within a mode the most careful first."""
        for window in self._windows():
            yield Idea(Mode.CONSTRAINED, window.name, lambda window=window: self._window(window), asked=self._order.window is not None)  # type: ignore[misc]  # a default binds it
        if self._order.mild:
            yield Idea(
                Mode.CONSTRAINED, f"mild-{self._order.mild}", lambda: self._quantised(self._order.mild, Mode.CONSTRAINED), asked=True
            )
        if self._order.student is not None:
            yield Idea(Mode.MINIMAL, "student", self._student, asked=True)
        else:
            for name in quantised.QUANTISERS:
                yield Idea(Mode.MINIMAL, name, lambda name=name: self._quantised(name))  # type: ignore[misc]  # a default binds it
        yield Idea(Mode.CLOUD, "features", self._split, asked=bool(self._order.features))

    def _windows(self) -> list[Window]:
        order = self._order
        if order.window is not None:
            return [Window(order.window, order.reach, order.sinks)]
        length = windowed.longest(self._full, self._samples.typical)
        sizes = [(length // 4, 0), (length // 8, 0), (length // 16, 1)]  # blocks alone are cheapest, neighbours are kinder
        fit = [(size, reach) for size, reach in sizes if size >= max(_LEAST_WINDOW, order.sinks)] or [(max(length // 2, order.sinks, 1), 0)]
        return [Window(size, reach, order.sinks) for size, reach in fit]

    def _window(self, window: Window) -> Candidate:
        model = windowed.windowed(self._full, self._samples.typical, window)
        return Candidate(Mode.CONSTRAINED, window.name, window.how, self._written(model, f"{window.name}.onnx"))

    def _quantised(self, name: str, mode: Mode = Mode.MINIMAL) -> Candidate:
        self._prepared = self._prepared or quantised.prepared(self._full)
        model, how = quantised.quantised(self._prepared, name, self._samples.calibration)
        shown = name if mode is Mode.MINIMAL else f"mild-{name}"
        return Candidate(mode, shown, how, self._written(model, f"{shown}.onnx"))

    def _student(self) -> Candidate:
        path = self._order.student or Path()
        student = graphs.read(path)
        for side in ("input", "output"):
            names, wanted = (sorted(each.name for each in getattr(model.graph, side)) for model in (student, self._full))
            if names != wanted:
                what = f"its {side}s are {', '.join(names)}; the full model's are {', '.join(wanted)}"
                raise TheirsError("model", what, where=str(path), remedy="a student answers the same questions in the same words")
        return Candidate(Mode.MINIMAL, "student", "a distilled student", self._written(student, "student.onnx"))

    def _split(self) -> Candidate:
        sample, tensor = self._samples.typical, self._order.features
        cut = cutting.at(self._full, sample, tensor) if tensor else cutting.find(self._full, sample)
        halves = cutting.halves(self._full, sample, cut)
        given = sum(array.nbytes for array in sample.values())
        smaller = "; sending the input would be less" if given < cut.crossing_bytes else ""
        how = f"cut at {cut.tensor}: {cut.crossing_bytes} bytes go to the other side, the input has {given}{smaller}"
        features, head = self._written(halves.features, "features.onnx"), self._written(halves.head, HEAD)
        return Candidate(Mode.CLOUD, "features", how, features, head)

    def _written(self, model: Any, name: str) -> Path:
        return graphs.write(model, self._scratch / name, self._full)
