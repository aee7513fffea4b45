"""The experiments as data: what breaks, whose it is, and for how long. Each fault is a context that breaks on entry and heals on exit.

Devices are chosen by their place: 0 is the first. `make chaos` runs all; `--only NAME` runs some.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from appliance.lab import faults
from appliance.lab.daemon import Device, Lab
from appliance.lab.network import CUT, Line, Network
from appliance.lab.units import Unit

HOUR_S = 3600


@dataclass(slots=True)
class World:
    """What a fault may touch. `clocks` are those of devices that have one of their own."""

    lab: Lab
    network: Network
    clocks: dict[str, faults.Clock] = field(default_factory=dict)
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    def device(self, place: int) -> Device:
        """A device by its place; beyond the last one, the last."""
        return self.lab.devices[min(place, len(self.lab.devices) - 1)]

    def unit(self, name: str) -> Unit:
        """A process of the lab by its name."""
        return next(unit for unit in self.lab.units if unit.name == name)


Fault = Callable[[World], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One fault under load. `why_not` says why this machine cannot do it (empty: it can)."""

    name: str
    what: str
    fault: Fault
    fault_s: float = 12.0
    why_not: Callable[[], str] = lambda: ""


def wire(*places: int, up: Line | None = None, down: Line | None = None) -> Fault:
    """Some devices' wires become worse."""

    @contextlib.asynccontextmanager
    async def fault(world: World) -> AsyncIterator[None]:
        names = [world.device(place).name for place in places]
        for name in names:
            world.network.line(name, up=up, down=down)
        try:
            yield
        finally:
            for name in names:
                world.network.heal(name)

    return fault


def flapping(place: int, up_s: float, down_s: float) -> Fault:
    """A device's wire is cut and healed, again and again."""

    async def flap(network: Network, name: str) -> None:
        while True:
            network.line(name, up=CUT, down=CUT)
            await asyncio.sleep(down_s)
            network.heal(name)
            await asyncio.sleep(up_s)

    @contextlib.asynccontextmanager
    async def fault(world: World) -> AsyncIterator[None]:
        name = world.device(place).name
        async with running(flap(world.network, name)):
            yield
        world.network.heal(name)

    return fault


def away(unit: str) -> Fault:
    """A process is killed, and stays away for the whole fault."""

    @contextlib.asynccontextmanager
    async def fault(world: World) -> AsyncIterator[None]:
        found = world.unit(unit)
        found.hold()
        try:
            yield
        finally:
            found.release()

    return fault


def frozen(unit: Callable[[World], Unit]) -> Fault:
    """SIGSTOP for the whole fault."""

    @contextlib.asynccontextmanager
    async def fault(world: World) -> AsyncIterator[None]:
        thaw = faults.freeze(unit(world).pid or 0)
        try:
            yield
        finally:
            thaw()

    return fault


def killed_at_random(every_s: float) -> Fault:
    """Kill -9 of a device's daemon or of one of its inference children, by chance, again and again."""

    async def kill(world: World) -> None:
        while True:
            device = world.chance.choice(world.lab.devices)
            pid = device.unit.pid
            victims = [] if pid is None else [pid, *faults.children(pid)]
            if victims:
                faults.kill(world.chance.choice(victims))
            await asyncio.sleep(every_s)

    @contextlib.asynccontextmanager
    async def fault(world: World) -> AsyncIterator[None]:
        async with running(kill(world)):
            yield

    return fault


def disk_full(place: int) -> Fault:
    """Nothing more fits on a device's state directory."""

    @contextlib.asynccontextmanager
    async def fault(world: World) -> AsyncIterator[None]:
        empty = faults.fill(world.lab.site.path / world.device(place).name / "state")
        try:
            yield
        finally:
            empty()

    return fault


def failing_writes(place: int) -> Fault:
    """Every write and sync of a device's queue fails with EIO."""

    @contextlib.asynccontextmanager
    async def fault(world: World) -> AsyncIterator[None]:
        device = world.device(place)
        folder = world.lab.site.path / device.name / "state" / "queue"
        detach = faults.failing_writes(device.unit.pid or 0, [folder / f"queue.db{suffix}" for suffix in ("", "-wal", "-shm")])
        try:
            yield
        finally:
            await asyncio.to_thread(detach)

    return fault


def clock_steps(place: int, steps_s: tuple[int, ...], each_s: float) -> Fault:
    """A device's wall clock jumps; its monotonic clock does not."""

    async def step(clock: faults.Clock) -> None:
        for seconds in steps_s:
            clock.step(seconds)
            await asyncio.sleep(each_s)
        clock.step(0)

    @contextlib.asynccontextmanager
    async def fault(world: World) -> AsyncIterator[None]:
        clock = world.clocks[world.device(place).name]
        try:
            async with running(step(clock)):
                yield
        finally:
            clock.step(0)

    return fault


@contextlib.asynccontextmanager
async def running(work: "asyncio.coroutines.Coroutine[None, None, None]") -> AsyncIterator[None]:
    """Something that goes on as long as the context."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


CLOCKED, SMALL = 2, 3
"""Places of the device with a wall clock of its own, and of the one with a small disk."""

SLOW = Line(delay_s=0.25, jitter_s=0.1, bytes_per_s=16_000)

EXPERIMENTS = (
    Experiment(name="partition", what="one device of four is cut off for a minute", fault=wire(0, up=CUT, down=CUT), fault_s=60.0),
    Experiment(name="one-way loss down", what="a device sends, and hears nothing", fault=wire(1, down=CUT)),
    Experiment(name="one-way loss up", what="a device hears, and 40 % of what it sends is lost", fault=wire(2, up=Line(loss=0.4))),
    Experiment(name="flapping link", what="a device's link is cut for 2 s of every 4", fault=flapping(3, 2.0, 2.0), fault_s=16.0),
    Experiment(name="slow link", what="a device's link has 250 to 350 ms each way and 128 kbit/s", fault=wire(0, up=SLOW, down=SLOW)),
    Experiment(name="broker killed", what="the broker is killed and stays away", fault=away("broker")),
    Experiment(name="region killed", what="the region is killed and stays away", fault=away("region")),
    Experiment(name="cloud killed", what="the cloud is killed and stays away", fault=away("cloud")),
    Experiment(name="disk full", what="nothing more fits on a device's disk", fault=disk_full(SMALL)),
    Experiment(
        name="writes fail",
        what="every write and sync of a device's queue fails (EIO)",
        fault=failing_writes(1),
        why_not=faults.why_no_failing_writes,
    ),
    Experiment(
        name="clock steps",
        what="a device's wall clock jumps an hour ahead, then an hour back",
        fault=clock_steps(CLOCKED, (HOUR_S, -HOUR_S), 6.0),
        why_not=faults.why_no_clock,
    ),
    Experiment(name="device frozen", what="a device's daemon is stopped (SIGSTOP)", fault=frozen(lambda world: world.device(0).unit)),
    Experiment(name="region frozen", what="the region is stopped (SIGSTOP)", fault=frozen(lambda world: world.unit("region"))),
    Experiment(
        name="kills at random",
        what="every 4 s a device's daemon or an inference child is killed",
        fault=killed_at_random(4.0),
        fault_s=20.0,
    ),
)
