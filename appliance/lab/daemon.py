"""The lab: one machine plays a whole fleet on real parts, reads shelf labels through it, and takes everything down again."""

import asyncio
import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from appliance.adapters.tpm import EsysTpm
from appliance.contract import identities
from appliance.contract.errors import WorldError
from appliance.lab import faults, softtpm
from appliance.lab.authority import Workload
from appliance.lab.broker import Broker
from appliance.lab.issuing import Issuer, OwnAuthority
from appliance.lab.network import Network
from appliance.lab.ports import free_port
from appliance.lab.reference import Reference
from appliance.lab.site import Site, toml
from appliance.lab.spire import Spire
from appliance.lab.stream import Stream
from appliance.lab.units import Unit

REGION = "lab"
MODEL = "label-reader"
CARD = """\
model_id = "label-reader"
version = "4.0.0"
min_vram_gb = 0.25
max_batch_size = 8
target_latency_ms = 50.0
"""
PRICES = Path("bsp/prices/spot-day-synthetic.csv")
"""Replayed by the cloud, a day of five-minute steps in ten minutes; where the file is not at hand, one price holds."""
PRICE_EVERY_S = 2.0
CONTROL = "board.json"
"""Each device's file that heats and squeezes its simulated board (`appliancectl lab`)."""
HEARTBEAT_S = 2.0
READY_TIMEOUT_S = 60.0
SVID_TTL_S = 40.0
"""Short, so that a minute of `make run` shows a rotation (at half life)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the operator asked for.

    Attributes:
        rate_per_s: labels for each device; 0: none are sent, and any model is served.
        settings: go over those of each device, `cloud_settings` over the cloud's.
        network: each device lives in a namespace of it; None: all share this machine's.
        told_every_s: each device also tells an event so often (`appliance.lab.telling`); 0: none.
        small_disks_mib: devices whose state lies on a file system (tmpfs) of so many MiB.
        environment: variables of each device's processes, by its name.
        spire_ttl_s: real SPIRE gives the identities, for so many seconds each; 0: an authority of the lab's own.
    """

    devices: int
    model: Path
    rate_per_s: float
    seed: int = 1
    reattest_s: float = 3600.0
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    cloud_settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    network: Network | None = None
    told_every_s: float = 0.0
    small_disks_mib: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    spire_ttl_s: float = 0.0
    say: Callable[[str], None] = lambda _text: None


@dataclass(slots=True)
class Device:
    """One device of the lab: its processes, its socket, and the labels that it reads."""

    name: str
    unit: Unit
    tpm: Unit
    tcti: str
    socket: Path
    stream: Stream
    task: "asyncio.Task[None] | None" = None

    async def status(self) -> dict[str, object] | None:
        """What the device says of itself now; None if it does not answer."""
        with contextlib.suppress(OSError, ValueError, asyncio.TimeoutError):
            async with asyncio.timeout(1.0):
                reader, writer = await asyncio.open_unix_connection(str(self.socket))
                writer.write(b"GET /status HTTP/1.0\r\nHost: lab\r\nConnection: close\r\n\r\n")
                await writer.drain()
                reply = await reader.read(65_536)
                writer.close()
            head, _, body = reply.partition(b"\r\n\r\n")
            if b" 200 " in head.split(b"\r\n", 1)[0]:
                found: dict[str, object] = json.loads(body)
                return found
        return None


