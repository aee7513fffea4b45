"""The lab's own network: each device in a network namespace, on a wire that can be cut, made lossy, slow or late, each way by itself.

1. A wire is a TUN device in the namespace, one for all on this side, and this process between them: it needs no `netem`, which many kernels
   lack, and what is lost follows a seed.
2. Each way has a state of its own, so that loss in one direction only is as easy as a cut.
3. A way has a queue of `QUEUE_S` as a router has; what finds it full is dropped. Packets of one way never overtake each other.
4. `spared` TCP ports pass whatever happens: a software TPM stands for a chip on the board, which no network fault can reach.
5. Namespaces carry the process number in their name; those of a lab that died are removed by the next one.
"""

import asyncio
import contextlib
import fcntl
import math
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from appliance.contract.errors import WorldError

QUEUE_S = 0.5
TICK_S = 1e-6
"""The loop keeps no order among calls of one moment, so no two packets of a way have the same."""
MTU = 1500
PACKETS_AT_ONCE = 128
"""Then the loop has its turn."""
_TUN = Path("/dev/net/tun")
_NAMED = Path("/run/netns")
_SET_INTERFACE = 0x400454CA
_TUN_WITHOUT_HEADER = 0x1001
_PREFIX = "ap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """How one way of a wire is. `loss` 0 to 1 (1: cut), `delay_s` plus up to `jitter_s` by chance, `bytes_per_s` at most."""

    loss: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = math.inf


GOOD = Line()
CUT = Line(loss=1.0)


class Way:
    """One way of a wire; `send` puts a packet on its other end."""

    def __init__(self, send: Callable[[bytes], None], chance: random.Random) -> None:
        self.line = GOOD
        self.carried = self.lost = 0
        self._send = send
        self._chance = chance
        self._free_at = 0.0
        self._last_at = 0.0

    def carry(self, packet: bytes, loop: asyncio.AbstractEventLoop) -> None:
        """Take a packet, and deliver it as the line allows."""
        line, now = self.line, loop.time()
        self._free_at = max(self._free_at, now) + len(packet) / line.bytes_per_s
        if self._free_at - now > QUEUE_S:
            self._free_at -= len(packet) / line.bytes_per_s
            self.lost += 1
            return
        if line.loss and self._chance.random() < line.loss:
            self.lost += 1
            return
        self.carried += 1
        at = max(self._free_at + line.delay_s + line.jitter_s * self._chance.random(), self._last_at + TICK_S)
        if at <= now:
            self._send(packet)
        else:
            self._last_at = at
            loop.call_at(at, self._send, packet)


@dataclass(slots=True)
class _End:
    """A device's end."""

    namespace: str
    descriptor: int
    up: Way
    down: Way


