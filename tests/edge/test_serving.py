"""The serving loop against an engine whose pace the test owns: every caller is told, whatever happens."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Array, Request, Signature, Tags, TensorSpec
from appliance.contract.models import EdgeConstraints, Manifest
from appliance.contract.vocabulary import Datatype, Mode, Outcome, Platform
from appliance.core.serve.degradation import DegradationSettings
from appliance.edge.lane import Hands, Pool, served
from appliance.edge.serving import Serving
from appliance.edge.stand import Form, Policy
from appliance.edge.tally import Tally
from appliance.ports import LoadedModel, Share

SIGNATURE = Signature(Platform.ONNX, (TensorSpec("x", Datatype.FP32, (-1, 2)),), (TensorSpec("y", Datatype.FP32, (-1, 2)),))


BATCH_S = 0.001
"""What a batch takes, however many share it: two pay, whatever this machine does beside."""


class Clock:
    worked_s = 0.0

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + Clock.worked_s

    def wall(self) -> float:
        return 0.0

    async def sleep_until(self, deadline: float) -> None:
        await asyncio.sleep(deadline - self.monotonic())


class Meter:
    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def answered(self, _model: str, _mode: Mode, _seconds: float) -> None:
        self.outcomes.append(Outcome.ANSWERED)

    def failed(self, _model: str, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def batch(self, _model: str, _utilization: float) -> None:
        pass

    def released(self, _model: str, _released_at: float) -> None:
        pass


class GatedEngine:
    """Adds the version's number; v1 waits for `gate`; fails with `error` if it is set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: WorldError | None = None
        self.batches: list[int] = []
        self.unloaded: list[str] = []
        self.signature = SIGNATURE
        self.freed = asyncio.Event()

    def share(self, fd: int, size: int) -> Share:
        raise NotImplementedError

    async def load(self, key: str, _platform: Platform, _weights: Callable[[], int]) -> LoadedModel:
        return LoadedModel(key, self.signature)

    async def run(self, key: str, inputs: Mapping[str, Array], _outputs: Sequence[str]) -> dict[str, Array]:
        self.batches.append(len(inputs["x"]))
        Clock.worked_s += BATCH_S
        if "@v1" in key:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return {"y": np.asarray(inputs["x"]) + np.float32(key.split(":", maxsplit=1)[0][-1])}

    async def unload(self, key: str) -> None:
        self.unloaded.append(key)
        self.freed.set()


FORMS = {Mode.FULL: Form(Platform.ONNX, lambda: -1)}


def manifest(version: str) -> Manifest:
    limits = EdgeConstraints(min_vram_gb=0, max_batch_size=2, target_latency_ms=10)
    return Manifest(model_id="m", version=version, sha256="", token=1, compiled_artifacts={}, edge_constraints=limits, released_at=0.0)


def request(value: float = 0.0, **tags: float) -> Request:
    return Request("", "m", {"x": np.full((1, 2), value, np.float32)}, tags=Tags(**tags))


@pytest.fixture
async def desk() -> tuple[Serving, GatedEngine, Meter]:
    engine, meter, clock = GatedEngine(), Meter(), Clock()
    hands = Hands(engine, clock, Tally(meter, clock), Pool(1), slo_s=0.15, fill_wait_s=0.01)
    serving = Serving(hands, Policy(8, DegradationSettings()), timeout_s=5.0)
    await serving.mount(manifest("v1"), FORMS)
    engine.batches.clear()  # what warmed it up
    return serving, engine, meter


Parts = tuple[Serving, GatedEngine, Meter]


async def test_waiting_requests_share_a_batch_and_each_gets_its_own_answer(desk: Parts) -> None:
    """What came in one round of the loop runs together, at most the largest batch; so does what came while the worker was busy."""
    serving, engine, _ = desk
    engine.gate.clear()
    asked = [asyncio.create_task(serving.infer(request(value))) for value in range(3)]
    await asyncio.sleep(0.01)
    asked.append(asyncio.create_task(serving.infer(request(3))))
    await asyncio.sleep(0.01)
    engine.gate.set()
    answers = await asyncio.gather(*asked)
    assert [float(answer.outputs["y"][0, 0]) for answer in answers] == [1.0, 2.0, 3.0, 4.0]
    assert engine.batches == [2, 2]


async def test_above_twice_the_batch_callers_are_told_at_once_when_to_return(desk: Parts) -> None:
    """Two run, four wait (2 x 2), the next is refused with a hint; nothing that was admitted is lost."""
    serving, engine, meter = desk
    engine.gate.clear()
    admitted = [asyncio.create_task(serving.infer(request())) for _ in range(6)]
    await asyncio.sleep(0.01)
    with pytest.raises(WorldError) as refused:
        await serving.infer(request())
    assert refused.value.reason == "backlog_full"
    assert refused.value.retry_after_s is not None
    engine.gate.set()
    assert len(await asyncio.gather(*admitted)) == 6
    assert meter.outcomes.count(Outcome.BACKLOG_FULL) == 1


async def test_a_request_that_waited_too_long_is_told_by_a_timer(desk: Parts) -> None:
    """Its deadline expires it while the worker is still busy with another."""
    serving, engine, _ = desk
    engine.gate.clear()
    first = asyncio.create_task(serving.infer(request()))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(1):
        with pytest.raises(WorldError) as late:
            await serving.infer(request(timeout_s=0.05))
    assert late.value.reason == "deadline"
    engine.gate.set()
    await first


