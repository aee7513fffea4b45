"""What a durable put costs: our store beside persist-queue, litequeue, diskcache and plain SQLite, in one run, on one disk.

1 and 64 producers, 1 KiB and 64 KiB (half random, half zeros); short rounds, each in an order of its own, so that the moods of disk and processors hit
all; one producer has three rounds for each of 64. Rates are medians of rounds, ratios are medians of the ratios of rounds. Before a round each peer
is filled until its log has its full length, so that nobody pays for a file that grows (ours has its length when it opens).
Ours is asked from an event loop and never blocks it. A peer is asked in three ways, and its best one counts at 64 producers: from as many threads, from one
thread that does all puts, and through one worker thread from an event loop. At one producer two ratios are told: over the best peer under our condition
(asked from an event loop that it does not block), and over the best peer that blocks its caller. "plain sqlite3" is less than a queue: one table without
a key or an index, and so one or two pages for each commit, where ours writes four; "loop" is one thread of an executor, awaited.
A peer is durable if strace saw every written file synced at its acknowledgement: facts of the founding session; litequeue sets synchronous=NORMAL, and
diskcache with FULL syncs its database, but not the files in which it keeps payloads of 32 KiB or more.

Run: `python tests/bench/bench_queue.py`; installs the pinned peers into build/peers-queue; writes build/reports/queue.json and queue.md.
"""

import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import apsw
import uvloop

from appliance.adapters.store import Store
from appliance.contract.deferral import Bounds, Overflow, Parcel, Policy, Rules
from appliance.core.reach.bounds import admit

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "build" / "peers-queue"
PINNED = ("persist-queue==1.1.0", "litequeue==0.9", "diskcache==5.6.3")
REPORT = ROOT / "build" / "reports" / "queue.json"
RULES = Rules({"request": Policy(Overflow.REJECT, 4 << 30, ttl_s=86_400.0)}, Bounds(max_bytes=4 << 30))
SIZES = {"1KiB": 1_024, "64KiB": 65_536}
PUTS = {("1KiB", 1): 100, ("1KiB", 64): 3_200, ("64KiB", 1): 40, ("64KiB", 64): 320}
PEER_PUTS = {("1KiB", 1): 100, ("1KiB", 64): 320, ("64KiB", 1): 40, ("64KiB", 64): 128}
"""Fewer for the slower ones: a round lasts about as long for all, and is short, because the disk's moods change within seconds."""
WARM = 10
FILL, FILL_BYTES = 9, 512 * 1024
"""4.5 MiB: more than the 1,000 pages after which SQLite copies its log and overwrites it from then on. diskcache keeps such payloads beside its log."""
LONE_ROUNDS = 3
ROUNDS = int(os.environ.get("ROUNDS", "15"))


class Peer(Protocol):
    """A queue that blocks its caller."""

    def put(self, payload: bytes) -> None:
        """Put one payload; when it returns, the peer calls it stored."""


class Plain:
    """sqlite3 of the standard library: WAL, FULL, one row for each commit."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(folder / "plain.db", isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("CREATE TABLE items(seq INTEGER PRIMARY KEY, data BLOB)")

    def put(self, payload: bytes) -> None:
        with self._lock:
            self._connection.execute("INSERT INTO items(data) VALUES(?)", (payload,))


class Persist:
    """persist-queue's SQLiteAckQueue; its connection has SQLite's default synchronous=FULL."""

    def __init__(self, folder: Path) -> None:
        import persistqueue  # noqa: PLC0415 - installed by this script

        self._queue = persistqueue.SQLiteAckQueue(str(folder), multithreading=True, auto_commit=True)

    def put(self, payload: bytes) -> None:
        self._queue.put(payload)


class Lite:
    """litequeue; its column is text, so it gets the payload as latin-1."""

    def __init__(self, folder: Path) -> None:
        import litequeue  # noqa: PLC0415 - installed by this script

        self._lock = threading.Lock()
        self._queue = litequeue.LiteQueue(str(folder / "lite.db"))

    def put(self, payload: bytes) -> None:
        with self._lock:
            self._queue.put(payload.decode("latin-1"))


class Disk:
    """diskcache's Deque with synchronous=FULL."""

    def __init__(self, folder: Path) -> None:
        import diskcache  # noqa: PLC0415 - installed by this script

        self._deque = diskcache.Deque.fromcache(diskcache.Cache(str(folder), sqlite_synchronous=2, eviction_policy="none"))

    def put(self, payload: bytes) -> None:
        self._deque.append(payload)


