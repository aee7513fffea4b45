"""The network of the simulation: one broker, a line to it for each workload, and weather decided by one seeded source of chance.

1. A line is one ordered stream: in each direction nothing overtakes. Lines differ, so what comes from two workloads arrives in any order.
2. QoS 0 is lost where the line loses; QoS 1 is late instead (a retransmission), and may come twice.
3. A cut line eats both or one of its directions; its ends notice only after a while. What was under way at QoS 1 comes when it is whole
   again, after its asker has given up; the broker keeps what is for an absent workload until it expires.
4. A broker that restarts has lost what was under way, and what it kept.
5. `SimLink` keeps the promises of `ports.Link` (docs/decisions/0004): it sends again on the next session what nobody acknowledged.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.lab.simloop import SimLoop
from appliance.ports import Inbound

Handler = Callable[[Inbound], Awaitable[Any]]
Note = Callable[..., None]
RECONNECT_S = 2.0
LOCAL_S = 0.001


class Packet(NamedTuple):
    """A message on its way. `number` tells requests apart; `asker` is whose answer is wanted; `answers`: it is one; `refused`: with this."""

    topic: str
    payload: bytes
    qos: int
    number: int
    expires_at: float
    asker: str = ""
    answers: bool = False
    refused: ApplianceError | None = None


@dataclass(slots=True)
class Weather:
    """How a line is: delays in seconds, chances from 0 to 1."""

    delay_s: float
    jitter_s: float
    loss: float = 0.0
    twice: float = 0.0


@dataclass(slots=True)
class Line:
    """The way of one workload to the broker. `session` counts its connections; `held` is what a cut holds back, by direction."""

    name: str
    weather: Weather
    usual: Weather
    up: bool = False
    cut: set[str] = field(default_factory=set)
    cuts: int = 0
    session: int = 0
    link: "SimLink | None" = None
    free_at: dict[str, float] = field(default_factory=dict)
    held: list[tuple[str, Packet]] = field(default_factory=list)
    kept: deque[Packet] = field(default_factory=deque)


class SimNet:
    """The broker and its lines; `note` writes the trace."""

    def __init__(self, loop: SimLoop, chance: random.Random, note: Note) -> None:
        self.loop = loop
        self.note = note
        self.late_answers = self.copies = 0
        self._chance = chance
        self._lines: dict[str, Line] = {}
        self._subscribed: dict[str, list[str]] = {}
        self._routes: dict[str, tuple[Line, ...]] = {}
        self._up = True
        self._epoch = 0
        self._numbers = 0

    def number(self) -> int:
        """A number that no other packet has."""
        self._numbers += 1
        return self._numbers

    def line(self, name: str, usual: Weather) -> Line:
        """Add a workload's line."""
        self._lines[name] = line = Line(name, usual, usual)
        return line

    def attach(self, line: Line) -> "SimLink":
        """A process begins on this line; what its predecessor was waiting for is forgotten by nobody but itself."""
        line.link = SimLink(self, line)
        self._soon(line)
        return line.link

    def detach(self, line: Line) -> None:
        """The process is dead, and its connection with it."""
        if line.link is not None:
            line.link.alive = False
            line.link = None
        self._close(line)

    def subscribe(self, pattern: str, line: Line) -> None:
        """Note whose messages these are; a subscription outlives its process (persistent session)."""
        names = self._subscribed.setdefault(pattern, [])
        if line.name not in names:
            names.append(line.name)
        self._routes.clear()

    def cut(self, line: Line, directions: set[str], notice_s: float) -> None:
        """Eat what goes in these directions; the ends notice after so long, if it is still cut."""
        line.cut |= directions
        line.cuts += 1
        self.loop.call_later(notice_s, self._noticed, line, line.cuts)

    def heal(self, line: Line) -> None:
        """Make a line whole; what it held comes now if its session has survived."""
        line.cut.clear()
        line.cuts += 1
        held, line.held = line.held, []
        if line.up:
            for direction, packet in held:
                self._go(line, direction, packet)
        else:
            self._soon(line)

    def stop_broker(self) -> None:
        """All sessions end, all that was under way is lost."""
        self._up = False
        self._epoch += 1
        for line in self._lines.values():
            line.kept.clear()
            self._close(line)

    def start_broker(self) -> None:
        """Take connections again."""
        self._up = True
        for line in self._lines.values():
            self._soon(line)

    def clear(self) -> None:
        """The weather is as usual, all lines are whole, the broker is up."""
        self.start_broker()
        for line in self._lines.values():
            line.weather = line.usual
            self.heal(line)

    def send(self, line: Line, packet: Packet) -> None:
        """Put a packet on a line that is up, on its way to the broker."""
        self._go(line, "up", packet)

    def _go(self, line: Line, direction: str, packet: Packet) -> None:
        if direction in line.cut:
            if packet.qos:
                line.held.append((direction, packet))
            return
        weather, chance = line.weather, self._chance
        took_s = weather.delay_s + weather.jitter_s * chance.expovariate(1.0)
        if weather.loss and chance.random() < weather.loss:
            if not packet.qos:
                return
            took_s += chance.uniform(0.5, 6.0)
        at = max(line.free_at.get(direction, 0.0), self.loop.time() + took_s)
        line.free_at[direction] = at
        self.loop.call_at(at, self._come, line, direction, packet, (self._epoch, line.session))
        if packet.qos and weather.twice and chance.random() < weather.twice:
            self.copies += 1
            self.loop.call_at(at + chance.uniform(0.0, 20.0), self._come, line, direction, packet, (self._epoch, line.session))

    def _come(self, line: Line, direction: str, packet: Packet, sent: tuple[int, int]) -> None:
        epoch, session = sent
        if epoch != self._epoch:
            return
        if direction in line.cut or line.session != session:
            if packet.qos and direction == "down":
                self._deliver(line, packet)
            return
        if direction == "up":
            self._brokered(line, packet)
        elif line.link is not None:
            line.link.receive(packet)

    def _brokered(self, line: Line, packet: Packet) -> None:
        if packet.qos and line.link is not None:
            self.loop.call_later(line.weather.delay_s, line.link.acknowledged, packet.number)
        if packet.answers:
            self._deliver(self._lines[packet.asker], packet)
            return
        found = self._routes.get(packet.topic)
        if found is None:
            names = [name for pattern, names in self._subscribed.items() if matches(pattern, packet.topic) for name in names]
            found = self._routes[packet.topic] = tuple(self._lines[name] for name in names)
        for each in found:
            self._deliver(each, packet)

    def _deliver(self, line: Line, packet: Packet) -> None:
        if line.up:
            self._go(line, "down", packet)
        elif packet.qos:
            line.kept.append(packet)

    def _noticed(self, line: Line, cuts: int) -> None:
        if line.cuts == cuts:
            self._close(line)

    def _close(self, line: Line) -> None:
        """End a session; the broker takes back what it had not seen acknowledged."""
        if line.up:
            line.up = False
            self.note(line.name, "session closed")
        line.kept.extend(packet for direction, packet in line.held if direction == "down" and self._up)
        line.held.clear()

    def _soon(self, line: Line) -> None:
        self.loop.call_later(self._chance.uniform(0.01, RECONNECT_S), self._open, line)

    def _open(self, line: Line) -> None:
        if line.up or line.link is None or line.cut or not self._up:
            return
        line.up = True
        line.session += 1
        line.free_at.clear()
        self.note(line.name, "session opened", line.session)
        kept, now = [*line.kept], self.loop.time()
        line.kept.clear()
        for packet in kept:
            if packet.expires_at > now:
                self._go(line, "down", packet)
        line.link.opened()


