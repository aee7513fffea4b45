"""The pool of inference children: the same bits as in this process, and a crash or a hang costs one process, not the daemon."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from appliance.adapters.inference.workers import Workers
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.vocabulary import Platform

MODELS = Path(__file__).parent.parent.parent / "build/models"
READER = MODELS / "label-reader.onnx"
X = np.random.default_rng(7).random((2, 3, 48, 160), dtype=np.float32)


def weights(path: Path) -> Callable[[], int]:
    def opened() -> int:
        fd = os.memfd_create("weights", os.MFD_CLOEXEC)
        os.write(fd, path.read_bytes())
        return fd

    return opened


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    pool = Workers(size=1, threads=1, batch_deadline_s=1.5)
    yield pool
    await pool.close()


def expected(x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(READER, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


async def test_a_child_computes_the_same_bits(workers: Workers) -> None:
    """The answer through shared memory equals onnxruntime in this process, bit for bit, and the dictionary comes along."""
    loaded = await workers.load("reader", Platform.ONNX, weights(READER))
    answer = await workers.run("reader", {"x": X}, ())
    assert np.array_equal(next(iter(answer.values())), expected(X))
    assert len(loaded.signature.metadata["character"]) > 1000


async def test_two_models_of_two_platforms_live_side_by_side(workers: Workers) -> None:
    """A LiteRT detector serves beside the ONNX reader; unloading one leaves the other."""
    await workers.load("reader", Platform.ONNX, weights(READER))
    loaded = await workers.load("detector", Platform.LITERT, weights(MODELS / "face-detector.tflite"))
    spec = loaded.signature.inputs[0]
    shape = tuple(max(size, 1) for size in spec.shape)
    assert await workers.run("detector", {spec.name: np.zeros(shape, np.float32)}, ())
    await workers.unload("detector")
    with pytest.raises(TheirsError):
        await workers.run("detector", {spec.name: np.zeros(shape, np.float32)}, ())
    assert await workers.run("reader", {"x": X}, ())


@pytest.mark.parametrize(
    "inputs",
    [{"y": X}, {}, {"x": X[0]}, {"x": X.astype(np.float64)}, {"x": X[:, :1]}],
    ids=["name", "missing", "rank", "datatype", "size"],
)
async def test_a_wrong_input_is_named_and_costs_nothing(workers: Workers, inputs: dict[str, np.ndarray]) -> None:
    """Names, ranks, datatypes and fixed sizes are checked before the child sees anything."""
    await workers.load("reader", Platform.ONNX, weights(READER))
    before = workers.pids()
    with pytest.raises(TheirsError):
        await workers.run("reader", inputs, ())
    assert workers.pids() == before


async def test_garbage_is_no_model(workers: Workers, tmp_path: Path) -> None:
    """A file that cannot be loaded is refused by name, and a good model still loads."""
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a model")
    with pytest.raises(TheirsError, match="bad"):
        await workers.load("bad", Platform.ONNX, weights(bad))
    assert await workers.load("reader", Platform.ONNX, weights(READER))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["crash", "hang"])
async def test_a_lost_child_is_replaced_and_nothing_hangs(workers: Workers, number: signal.Signals) -> None:
    """Under load, every request is answered rightly or fails with `worker_lost`, and service comes back by itself."""
    await workers.load("reader", Platform.ONNX, weights(READER))
    right = expected(X)
    [pid] = workers.pids()

    async def ask() -> str:
        try:
            answer = await workers.run("reader", {"x": X}, ())
        except WorldError as error:
            return error.reason
        assert np.array_equal(next(iter(answer.values())), right)
        return "answered"

    load = [asyncio.create_task(ask()) for _ in range(4)]
    os.kill(pid, number)
    async with asyncio.timeout(10):
        outcomes = set(await asyncio.gather(*load))
        for _ in range(200):
            if await ask() == "answered":
                break
            await asyncio.sleep(0.05)
    assert outcomes <= {"answered", "worker_lost"}
    assert workers.pids() != [pid]


async def test_close_leaves_no_process() -> None:
    """The children are gone when `close` returns."""
    pool = Workers(size=2, threads=1)
    await pool.load("reader", Platform.ONNX, weights(READER))
    pids = pool.pids()
    assert len(pids) == 2
    await pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
