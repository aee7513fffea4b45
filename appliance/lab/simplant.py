"""The machines of the simulation: devices, one region and one cloud, each with the real loops, on simulated lines and disks.

1. A machine is a set of tasks. A crash cancels them where they are, after cutting their line and their store off: what they clean up has no effect.
2. A restart builds new minds on the old disk. A reboot begins a new boot time, and the wall clock is not trusted for a while.
3. Each task is watched: an exception that escapes one is a broken promise, and so is a loop that did not move for `STALLED_S`.
"""

import asyncio
import random
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from appliance.contract import topics
from appliance.contract.codec import encode
from appliance.contract.deferral import Bounds, Dropped, Kind, Overflow, Policy, Receipt, Rules
from appliance.contract.inference import Answer, Request
from appliance.contract.models import EdgeConstraints, Manifest
from appliance.contract.remote import AnswerHead, pack, unpack_ask
from appliance.contract.vocabulary import LinkState, Mode, Outcome, Platform
from appliance.core.reach.partition import PartitionSettings
from appliance.core.serve.degradation import DegradationSettings
from appliance.daily.delivering import Delivering
from appliance.daily.hop import Hop, beat, pong
from appliance.edge.deferring import Deferring
from appliance.edge.lane import Hands, Pool
from appliance.edge.serving import Serving
from appliance.edge.stand import Form
from appliance.edge.stand import Policy as StandPolicy
from appliance.edge.tally import Tally
from appliance.edge.upstream import Calls, CloudRoute
from appliance.lab.paced import PacedEngine
from appliance.lab.simloop import SimClock, SimLoop
from appliance.lab.simnet import SimLink, SimNet, Weather
from appliance.lab.simstore import Bug, Disk, DiskWeather, SimStore
from appliance.ports import Inbound
from appliance.regional.receiving import Receiving

REGION = "r"
BEAT_S = 2.0
CLEAN_S = 20.0
HOP_TICK_S = 0.5
"""Coarser than on a device, where nobody waits for the simulation; below the stall that a detector forgives itself (1 s)."""
STALLED_S = 20.0
"""The watchdog's patience as delivered (contract.settings.Watchdog)."""
ASK_S = 4.0
CLOUD_S = 0.4
TIMEOUT_S = 3.0
MODEL = "m"
POLICIES: Mapping[str, Policy] = {
    Kind.REQUEST: Policy(Overflow.REJECT, 4_000, priority=4, ttl_s=7 * 86_400.0, max_attempts=50, backoff_max_s=8.0),
    Kind.RESULT: Policy(Overflow.REJECT, 3_000, priority=3, max_attempts=50, backoff_max_s=8.0),
    Kind.EVENT: Policy(Overflow.DROP_EXPIRED_FIRST, 4_000, priority=5, ttl_s=30 * 86_400.0, max_attempts=50, backoff_max_s=8.0),
    Kind.TELEMETRY: Policy(Overflow.DROP_OLDEST_LOWEST_PRIO, 600, priority=8, ttl_s=60.0, max_attempts=50, backoff_max_s=8.0),
}
"""The usual classes with little room, so that a minute of partition fills them, and a short TTL for telemetry."""
RULES = Rules(POLICIES, Bounds(max_bytes=8_000, min_free_bytes=0))


