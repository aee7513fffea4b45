"""What happens to inference children: reported once each through `on_change`, for logs, metrics and mode steps."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lost:
    """A child is gone. `cause` is `exited`, `hang` or `protocol`; `busy` names the models at work in it then.

    `delay_s` is how long the replacement waits: above 0 the restart budget is spent, and a mode step down is due.
    A child that was renewed and lost before it was drained is told of likewise; its successor serves already, so no `Restored` follows.
    """

    worker: int
    pid: int
    cause: str
    busy: tuple[str, ...]
    delay_s: float


@dataclass(frozen=True, slots=True)
class Restored:
    """The replacement is up with all models that could be loaded again, `took_s` after the loss."""

    worker: int
    pid: int
    models: tuple[str, ...]
    took_s: float


@dataclass(frozen=True, slots=True)
class Parked:
    """A model that was served cannot be loaded again; it is tried once more in `retry_s` (None: never, load it anew)."""

    worker: int
    model: str
    reason: str
    what: str
    retry_s: float | None


@dataclass(frozen=True, slots=True)
class Renewed:
    """A child was replaced by a fresh one, beside which it served on: nothing failed. `pid` is the fresh one, `ratio` what it freed.

    `ratio` is by how much less the fresh child holds than the old one did (0 to 1); `took_s` runs from the start of the second process
    to the swap.
    """

    worker: int
    pid: int
    ratio: float
    took_s: float


Change = Lost | Restored | Parked | Renewed


@dataclass(frozen=True, slots=True)
class ModelStats:
    """One model in one child. `weights_bytes` is the file's size, `grew_bytes` by how much loading it grew the child."""

    key: str
    loaded: bool
    provider: str
    weights_bytes: int
    grew_bytes: int


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One child now. `pid`, `rss_bytes` are None while there is none; `pss_bytes` to `resting` are as of the last measurement.

    The child is not dumpable, so only itself can read its PSS: `stats()` shows the last answer and asks for the next.

    Attributes:
        held_bytes: its anonymous memory, which no change of other processes moves.
        needed_bytes: what python, the run-times and its models took of it as they were loaded.
        resting: it had no batch for a while before the measurement, and had given back what it could: only then is more held than needed
            a fragmented heap (or a leak), and not the working set of the last batches.
        batches: how many batches this very process has answered.
        gpu_held_bytes: what the driver says that it holds on the GPU; None where nobody can tell.
        gpu_needed_bytes: by how much loading its models grew that.
    """

    worker: int
    pid: int | None
    rss_bytes: int | None
    pss_bytes: int | None
    arena_bytes: int
    in_flight: int
    losses: int
    hangs: int
    busy_s: float
    models: tuple[ModelStats, ...]
    held_bytes: int | None = None
    needed_bytes: int | None = None
    resting: bool = False
    batches: int = 0
    gpu_held_bytes: int | None = None
    gpu_needed_bytes: int = 0
