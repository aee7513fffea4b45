"""What the settings name is what is opened."""

import contextlib

import pytest

from appliance.adapters.clock import SystemClock
from appliance.contract.settings import parse
from appliance.edge import opening
from appliance.edge.settings import Edge

SETTINGS = """
[device]
name = "dev-1"
region = "r"
[reach]
broker_host = "localhost"
[trust]
trust_domain = "example.org"
[board]
kind = "{kind}"
"""


class Full:
    """A driver whose one GPU has 100 bytes, 97 of them held."""

    def fullest(self) -> tuple[int, int]:
        return 97, 100


@pytest.mark.parametrize(("kind", "held"), [("generic", (97, 100)), ("jetson", (None, None)), ("sim", (None, None))])
def test_the_memory_of_a_discrete_gpu_is_read_on_a_plain_machine(
    kind: str, held: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Jetson's GPU shares the system's memory, and a simulated board has no driver: neither asks it."""
    monkeypatch.setattr(opening, "open_nvml", Full)
    settings = parse(SETTINGS.format(kind=kind), "device.toml", Edge)
    reading = opening.open_board(settings, SystemClock(), lambda: 0.0, contextlib.AsyncExitStack()).read()
    assert (reading.gpu_memory_used_bytes, reading.gpu_memory_total_bytes) == held