@dataclass(slots=True)
class Book:
    """What was seen, and what is broken. `note` keeps the trace: time, who, what, and details."""

    loop: SimLoop
    trace: list[tuple[Any, ...]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def note(self, who: str, what: str, *details: object) -> None:
        """Write one line of the trace."""
        self.trace.append((round(self.loop.time(), 6), who, what, *details))

    def breach(self, who: str, what: str) -> None:
        """A promise is broken."""
        self.note(who, "BROKEN", what)
        self.broken.append(f"{self.loop.time():.3f} s: {who}: {what}")


class Silent:
    """A meter that counts nothing (protocol `edge.tally.Meter`)."""

    def answered(self, model: str, mode: Mode, seconds: float) -> None:
        """Nothing."""

    def failed(self, model: str, outcome: Outcome) -> None:
        """Nothing."""

    def batch(self, model: str, utilization: float) -> None:
        """Nothing."""

    def released(self, model: str, released_at: float) -> None:
        """Nothing."""


class Machine:
    """One machine and the tasks that live on it now."""

    def __init__(self, name: str, net: SimNet, book: Book, usual: Weather, *, seed: str, bugs: Collection[Bug] = ()) -> None:
        self.name = name
        self.loop, self.net, self.book, self.bugs = net.loop, net, book, bugs
        self.chance = random.Random(f"{seed}:{name}")  # noqa: S311 - it is to be repeated
        self.clock = SimClock(net.loop)
        self.disk = Disk(f"store-{name}")
        self.disk_weather = DiskWeather()
        self.line = net.line(name, usual)
        self.alive = False
        self.retired = False
        self.crashes = 0
        self.disk_failures = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._moved: dict[str, float] = {}
        self.link: SimLink
        self.store: SimStore

    def start(self) -> None:
        """Come up on what the disk holds."""
        if self.alive or self.retired:
            return
        self.alive = True
        self.book.note(self.name, "started")
        self.link = self.net.attach(self.line)
        self.store = SimStore(
            self.disk,
            RULES,
            self.clock.instant,
            loop=self.loop,
            chance=self.chance,
            weather=self.disk_weather,
            crash=self.crash,
            bugs=self.bugs,
        )
        self.build()

    def build(self) -> None:
        """Make the minds and their loops."""
        raise NotImplementedError

    def crash(self) -> None:
        """Die here and now."""
        if not self.alive:
            return
        self.alive = False
        self.crashes += not self.retired  # the end of a seed is no crash
        self.book.note(self.name, "crashed")
        self.net.detach(self.line)
        self.store.kill()
        self.disk_failures += self.store.failures
        self.link.kill()
        self._moved.clear()
        for task in self._tasks:
            task.cancel()
        if not self.retired:
            self.loop.call_later(self.chance.uniform(0.2, 8.0), self.start)

    def loops(self, **loops: Callable[[Callable[[], None]], Coroutine[Any, Any, None]]) -> None:
        """Run loops, each with a pulse that is watched (rule 3)."""
        for name, loop in loops.items():
            self.spawn(loop(self._pulse(name)), name)

    def spawn(self, coro: Coroutine[Any, Any, None], name: str = "") -> None:
        """Run something that dies with this machine."""
        task = self.loop.create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _pulse(self, name: str) -> Callable[[], None]:
        self._moved[name] = self.loop.time()

        def moved() -> None:
            now = self.loop.time()
            still_s = now - self._moved.get(name, now)
            self._moved[name] = now
            if still_s > STALLED_S:
                self.book.breach(self.name, f"loop {name} did not move for {still_s:.1f} s")

        return moved

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.book.breach(self.name, f"{type(error).__name__} escaped {task.get_name()}: {error}")


class Device(Machine):
    """A device; `told` is what it said of dropped items, `released` whether version 2 is served by now, `slow` stretches its batches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.told: dict[str, str] = {}
        self.released = False
        self.slow = 1.0

    def build(self) -> None:
        """See `Machine`."""
        link: Any = Hasty(self.link) if Bug.DELETE_ON_PUBACK in self.bugs else self.link
        self.hop = Hop(
            link,
            self.clock,
            name="region",
            beat=topics.beat(REGION),
            ping=topics.ping(REGION, self.name),
            settings=PartitionSettings(interval_s=BEAT_S, clean_s=CLEAN_S),
            changed=lambda state, why: self.book.note(self.name, "region is", state.value, why),
            tick_s=HOP_TICK_S,
        )
        self.delivering = Delivering(
            link,
            self.clock,
            self.store,
            topic=topics.deliver(REGION, self.name),
            policies=POLICIES,
            state=lambda: self.hop.state,
            told=self._dropped,
            ask_timeout_s=ASK_S,
            chance=self.chance,
        )
        self._desk()
        self.loops(hop=self.hop.run, delivering=self.delivering.run, deferring=self.deferring.run, serving=self.serving.run)
        self.spawn(self.mount("v2" if self.released else "v1"), "mount")

    def _desk(self) -> None:
        calls = Calls(
            self.link,
            self.clock,
            topic=topics.infer(REGION, self.name),
            where="cloud",
            deadline_s=CLOUD_S,
            state=lambda: self.hop.whole,
            version=lambda model: self.serving.versions().get(model, ""),
            chance=self.chance,
        )
        engine = PacedEngine(lambda _mode, samples: 0.05 * samples * self.slow, load_s=0.5)
        hands = Hands(engine, self.clock, Tally(Silent(), self.clock), Pool(1), slo_s=1.0, fill_wait_s=0.01)
        self.deferring = Deferring(
            self.store,
            POLICIES,
            compute=self._compute,
            calm=lambda: self.serving.ready() and self.serving.roomy(),
            told=self._dropped,
            chance=self.chance,
            tick_s=1.0,
        )
        self.serving = Serving(
            hands, StandPolicy(2, DegradationSettings()), timeout_s=TIMEOUT_S, upstream=CloudRoute(calls), promise=self.deferring.promise
        )

    async def mount(self, version: str) -> None:
        """Serve a version."""
        limits = EdgeConstraints(min_vram_gb=0, max_batch_size=2, target_latency_ms=50)
        manifest = Manifest(
            model_id=MODEL, version=version, sha256="", token=1, compiled_artifacts={}, edge_constraints=limits, released_at=0.0
        )
        await self.serving.mount(manifest, {Mode.FULL: Form(Platform.ONNX, lambda: -1)})

    async def _compute(self, request: Request) -> Answer:
        return await self.serving.answer(request)

    def _dropped(self, dropped: Dropped) -> None:
        self.told[dropped.idem] = dropped.reason
        self.book.note(self.name, "told dropped", dropped.idem, dropped.reason)


class Region(Machine):
    """The region: takes in, hands on, beats."""

    def build(self) -> None:
        """See `Machine`."""
        self.hop = Hop(
            self.link,
            self.clock,
            name="cloud",
            beat=topics.upstream_beat(REGION),
            ping=topics.upstream_ping(REGION),
            settings=PartitionSettings(interval_s=BEAT_S, clean_s=CLEAN_S),
            changed=lambda state, why: self.book.note(self.name, "cloud is", state.value, why),
            tick_s=HOP_TICK_S,
        )
        self.receiving = Receiving(self.link, self.store, region=REGION)
        self.link.serve(f"v1/{REGION}/d/+/up/ask/ping", pong)
        self.link.serve(f"v1/{REGION}/d/+/up/ask/infer", self._infer)
        self.loops(
            hop=self.hop.run,
            receiving=self.receiving.run,
            beat=lambda moved: beat(self.link, topics.beat(REGION), BEAT_S, lambda: self.hop.state, moved),
        )

    async def _infer(self, inbound: Inbound) -> bytes:
        """As `Relaying` hands a frame on."""
        within_s = unpack_ask(inbound.payload).head.within_ms / 1e3
        return await self.link.ask(topics.upstream_infer(REGION), inbound.payload, timeout_s=within_s, qos=0)


class Cloud(Machine):
    """The cloud: beats, and gives back what it is given."""

    def build(self) -> None:
        """See `Machine`."""
        self.link.serve(topics.upstream_ping(REGION), pong)
        self.link.serve(topics.upstream_infer(REGION), self._answer)
        self.loops(beat=lambda moved: beat(self.link, topics.upstream_beat(REGION), BEAT_S, lambda: LinkState.HEALTHY, moved))

    async def _answer(self, inbound: Inbound) -> bytes:
        ask = unpack_ask(inbound.payload)
        await asyncio.sleep(self.chance.uniform(0.01, 0.2))
        head = AnswerHead(version=ask.head.version, took_ms=10.0, dollars_per_hour=1.0)
        return pack(head, {"y": np.array(ask.tensors["x"])})


class Hasty:
    """A planted bug: a link on which what the broker took counts as received (docs/decisions/0004 says why it does not)."""

    def __init__(self, link: SimLink) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Any:
        """Everything else as it is."""
        return getattr(self._link, name)

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        """Ask; for a delivery, be content with the broker."""
        if not topic.endswith("/deliver"):
            return await self._link.ask(topic, payload, timeout_s=timeout_s, qos=qos)
        await self._link.publish(topic, payload, timeout_s=timeout_s)
        return encode(Receipt(idem=msgspec.json.decode(payload)["idem"]))
