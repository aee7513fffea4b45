"""What the region hands on beside releases: prices downwards, inferences upwards, and nothing of what must stay."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.adapters.depot import Depot
from appliance.contract.codec import encode
from appliance.contract.errors import TheirsError
from appliance.contract.prices import Price
from appliance.contract.remote import AskHead, pack
from appliance.lab.virtual import VirtualClock, run
from appliance.ports import Inbound
from appliance.regional.relaying import Relaying

PRICE = Price(spot_per_h=0.4, on_demand_per_h=1.0, egress_per_gb=0.09, valid_until=2e9)


class Wire:
    """A link that notes what is published and asked."""

    def __init__(self) -> None:
        self.connected, self.rotations = True, 0
        self.handlers: dict[str, Callable[[Inbound], Awaitable[Any]]] = {}
        self.published: list[tuple[str, bytes, bool]] = []
        self.asked: list[tuple[str, float]] = []

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        assert (qos, timeout_s) == (1, 2.0)
        self.published.append((topic, payload, retain))

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        assert qos == 0
        self.asked.append((topic, timeout_s))
        return payload

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        self.handlers[pattern] = handler

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        self.handlers[pattern] = handler

    async def run(self) -> None:
        raise NotImplementedError


class Nothing:
    def verify(self, release: object) -> list[Any]:
        raise NotImplementedError


def relay(folder: Path) -> Wire:
    wire = Wire()
    Relaying(wire, VirtualClock(), Depot(folder), Nothing(), region="r", secret=bytes(32), ask_timeout_s=1.0)
    return wire


def test_a_price_is_handed_on_as_it_came_and_noise_is_not(tmp_path: Path) -> None:
    """Retained, byte for byte; what is no price goes no further."""

    async def body() -> None:
        wire = relay(tmp_path)
        heard = wire.handlers["v1/r/r/dn/price"]
        await heard(Inbound("", encode(PRICE)))
        await heard(Inbound("", b"{}"))
        await heard(Inbound("", encode(PRICE).replace(b"0.4", b"-1.0")))
        assert wire.published == [("v1/r/bcast/price", encode(PRICE), True)]

    run(body())


@pytest.mark.parametrize("residency", ["region", "device", "devise"])
def test_what_must_stay_in_the_region_is_not_passed_on(tmp_path: Path, residency: str) -> None:
    """Even if a device sent it: refused by name, and the cloud is not asked; a frame without the tag goes on within its time."""

    async def body() -> None:
        wire = relay(tmp_path)
        passed = wire.handlers["v1/r/d/+/up/ask/infer"]
        tensors = {"x": np.ones(1, np.float32)}
        frame = pack(AskHead(model="m", version="1", within_ms=80.0, residency=residency), tensors)
        with pytest.raises(TheirsError) as refused:
            await passed(Inbound("v1/r/d/a/up/ask/infer", frame))
        assert refused.value.reason == "residency"
        assert wire.asked == []
        free = pack(AskHead(model="m", version="1", within_ms=80.0), tensors)
        assert await passed(Inbound("v1/r/d/a/up/ask/infer", free)) == free
        assert wire.asked == [("v1/r/r/up/ask/infer", 0.08)]

    run(body())
