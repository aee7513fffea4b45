"""`appliance lab`: a broker, a software TPM, a cloud, a region and devices on this machine, reading shelf labels."""

import asyncio
import contextlib
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live

from appliance.lab.daemon import Device, Lab, Plan
from appliance.lab.site import claim
from appliance.lab.stream import Score, percentile
from appliance.lab.table import row, table

EXACT_FLOOR = 0.92
"""The share of labels that must be read exactly; the recogniser reads more than 95 % of this stream (docs/own-model.md)."""
JUDGED_FROM = 200
"""Labels below which the share says nothing: at a true share of 95 % a run of 30 falls below the floor one time in five, of 200 one in forty."""
REFRESH_S = 1.0
LOG_COLUMNS = 160
ROTATES_WITHIN_S = 45.0
SPIRE_TTL_S = 60.0
REPORT = Path("build/reports/run.json")


@click.command()
@click.option("--devices", envvar="DEVICES", type=click.IntRange(1, 64), default=1, show_default=True, help="How many devices.")
@click.option("--run-for", envvar="RUN_FOR", type=click.FloatRange(min=1), help="Stop by itself after so many seconds.")
@click.option("--rate", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Labels per second for each device.")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=Path("build/models/label-reader.bundle"),
    show_default=True,
    help="ONNX file or bundle.",
)
@click.option(
    "--state", type=click.Path(file_okay=False, path_type=Path), help="Directory for everything; default under the temporary directory."
)
@click.option("--spire", is_flag=True, help="Identities by real SPIRE (docs/spire.md).")
@click.option("--remove", is_flag=True, help="Remove the directory at the end.")
def lab(devices: int, run_for: float | None, rate: float, model: Path, state: Path | None, *, spire: bool, remove: bool) -> None:
    """Run a whole fleet on this machine."""
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    site = claim(state)
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/dim]  {text}", highlight=False)

    plan = Plan(devices=devices, model=model, rate_per_s=rate, spire_ttl_s=SPIRE_TTL_S if spire else 0.0, say=say)
    say(f"everything is kept in {site.path}" + (" until the end" if remove else ""))
    try:
        reason = asyncio.run(_run(Lab(site, plan, contextlib.AsyncExitStack()), run_for, console))
    finally:
        if remove:
            site.remove()
    if reason:
        raise click.ClickException(reason)


async def _run(world: Lab, run_for: float | None, console: Console) -> str:
    """Open, show, close; returns why the run failed, or an empty text."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with world.stack:
        opening = asyncio.create_task(world.open())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            return "stopped before it was ready"
        opening.result()
        rotations = await _show(world, stop, run_for, console)
        world.plan.say("stopping everything")
    return _conclude(world, rotations, run_for, console)


async def _show(world: Lab, stop: asyncio.Event, run_for: float | None, console: Console) -> int:
    """Refresh the table until it is time; returns how often SVIDs were rotated."""
    loop = asyncio.get_running_loop()
    end = loop.time() + run_for if run_for else None
    rotations: dict[str, int] = {}
    with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:
        while not stop.is_set() and (end is None or loop.time() < end):
            rows = []
            for device in world.devices:
                status = await device.status()
                if status is not None:
                    rotations[device.name] = max(rotations.get(device.name, 0), int(str(status.get("rotations", 0))))
                rows.append(row(device.name, status, device.stream.score))
            if console.is_terminal:
                live.update(table(rows, _caption(world, end, loop.time())), refresh=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await stop.wait()
    if not console.is_terminal:
        console.print(table(rows, ""))
    return sum(rotations.values())


def _caption(world: Lab, end: float | None, now: float) -> str:
    left = "Ctrl-C stops everything" if end is None else f"{max(end - now, 0):.0f} s left"
    restarts = sum(max(unit.restarts, 0) for unit in world.units)
    return f"{left}; broker on port {world.port}; {restarts} restarts; logs in {world.site.path}/log"


def _conclude(world: Lab, rotations: int, run_for: float | None, console: Console) -> str:
    total = _total(world.devices)
    ordered = sorted(total.latencies_ms)
    figures = {
        "labels": total.labels,
        "exact": total.exact,
        "differing": total.differing,
        "failed": total.failed,
        "retried": total.retried,
        "p50_ms": percentile(ordered, 0.5),
        "p99_ms": percentile(ordered, 0.99),
        "modes": dict(sorted(total.modes.items())),
        "rotations": rotations,
        "devices": len(world.devices),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(figures, indent=1) + "\n")
    share = total.exact / total.full if total.full else 0.0
    lesser = total.labels - total.full
    if lesser:
        by_mode = ", ".join(f"{count} in mode {mode}" for mode, count in sorted(total.modes.items()))
        console.print(f"{by_mode}; of those in lesser modes {100 * total.lesser_exact / lesser:.1f} % exactly", highlight=False)
    console.print(
        f"{total.labels} labels read, {100 * share:.1f} % exactly{' in mode A' if lesser else ''}, {total.differing} other than onnxruntime in-process, {total.failed} failed, "
        f"{rotations} SVID rotations; p50 {figures['p50_ms'] or 0:.1f} ms, p99 {figures['p99_ms'] or 0:.1f} ms ({figures['machine']}); {REPORT}"
    )
    for expected, read in total.examples[:3]:
        console.print(f"  misread: printed {expected!r}, read {read!r}", highlight=False)
    return _why(total, share, rotations, run_for)


def _total(devices: list[Device]) -> Score:
    total = Score()
    for device in devices:
        score = device.stream.score
        total.labels += score.labels
        total.exact += score.exact
        total.lesser_exact += score.lesser_exact
        total.modes += score.modes
        total.differing += score.differing
        total.failed += score.failed
        total.retried += score.retried
        total.latencies_ms += score.latencies_ms
        total.examples += score.examples
        total.reasons += score.reasons
    return total


def _why(total: Score, share: float, rotations: int, run_for: float | None) -> str:
    """Why this run is not a success; an empty text if it is."""
    if not total.labels:
        return f"no label was read; reasons: {dict(total.reasons)}"
    if total.failed:
        return f"{total.failed} labels were not answered; reasons: {dict(total.reasons)}"
    if total.differing:
        return f"{total.differing} answers differ from onnxruntime in this process"
    if share < EXACT_FLOOR and total.full >= JUDGED_FROM:
        return f"{100 * share:.1f} % of the labels were read exactly, at least {100 * EXACT_FLOOR:g} % were expected"
    if run_for and run_for >= ROTATES_WITHIN_S and not rotations:
        return "no SVID was rotated"
    return ""
