"""What a machine must offer before a daemon can work on it: one probe for each, each with the command that mends it.

A probe looks and changes nothing. Files are looked up below `Machine.root`, and whatever is no file is a callable of `Machine`,
so that a test can bring a machine of its own.
"""

import ctypes
import importlib
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MEMORY_FLOOR_MIB = 768
"""Free memory below which a device cannot load a model beside the one that serves (docs/rooms/serve.md)."""

REACH_S = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. What is not `needed` is advice: the daemon starts without it."""

    what: str
    ok: bool
    seen: str
    remedy: str = ""
    needed: bool = True


def importable(module: str) -> str:
    """Import a module; return why it cannot be imported, or nothing."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return ""


def synchronised() -> bool:
    """Whether the kernel's clock is disciplined: adjtimex(2) does not answer TIME_ERROR (5)."""
    timex = ctypes.create_string_buffer(512)  # struct timex is 208 bytes; all zero asks and sets nothing
    return bool(ctypes.CDLL(None).adjtimex(timex) not in {-1, 5})


def reachable(host: str, port: int) -> str:
    """Connect by TCP and close again; return why it failed, or nothing."""
    try:
        with socket.create_connection((host, port), REACH_S):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def listening(path: Path) -> str:
    """Connect to a Unix socket and close again; return why it failed, or nothing."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(REACH_S)
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.strerror or str(error)
    return ""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that is looked at; the defaults are this one."""

    root: Path = Path("/")
    python: tuple[int, int] = (sys.version_info.major, sys.version_info.minor)
    importable: Callable[[str], str] = importable
    synchronised: Callable[[], bool] = synchronised
    reachable: Callable[[str, int], str] = reachable
    listening: Callable[[Path], str] = listening

    def at(self, path: str) -> Path:
        """Where an absolute path of the machine is found."""
        return self.root / path.lstrip("/")


def python(machine: Machine) -> Finding:
    """Python is new enough (docs/decisions/0001)."""
    seen = ".".join(map(str, machine.python))
    return Finding("Python 3.11 or newer", machine.python >= (3, 11), seen, "sudo apt-get install python3.12 python3.12-venv")


def engine(machine: Machine) -> Finding:
    """The run-time of models can be imported."""
    why = machine.importable("onnxruntime")
    return Finding("onnxruntime", not why, why or "importable", "pip install --require-hashes -r requirements.txt")


def memory(machine: Machine) -> Finding:
    """Enough memory is free to load a model."""
    free_mib = 0
    with suppress(OSError):
        for line in machine.at("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free_mib = int(line.split()[1]) // 1024
    what = f"at least {MEMORY_FLOOR_MIB} MiB of free memory"
    return Finding(what, free_mib >= MEMORY_FLOOR_MIB, f"{free_mib} MiB", "ps -eo rss,args --sort=-rss | head  # stop what is not needed")


def clock(machine: Machine) -> Finding:
    """The clock is disciplined; certificates that last an hour want it."""
    ok = machine.synchronised()
    return Finding("clock synchronised", ok, "yes" if ok else "no", "sudo timedatectl set-ntp true", needed=False)


def folder(machine: Machine, what: str, path: str, user: str) -> Finding:
    """A directory exists and this user may write there."""
    place = machine.at(path)
    if not place.is_dir():
        return Finding(what, ok=False, seen=f"{path} does not exist", remedy=f"sudo install -d -m 0700 -o {user} -g {user} {path}")
    ok = os.access(place, os.W_OK | os.X_OK)
    return Finding(what, ok, f"{path} is writable" if ok else f"{path} is not writable by this user", f"sudo chown -R {user}: {path}")


def present(machine: Machine, what: str, path: str, remedy: str) -> Finding:
    """A file or folder exists and this user may read it."""
    place = machine.at(path)
    if not place.exists():
        return Finding(what, ok=False, seen=f"{path} does not exist", remedy=remedy)
    ok = os.access(place, os.R_OK)
    return Finding(what, ok, path if ok else f"{path} is not readable by this user", f"sudo chmod a+rX {path}")


def tpm(machine: Machine, tcti: str, user: str) -> Finding:
    """The TPM answers where the TCTI string says (device or swtpm; others are not looked at)."""
    kind, _, rest = tcti.partition(":")
    if kind == "device":
        return _tpm_node(machine, rest or "/dev/tpm0", user)
    options = dict(pair.partition("=")[::2] for pair in rest.split(","))
    if kind == "swtpm" and "path" in options:
        ok = machine.at(options["path"]).is_socket()
        return Finding(
            "TPM", ok, tcti if ok else f"{options['path']} is no socket", "swtpm socket --tpm2 --server type=unixio,path=… --daemon"
        )
    if kind in {"swtpm", "mssim"}:
        port = options.get("port", "2321")
        why = machine.reachable(options.get("host", "localhost"), int(port)) if port.isdigit() else f"port {port!r} is no number"
        return Finding("TPM", not why, why or tcti, "swtpm socket --tpm2 --server type=tcp,port=2321 --ctrl type=tcp,port=2322 --daemon")
    return Finding("TPM", ok=True, seen=f"{tcti} (not looked at)", needed=False)


def _tpm_node(machine: Machine, path: str, user: str) -> Finding:
    node = machine.at(path)
    if not node.exists():
        remedy = "sudo modprobe tpm_crb tpm_tis  # Jetson: start tee-supplicant, then sudo modprobe tpm_ftpm_tee"
        return Finding("TPM", ok=False, seen=f"{path} does not exist", remedy=remedy)
    ok = os.access(node, os.R_OK | os.W_OK)
    return Finding("TPM", ok, path if ok else f"{path} is not open to this user", f"sudo usermod -aG tss {user}")


def workload_api(machine: Machine, uri: str) -> Finding:
    """The SPIFFE Workload API accepts connections."""
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        path = "/" + rest.lstrip("/")
        why = machine.listening(machine.at(path)) if machine.at(path).exists() else "does not exist"
        seen = f"{path}: {why}" if why else path
    else:
        host, _, port = rest.strip("/").rpartition(":")
        why = machine.reachable(host, int(port)) if port.isdigit() else "no port"
        seen = f"{uri}: {why}" if why else uri
    return Finding("SPIFFE Workload API", not why, seen, "sudo systemctl enable --now spire-agent")


def broker(machine: Machine, host: str, port: int) -> Finding:
    """The broker can be reached now; a daemon starts without it and keeps trying."""
    why = machine.reachable(host, port)
    place = f"{host}:{port}"
    return Finding("broker", not why, f"{place}: {why}" if why else place, f"openssl s_client -connect {place}", needed=False)
