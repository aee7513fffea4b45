"""Every rule of routing through the desk, in virtual time: prices come over the bus, frames go to a cloud that a test owns, and every answer says why."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from appliance.contract import topics
from appliance.contract.codec import encode
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.inference import Answer, Array, Request, Signature, Tags, TensorSpec
from appliance.contract.models import EdgeConstraints, Manifest
from appliance.contract.prices import Price
from appliance.contract.remote import AnswerHead, AskHead, pack, unpack_answer, unpack_ask
from appliance.contract.vocabulary import Datatype, LinkState, Mode, Outcome, Platform
from appliance.core.serve.degradation import DegradationSettings
from appliance.edge.lane import Hands, Pool
from appliance.edge.lending import Lending
from appliance.edge.routing import IDLE_S, Routing
from appliance.edge.serving import Serving
from appliance.edge.splitting import Splitting
from appliance.edge.stand import Form, Policy
from appliance.edge.tally import Tally
from appliance.edge.upstream import Calls, CloudRoute, NeighbourRoute
from appliance.lab.paced import PacedEngine
from appliance.lab.virtual import VirtualClock, run
from appliance.ports import Inbound, LoadedModel

SPEED = {Mode.FULL: 0.020, Mode.CONSTRAINED: 0.012, Mode.MINIMAL: 0.006, Mode.CLOUD: 0.004}
WIDTH = 4_096
"""Numbers of one sample: 16 KiB of input, 2 KiB of features."""
DEVICE_PER_H, ON_DEMAND = 0.1, 2.0
"""A full answer costs 0.1 / 3600 * 0.02 = 5.6e-7 dollars here."""
SIGNATURE = Signature(Platform.ONNX, (TensorSpec("x", Datatype.FP32, (-1, WIDTH)),), (TensorSpec("y", Datatype.FP32, (-1, WIDTH)),))


def price(spot: float, egress: float = 0.09, valid_until: float = 4e9) -> Price:
    return Price(spot_per_h=spot, on_demand_per_h=ON_DEMAND, egress_per_gb=egress, valid_until=valid_until)


class HalvingEngine(PacedEngine):
    """As its base, but mode D gives features: an eighth of the bytes."""

    async def load(self, key: str, platform: Platform, weights: Callable[[], int]) -> LoadedModel:
        return LoadedModel((await super().load(key, platform, weights)).key, SIGNATURE)

    async def run(self, key: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        given = await super().run(key, inputs, outputs)
        if key.split(":")[1] == Mode.CLOUD:
            return {"f": given["y"][:, ::4].astype(np.float16)}
        return given


@dataclass
class Wire:
    """A link whose peers are the test's: `cloud` answers in `took_s` after `trip_s`; `neighbour` is another desk's window, through a region that has one."""

    took_s: float = 0.005
    trip_s: float = 0.010
    spot: float = 0.5
    connected: bool = True
    rotations: int = 0
    silent: bool = False
    refuses: str = ""
    seen: list[AskHead] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    lent: list[bytes] = field(default_factory=list)
    handlers: dict[str, Callable[[Inbound], Awaitable[None]]] = field(default_factory=dict)
    window: Callable[[Inbound], Awaitable[bytes]] | None = None
    other: "Wire | None" = None

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        assert qos == 0
        try:
            async with asyncio.timeout(timeout_s):
                if topic.endswith("ask/neighbour"):
                    self.lent.append(payload)
                    if self.other is None or self.other.window is None:
                        raise TheirsError("backlog_full", "no neighbour")
                    return await self.other.window(Inbound("v1/r/d/dev/dn/ask/infer", payload))
                return await self._computed(payload)
        except TimeoutError:
            raise WorldError("timeout", "no answer") from None

    async def _computed(self, payload: bytes) -> bytes:
        ask = unpack_ask(payload)
        self.seen.append(ask.head)
        self.frames.append(payload)
        if self.refuses:
            raise TheirsError(self.refuses, "the cloud refuses")
        await asyncio.sleep(self.trip_s + (1e9 if self.silent else 0.0))
        took_s = self.took_s / (20 if ask.head.stage == "features" else 1)
        await asyncio.sleep(took_s)
        head = AnswerHead(version="v1", took_ms=took_s * 1e3, dollars_per_hour=self.spot, confidence=0.96)
        return pack(head, {"y": np.ones((1, 1), np.float32)})

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        raise NotImplementedError

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        self.handlers[pattern] = handler

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        assert pattern == "v1/r/d/dev/dn/ask/infer"
        self.window = handler

    async def run(self) -> None:
        raise NotImplementedError


class Meter:
    def answered(self, _model: str, _mode: Mode, _seconds: float) -> None: ...

    def failed(self, _model: str, _outcome: Outcome) -> None: ...

    def batch(self, _model: str, _utilization: float) -> None: ...

    def released(self, _model: str, _released_at: float) -> None: ...


class Device:
    """One model in four forms on one worker, with all of its ways out."""

    def __init__(self, *, split: bool = True, wire: Wire | None = None) -> None:
        self.clock, self.wire, self.state = VirtualClock(), wire or Wire(), LinkState.HEALTHY
        self.engine = HalvingEngine(lambda mode, samples: SPEED[mode] * samples)
        hands = Hands(self.engine, self.clock, Tally(Meter(), self.clock), Pool(1), slo_s=0.15, fill_wait_s=0.01)
        calls = functools.partial(Calls, self.wire, self.clock, deadline_s=0.15, state=lambda: self.state, version=lambda _model: "v1")
        self.cloud = CloudRoute(calls(topic=topics.infer("r", "dev"), where="cloud"))
        self.splitting = Splitting(hands)
        self.routing = Routing(
            self.wire,
            self.clock,
            self.cloud,
            self.splitting,
            lambda: self.serving.stands,
            region="r",
            device_per_h=DEVICE_PER_H,
            slo_s=0.15,
            deadline_s=0.15,
        )
        self.serving = Serving(
            hands,
            Policy(8, DegradationSettings()),
            timeout_s=5.0,
            upstream=self.routing,
            routing=self.routing,
            neighbour=NeighbourRoute(calls(topic=topics.neighbour("r", "dev"), where="neighbour")),
        )
        Lending(self.wire, self.clock, self.serving.answer, region="r", device="dev", dollars_per_hour=DEVICE_PER_H)
        self.forms = {mode: Form(Platform.ONNX, lambda: -1, 0.9) for mode in SPEED if split or mode is not Mode.CLOUD}

    async def mount(self, *, version: str = "v1") -> None:
        limits = EdgeConstraints(min_vram_gb=0, max_batch_size=8, target_latency_ms=5)
        manifest = Manifest(
            model_id="m",
            version=version,
            sha256="",
            token=1,
            compiled_artifacts={},
            edge_constraints=limits,
            released_at=0.0,
            example_shapes={"x": [WIDTH]},
        )
        await self.serving.mount(manifest, self.forms)

    async def hear(self, told: Price) -> None:
        await self.wire.handlers["v1/r/bcast/price"](Inbound("v1/r/bcast/price", encode(told)))

    async def live(self, seconds: float = 1.0) -> None:
        for _ in range(max(1, round(seconds / 0.5))):
            self.routing.look()
            await asyncio.sleep(0.5)

    async def ready(self, told: Price | None = None) -> None:
        """Hear a price, if there is one, and find out what the extractor takes."""
        await self.hear(told or price(0.5))
        await self.live(1.5)
        assert self.splitting.about(self.serving.stands[0]) is not None or self.serving.stands[0].extractor is None
        if told is None:
            self.routing._prices = None

    async def shift(self, mode: Mode) -> None:
        await self.serving.stands[0].shift(mode, "the test says so")

    async def ask(self, **tags: Any) -> Answer:
        answer = await self.serving.infer(Request("", "m", {"x": np.ones((1, WIDTH), np.float32)}, tags=Tags(**tags)))
        assert isinstance(answer, Answer)
        return answer


def lived(body: Callable[[Device], Coroutine[Any, Any, None]], **construction: Any) -> None:
    """Run a test's body on a mounted device in virtual time."""

    async def whole() -> None:
        device = Device(**construction)
        await device.mount()
        await body(device)

    run(whole())


