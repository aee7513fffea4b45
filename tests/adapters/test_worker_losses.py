"""Losses of inference children: who fails, who does not, how soon it is over, and what is left behind."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from appliance.adapters.inference.changes import Change, Lost, Parked, Restored
from appliance.adapters.inference.limits import Limits
from appliance.adapters.inference.workers import Workers
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.vocabulary import Platform

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`

ROOT = Path(__file__).parent.parent.parent
READER = ROOT / "build/models/label-reader.onnx"
DETECTOR = ROOT / "build/models/face-detector.tflite"
X = np.ones((3, 4), np.float32)


def graph(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> bytes:
    made = helper.make_graph(nodes, "g", inputs, outputs)
    model: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return model


def value(name: str, shape: list[object], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


DOUBLE = graph([helper.make_node("Add", ["x", "x"], ["y"])], [value("x", ["n", 4])], [value("y", ["n", 4])])
SPLIT = graph(
    [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Neg", ["x"], ["minus"]), helper.make_node("Neg", ["k"], ["less"])],
    [value("x", ["n", "m"]), value("k", ["n", 2], TensorProto.INT64)],
    [value("where", [2, "found"], TensorProto.INT64), value("minus", ["n", "m"]), value("less", ["n", 2], TensorProto.INT64)],
)
TEXT = graph([helper.make_node("Identity", ["x"], ["y"])], [value("x", ["n"], TensorProto.STRING)], [value("y", ["n"], TensorProto.STRING)])


def weights(content: bytes) -> Callable[[], int]:
    def opened() -> int:
        fd = os.memfd_create("weights", os.MFD_CLOEXEC)
        os.write(fd, content)
        return fd

    return opened


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def descriptors(pid: int) -> set[Path]:
    return set(Path(f"/proc/{pid}/fd").iterdir())


def open_files(pid: int, numbers: tuple[int, ...] = ()) -> set[str]:
    """What a process has open that lies on a disk; only these descriptors if given."""
    wanted = {Path(f"/proc/{pid}/fd/{number}") for number in numbers} or descriptors(pid)
    links = {str(one.readlink()) for one in wanted}
    return {link for link in links if link.startswith("/") and not link.startswith(("/memfd:", "/dev/"))}


async def until(met: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not met():  # noqa: ASYNC110  (what is waited for happens in another process)
            await asyncio.sleep(0.01)


async def test_data_dependent_shapes_and_mixed_types_come_back_exactly() -> None:
    """Outputs of unknown size, several types and a changing batch equal onnxruntime in this process, first time and again."""
    here = onnxruntime.InferenceSession(SPLIT, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(3)
    async with Workers() as workers:
        await workers.load("split", Platform.ONNX, weights(SPLIT))
        for n, m in [(1, 1), (5, 700), (5, 700), (2, 3), (5, 700), (0, 4), (64, 9000), (64, 9000)]:
            x = (random.random((n, m)) > 0.5).astype(np.float32)
            k = random.integers(-9, 9, (n, 2))
            expected = here.run(None, {"x": x, "k": k})
            answer = await workers.run("split", {"x": x, "k": k}, ())
            assert [name.name for name in here.get_outputs()] == list(answer)
            for array, right in zip(answer.values(), expected, strict=True):
                assert array.dtype == right.dtype
                assert np.array_equal(array, right)
        assert list(await workers.run("split", {"x": x, "k": k}, ("less",))) == ["less"]


async def test_a_strided_input_is_what_it_shows() -> None:
    """An array that is a view with strides arrives as its values, not as its memory."""
    async with Workers() as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        x = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2][:, ::-1]
        assert np.array_equal((await workers.run("double", {"x": x}, ()))["y"], 2 * x)


async def test_the_detector_answers_as_in_this_process() -> None:
    """The LiteRT detector gives the same bits as an interpreter here; its folded batch stays fixed at 1."""
    from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415  (40 MB that only this test needs)

    here = Interpreter(model_content=DETECTOR.read_bytes(), num_threads=1)
    here.allocate_tensors()
    x = np.random.default_rng(5).random((1, 128, 128, 3), dtype=np.float32)
    here.set_tensor(here.get_input_details()[0]["index"], x)
    here.invoke()
    async with Workers() as workers:
        loaded = await workers.load("detector", Platform.LITERT, weights(DETECTOR.read_bytes()))
        assert loaded.signature.inputs[0].shape == (1, 128, 128, 3)
        answer = await workers.run("detector", {loaded.signature.inputs[0].name: x}, ())
        for one in here.get_output_details():
            assert np.array_equal(answer[one["name"]], here.get_tensor(one["index"]))
        with pytest.raises(TheirsError, match="float32"):
            await workers.run("detector", {loaded.signature.inputs[0].name: np.concatenate([x, x])}, ())


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"z": X}, "input 'x'.*missing.*FP32"),
        ({"x": X, "z": X}, "input 'z'.*unknown.*'x'"),
        ({"x": X.astype(np.int64)}, "input 'x'.*int64"),
        ({"x": X[:, :3]}, r"input 'x'.*\[3, 3\].*\[-1, 4\]"),
    ],
    ids=["missing", "extra", "datatype", "shape"],
)
async def test_a_wrong_input_is_named(inputs: dict[str, np.ndarray], named: str) -> None:
    """The refusal says which tensor, what came and what the model takes."""
    async with Workers() as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        with pytest.raises(TheirsError, match=named) as caught:
            await workers.run("double", inputs, ())
        assert caught.value.reason == "malformed"
        with pytest.raises(TheirsError, match=r"output 'q'.*'y'"):
            await workers.run("double", {"x": X}, ("q",))


async def test_models_that_cannot_be_served_are_refused_by_name() -> None:
    """Strings, and a run-time failure, are the model's fault; the child lives on."""
    gather = graph(
        [helper.make_node("Gather", ["t", "i"], ["y"])],
        [value("t", ["n", 4]), value("i", ["n"], TensorProto.INT64)],
        [value("y", ["n", 4])],
    )
    async with Workers() as workers:
        with pytest.raises(TheirsError, match=r"tensor\(string\)"):
            await workers.load("text", Platform.ONNX, weights(TEXT))
        await workers.load("gather", Platform.ONNX, weights(gather))
        pids = workers.pids()
        with pytest.raises(TheirsError, match="gather") as caught:
            await workers.run("gather", {"t": X, "i": np.full(3, 99)}, ())
        assert caught.value.reason == "model"
        assert await workers.run("gather", {"t": X, "i": np.zeros(3, np.int64)}, ())
        assert workers.pids() == pids


