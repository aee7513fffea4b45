"""What an operator sees of the fleet all the while: link state and queue depth of each device, twice a second."""

import asyncio
import contextlib
from dataclasses import dataclass

import apsw

from appliance.adapters.store import Inspection
from appliance.contract.errors import ApplianceError
from appliance.lab.daemon import Device, Lab

INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Look:
    """One device at one moment (loop seconds); None: it did not say."""

    at: float
    device: str
    link: str | None
    depth: int | None


class Watch:
    """Looks at every device of a lab; `looks` grows."""

    def __init__(self, lab: Lab) -> None:
        self.looks: list[Look] = []
        self._lab = lab

    async def run(self) -> None:
        """Look; ends only by cancellation."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self.looks += await asyncio.gather(*(self._look(device) for device in self._lab.devices))
            due = max(due + INTERVAL_S, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _look(self, device: Device) -> Look:
        now = asyncio.get_running_loop().time()
        status = await device.status()
        link = None if status is None else str(status["link"])
        return Look(now, device.name, link, depth(self._lab, device))

    def latest(self, device: str) -> Look | None:
        """The last look at a device."""
        return next((look for look in reversed(self.looks) if look.device == device), None)


def depth(lab: Lab, device: Device) -> int | None:
    """How many items wait in a device's queue, dead letters included; None if it cannot be read now."""
    with contextlib.suppress(ApplianceError, apsw.Error, OSError):
        inspection = Inspection.open(lab.site.path / device.name / "state" / "queue")
        try:
            counters = inspection.counters()
        finally:
            inspection.close()
        return sum(int(count) for count, _ in counters["usage"].values()) + int(counters["dead"][0])
    return None
