"""The watched hop in virtual time: what a device believes of its region when beats stop, when the session closes, and when both return."""

import asyncio
from collections.abc import Awaitable, Callable

from appliance.contract.codec import encode
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.vitals import Beat
from appliance.contract.vocabulary import LinkState
from appliance.core.reach.partition import PartitionSettings
from appliance.daily.hop import Hop, beat, pong
from appliance.lab.virtual import VirtualClock, run
from appliance.ports import Inbound


class Wire:
    """A link to one neighbour that may be silent, refuse, or answer probes."""

    def __init__(self) -> None:
        self.connected = True
        self.rotations = 0
        self.alive = True
        self.refuses = False
        self.asked = 0
        self.published: list[bytes] = []
        self._handlers: list[Callable[[Inbound], Awaitable[None]]] = []

    def on(self, _pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        self._handlers.append(handler)

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        raise NotImplementedError

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        assert (topic, retain, qos, timeout_s) == ("t", False, 0, 5.0)
        self.published.append(payload)

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        assert (topic, qos) == ("ping", 0)
        self.asked += 1
        if self.refuses:
            raise TheirsError("busy", "later")
        if not (self.alive and self.connected):
            await asyncio.sleep(timeout_s)
            raise WorldError("timeout", "nobody answers")
        return await pong(Inbound(topic, payload))

    async def beats(self, seconds: float, upstream: LinkState = LinkState.HEALTHY) -> None:
        """Give signs of life every 5 s for so long."""
        for seq in range(1, int(seconds / 5) + 1):
            for handler in self._handlers:
                await handler(Inbound("beat", encode(Beat(seq=seq, interval_s=5.0, upstream=upstream))))
            await asyncio.sleep(5)


class Watched:
    """One hop, and each verdict with its time."""

    def __init__(self) -> None:
        self.wire, self.clock = Wire(), VirtualClock()
        self.verdicts: list[tuple[float, LinkState]] = []
        self.hop = Hop(
            self.wire,
            self.clock,
            name="region",
            beat="beat",
            ping="ping",
            settings=PartitionSettings(interval_s=5.0),
            changed=lambda state, _why: self.verdicts.append((self.clock.monotonic(), state)),
        )
        self.task = asyncio.create_task(self.hop.run(lambda: None))

    async def since(self, start: float, state: LinkState) -> float:
        """How many seconds after `start` the verdict became this; fails after two minutes."""
        for _ in range(1_200):
            found = [at for at, each in self.verdicts if each is state and at >= start]
            if found:
                return found[0] - start
            await asyncio.sleep(0.1)
        raise AssertionError(f"never {state}: {self.verdicts}")


def test_a_silent_neighbour_is_convicted_by_probes_within_fourteen_seconds() -> None:
    """Beats make it HEALTHY; when beats and answers stop, probes go out and the verdict comes before the fixed time-out of 15 s would."""

    async def body() -> None:
        watched = Watched()
        await watched.wire.beats(300)
        assert watched.hop.state is LinkState.HEALTHY
        assert watched.wire.asked == 0, "nobody is probed while beats come"
        last_beat = watched.clock.monotonic() - 5
        watched.wire.alive = False
        assert await watched.since(last_beat, LinkState.PARTITIONED) <= 14.0
        assert watched.wire.asked >= 4

    run(body())


def test_lost_beats_alone_convict_nobody() -> None:
    """A neighbour whose beats are lost but who answers probes, even by a refusal, is not partitioned."""

    async def body() -> None:
        for refuses in (False, True):
            watched = Watched()
            await watched.wire.beats(60)
            watched.wire.refuses = refuses
            await asyncio.sleep(120)
            assert LinkState.PARTITIONED not in {state for _, state in watched.verdicts}
            assert watched.wire.asked > 10
            watched.task.cancel()

    run(body())


def test_a_closed_session_is_convicted_and_two_beats_bring_it_back_degraded() -> None:
    """No broker: PARTITIONED in time all the same; back as DEGRADED after two beats, HEALTHY only after a clean minute."""

    async def body() -> None:
        watched = Watched()
        await watched.wire.beats(60)
        closed = watched.clock.monotonic()
        watched.wire.connected = False
        assert await watched.since(closed, LinkState.PARTITIONED) <= 14.0
        watched.wire.connected = True
        opened = watched.clock.monotonic()
        beating = asyncio.create_task(watched.wire.beats(120))
        assert await watched.since(opened, LinkState.DEGRADED) <= 6.0
        assert 55 <= await watched.since(opened, LinkState.HEALTHY) <= 75
        beating.cancel()

    run(body())


def test_the_worse_of_both_hops_is_what_the_cloud_is_worth() -> None:
    """A region that says its own way up is partitioned makes the whole way partitioned, while its own hop stays as it is."""

    async def body() -> None:
        watched = Watched()
        await watched.wire.beats(30)
        assert watched.hop.whole is LinkState.HEALTHY
        await watched.wire.beats(5, upstream=LinkState.PARTITIONED)
        assert (watched.hop.state, watched.hop.whole) == (LinkState.HEALTHY, LinkState.PARTITIONED)

    run(body())


def test_beats_are_numbered_and_not_made_up_for() -> None:
    """A sign of life goes out every interval while connected; those of a disconnected time are not sent later."""

    async def body() -> None:
        wire = Wire()
        task = asyncio.create_task(beat(wire, "t", 5.0, lambda: LinkState.DEGRADED, lambda: None))
        await asyncio.sleep(11)
        wire.connected = False
        await asyncio.sleep(10)
        wire.connected = True
        await asyncio.sleep(6)
        task.cancel()
        assert [payload.count(b'"upstream":"DEGRADED"') for payload in wire.published] == [1] * 4
        assert [b'"seq":%d,' % number in payload for number, payload in zip((1, 2, 3, 6), wire.published, strict=True)] == [True] * 4

    run(body())
