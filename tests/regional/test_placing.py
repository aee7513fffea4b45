"""Placement in a region with devices that a test owns: who is asked, how many at a time, and who is not."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.remote import AskHead, pack, unpack_ask
from appliance.contract.vitals import Vitals
from appliance.contract.vocabulary import LinkState, Mode
from appliance.lab.virtual import run
from appliance.ports import Inbound
from appliance.regional.placing import ATTEMPTS, IN_FLIGHT, Placing


def vitals(device: str, **capacity: float) -> Vitals:
    return Vitals(
        device=device,
        seq=1,
        interval_s=5.0,
        uptime_s=1.0,
        mode=Mode.FULL,
        link=LinkState.HEALTHY,
        model="m",
        model_version="1",
        answered=0,
        failed=0,
        rate_per_s=0.0,
        p50_ms=None,
        p99_ms=None,
        temperature_c=None,
        memory_used_bytes=0,
        memory_total_bytes=0,
        rotations=0,
        capacity=capacity,
    )


class Region:
    """A placing over devices that answer after `takes_s`, or refuse for the reason in `refuses`."""

    def __init__(self, **capacity: float) -> None:
        self.connected, self.rotations = True, 0
        self.takes_s = 0.02
        self.refuses: dict[str, str] = {}
        self.asked: list[str] = []
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.window: Callable[[Inbound], Awaitable[bytes]] | None = None
        self.present = {device: vitals(device, m=per_s) for device, per_s in capacity.items()}
        self.placing = Placing(self, lambda: self.present, region="r")
        self.placing.follow()

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        device = topic.removeprefix("v1/r/d/").removesuffix("/dn/ask/infer")
        assert qos == 0
        self.asked.append(device)
        self.now[device] += 1
        self.most[device] = max(self.most[device], self.now[device])
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(self.takes_s)
        finally:
            self.now[device] -= 1
        if device in self.refuses:
            raise TheirsError(self.refuses[device], "refused")
        return device.encode() + bytes(unpack_ask(payload).tensors["x"][0])

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        raise NotImplementedError

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        raise NotImplementedError

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        assert pattern == "v1/r/d/+/up/ask/neighbour"
        self.window = handler

    async def run(self) -> None:
        raise NotImplementedError

    async def help(self, asker: str, within_ms: float = 150.0, residency: str = "region") -> bytes:
        assert self.window is not None
        head = AskHead(model="m", version="1", within_ms=within_ms, residency=residency)
        frame = pack(head, {"x": np.full((1, 1), 7, np.uint8)})
        return await self.window(Inbound(f"v1/r/d/{asker}/up/ask/neighbour", frame))


def test_a_neighbour_answers_and_never_who_asked() -> None:
    """The only other device is asked, with the frame as it came; a device that is alone is refused at once."""

    async def body() -> None:
        region = Region(a=40.0, b=40.0)
        assert await region.help("a") == b"b\x07"
        assert await region.help("b") == b"a\x07"
        alone = Region(a=40.0)
        with pytest.raises(WorldError, match="no neighbour has room"):
            await alone.help("a")
        assert alone.asked == []

    run(body())


@pytest.mark.parametrize("residency", ["device", "devise"])
def test_what_must_stay_on_its_device_goes_nowhere(residency: str) -> None:
    """A frame that should not have come is refused before anybody is asked."""

    async def body() -> None:
        region = Region(a=40.0, b=40.0)
        with pytest.raises(TheirsError) as refused:
            await region.help("a", residency=residency)
        assert refused.value.reason == "residency"
        assert region.asked == []

    run(body())


def test_devices_take_shares_of_their_capacity_and_no_more_are_in_flight_than_is_allowed() -> None:
    """Of many at once at most IN_FLIGHT are with neighbours; nobody is above 1.25 times its share of them, rounded up."""

    async def body() -> None:
        region = Region(asker=10.0, nano=20.0, agx=140.0)
        got = await asyncio.gather(*(region.help("asker") for _ in range(30)), return_exceptions=True)
        answered = [each for each in got if isinstance(each, bytes)]
        refused = [each for each in got if isinstance(each, ApplianceError)]
        assert len(answered) + len(refused) == 30
        assert {error.reason for error in refused} == {"backlog_full"}
        assert max(sum(region.most.values()), 1) <= IN_FLIGHT
        assert region.most["nano"] <= -(-125 * IN_FLIGHT * 20 // 17_000)
        assert region.most["agx"] > region.most["nano"]
        assert await region.help("asker"), "what ended made room"

    run(body())


def test_a_neighbour_that_refuses_is_followed_by_one_other_and_no_more() -> None:
    """A full neighbour costs one more question; two refusals are the answer, within the request's own time."""

    async def body() -> None:
        region = Region(a=40.0, b=40.0, c=40.0, d=40.0)
        first = (await region.help("a"))[:1].decode()
        region.refuses = {first: "backlog_full"}
        region.asked.clear()
        assert (await region.help("a"))[:1].decode() not in {first, "a"}
        assert len(region.asked) == 2
        region.refuses = dict.fromkeys("bcd", "draining")
        region.asked.clear()
        with pytest.raises(TheirsError, match="refused"):
            await region.help("a")
        assert len(region.asked) == len(set(region.asked)) == ATTEMPTS
        region.refuses = dict.fromkeys("bcd", "shape")
        region.asked.clear()
        with pytest.raises(TheirsError, match="refused"):
            await region.help("a")
        assert len(region.asked) == 1, "what is wrong with the request itself is wrong everywhere"

    run(body())


def test_a_slow_neighbour_costs_the_time_that_was_given() -> None:
    """The answer is a deadline, after that time, and the place is free again."""

    async def body() -> None:
        region = Region(a=40.0, b=40.0)
        region.takes_s = 60.0
        started = asyncio.get_running_loop().time()
        with pytest.raises(WorldError) as late:
            await region.help("a", within_ms=80.0)
        assert late.value.reason == "deadline"
        assert asyncio.get_running_loop().time() - started == pytest.approx(0.08)
        region.takes_s = 0.02
        assert await region.help("a")

    run(body())


def test_who_falls_silent_or_has_no_capacity_gets_nothing() -> None:
    """A device in mode D says 0, a silent one is not among the present: neither is asked, and both are when they are back."""

    async def body() -> None:
        region = Region(a=40.0, b=40.0, c=40.0)
        region.present["b"] = vitals("b", m=0.0)
        del region.present["c"]
        region.placing.follow()
        with pytest.raises(WorldError, match="no neighbour has room"):
            await region.help("a")
        region.present["c"] = vitals("c", m=40.0)
        region.placing.follow()
        assert await region.help("a") == b"c\x07"

    run(body())
