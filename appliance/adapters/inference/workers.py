"""The pool of child processes that run models: port `Engine`.

1. Every worker holds every model; a batch goes to the worker that has the least in flight.
2. A lost child fails its batches with `worker_lost` at once and is replaced; the replacement loads all models before it is given work.
3. While no worker is up, `run` waits `wait_s` for one and then fails with `worker_lost`, which is worth trying again.
4. Replacement is at once within the restart budget, and delayed beyond it. A model that kills two children in a row while loading is
   left out until it is loaded anew: the others come back.
"""

import asyncio
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from appliance.adapters.inference import tensors
from appliance.adapters.inference.changes import Change, Lost, Parked, Restored
from appliance.adapters.inference.exchange import Form
from appliance.adapters.inference.limits import Limits, RestartBudget
from appliance.adapters.inference.process import Process
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.inference import Array
from appliance.contract.vocabulary import Platform
from appliance.ports import LoadedModel

LOAD_TRIES = 2


@dataclass(slots=True)
class _Model:
    """One model that every worker should hold. `weights` gives a fresh descriptor at each load."""

    handle: int
    key: str
    platform: Platform
    weights: Callable[[], int]
    form: Form | None = None
    deaths: int = 0


@dataclass(slots=True)
class _Worker:
    """One place in the pool, and the process that fills it now."""

    number: int
    budget: RestartBudget
    process: Process | None = None
    up: bool = False
    lost: "asyncio.Event" = field(default_factory=asyncio.Event)


