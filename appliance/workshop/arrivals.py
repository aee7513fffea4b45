"""When requests of an open loop are due: a Poisson process from a seed, so that a run can be repeated.

1. Gaps are exponential with mean 1 / rate and independent: callers who know nothing of each other and do not wait for answers.
2. The schedule is made before the run: whatever the server does, arrivals do not move (no coordinated omission).
"""

import numpy as np
import numpy.typing as npt

SPARE = 1.2
"""So many more gaps than expected are drawn at once; a rare shortage is drawn for again."""


def poisson(rate_per_s: float, duration_s: float, seed: int) -> npt.NDArray[np.float64]:
    """Return the due times in seconds from the start, ascending, all below `duration_s`. Raises: ValueError on a rate that is not positive."""
    if not rate_per_s > 0:
        raise ValueError(f"a rate of {rate_per_s} per second")
    rng = np.random.default_rng(seed)
    count = int(rate_per_s * duration_s * SPARE) + 16
    due = np.cumsum(rng.exponential(1 / rate_per_s, count))
    while due[-1] < duration_s:
        due = np.concatenate((due, due[-1] + np.cumsum(rng.exponential(1 / rate_per_s, count))))
    return due[due < duration_s]
