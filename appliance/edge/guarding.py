"""Guarding: watches the board, and tells each model in which mode and with how large batches to go on. Local measurements only.

Every transition is logged once, counted, and told to the region; so is every throttling that begins or ends, with its cause.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from appliance.contract.errors import ApplianceError, WorldError
from appliance.contract.vitals import BoardReading
from appliance.contract.vocabulary import Mode
from appliance.core.serve import pressure
from appliance.core.serve.degradation import Shift
from appliance.core.serve.pressure import Level, Strain
from appliance.core.serve.throttle import Raised, ThrottleWatch
from appliance.edge.serving import Serving
from appliance.edge.stand import Stand
from appliance.ports import Board, Clock, Upstream

SPENT = 0.97
"""The pressure (CRITICAL) of an engine whose restarts are spent: a mode step down instead of a loop."""
SPENT_S = 10.0
"""How long that lasts after the engine said so."""
Tell = Callable[[str, dict[str, str]], Awaitable[None]]


class Gauge(Protocol):
    """The part of the metrics that guarding feeds."""

    def mode(self, model: str, mode: Mode) -> None:
        """A model is served in this mode now."""

    def shifted(self, model: str, before: Mode, after: Mode, cause: str) -> None:
        """A model's mode changed, by this kind of pressure."""

    def pressed(self, kind: str, ratio: float) -> None:
        """A pressure, 0 to 1."""

    def limited(self, model: str, batch: int) -> None:
        """The largest batch that heat allows a model now."""

    def throttled(self, cause: str) -> None:
        """The clock was lowered once, by this cause."""


class Guarding:
    """One board, and the models on it. `gpu_budget_bytes` is what all models may hold of a GPU's memory, unless the board reads its size; None: no such bound."""

    def __init__(
        self,
        board: Board,
        serving: Serving,
        clock: Clock,
        gauge: Gauge,
        *,
        tell: Tell,
        interval_s: float,
        gpu_budget_bytes: int | None = None,
        upstream: Upstream | None = None,
    ) -> None:
        self._board = board
        self._serving = serving
        self._clock = clock
        self._gauge = gauge
        self._tell = tell
        self._interval_s = interval_s
        self._gpu_budget_bytes = gpu_budget_bytes
        self._upstream = upstream
        self._watch = ThrottleWatch()
        self._spent_until = 0.0
        self._shifts: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()
        self.reading: BoardReading | None = None

    @property
    def calm(self) -> bool:
        """Whether no worker is busy and nothing presses: the moment for what would disturb."""
        at_rest = all(stand.mode is Mode.FULL and not stand.moving for stand in self._serving.stands)
        return at_rest and self._serving.busy() == 0.0 and not self._watch.causes

    def restarts_spent(self, delay_s: float) -> None:
        """The engine must wait so long before it may start a child again: serve less until then, and a little longer."""
        self._spent_until = max(self._spent_until, self._clock.monotonic() + delay_s + SPENT_S)

    async def run(self, moved: Callable[[], None]) -> None:
        """Read, judge, act; ends only by cancellation."""
        while True:
            moved()
            await self.look()
            await asyncio.sleep(self._interval_s)

    async def look(self) -> None:
        """One round: read the board in a thread, and act on what it says. A board that cannot be read presses nobody."""
        try:
            self.reading = reading = await asyncio.to_thread(self._board.read)
        except WorldError as error:
            self._log.warning("board_not_read", reason=error.reason, what=str(error))
            return
        await self.judge(reading)

    async def judge(self, reading: BoardReading) -> None:
        """Take one reading in."""
        now = self._clock.monotonic()
        for event in self._watch.observe(reading, now):
            await self._alert(event.cause, event.source, event.remedy if isinstance(event, Raised) else None)
        levels = {
            "memory": pressure.memory(reading, self._gpu_budget_bytes),
            "heat": pressure.heat(reading, self._watch.causes),
            "engine": Level(SPENT, "its processes were lost too often") if now < self._spent_until else Level(0.0, "stable"),
        }
        for kind, level in levels.items():
            self._gauge.pressed(kind, level.value)
        ratio = pressure.clock_ratio(reading)
        for stand in self._serving.stands:
            self._cool(stand, ratio, now)
            self._step(stand, stand.gauges.observe({**levels, "queue": self._queue(stand)}), now)

    def _queue(self, stand: Stand) -> Level:
        """The pressure of a model's own queue since the last round."""
        flow, lane = stand.flow(), stand.lanes.get(stand.mode)
        waiting, room = (lane.backlog.waiting, lane.backlog.max_waiting) if lane else (0, 1)
        return pressure.queue(waiting, room, flow.refused / flow.offered if flow.offered else 0.0)

    def _cool(self, stand: Stand, ratio: float | None, now: float) -> None:
        """Size batches for the clock."""
        for lane in stand.lanes.values():
            limit = lane.thermal.clock(ratio, now) or lane.thermal.grow(now)
            if limit is not None:
                self._log.info("batch_limited", model=stand.name, batch=limit.batch, why=limit.why)
            self._gauge.limited(stand.name, lane.thermal.limit)

    def _step(self, stand: Stand, strain: Strain, now: float) -> None:
        """Ask for the mode; carry a shift out beside the loop, one at a time for each model."""
        self._gauge.mode(stand.name, stand.mode)
        if stand.moving:
            return
        # a full queue leaves to the cloud request by request (serving); it is no reason to send everybody there
        cloud = self._upstream is not None and self._upstream.stands and strain.kind != "queue"
        shift = stand.degradation.observe(strain.severity, f"{strain.kind}: {strain.level.why}", now, cloud=cloud)
        if shift is not None:
            stand.moving = True
            task = asyncio.get_running_loop().create_task(self._carry_out(stand, shift, strain.kind))
            self._shifts.add(task)
            task.add_done_callback(self._shifts.discard)

    async def _carry_out(self, stand: Stand, shift: Shift, kind: str) -> None:
        before = stand.mode
        fields = {"model": stand.name, "before": str(before), "after": str(shift.mode), "why": shift.why}
        try:
            await stand.shift(shift.mode, shift.why)
        except ApplianceError as error:
            stand.degradation.withdraw(shift.mode, before)
            self._log.error("mode_not_changed", **fields, reason=error.reason, what=str(error))
            await self._tell("mode_not_changed", {**fields, "reason": error.reason})
        else:
            self._gauge.shifted(stand.name, before, shift.mode, kind if shift.mode > before else "calm")
            self._gauge.mode(stand.name, stand.mode)
            self._log.warning("mode_changed", **fields)
            await self._tell("mode_changed", fields)
        finally:
            stand.moving = False

    async def _alert(self, cause: str, source: str, remedy: str | None) -> None:
        """Tell once that throttling has begun (with what to do about it) or ended."""
        if remedy is None:
            self._log.info("throttling_ended", cause=cause, source=source)
            await self._tell("throttling_ended", {"cause": cause, "source": source})
            return
        self._gauge.throttled(cause)
        self._log.critical("throttling_began", cause=cause, source=source, remedy=remedy)
        await self._tell("throttling_began", {"cause": cause, "source": source, "remedy": remedy})