BUILDERS: dict[str, Callable[[Path], Peer]] = {"plain sqlite3": Plain, "persist-queue": Persist, "litequeue": Lite, "diskcache": Disk}


def durable(name: str, size: str) -> bool:
    """By the strace evidence of the facts."""
    return name != "litequeue" and (name, size) != ("diskcache", "64KiB")


@dataclass
class Figures:
    """The rounds of one store in one case; latencies in seconds."""

    rates: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def add(self, latencies: list[float], wall_s: float) -> None:
        self.rates.append(len(latencies) / wall_s)
        self.medians.append(statistics.median(latencies))
        self.latencies += latencies

    def over(self, other: "Figures") -> float:
        """How many times as fast as another, round by round; the median of that."""
        return statistics.median(own / theirs for own, theirs in zip(self.rates, other.rates, strict=True))

    def sooner(self, other: "Figures") -> float:
        """How many times as soon as another a put of the middle is done, round by round; the median of that. Blind to a burst of the disk."""
        return statistics.median(theirs / own for own, theirs in zip(self.medians, other.medians, strict=True))

    def told(self) -> dict[str, float]:
        ordered = sorted(self.latencies)
        return {
            "items_s": round(statistics.median(self.rates), 1),
            "p50_ms": round(ordered[len(ordered) // 2] * 1e3, 3),
            "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1e3, 3),
        }


def payloads(size: int) -> list[bytes]:
    """Some payloads, half random."""
    chance = random.Random(size)
    return [chance.randbytes(size // 2) + bytes(size - size // 2) for _ in range(32)]


def fill(peer: Peer) -> None:
    """Bring a peer's log to its full length."""
    for _ in range(FILL):
        peer.put(bytes(FILL_BYTES))


def threads(peer: Peer, producers: int, puts: int, contents: list[bytes]) -> tuple[list[float], float]:
    """Each producer is a thread that calls the peer."""
    fill(peer)
    for number in range(WARM):
        peer.put(contents[number])
    latencies: list[list[float]] = [[] for _ in range(producers)]
    gate = threading.Barrier(producers + 1)

    def produce(own: list[float]) -> None:
        gate.wait()
        for number in range(puts // producers):
            started = time.perf_counter()
            peer.put(contents[number % len(contents)])
            own.append(time.perf_counter() - started)

    workers = [threading.Thread(target=produce, args=(own,)) for own in latencies]
    for worker in workers:
        worker.start()
    gate.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    return [each for own in latencies for each in own], time.perf_counter() - started


async def loop(put: Callable[[int, int, bytes], Any], producers: int, puts: int, contents: list[bytes]) -> tuple[list[float], float]:
    """Each producer is a task that awaits its put."""
    for number in range(WARM):
        await put(producers, number, contents[number])
    latencies: list[float] = []

    async def produce(producer: int) -> None:
        for number in range(puts // producers):
            started = time.perf_counter()
            await put(producer, number, contents[number % len(contents)])
            latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(produce(producer) for producer in range(producers)))
    return latencies, time.perf_counter() - started


async def through_a_worker(peer: Peer, producers: int, puts: int, contents: list[bytes]) -> tuple[list[float], float]:
    """What an asyncio service has to do with a blocking peer."""
    running = asyncio.get_running_loop()
    fill(peer)
    with ThreadPoolExecutor(1) as pool:

        async def put(_producer: int, _number: int, content: bytes) -> None:
            await running.run_in_executor(pool, peer.put, content)

        return await loop(put, producers, puts, contents)


async def ours(folder: Path, producers: int, puts: int, contents: list[bytes]) -> tuple[list[float], float]:
    """The store, opened anew; ids are in the order of time, as the appliance makes them."""
    async with Store(folder, RULES, admit) as store:

        async def put(producer: int, number: int, content: bytes) -> None:
            await store.put(Parcel(kind="request", idem=f"{number:08}-{producer:02}", payload=content))

        return await loop(put, producers, puts, contents)


def measure(size: str, producers: int, figures: dict[tuple[str, str], Figures], home: Path, chance: random.Random) -> None:
    """One round of all stores and ways in one case, in an order of its own."""
    contents = payloads(SIZES[size])
    puts, peer_puts = PUTS[size, producers], PEER_PUTS[size, producers]
    runs: list[tuple[str, str, Callable[[Path], tuple[list[float], float]]]] = [
        ("appliance", "loop", lambda folder: uvloop.run(ours(folder / "q", producers, puts, contents)))
    ]
    for name, build in BUILDERS.items():
        runs += [
            (name, "blocking", lambda folder, build=build: threads(build(folder), 1, peer_puts, contents)),
            (name, "loop", lambda folder, build=build: uvloop.run(through_a_worker(build(folder), producers, peer_puts, contents))),
        ]
        if producers > 1:
            runs.append((name, "threads", lambda folder, build=build: threads(build(folder), producers, peer_puts, contents)))
    chance.shuffle(runs)
    for name, way, run in runs:
        folder = Path(tempfile.mkdtemp(dir=home))
        figures.setdefault((name, way), Figures()).add(*run(folder))
        shutil.rmtree(folder)


def install() -> None:
    """Bring the pinned peers into a folder of their own."""
    stamp = PEERS / "pinned"
    if not stamp.exists() or stamp.read_text() != "\n".join(PINNED):
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PEERS), *PINNED], check=True)
        stamp.write_text("\n".join(PINNED))
    sys.path.insert(0, str(PEERS))


def main() -> None:
    """Measure all cases and write the report."""
    install()
    home = ROOT / "build" / "bench-queue"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    found: dict[tuple[str, int], dict[tuple[str, str], Figures]] = {case: {} for case in PUTS}
    chance = random.Random(ROUNDS)
    for number in range(ROUNDS):
        for (size, producers), figures in found.items():
            for _ in range(LONE_ROUNDS if producers == 1 else 1):
                measure(size, producers, figures, home, chance)
        sys.stdout.write(f"round {number + 1} of {ROUNDS}\n")
    shutil.rmtree(home)
    write(found)


def write(found: dict[tuple[str, int], dict[tuple[str, str], Figures]]) -> None:
    """The figures as JSON and as tables."""
    cases = {
        f"{size}, {producers}": {f"{name}, {way}": each.told() for (name, way), each in sorted(figures.items())}
        for (size, producers), figures in found.items()
    }
    own = {size: over(found, size) for size in SIZES}
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}",
        "sqlite": {"appliance": apsw.sqlite_lib_version(), "peers": sqlite3.sqlite_version},
        "peers": list(PINNED),
        "over_best_durable_peer_64": own["1KiB"]["64"][0],
        "over_best_durable_peer_1": own["1KiB"]["1"][0],
        "over_best_durable_peer_1_p50": own["1KiB"]["1_p50"][0],
        "over_best_blocking_peer_1": own["1KiB"]["1_blocking"][0],
        "over": own,
        "cases": cases,
    }
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, ValueError):
        report["kills"] = json.loads(REPORT.read_text()).get("kills")  # of `make kills`
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"# Durable puts ({report['machine']})", ""]
    for case, rows in cases.items():
        size = case.split(", ")[0]
        lines += [f"## {case} producers", "", "| store, asked from | durable | items/s | p50 ms | p99 ms |", "|---|---|---|---|---|"]
        for label, row in rows.items():
            name = label.split(", ")[0]
            sound = "yes" if name == "appliance" or durable(name, size) else "no"
            lines.append(f"| {label} | {sound} | {row['items_s']:.0f} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} |")
        lines.append("")
    lines += [f"Over the best durable peer: {own}"]
    REPORT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


def over(found: dict[tuple[str, int], dict[tuple[str, str], Figures]], size: str) -> dict[str, Any]:
    """Ours over the best durable peer: at 64 producers asked in any way, at one from a loop, and at one blocking; with that peer's name."""

    def best(producers: int, *ways: str, by: Callable[[Figures, Figures], float] = Figures.over) -> tuple[float, str]:
        figures = found[size, producers]
        peers = {
            f"{name}, {way}": each for (name, way), each in figures.items() if name != "appliance" and way in ways and durable(name, size)
        }
        label = min(peers, key=lambda each: by(figures["appliance", "loop"], peers[each]))
        return round(by(figures["appliance", "loop"], peers[label]), 2), label

    return {
        "64": best(64, "blocking", "loop", "threads"),
        "1": best(1, "loop"),
        "1_p50": best(1, "loop", by=Figures.sooner),
        "1_blocking": best(1, "blocking"),
    }


if __name__ == "__main__":
    main()
