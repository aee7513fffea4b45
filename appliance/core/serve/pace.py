"""How fast batches of one model are answered now: the few numbers that admission and batching need of the profile."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast batches are answered now, from the profile. Index n of `latency_s` is the seconds for n samples (index 0: 0).

    Attributes:
        batch: the batch size to aim for; at least 1 and within the table.
        workers: how many batches run side by side.
        measured: whether the table rests on measurements rather than on a first guess.
    """

    latency_s: tuple[float, ...]
    batch: int
    workers: int = 1
    measured: bool = False

    def seconds(self, samples: int) -> float:
        """Predicted seconds for a batch; beyond the table in proportion to its last entry."""
        last = len(self.latency_s) - 1
        return self.latency_s[samples] if samples <= last else self.latency_s[last] * samples / last
