"""The way to the cloud in virtual time: bounded, breaking, and shut while the link says so."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from appliance.contract import topics
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.inference import Request, Tags
from appliance.contract.remote import AnswerHead, pack, unpack_ask
from appliance.contract.vocabulary import LinkState, Mode
from appliance.edge.upstream import Calls, CloudRoute
from appliance.lab.virtual import VirtualClock, run
from appliance.ports import Inbound


class Wire:
    """A link whose peer is a function."""

    def __init__(self, peer: Callable[[bytes], Awaitable[bytes]]) -> None:
        self.connected = True
        self.rotations = 0
        self.asked = 0
        self._peer = peer

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        assert (topic, qos) == ("v1/r/d/dev/up/ask/infer", 0)
        self.asked += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await self._peer(payload)
        except TimeoutError:
            raise WorldError("timeout", "no answer") from None

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        raise NotImplementedError

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        raise NotImplementedError

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        raise NotImplementedError


class Hop:
    state = LinkState.HEALTHY


def route(peer: Callable[[bytes], Awaitable[bytes]]) -> tuple[CloudRoute, Wire, VirtualClock]:
    wire, clock = Wire(peer), VirtualClock()
    topic = topics.infer("r", "dev")
    calls = Calls(wire, clock, topic=topic, where="cloud", deadline_s=0.15, state=lambda: Hop.state, version=lambda _model: "7")
    return CloudRoute(calls), wire, clock


REQUEST = Request("id", "m", {"x": np.ones((1, 2), np.float32)})


async def doubling(frame: bytes) -> bytes:
    """A cloud that takes 50 ms and 36 dollars an hour."""
    ask = unpack_ask(frame)
    assert (ask.head.model, ask.head.version) == ("m", "7")
    await asyncio.sleep(0.05)
    return pack(AnswerHead(version="7", took_ms=50.0, dollars_per_hour=36.0, confidence=0.96), {"y": ask.tensors["x"] * 2})


async def silent(_frame: bytes) -> bytes:
    await asyncio.sleep(60)
    return b""


def test_the_clouds_answer_says_its_route_and_cost() -> None:
    """Mode D, route `cloud`, the version's confidence, and 36 dollars an hour times 50 ms."""

    async def body() -> None:
        made, _, _ = route(doubling)
        answer = await made.infer(REQUEST, 5.0)
        assert (answer.id, answer.mode, answer.route, answer.version, answer.confidence) == ("id", Mode.CLOUD, "cloud", "7", 0.96)
        assert answer.cost == pytest.approx(36.0 / 3600 * 0.05)
        assert answer.outputs["y"].tolist() == [[2.0, 2.0]]

    run(body())


def test_a_silent_cloud_costs_five_deadlines_and_then_nothing() -> None:
    """Each call ends at 150 ms or at the caller's own time; after five the way is shut, and refusals take no time and no message."""

    async def body() -> None:
        made, wire, clock = route(silent)
        for within in (5.0, 5.0, 0.02, 5.0, 5.0):
            started = clock.monotonic()
            with pytest.raises(WorldError) as late:
                await made.infer(REQUEST, within)
            assert late.value.reason == "deadline"
            assert clock.monotonic() - started == pytest.approx(min(within, 0.15), abs=1e-6)
        assert not made.allows(Tags())
        started = clock.monotonic()
        with pytest.raises(WorldError, match="shut after failures"):
            await made.infer(REQUEST, 5.0)
        assert clock.monotonic() == started
        assert wire.asked == 5

    run(body())


def test_the_way_opens_again_by_a_trial() -> None:
    """Once the cloud answers, one trial closes the breaker: back in service within the longest backoff of 2 s."""

    async def body() -> None:
        cloud = silent

        async def peer(frame: bytes) -> bytes:
            return await cloud(frame)

        made, _, _ = route(peer)
        for _ in range(5):
            with pytest.raises(WorldError):
                await made.infer(REQUEST, 5.0)
        cloud = doubling
        await asyncio.sleep(2.0)
        assert made.allows(Tags())
        assert (await made.infer(REQUEST, 5.0)).route == "cloud"

    run(body())


def test_a_callers_own_mistake_does_not_count_against_the_cloud() -> None:
    """Ten refusals of bad input, and the way is open all the same; the caller gets the cloud's words."""

    async def peer(_frame: bytes) -> bytes:
        raise TheirsError("shape", "does not fit")

    async def body() -> None:
        made, _, _ = route(peer)
        for _ in range(10):
            with pytest.raises(ApplianceError, match="does not fit"):
                await made.infer(REQUEST, 5.0)
        assert made.allows(Tags())

    run(body())


@pytest.mark.parametrize("residency", ["device", "region"])
def test_residency_and_partition_shut_the_way(residency: str) -> None:
    """What must stay on the device or in the region never goes; nothing goes while the hop is partitioned or the session is down."""

    async def body() -> None:
        made, wire, _ = route(doubling)
        assert made.allows(Tags())
        assert not made.allows(Tags(data_residency=residency))
        Hop.state = LinkState.PARTITIONED
        assert not made.allows(Tags())
        Hop.state = LinkState.HEALTHY
        wire.connected = False
        assert not made.allows(Tags())

    run(body())
