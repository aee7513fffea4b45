"""One place in the pool: keeps a child process up, with its copies of the models in it, whatever happens to processes.

1. One task does all starting and loading, one thing after the other, so that blame for a death during a load is exact.
2. After a loss every model is loaded again through its `weights`; `run` waits for that, at most `reload_wait_s`.
3. Strikes: a child that dies while it loads a model loads that model first next time, alone, so that nothing else can be blamed or hurt.
   A new model that does it again (or hangs) is refused as `model`. A proven one is parked and tried again later: a device must
   not lose its model for good because the kernel killed it twice under memory pressure.
4. Starts are bounded by the restart budget (`limits`); every loss, restoration and parking is told once through `tell`.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from appliance.adapters.inference.changes import Change, Lost, ModelStats, Parked, Restored, WorkerStats
from appliance.adapters.inference.exchange import Form
from appliance.adapters.inference.limits import Limits, RestartBudget
from appliance.adapters.inference.process import Process
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.inference import Array, Signature
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


class Worker:
    """One supervised child. Start `supervise` as a task; cancel it, then `close`."""

    def __init__(self, number: int, threads: int, limits: Limits, tell: Callable[[Change], None]) -> None:
        self._number = number
        self._threads = threads
        self._limits = limits
        self._tell = tell
        self._budget = RestartBudget(limits)
        self._process: Process | None = None
        self._dying: set[Process] = set()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(limits.depth)
        self._delay_s = 0.0
        self._lost_at: float | None = None
        self._losses = 0
        self._hangs = 0
        self._busy_ns = 0
        self._closed = False
        self.busy = 0
        self.models: dict[int, Copy] = {}

    async def supervise(self) -> None:
        """Start a process, load what is to be loaded, start over when it is lost; ends only by cancellation."""
        while True:
            await asyncio.sleep(self._delay_s)
            process = await self._up()
            while process is not None and process.alive:
                self._wake.clear()
                model = self._next()
                if model is not None:
                    await self._bring(process, model)
                else:
                    self._restored(process)
                    await self._wake.wait()

    async def load(self, model: Copy) -> Signature:
        """Load a new model. Raises: TheirsError (`model`), WorldError (`memory`, `worker_lost`), and what its `weights` raises."""
        self.models[model.handle] = model
        self._wake.set()
        try:
            return await model.first
        except BaseException:
            self.models.pop(model.handle, None)
            raise

    async def unload(self, model: Copy) -> None:
        """Forget a model; its memory is back when this returns."""
        self.models.pop(model.handle, None)
        model.error = TheirsError("unknown_model", "was unloaded", where=f"model {model.key!r}")
        model.settled.set()
        process, model.process = model.process, None
        if process is not None:
            with contextlib.suppress(ApplianceError):  # a lost process holds nothing
                await process.unload(model.handle)

    async def run(self, model: Copy, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run a checked batch as soon as the model is loaded and the child has a slot.

        Raises: TheirsError (`model`, `oversized`), WorldError (`memory`, `worker_lost`).
        """
        give_up = asyncio.get_running_loop().time() + self._limits.reload_wait_s
        self.busy += 1
        try:
            while True:
                if model.process is None:
                    await self._settled(model, give_up)
                await self._slots.acquire()
                future = await self._posted(model, inputs, outputs)
                if future is not None:
                    return await asyncio.shield(future)
        finally:
            self.busy -= 1

    @property
    def pid(self) -> int | None:
        """The process id of the child, None while there is none."""
        return self._process.pid if self._process is not None and self._process.alive else None

    def stats(self) -> WorkerStats:
        """What this worker holds now; asks the child for a fresh measurement, which the next call shows."""
        process = self._process if self._process is not None and self._process.alive else None
        if process is not None:
            process.measure()
        copies = self.models.values()
        return WorkerStats(
            worker=self._number,
            pid=self.pid,
            rss_bytes=None if process is None else _rss_bytes(process.pid),
            pss_bytes=None if process is None else process.pss_bytes,
            arena_bytes=0 if process is None else process.exchange.size,
            in_flight=0 if process is None else process.in_flight,
            losses=self._losses,
            hangs=self._hangs,
            busy_s=(self._busy_ns + (0 if process is None else process.busy_ns)) / 1e9,
            models=tuple(ModelStats(one.key, one.process is not None, one.provider, one.weights_bytes, one.grew_bytes) for one in copies),
        )

    async def close(self) -> None:
        """Kill the process and wait until it is gone; whoever waits is told `worker_lost`."""
        self._closed = True
        if self._process is not None:
            self._process.kill("closed")
            self._dying.add(self._process)
        for model in tuple(self.models.values()):
            model.process = None
            self._refuse(model, _away("the engine is closed"))
        await asyncio.gather(*(process.reaped() for process in self._dying))

    async def _posted(self, model: Copy, inputs: Mapping[str, Array], outputs: Sequence[str]) -> asyncio.Future[dict[str, Array]] | None:
        """Post a batch; its slot is free when the child has answered, even if the caller has gone. None if the process was lost."""
        future: asyncio.Future[dict[str, Array]] | None = None
        try:
            if model.process is not None and model.form is not None:
                future = await model.process.run(model.handle, model.key, model.form, (inputs, outputs))
                future.add_done_callback(lambda _: self._slots.release())
        finally:
            if future is None:
                self._slots.release()
        return future

    async def _up(self) -> Process | None:
        self._process = None
        try:
            self._process = Process(self._limits, self._threads, self._on_lost)
            await self._process.hello()
        except WorldError:
            if self._process is None:  # nothing was started, so nothing else tells
                self._delay_s = self._budget.lost(time.monotonic()) or self._limits.backoff_s
                self._tell(Lost(self._number, 0, "start", (), self._delay_s))
            return None
        return self._process

    def _next(self) -> Copy | None:
        """Choose what to load: what was struck first, then what was served before, then what is new."""
        now = asyncio.get_running_loop().time()
        due = [one for one in self.models.values() if one.process is None and one.retry_at <= now]
        return min(due, key=lambda one: (-one.strikes, one.form is None), default=None)

    async def _bring(self, process: Process, model: Copy) -> None:
        try:
            fd = await _descriptor(model.weights)
            try:
                model.weights_bytes = os.fstat(fd).st_size
                report = await process.load(model.handle, model.key, model.platform, fd)
            finally:
                os.close(fd)
        except ApplianceError as error:
            if error.reason == "worker_lost" and not process.alive:
                self._strike(model)
            else:
                self._refuse(model, error)
            return
        model.provider, model.grew_bytes = report.provider, report.grew_bytes
        if not self._admit(process, model, report.signature):
            with contextlib.suppress(ApplianceError):
                await process.unload(model.handle)

    def _admit(self, process: Process, model: Copy, signature: Signature) -> bool:
        """Let batches through to a loaded model; False if it is not wanted (any more)."""
        if model.handle not in self.models:
            return False
        if model.form is not None and model.form.signature != signature:
            self._refuse(model, TheirsError("model", "came back with another signature", where=f"model {model.key!r}"))
            return False
        if process.alive:  # if not, it died between its answer and now, and the model is not to blame
            model.form = model.form or Form(signature)
            model.process, model.error, model.strikes, model.retry_s = process, None, 0, 0.0
            model.settled.set()
            if not model.first.done():
                model.first.set_result(signature)
        return True

    def _strike(self, model: Copy) -> None:
        model.strikes += 1
        if model.strikes >= _STRIKES:
            text = f"the process that loads it died or hung, {model.strikes} times in a row"
            self._refuse(model, TheirsError("model", text, where=f"model {model.key!r}", remedy="check the file with its run-time"))

    def _refuse(self, model: Copy, error: ApplianceError) -> None:
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
        model.error = _away(f"cannot be loaded again: {error}", model.key)
        model.settled.set()
        if not self._closed:
            loop.call_later(model.retry_s, self._wake.set)
            self._tell(Parked(self._number, model.key, error.reason, str(error), model.retry_s))

    async def _settled(self, model: Copy, give_up: float) -> None:
        try:
            async with asyncio.timeout_at(give_up):
                await model.settled.wait()
        except TimeoutError:
            raise _away("its process was lost and is not back yet", model.key) from None
        if model.error is not None:
            raise _again(model.error)

    def _on_lost(self, cause: str, busy: tuple[str, ...]) -> None:
        process = self._process
        if process is None:
            raise OursError("worker", "a process that was never started is lost")
        self._losses += 1
        self._hangs += cause == "hang"
        self._busy_ns += process.busy_ns
        self._dying.add(process)
        for model in self.models.values():
            model.process = None
            if model.error is None:
                model.settled.clear()
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        self._delay_s = self._budget.lost(now)
        self._wake.set()
        self._tell(Lost(self._number, process.pid, cause, busy, self._delay_s))

    def _restored(self, process: Process) -> None:
        if self._lost_at is not None:
            took_s = time.monotonic() - self._lost_at
            self._lost_at = None
            loaded = tuple(one.key for one in self.models.values() if one.process is process)
            self._tell(Restored(self._number, process.pid, loaded, took_s))
        self._dying = {one for one in self._dying if one.exit_status is None}


async def _descriptor(weights: Callable[[], int]) -> int:
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


def _away(what: str, key: str = "") -> WorldError:
    return WorldError("worker_lost", what, where=f"model {key!r}" if key else "inference engine", remedy="try again", retry_after_s=1.0)


def _rss_bytes(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/statm", os.O_RDONLY)
        try:
            return int(os.read(fd, 256).split()[1]) * os.sysconf("SC_PAGE_SIZE")
        finally:
            os.close(fd)
    return None
