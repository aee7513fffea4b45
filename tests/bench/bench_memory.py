"""A memory ramp on real parts: a whole device in a control group of its own, whose memory another program takes up to 97 %, and gives back.

The device reads its group as its memory (board `generic`), so it walks A, B, C and, over the region, D, and back. Two callers ask all the time.
Written down: whether anything was killed, which requests failed, the modes, and a timeline. Needs root and the memory controller (cgroup v1 or
v2); writes build/reports/memory.json and memory.png.
"""

import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, cast

import matplotlib as mpl
from matplotlib import pyplot as plt

from appliance.client.aio import AsyncAppliance
from appliance.client.images import tensor_of
from appliance.client.retrying import ONCE
from appliance.contract.errors import ApplianceError
from appliance.contract.inference import Tags
from appliance.lab.daemon import Lab, Plan
from appliance.lab.labels import draw
from appliance.lab.site import claim
from appliance.workshop.bench_tree import Tree

LIMIT_MIB = 2_048
RAMP = ((0.0, 0.30), (15.0, 0.30), (75.0, 0.97), (105.0, 0.97), (125.0, 0.30), (185.0, 0.30))
"""Share of the group's memory that is in use, by time in seconds, linear between."""
CALLERS = 2
PAUSE_S = 0.1
MODEL = Path("build/models/label-reader.bundle")
REPORTS = Path("build/reports")
HOG = """
import sys
held = []
for line in sys.stdin:
    wanted = int(line)
    while len(held) < wanted:
        held.append(bytearray(b"x") * (1 << 20))
    del held[max(wanted, 0):]
    print(len(held), flush=True)
"""


