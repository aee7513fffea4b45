"""The price feed: a series from a file, one price after the other to every region, and what the region hands on."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from appliance.cloud.prices import VALID_MAX_S, Pricing, read_series
from appliance.contract.codec import decode
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.prices import Price
from appliance.lab.simloop import WALL_S
from appliance.lab.virtual import VirtualClock, run
from appliance.ports import Inbound

SERIES = Path(__file__).parents[2] / "bsp/prices/spot-day-synthetic.csv"


class Wire:
    """A link that notes what is published, and fails while `down` names the region."""

    def __init__(self) -> None:
        self.connected, self.rotations, self.down = True, 0, ""
        self.told: list[tuple[float, str, Price]] = []

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        assert (retain, qos) == (True, 1)
        if self.down and self.down in topic:
            raise WorldError("timeout", f"{timeout_s} s")
        self.told.append((asyncio.get_running_loop().time(), topic, decode(payload, Price)))

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        raise NotImplementedError

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        raise NotImplementedError

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        raise NotImplementedError


def lived(
    seconds: float, *, every_s: float = 10.0, change: Callable[[Wire], None] = lambda _wire: None, down: str = ""
) -> tuple[Wire, list[float]]:
    """Let a series of three prices run for so long, with a change after half of it."""
    wire = Wire()
    wire.down = down
    heard: list[float] = []

    async def body() -> None:
        pricing = Pricing(
            wire,
            VirtualClock(),
            (0.1, 0.2, 0.3),
            regions=("north", "south"),
            every_s=every_s,
            on_demand_per_h=0.5,
            egress_per_gb=0.09,
            priced=heard.append,
        )
        task = asyncio.create_task(pricing.run(lambda: None))
        await asyncio.sleep(seconds / 2)
        change(wire)
        await asyncio.sleep(seconds / 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(body())
    return wire, heard


def test_each_price_is_told_to_every_region_in_its_time_and_the_first_comes_after_the_last() -> None:
    """One every ten seconds, retained, valid for three of them; who computes hears the same."""
    wire, heard = lived(35.0)
    assert [(round(at), price.spot_per_h) for at, topic, price in wire.told if topic == "v1/north/r/dn/price"] == [
        (0, 0.1),
        (10, 0.2),
        (20, 0.3),
        (30, 0.1),
    ]
    assert len(wire.told) == 8
    assert heard == [0.1, 0.2, 0.3, 0.1]
    at, _, price = wire.told[2]
    assert price.valid_until == pytest.approx(WALL_S + at + 30.0)
    assert (price.on_demand_per_h, price.egress_per_gb) == (0.5, 0.09)


def test_a_region_that_cannot_be_reached_hears_the_present_price_when_it_can() -> None:
    """It was away from the start; at 12.5 s it is back, and hears the price of then, not those that it missed."""

    def heal(wire: Wire) -> None:
        wire.down = ""

    wire, _ = lived(25.0, change=heal, down="south")
    south = [(round(at), price.spot_per_h) for at, topic, price in wire.told if "south" in topic]
    assert south == [(12, 0.2), (20, 0.3)]


def test_a_long_interval_is_no_long_trust() -> None:
    """At most 15 minutes, whatever the interval."""
    wire, _ = lived(1.0, every_s=86_400.0)
    assert wire.told[0][2].valid_until == pytest.approx(WALL_S + VALID_MAX_S)


def test_the_series_of_the_repository_is_a_day_and_a_broken_one_is_told_by_line(tmp_path: Path) -> None:
    """288 prices; text, a missing column, a negative price and an empty file are refused with file and line."""
    series = read_series(SERIES)
    assert len(series) == 288
    assert 0.1 < min(series) < max(series) < 5
    for text, where in (
        ("# c\nminute,spot_per_h\n0,1\n5,dear\n", ":4"),
        ("minute,price\n0,1\n", ":2"),
        ("spot_per_h\n-1\n", ":2"),
        ("", ""),
    ):
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(TheirsError) as refused:
            read_series(tmp_path / "p.csv")
        assert refused.value.reason == "prices"
        assert refused.value.where.endswith(where)
    with pytest.raises(WorldError, match="prices"):
        read_series(tmp_path / "none.csv")