@pytest.mark.slow
async def test_a_crash_under_load_costs_only_what_was_in_flight() -> None:
    """Callers see the right answer or `worker_lost`, each exactly once, and answers come again in under 2 s."""
    changes: list[Change] = []
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = session.inter_op_num_threads = 1
    x = np.random.default_rng(1).random((1, 3, 48, 64), dtype=np.float32)
    [right] = onnxruntime.InferenceSession(READER, session, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    outcomes: list[tuple[float, str]] = []

    async def caller(workers: Workers, stop: float) -> None:
        while time.monotonic() < stop:
            try:
                answer = await workers.run("reader", {"x": x}, ())
                assert np.array_equal(next(iter(answer.values())), right)
                outcomes.append((time.monotonic(), "answered"))
            except WorldError as error:
                outcomes.append((time.monotonic(), error.reason))

    async with Workers(on_change=changes.append) as workers:
        await workers.load("reader", Platform.ONNX, weights(READER.read_bytes()))
        callers = [asyncio.create_task(caller(workers, time.monotonic() + 3.0)) for _ in range(6)]
        await asyncio.sleep(0.5)
        os.kill(workers.pids()[0], signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.gather(*callers)
    assert {outcome for _, outcome in outcomes} <= {"answered", "worker_lost"}
    assert sum(outcome == "worker_lost" for _, outcome in outcomes) <= Limits().depth
    back_s = min(at for at, outcome in outcomes if outcome == "answered" and at > killed + 0.05) - killed
    assert back_s < 2.0
    assert [type(change) for change in changes] == [Lost, Restored]


async def test_a_hang_ends_at_its_deadline_and_a_sleeping_daemon_blames_nobody() -> None:
    """A stopped child is killed about when the batch's time is up; a late daemon that finds an answer waiting kills nothing."""
    changes: list[Change] = []
    async with Workers(batch_deadline_s=0.4, on_change=changes.append) as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        task = asyncio.ensure_future(workers.run("double", {"x": X}, ()))
        await asyncio.sleep(0)
        time.sleep(0.6)  # noqa: ASYNC251  (the loop itself is late)
        process = workers._workers[0]._process
        assert process is not None
        process._judge(process._batches)  # as uvloop would: timers before sockets
        assert np.array_equal((await task)["y"], 2 * X)
        assert not changes
        os.kill(workers.pids()[0], signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(WorldError, match="lost") as caught:
            await workers.run("double", {"x": X}, ())
        assert caught.value.reason == "worker_lost"
        assert caught.value.retry_after_s is not None
        assert 0.35 < time.monotonic() - began < 1.0
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)
        [stats] = workers.stats()
        assert (stats.losses, stats.hangs) == (1, 1)


async def test_a_model_that_kills_its_child_is_refused_and_the_others_come_back() -> None:
    """Two tries, then `model`; the model beside it serves again."""
    async with Workers() as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        tries = 0

        def poison() -> int:
            nonlocal tries
            tries += 1
            os.kill(workers.pids()[0], signal.SIGKILL)
            return weights(DOUBLE)()

        with pytest.raises(TheirsError, match="poison") as caught:
            await workers.load("poison", Platform.ONNX, poison)
        assert caught.value.reason == "model"
        assert tries == 2
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)
        with pytest.raises(TheirsError, match="poison"):
            await workers.run("poison", {"x": X}, ())


async def test_a_proven_model_that_cannot_come_back_is_parked_and_tried_again() -> None:
    """While its weights cannot be opened it fails with `worker_lost` at once, the other serves, and later it is back."""
    changes: list[Change] = []
    locked = False

    def sealed() -> int:
        if locked:
            raise WorldError("tpm", "the lease has ended")
        return weights(DOUBLE)()

    async with Workers(limits=Limits(retry_s=0.4), on_change=changes.append) as workers:
        await workers.load("sealed", Platform.ONNX, sealed)
        await workers.load("open", Platform.ONNX, weights(DOUBLE))
        locked = True
        os.kill(workers.pids()[0], signal.SIGKILL)
        await until(lambda: any(isinstance(change, Restored) for change in changes))
        with pytest.raises(WorldError, match="lease") as caught:
            await workers.run("sealed", {"x": X}, ())
        assert caught.value.reason == "worker_lost"
        assert await workers.run("open", {"x": X}, ())
        locked = False
        await until(lambda: all(model.loaded for model in workers.stats()[0].models))
        assert np.array_equal((await workers.run("sealed", {"x": X}, ()))["y"], 2 * X)
    assert [change.model for change in changes if isinstance(change, Parked)] == ["sealed"]


async def test_weights_that_raise_reach_the_caller_and_break_nothing() -> None:
    """The error of the callable is raised, a foreign one as ours; the engine goes on."""

    def refuses() -> int:
        raise TheirsError("tampered", "chunk 3")

    def breaks() -> int:
        raise KeyError("chunk")

    async with Workers() as workers:
        with pytest.raises(TheirsError, match="chunk 3"):
            await workers.load("a", Platform.ONNX, refuses)
        with pytest.raises(OursError, match="KeyError"):
            await workers.load("b", Platform.ONNX, breaks)
        assert await workers.load("double", Platform.ONNX, weights(DOUBLE))


async def test_a_storm_of_losses_is_slowed_down() -> None:
    """Beyond the budget a restart waits, callers fail within their bound, and service returns."""
    changes: list[Change] = []
    limits = Limits(restarts=2, backoff_s=0.5, reload_wait_s=0.2)
    async with Workers(limits=limits, on_change=changes.append) as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        for round_ in range(3):
            await until(lambda: all(model.loaded for model in workers.stats()[0].models))
            os.kill(workers.pids()[0], signal.SIGKILL)
            await until(lambda want=round_ + 1: sum(isinstance(change, Lost) for change in changes) == want)
        began = time.monotonic()
        with pytest.raises(WorldError, match="not back"):
            await workers.run("double", {"x": X}, ())
        assert time.monotonic() - began < 0.45
        await until(lambda: all(model.loaded for model in workers.stats()[0].models))
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)
    assert [change.delay_s for change in changes if isinstance(change, Lost)] == [0.0, 0.0, 0.5]


