"""What happens to inference children: reported once each through `on_change`, for logs, metrics and mode steps."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lost:
    """A child is gone. `cause` is `exited`, `hang` or `protocol`; `busy` names the models at work in it then.

    `delay_s` is how long the replacement waits: above 0 the restart budget is spent, and a mode step down is due.
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


Change = Lost | Restored | Parked


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
    """One child now. `pid`, `rss_bytes` are None while there is none; `pss_bytes` is as of the last measurement.

    The child is not dumpable, so only itself can read its PSS: `stats()` shows the last answer and asks for the next.
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