async def test_a_lost_worker_is_told_to_its_callers_and_the_next_is_served(desk: Parts) -> None:
    """A failed batch fails its own callers with the engine's reason; the desk goes on."""
    serving, engine, meter = desk
    engine.error = WorldError("worker_lost", "gone")
    with pytest.raises(WorldError, match="gone"):
        await serving.infer(request())
    engine.error = None
    assert (await serving.infer(request())).version == "v1"
    assert meter.outcomes == [Outcome.WORKER_LOST, Outcome.ANSWERED]


async def test_a_caller_that_left_costs_nothing(desk: Parts) -> None:
    """A cancelled request that still waited never reaches the engine."""
    serving, engine, meter = desk
    engine.gate.clear()
    first = asyncio.create_task(serving.infer(request()))
    await asyncio.sleep(0.01)
    gone = asyncio.create_task(serving.infer(request()))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    engine.gate.set()
    await first
    assert engine.batches == [1]
    assert Outcome.CANCELLED in meter.outcomes


async def test_a_new_version_takes_over_between_batches(desk: Parts) -> None:
    """What the old version had admitted it answers, what comes later is the new one's, then the old one is unloaded."""
    serving, engine, _ = desk
    engine.gate.clear()
    running = asyncio.create_task(serving.infer(request()))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(serving.infer(request()))
    await asyncio.sleep(0.01)
    await serving.mount(manifest("v2"), FORMS)
    late = asyncio.create_task(serving.infer(request()))
    await asyncio.sleep(0.01)
    assert engine.unloaded == []
    engine.gate.set()
    assert [(await task).version for task in (running, waiting, late)] == ["v1", "v1", "v2"]
    async with asyncio.timeout(2):
        await engine.freed.wait()
    assert [key.split(":")[0] for key in engine.unloaded] == ["m@v1"]


async def test_draining_answers_the_admitted_and_refuses_the_rest(desk: Parts) -> None:
    """On the way down nothing is dropped and nothing new is taken."""
    serving, engine, _ = desk
    engine.gate.clear()
    admitted = asyncio.create_task(serving.infer(request()))
    await asyncio.sleep(0.01)
    draining = asyncio.create_task(serving.drain(2.0))
    await asyncio.sleep(0.01)
    with pytest.raises(WorldError, match="stopping"):
        await serving.infer(request())
    engine.gate.set()
    await draining
    assert (await admitted).version == "v1"


async def test_who_asks_for_another_model_or_version_is_told_what_is_here(desk: Parts) -> None:
    """An unknown name or version is the caller's mistake, and the answer names what there is."""
    serving, _, _ = desk
    with pytest.raises(TheirsError, match="models here: m"):
        await serving.infer(Request("", "n", {"x": np.zeros((1, 2), np.float32)}))
    with pytest.raises(TheirsError, match="'v1'"):
        await serving.infer(Request("", "m", {"x": np.zeros((1, 2), np.float32)}, version="v9"))


def test_a_file_compiled_for_one_batch_size_is_served_as_if_it_were_free() -> None:
    """Axis 0 fixed to 8 everywhere: callers send 1 to 8 rows, the batcher fills up; fixed to 1, or mixed: no batching and nothing is changed."""
    fixed = Signature(Platform.ONNX, (TensorSpec("x", Datatype.FP32, (8, 2)),), (TensorSpec("y", Datatype.FP32, (8, 2)),))
    shown, batchable, compiled = served(fixed)
    assert (shown, batchable, compiled) == (SIGNATURE, True, (8,))
    single = Signature(Platform.ONNX, (TensorSpec("x", Datatype.FP32, (1, 2)),), (TensorSpec("y", Datatype.FP32, (1, 2)),))
    assert served(single) == (single, False, ())
    mixed = Signature(Platform.ONNX, (TensorSpec("x", Datatype.FP32, (8, 2)),), (TensorSpec("y", Datatype.FP32, (4, 2)),))
    assert served(mixed) == (mixed, False, ())


async def test_a_compiled_batch_is_filled_up_and_each_caller_gets_only_its_rows() -> None:
    """Three rows run as eight by repeating the first request, and three come back."""
    engine, meter, clock = GatedEngine(), Meter(), Clock()
    engine.signature = Signature(Platform.ONNX, (TensorSpec("x", Datatype.FP32, (4, 2)),), (TensorSpec("y", Datatype.FP32, (4, 2)),))
    serving = Serving(Hands(engine, clock, Tally(meter, clock), Pool(1), 0.15, 0.01), Policy(8, DegradationSettings()), timeout_s=5.0)
    await serving.mount(manifest("v1"), FORMS)
    assert set(engine.batches) == {4}, "it is warmed up with the size that it takes"
    engine.batches.clear()
    answer = await serving.infer(Request("", "m", {"x": np.arange(6, dtype=np.float32).reshape(3, 2)}))
    assert engine.batches == [4]
    assert answer.outputs["y"].tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


async def test_a_named_time_is_kept_while_the_batch_runs(desk: Parts) -> None:
    """The caller is told at its deadline, not when the worker returns; who shares the batch and named no time gets its answer."""
    serving, engine, meter = desk
    engine.gate.clear()
    patient = asyncio.create_task(serving.infer(request(1.0)))
    started = asyncio.get_running_loop().time()
    with pytest.raises(WorldError, match="in time"):
        await serving.infer(request(2.0, timeout_s=0.1))
    assert asyncio.get_running_loop().time() - started < 0.5
    engine.gate.set()
    assert float((await patient).outputs["y"][0, 0]) == 2.0
    assert Outcome.DEADLINE in meter.outcomes
