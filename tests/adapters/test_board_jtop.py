"""jtop in the place of plain files where it has a reading, and the plain files alone where it has not.

No Jetson is here: the client is a double with the names and values that jetson_stats 7.2.0 documents.
"""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from appliance.adapters.board_jtop import open_jtop
from appliance.contract.errors import WorldError
from appliance.contract.vitals import BoardReading

PLAIN = BoardReading({"cpu": 40.0}, 8 << 30, 6 << 30, throttle_causes=("hot-surface-alert",), over_current_events={"oc1": 1}, gpu_load=0.1)


class Plain:
    def read(self) -> BoardReading:
        return PLAIN


class JtopError(Exception):
    """Stands for `JtopException`."""


class Client:
    """An Orin under load; `down` refuses to start, `away` is a service that has gone, `broken` a proxy that has."""

    down = away = broken = False
    freq: dict[str, Any] = {"cur": 1_005_000, "max": 1_020_000}  # noqa: RUF012 - a double

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.closed = False

    def start(self) -> None:
        if self.down:
            raise JtopError("The jtop.service is not active")

    def ok(self, *, spin: bool = False) -> bool:
        assert spin, "waiting for the next sample would hold the reading up"
        return not self.away

    def close(self) -> None:
        self.closed = True

    @property
    def gpu(self) -> dict[str, Any]:
        if self.broken:
            raise BrokenPipeError
        return {"gpu": {"type": "integrated", "status": {"load": 99.0}, "freq": self.freq}}

    @property
    def memory(self) -> dict[str, Any]:
        return {"RAM": {"tot": 7_789_568, "used": 4_332_544, "shared": 1_048_576, "lfb": 9}}

    @property
    def temperature(self) -> dict[str, Any]:
        return {"tj": {"temp": 55.281, "online": True}, "cv0": {"temp": -256, "online": False}}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    module = ModuleType("jtop")
    fresh = type("Client", (Client,), {})
    vars(module).update(jtop=fresh, JtopException=JtopError)
    monkeypatch.setitem(sys.modules, "jtop", module)
    return fresh


def test_what_jtop_has_takes_the_plain_readings_place(installed: type[Client]) -> None:
    """Temperatures without the offline zone, load, clock, memory and blocks are jtop's; alerts and counters stay."""
    assert installed
    assert open_jtop(Plain(), 0.5).read() == replace(
        PLAIN,
        temperatures_c={"tj": 55.281},
        gpu_load=0.99,
        gpu_clock_hz=1.005e9,
        gpu_clock_cap_hz=1.02e9,
        gpu_memory_used_bytes=1 << 30,
        largest_free_block_bytes=9 * 4 << 20,
    )


def test_a_clock_in_megahertz_is_told_from_one_in_kilohertz(installed: type[Client]) -> None:
    """JetPack 7 gives NVML's MHz under the same key; an empty key is no clock."""
    installed.freq = {"cur": 1_575, "max": None}
    reading = open_jtop(Plain(), 0.5).read()
    assert (reading.gpu_clock_hz, reading.gpu_clock_cap_hz) == (1.575e9, None)


@pytest.mark.parametrize("fault", ["away", "broken"])
def test_without_its_service_the_plain_board_goes_on(installed: type[Client], fault: str) -> None:
    """The daemon never stops for jtop: a service that went away, or a broken proxy, leaves the plain reading, and it comes back."""
    board = open_jtop(Plain(), 0.5)
    setattr(installed, fault, True)
    assert board.read() == PLAIN
    setattr(installed, fault, False)
    assert board.read().gpu_load == 0.99


def test_what_is_missing_is_said_with_the_command_that_brings_it(installed: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
    """No service, or no package: one sentence, and it was never imported before it was asked for."""
    installed.down = True
    with pytest.raises(WorldError, match=r"enable --now jtop\.service"):
        open_jtop(Plain(), 0.5)
    monkeypatch.setitem(sys.modules, "jtop", None)
    with pytest.raises(WorldError, match=r"pip install appliance\[jtop\]"):
        open_jtop(Plain(), 0.5)
