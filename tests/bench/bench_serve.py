"""Our device beside raw onnxruntime, and with `--peers` beside the servers that a user would take instead, all in one run.

The device is a real one out of the lab (broker, software TPM, cloud and region run too): its process tree is bound to one processor, the load
generator and all else to another. `python tests/bench/bench_serve.py [--peers] [--seconds 5]`; writes build/reports/serve.json, .md and .png.
docs/bench.md says what each figure means.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).parent))

from peers.block import Block, Script, put_through
from peers.lineup import PEERS, VENVS, Peer, running
from peers.models import Model, heavy, light
from peers.pages import page, picture

from appliance.client.sync import Appliance
from appliance.lab.daemon import MODEL, Lab, Plan
from appliance.lab.site import claim
from appliance.workshop.bench_tree import Tree
from appliance.workshop.load import Opens
from appliance.workshop.load_http import HttpAsker, address, infer_request

ALONE = {"reach": {"cloud": False}}
"""What the device cannot answer is refused, not tried in the cloud, which here is a process beside it on the same machine."""
ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "reports" / "serve.json"
SOURCE = ROOT / "build" / "models" / "label-reader.onnx"
SLO_S = 0.15
SETTLE_S = 2.0


def say(text: str) -> None:
    """Tell a person who waits."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def processors() -> tuple[int, int]:
    """One for everything else, one for the server. With only one they are the same, and no figure means much."""
    mine = sorted(os.sched_getaffinity(0))
    return mine[0], mine[-1]


@contextlib.asynccontextmanager
async def our_device(model: Model, cpu: int) -> AsyncIterator[tuple[Opens, Tree, dict[str, Any]]]:
    """A device of the lab that serves this model, bound to one processor; its stream of labels is not sent."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    began = time.perf_counter()
    try:
        async with contextlib.AsyncExitStack() as stack:
            lab = Lab(claim(folder / "lab"), Plan(devices=1, model=model.path, rate_per_s=0, settings=ALONE), stack)
            await lab.open()
            device = lab.devices[0]
            pid = device.unit.pid
            if pid is None:
                raise RuntimeError(f"the device ended\n{device.unit.tail()}")
            tree = Tree(pid)
            tree.pin({cpu})
            port = re.search(r"\bport\W+(\d+)", await asyncio.to_thread(device.unit.log.read_text))
            if port is None:
                raise RuntimeError(f"the log names no port\n{device.unit.tail()}")
            server = f"http://127.0.0.1:{port[1]}"
            about = {"start_s": round(time.perf_counter() - began, 2), "equal": await asyncio.to_thread(_equal, server, model)}
            payload, where = infer_request(MODEL, {"x": model.x}), address(server)
            await asyncio.sleep(SETTLE_S)
            yield (lambda: HttpAsker(where, payload)), tree, about
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _equal(server: str, model: Model) -> bool:
    """Whether the device's answer has the bytes of onnxruntime's."""
    with Appliance(server) as client:
        return client.infer(MODEL, {"x": model.x}).outputs["y"].tobytes() == model.y


async def measure_ours(models: tuple[Model, Model], cpu: int, seconds: float) -> dict[str, Any]:
    """The device with the heavy model, then one with the light one."""
    figures: dict[str, Any] = {}
    opened = 2.5 * seconds
    scripts = (
        Script(seconds, opened, rounds=3, crowd=True),
        Script(seconds, seconds),
    )
    for model, script in zip(models, scripts, strict=True):
        say(f"our device, {model.name} model")
        async with our_device(model, cpu) as (opens, tree, about):
            block = await put_through(opens, tree, model, cpu, script, slo_s=SLO_S, say=say)
        figures |= _placed(model, block, about)
    return figures


async def measure_peer(peer: Peer, models: tuple[Model, Model], cpu: int, seconds: float) -> dict[str, Any]:
    """One peer with both models; what cannot be measured says why."""
    figures: dict[str, Any] = {"says": peer.says}
    failed = VENVS / f"{peer.venv}.failed"
    if not (peer.programs / "python").exists() or failed.exists():
        why = failed.read_text() if failed.exists() else "run `make bench-peers`"
        return {**figures, "failed": f"not installed: {why}"}
    scripts = [Script(seconds, 1.6 * seconds), Script(seconds * 0.6, seconds, loads=())]
    if peer.bounded:
        scripts = [Script(seconds, 1.6 * seconds, callers=(), loads=(1.2,))]
    for model, script in zip(models, scripts, strict=False):
        say(f"{peer.name}, {model.name} model")
        try:
            async with running(peer, model, cpu) as it:
                block = await put_through(it.opens, it.tree, model, cpu, script, slo_s=SLO_S, say=say)
                figures |= _placed(model, block, {"start_s": it.start_s, "equal": it.equal})
        except (RuntimeError, OSError) as error:
            figures["failed"] = f"{model.name}: {error}"
            say(f"{peer.name}: {error}")
    return figures


def _placed(model: Model, block: Block, about: dict[str, Any]) -> dict[str, Any]:
    """The heavy model's figures stand at the top, the light one's under `light`, with its CPU per request beside the others."""
    figures = {**block.plain(), **about}
    if model.name == "heavy":
        return figures
    cpu = next((row.cpu_us_per_answer for row in block.rest if row.callers == 32), None)
    return {"light": figures, "cpu_us_per_request_light": cpu}


def _busy_s() -> float:
    """CPU seconds that this machine has spent, by anybody."""
    fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


async def main(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure all that was asked for."""
    own, cpu = processors()
    os.sched_setaffinity(0, {own})  # what the lab starts inherits it; the device is moved afterwards
    models = heavy(SOURCE, ROOT / "build" / "bench"), light(ROOT / "build" / "bench")
    began, spent = time.perf_counter(), _busy_s()
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}",
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "seconds": asked.seconds,
        "slo_ms": SLO_S * 1e3,
        "cpus": {"load": own, "server": cpu},
    }
    if not asked.only:
        figures |= await measure_ours(models, cpu, asked.seconds)
    if asked.peers:
        chosen = [peer for peer in PEERS if not asked.only or peer.name in asked.only]
        figures["peers"] = {peer.name: await measure_peer(peer, models, cpu, asked.seconds) for peer in chosen}
    figures["took_s"] = round(time.perf_counter() - began, 1)
    figures["busy_cores"] = round((_busy_s() - spent) / figures["took_s"], 2)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each closed loop; open loops take up to 2.5 times as long")
    parser.add_argument("--peers", action="store_true", help="measure the peers that are installed, too")
    parser.add_argument(
        "--only", nargs="*", default=[], help="only these peers, and not our device: what the last run found of others is kept"
    )
    arguments = parser.parse_args()
    found = uvloop.run(main(arguments))
    if arguments.only and REPORT.exists():
        last = json.loads(REPORT.read_text())
        found = {**last, "peers": {**last.get("peers", {}), **found.get("peers", {})}}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(found, indent=1) + "\n")
    text = page(found)
    REPORT.with_suffix(".md").write_text(text)
    picture(REPORT.with_suffix(".png"), found)
    sys.stdout.write(text)
