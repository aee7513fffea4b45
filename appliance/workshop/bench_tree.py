"""What a process and all its descendants cost: CPU seconds and memory, from /proc.

1. PSS splits shared pages among those who share them, so it may be summed; RSS counts them for each, and is shown beside it.
2. What may not be read (another user's process) is None, never zero. A process that ended between two looks is not counted in the second:
   its CPU seconds are its parent's `cutime` by then, which is counted.
3. `pin` moves every thread; processes and threads that are started later inherit it.
"""

import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MIB = 1024.0


@dataclass(frozen=True, slots=True)
class Usage:
    """One look at a tree. Memory in MiB; None: it may not be read."""

    processes: int
    cpu_s: float
    pss_mib: float | None
    rss_mib: float | None


@dataclass(frozen=True, slots=True)
class Tree:
    """The process `pid` and its descendants; `proc` is where the kernel shows processes."""

    pid: int
    proc: Path = PROC

    def pids(self) -> list[int]:
        """All that live now, the root first."""
        parents: dict[int, list[int]] = {}
        for pid in (int(entry.name) for entry in self.proc.iterdir() if entry.name.isdigit()):
            fields = self._stat(pid)
            if fields:
                parents.setdefault(int(fields[1]), []).append(pid)
        found = [self.pid] if (self.proc / str(self.pid)).exists() else []
        for pid in found:
            found += parents.get(pid, [])
        return found

    def cpu_s(self) -> float:
        """CPU seconds so far, of the living and of the dead who were waited for."""
        return self._cpu_s(self.pids())

    def usage(self) -> Usage:
        """Look at all of it; reading the memory of a process takes it about a millisecond."""
        pids = self.pids()
        memory = [self._memory(pid) for pid in pids]
        known = [each for each in memory if each is not None]
        whole = bool(known) and len(known) == len(memory)
        return Usage(
            processes=len(pids),
            cpu_s=self._cpu_s(pids),
            pss_mib=round(sum(pss for pss, _ in known), 1) if whole else None,
            rss_mib=round(sum(rss for _, rss in known), 1) if whole else None,
        )

    def pin(self, cpus: Iterable[int]) -> None:
        """Bind every thread of the tree to these processors."""
        wanted = set(cpus)
        for pid in self.pids():
            for task in (self.proc / str(pid) / "task").iterdir():
                os.sched_setaffinity(int(task.name), wanted)

    def _cpu_s(self, pids: list[int]) -> float:
        rows = [fields for fields in map(self._stat, pids) if fields]
        return sum(int(ticks) for fields in rows for ticks in fields[11:15]) / _TICKS_PER_S

    def _stat(self, pid: int) -> list[str]:
        """The fields of /proc/PID/stat from the third on: state, ppid, …, utime (11), stime, cutime, cstime; empty if it ended."""
        try:
            return (self.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return []

    def _memory(self, pid: int) -> tuple[float, float] | None:
        """PSS and RSS in MiB."""
        try:
            lines = (self.proc / str(pid) / "smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return (0.0, 0.0) if not (self.proc / str(pid)).exists() else None
        except OSError:
            return None
        kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if name in {"Pss", "Rss"}}
        return (kib["Pss"] / _MIB, kib["Rss"] / _MIB) if len(kib) == 2 else None  # noqa: PLR2004 - the two that were asked for


def behind(socket_path: str) -> int | None:
    """The process that listens on a Unix socket, as the kernel says (SO_PEERCRED); None if it cannot be told."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(socket_path)
            pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return None
    return int(pid) or None