class SimLink:
    """One process's end of a line (port `Link`)."""

    rotations = 0

    def __init__(self, net: SimNet, line: Line) -> None:
        self.alive = True
        self._net = net
        self._line = line
        self._loop = net.loop
        self._outgoing: dict[int, Packet] = {}
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._handlers: list[tuple[str, Handler, bool]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether the session is up, as far as this end knows."""
        return self._line.up and self.alive

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        """See `ports.Link`. Nothing here retains. Raises: WorldError (`not_connected`, `timeout`)."""
        if retain:
            raise OursError("retain", "nothing is retained in the simulation", where=topic)
        await self._transmit(Packet(topic, payload, qos, self._net.number(), self._loop.time() + timeout_s), timeout_s)

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        """See `ports.Link`. Raises: WorldError (`not_connected`, `timeout`), TheirsError with the peer's reason."""
        expires_at = self._loop.time() + max(1, math.ceil(timeout_s))
        packet = Packet(topic, payload, qos, self._net.number(), expires_at, self._line.name)
        answer: Packet = await self._transmit(packet, timeout_s)
        if answer.refused is not None:
            raise TheirsError(answer.refused.reason, answer.refused.what)
        return answer.payload

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        """See `ports.Link`."""
        self._handlers.append((pattern, handler, False))
        self._net.subscribe(pattern, self._line)

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        """See `ports.Link`."""
        self._handlers.append((pattern, handler, True))
        self._net.subscribe(pattern, self._line)

    async def run(self) -> None:
        """Nothing to do: the net keeps the session."""

    def opened(self) -> None:
        """Send what nobody has acknowledged, in order."""
        for packet in [*self._outgoing.values()]:
            self._send(packet)

    def acknowledged(self, number: int) -> None:
        """The broker has it (PUBACK)."""
        packet = self._outgoing.pop(number, None)
        waiting = self._waiting.get(number)
        if packet is not None and not packet.asker and waiting is not None and not waiting.done():
            waiting.set_result(packet)

    def receive(self, packet: Packet) -> None:
        """Take what arrived."""
        if packet.answers:
            waiting = self._waiting.get(packet.number)
            if waiting is None or waiting.done():
                self._net.late_answers += 1
            else:
                waiting.set_result(packet)
            return
        for pattern, handler, served in self._handlers:
            if matches(pattern, packet.topic) and served == bool(packet.asker):
                task = self._loop.create_task(self._handle(handler, packet))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def kill(self) -> None:
        """End the handlers of a dead process."""
        for task in self._tasks:
            task.cancel()

    async def _handle(self, handler: Handler, packet: Packet) -> None:
        """Run a handler; a request gets an answer of whatever kind, if anybody still waits for one."""
        refused: ApplianceError | None = None
        payload = b""
        try:
            payload = await handler(Inbound(packet.topic, packet.payload)) or b""
        except ApplianceError as error:
            refused = error
            if isinstance(error, OursError):
                self._net.note(self._line.name, "handler failed", error.reason, str(error))
        if packet.asker and self.alive and packet.expires_at > self._loop.time():
            self._reply(packet._replace(payload=payload, answers=True, refused=refused))

    def _reply(self, answer: Packet) -> None:
        if self._line.up:
            self._net.send(self._line, answer)
        elif answer.qos:
            self._outgoing[-answer.number] = answer

    async def _transmit(self, packet: Packet, timeout_s: float) -> Any:
        """Send now or when connected; return what came of it."""
        if not self.alive:
            raise asyncio.CancelledError
        number = packet.number
        self._outgoing[number] = packet
        future = self._waiting[number] = self._loop.create_future()
        timer = self._loop.call_later(timeout_s, self._late, future, packet.topic)
        try:
            if self._line.up:
                self._send(packet)
            return await future
        finally:
            timer.cancel()
            del self._waiting[number]
            self._outgoing.pop(number, None)

    def _send(self, packet: Packet) -> None:
        self._net.send(self._line, packet)
        if packet.answers:
            self._outgoing.pop(-packet.number, None)
        elif not packet.qos and not packet.asker:
            waiting = self._waiting.get(packet.number)
            self._outgoing.pop(packet.number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(packet)

    def _late(self, future: asyncio.Future[Any], topic: str) -> None:
        if not future.done():
            reason = "timeout" if self._line.up else "not_connected"
            future.set_exception(WorldError(reason, "no answer in time", where=topic))


def matches(pattern: str, topic: str) -> bool:
    """Whether a topic matches a pattern with `+`."""
    wanted, seen = pattern.split("/"), topic.split("/")
    return len(wanted) == len(seen) and all(want in {"+", see} for want, see in zip(wanted, seen, strict=True))