async def test_callers_that_leave_do_not_flood_the_child() -> None:
    """400 batches whose callers leave at once keep the child within its depth, and it serves on."""
    changes: list[Change] = []
    async with Workers(on_change=changes.append) as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        for _ in range(400):
            task = asyncio.ensure_future(workers.run("double", {"x": X}, ()))
            await asyncio.sleep(0)
            task.cancel()
            assert workers.stats()[0].in_flight <= Limits().depth + 1  # + a measurement
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)
    assert not changes


async def test_two_children_share_the_work_and_one_loss_stops_nothing() -> None:
    """With two children, killing one fails what it had in flight; the other answers all along."""
    async with Workers(size=2) as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))
        os.kill(workers.pids()[0], signal.SIGKILL)
        await until(lambda: len(workers.pids()) < 2 or workers.stats()[0].losses == 1)
        began = time.monotonic()
        assert np.array_equal((await workers.run("double", {"x": X}, ()))["y"], 2 * X)
        assert time.monotonic() - began < 0.1


async def test_a_key_loaded_again_is_replaced_and_a_bad_one_is_not() -> None:
    """The new model answers after its load; a file that fails leaves the old one serving."""
    triple = DOUBLE.replace(b"Add", b"Mul")
    async with Workers() as workers:
        await workers.load("m", Platform.ONNX, weights(DOUBLE))
        with pytest.raises(TheirsError, match="model 'm'"):
            await workers.load("m", Platform.ONNX, weights(b"junk"))
        assert np.array_equal((await workers.run("m", {"x": 3 * X}, ()))["y"], 6 * X)
        await workers.load("m", Platform.ONNX, weights(triple))
        assert np.array_equal((await workers.run("m", {"x": 3 * X}, ()))["y"], 9 * X)
        assert len(workers.stats()[0].models) == 1


