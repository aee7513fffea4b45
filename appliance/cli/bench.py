"""`appliance bench`: measures the device that it runs on: latency, goodput, refusals, memory, CPU and cost, and drift over hours."""

import asyncio
import json
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import uvloop

from appliance.client.sync import Appliance
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import DTYPES, Array
from appliance.contract.vocabulary import Datatype
from appliance.workshop import report
from appliance.workshop.bench import Course, Findings, run_course
from appliance.workshop.bench_soak import Sample, memory_mib_per_h, soak
from appliance.workshop.bench_tree import Tree, behind
from appliance.workshop.load_http import HttpAsker, address, infer_request

DOLLARS_PER_HOUR = 0.0125
"""An Orin Nano Super kit (249 $) over three years, and 20 W at 0.15 $/kWh: 0.0095 + 0.0030."""
SOAK_LOAD = 0.5
SEED = 7


@click.command()
@click.option("--model", required=True, help="The model's name.")
@click.option("--server", default="unix:/run/appliance/api.sock", show_default=True, help="http://host:port or unix:/path.")
@click.option(
    "--input", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=".npy for the first input, .npz for all."
)
@click.option("--shape", "shapes", multiple=True, help="[NAME=]1,3,48,160: the shape of an input with free axes; random values are sent.")
@click.option(
    "--slo-ms", type=click.FloatRange(min=0.1), default=150.0, show_default=True, help="An answer that comes later is worth nothing."
)
@click.option("--duration", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Seconds for each load.")
@click.option(
    "--hours",
    type=click.FloatRange(min=0, min_open=True),
    help="After that, half of the capacity for so many hours; a drift is exit code 1.",
)
@click.option(
    "--sample-s", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="One line for each so many seconds of --hours."
)
@click.option("--dollars-per-hour", type=click.FloatRange(min=0), default=DOLLARS_PER_HOUR, show_default=True, help="Price of the device.")
@click.option("--pid", type=click.IntRange(min=1), help="The daemon's process, where --server is no Unix socket.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Where bench.json, .md and .png go.")
def bench(
    *, model: str, server: str, file: Path | None, shapes: tuple[str, ...], slo_ms: float, duration: float, hours: float | None, sample_s: float,
    dollars_per_hour: float, pid: int | None, out: Path,
) -> None:  # fmt: skip
    """Measure MODEL on this device: 1, 8 and 32 callers, then arrivals at 50, 80 and 120 % of what these found."""
    where = address(server)
    with Appliance(server) as client:
        metadata = client.metadata(model)
        inputs = _loaded(file, metadata) if file else _drawn(metadata, _shapes(shapes, metadata))
        client.infer(model, inputs)  # what is refused now, with the server's own words, would be refused a thousand times below
    payload = infer_request(model, inputs)
    pid = pid or (behind(where.path) if where.path else None)
    tree = Tree(pid) if pid else None
    out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        click.echo(text, err=True)

    def asker() -> HttpAsker:
        return HttpAsker(where, payload)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        findings = runner.run(run_course(asker, tree, Course(duration_s=duration, slo_s=slo_ms / 1e3, warm_s=min(2.0, duration), say=say)))
        _write(out, findings, _facts(model, server, metadata, inputs), dollars_per_hour, say)
        if hours:
            samples = runner.run(
                soak(
                    asker, tree, _fresh(out / "bench-hours.jsonl"), rate_per_s=SOAK_LOAD * findings.capacity_per_s, duration_s=hours * 3600,
                    slo_s=slo_ms / 1e3, say=say, sample_s=sample_s, seed=SEED,
                )
            )  # fmt: skip
            _conclude(samples, out, say)


def _write(out: Path, findings: Findings, facts: dict[str, str], dollars_per_hour: float, say: Callable[[str], None]) -> None:
    figures = {"facts": facts, "dollars_per_hour": dollars_per_hour, **msgspec.to_builtins(findings)}
    (out / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    page = report.device_page(f"Benchmark of {facts['model']}", facts, findings, dollars_per_hour)
    (out / "bench.md").write_text(page)
    if not report.device_picture(out / "bench.png", findings):
        say(report.NO_PICTURE)
    click.echo(page)
    if not findings.capacity_per_s:
        reasons = next((row.summary.reasons for row in findings.rows), {})
        raise WorldError(
            "bench", f"nothing was answered: {reasons}", where=facts["server"], remedy="appliance check; journalctl -u appliance"
        )


def _conclude(samples: Sequence[Sample], out: Path, say: Callable[[str], None]) -> None:
    if not report.soak_picture(out / "bench-hours.png", samples):
        say(report.NO_PICTURE)
    slope = memory_mib_per_h(samples)
    ever = sorted({text.split()[0] for sample in samples for text in sample.drift})
    click.echo(
        f"{len(samples)} samples in {samples[-1].at_s / 3600:.2f} h: memory {report.number(slope, 2)} MiB/h; "
        f"drift at the end: {'; '.join(samples[-1].drift) or 'none'}; ever: {', '.join(ever) or 'none'}"
    )
    if samples[-1].drift:
        sys.exit(1)


def _fresh(file: Path) -> Path:
    """An earlier run's file is kept under another name."""
    if file.exists():
        file.rename(file.with_name(f"{file.stem}-until-{time.strftime('%Y%m%dT%H%M%S')}{file.suffix}"))
    return file


def _facts(model: str, server: str, metadata: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, str]:
    return {
        "model": f"{model} {', '.join(metadata.get('versions') or ())}".strip(),
        "server": server,
        "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}",
        "input": ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in inputs.items()) + ", the same each time",
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "the load generator": "runs on the same machine and takes a share of it",
    }


def _specs(metadata: Mapping[str, Any]) -> list[tuple[str, Datatype, list[int]]]:
    try:
        return [(str(each["name"]), Datatype(each["datatype"]), [int(axis) for axis in each["shape"]]) for each in metadata["inputs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise TheirsError("malformed", f"its metadata cannot be used: {error!r}", where=str(metadata.get("name", ""))) from error


def _shapes(given: tuple[str, ...], metadata: Mapping[str, Any]) -> dict[str, list[int]]:
    names = [name for name, _, _ in _specs(metadata)]
    found = {}
    for text in given:
        name, _, axes = text.rpartition("=")
        name = name or names[0]
        try:
            found[name] = [int(axis) for axis in axes.split(",")]
        except ValueError:
            found[name] = []
        if name not in names or not found[name] or min(found[name]) < 1:
            raise TheirsError("shape", f"{text!r} is no shape of {' or '.join(names)}", where="--shape", remedy="write NAME=1,3,48,160")
    return found


def _drawn(metadata: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> dict[str, Array]:
    """Random values from 0 to 1 for floats, zeros and ones for whole numbers: valid as pixels, flags and indices alike."""
    rng = np.random.default_rng(SEED)
    inputs: dict[str, Array] = {}
    for name, datatype, axes in _specs(metadata):
        shape = shapes.get(name) or [1 if place == 0 and axis < 0 else axis for place, axis in enumerate(axes)]
        free = [place for place, axis in enumerate(shape) if axis < 0]
        fits = len(shape) == len(axes) and all(axis in {-1, shape[place]} for place, axis in enumerate(axes))
        if free or not fits:
            what = f"it has free axes {free}" if free else f"{shape} does not fit"
            raise TheirsError("shape", f"{what}: the model says {axes}", where=f"input {name}", remedy=f"--shape {name}=1,…")
        dtype = DTYPES[datatype]
        inputs[name] = (rng.random(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)).astype(dtype)
    return inputs


def _loaded(file: Path, metadata: Mapping[str, Any]) -> dict[str, Array]:
    try:
        with file.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            return {_specs(metadata)[0][0]: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TheirsError("input", f"not a file of arrays: {error}", where=str(file)) from error
