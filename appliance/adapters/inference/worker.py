"""One place in the pool: keeps a child process up, with its copies of the models in it, whatever happens to processes.

1. One task does all starting and loading, one thing after the other, so that blame for a death during a load is exact.
2. After a loss every model is loaded again through its `weights`; `run` waits for that, at most `reload_wait_s`.
3. What is loaded next, and who is to blame for a death, is the roster's to say (`copies`).
4. Starts are bounded by the restart budget (`limits`); every loss, restoration, renewal and parking is told once through `tell`.
5. Renewal: a second process is started, every model is loaded in it, then all copies change over between two batches, and the first
   process is ended when its last batch is answered. Until that moment the first one serves, and whatever goes wrong leaves it serving.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from appliance.adapters.inference.changes import Change, Lost, ModelStats, Renewed, Restored, WorkerStats
from appliance.adapters.inference.copies import Copy, Roster, away, descriptor
from appliance.adapters.inference.limits import RestartBudget
from appliance.adapters.inference.process import LoadReport, Process
from appliance.adapters.inference.recipe import Recipe
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.inference import Array, Signature

GpuBytes = Callable[[int], int | None]
"""How many bytes a process (by pid) holds on the GPU; None if nobody can tell."""


class Worker:
    """One supervised child. Start `supervise` as a task; cancel it, then `close`."""

    def __init__(self, number: int, recipe: Recipe, tell: Callable[[Change], None], gpu_bytes: GpuBytes) -> None:
        self._number = number
        self._recipe = recipe
        self._limits = limits = recipe.limits
        self._tell = tell
        self._gpu_bytes = gpu_bytes
        self._budget = RestartBudget(limits)
        self._process: Process | None = None
        self._beside: Process | None = None
        self._others: set[Process] = set()
        self._renewal: asyncio.Future[Process] | None = None
        self._wake = asyncio.Event()
        self._roster = Roster(number, limits, tell, self._wake)
        self._free = limits.depth
        self._freed = asyncio.Event()
        self._delay_s = 0.0
        self._lost_at: float | None = None
        self._losses = 0
        self._hangs = 0
        self._busy_ns = 0
        self.busy = 0
        self.models = self._roster.models

    async def supervise(self) -> None:
        """Start a process, load what is to be loaded, start over when it is lost; ends only by cancellation."""
        while True:
            await asyncio.sleep(self._delay_s)
            process = await self._up()
            while process is not None and process.alive:
                self._wake.clear()
                model = self._roster.next()
                if model is not None:
                    await self._bring(process, model)
                elif self._renewal is not None:
                    process = await self._succeed(process, self._renewal)
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

    def run(self, model: Copy, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Awaitable[dict[str, Array]]:
        """Run a checked batch: at once, and then what is returned is a future, or as soon as the model is loaded and the child has a slot.

        Raises, itself or what it returns: TheirsError (`model`, `oversized`), WorldError (`memory`, `worker_lost`).
        """
        return self._posted(model, inputs, outputs) or self._run_later(model, inputs, outputs)

    async def _run_later(self, model: Copy, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        give_up = asyncio.get_running_loop().time() + self._limits.reload_wait_s
        self.busy += 1
        try:
            while True:
                if model.process is None:
                    await self._roster.settled(model, give_up)
                elif not self._free:
                    self._freed.clear()
                    await self._freed.wait()
                elif (future := self._posted(model, inputs, outputs)) is not None:
                    break
                elif model.process is not None:
                    await model.process.exchange.room()
        finally:
            self.busy -= 1
        return await future

    async def renew(self) -> None:
        """Replace the process by a fresh one that holds the same models; return when the old one is gone. No batch fails by it.

        Raises: WorldError (`worker_lost`: no process, or the fresh one did not come up), TheirsError (`model`), and what a model's
        `weights` raises; the old process serves on then.
        """
        if self.pid is None:
            raise away("there is no process to renew")
        if self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_future()
            self._wake.set()
        old = await asyncio.shield(self._renewal)
        await old.reaped()

    def forget(self, number: int) -> None:
        """Tell the processes that a lent region is gone."""
        for process in self._processes():
            process.forget(number)

    @property
    def pid(self) -> int | None:
        """The process id of the child, None while there is none."""
        return None if self._process is None else self._process.pid

    def stats(self) -> WorkerStats:
        """What this worker holds now; asks the child for a fresh measurement, which the next call shows."""
        process = self._process
        if process is not None:
            process.measure()
        memory = None if process is None else process.memory
        loaded = [one for one in self.models.values() if one.process is not None]
        self._sweep()
        return WorkerStats(
            worker=self._number,
            pid=self.pid,
            rss_bytes=None if process is None else process.rss_bytes,
            pss_bytes=None if memory is None else memory.pss,
            arena_bytes=0 if process is None else process.exchange.size,
            in_flight=0 if process is None else process.in_flight,
            losses=self._losses,
            hangs=self._hangs,
            busy_s=(self._busy_ns + sum(one.busy_ns for one in self._processes())) / 1e9,
            models=tuple(
                ModelStats(one.key, one.process is not None, one.provider, one.weights_bytes, one.grew_bytes)
                for one in self.models.values()
            ),
            held_bytes=None if memory is None else memory.held,
            needed_bytes=None if memory is None else memory.base + sum(one.needs_bytes for one in loaded),
            resting=memory is not None and memory.resting,
            batches=0 if process is None else process.batches,
            gpu_held_bytes=None if process is None else self._gpu_bytes(process.pid),
            gpu_needed_bytes=sum(one.gpu_bytes for one in loaded),
        )

    async def close(self) -> None:
        """Kill the process and wait until it is gone; whoever waits is told `worker_lost`."""
        self._roster.closed = True
        for process in self._processes():
            process.kill("closed")
        if self._renewal is not None:
            self._end_renewal(self._renewal, away("the engine is closed"))
        for model in tuple(self.models.values()):
            model.process = None
            self._roster.refuse(model, away("the engine is closed"))
        await asyncio.gather(*(process.reaped() for process in self._processes()))

    def _posted(self, model: Copy, inputs: Mapping[str, Array], outputs: Sequence[str]) -> asyncio.Future[dict[str, Array]] | None:
        """Post a batch; its slot is free when the child has answered, even if the caller has gone. None if it cannot be posted now."""
        if model.process is None or model.form is None or not self._free:
            return None
        future = model.process.run(model.handle, model.key, model.form, (inputs, outputs), self._returned)
        if future is not None:
            self._free -= 1
            self.busy += 1
        return future

    def _returned(self) -> None:
        self._free += 1
        self.busy -= 1
        self._freed.set()

    async def _up(self) -> Process | None:
        process = None
        try:
            process = self._process = Process(self._recipe, self._on_lost)
            await process.hello()
        except WorldError:
            if process is None:  # nothing was started, so nothing else tells
                self._delay_s = self._budget.lost(time.monotonic()) or self._limits.backoff_s
                self._tell(Lost(self._number, 0, "start", (), self._delay_s))
            return None
        return process

    async def _bring(self, process: Process, model: Copy) -> None:
        try:
            report = await self._loaded(process, model)
        except ApplianceError as error:
            if error.reason == "worker_lost" and not process.alive:
                self._roster.strike(model)
            else:
                self._roster.refuse(model, error)
            return
        model.note(report)
        if not self._roster.admit(process, model, report.signature):
            with contextlib.suppress(ApplianceError):
                await process.unload(model.handle)

    async def _loaded(self, process: Process, model: Copy) -> LoadReport:
        fd = await descriptor(model.weights)
        try:
            before = self._gpu_bytes(process.pid) or 0
            report = await process.load(model.handle, model.key, model.platform, fd)
            after = self._gpu_bytes(process.pid) or 0
            return replace(report, weights_bytes=os.fstat(fd).st_size, gpu_bytes=max(0, after - before))
        finally:
            os.close(fd)

    async def _succeed(self, old: Process, asked: asyncio.Future[Process]) -> Process:
        """Bring up a second process and change over to it (rule 5); return the one that serves now."""
        began = time.monotonic()
        models = self._roster.within(old)
        fresh: Process | None = None
        try:
            fresh = self._beside = Process(self._recipe, self._on_lost)
            self._others.add(fresh)
            await fresh.hello()
            brought = [(model, await self._beside_old(fresh, model)) for model in models]
            if not fresh.alive:
                raise away("the fresh process was lost before it took over")
        except ApplianceError as error:
            if fresh is not None:
                fresh.kill("closed")
            self._end_renewal(asked, error)
            return old
        finally:
            self._beside = None
        self._process = fresh
        self._others = (self._others | {old}) - {fresh}
        unwanted = []
        for model, report in brought:
            model.note(report)
            if not self._roster.admit(fresh, model, report.signature):
                unwanted.append(model.handle)
        self._tell(Renewed(self._number, fresh.pid, _less(old, fresh), time.monotonic() - began))
        self._end_renewal(asked, old)
        old.leave()
        for handle in unwanted:
            with contextlib.suppress(ApplianceError):
                await fresh.unload(handle)
        return fresh

    async def _beside_old(self, fresh: Process, model: Copy) -> LoadReport:
        report = await self._loaded(fresh, model)
        if model.form is not None and model.form.signature != report.signature:
            raise TheirsError("model", "came back with another signature", where=f"model {model.key!r}")
        return report

    def _end_renewal(self, asked: asyncio.Future[Process], result: Process | ApplianceError) -> None:
        self._renewal = None
        if isinstance(result, Process):
            asked.set_result(result)
        else:
            asked.set_exception(result)
            asked.exception()  # seen: whoever asked may be gone

    def _on_lost(self, process: Process, cause: str, busy: tuple[str, ...]) -> None:
        self._others.add(process)
        if process is self._beside:
            return  # what is being loaded in it fails, and the renewal with it
        self._losses += 1
        self._hangs += cause == "hang"
        if process is not self._process:  # it was leaving
            self._tell(Lost(self._number, process.pid, cause, busy, 0.0))
            return
        self._process = None
        if self._renewal is not None and self._beside is None:
            self._end_renewal(self._renewal, away("its process was lost before it could be renewed"))
        self._roster.lost()
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        self._delay_s = self._budget.lost(now)
        self._wake.set()
        self._tell(Lost(self._number, process.pid, cause, busy, self._delay_s))

    def _restored(self, process: Process) -> None:
        if self._lost_at is not None:
            took_s = time.monotonic() - self._lost_at
            self._lost_at = None
            self._tell(Restored(self._number, process.pid, tuple(one.key for one in self._roster.within(process)), took_s))
        self._sweep()

    def _processes(self) -> set[Process]:
        """All that are not known to be gone."""
        return self._others if self._process is None else self._others | {self._process}

    def _sweep(self) -> None:
        """Let go of processes that the kernel has let go, and keep their work in the sum."""
        gone = {one for one in self._others if one.exit_status is not None}
        self._busy_ns += sum(one.busy_ns for one in gone)
        self._others -= gone


def _less(old: Process, fresh: Process) -> float:
    """By how much less the fresh process holds than the old one, from 0 to 1."""
    if old.memory is None or fresh.memory is None or not old.memory.held:
        return 0.0
    return max(0.0, 1.0 - fresh.memory.held / old.memory.held)
