"""One hop upwards, watched: hears the signs of life from above, probes when they stop, and says once when the verdict changes.

`Partition` decides; this loop hears, asks and wakes it. Used by the device for its region, and by the region for its cloud.
"""

import asyncio
from collections.abc import Callable

import structlog

from appliance.contract.codec import decode, encode
from appliance.contract.errors import ApplianceError, OursError, TheirsError
from appliance.contract.vitals import Beat, Ping
from appliance.contract.vocabulary import LinkState
from appliance.core.reach.partition import Commands, Partition, PartitionSettings, Probe, Verdict
from appliance.ports import Clock, Inbound, Link

TICK_S = 0.25
"""How often the link is looked at; the machine's own deadlines are far coarser."""
PROBE_TIMEOUT_S = 8.0
"""Longer than any verdict: an answer that is late is still a sign of life."""


class Hop:
    """The hop `name` (a metric's label). `beat`: the topic of the signs of life; `ping`: that of probes; `changed` hears each verdict."""

    def __init__(
        self,
        link: Link,
        clock: Clock,
        *,
        name: str,
        beat: str,
        ping: str,
        settings: PartitionSettings,
        changed: Callable[[LinkState, str], None],
        tick_s: float = TICK_S,
    ) -> None:
        self._link = link
        self._clock = clock
        self._name = name
        self._ping = ping
        self._changed = changed
        self._tick_s = tick_s
        self._partition = Partition(settings, clock.monotonic())
        self._probes: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger()
        self.beyond = LinkState.DEGRADED
        link.on(beat, self._heard)

    @property
    def state(self) -> LinkState:
        """The verdict on this hop."""
        return self._partition.state

    @property
    def whole(self) -> LinkState:
        """The worse of this hop and, as the neighbour above told last, the one beyond."""
        order = (LinkState.HEALTHY, LinkState.DEGRADED, LinkState.PARTITIONED)
        return max(self.state, self.beyond, key=order.index)

    def measured(self, rtt_s: float) -> None:
        """Take in that the neighbour above answered something else in so long."""
        self._obey(self._partition.measured(rtt_s, self._clock.monotonic()))

    async def _heard(self, inbound: Inbound) -> None:
        try:
            beat = decode(inbound.payload, Beat)
        except TheirsError as error:
            self._log.warning("beat_refused", hop=self._name, what=str(error))
            return
        self.beyond = beat.upstream
        self._obey(self._partition.heard(self._clock.monotonic(), seq=beat.seq))

    async def run(self, moved: Callable[[], None]) -> None:
        """Watch; ends only by cancellation."""
        self._changed(self.state, "starting")
        try:
            while True:
                moved()
                now = self._clock.monotonic()
                self._obey(self._partition.session(up=self._link.connected, now=now))
                self._obey(self._partition.tick(now))
                await asyncio.sleep(self._tick_s)
        finally:
            for probe in self._probes:
                probe.cancel()

    def _obey(self, commands: Commands) -> None:
        for command in commands:
            match command:
                case Probe(id=number):
                    task = asyncio.get_running_loop().create_task(self._probe(number))
                    self._probes.add(task)
                    task.add_done_callback(self._probes.discard)
                case Verdict(state=state, why=why):
                    self._log.log(_level(state), "link_changed", hop=self._name, state=state, why=why)
                    self._changed(state, why)

    async def _probe(self, number: int) -> None:
        """Ask; an answer of whatever kind is a sign of life, a refusal too."""
        try:
            await self._link.ask(self._ping, encode(Ping(id=number)), timeout_s=PROBE_TIMEOUT_S, qos=0)
        except TheirsError:
            pass
        except OursError:
            raise
        except ApplianceError:
            self._obey(self._partition.missed(self._clock.monotonic()))
            return
        self._obey(self._partition.answered(number, self._clock.monotonic()))


def _level(state: LinkState) -> int:
    return 20 if state is LinkState.HEALTHY else 30


async def beat(link: Link, topic: str, interval_s: float, upstream: Callable[[], LinkState], moved: Callable[[], None]) -> None:
    """Give a sign of life every `interval_s`; one that cannot be sent is not sent later. Ends only by cancellation."""
    seq = 0
    while True:
        moved()
        seq += 1
        if link.connected:
            try:
                await link.publish(topic, encode(Beat(seq=seq, interval_s=interval_s, upstream=upstream())), qos=0, timeout_s=interval_s)
            except ApplianceError as error:
                structlog.get_logger().debug("beat_not_sent", topic=topic, reason=error.reason)
        await asyncio.sleep(interval_s)


async def pong(inbound: Inbound) -> bytes:
    """Answer a probe by itself. Raises: TheirsError (`malformed`)."""
    return encode(decode(inbound.payload, Ping))