async def test_unload_returns_the_memory() -> None:
    """48 MiB of weights are gone from the child after `unload`."""
    big = helper.make_tensor("w", TensorProto.FLOAT, [4, 3 << 20], np.ones((4, 3 << 20), np.float32).tobytes(), raw=True)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [value("x", ["n", 4])], [value("y", ["n", 3 << 20])], [big]
    )
    content = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    async with Workers() as workers:
        await workers.load("double", Platform.ONNX, weights(DOUBLE))  # the run-time itself stays
        await workers.load("warm", Platform.ONNX, weights(content))
        loaded = workers.stats()[0]
        assert loaded.pss_bytes is not None
        assert [model.grew_bytes > 45 << 20 for model in loaded.models] == [False, True]
        await workers.unload("warm")
        after = workers.stats()[0].pss_bytes
        assert after is not None
        assert loaded.pss_bytes - after > 45 << 20


async def test_the_child_ignores_polite_signals_and_shows_nothing() -> None:
    """SIGINT and SIGTERM are the daemon's; the child holds no file, dumps no core, and dies before the daemon under memory pressure."""
    async with Workers() as workers:
        await workers.load("reader", Platform.ONNX, weights(READER.read_bytes()))
        [pid] = workers.pids()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        await workers.run("reader", {"x": np.zeros((1, 3, 48, 32), np.float32)}, ())
        assert workers.pids() == [pid]
        assert not open_files(pid) - open_files(os.getpid(), (1, 2))
        assert "weights" not in proc(pid, "maps")
        assert ".onnx" not in proc(pid, "maps")
        [core] = [line for line in proc(pid, "limits").splitlines() if line.startswith("Max core")]
        assert core.split()[4:6] == ["0", "0"]
        assert proc(pid, "oom_score_adj").strip() == "500"


@pytest.mark.slow
async def test_rounds_of_load_unload_and_crash_leak_no_descriptor_and_no_process() -> None:
    """After 10 rounds of 3 this process has the descriptors that it had, and no child."""
    gc.collect()
    before = descriptors(os.getpid())
    for _ in range(10):
        async with Workers(limits=Limits(restarts=99)) as workers:
            await workers.load("double", Platform.ONNX, weights(DOUBLE))
            pids = set(workers.pids())
            await workers.run("double", {"x": X}, ())
            await workers.unload("double")
            await workers.load("double", Platform.ONNX, weights(DOUBLE))
            task = asyncio.ensure_future(workers.run("double", {"x": X}, ()))
            await asyncio.sleep(0)
            os.kill(workers.pids()[0], signal.SIGKILL)
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda pool=workers: pool.stats()[0].losses == 1)  # the batch may have been answered just before
            await workers.run("double", {"x": X}, ())
            pids |= set(workers.pids())
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    gc.collect()
    assert len(descriptors(os.getpid())) <= len(before)


async def test_closing_tells_everyone_who_waits() -> None:
    """Batches in flight and later ones fail with `worker_lost`, a load too; closing twice is no error."""
    workers = Workers()
    await workers.load("double", Platform.ONNX, weights(DOUBLE))
    os.kill(workers.pids()[0], signal.SIGSTOP)
    run = asyncio.ensure_future(workers.run("double", {"x": X}, ()))
    load = asyncio.create_task(workers.load("other", Platform.ONNX, weights(DOUBLE)))
    await asyncio.sleep(0.05)
    await workers.close()
    for error in await asyncio.gather(run, load, return_exceptions=True):
        assert isinstance(error, WorldError)
        assert error.reason == "worker_lost"
    with pytest.raises(WorldError):
        await workers.load("late", Platform.ONNX, weights(DOUBLE))
    await workers.close()


def test_a_killed_daemon_leaves_no_child(tmp_path: Path) -> None:
    """SIGKILL of the parent ends the child, busy or not."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
            import asyncio, os, sys
            from pathlib import Path
            from appliance.adapters.inference.workers import Workers
            from appliance.contract.vocabulary import Platform

            def weights():
                fd = os.memfd_create("weights")
                os.write(fd, Path(sys.argv[1]).read_bytes())
                return fd

            async def main():
                workers = Workers()
                await workers.load("reader", Platform.ONNX, weights)
                print(workers.pids()[0], flush=True)
                await asyncio.sleep(60)

            asyncio.run(main())
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script, READER], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    give_up = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)