@dataclass(slots=True)
class Network:
    """All wires of one lab; `host` is the address under which every device finds this side. Open it in a running loop."""

    seed: int = 1
    host: str = ""
    _spared: set[int] = field(default_factory=set)
    _hub: int = -1
    _subnet: str = ""
    _ends: dict[str, _End] = field(default_factory=dict)
    _by_address: dict[bytes, _End] = field(default_factory=dict)

    def open(self) -> None:
        """Make this side. Raises: WorldError (`network`) with what is missing here."""
        missing = why_not()
        if missing:
            raise WorldError("network", missing, remedy="run as root on a Linux with TUN and iproute2")
        _sweep()
        self._hub, name = _tun()
        self._subnet = f"10.210.{int(name.removeprefix(_PREFIX)) % 256}"
        self.host = f"{self._subnet}.1"
        _ip("addr", "add", f"{self.host}/24", "dev", name)
        _ip("link", "set", name, "mtu", str(MTU), "up")
        asyncio.get_running_loop().add_reader(self._hub, self._from_hub)

    def join(self, name: str, spared: Sequence[int] = ()) -> tuple[str, ...]:
        """Make a namespace for a device on a wire of its own; returns what its commands begin with. Raises: WorldError (`network`)."""
        self._spared |= {*spared}
        namespace = f"{_PREFIX}-{os.getpid()}-{len(self._ends) + 1}"
        number = len(self._ends) + 2
        descriptor, interface = _tun()
        _ip("netns", "add", namespace)
        _ip("link", "set", interface, "netns", namespace, "name", "eth0")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "addr", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "mtu", str(MTU), "up")
        chance = random.Random(f"{self.seed} {name}")  # noqa: S311 - losses must be the same at each run, secrecy is no concern
        end = _End(namespace, descriptor, Way(self._to_hub, chance), Way(_writer(descriptor), chance))
        self._ends[name] = end
        self._by_address[bytes([*map(int, self._subnet.split(".")), number])] = end
        asyncio.get_running_loop().add_reader(descriptor, self._from_device, end)
        return ("nsenter", f"--net={_NAMED / namespace}", "--")

    def line(self, name: str, *, up: Line | None = None, down: Line | None = None) -> None:
        """Change a device's wire from now on; None leaves a way as it is."""
        end = self._ends[name]
        end.up.line = up or end.up.line
        end.down.line = down or end.down.line

    def heal(self, name: str) -> None:
        """Make a device's wire good again."""
        self.line(name, up=GOOD, down=GOOD)

    def counted(self, name: str) -> tuple[int, int]:
        """Packets carried and lost on a device's wire so far, both ways."""
        end = self._ends[name]
        return end.up.carried + end.down.carried, end.up.lost + end.down.lost

    def close(self) -> None:
        """Remove all wires and namespaces."""
        loop = asyncio.get_running_loop()
        for descriptor in [self._hub, *(end.descriptor for end in self._ends.values())]:
            if descriptor >= 0:
                loop.remove_reader(descriptor)
                os.close(descriptor)
        for end in self._ends.values():
            with contextlib.suppress(WorldError):
                _ip("netns", "del", end.namespace)
        self._ends.clear()
        self._by_address.clear()
        self._hub = -1

    def _from_hub(self) -> None:
        loop = asyncio.get_running_loop()
        for packet in _packets(self._hub):
            end = self._by_address.get(packet[16:20])
            if end is not None:
                if self._is_spared(packet):
                    _write(end.descriptor, packet)
                else:
                    end.down.carry(packet, loop)

    def _from_device(self, end: _End) -> None:
        loop = asyncio.get_running_loop()
        for packet in _packets(end.descriptor):
            if self._is_spared(packet):
                self._to_hub(packet)
            else:
                end.up.carry(packet, loop)

    def _is_spared(self, packet: bytes) -> bool:
        start = (packet[0] & 15) * 4  # IPv4: the header's length in words (RFC 791), then TCP's two ports (RFC 9293)
        source, target = struct.unpack_from("!HH", packet, start)
        return source in self._spared or target in self._spared

    def _to_hub(self, packet: bytes) -> None:
        if self._hub >= 0:
            _write(self._hub, packet)


def why_not() -> str:
    """Why no network can be made here, for a person; an empty text if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root: run it with sudo"
    if not os.access(_TUN, os.R_OK | os.W_OK):
        return f"{_TUN} is missing: modprobe tun"
    missing = [program for program in ("ip", "nsenter") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not found: apt-get install iproute2 util-linux"
    try:
        descriptor, _ = _tun()
    except WorldError as error:
        return str(error)
    os.close(descriptor)
    return ""


def _tun() -> tuple[int, str]:
    """A TUN device of this namespace, closed with its descriptor; and its name. Raises: WorldError (`network`)."""
    try:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        answer = fcntl.ioctl(descriptor, _SET_INTERFACE, struct.pack("16sH22x", f"{_PREFIX}%d".encode(), _TUN_WITHOUT_HEADER))
    except OSError as error:
        raise WorldError("network", f"no TUN device can be made: {error.strerror}", where=str(_TUN), remedy="run as root") from error
    return descriptor, answer[:16].split(b"\0", 1)[0].decode()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WorldError("network", f"ip {' '.join(arguments)}: {done.stderr.strip()}", remedy="run as root")


def _sweep() -> None:
    """Remove the namespaces of labs that died."""
    for path in _NAMED.glob(f"{_PREFIX}-*-*") if _NAMED.is_dir() else ():
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with contextlib.suppress(WorldError):
                _ip("netns", "del", path.name)


def _packets(descriptor: int) -> Sequence[bytes]:
    """What has arrived: IPv4 packets, at most `PACKETS_AT_ONCE`; others (IPv6 looks for neighbours) are nobody's here."""
    found: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        for _ in range(PACKETS_AT_ONCE):
            packet = os.read(descriptor, MTU + 100)
            if packet[0] >> 4 == 4:  # noqa: PLR2004 - the version field of IPv4 (RFC 791)
                found.append(packet)
    return found


def _writer(descriptor: int) -> Callable[[bytes], None]:
    return lambda packet: _write(descriptor, packet)


def _write(descriptor: int, packet: bytes) -> None:
    """Put a packet into a namespace; one that went away while it was on its way takes nothing more."""
    with contextlib.suppress(OSError):
        os.write(descriptor, packet)
