"""What serving costs when the model costs nothing: our device's desk beside the bare batcher of about fifty lines, CPU microseconds per answer.

1. Ours is all that a request meets on a device: ingress, desk, lane, tally and metrics in one process, the model in a child; both on one processor.
2. Both servers stay up and take turns in short blocks over TCP, with 1, 8 and 32 callers, so that a noisy machine is noisy for both. A figure is the
   median of its blocks, a ratio the median of the ratios of neighbouring blocks, `least` the smallest block.
3. CPU time is the scheduler's (`/proc/PID/task/*/schedstat`, nanoseconds), of the whole tree, divided by the answers; refusals are counted beside it,
   and their cost apart: 64 rude callers against a model whose places are all taken.

Run: `python tests/bench/bench_light.py [--rounds 9] [--seconds 0.5]`; writes build/reports/light.json.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Iterator
from pathlib import Path

import uvloop

from appliance.adapters.clock import SystemClock
from appliance.adapters.inference.workers import Workers
from appliance.adapters.ingress import Ingress
from appliance.adapters.metrics import Meter
from appliance.contract.models import EdgeConstraints, Manifest
from appliance.contract.vocabulary import Mode, Platform
from appliance.core.serve.degradation import DegradationSettings
from appliance.edge.lane import Hands, Pool
from appliance.edge.serving import Serving
from appliance.edge.stand import Form, Policy
from appliance.edge.tally import Tally
from appliance.lab.ports import free_port
from appliance.workshop.bench_tree import Tree
from appliance.workshop.load import Manners, Opens, closed_loop
from appliance.workshop.load_http import HttpAsker, address, infer_request, request

HERE = Path(__file__).parent
REPORT = HERE.parents[1] / "build" / "reports" / "light.json"
CALLERS = (1, 8, 32)
MAX_BATCH = 8
BOUND_US = 90.0
SLO_S = 0.15
HOG_MS = 1_000.0
"""How slow the model is that keeps all places taken while refusals are counted: a desk whose worker sleeps."""


class Sleeper:
    """An engine whose batches take `HOG_MS`: what waits for it fills the backlog."""

    def __init__(self, engine: Workers) -> None:
        self._engine = engine
        self.slow = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def run(self, *asked: object) -> Awaitable[object]:
        """Run the batch, late if told so."""
        return self._late(*asked) if self.slow else self._engine.run(*asked)  # type: ignore[arg-type]  # passed on as it came

    async def _late(self, *asked: object) -> object:
        await asyncio.sleep(HOG_MS / 1e3)
        return await self._engine.run(*asked)  # type: ignore[arg-type]  # passed on as it came


async def serve(model: Path, port: int) -> None:
    """Be the device until stdin ends; `slow` on stdin makes the model slow."""
    clock = SystemClock()
    meter = Meter(clock.wall)
    async with Workers(size=1, threads=1) as workers:
        engine, tally = Sleeper(workers), Tally(meter, clock)
        hands = Hands(engine, clock, tally, Pool(1), SLO_S, 0.01)  # type: ignore[arg-type]  # an engine by __getattr__
        serving = Serving(hands, Policy(MAX_BATCH, DegradationSettings()), timeout_s=10)
        limits = EdgeConstraints(min_vram_gb=0, max_batch_size=MAX_BATCH, target_latency_ms=50)
        manifest = Manifest(
            model_id="light", version="1", sha256="", token=1, compiled_artifacts={}, edge_constraints=limits, released_at=0
        )
        await serving.mount(manifest, {Mode.FULL: Form(Platform.ONNX, lambda: os.open(model, os.O_RDONLY))})
        ingress = Ingress(serving, metrics=meter.render, status=dict, share=workers.share, refused=tally.failed)
        await ingress.start("127.0.0.1", port, None)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while line := await asyncio.to_thread(sys.stdin.readline):
            engine.slow = line == "slow\n"
        await ingress.close()


def spent_ns(tree: Tree) -> dict[int, int]:
    """Processor nanoseconds of each process so far."""
    return {
        pid: sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) for pid in tree.pids()
    }


@contextlib.contextmanager
def started(command: list[str], cpu: int) -> Iterator["subprocess.Popen[str]"]:
    """A server on one processor."""
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        Tree(process.pid).pin({cpu})
        yield process
    finally:
        process.terminate()
        process.communicate()


class Side:
    """One of the two servers, and what its blocks showed: (microseconds per answer, answers per second, refusals per second) by callers."""

    def __init__(self, process: "subprocess.Popen[str]", opens: Opens) -> None:
        self.process = process
        self.opens = opens
        self.blocks: dict[int, list[tuple[float, float, float]]] = {callers: [] for callers in CALLERS}
        self.children_us: list[float] = []

    async def block(self, callers: int, seconds: float) -> None:
        """One short block."""
        tree = Tree(self.process.pid)
        before = spent_ns(tree)
        seen = await closed_loop(self.opens, callers, duration_s=seconds, slo_s=SLO_S)
        after = spent_ns(tree)
        spent = {pid: (after[pid] - before.get(pid, 0)) / 1e3 for pid in after}
        answers = max(1, seen.answered)
        self.blocks[callers].append((sum(spent.values()) / answers, seen.answered / seconds, seen.refused / seconds))
        if callers == MAX_BATCH:
            self.children_us.append((sum(spent.values()) - spent[self.process.pid]) / answers)

    async def ready(self) -> None:
        """Return when it answers."""
        for _ in range(100):
            if (await closed_loop(self.opens, 1, duration_s=0.1, slo_s=SLO_S)).answered:
                return
        raise RuntimeError("a server does not answer")

    def told(self) -> dict[str, float]:
        """Medians, and the least."""
        figures = {}
        for callers, blocks in self.blocks.items():
            costs, rates, refused = zip(*blocks, strict=True)
            figures[f"c{callers}_us"] = round(statistics.median(costs), 1)
            figures[f"c{callers}_least_us"] = round(min(costs), 1)
            figures[f"c{callers}_per_s"] = round(statistics.median(rates), 1)
            figures[f"c{callers}_refused_per_s"] = round(statistics.median(refused), 1)
        return figures


async def refusals(side: Side, seconds: float) -> dict[str, float]:
    """What a refusal costs: the model is slow, all places are taken, rude callers ask."""
    assert side.process.stdin is not None
    side.process.stdin.write("slow\n")
    side.process.stdin.flush()
    tree = Tree(side.process.pid)
    before = spent_ns(tree)
    seen = await closed_loop(side.opens, 64, duration_s=seconds, slo_s=SLO_S, manners=Manners.RUDE, drain_s=0.0)
    spent_us = (sum(spent_ns(tree).values()) - sum(before.values())) / 1e3
    return {"refusal_us": round(spent_us / max(1, seen.refused), 1), "refusals_per_s": round(seen.refused / seconds, 1)}


async def measured(rounds: int, seconds: float) -> dict[str, object]:
    """Both servers in turns."""
    sys.path.insert(0, str(HERE))
    from peers.models import light  # noqa: PLC0415 - the servers under test must not import it

    own, cpu = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {own})
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as folder:
        model = light(Path(folder))
        ports = free_port(), free_port()
        ours = [sys.executable, __file__, "--serve", str(model.path), "--port", str(ports[0])]
        bare = [sys.executable, str(HERE / "peers" / "aiohttp_batcher.py"), str(model.path), str(ports[1])]
        with started(ours, cpu) as a, started(bare, cpu) as b:
            assert a.stdout is not None
            await asyncio.to_thread(a.stdout.readline)
            asked = infer_request("light", {"x": model.x}), request("/", model.x.tobytes(), {"Content-Type": "application/octet-stream"})
            where = [address(f"http://127.0.0.1:{port}") for port in ports]
            sides = Side(a, lambda: HttpAsker(where[0], asked[0])), Side(b, lambda: HttpAsker(where[1], asked[1]))
            for side in sides:
                await side.ready()
            for _ in range(rounds):
                for callers in CALLERS:
                    for side in sides:
                        await side.block(callers, seconds)
            refused = await refusals(sides[0], 2 * seconds)
        figures: dict[str, object] = {"ours": sides[0].told() | refused, "bare": sides[1].told()}
        figures["child_us"] = round(statistics.median(sides[0].children_us), 1)
        for callers in CALLERS:
            pairs = zip(sides[0].blocks[callers], sides[1].blocks[callers], strict=True)
            figures[f"c{callers}_over_bare"] = round(statistics.median(mine[0] / theirs[0] for mine, theirs in pairs), 2)
        return figures


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each block")
    asked = parser.parse_args()
    if asked.serve is not None:
        uvloop.run(serve(asked.serve, asked.port))
        return
    figures = uvloop.run(measured(asked.rounds, asked.seconds))
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}", "bound_us": BOUND_US}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(machine | figures, indent=1) + "\n")
    sys.stdout.write(REPORT.read_text())


if __name__ == "__main__":
    main()
