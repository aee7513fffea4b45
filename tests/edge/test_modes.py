"""Modes on a device in virtual time: pressure is shown to the guard, requests run through the desk, and every answer says what made it."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from appliance.contract.errors import ApplianceError, WorldError
from appliance.contract.inference import Answer, Request, Tags
from appliance.contract.models import EdgeConstraints, Manifest
from appliance.contract.vitals import BoardReading
from appliance.contract.vocabulary import Mode, Outcome, Platform
from appliance.core.serve.degradation import DegradationSettings
from appliance.edge.guarding import Guarding
from appliance.edge.lane import Hands, Pool
from appliance.edge.serving import Serving
from appliance.edge.stand import Form, Policy
from appliance.edge.tally import Tally
from appliance.lab.paced import PacedEngine
from appliance.lab.virtual import VirtualClock, run

GIB = 1 << 30
CALM = BoardReading({"tj": 45.0}, 8 * GIB, 6 * GIB, passive_trip_c=99.0, gpu_clock_hz=1e9, gpu_clock_cap_hz=1e9, gpu_load=1.0)
FULL_MEMORY = replace(CALM, memory_available_bytes=GIB // 4)
HOT = replace(CALM, temperatures_c={"tj": 90.5})
SLOW_CLOCK = replace(CALM, gpu_clock_hz=0.5e9)
SPEED = {Mode.FULL: 0.010, Mode.CONSTRAINED: 0.006, Mode.MINIMAL: 0.003}
ACCURACY = {Mode.FULL: 0.96, Mode.CONSTRAINED: 0.93, Mode.MINIMAL: 0.9}


@dataclass
class Record:
    """What the meter heard, and what was told to the region."""

    outcomes: list[Outcome] = field(default_factory=list)
    shifts: list[tuple[str, str, str]] = field(default_factory=list)
    throttles: list[str] = field(default_factory=list)
    told: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def answered(self, _model: str, _mode: Mode, _seconds: float) -> None:
        self.outcomes.append(Outcome.ANSWERED)

    def failed(self, _model: str, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def batch(self, model: str, utilization: float) -> None: ...

    def released(self, model: str, released_at: float) -> None: ...

    def mode(self, model: str, mode: Mode) -> None: ...

    def pressed(self, kind: str, ratio: float) -> None: ...

    def limited(self, model: str, batch: int) -> None: ...

    def shifted(self, _model: str, before: Mode, after: Mode, cause: str) -> None:
        self.shifts.append((before.value, after.value, cause))

    def throttled(self, cause: str) -> None:
        self.throttles.append(cause)

    async def tell(self, what: str, fields: dict[str, str]) -> None:
        self.told.append((what, fields))


class Cloud:
    """A way to the cloud that the test opens and shuts."""

    def __init__(self) -> None:
        self.open = True
        self.asked: list[Request] = []

    @property
    def stands(self) -> bool:
        return self.open

    def allows(self, tags: Tags) -> bool:
        return self.open and not tags.data_residency

    async def infer(self, request: Request, within_s: float) -> Answer:
        assert within_s > 0
        self.asked.append(request)
        return Answer(request.id, request.model, "v1", {"y": request.inputs["x"]}, Mode.CLOUD, "asked the cloud", 0.96, "cloud")


class Device:
    """One model in three forms on one worker; `reading` is what the board says."""

    def __init__(
        self,
        modes: Sequence[Mode] = tuple(SPEED),
        *,
        standby: bool = False,
        cloud: Cloud | None = None,
        gpu_budget_bytes: int | None = None,
    ) -> None:
        self.record = Record()
        self.clock = VirtualClock()
        self.slowdown = 1.0
        self.engine = PacedEngine(lambda mode, samples: SPEED[mode] * samples * self.slowdown)
        hands = Hands(self.engine, self.clock, Tally(self.record, self.clock), Pool(1), slo_s=0.15, fill_wait_s=0.01)
        policy = Policy(8, DegradationSettings(), standby)
        self.serving = Serving(hands, policy, timeout_s=5.0, stale_bytes=1 << 20, upstream=cloud)
        self.guarding = Guarding(
            self,
            self.serving,
            self.clock,
            self.record,
            tell=self.record.tell,
            interval_s=0.5,
            gpu_budget_bytes=gpu_budget_bytes,
            upstream=cloud,
        )
        self.reading = CALM
        self.forms = {mode: Form(Platform.ONNX, lambda: -1, ACCURACY[mode]) for mode in modes}

    def read(self) -> BoardReading:
        return self.reading

    async def mount(self, version: str = "v1") -> None:
        limits = EdgeConstraints(min_vram_gb=0, max_batch_size=8, target_latency_ms=10)
        manifest = Manifest(
            model_id="m",
            version=version,
            sha256="",
            token=1,
            compiled_artifacts={},
            edge_constraints=limits,
            released_at=0.0,
            example_shapes={"x": [2]},
        )
        await self.serving.mount(manifest, self.forms)

    async def live(self, seconds: float) -> None:
        """Let the guard look at the present reading for so long."""
        for _ in range(round(seconds / 0.5)):
            await self.guarding.judge(self.reading)
            await asyncio.sleep(0.5)

    async def ask(self, **tags: Any) -> Answer:
        return await self.serving.infer(Request("", "m", {"x": np.ones((1, 2), np.float32)}, tags=Tags(**tags)))

    @property
    def mode(self) -> Mode:
        return self.serving.mode


def lived(body: Callable[[Device], Coroutine[Any, Any, None]], **construction: Any) -> None:
    """Run a test's body on a mounted device in virtual time."""

    async def whole() -> None:
        device = Device(**construction)
        await device.mount()
        await body(device)

    run(whole())


