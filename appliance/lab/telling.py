"""`python -m appliance.lab.telling`: a device's daemon as it is, and beside its loops one more that tells an event every so often.

Each event goes through the device's own durable queue under a known key. A key is written to the list of promised ones only after the queue has
committed it, so whoever compares the list with what the region accepted counts losses and repetitions.
"""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import click
import structlog
import uvloop

from appliance.contract.codec import encode
from appliance.contract.deferral import Kind, Parcel
from appliance.contract.errors import ApplianceError
from appliance.contract.settings import parse
from appliance.contract.vitals import Event
from appliance.daily.delivering import Delivering
from appliance.edge import daemon
from appliance.edge.settings import Edge

PREFIX = "told-"
PROMISED = "told.txt"
"""Beside the settings file: one line for each key that was promised."""


class Telling:
    """Events at a steady rate; a number is used once, also over restarts: it continues where the file ends."""

    def __init__(self, delivering: Delivering, device: str, promised: Path, every_s: float) -> None:
        self._delivering = delivering
        self._device = device
        self._promised = promised
        self._every_s = every_s
        self._log = structlog.get_logger()

    async def run(self, moved: Callable[[], None]) -> None:
        """Tell; ends only by cancellation."""
        number = _next(self._promised)
        with self._promised.open("a", buffering=1) as promised:
            while True:
                moved()
                number += 1
                key = f"{PREFIX}{number:06d}"
                event = Event(device=self._device, seq=number, at=0.0, what="told", fields={"key": key})
                try:
                    await self._delivering.put(Parcel(kind=Kind.EVENT, idem=key, payload=encode(event), key="told"))
                except ApplianceError as error:
                    self._log.debug("not_promised", key=key, reason=error.reason)
                else:
                    promised.write(key + "\n")
                await asyncio.sleep(self._every_s)


def _next(promised: Path) -> int:
    """The last number that may have been used: a daemon that was killed may have committed one more than it wrote."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(promised.read_text().split()[-1].removeprefix(PREFIX)) + 1
    return 0


@click.command()
@click.option("--config", type=click.Path(path_type=Path), required=True)
@click.option("--every-s", type=click.FloatRange(min=0.01), default=0.5)
def main(config: Path, every_s: float) -> None:
    """Run a device's daemon that also tells."""
    settings = parse(config.read_text(), str(config), Edge)
    promised = config.with_name(PROMISED)

    def more(delivering: Delivering) -> dict[str, Telling]:
        return {"telling": Telling(delivering, settings.device.name, promised, every_s)}

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(daemon.run(settings, more))


if __name__ == "__main__":
    main()
