"""Prices: tells every region what the cloud costs now, from a series in a file or as one constant price.

1. A series is a CSV file with a column `spot_per_h` (dollars for an hour of one worker) and lines of comment that begin with `#`; each row holds for
   `every_s`, and after the last comes the first again.
2. A price is retained, and holds for three intervals (15 minutes at most): who hears nothing more goes on with the price on demand.
"""

import asyncio
import csv
import itertools
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path

import structlog

from appliance.contract import topics
from appliance.contract.codec import encode
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.prices import Price
from appliance.ports import Clock, Link

COLUMN = "spot_per_h"
TICK_S = 0.5
HELD = 3
VALID_MAX_S = 900.0


class Pricing:
    """One series and the regions that hear it; `priced` hears each new spot price too."""

    def __init__(
        self,
        link: Link,
        clock: Clock,
        series: Sequence[float],
        *,
        regions: Sequence[str],
        every_s: float,
        on_demand_per_h: float,
        egress_per_gb: float,
        priced: Callable[[float], None],
    ) -> None:
        self._link = link
        self._clock = clock
        self._series: Iterator[float] = itertools.cycle(series)
        self._regions = regions
        self._every_s = every_s
        self._on_demand_per_h = on_demand_per_h
        self._egress_per_gb = egress_per_gb
        self._priced = priced
        self._log = structlog.get_logger()

    async def run(self, moved: Callable[[], None]) -> None:
        """Publish each price when its time has come, to a region that could not be reached again and again; ends only by cancellation."""
        due, pending, price = self._clock.monotonic() + self._every_s, list(self._regions), self._next()
        while True:
            moved()
            if self._clock.monotonic() >= due:
                due = self._clock.monotonic() + self._every_s
                pending, price = list(self._regions), self._next()
            for region in tuple(pending):
                try:
                    await self._link.publish(topics.upstream_price(region), encode(price), retain=True)
                except ApplianceError as error:
                    self._log.debug("price_deferred", region=region, reason=error.reason)
                else:
                    pending.remove(region)
            await asyncio.sleep(min(TICK_S, self._every_s))

    def _next(self) -> Price:
        spot = next(self._series)
        self._priced(spot)
        return Price(
            spot_per_h=spot,
            on_demand_per_h=self._on_demand_per_h,
            egress_per_gb=self._egress_per_gb,
            valid_until=self._clock.wall() + min(HELD * self._every_s, VALID_MAX_S),
        )


def read_series(path: Path) -> tuple[float, ...]:
    """The spot prices of a file, in its order. Raises: WorldError (`unreadable`), TheirsError (`prices`) with the line that is wrong."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorldError("unreadable", str(error), where=str(path), remedy="put the file there, or correct answer.prices") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    rows = csv.DictReader(line for _, line in numbered)
    return tuple(_spot(row, f"{path}:{number}") for (number, _), row in zip(numbered[1:], rows, strict=False)) or _empty(path)


def _spot(row: dict[str, str], where: str) -> float:
    try:
        spot = float(row[COLUMN])
    except (KeyError, TypeError, ValueError) as error:
        raise TheirsError("prices", f"no number in a column {COLUMN}", where=where) from error
    if not 0 <= spot < inf:
        raise TheirsError("prices", f"{COLUMN} is {spot}, expected 0 or more", where=where)
    return spot


def _empty(path: Path) -> tuple[float, ...]:
    raise TheirsError("prices", "there is no price in it", where=str(path))
