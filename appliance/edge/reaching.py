"""Reaching: the heartbeat of this device, what it tells upstream, and what it says of itself.

How well it is connected is the verdict of `daily.hop` on the hop to the region.
"""

import asyncio
import secrets
from collections.abc import Callable

import structlog

from appliance.contract import topics
from appliance.contract.codec import encode
from appliance.contract.deferral import Kind, Parcel
from appliance.contract.errors import ApplianceError
from appliance.contract.vitals import BoardReading, Event, Vitals
from appliance.contract.vocabulary import LinkState
from appliance.daily.delivering import Delivering
from appliance.edge.serving import Serving
from appliance.edge.tally import Tally
from appliance.ports import Board, Clock, Link

TICK_S = 0.5


class Reaching:
    """Vitals and events on their way to the region."""

    def __init__(
        self,
        link: Link,
        clock: Clock,
        serving: Serving,
        tally: Tally,
        *,
        board: Board,
        delivering: Delivering,
        region: str,
        device: str,
        heartbeat_s: float,
        state: Callable[[], LinkState],
    ) -> None:
        self._delivering = delivering
        self._link = link
        self._clock = clock
        self._board = board
        self._serving = serving
        self._tally = tally
        self._region = region
        self._device = device
        self._heartbeat_s = heartbeat_s
        self._state = state
        self._started = clock.monotonic()
        self._seq = 0
        self._born = secrets.token_hex(8)
        self._event_seq = 0
        self._log = structlog.get_logger()
        self.say: Callable[[str], None] = lambda _text: None
        self.expired: Callable[[], bool] = lambda: False
        self._said = ""

    def vitals(self) -> Vitals:
        """The vitals now; `seq` is that of the last heartbeat."""
        reading = self._reading()
        rate, p50, p99 = self._tally.recent()
        versions = self._serving.versions()
        model = min(versions, default="")
        return Vitals(
            device=self._device,
            seq=self._seq,
            interval_s=self._heartbeat_s,
            uptime_s=self._clock.monotonic() - self._started,
            mode=self._serving.mode,
            link=self._state(),
            model=model,
            model_version=versions.get(model, ""),
            answered=self._tally.answered_total,
            failed=self._tally.failed_total,
            rate_per_s=rate,
            p50_ms=p50,
            p99_ms=p99,
            temperature_c=reading.hottest_c,
            memory_used_bytes=reading.memory_total_bytes - reading.memory_available_bytes,
            memory_total_bytes=reading.memory_total_bytes,
            rotations=self._link.rotations,
            modes={stand.name: stand.mode for stand in self._serving.stands},
            why=max(((stand.mode, stand.why) for stand in self._serving.stands), default=("", ""))[1],
            capacity=self._serving.capacity(),
        )

    def _reading(self) -> BoardReading:
        return self._board.read()

    async def tell(self, what: str, fields: dict[str, str]) -> None:
        """Put an event into the durable queue; what cannot be kept is logged, and stops nobody."""
        self._event_seq += 1
        event = Event(device=self._device, seq=self._event_seq, at=self._clock.wall(), what=what, fields=fields)
        try:
            await self._delivering.put(
                Parcel(kind=Kind.EVENT, idem=f"event-{self._born}-{self._event_seq}", payload=encode(event), key="events")
            )
        except ApplianceError as error:
            self._log.warning("event_not_kept", what_happened=what, reason=error.reason, what=str(error))

    async def run(self, moved: Callable[[], None]) -> None:
        """Beat and tell; ends only by cancellation."""
        due = self._clock.monotonic()
        while True:
            moved()
            self._report()
            if self._link.connected and self._clock.monotonic() >= due:
                self._seq += 1
                due = self._clock.monotonic() + self._heartbeat_s
                await self._send(topics.vitals(self._region, self._device), encode(self.vitals()))
            await asyncio.sleep(TICK_S)

    async def _send(self, topic: str, payload: bytes) -> bool:
        try:
            await self._link.publish(topic, payload)
        except ApplianceError as error:
            self._log.debug("not_delivered", topic=topic, reason=error.reason)
            return False
        return True

    def _report(self) -> None:
        """One line for the service manager whenever it changes: what serves, in which mode, over which link."""
        models = ", ".join(f"{name} {version}" for name, version in sorted(self._serving.versions().items()))
        text = (
            f"serving {models} in mode {self._serving.mode}, link {self._state()}"
            if models
            else f"{self._serving.why_not_ready()}, link {self._state()}"
        )
        if self.expired():
            text += ", identity expired"
        if text != self._said:
            self.say(text)
            self._said = text
