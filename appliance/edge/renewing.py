"""Renewing: inference processes whose memory is fragmented are replaced at a calm moment, one at a time, while they serve on."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import structlog

from appliance.contract.errors import ApplianceError
from appliance.core.serve.renewal import Holding, Renewal
from appliance.ports import Clock

TICK_S = 5.0


class Renewing:
    """`holdings` says what each process holds, `renew` replaces one, `calm` and `room_bytes` say whether now is the moment (None: unknown)."""

    def __init__(
        self,
        clock: Clock,
        *,
        holdings: Callable[[], Iterable[Holding]],
        renew: Callable[[int], Awaitable[None]],
        calm: Callable[[], bool],
        room_bytes: Callable[[], int | None],
        fragmented: Callable[[float], None],
    ) -> None:
        self._clock = clock
        self._holdings = holdings
        self._renew = renew
        self._calm = calm
        self._room_bytes = room_bytes
        self._fragmented = fragmented
        self._renewal = Renewal()
        self._log = structlog.get_logger()

    async def run(self, moved: Callable[[], None]) -> None:
        """Look, and renew where it is due; ends only by cancellation."""
        while True:
            moved()
            await self.look()
            await asyncio.sleep(TICK_S)

    async def look(self) -> None:
        """One round: at most one process is renewed."""
        holdings = tuple(self._holdings())
        self._fragmented(max((_ratio(each) for each in holdings), default=0.0))
        due = self._renewal.observe(self._clock.monotonic(), holdings, calm=self._calm(), room_bytes=self._room_bytes())
        if due is None:
            return
        try:
            await self._renew(due.worker)
        except ApplianceError as error:
            self._log.warning("worker_not_renewed", worker=due.worker, why=due.why, reason=error.reason, what=str(error))
        else:
            self._log.info("worker_renewed", worker=due.worker, why=due.why)
        finally:
            self._renewal.done(due.worker)


def _ratio(holding: Holding) -> float:
    """The share (0 to 1) of what a resting process holds that nothing loaded needs; of the GPU's memory where there is one."""
    held, needed = (holding.gpu_held, holding.gpu_needed) if holding.gpu_held else (holding.held, holding.needed)
    return max(0.0, 1 - needed / held) if held and needed is not None and holding.resting else 0.0
