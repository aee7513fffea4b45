"""Measures one candidate after another on the same samples, in turn with the full model; what comes of the figures decides `judging`."""

import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from appliance.contract.errors import TheirsError
from appliance.contract.inference import Array
from appliance.contract.vocabulary import Mode
from appliance.workshop import graphs, judging, weighing
from appliance.workshop.judging import Judged, Metric
from appliance.workshop.samples import Sample, Samples


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that may serve a mode: `path` is what the device loads, `head` what the other side adds to it. `how`: in words."""

    mode: Mode
    name: str
    how: str
    path: Path
    head: Path | None = None


class Jury:
    """Knows the full model's figures. `metric`: None takes what fits; `output`: the judged output, empty for the first; `threshold`: for `cosine`."""

    def __init__(self, full: Path, samples: Samples, *, metric: Metric | None, output: str, threshold: float, rounds: int) -> None:
        """Run the full model on all samples. Raises: TheirsError (`model`, `samples`)."""
        self._opened = graphs.session(full)
        self._samples, self._rounds = samples, rounds
        names = [each.name for each in self._opened.get_outputs()]
        if output and output not in names:
            raise TheirsError("model", f"has no output {output!r}; it has {', '.join(names)}", where=str(full))
        self._place = names.index(output) if output else 0
        metadata = dict(self._opened.get_modelmeta().custom_metadata_map)
        answers = self._answers(lambda sample: graphs.answers(self._opened, sample))
        self.metric = metric or judging.metric_for(metadata, answers[0], samples.expected, gallery=samples.gallery is not None)
        self._read, self._grade = judging.grade_for(self.metric, metadata, samples.gallery, threshold)
        read = [self._read(answer) for answer in answers]
        self._expected: Sequence[Any] = read if samples.expected is None else samples.expected
        self._accuracy = self._share(read)
        self._memory = weighing.growth_bytes(full, samples.typical)
        self._times_ms: list[float] = []

    @property
    def full(self) -> Judged:
        """The full model's own figures, of all runs so far."""
        times = self._times_ms or weighing.pairs_ms(self._opened, self._opened, self._samples.typical, self._rounds)[0]
        return Judged(Mode.FULL, "full", "as it is", self._accuracy, statistics.median(times), self._memory)

    def judge(self, candidate: Candidate, most_loss: float) -> Judged:
        """Measure a candidate. Raises: TheirsError if it does not run, WorldError (`child`)."""
        opened = graphs.session(candidate.path)
        run: Callable[[Sample], list[Array]] = lambda sample: graphs.answers(opened, sample)  # noqa: E731 - one of two of a kind
        if candidate.head is not None:
            head, names = graphs.session(candidate.head), [each.name for each in opened.get_outputs()]
            run = lambda sample: graphs.answers(head, dict(zip(names, graphs.answers(opened, sample), strict=True)))  # noqa: E731
        accuracy = self._share([self._read(answer) for answer in self._answers(run)])
        times, latency = weighing.pairs_ms(self._opened, opened, self._samples.typical, self._rounds)
        self._times_ms += times
        memory = weighing.growth_bytes(candidate.path, self._samples.typical)
        judged = Judged(
            candidate.mode,
            candidate.name,
            candidate.how,
            accuracy,
            latency * statistics.median(times),
            memory,
            latency=latency,
            memory=memory / self._memory,
        )
        return judging.verdict(judged, self.full, most_loss=most_loss)

    def scaled(self, judged: Judged) -> Judged:
        """Return the same with milliseconds that keep the measured ratio to the full model's median over all runs."""
        return replace(judged, latency_ms=judged.latency * self.full.latency_ms)

    def _answers(self, run: Callable[[Sample], list[Array]]) -> list[Array]:
        """Run all judged samples, as many at a time as there are cores; each on one thread, so the bits are those of a lone run."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return [answers[self._place] for answers in pool.map(run, self._samples.judged)]

    def _share(self, read: Sequence[Any]) -> float:
        return sum(map(self._grade, read, self._expected)) / len(read)