class Group:
    """A control group for memory, of either version. Raises: SystemExit with what to do where there is none."""

    def __init__(self, limit_bytes: int) -> None:
        old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        self.old = old.is_dir()
        own = next(
            (line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if (":memory:" in line) == self.old), "/"
        )
        self.path = (old if self.old else new) / own.lstrip("/") / f"appliance-memory-{os.getpid()}"
        try:
            self.path.mkdir()
            (self.path / ("memory.limit_in_bytes" if self.old else "memory.max")).write_text(str(limit_bytes))
        except OSError as error:
            sys.exit(f"bench_memory: no control group for memory can be made at {self.path}: {error}; run it as root where one is mounted")

    def add(self, pid: int) -> None:
        """Move a process in; what it holds already stays counted elsewhere (version 1) until it touches it anew."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def used(self) -> int:
        """Bytes that cannot be dropped."""
        usage = int((self.path / ("memory.usage_in_bytes" if self.old else "memory.current")).read_text())
        return usage - self._stat("total_inactive_file" if self.old else "inactive_file")

    def kills(self) -> int:
        """How many processes the kernel killed for want of memory."""
        text = (self.path / ("memory.oom_control" if self.old else "memory.events")).read_text()
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)

    def _stat(self, name: str) -> int:
        lines = (self.path / "memory.stat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)

    def remove(self) -> None:
        """Give it back once it is empty."""
        for _ in range(50):
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)


@dataclass
class Trace:
    """What was seen. Rows: seconds, share of memory in use, MiB of the hog, mode; answers: seconds, milliseconds, mode."""

    rows: list[tuple[float, float, int, str]] = field(default_factory=list)
    answers: list[tuple[float, float, str]] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)

    def walked(self, mode: str) -> None:
        """Note a mode if it is another than the last."""
        if not self.modes or self.modes[-1] != mode:
            self.modes.append(mode)


async def ask(server: str, trace: Trace, started: float, seed: int) -> None:
    """One caller: ask, wait a little, ask again."""
    rng = random.Random(seed)
    async with AsyncAppliance(server, policy=ONCE) as client:
        while True:
            tensor = tensor_of(draw(rng).image)
            asked = time.monotonic()
            try:
                result = await client.infer("label-reader", {"x": tensor}, tags=Tags(timeout_s=5.0))
            except ApplianceError as error:
                trace.failures.append((asked - started, f"{error.reason}: {error.what}"[:160]))
            else:
                trace.answers.append((asked - started, (time.monotonic() - asked) * 1e3, result.mode))
                trace.walked(result.mode)
            await asyncio.sleep(PAUSE_S)


def wanted(seconds: float) -> float:
    """The share of memory that should be in use."""
    for (t0, low), (t1, high) in itertools.pairwise(RAMP):
        if seconds <= t1:
            return low + (high - low) * max(0.0, seconds - t0) / (t1 - t0)
    return RAMP[-1][1]


async def ramp(world: Lab, group: Group, hog: "subprocess.Popen[str]", trace: Trace) -> None:
    """Drive the hog along the ramp and watch."""
    device, started = world.devices[0], time.monotonic()
    to_hog, from_hog = cast("TextIO", hog.stdin), cast("TextIO", hog.stdout)
    held = 0
    callers = [asyncio.create_task(ask(f"unix:{device.socket}", trace, started, seed)) for seed in range(CALLERS)]
    while (now := time.monotonic() - started) < RAMP[-1][0]:
        free = int(wanted(now) * LIMIT_MIB) - (group.used() >> 20)
        held = max(0, held + max(-64, min(64, free)))
        to_hog.write(f"{held}\n")
        to_hog.flush()
        await asyncio.to_thread(from_hog.readline)
        status = await device.status() or {}
        trace.rows.append((now, group.used() / (LIMIT_MIB << 20), held, str(status.get("mode", "?"))))
        await asyncio.sleep(0.2)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)


def draw_plot(trace: Trace, path: Path) -> None:
    """Memory, mode and latency over time."""
    mpl.use("Agg")
    figure, (memory, mode, latency) = plt.subplots(3, 1, figsize=(9, 7.5), sharex=True)
    times = [row[0] for row in trace.rows]
    memory.plot(times, [100 * row[1] for row in trace.rows], color="C3", lw=1)
    memory.set_ylabel("memory in use, %")
    mode.step(times, ["ABCD".find(row[3]) for row in trace.rows], where="post", color="C0")
    mode.set_yticks(range(4), list("ABCD"))
    mode.set_ylim(3.3, -0.3)
    mode.set_ylabel("mode")
    latency.scatter(
        [at for at, _, _ in trace.answers],
        [ms for _, ms, _ in trace.answers],
        s=4,
        c=["ABCD".find(each) for _, _, each in trace.answers],
        cmap="viridis",
    )
    latency.plot([at for at, _ in trace.failures], [0] * len(trace.failures), "rx", label="failed")
    latency.set_ylabel("answer, ms (colour: mode)")
    latency.set_xlabel("seconds")
    for axis in (memory, mode, latency):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _hog() -> "subprocess.Popen[str]":
    """The other program: it holds as many MiB as it is told, and says how many it holds."""
    return subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def play(group: Group, trace: Trace) -> dict[str, object]:
    """The whole run; returns what the device's processes were before and after."""
    site = claim(Path("/tmp/appliance-memory"))  # noqa: S108 - short, for Unix sockets
    hog = _hog()
    group.add(hog.pid)
    try:
        async with contextlib.AsyncExitStack() as stack:
            settings = {"board": {"kind": "generic", "interval_s": 0.25}, "serve": {"threads": 1}}
            world = Lab(site, Plan(devices=1, model=MODEL, rate_per_s=0, settings=settings), stack)
            await world.open()
            tree = Tree(cast("int", world.devices[0].unit.pid))
            for pid in tree.pids():
                group.add(pid)
            before = tree.pids()
            await ramp(world, group, hog, trace)
            return {"same_daemon": tree.pids()[:1] == before[:1], "same_children": set(before) <= set(tree.pids())}
    finally:
        hog.kill()
        hog.wait()
        shutil.rmtree(site.path, ignore_errors=True)


def main() -> None:
    """Play the ramp, judge, print and write."""
    group, trace = Group(LIMIT_MIB << 20), Trace()
    try:
        kept = asyncio.run(play(group, trace))
        kills = group.kills()
    finally:
        group.remove()
    by_mode = Counter(mode for _, _, mode in trace.answers)
    ordered = sorted(ms for _, ms, _ in trace.answers)
    report = {
        "killed": kills,
        **kept,
        "highest_use": round(max(row[1] for row in trace.rows), 4),
        "modes_walked": "".join(trace.modes),
        "answers": len(trace.answers),
        "answers_by_mode": dict(sorted(by_mode.items())),
        "failed": len(trace.failures),
        "failures": Counter(text for _, text in trace.failures).most_common(5),
        "p50_ms": round(ordered[len(ordered) // 2], 1),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)], 1),
        "limit_mib": LIMIT_MIB,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
    }
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_plot(trace, REPORTS / "memory.png")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
