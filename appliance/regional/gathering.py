"""Gathering: hears the vitals of all devices, and says once when one falls silent and once when it is back."""

import asyncio
from collections.abc import Callable

import structlog

from appliance.contract.codec import decode
from appliance.contract.errors import TheirsError
from appliance.contract.vitals import Vitals
from appliance.ports import Clock, Inbound, Link

MISSED = 3
DEVICES_MAX = 10_000
TICK_S = 1.0


class Gathering:
    """The newest vitals of each device."""

    def __init__(self, link: Link, clock: Clock, *, region: str) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[float, Vitals]] = {}
        self._silent: set[str] = set()
        self._log = structlog.get_logger()
        link.on(f"v1/{region}/d/+/up/vitals", self._vitals)

    @property
    def devices(self) -> dict[str, Vitals]:
        """The newest vitals by device name."""
        return {name: vitals for name, (_, vitals) in self._heard.items()}

    @property
    def present(self) -> dict[str, Vitals]:
        """The newest vitals of those that are not silent."""
        return {name: vitals for name, (_, vitals) in self._heard.items() if name not in self._silent}

    async def _vitals(self, inbound: Inbound) -> None:
        device = inbound.topic.split("/")[3]
        try:
            vitals = decode(inbound.payload, Vitals)
        except TheirsError as error:
            self._log.warning("vitals_refused", device=device, what=str(error))
            return
        if device not in self._heard:
            if len(self._heard) >= DEVICES_MAX:
                return
            self._log.info("device_heard", device=device)
        self._heard[device] = (self._clock.monotonic(), vitals)
        if device in self._silent:
            self._silent.discard(device)
            self._log.info("device_back", device=device)

    async def run(self, moved: Callable[[], None]) -> None:
        """Look through the devices; ends only by cancellation."""
        while True:
            moved()
            now = self._clock.monotonic()
            for device, (at, vitals) in self._heard.items():
                if now - at > MISSED * vitals.interval_s and device not in self._silent:
                    self._silent.add(device)
                    self._log.warning("device_silent", device=device, for_s=round(now - at, 1))
            await asyncio.sleep(TICK_S)
