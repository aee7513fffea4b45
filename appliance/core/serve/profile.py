"""How long a batch takes on this device, guessed from the board and corrected by every batch that ran, and what follows from it.

API: `Profile(max_batch, board=None, cost={mode: ModelCost})`; `.observe(mode, batch, took_s) -> bool` (True: build a new pace);
`.predict(mode, batch)`; `.batch_for(mode, target_latency_s)`; `.pays(mode, batch)`; `.pace(mode, slo_s, workers)`; `.explain()`.

1. Per mode and batch size: the median of the first `FIRST` measurements (a warm-up outlier among them does no harm), then a mean with weight
   `WEIGHT` of samples clipped to half and twice the estimate: one wild sample moves it by at most `WEIGHT`, a real change by a
   factor of three is followed within about 20 batches, and the estimate never leaves the range of what was seen.
2. Between measured sizes: linear. Below the smallest and above the largest: the roofline's shape scaled to the nearest measurement;
   without a board, in proportion above and constant below (both on the slow side). Never falling with the batch size.
3. The batch for a latency: of the warm-up sizes within it, the smallest that reaches `KNEE` of the best throughput. On a CPU whose batch of 8 gives
   0.96x the throughput at 8x the latency (measured: PP-OCRv4, one thread) that is 1; for a small model on the same CPU (4.5x) it is 8.
4. A request may find a batch running: the pace aims for batches that take at most half of the SLO.
5. A size that has not run `TRIES` times is tried when the load offers it and the guess allows it: what nobody measured is not ruled out by a guess.
   The next larger size is tried anew when `AGAIN` other batches ran since, and what it took then is forgotten: a size that was measured in a
   bad moment is not ruled out for good.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from statistics import median

from appliance.contract.errors import TheirsError
from appliance.contract.vocabulary import Mode
from appliance.core.serve.board import BoardProfile, ModelCost, bound_by, roofline_s
from appliance.core.serve.pace import Pace

FIRST = 5
WEIGHT = 0.1
KNEE = 0.95
GAIN = 1.1
TRIES = 3
AGAIN = 1_000
"""A light model runs so many batches within a second, a heavy one in six; three of them larger than their kind are no tail."""
MOVED = 0.05
"""A change of an estimate by 5 % is worth a new pace; building one costs some 50 microseconds."""


class Estimate:
    """One robust running estimate of a positive number."""

    __slots__ = ("_first", "_told", "count", "last", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0
        self.last = 0
        self._first: list[float] = []
        self._told = 0.0

    def observe(self, sample: float) -> bool:
        """Take one sample in; True if the value moved by more than `MOVED` since the last True."""
        self.count += 1
        if self.count <= FIRST:
            self._first.append(sample)
            self.value = median(self._first)
        else:
            clipped = min(max(sample, self.value / 2), self.value * 2)
            self.value += WEIGHT * (clipped - self.value)
        if abs(self.value - self._told) <= MOVED * self._told:
            return False
        self._told = self.value
        return True


class Profile:
    """The profile of one model on this device.

    Construction:
        max_batch: the largest batch that the model can run.
        board, cost: for the first guess; a mode without a cost, or no board, has none.
        compiled: ascending batch sizes that the backend accepts; a smaller batch costs what the next larger one costs.
    """

    def __init__(
        self, max_batch: int, board: BoardProfile | None = None, cost: Mapping[Mode, ModelCost] | None = None, compiled: Sequence[int] = ()
    ) -> None:
        self._max_batch = max_batch
        self._board = board
        self._cost = cost or {}
        self._compiled = tuple(compiled)
        self._measured: dict[Mode, dict[int, Estimate]] = {}
        self._ran = 0

    def warmup_batches(self) -> list[int]:
        """The sizes to measure before the first request: powers of two and the largest, or the compiled ones."""
        if self._compiled:
            return [size for size in self._compiled if size <= self._max_batch]
        sizes = [1 << power for power in range(self._max_batch.bit_length())]
        return sizes if sizes[-1] == self._max_batch else [*sizes, self._max_batch]

    def observe(self, mode: Mode, batch: int, took_s: float) -> bool:
        """Learn from a batch that ran (size as run, with padding). Raises: TheirsError (`measurement`) for what cannot be one."""
        if not (batch >= 1 and 0 < took_s < float("inf")):
            raise TheirsError("measurement", f"{took_s} s for a batch of {batch}")
        self._ran += 1
        estimates = self._measured.setdefault(mode, {})
        if batch not in estimates or self._outrun(estimates[batch]):
            estimates[batch] = Estimate()
        estimates[batch].last = self._ran
        return estimates[batch].observe(took_s) or self._ran % AGAIN == 0

    def predict(self, mode: Mode, batch: int) -> float | None:
        """Seconds for a batch; None if there is neither a measurement nor a guess for this mode."""
        table = self._table(mode, max(batch, self._max_batch))
        return table[batch] if table else None

    def measured(self, mode: Mode, batch: int) -> bool:
        """Whether this very size has run."""
        return self._as_run(batch) in self._measured.get(mode, {})

    def batch_for(self, mode: Mode, target_latency_s: float) -> int:
        """The batch size to aim for under a latency; 1 if nothing is known or even one sample is slower."""
        table = self._table(mode, self._max_batch)
        return best_batch(table, target_latency_s, self.warmup_batches()) if table else 1

    def pays(self, mode: Mode, batch: int) -> bool:
        """Whether measurement, not a guess, says that this batch has at least `GAIN` times the throughput of single samples."""
        table = self._table(mode, self._max_batch)
        return bool(table) and self.measured(mode, 1) and self.measured(mode, batch) and table[1] * batch >= GAIN * table[batch]

    def pace(self, mode: Mode, slo_s: float, workers: int = 1) -> Pace | None:
        """What admission and batching need, for one mode; None if nothing is known of it."""
        table = self._table(mode, self._max_batch)
        if not table:
            return None
        sizes = self.warmup_batches()
        batch = best_batch(table, slo_s / 2, sizes)
        within = [size for size in sizes if size > batch and table[size] <= slo_s / 2]
        untried = [size for size in within if self._estimate(mode, size).count < TRIES]
        outrun = [size for size in within[:1] if self._outrun(self._estimate(mode, size))]
        batch = max([batch, *untried, *outrun])
        return Pace(tuple(table), batch, workers, self.measured(mode, 1) and self.measured(mode, batch))

    def explain(self) -> list[str]:
        """The profile in words, one line per known mode and size, for `appliance check --profile`."""
        board = self._board
        lines = [f"board {board.name}: {board.description}" if board else "board unknown: measurements only"]
        for mode in sorted({*self._cost, *self._measured}):
            for size in self.warmup_batches():
                lines += self._explain_size(mode, size)
        return lines

    def _explain_size(self, mode: Mode, size: int) -> list[str]:
        seconds = self.predict(mode, size)
        if seconds is None:
            return []
        guess = self._guess(mode, size)
        estimate = self._measured.get(mode, {}).get(size)
        source = f"measured {estimate.count} times" if estimate else "guessed"
        line = f"mode {mode}, batch {size}: {seconds * 1e3:.3g} ms, {size / seconds:.3g} samples/s, {source}"
        if guess is not None and self._board:
            line += f"; roofline {guess * 1e3:.3g} ms, bound by {bound_by(self._board, self._cost[mode], size)}"
        return [line]

    def _outrun(self, estimate: Estimate) -> bool:
        return self._ran - estimate.last > AGAIN

    def _estimate(self, mode: Mode, size: int) -> Estimate:
        return self._measured.get(mode, {}).get(size) or Estimate()

    def _as_run(self, batch: int) -> int:
        index = bisect_left(self._compiled, batch)
        return self._compiled[index] if index < len(self._compiled) else batch

    def _guess(self, mode: Mode, batch: int) -> float | None:
        cost = self._cost.get(mode)
        return roofline_s(self._board, cost, batch) if self._board and cost else None

    def _table(self, mode: Mode, largest: int) -> list[float]:
        """Seconds by batch size from 0 to `largest`, never falling; empty if nothing is known."""
        known = sorted((size, estimate.value) for size, estimate in self._measured.get(mode, {}).items())
        table, slowest = [0.0], 0.0
        for batch in range(1, largest + 1):
            seconds = self._seconds(mode, self._as_run(batch), known)
            if seconds is None:
                return []
            slowest = max(slowest, seconds)
            table.append(slowest)
        return table

    def _seconds(self, mode: Mode, batch: int, known: list[tuple[int, float]]) -> float | None:
        if not known:
            return self._guess(mode, batch)
        index = bisect_left(known, (batch, 0.0))
        if 0 < index < len(known):
            (low, low_s), (high, high_s) = known[index - 1], known[index]
            return low_s + (high_s - low_s) * (batch - low) / (high - low)
        near, near_s = known[0] if index == 0 else known[-1]
        here, there = self._guess(mode, batch), self._guess(mode, near)
        shape = here / there if here and there else max(1.0, batch / near)
        return near_s * shape


def best_batch(table: Sequence[float], target_latency_s: float, sizes: Sequence[int]) -> int:
    """The smallest of `sizes` within the latency that reaches `KNEE` of the best throughput among them; 1 if none is within it."""
    within = [size for size in sizes if table[size] <= target_latency_s]
    best = max((size / table[size] for size in within), default=0.0)
    return next((size for size in within if size / table[size] >= KNEE * best), 1)