@dataclass(slots=True)
class Lab:
    """Everything that runs. Use `open` in an AsyncExitStack; what it starts, the stack stops."""

    site: Site
    plan: Plan
    stack: contextlib.AsyncExitStack
    port: int = 0
    devices: list[Device] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    exits: list[tuple[str, int]] = field(default_factory=list)
    issuer: Issuer | None = None

    @property
    def host(self) -> str:
        """The address under which devices find the broker."""
        return self.plan.network.host if self.plan.network else "127.0.0.1"

    async def open(self) -> None:
        """Start broker, cloud, region and devices, in this order, and wait until each is ready. Raises: WorldError."""
        say = self.plan.say
        whose = "SPIRE, and an agent" if self.plan.spire_ttl_s else "a certificate authority in memory, and a Workload API socket"
        say(f"identities: {whose} for each process")
        if self.plan.network:
            self.plan.network.open()
            self.stack.callback(self.plan.network.close)
        await self._manufacture()
        issuer = self.issuer = self._issuer()
        await issuer.open(self.stack)
        self.port = free_port()
        say(f"broker: mosquitto with mutual TLS on port {self.port}")
        broker = await self._broker(issuer)
        self.stack.push_async_callback(_cancelled, asyncio.create_task(self._rotate(broker, issuer.ttl_s / 3)))
        cloud_id = Workload(identities.cloud(), identities.CLOUD)
        say("cloud: seals and signs the model")
        await self._cloud(await issuer.admit(cloud_id))
        region_id = Workload(identities.aggregator(REGION), identities.region_user(REGION))
        say("region: attests devices, relays releases")
        await self._region(await issuer.admit(region_id))
        reference = Reference(_whole(self.plan.model)) if self.plan.rate_per_s else None
        for number in range(1, self.plan.devices + 1):
            name = _name(number)
            say(f"{name}: a software TPM is manufactured and measured, then the daemon starts")
            await self._device(name, number, issuer, reference)
        for device in self.devices:
            say(f"{device.name}: enrols, proves its state, pulls {MODEL}, opens it")
            await self._serving(device)
            if self.plan.rate_per_s:
                device.task = asyncio.create_task(device.stream.run())
                self.stack.push_async_callback(_cancelled, device.task)

    def _unit(
        self, name: str, command: list[str], *, notify: bool = True, fds: tuple[int, ...] = (), environment: Mapping[str, str] | None = None
    ) -> Unit:
        unit = Unit(name, command, self.site.folder("log"), notify=notify, fds=fds, environment=environment)
        unit.on_exit = lambda who, code: self.exits.append((who, code))
        self.units.append(unit)
        self.stack.push_async_callback(unit.stop)
        return unit

    def _issuer(self) -> Issuer:
        """Who gives identities, as the plan says. Raises: WorldError (`spire`) where its programs are not."""
        folder, ttl_s = self.site.folder("id"), self.plan.spire_ttl_s
        if not ttl_s:
            return OwnAuthority(folder, SVID_TTL_S)
        return Spire(folder, self.site.folder("maker"), lambda name, command: self._unit(name, command, notify=False), ttl_s)

    async def _manufacture(self) -> None:
        """Make all TPMs: their maker's certificates are what region and SPIRE are told to trust."""
        for number in range(1, self.plan.devices + 1):
            chip = self.site.folder(_name(number), "chip")
            await asyncio.to_thread(softtpm.manufacture, chip, _name(number), maker=self.site.folder("maker"))

    async def _broker(self, issuer: Issuer) -> tuple[Broker, Unit]:
        workload = Workload(identities.broker(REGION), identities.BROKER)
        broker = Broker(
            self.site.folder("broker"),
            self.port,
            region=REGION,
            root_pem=issuer.root_pem,
            issue=await issuer.broker(workload),
            host=self.host,
        )
        await asyncio.to_thread(broker.prepare)
        self.stack.callback(broker.close)
        unit = self._unit("broker", broker.command(), notify=False, fds=broker.fds)
        await unit.start()
        await _listening(self.host, self.port, unit)
        return broker, unit

    async def _rotate(self, running: tuple[Broker, Unit], every_s: float) -> None:
        broker, unit = running
        while True:
            await asyncio.sleep(every_s)
            if unit.pid is not None:
                with contextlib.suppress(WorldError):  # no agent at the moment: mosquitto keeps what it has, and is asked again
                    await asyncio.to_thread(broker.rotate, unit.pid)

    async def _daemon(
        self,
        name: str,
        command: Sequence[str],
        sections: dict[str, dict[str, object]],
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] = {},
    ) -> Unit:
        config = self.site.folder(name) / "settings.toml"
        config.write_text(toml(sections))
        whole = [*prefix, sys.executable, "-m", *command, "--config", str(config)]
        unit = self._unit(name, whole, environment={"HOME": str(self.site.folder(name)), **environment})
        await unit.start(READY_TIMEOUT_S)
        return unit

    async def _cloud(self, address: str) -> None:
        home = self.site.folder("cloud")
        models = self.site.folder("cloud", "models")
        folder = self.site.folder("cloud", "models", MODEL)
        await asyncio.to_thread(_publish, self.plan.model, folder)
        sections: dict[str, dict[str, object]] = {
            "cloud": {"regions": [REGION], "state_dir": home / "state", "models_dir": models},
            "reach": {"broker_host": self.host, "broker_port": self.port, "retry_cap_s": 2.0, "heartbeat_s": HEARTBEAT_S},
            "trust": {"trust_domain": identities.TRUST_DOMAIN, "workload_api": address, "keys_dir": home / "keys"},
            "answer": {"prices": _prices(), "price_every_s": PRICE_EVERY_S},
        }
        for section, values in self.plan.cloud_settings.items():
            sections.setdefault(section, {}).update(values)
        await self._daemon("cloud", ["appliance", "cloud"], sections)

    async def _region(self, address: str) -> None:
        home = self.site.folder("region")
        roots = self.site.folder("region", "ek-roots")
        for number, der in enumerate(await asyncio.to_thread(softtpm.roots, self.site.folder("maker"))):
            (roots / f"{number}.der").write_bytes(der)
        sections: dict[str, dict[str, object]] = {
            "region": {"name": REGION, "state_dir": home / "state"},
            "reach": {"broker_host": self.host, "broker_port": self.port, "retry_cap_s": 2.0, "heartbeat_s": HEARTBEAT_S},
            "trust": {
                "trust_domain": identities.TRUST_DOMAIN,
                "workload_api": address,
                "ek_roots": roots,
                "keys_dir": home / "keys",
                "tuf_root": self.site.path / "cloud" / "state" / "root.json",
                "trust_on_first_use": True,
            },
        }
        await self._daemon("region", ["appliance", "region"], sections)

    async def _device(self, name: str, number: int, issuer: Issuer, reference: Reference | None) -> None:
        home, plan = self.site.folder(name), self.plan
        port = softtpm.free_port()
        tpm = self._unit(f"{name}-tpm", softtpm.command(self.site.folder(name, "chip"), port, self.host), notify=False)
        await tpm.start()
        await _listening(self.host, port + 1, tpm)
        workload = Workload(identities.device(REGION, name), identities.device_user(name))
        address, port = await issuer.admit_device(workload, self.host, port)
        tcti = softtpm.tcti(port, self.host)
        await _boot(tcti)
        prefix = plan.network.join(name, (port, port + 1)) if plan.network else ()
        if name in plan.small_disks_mib:
            self.stack.callback(faults.small_disk(self.site.folder(name, "state"), plan.small_disks_mib[name]))
        socket = home / "run" / "api.sock"
        sections: dict[str, dict[str, object]] = {
            "device": {"name": name, "region": REGION, "state_dir": home / "state", "runtime_dir": home / "run"},
            "serve": {"port": 0, "socket": "api.sock", "threads": 1},
            "reach": {"broker_host": self.host, "broker_port": self.port, "heartbeat_s": HEARTBEAT_S, "retry_cap_s": 2.0},
            "trust": {
                "trust_domain": identities.TRUST_DOMAIN,
                "workload_api": address,
                "tcti": tcti,
                "reattest_s": self.plan.reattest_s,
                "tuf_root": self.site.path / "cloud" / "state" / "root.json",
            },
            "board": {"kind": "sim"},
            "sim": {"control": home / CONTROL},
        }
        for section, values in self.plan.settings.items():
            sections.setdefault(section, {}).update(values)
        told = ["appliance.lab.telling", "--every-s", str(plan.told_every_s)]
        command = told if plan.told_every_s else ["appliance", "run"]
        unit = await self._daemon(name, command, sections, prefix, plan.environment.get(name, {}))
        stream = Stream(
            f"unix:{socket}", MODEL, reference, rate_per_s=self.plan.rate_per_s, callers=4, seed=self.plan.seed * 1_000 + number
        )
        self.devices.append(Device(name, unit, tpm, tcti, socket, stream))

    async def _serving(self, device: Device) -> None:
        """Wait until the model is mounted. Raises: WorldError (`not_serving`) with the end of the device's log."""
        for _ in range(int(READY_TIMEOUT_S / 0.2)):
            status = await device.status()
            if status is not None and status.get("model_version"):
                return
            await asyncio.sleep(0.2)
        raise WorldError("not_serving", f"no model after {READY_TIMEOUT_S:g} s\n{device.unit.tail()}", where=device.name)