def test_memory_pressure_walks_down_and_calm_walks_up_and_every_answer_says_so() -> None:
    """A to B to C under critical memory, back to A in calm; each transition is counted and told once; each answer has mode, why, confidence."""

    async def body(device: Device) -> None:
        first = await device.ask()
        assert (first.mode, first.why, first.confidence) == (Mode.FULL, "nothing presses", 0.96)
        device.reading = FULL_MEMORY
        await device.live(3)
        least = await device.ask()
        assert (least.mode, least.confidence) == (Mode.MINIMAL, 0.9)
        assert "256 MiB of 8192 available" in least.why
        device.reading = CALM
        await device.live(30)
        back = await device.ask()
        assert back.mode is Mode.FULL
        assert "calm" in back.why
        assert device.record.shifts == [("A", "B", "memory"), ("B", "C", "memory"), ("C", "B", "calm"), ("B", "A", "calm")]
        assert [what for what, _ in device.record.told] == ["mode_changed"] * 4
        assert len(device.engine.loaded) == 1, "what no longer serves was unloaded"

    lived(body)


def test_a_discrete_gpu_that_is_nearly_full_steps_modes_down() -> None:
    """At 97 % of its memory the device walks to C, though the system has plenty and the profile's budget is far; at 60 % it comes back."""

    async def body(device: Device) -> None:
        device.reading = replace(CALM, gpu_memory_used_bytes=97 * GIB // 4, gpu_memory_total_bytes=25 * GIB)
        await device.live(3)
        least = await device.ask()
        assert least.mode is Mode.MINIMAL
        assert "memory: GPU holds 24832 MiB of its own 25600" in least.why
        device.reading = replace(device.reading, gpu_memory_used_bytes=15 * GIB)
        await device.live(30)
        assert device.mode is Mode.FULL
        assert {cause for _, _, cause in device.record.shifts} == {"memory", "calm"}

    lived(body, gpu_budget_bytes=100 * GIB)


def test_no_request_is_lost_or_late_over_a_change_of_mode() -> None:
    """Callers in a closed loop notice nothing but the mode: each of their requests is answered while forms are loaded and dropped."""

    async def body(device: Device) -> None:
        modes: set[Mode] = set()
        longest = 0.0
        stopped = False

        async def caller() -> None:
            nonlocal longest
            while not stopped:
                started = device.clock.monotonic()
                modes.add((await device.ask()).mode)
                longest = max(longest, device.clock.monotonic() - started)

        callers = [asyncio.create_task(caller()) for _ in range(4)]
        device.reading = FULL_MEMORY
        await device.live(5)
        device.reading = CALM
        await device.live(60)
        stopped = True
        await asyncio.gather(*callers)
        assert modes == {Mode.FULL, Mode.CONSTRAINED, Mode.MINIMAL}
        assert set(device.record.outcomes) == {Outcome.ANSWERED}
        assert longest < 0.15

    lived(body)


def test_who_refuses_degradation_is_told_the_mode_and_the_reason() -> None:
    """Such a caller never gets an answer of a lesser mode: it is refused, with what happened and when to come back."""

    async def body(device: Device) -> None:
        device.reading = HOT
        await device.live(4)
        assert device.mode is not Mode.FULL
        with pytest.raises(WorldError, match=r"heat: 90\.5 C") as refused:
            await device.ask(accept_degradation=False)
        assert refused.value.reason == "degraded"
        assert refused.value.retry_after_s
        assert device.record.outcomes[-1] is Outcome.DEGRADED
        assert (await device.ask()).mode is device.mode

    lived(body)


def test_the_cloud_answers_in_mode_d_and_for_those_who_want_the_full_model() -> None:
    """With a way to the cloud the walk ends in D, where nothing is loaded; when the way shuts, the device serves C again at once."""
    cloud = Cloud()

    async def body(device: Device) -> None:
        device.reading = FULL_MEMORY
        await device.live(1.5)
        assert (await device.ask(accept_degradation=False)).route == "cloud"
        await device.live(3)
        assert device.mode is Mode.CLOUD
        assert not device.engine.loaded
        answer = await device.ask()
        assert (answer.mode, answer.route) == (Mode.CLOUD, "cloud")
        with pytest.raises(WorldError, match="left to the cloud"):
            await device.ask(data_residency="device")
        cloud.open = False
        await device.live(1)
        assert device.mode is Mode.MINIMAL
        assert (await device.ask()).mode is Mode.MINIMAL

    lived(body, cloud=cloud)


def test_what_cannot_be_answered_in_time_goes_to_a_lesser_mode_or_to_the_cloud() -> None:
    """A deadline that mode A cannot meet is met by the standby; one that nobody here can meet goes up, if the tags allow."""
    cloud = Cloud()

    async def body(device: Device) -> None:
        assert (await device.ask(timeout_s=0.005)).mode is Mode.MINIMAL
        assert (await device.ask(timeout_s=0.005, accept_degradation=False)).route == "cloud"
        with pytest.raises(WorldError) as late:
            await device.ask(timeout_s=0.005, accept_degradation=False, data_residency="device")
        assert late.value.reason == "deadline"

    lived(body, standby=True, cloud=cloud)


def test_a_form_that_does_not_load_is_passed_over_and_told() -> None:
    """The present mode goes on serving, the next lower one is taken, and the broken one is not tried for ever."""

    async def body(device: Device) -> None:
        device.engine.broken = {Mode.CONSTRAINED}
        device.reading = FULL_MEMORY
        await device.live(4)
        assert device.mode is Mode.MINIMAL
        assert [what for what, _ in device.record.told] == ["mode_not_changed", "mode_changed"]
        assert (await device.ask()).mode is Mode.MINIMAL

    lived(body)


def test_a_low_clock_shrinks_the_batch_at_once_and_growth_comes_back_slowly() -> None:
    """At half of the clock the largest batch is half; when the clock is back it grows by one a second."""

    async def body(device: Device) -> None:
        device.reading = SLOW_CLOCK
        await device.guarding.judge(device.reading)
        lane = device.serving.stands[0].lanes[Mode.FULL]
        assert lane.thermal.limit == 4
        device.reading = CALM
        await device.live(1.5)
        assert 4 < lane.thermal.limit < 8
        await device.live(8)
        assert lane.thermal.limit == 8

    lived(body, modes=[Mode.FULL])


def test_throttling_is_alerted_once_with_its_cause_and_its_end() -> None:
    """Under-voltage is one critical event with what to do, however often it is read, and one when it is over."""

    async def body(device: Device) -> None:
        for count in (0, 1, 1, 1):
            device.reading = replace(CALM, over_current_events={"oc1": count})
            await device.live(0.5)
        assert device.record.throttles == ["under_voltage"]
        await device.live(12)
        assert [(what, fields["cause"]) for what, fields in device.record.told if what.startswith("throttling")] == [
            ("throttling_began", "under_voltage"),
            ("throttling_ended", "under_voltage"),
        ]

    lived(body)


def test_an_engine_whose_restarts_are_spent_steps_a_mode_down_instead_of_looping() -> None:
    """The engine's pressure is critical while it may not restart, and gone some seconds after."""

    async def body(device: Device) -> None:
        device.guarding.restarts_spent(1.0)
        await device.live(1)
        assert device.mode > Mode.FULL
        assert device.record.shifts[0] == ("A", "B", "engine")
        await device.live(60)
        assert device.mode is Mode.FULL

    lived(body)


def test_old_answers_are_given_only_to_those_who_accept_them_and_never_as_fresh() -> None:
    """The same input again while nobody can answer: the old answer with its age and less confidence, route `stale`."""

    async def body(device: Device) -> None:
        fresh = await device.ask(accept_stale=True)
        await asyncio.sleep(60)
        await device.serving.drain(0.1)
        device.serving._draining = False  # take requests, but on lanes that take no worker
        device.engine.loaded.clear()
        device.slowdown = 1e6
        stale = await device.ask(accept_stale=True, timeout_s=0.001)
        assert (stale.route, stale.outputs["y"].tolist()) == ("stale", fresh.outputs["y"].tolist())
        assert stale.age_s == pytest.approx(60, abs=0.5)
        assert stale.confidence == pytest.approx(0.96 / 2, abs=0.01)
        with pytest.raises(ApplianceError):
            await device.ask(timeout_s=0.001)

    lived(body)


def test_a_model_that_was_unloaded_is_loaded_again_on_request_and_only_if_it_is_known() -> None:
    """Unload answers what waits and gives the memory back; load serves again; a name that was never released is refused."""

    async def body(device: Device) -> None:
        await device.serving.unload("m")
        await asyncio.sleep(0.1)
        assert not device.engine.loaded
        with pytest.raises(WorldError, match="no model has been opened"):
            await device.ask()
        await device.serving.load("m")
        assert (await device.ask()).version == "v1"
        with pytest.raises(ApplianceError, match="was released to this device"):
            await device.serving.load("n")

    lived(body)


def test_the_worker_is_shared_by_rank_so_no_model_starves_another() -> None:
    """While one model is asked as fast as it answers, another's lone request waits for at most the batch that runs."""

    async def body(device: Device) -> None:
        stopped = False

        async def rude() -> None:
            while not stopped:
                try:
                    await device.ask()
                except WorldError:
                    await asyncio.sleep(0.001)

        callers = [asyncio.create_task(rude()) for _ in range(24)]
        await asyncio.sleep(1)
        other: Mapping[Mode, Form] = {Mode.FULL: device.forms[Mode.FULL]}
        limits = EdgeConstraints(min_vram_gb=0, max_batch_size=8, target_latency_ms=10)
        await device.serving.mount(
            Manifest(model_id="quiet", version="v1", sha256="", token=1, compiled_artifacts={}, edge_constraints=limits, released_at=0.0),
            other,
        )
        waits = []
        for _ in range(20):
            started = device.clock.monotonic()
            await device.serving.infer(Request("", "quiet", {"x": np.ones((1, 2), np.float32)}))
            waits.append(device.clock.monotonic() - started)
        stopped = True
        await asyncio.gather(*callers)
        assert max(waits) < 0.3

    lived(body)


@pytest.mark.parametrize(("slowdown", "answered"), [(0.01, 40), (1.0, 17)], ids=["0.1 ms", "10 ms"])
def test_a_burst_waits_where_its_turns_are_near_and_is_refused_where_not(slowdown: float, answered: int) -> None:
    """Forty at once find seventeen places: of a model that needs 4 ms for all, all are answered; of a slow one, the rest is refused at once."""

    async def body(device: Device) -> None:
        device.slowdown = slowdown
        await device.mount("v2")
        began = device.clock.monotonic()

        async def caller(name: int) -> tuple[bool, float]:
            try:
                await device.serving.infer(Request("", "m", {"x": np.ones((1, 2), np.float32)}, tags=Tags(timeout_s=1.0), caller=name))
            except WorldError:
                return False, device.clock.monotonic() - began
            return True, 0.0

        told = await asyncio.gather(*map(caller, range(40)))
        assert abs(sum(good for good, _ in told) - answered) <= 1
        assert max(after_s for _, after_s in told) <= 0.001

    lived(body, modes=[Mode.FULL])


def test_callers_who_repeat_refused_requests_at_once_are_paced_by_their_refusals() -> None:
    """Twenty-four such callers beside eight polite ones: after a few early returns each refusal is kept back, so that few are made at all."""

    async def body(device: Device) -> None:
        refusals = 0
        stopped = False

        async def caller(name: int, *, rude: bool) -> int:
            nonlocal refusals
            answered = 0
            while not stopped:
                try:
                    await device.serving.infer(Request("", "m", {"x": np.ones((1, 2), np.float32)}, caller=name))
                    answered += 1
                except WorldError as error:
                    refusals += 1
                    await asyncio.sleep(0.0005 if rude else error.retry_after_s or 0.05)
            return answered

        rude = [asyncio.create_task(caller(number, rude=True)) for number in range(24)]
        polite = [asyncio.create_task(caller(100 + number, rude=False)) for number in range(8)]
        await asyncio.sleep(20)
        stopped = True
        got = [sum(await asyncio.gather(*group)) for group in (polite, rude)]
        assert sum(got) >= 0.95 * 20 / SPEED[Mode.FULL], "the worker never idled"
        assert got[0] / 8 >= 0.8 * got[1] / 24, "each polite caller got about as much as each rude one"
        assert refusals / 32 / 20 < 40, "a deaf caller is refused some tens of times a second, not thousands"

    lived(body, modes=[Mode.FULL])
