"""How long, how often and how much: the bounds that the worker pool keeps, and the restart budget made of them.

1. The first `restarts` losses within `restart_window_s` are repaired at once: a crash should cost well under 2 s of service.
2. Each further loss within the window waits: `backoff_s`, then twice that, up to `backoff_max_s`. A storm must not eat the device.
3. A window without a loss forgets the past.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the worker pool; seconds and bytes.

    Attributes:
        batch_deadline_s: a child that works longer than this on one batch hangs, and is killed.
        load_deadline_s: the same for loading one model (a 12 GB model decrypts in 5 s and parses in tens).
        start_deadline_s: the same for a child's start, imports included.
        reload_wait_s: how long `run` waits for a lost child's replacement before it fails with `worker_lost`.
        retry_s: after how long a proven model that cannot be loaded again is tried once more; doubles up to `backoff_max_s`.
        arena_bytes: shared memory per child, at most.
        depth: batches that one child holds at a time: one runs while the next is copied in.
        rest_s: after how long without a batch a child gives back what its C library keeps (0: never).
        restarts: losses within `restart_window_s` that are repaired without delay.
    """

    batch_deadline_s: float = 5.0
    load_deadline_s: float = 60.0
    start_deadline_s: float = 20.0
    reload_wait_s: float = 2.0
    retry_s: float = 5.0
    arena_bytes: int = 134_217_728
    depth: int = 2
    rest_s: float = 10.0
    restarts: int = 5
    restart_window_s: float = 30.0
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0


@dataclass(slots=True)
class RestartBudget:
    """Says how long to wait before the next restart; time is an argument."""

    limits: Limits
    losses: deque[float] = field(default_factory=deque)
    _delay_s: float = 0.0

    def lost(self, now: float) -> float:
        """Count a loss and return the seconds to wait before the restart; 0 within the budget."""
        if self.losses and now - self.losses[-1] > self.limits.restart_window_s:
            self._delay_s = 0.0
        while self.losses and now - self.losses[0] > self.limits.restart_window_s:
            self.losses.popleft()
        self.losses.append(now)
        if len(self.losses) <= self.limits.restarts:
            return 0.0
        self._delay_s = min(self.limits.backoff_max_s, 2 * self._delay_s or self.limits.backoff_s)
        return self._delay_s
