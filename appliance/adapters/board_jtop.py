"""jetson-stats' own view of a Jetson (port `Board`), on top of what the plain files say: an optional extra, imported only where it is configured.

1. jetson-stats is AGPL-3.0 and needs its root service `jtop.service`; a daemon that imports it becomes a combined work (docs/decisions/0002). The usual
   board, `jetson`, reads the same sensors from sysfs and needs neither.
2. From jtop come temperatures, the GPU's load, clock and memory, and the largest free blocks; alerts and over-current counters stay sysfs'.
3. What jtop does not say (an offline zone is -256 degrees, JetPack 7 leaves keys empty) is taken from the plain board. If its service goes away, all is.
4. A GPU clock comes in kHz, but in MHz where NVML filled it: told apart by its size, as no Jetson's GPU runs below 10 or above 10,000 MHz.

Names as of jetson_stats 7.2.0 (memory `RAM`: `shared`, `lfb` in KB; temperature `temp`, `online`; gpu `status.load`, `freq.cur`, `freq.max`).
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import structlog

from appliance.contract.errors import WorldError
from appliance.contract.vitals import BoardReading
from appliance.ports import Board

COLDEST_C = -50.0
BLOCK_KIB = 4_096
MOST_MHZ = 10_000.0


class JtopBoard:
    """A plain board's readings with jtop's in their place where it has them. `client` is a started `jtop.jtop`."""

    def __init__(self, plain: Board, client: Any) -> None:
        self._plain = plain
        self._client = client
        self._lost = False
        self._log = structlog.get_logger()

    def read(self) -> BoardReading:
        """Read all sensors now. Raises: WorldError (`board`) if not even memory can be read."""
        reading = self._plain.read()
        try:
            said = _said(self._client) if self._client.ok(spin=True) else None
        except Exception as error:  # noqa: BLE001 - jtop's errors, and its proxy's, share no base but Exception
            return self._without(reading, f"{type(error).__name__}: {error}")
        if said is None:
            return self._without(reading, "its service has gone; systemctl restart jtop.service")
        if self._lost:
            self._log.info("jtop_back")
        self._lost = False
        return replace(reading, **{name: value for name, value in said.items() if value is not None})

    def close(self) -> None:
        """Leave the service."""
        self._client.close()

    def _without(self, reading: BoardReading, why: str) -> BoardReading:
        """The plain reading, and one line in the log when it begins to be all there is."""
        if not self._lost:
            self._log.warning("jtop_lost", what=why)
        self._lost = True
        return reading


def open_jtop(plain: Board, interval_s: float) -> JtopBoard:
    """Connect to jtop's service. Raises: WorldError (`jtop`) that says what is missing."""
    try:
        from jtop import JtopException, jtop  # noqa: PLC0415 - AGPL, optional: only where an operator asked for it (rule 1)
    except ImportError as error:
        raise WorldError(
            "jtop", "jetson-stats is not installed", where="board.kind", remedy="pip install appliance[jtop], or jetson"
        ) from error
    client = jtop(interval=interval_s)
    try:
        client.start()
    except JtopException as error:
        remedy = "systemctl enable --now jtop.service, and put the daemon's user into the group jtop"
        raise WorldError("jtop", str(error), where="jtop.service", remedy=remedy) from error
    return JtopBoard(plain, client)


def _said(client: Any) -> dict[str, Any]:
    """The fields of a reading that jtop has; None where it has not."""
    gpu: Mapping[str, Any] = next(iter(dict(client.gpu).values()), {})
    status, freq = gpu.get("status") or {}, gpu.get("freq") or {}
    ram = client.memory.get("RAM") or {}
    zones = {name: float(zone["temp"]) for name, zone in client.temperature.items() if zone.get("online") and zone["temp"] > COLDEST_C}
    load = status.get("load")
    return {
        "temperatures_c": zones or None,
        "gpu_load": None if load is None else float(load) / 100,
        "gpu_clock_hz": _hertz(freq.get("cur")),
        "gpu_clock_cap_hz": _hertz(freq.get("max")),
        "gpu_memory_used_bytes": _kib(ram.get("shared")),
        "largest_free_block_bytes": _kib(BLOCK_KIB * ram["lfb"] if ram.get("lfb") is not None else None),
    }


def _kib(value: float | None) -> int | None:
    return None if value is None else int(value) * 1024


def _hertz(value: float | None) -> float | None:
    """A clock in Hz (rule 4)."""
    with contextlib.suppress(TypeError):
        return None if not value else float(value) * (1e6 if value < MOST_MHZ else 1e3)
    return None
