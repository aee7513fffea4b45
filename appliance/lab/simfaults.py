"""What goes wrong in the simulation: faults by name, each begun at a moment that the seed chose and ended by itself.

Whatever is still wrong when the calm comes ends there (`Plant.calm`), so that what was promised can be kept.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from appliance.lab.simnet import Line, SimNet
from appliance.lab.simplant import Cloud, Device, Machine, Region

NOTICE_S = 12.0
"""The longest time until a keepalive notices a cut."""
HOUR_S = 3600.0


@dataclass(slots=True)
class Plant:
    """All that can fail."""

    net: SimNet
    devices: Sequence[Device]
    region: Region
    cloud: Cloud
    chance: random.Random

    @property
    def machines(self) -> list[Machine]:
        """Everything with a line."""
        return [*self.devices, self.region, self.cloud]

    def line(self) -> Line:
        """Any line; the region's own, which is short, least often."""
        return self.chance.choice([*self.devices, *self.devices, self.region, self.cloud]).line

    def keeper(self) -> Machine:
        """Any machine with a queue."""
        return self.chance.choice([*self.devices, self.region])

    def later(self, within_s: float, what: Callable[..., object], *args: object) -> None:
        """Do something after a part of this time."""
        self.net.loop.call_later(self.chance.uniform(0.2, within_s), what, *args)

    def calm(self) -> None:
        """Everything works from now on."""
        self.net.clear()
        for machine in self.machines:
            machine.disk_weather.commit_s, machine.disk_weather.failing = 0.003, 0.0
            machine.clock.offset_s, machine.clock.trusted = 0.0, True
            if machine.alive and not isinstance(machine, Cloud):
                machine.store.arm("")
            machine.start()
        for device in self.devices:
            device.slow = 1.0


def cut(plant: Plant, *directions: str) -> None:
    """Cut a line for up to 40 s; its ends notice at once or late."""
    line = plant.line()
    plant.net.cut(line, set(directions), plant.chance.choice([0.0, plant.chance.uniform(0.0, NOTICE_S)]))
    plant.later(40.0, plant.net.heal, line)


def flap(plant: Plant) -> None:
    """Cut a line again and again, for a second or two."""
    line, at = plant.line(), 0.0
    for _ in range(plant.chance.randint(3, 8)):
        plant.net.loop.call_later(at, plant.net.cut, line, {"up", "down"}, 0.1)
        at += plant.chance.uniform(0.3, 2.0)
        plant.net.loop.call_later(at, plant.net.heal, line)
        at += plant.chance.uniform(0.5, 4.0)


def weather(plant: Plant, *, slow: float = 0.0, loss: float = 0.0, twice: float = 0.0) -> None:
    """Bad weather on a line for up to 30 s."""
    line = plant.line()
    usual = line.usual
    line.weather = replace(usual, delay_s=usual.delay_s + slow, jitter_s=usual.jitter_s + slow / 2, loss=loss, twice=twice)

    def end() -> None:
        line.weather = usual

    plant.later(30.0, end)


def broker(plant: Plant) -> None:
    """Restart the broker: what was under way is lost."""
    plant.net.stop_broker()
    plant.later(8.0, plant.net.start_broker)


def reboot(machine: Machine, plant: Plant) -> None:
    """Power off and on; NTP comes later."""
    machine.crash()
    machine.clock.reboot()
    plant.later(20.0, _synchronised, machine)


def arm(plant: Plant, when: str) -> None:
    """Have a machine die at its next commit."""
    machine = plant.keeper()
    if machine.alive:
        machine.store.arm(when)


def disk(plant: Plant, *, commit_s: float = 0.003, failing: float = 0.0) -> None:
    """A slow or a failing disk for up to 15 s."""
    machine = plant.keeper()
    machine.disk_weather.commit_s, machine.disk_weather.failing = commit_s, failing

    def end() -> None:
        machine.disk_weather.commit_s, machine.disk_weather.failing = 0.003, 0.0

    plant.later(15.0, end)


def clock(plant: Plant) -> None:
    """Step a wall clock by an hour, either way."""
    machine = plant.keeper()
    machine.clock.offset_s += plant.chance.choice([-HOUR_S, HOUR_S])


def engine(plant: Plant) -> None:
    """Batches of one device take several times as long for up to 15 s."""
    device = plant.chance.choice(plant.devices)
    device.slow = plant.chance.uniform(2.0, 12.0)

    def end() -> None:
        device.slow = 1.0

    plant.later(15.0, end)


def _synchronised(machine: Machine) -> None:
    machine.clock.offset_s, machine.clock.trusted = 0.0, True


FAULTS: Mapping[str, Callable[[Plant], None]] = {
    "partition": lambda plant: cut(plant, "up", "down"),
    "one_way_up": lambda plant: cut(plant, "up"),
    "one_way_down": lambda plant: cut(plant, "down"),
    "flapping": flap,
    "slow_line": lambda plant: weather(plant, slow=plant.chance.uniform(0.2, 5.0)),
    "lossy_line": lambda plant: weather(plant, loss=plant.chance.uniform(0.05, 0.5)),
    "copies": lambda plant: weather(plant, twice=plant.chance.uniform(0.1, 0.6)),
    "broker_restart": broker,
    "device_crash": lambda plant: plant.chance.choice(plant.devices).crash(),
    "device_reboot": lambda plant: reboot(plant.chance.choice(plant.devices), plant),
    "region_crash": lambda plant: plant.region.crash(),
    "region_reboot": lambda plant: reboot(plant.region, plant),
    "cloud_crash": lambda plant: plant.cloud.crash(),
    "crash_before_commit": lambda plant: arm(plant, "before"),
    "crash_after_commit": lambda plant: arm(plant, "after"),
    "disk_slow": lambda plant: disk(plant, commit_s=plant.chance.uniform(0.05, 0.8)),
    "disk_failing": lambda plant: disk(plant, failing=plant.chance.uniform(0.1, 0.9)),
    "clock_step": clock,
    "engine_slow": engine,
}