class Workers:
    """`size` children with `threads` each. `on_change` hears of losses and replacements; limits beyond the deadline have defaults."""

    def __init__(
        self,
        *,
        size: int = 1,
        threads: int = 1,
        batch_deadline_s: float = 10.0,
        wait_s: float = 2.0,
        on_change: Callable[[Change], None] | None = None,
    ) -> None:
        self._limits = Limits(batch_deadline_s=batch_deadline_s)
        self._threads = threads
        self._wait_s = wait_s
        self._on_change = on_change or (lambda _change: None)
        self._workers = [_Worker(number, RestartBudget(self._limits)) for number in range(size)]
        self._models: dict[str, _Model] = {}
        self._handles = itertools.count(1)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._up = asyncio.Condition()
        self._closed = False
        self._log = structlog.get_logger()

    async def load(self, key: str, platform: Platform, weights: Callable[[], int]) -> LoadedModel:
        """Load a model into every worker. Raises: TheirsError (`model`), WorldError (`worker_lost`, `memory`); nothing is kept then."""
        model = _Model(next(self._handles), key, platform, weights)
        for worker in self._workers:
            await self._started(worker)
        try:
            for worker in self._workers:
                await self._load_into(worker, model)
        except ApplianceError:
            await self._forget(model)
            raise
        before = self._models.get(key)
        self._models[key] = model
        if before is not None:
            await self._forget(before)
        if model.form is None:
            raise WorldError("worker_lost", "no worker loaded the model", where=key)
        return LoadedModel(key, model.form.signature)

    async def run(self, key: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run one batch. Raises: TheirsError (`model`, `unknown_model`, or what is wrong with an input), WorldError (`worker_lost`)."""
        model = self._models.get(key)
        if model is None or model.form is None:
            raise TheirsError("unknown_model", "no such model is loaded", where=key)
        tensors.check(model.form.signature, inputs, outputs)
        process = await self._free()
        wanted = outputs or [spec.name for spec in model.form.signature.outputs]
        return await process.run(model.handle, key, model.form, (inputs, wanted))

    async def unload(self, key: str) -> None:
        """Forget a model and give its memory back."""
        model = self._models.pop(key, None)
        if model is not None:
            await self._forget(model)

    def pids(self) -> list[int]:
        """The process ids of the children that are up."""
        return [worker.process.pid for worker in self._workers if worker.process is not None and worker.up]

    async def close(self) -> None:
        """Kill all children; nothing is left of them."""
        self._closed = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill("closed")
                await worker.process.reaped()

    async def _free(self) -> Process:
        async with self._up:
            try:
                await asyncio.wait_for(self._up.wait_for(lambda: any(worker.up for worker in self._workers)), self._wait_s)
            except TimeoutError:
                raise WorldError(
                    "worker_lost", "no inference process is up", where="inference", remedy="try again in a second", retry_after_s=1.0
                ) from None
            running = [worker.process for worker in self._workers if worker.up and worker.process is not None]
            return min(running, key=lambda process: process.in_flight)

    async def _started(self, worker: _Worker) -> None:
        """Make sure that the place is filled; a place that is being refilled is waited for."""
        task = self._tasks.get(worker.number)
        if worker.process is None and task is None:
            await self._fill(worker)
        elif task is not None and not task.done():
            await asyncio.wait([task])

    async def _fill(self, worker: _Worker) -> None:
        """Start a process, load what every worker holds, and open the place. Raises: WorldError (`worker_lost`)."""
        worker.process = process = Process(self._limits, self._threads, lambda cause, busy: self._lost(worker, cause, busy))
        await process.hello()
        for model in tuple(self._models.values()):
            if model.deaths < LOAD_TRIES:
                await self._load_into(worker, model)
        async with self._up:
            worker.up = process.alive
            self._up.notify_all()

    async def _load_into(self, worker: _Worker, model: _Model) -> None:
        process = worker.process
        if process is None or not process.alive:
            raise WorldError("worker_lost", "the inference process ended", where=model.key, retry_after_s=1.0)
        fd = await asyncio.to_thread(model.weights)
        try:
            report = await process.load(model.handle, model.key, model.platform, fd)
        except WorldError:
            model.deaths += 0 if process.alive else 1
            raise
        finally:
            os.close(fd)
        model.deaths = 0
        if model.form is None:
            model.form = Form(report.signature)

    async def _forget(self, model: _Model) -> None:
        for worker in self._workers:
            if worker.process is not None and worker.process.alive:
                try:
                    await worker.process.unload(model.handle)
                except ApplianceError as error:
                    self._log.debug("unload_failed", model=model.key, reason=error.reason)

    def _lost(self, worker: _Worker, cause: str, busy: tuple[str, ...]) -> None:
        loop = asyncio.get_running_loop()
        worker.up = False
        if self._closed or worker.process is None:
            return
        delay_s = worker.budget.lost(loop.time())
        self._on_change(Lost(worker.number, worker.process.pid, cause, busy, delay_s))
        self._log.warning("worker_lost", worker=worker.number, pid=worker.process.pid, cause=cause, busy=busy, delay_s=delay_s)
        running = self._tasks.get(worker.number)
        if running is None or running.done():
            self._tasks[worker.number] = loop.create_task(self._replace(worker, delay_s))

    async def _replace(self, worker: _Worker, delay_s: float) -> None:
        """Fill the place again, however often it takes."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not self._closed:
            await asyncio.sleep(delay_s)
            try:
                await self._fill(worker)
            except ApplianceError as error:
                delay_s = max(delay_s, worker.budget.lost(loop.time()), 0.05)
                self._log.warning("worker_not_replaced", worker=worker.number, reason=error.reason, delay_s=delay_s)
                self._park()
                continue
            if worker.process is not None and worker.up:
                took_s = loop.time() - began
                self._on_change(Restored(worker.number, worker.process.pid, tuple(self._models), took_s))
                self._log.info("worker_restored", worker=worker.number, pid=worker.process.pid, took_s=round(took_s, 3))
                return

    def _park(self) -> None:
        for model in self._models.values():
            if model.deaths == LOAD_TRIES:
                self._on_change(Parked(-1, model.key, "model", "its loading killed the process twice", None))
                self._log.error("model_parked", model=model.key)