def _whole(model: Path) -> Path:
    """The full model's file: itself, or the one in a bundle."""
    return model / "model.onnx" if model.is_dir() else model


def _publish(model: Path, folder: Path) -> None:
    """Lay a bundle, or a single model with a card of ours, where the cloud finds it. Raises: WorldError (`model`)."""
    try:
        if model.is_dir():
            shutil.copytree(model, folder, dirs_exist_ok=True)
            return
        (folder / "model.onnx").write_bytes(model.read_bytes())
        (folder / "model.toml").write_text(CARD)
    except OSError as error:
        raise WorldError(
            "model", f"cannot be published: {error}", where=str(model), remedy="run scripts/fetch-models and scripts/build-variants"
        ) from error


def _prices() -> str:
    """The series of prices, if it is at hand."""
    return str(PRICES.resolve()) if PRICES.is_file() else ""


def _name(number: int) -> str:
    return f"dev-{number:03d}"


async def _boot(tcti: str) -> None:
    """What firmware and boot loader would do on a real board: measure what boots."""
    tpm = EsysTpm(tcti)
    try:
        await softtpm.measured_boot(tpm, "appliance 0.1.0")
    finally:
        await tpm.close()


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _listening(host: str, port: int, unit: Unit, timeout_s: float = 10.0) -> None:
    """Wait for a port. Raises: WorldError (`unit`)."""
    for _ in range(int(timeout_s / 0.05)):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            return
        await asyncio.sleep(0.05)
    raise WorldError("unit", f"does not listen on port {port}\n{unit.tail()}", where=unit.name)
