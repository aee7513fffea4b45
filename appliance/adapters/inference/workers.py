"""The inference engine: a pool of child processes, several models each, and the port `Engine` over it.

1. Every child holds a copy of every model; a batch goes to the one that is least busy. Batches of one child run one after the other.
2. A batch is checked against the model's signature before a child hears of it.
3. When a child is lost, its batches in flight fail with `worker_lost` and are never repeated here: whether a request may run twice is
   its caller's to know. Batches that come while all children are being replaced wait for one, at most `reload_wait_s`.
4. A child whose memory is fragmented is renewed when somebody who knows the moment says so (`renew`): none of its batches fails or waits.
5. A key that is loaded again is replaced: the old model serves until the new one is loaded everywhere.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import structlog

from appliance.adapters.inference import tensors
from appliance.adapters.inference.backend import Options
from appliance.adapters.inference.changes import Change, Lost, Parked, Renewed, Restored, WorkerStats
from appliance.adapters.inference.copies import Copy
from appliance.adapters.inference.limits import Limits
from appliance.adapters.inference.recipe import Recipe
from appliance.adapters.inference.shares import Shares
from appliance.adapters.inference.worker import GpuBytes, Worker
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Array, Signature
from appliance.contract.vocabulary import Platform
from appliance.ports import LoadedModel, Share

_log = structlog.get_logger(__name__)
_DEFAULT = Recipe()


@dataclass(frozen=True, slots=True)
class _Model:
    """One model, and its copies by worker."""

    signature: Signature
    copies: Sequence[tuple[Copy, Worker]]


class Workers:
    """Implements `Engine` with `size` children of `threads` threads each; the bounds are in `limits`, `batch_deadline_s` overrides one.

    Children start with the first load, or on entering (`async with`). `on_change` hears every loss, restoration, renewal and
    parking, in the event loop. `options` trade memory for speed; `gpu_bytes` tells what a process holds on the GPU (`nvml`); `command`
    starts another program as child. Use it in one event loop, whose thread lives as long as the engine.
    """

    def __init__(
        self,
        size: int = 1,
        threads: int = 1,
        *,
        batch_deadline_s: float | None = None,
        limits: Limits = _DEFAULT.limits,
        options: Options = _DEFAULT.options,
        on_change: Callable[[Change], None] | None = None,
        gpu_bytes: GpuBytes | None = None,
        command: Sequence[str] = _DEFAULT.command,
    ) -> None:
        self._size = size
        self._recipe = Recipe(
            limits if batch_deadline_s is None else replace(limits, batch_deadline_s=batch_deadline_s), threads, options, command
        )
        self._on_change = on_change
        self._gpu_bytes: GpuBytes = gpu_bytes or _unknown
        self._handles = itertools.count(1)
        self._workers: list[Worker] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._models: dict[str, _Model] = {}
        self._shares = Shares(self._forget)
        self._closed = False

    async def __aenter__(self) -> Self:
        """Start the children, so that their imports are done when the first model comes."""
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    def share(self, fd: int, size: int) -> Share:
        """Map a caller's memfd of `size` bytes; the descriptor stays the caller's. An input that lies in it whole is not copied.

        Whoever may share is trusted not to attack: it can change a tensor while a model reads it (see `shares`, rule 3).
        Raises: TheirsError (`shared_memory`: it is not sealed against shrinking, or shorter), WorldError (`memory`).
        """
        return self._shares.open(fd, size)

    async def load(self, key: str, platform: Platform, weights: Callable[[], int]) -> LoadedModel:
        """Load a model into every child; one that has the same key is replaced when that is done, and stays if it fails.

        `weights` is called in a thread, once per child and again when a child is replaced.
        Raises: TheirsError (`model`: the file is not loadable), WorldError (`memory`, `worker_lost`), and what `weights` raises.
        """
        self._open()
        loop = asyncio.get_running_loop()
        copies = [(Copy(key, next(self._handles), platform, weights, loop.create_future()), worker) for worker in self._workers]
        try:
            for copy, worker in copies:  # one by one: what kills a child should kill only the first
                signature = await worker.load(copy)
        except BaseException:
            await _forget(copies)
            raise
        before = self._models.get(key)
        self._models[key] = _Model(signature, copies)
        if before is not None:
            await _forget(before.copies)
        return LoadedModel(key, signature)

    def run(self, key: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Awaitable[dict[str, Array]]:
        """Run one batch; empty `outputs` means all. The arrays returned are the caller's own. A batch that can run now is on its way already.

        Raises, itself or what it returns: TheirsError (`unknown_model`, `malformed`, `model`, `oversized`), WorldError (`memory`, `worker_lost`).
        """
        model = self._models.get(key)
        if model is None:
            raise TheirsError("unknown_model", "is not loaded", where=f"model {key!r}")
        tensors.check(model.signature, inputs, outputs)
        copy, worker = model.copies[0] if len(model.copies) == 1 else min(model.copies, key=_reluctance)
        if copy.process is None:
            self._open()
        return worker.run(copy, inputs, outputs)

    async def unload(self, key: str) -> None:
        """Forget a model and return its memory; batches that are in flight are answered. Not an error if it is unknown."""
        model = self._models.pop(key, None)
        if model is not None:
            await _forget(model.copies)

    async def renew(self, worker: int) -> None:
        """Replace a child by a fresh one beside which it serves on; return when the old one is gone. For a moment both hold all models.

        Raises: WorldError (`worker_lost`), TheirsError (`model`), and what `weights` raises: the old child serves on then.
        """
        self._open()
        await self._workers[worker].renew()

    def pids(self) -> list[int]:
        """The process ids of the children that live now."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def stats(self) -> tuple[WorkerStats, ...]:
        """Each child's memory, work and models now, for metrics; takes some 50 us, waits for nothing."""
        return tuple(worker.stats() for worker in self._workers)

    async def close(self) -> None:
        """Kill all children, drain nothing, and return when no process and no descriptor is left."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._models.clear()
        self._shares.close()

    def _open(self) -> None:
        """Start what is not started. Raises: WorldError (`worker_lost`) after `close`, and what broke a supervisor."""
        if self._closed:
            raise WorldError("worker_lost", "is closed", where="inference engine")
        if not self._workers:
            self._workers = [Worker(number, self._recipe, self._tell, self._gpu_bytes) for number in range(self._size)]
            self._tasks = [asyncio.create_task(worker.supervise(), name=f"inference-{n}") for n, worker in enumerate(self._workers)]
        for task in self._tasks:
            if task.done():
                task.result()

    def _forget(self, number: int) -> None:
        for worker in self._workers:
            worker.forget(number)

    def _tell(self, change: Change) -> None:
        match change:
            case Lost():
                _log.warning(
                    "inference_child_lost",
                    worker=change.worker,
                    pid=change.pid,
                    cause=change.cause,
                    busy=change.busy,
                    delay_s=change.delay_s,
                )
            case Restored():
                _log.info(
                    "inference_child_restored", worker=change.worker, pid=change.pid, models=change.models, took_s=round(change.took_s, 3)
                )
            case Renewed():
                _log.info(
                    "inference_child_renewed",
                    worker=change.worker,
                    pid=change.pid,
                    ratio=round(change.ratio, 3),
                    took_s=round(change.took_s, 3),
                )
            case Parked():
                _log.error(
                    "model_parked", worker=change.worker, model=change.model, reason=change.reason, what=change.what, retry_s=change.retry_s
                )
        if self._on_change is not None:
            self._on_change(change)


def _reluctance(place: tuple[Copy, Worker]) -> tuple[int, int]:
    """Order copies: loaded ones first, then those worth waiting for, then parked ones; the least busy first."""
    copy, worker = place
    return (0 if copy.process is not None else 1 if copy.error is None else 2), worker.busy


def _unknown(_pid: int) -> int | None:
    return None


async def _forget(copies: Sequence[tuple[Copy, Worker]]) -> None:
    await asyncio.gather(*(worker.unload(copy) for copy, worker in copies))
