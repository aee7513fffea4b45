"""The simulation: the real loops of devices, a region and a cloud on virtual time, with faults and crashes that a seed chose.

`simulate(seed)` lives through some minutes: a time of faults and load, then calm, until all is settled or `PATIENCE_S` is over. Then every promise
is looked at (docs/simulation.md lists them). The same seed gives the same trace, on every machine of one Python version.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from appliance.lab.simfaults import FAULTS, Plant
from appliance.lab.simload import Load
from appliance.lab.simloop import SimLoop
from appliance.lab.simnet import SimNet, Weather
from appliance.lab.simplant import Book, Cloud, Device, Region
from appliance.lab.simpromises import broken, unsettled
from appliance.lab.simstore import Bug

PATIENCE_S = 900.0
"""After heavy loss a link counts as bad until its mean has faded (core.reach.quality, rule 3): minutes."""
LOOK_S = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one seed showed. `broken` is empty if every promise was kept; `tail` is the end of the trace."""

    seed: int
    broken: tuple[str, ...]
    faults: Mapping[str, int]
    seen: Mapping[str, int]
    virtual_s: float
    steps: int
    digest: str
    tail: tuple[str, ...]


class World:
    """One seed's fleet."""

    def __init__(self, seed: int, bugs: Collection[Bug], faults: Sequence[str]) -> None:
        self._names = faults
        chance = self._chance = random.Random(f"{seed}:world")  # noqa: S311 - it is to be repeated
        self.loop = SimLoop()
        self.book = Book(self.loop)
        net = SimNet(self.loop, random.Random(f"{seed}:net"), self.book.note)  # noqa: S311 - as above
        options: Any = {"seed": str(seed), "bugs": bugs}
        devices = [
            Device(f"d{number}", net, self.book, Weather(chance.uniform(0.005, 0.06), chance.uniform(0.001, 0.02)), **options)
            for number in range(chance.choice([2, 2, 3]))
        ]
        region = Region("region", net, self.book, Weather(0.001, 0.000_2), **options)
        cloud = Cloud("cloud", net, self.book, Weather(chance.uniform(0.01, 0.08), 0.005), **options)
        self.plant = Plant(net, devices, region, cloud, chance)
        self.load = Load(self.plant, self.book, random.Random(f"{seed}:load"))  # noqa: S311 - as above
        self.faults: Counter[str] = Counter()

    async def live(self) -> None:
        """The whole story."""
        chance, loop = self._chance, self.loop
        for machine in self.plant.machines:
            loop.call_later(chance.uniform(0.0, 1.0), machine.start)
        span_s = chance.uniform(40.0, 80.0)
        for _ in range(chance.randint(3, 12)):
            loop.call_later(chance.uniform(2.0, span_s - 2.0), self._fail, chance.choice(self._names))
        self.load.begin(span_s)
        await _sleep(loop, span_s)
        self.book.note("world", "calm")
        self.plant.calm()
        deadline = loop.time() + PATIENCE_S
        while unsettled(self.plant, self.load) and loop.time() < deadline:
            await _sleep(loop, LOOK_S)
        for who, what in unsettled(self.plant, self.load):
            self.book.breach(who, what)
        for who, what in await broken(self.plant, self.load):
            self.book.breach(who, what)
        await self._end()

    def hear(self, _logger: Any, _method: str, event: Any) -> Any:
        """Take a log line into the trace; the region's records are the effects. Raises: DropEvent, always."""
        what = event.pop("event")
        self.book.note("log", what, *event.items())
        if what in {"device_event", "item_received"}:
            self.load.effect(event["number"], event["device"], event.get("data_idem") or event["idem"], crashes=self.plant.region.crashes)
        raise structlog.DropEvent

    def seen(self) -> dict[str, int]:
        """What the faults led to."""
        plant, load = self.plant, self.load
        return {
            "late_answers": plant.net.late_answers,
            "copies": plant.net.copies,
            "crashes": sum(machine.crashes for machine in plant.machines),
            "disk_failures": sum(machine.disk_failures for machine in plant.machines),
            "items_accepted": sum(len(items) for items in load.accepted.values()),
            "items_dropped": sum(len(device.disk.gone) for device in plant.devices),
            "effects": len(load.effects),
            "promises": sum(len(promises) for promises in load.promises.values()),
            "answers": load.answers,
            "refusals": load.refusals,
        }

    def _fail(self, name: str) -> None:
        self.faults[name] += 1
        self.book.note("world", "fault", name)
        FAULTS[name](self.plant)

    async def _end(self) -> None:
        """Stop everything, and let what was cancelled end."""
        for machine in self.plant.machines:
            machine.retired = True
            machine.crash()
        await _sleep(self.loop, 60.0)
        self.book.note("world", "ended", self.loop.steps)


def simulate(seed: int, bugs: Collection[Bug] = (), *, faults: Sequence[str] = tuple(FAULTS), tail: int = 60) -> Outcome:
    """Live through one seed, with promises broken on purpose if `bugs` says so; only these `faults` happen. Must not run inside a running loop."""
    world = World(seed, bugs, faults)
    before = structlog.get_config()
    structlog.configure(processors=[world.hear], wrapper_class=structlog.make_filtering_bound_logger(20), cache_logger_on_first_use=False)
    try:
        world.loop.run_until_complete(world.live())
    finally:
        structlog.configure(**before)
        world.loop.close()
    trace = world.book.trace
    return Outcome(
        seed=seed,
        broken=tuple(world.book.broken),
        faults=dict(world.faults),
        seen=world.seen(),
        virtual_s=world.loop.time(),
        steps=world.loop.steps,
        digest=hashlib.blake2b(repr(trace).encode(), digest_size=16).hexdigest(),
        tail=tuple(" ".join(map(str, line)) for line in trace[-tail:]),
    )


async def _sleep(loop: SimLoop, seconds: float) -> None:
    future = loop.create_future()
    loop.call_later(seconds, future.set_result, None)
    await future