@dataclass(frozen=True)
class Case:
    """What is so, what is asked, and the route, mode and reason that must come of it; an empty route is a refusal."""

    told: Price | None = None
    mode: Mode = Mode.FULL
    tags: dict[str, Any] = field(default_factory=dict)
    state: LinkState = LinkState.HEALTHY
    split: bool = True
    route: str = "edge"
    why: str = ""


FULL_ONLY = {"accept_degradation": False}
FAIR, DEAR, FREE = price(0.5), price(3.0, 0.5), price(0.1, 0.0)
"""A sample costs 5.6e-7 here; as features and as input: 3.3e-7 and 2.2e-6; 1.3e-6 and 1.2e-5; 1.2e-7 and 1.4e-7 dollars."""
CASES = {
    "without a price the nearest answers": Case(why="nothing presses"),
    "the device where it is cheapest": Case(DEAR, why="nothing presses; cheapest of edge 5.6e-07, split 1.3e-06, cloud 1.2e-05"),
    "features where they are cheapest": Case(FAIR, route="split", why="cheapest of edge 5.6e-07, split 3.3e-07, cloud 2.2e-06"),
    "no features for who wants the full model": Case(FAIR, tags=FULL_ONLY),
    "the cloud where it is cheapest": Case(FREE, tags=FULL_ONLY, route="cloud", why="cheapest of edge 5.6e-07, cloud 1.4e-07"),
    "a price that ran out is the one on demand": Case(price(0.1, 0.0, valid_until=1.0), tags=FULL_ONLY),
    "what stays on the device stays, whatever it costs": Case(FREE, tags={"data_residency": "device"}),
    "what stays in the region stays": Case(FREE, tags={"data_residency": "region"}),
    "an unknown residency is the strictest": Case(FREE, tags={"data_residency": "devise"}),
    "a limit that only features keep": Case(FAIR, tags={"max_cost": 4e-7}, route="split"),
    "a limit that only the device keeps": Case(DEAR, tags={"max_cost": 6e-7}),
    "a limit that nobody keeps": Case(FAIR, tags={"max_cost": 1e-9}, route="", why="1e-09 dollars"),
    "a limit and a residency together": Case(FAIR, tags={"max_cost": 4e-7, "data_residency": "device"}, route="", why="4e-07 dollars"),
    "too slow here, so elsewhere at any price": Case(DEAR, tags={"slo_s": 0.0125}, route="split", why="cheapest of split"),
    "late by half rather than four times as dear": Case(price(3.0, 2.0), tags={"slo_s": 0.015}),
    "in time rather than late, if it is not so dear": Case(DEAR, tags={"slo_s": 0.016}, route="split"),
    "no way while partitioned": Case(FREE, state=LinkState.PARTITIONED),
    "a degraded link is a way": Case(FREE, tags=FULL_ONLY, state=LinkState.DEGRADED, route="cloud"),
    "a lesser mode where full answers are dear": Case(price(9.0, 2.0), Mode.CONSTRAINED, why="the test says so; split costs"),
    "full answers where they are not": Case(FAIR, Mode.CONSTRAINED, route="split"),
    "who refuses a lesser mode goes to the cloud": Case(DEAR, Mode.CONSTRAINED, FULL_ONLY, route="cloud"),
    "who refuses a lesser mode and stays is refused": Case(
        DEAR, Mode.CONSTRAINED, {**FULL_ONLY, "data_residency": "region"}, route="", why="mode B"
    ),
    "mode D by features": Case(FAIR, Mode.CLOUD, route="split", why="cheapest of split 3.3e-07, cloud 2.2e-06"),
    "mode D by features without a price, since they are smaller": Case(None, Mode.CLOUD, route="split", why="of features"),
    "mode D for who wants the full model, without a price": Case(None, Mode.CLOUD, FULL_ONLY, route="cloud"),
    "mode D without an extractor": Case(FAIR, Mode.CLOUD, split=False, route="cloud"),
    "mode D for who wants the full model": Case(FAIR, Mode.CLOUD, FULL_ONLY, route="cloud"),
    "mode D and data that stays": Case(FREE, Mode.CLOUD, {"data_residency": "device"}, route="", why="left to the cloud"),
    "mode D and a limit": Case(FAIR, Mode.CLOUD, {"max_cost": 1e-9}, route="", why="1e-09 dollars"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_rule(case: Case) -> None:
    """The route, its mode, its cost and why, for each of the rules; what may not leave the device never reaches the wire."""

    async def body(device: Device) -> None:
        await device.ready(case.told)
        if case.mode is not Mode.FULL:
            await device.shift(case.mode)
        device.state = case.state
        await device.live(1.0)
        if not case.route:
            with pytest.raises(WorldError, match=case.why):
                await device.ask(**case.tags)
            assert device.wire.seen == []
            return
        answer = await device.ask(**case.tags)
        assert answer.route == case.route
        assert answer.mode is (Mode.CLOUD if case.route in {"split", "cloud"} else case.mode)
        assert case.why in answer.why
        assert (answer.cost is not None) is (case.told is not None or case.route != "edge")
        assert [head.stage for head in device.wire.seen] == {"split": ["features"], "cloud": ["input"], "edge": []}[case.route]
        if case.tags.get("max_cost") is not None:
            assert answer.cost is not None
            assert answer.cost <= case.tags["max_cost"]

    lived(body, split=case.split)


def test_the_cost_is_of_the_bytes_that_were_sent() -> None:
    """Egress for the very frame, the cloud's own time at its own price, and this device's time for the features."""

    async def body(device: Device) -> None:
        await device.ready(FAIR)
        split = await device.ask()
        frame, took_s = len(device.wire.frames[0]), device.wire.took_s / 20
        assert 2_048 < frame < 2_500
        assert device.cloud.calls.sent_bytes == {"input": 0, "features": frame}
        expected = 0.5 / 3600 * took_s + frame * 0.09e-9 + DEVICE_PER_H / 3600 * SPEED[Mode.CLOUD]
        assert split.cost == pytest.approx(expected, rel=1e-6)
        await device.hear(FREE)
        whole = await device.ask(accept_degradation=False)
        assert device.cloud.calls.sent_bytes["input"] == len(device.wire.frames[1]) > 16_384
        assert whole.cost == pytest.approx(0.5 / 3600 * device.wire.took_s, rel=1e-6)
        await device.hear(DEAR)
        assert (await device.ask()).cost == pytest.approx(DEVICE_PER_H / 3600 * SPEED[Mode.FULL], rel=1e-3)

    lived(body)


def test_the_first_answer_after_a_change_of_mode_says_what_it_cost() -> None:
    """Also where its data must stay; the new mode is cheaper, since it answers more in an hour."""

    async def body(device: Device) -> None:
        await device.ready(DEAR)
        full = await device.ask(data_residency="device")
        await device.shift(Mode.MINIMAL)
        least = await device.ask(data_residency="device")
        assert full.cost == pytest.approx(DEVICE_PER_H / 3600 * SPEED[Mode.FULL])
        assert least.cost == pytest.approx(DEVICE_PER_H / 3600 * SPEED[Mode.MINIMAL])
        assert least.why.startswith("the test says so; ")

    lived(body)


def test_a_chosen_route_that_fails_is_answered_here_in_time_and_is_not_asked_for_long() -> None:
    """A silent cloud: five answers come late but here, within the caller's time; then the breaker makes the device first again at once."""

    async def body(device: Device) -> None:
        await device.ready(FREE)
        device.wire.silent = True
        for _ in range(5):
            started = device.clock.monotonic()
            answer = await device.ask(slo_s=0.1, accept_degradation=False)
            assert answer.route == "edge", "the device kept the time that it needs itself"
            assert device.clock.monotonic() - started <= 0.15 + 1e-9
        await device.live(0.5)
        asked = len(device.wire.seen)
        started = device.clock.monotonic()
        assert (await device.ask(slo_s=0.2, accept_degradation=False)).route == "edge"
        assert device.clock.monotonic() - started == pytest.approx(SPEED[Mode.FULL])
        assert len(device.wire.seen) == asked

    lived(body)


def test_a_cloud_that_refused_is_not_asked_again_for_the_same_request() -> None:
    """Too slow here for the caller, refused there: one frame, and the caller is told."""

    async def body(device: Device) -> None:
        await device.ready(DEAR)
        device.wire.refuses = "backlog_full"
        with pytest.raises(WorldError) as refused:
            await device.ask(slo_s=0.0125)
        assert refused.value.reason == "deadline"
        assert len(device.wire.seen) == 1

    lived(body)


def test_a_decision_is_kept_for_30_s_and_forgotten_at_a_change() -> None:
    """A thousand requests are one decision; price, mode, link and a device that became three times slower are new ones."""

    async def body(device: Device) -> None:
        await device.ready(DEAR)
        await device.ask()
        decided = device.routing.decided
        for _ in range(200):
            await device.ask()
        await device.hear(DEAR)
        assert device.routing.decided == decided
        await device.hear(price(3.1, 0.5))
        await device.ask()
        after_price = device.routing.decided
        assert after_price > decided
        device.state = LinkState.DEGRADED
        await device.live(0.5)
        after_link = device.routing.decided
        assert after_link > after_price
        await device.shift(Mode.CONSTRAINED)
        await device.ask()
        after_mode = device.routing.decided
        assert after_mode > after_link
        device.engine._latency_s = lambda mode, samples: 3 * SPEED[mode] * samples
        for _ in range(30):
            await device.ask(data_residency="device")
        await device.live(0.5)
        assert device.routing.decided > after_mode

    lived(body)


def test_an_extractor_that_nobody_wants_gives_its_memory_back_and_comes_when_it_is_wanted() -> None:
    """Loaded once to be measured, unloaded after a minute in which the device was cheaper, loaded again when features are."""

    async def body(device: Device) -> None:
        await device.ready(DEAR)
        assert len(device.engine.loaded) == 2
        await device.live(IDLE_S + 2)
        assert len(device.engine.loaded) == 1
        await device.hear(FAIR)
        assert (await device.ask()).route == "edge", "features are the cheapest, but nobody waits for the extractor"
        await device.live(1.0)
        assert (await device.ask()).route == "split"
        await device.mount(version="v2")
        await device.live(2.0)
        assert sorted(key.split(":")[0] for key in device.engine.loaded) == ["m@v2", "m@v2"], "the old version's went"

    lived(body)


def test_an_extractor_that_does_not_load_costs_nobody_an_answer() -> None:
    """The device, or in mode D the cloud, answers from the whole input."""

    async def body(device: Device) -> None:
        device.engine.broken = {Mode.CLOUD}
        await device.hear(FAIR)
        await device.live(2.0)
        assert (await device.ask()).route == "edge"
        await device.shift(Mode.CLOUD)
        await device.live(2.0)
        assert (await device.ask()).route == "cloud"

    lived(body)


def test_a_remembered_decision_costs_a_request_less_than_5_us() -> None:
    """The best of twenty rounds, on the running loop's real processor."""
    import time  # noqa: PLC0415 - the only test here that looks at a real clock

    async def body(device: Device) -> None:
        await device.ready(DEAR)
        stand = device.serving.stands[0]
        for tags, limit_us in ((Tags(), 5.0), (Tags(data_residency="device"), 1.0)):
            asked = Request("", "m", {"x": np.ones((1, WIDTH), np.float32)}, tags=tags)
            best = min(_timed(lambda: device.routing.choose(stand, asked), time.perf_counter) for _ in range(20))  # noqa: B023
            assert best * 1e6 < limit_us

    lived(body)


def _timed(call: Callable[[], object], clock: Callable[[], float], calls: int = 500) -> float:
    started = clock()
    for _ in range(calls):
        call()
    return (clock() - started) / calls


def _two() -> tuple[Device, Device]:
    """A device, and the neighbour that its region would choose."""
    full, neighbour = Device(), Device()
    full.wire.other = neighbour.wire
    return full, neighbour


async def _flood(device: Device, count: int, **tags: Any) -> list[Answer | WorldError]:
    async def one() -> Answer | WorldError:
        try:
            return await device.ask(**tags)
        except WorldError as error:
            return error

    return await asyncio.gather(*(one() for _ in range(count)))


@pytest.mark.parametrize(("residency", "lent"), [("region", True), ("device", False)])
def test_a_full_device_is_helped_by_its_neighbour_where_the_data_may_go(residency: str, lent: bool) -> None:
    """What its own queue refuses a neighbour answers, with route, mode and reason; nothing of it reaches the cloud, nor a neighbour that it may not."""

    async def whole() -> None:
        full, neighbour = _two()
        await full.mount()
        await neighbour.mount()
        got = await _flood(full, 30, data_residency=residency, timeout_s=5.0)
        helped = [answer for answer in got if isinstance(answer, Answer) and answer.route == "neighbour"]
        assert bool(helped) is lent
        assert bool(full.wire.lent) is lent
        assert full.wire.seen == neighbour.wire.seen == []
        assert all(answer.mode is Mode.FULL and "full" in answer.why for answer in helped)
        refused = [error for error in got if isinstance(error, WorldError)]
        assert {error.reason for error in refused} <= {"backlog_full"}
        assert len(refused) + len([answer for answer in got if isinstance(answer, Answer)]) == 30

    run(whole())


def test_a_neighbour_answers_by_itself_or_not_at_all() -> None:
    """A neighbour that is full too refuses: it asks neither a third device nor the cloud, and its own callers go first."""

    async def whole() -> None:
        full, neighbour = _two()
        await full.mount()
        await neighbour.mount()
        neighbour.wire.other = full.wire
        own = asyncio.create_task(_flood(neighbour, 16, data_residency="device", timeout_s=5.0))
        await asyncio.sleep(0)
        got = await _flood(full, 20, data_residency="region", timeout_s=5.0)
        assert any(isinstance(error, WorldError) for error in got)
        assert full.wire.lent
        assert neighbour.wire.lent == []
        assert full.wire.seen == neighbour.wire.seen == []
        assert all(isinstance(answer, Answer) for answer in await own)

    run(whole())


def test_a_neighbours_window_holds_the_callers_tags_and_refuses_what_it_cannot_read() -> None:
    """A neighbour in a lesser mode does not answer for who wants the full model; features and noise are refused by name."""

    async def body(device: Device) -> None:
        assert device.wire.window is not None
        await device.shift(Mode.MINIMAL)
        tensors = {"x": np.ones((1, WIDTH), np.float32)}
        asked = AskHead(model="m", version="v1", within_ms=100.0)
        answered = unpack_answer(await device.wire.window(Inbound("", pack(asked, tensors))))
        assert answered.head.mode is Mode.MINIMAL
        strict = AskHead(model="m", version="v1", within_ms=100.0, accept_degradation=False)
        features = AskHead(model="m", version="v1", within_ms=100.0, stage="features")
        for frame, reason in ((pack(strict, tensors), "degraded"), (pack(features, tensors), "unknown_model"), (b"noise", "malformed")):
            with pytest.raises(ApplianceError) as refused:
                await device.wire.window(Inbound("", frame))
            assert refused.value.reason == reason
        assert device.wire.seen == []

    lived(body)


def test_the_way_to_the_cloud_itself_refuses_data_that_must_stay() -> None:
    """A last line: whoever asked the route without asking whether it may finds an error of ours, and the wire silent."""

    async def body(device: Device) -> None:
        asked = Request("", "m", {"x": np.ones((1, WIDTH), np.float32)}, tags=Tags(data_residency="region"))
        with pytest.raises(OursError, match="about to leave"):
            await device.cloud.infer(asked, 1.0)
        assert device.wire.seen == []

    lived(body)
