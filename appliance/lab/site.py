"""Where one lab lives: a short directory of its own, locked while it runs, and the settings files of all its daemons."""

import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from appliance.contract.errors import WorldError

SOCKET_PATH_MAX = 107
"""Bytes of a Unix socket's path (sun_path, Linux)."""
LONGEST_INNER = len("/dev-999/run/api.sock")
TRIES = 100


@dataclass(frozen=True, slots=True)
class Site:
    """A claimed directory; `lock` is held until the process ends."""

    path: Path
    lock: int

    def folder(self, *parts: str) -> Path:
        """A folder below the site, made if need be."""
        folder = self.path.joinpath(*parts)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def remove(self) -> None:
        """Remove everything that the lab wrote."""
        shutil.rmtree(self.path, ignore_errors=True)


def claim(wanted: Path | None) -> Site:
    """Claim `wanted` (default: appliance-lab-UID under the temporary directory), or the next free name with a number.

    Raises: WorldError (`state_dir`) if none can be had.
    """
    base = wanted or Path(tempfile.gettempdir()) / f"appliance-lab-{os.getuid()}"
    if len(str(base)) + LONGEST_INNER + 4 > SOCKET_PATH_MAX:
        raise WorldError("state_dir", "the path is too long for Unix sockets", where=str(base), remedy="choose a shorter --state")
    for number in range(1, TRIES):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        site = _try(path)
        if site is not None:
            return site
    raise WorldError("state_dir", f"{TRIES} directories are taken", where=str(base), remedy="stop other labs, or choose --state")


def running(wanted: Path | None) -> Path:
    """The directory of the lab that runs: `wanted`, or the first of the default names whose lock is held.

    Raises: WorldError (`no_lab`).
    """
    base = wanted or Path(tempfile.gettempdir()) / f"appliance-lab-{os.getuid()}"
    for path in [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, TRIES))] if wanted is None else [base]:
        if _held(path):
            return path
    raise WorldError("no_lab", "no lab runs here", where=str(base), remedy="start one with `make run`, or name its directory with --state")


def _held(path: Path) -> bool:
    """Whether another process holds the lock of this directory."""
    try:
        lock = os.open(path / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _try(path: Path) -> Site | None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            return None
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise WorldError("state_dir", f"cannot be used: {error.strerror}", where=str(path), remedy="choose another --state") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    for child in path.iterdir():  # a lab begins anew: what an earlier one left here is of no use without its keys, which were in memory
        if child.name != ".lock":
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    return Site(path, lock)


def toml(sections: dict[str, dict[str, object]]) -> str:
    """Write settings as TOML: strings, numbers, booleans and lists of strings."""
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case list() | tuple():
            return "[" + ", ".join(_value(item) for item in value) + "]"
        case _:
            text = str(value).replace("\\", "\\\\").replace('"', '\\"')
            return f'"{text}"'
