"""Renewal of inference children: a fresh process takes over between two batches, and nobody notices but the memory."""

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from appliance.adapters.inference.changes import Change, Lost, Renewed, Restored
from appliance.adapters.inference.limits import Limits
from appliance.adapters.inference.workers import Workers
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.vocabulary import Platform
from appliance.core.serve.renewal import Holding, Renewal

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`

ROOT = Path(__file__).parent.parent.parent
READER = ROOT / "build/models/label-reader.onnx"
X = np.ones((3, 4), np.float32)


def graph(operator: str) -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    made = helper.make_graph([helper.make_node(operator, ["x", "x"], ["y"])], "g", values[:1], values[1:])
    model: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return model


DOUBLE, SQUARE = graph("Add"), graph("Mul")


def weights(content: bytes) -> Callable[[], int]:
    def opened() -> int:
        fd = os.memfd_create("weights", os.MFD_CLOEXEC)
        os.write(fd, content)
        return fd

    return opened


async def until(met: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not met():  # noqa: ASYNC110  (what is waited for happens in another process)
            await asyncio.sleep(0.005)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def test_under_load_no_request_fails_and_none_waits_for_the_swap() -> None:
    """Six callers see right answers only, none of them later than the renewal would explain; the old process is gone when it returns."""
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = session.inter_op_num_threads = 1
    x = np.random.default_rng(1).random((1, 3, 48, 64), dtype=np.float32)
    [right] = onnxruntime.InferenceSession(READER, session, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    changes: list[Change] = []
    took: list[float] = []
    over = False

    async def caller(workers: Workers) -> None:
        while not over:
            began = time.monotonic()
            answer = await workers.run("reader", {"x": x}, ())
            took.append(time.monotonic() - began)
            assert np.array_equal(next(iter(answer.values())), right)

    async with Workers(on_change=changes.append) as workers:
        await workers.load("reader", Platform.ONNX, weights(READER.read_bytes()))
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        [old] = workers.pids()
        callers = [asyncio.create_task(caller(workers)) for _ in range(6)]
        await workers.renew(0)
        assert gone(old)
        before = len(took)
        await until(lambda: len(took) >= before + 12)
        over = True
        await asyncio.gather(*callers)
        [change] = changes
        assert isinstance(change, Renewed)
        assert workers.pids() == [change.pid] != [old]
        assert max(took) < change.took_s
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)
        assert workers.stats()[0].losses == 0


async def test_a_renewal_that_fails_leaves_the_old_process_serving() -> None:
    """Weights that cannot be opened now, or a fresh process that dies, cost the renewal and nothing else."""
    changes: list[Change] = []
    trouble: Callable[[], None] = list

    def opened() -> int:
        trouble()
        return weights(DOUBLE)()

    def sealed() -> None:
        raise WorldError("tpm", "the lease has ended")

    async with Workers(on_change=changes.append) as workers:
        await workers.load("double", Platform.ONNX, opened)
        [old] = workers.pids()
        trouble = sealed
        with pytest.raises(WorldError, match="lease"):
            await workers.renew(0)

        def killed() -> None:
            fresh = workers._workers[0]._beside
            assert fresh is not None
            os.kill(fresh.pid, signal.SIGKILL)

        trouble = killed
        with pytest.raises(WorldError, match="lost"):
            await workers.renew(0)
        trouble = list
        assert workers.pids() == [old]
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)
        assert not changes
        assert workers.stats()[0].losses == 0
        await until(lambda: workers.stats() and len(workers._workers[0]._processes()) == 1)
        await asyncio.gather(workers.renew(0), workers.renew(0))
        assert [type(change) for change in changes] == [Renewed]


async def test_an_old_process_that_dies_meanwhile_is_succeeded_all_the_same() -> None:
    """The fresh process takes over at once: the loss is told, and the restoration."""
    changes: list[Change] = []

    def opened() -> int:
        if len(calls := workers._workers[0]._processes()) > 1:
            os.kill(min(process.pid for process in calls), signal.SIGKILL)
            time.sleep(0.2)  # in a thread: the daemon sees the loss before the load
        return weights(DOUBLE)()

    async with Workers(on_change=changes.append) as workers:
        await workers.load("double", Platform.ONNX, opened)
        [old] = workers.pids()
        run = asyncio.create_task(workers.renew(0))
        await until(lambda: any(isinstance(change, Lost) for change in changes))
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)
        await run
        assert workers.pids() != [old]
        await until(lambda: len(changes) == 3)
    assert [type(change) for change in changes] == [Lost, Renewed, Restored]


async def test_a_process_that_dies_before_its_renewal_begins_is_simply_replaced() -> None:
    """Whoever asked is told at once, and not after a backoff; the replacement is fresh anyway."""

    def slow() -> int:
        time.sleep(0.3)  # in a thread: the worker is busy loading
        return weights(SQUARE)()

    async with Workers() as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        load = asyncio.create_task(workers.load("square", Platform.ONNX, slow))
        renewal = asyncio.create_task(workers.renew(0))
        await asyncio.sleep(0.05)
        os.kill(workers.pids()[0], signal.SIGKILL)
        with pytest.raises(WorldError, match="before it could be renewed"):
            await renewal
        await load
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)


async def test_what_is_loaded_and_unloaded_meanwhile_is_right_afterwards() -> None:
    """A model unloaded during a renewal is not in the fresh process; one that came meanwhile is."""

    def slow() -> int:
        time.sleep(0.1)  # in a thread
        return weights(SQUARE)()

    async with Workers() as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        await workers.load("square", Platform.ONNX, slow)
        renewal = asyncio.create_task(workers.renew(0))
        await until(lambda: workers._workers[0]._beside is not None)
        load = asyncio.create_task(workers.load("late", Platform.ONNX, weights(SQUARE)))
        await workers.unload("double")
        await asyncio.gather(renewal, load)
        with pytest.raises(TheirsError, match="not loaded"):
            await workers.run("double", {"x": X}, ())
        for key in ("square", "late"):
            assert np.array_equal((await workers.run(key, {"x": 3 * X}, ()))["y"], 9 * X)
        await until(lambda: len(workers._workers[0]._processes()) == 1 or not workers.stats())
        assert [model.key for model in workers.stats()[0].models] == ["square", "late"]


async def test_an_old_process_that_hangs_in_its_last_batch_ends_at_its_deadline() -> None:
    """That batch fails with `worker_lost`, it is told as a loss without delay, and the fresh process serves all the while."""
    changes: list[Change] = []
    async with Workers(batch_deadline_s=0.6, on_change=changes.append) as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        [old] = workers.pids()
        renewal = asyncio.create_task(workers.renew(0))
        process = workers._workers[0]._process
        assert process is not None
        stuck: list[asyncio.Future[dict[str, np.ndarray]] | None] = []

        def swap(change: Change) -> None:
            changes.append(change)
            if isinstance(change, Renewed) and not stuck:
                os.kill(old, signal.SIGSTOP)
                handle, copy = next(iter(workers._workers[0].models.items()))
                assert copy.form is not None
                stuck.append(process.run(handle, "double", copy.form, ({"x": X}, ()), lambda: None))

        workers._on_change = swap
        await until(lambda: bool(stuck))
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)
        assert stuck[0] is not None
        with pytest.raises(WorldError) as caught:
            await stuck[0]
        assert caught.value.reason == "worker_lost"
        await renewal
        assert gone(old)
    assert [type(change) for change in changes] == [Renewed, Lost]
    assert isinstance(changes[1], Lost)
    assert (changes[1].cause, changes[1].delay_s) == ("hang", 0.0)


async def test_closing_ends_a_renewal() -> None:
    """Whoever waits for one is told, and neither process is left."""
    workers = Workers()
    await workers.load("double", Platform.ONNX, weights(DOUBLE))
    renewal = asyncio.create_task(workers.renew(0))
    await until(lambda: workers._workers[0]._beside is not None)
    pids = [process.pid for process in workers._workers[0]._processes()]
    assert len(pids) == 2
    await workers.close()
    with pytest.raises(WorldError, match="closed"):
        await renewal
    assert all(map(gone, pids))
    with pytest.raises(WorldError, match="closed"):
        await workers.renew(0)


LEAKS = """
    import sys
    from appliance.adapters.inference import child, onnx
    kept = []
    onnx.OnnxModel.unload = lambda self: kept.append(bytearray(b"x" * (32 << 20)))
    child.main(sys.argv[1:])
"""


async def test_a_fragmented_child_is_found_and_renewed() -> None:
    """A run-time that keeps 32 MiB at each unload: the ratio shows in `stats`, the decision falls, and the fresh child is whole."""
    command = (sys.executable, "-P", "-c", textwrap.dedent(LEAKS))
    changes: list[Change] = []
    async with Workers(limits=Limits(rest_s=0.1), command=command, on_change=changes.append) as workers:
        await workers.load("square", Platform.ONNX, weights(SQUARE))

        def seen() -> Holding:
            [stats] = workers.stats()
            return Holding(0, stats.pid, stats.held_bytes, stats.needed_bytes, stats.resting, stats.batches)

        await until(lambda: seen().resting)
        renewal = Renewal()
        assert renewal.observe(0.0, [seen()], calm=True) is None
        before = workers.stats()[0].held_bytes
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        await workers.unload("double")
        await until(lambda: (seen().held or 0) > (before or 0) + (30 << 20))
        told = renewal.observe(1.0, [seen()], calm=True)
        assert told is not None
        assert told.ratio > 0.3
        await workers.renew(told.worker)
        renewal.done(told.worker)
        await until(lambda: seen().resting)
        assert renewal.observe(99_999.0, [seen()], calm=True) is None
        assert np.array_equal((await workers.run("square", {"x": 3 * X}, ()))["y"], 9 * X)
    assert isinstance(changes[0], Renewed)
    assert changes[0].ratio > 0.3


async def test_a_working_child_is_not_taken_for_a_fragmented_one() -> None:
    """The label reader at rest after 100 batches of many widths: what it holds above its need is little, and counted as its way of working."""
    async with Workers(limits=Limits(rest_s=0.1)) as workers:
        await workers.load("reader", Platform.ONNX, weights(READER.read_bytes()))
        for count in range(100):
            await workers.run("reader", {"x": np.zeros((1 + count % 3, 3, 48, 32 + 8 * (count % 9)), np.float32)}, ())
        await until(lambda: workers.stats()[0].resting)
        [stats] = workers.stats()
        assert stats.batches == 100
        assert stats.held_bytes is not None
        assert stats.needed_bytes is not None
        assert -0.05 < 1 - stats.needed_bytes / stats.held_bytes < 0.15
