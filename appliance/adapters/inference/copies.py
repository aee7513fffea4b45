"""The models that one worker is to hold, and what becomes of each.

1. Loaded first is what was struck, alone, so that nothing else can be blamed or hurt; then what was served before; then what is new.
2. Two strikes (a process that died or hung while it loaded the model): a new model is refused as `model`, a proven one is parked and tried
   again later.
3. A model that comes back with another signature is not the one that was admitted, and is parked.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from appliance.adapters.inference.changes import Change, Parked
from appliance.adapters.inference.exchange import Form
from appliance.adapters.inference.limits import Limits
from appliance.adapters.inference.process import LoadReport, Process
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.inference import Signature
from appliance.contract.vocabulary import Platform

_STRIKES = 2


@dataclass(eq=False, slots=True)
class Copy:
    """One model as this worker is to hold it. `form` is None until it was loaded for the first time.

    `process` is where it is loaded now; `settled` is set while there is no point in waiting: it is loaded, or `error` says why not.
    """

    key: str
    handle: int
    platform: Platform
    weights: Callable[[], int]
    first: asyncio.Future[Signature]
    form: Form | None = None
    process: Process | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    error: ApplianceError | None = None
    strikes: int = 0
    retry_at: float = 0.0
    retry_s: float = 0.0
    provider: str = ""
    weights_bytes: int = 0
    grew_bytes: int = 0
    needs_bytes: int = 0
    gpu_bytes: int = 0

    def note(self, report: LoadReport) -> None:
        """Keep what its present process said of it."""
        self.provider, self.weights_bytes = report.provider, report.weights_bytes
        self.grew_bytes, self.needs_bytes, self.gpu_bytes = report.grew_bytes, report.needs_bytes, report.gpu_bytes


class Roster:
    """What one worker is to hold: which model to load next, which one is to blame, and who may stop waiting. `wake` wakes the worker."""

    def __init__(self, number: int, limits: Limits, tell: Callable[[Change], None], wake: asyncio.Event) -> None:
        self._number = number
        self._limits = limits
        self._tell = tell
        self._wake = wake
        self.models: dict[int, Copy] = {}
        self.closed = False

    def within(self, process: Process) -> list[Copy]:
        """The models that are loaded in a process."""
        return [model for model in self.models.values() if model.process is process]

    def lost(self) -> None:
        """The process is gone, and every model with it."""
        for model in self.models.values():
            model.process = None
            if model.error is None:
                model.settled.clear()

    def next(self) -> Copy | None:
        """Choose what to load: what was struck first, then what was served before, then what is new."""
        now = asyncio.get_running_loop().time()
        due = [one for one in self.models.values() if one.process is None and one.retry_at <= now]
        return min(due, key=lambda one: (-one.strikes, one.form is None), default=None)

    def admit(self, process: Process, model: Copy, signature: Signature) -> bool:
        """Let batches through to a loaded model; False if it is not wanted (any more)."""
        if model.handle not in self.models:
            return False
        if model.form is not None and model.form.signature != signature:
            self.refuse(model, TheirsError("model", "came back with another signature", where=f"model {model.key!r}"))
            return False
        if process.alive:  # if not, it died between its answer and now, and the model is not to blame
            model.form = model.form or Form(signature)
            model.process, model.error, model.strikes, model.retry_s = process, None, 0, 0.0
            model.settled.set()
            if not model.first.done():
                model.first.set_result(signature)
        return True

    def strike(self, model: Copy) -> None:
        """Count a death of the process that loaded this model against it."""
        model.strikes += 1
        if model.strikes >= _STRIKES:
            text = f"the process that loads it died or hung, {model.strikes} times in a row"
            self.refuse(model, TheirsError("model", text, where=f"model {model.key!r}", remedy="check the file with its run-time"))

    def refuse(self, model: Copy, error: ApplianceError) -> None:
        """Fail a new model; park a proven one; forget one that is not wanted any more."""
        if model.handle not in self.models:
            return
        if not model.first.done():
            self.models.pop(model.handle, None)
            model.first.set_exception(error)
            return
        loop = asyncio.get_running_loop()
        model.retry_s = min(self._limits.backoff_max_s, 2 * model.retry_s or self._limits.retry_s)
        model.retry_at = loop.time() + model.retry_s
        model.strikes = 0
        model.error = away(f"cannot be loaded again: {error}", model.key)
        model.settled.set()
        if not self.closed:
            loop.call_later(model.retry_s, self._wake.set)
            self._tell(Parked(self._number, model.key, error.reason, str(error), model.retry_s))

    async def settled(self, model: Copy, give_up: float) -> None:
        """Return when there is no point in waiting for a model any longer; `give_up` is in the loop's time. Raises: WorldError (`worker_lost`)."""
        try:
            async with asyncio.timeout_at(give_up):
                await model.settled.wait()
        except TimeoutError:
            raise away("its process was lost and is not back yet", model.key) from None
        if model.error is not None:
            raise _again(model.error)


async def descriptor(weights: Callable[[], int]) -> int:
    """Call `weights` in a thread; a descriptor that comes after a cancellation is closed."""
    future = asyncio.get_running_loop().run_in_executor(None, weights)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(_discard)
        raise
    except ApplianceError:
        raise
    except Exception as error:
        raise OursError("weights", f"{type(error).__name__}: {error}", where="the callable that opens weights") from error


def _discard(future: asyncio.Future[int]) -> None:
    if not future.cancelled() and future.exception() is None:
        os.close(future.result())


def _again(error: ApplianceError) -> ApplianceError:
    """Return the same error anew: an exception that is raised twice collects both tracebacks."""
    return type(error)(error.reason, error.what, where=error.where, remedy=error.remedy, retry_after_s=error.retry_after_s)


def away(what: str, key: str = "") -> WorldError:
    """The error of whoever meets a process that is not there."""
    return WorldError("worker_lost", what, where=f"model {key!r}" if key else "inference engine", remedy="try again", retry_after_s=1.0)
