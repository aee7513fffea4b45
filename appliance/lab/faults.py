"""What goes wrong with a whole device, on purpose: processes that stop or die, disks that fill up or fail, clocks that jump.

Each fault begins when it is called and ends with what it returns; networks are broken by `appliance.lab.network`. `why_not_*` say what is missing
on this machine, and what brings it.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from appliance.contract.errors import WorldError

End = Callable[[], None]
FILLER = "filler"
BLOCK_BYTES = 1 << 20
_WRITES = "write,writev,pwrite64,pwritev,pwritev2,fsync,fdatasync,fallocate,ftruncate"
"""What changes a file's bytes or waits for the disk (Linux, x86-64 and arm64)."""
_UNMOUNT_DETACHED = 2


def children(pid: int) -> list[int]:
    """The processes that this one started, as far as they live: a device's inference children."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def kill(pid: int) -> None:
    """SIGKILL; one that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def freeze(pid: int) -> End:
    """SIGSTOP: connections stay open and nothing answers."""
    os.kill(pid, signal.SIGSTOP)

    def thaw() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    return thaw


def small_disk(folder: Path, size_mib: int) -> End:
    """Put a file system (tmpfs) of this size at a folder. Raises: WorldError (`mount`)."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0700", "appliance-lab", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise WorldError("mount", done.stderr.strip(), where=str(folder), remedy="run as root")

    def unmount() -> None:
        ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(folder), _UNMOUNT_DETACHED)

    return unmount


def fill(folder: Path) -> End:
    """Take all space that is left on the folder's file system."""
    path = folder / FILLER
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for size in (BLOCK_BYTES, 4096):
            with contextlib.suppress(OSError):  # ENOSPC is what we want
                while os.write(descriptor, bytes(size)) == size:
                    pass
    finally:
        os.close(descriptor)
    return lambda: path.unlink(missing_ok=True)


def failing_writes(pid: int, files: list[Path]) -> End:
    """Every write and sync of a running process to these files fails with EIO (strace's fault injection). Raises: WorldError (`strace`)."""
    reason = why_no_failing_writes()
    if reason:
        raise WorldError("strace", reason)
    paths = [word for file in files for word in ("-P", str(file))]
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(pid), "-e", f"trace={_WRITES}", "-e", f"inject={_WRITES}:error=EIO", *paths],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def detach() -> None:
        tracer.terminate()
        try:
            tracer.wait(5.0)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.wait()

    return detach


def why_no_failing_writes() -> str:
    """Why writes cannot be made to fail here; an empty text if they can."""
    if shutil.which("strace") is None:
        return "strace is not installed: apt-get install strace"
    return "" if os.geteuid() == 0 else "attaching to a process needs root: run it with sudo"


class Clock:
    """A wall clock of one's own for the processes that are started with `environment`, which can be stepped while they run.

    A small library, compiled here and preloaded, adds the offset that lies in a file; the monotonic clock stays as it is. Raises: WorldError (`cc`).
    """

    def __init__(self, folder: Path) -> None:
        reason = why_no_clock()
        if reason:
            raise WorldError("cc", reason)
        library, self._offset = folder / "wallclock.so", folder / "offset"
        source = Path(__file__).with_name("wallclock.c")
        done = subprocess.run(
            ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise WorldError("cc", done.stderr.strip()[-500:], where=str(source), remedy="apt-get install gcc libc6-dev")
        self._offset.write_bytes(struct.pack("=q", 0))
        self.environment: Mapping[str, str] = {"LD_PRELOAD": str(library), "WALLCLOCK_OFFSET": str(self._offset)}

    def step(self, seconds: int) -> End:
        """Set the wall clock so many seconds off."""
        self._set(seconds)
        return partial(self._set, 0)

    def _set(self, seconds: int) -> None:
        with self._offset.open("r+b") as file:
            file.write(struct.pack("=q", seconds))


def why_no_clock() -> str:
    """Why no process can have a wall clock of its own here; an empty text if it can."""
    return "" if shutil.which("cc") else "no C compiler: apt-get install gcc libc6-dev"
