"""Lives through thousands of seeded fleets on virtual time, on all cores, and counts broken promises.

Run: `python tests/bench/bench_simulation.py [--seeds 2000] [--from 1]`; writes build/reports/simulation.json. A failing seed prints one line with the command
that replays it and the end of its trace. `--replay SEED [--bug NAME]` shows one seed's whole trace.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path

import click

from appliance.lab.simstore import Bug
from appliance.lab.simulation import Outcome, simulate

REPORT = Path(__file__).parents[2] / "build" / "reports" / "simulation.json"
CHUNK = 25
TAIL = 40
SELF = "python tests/bench/bench_simulation.py"


def lived(seeds: range) -> list[Outcome]:
    """Live through some seeds; garbage is collected between them only."""
    gc.disable()
    outcomes = [simulate(seed, tail=TAIL) for seed in seeds]
    gc.collect()
    return outcomes


def replay(seed: int, bugs: tuple[Bug, ...]) -> int:
    """Show one seed."""
    outcome = simulate(seed, bugs, tail=1_000_000)
    click.echo("\n".join(outcome.tail))
    click.echo(f"seed {seed}: digest {outcome.digest}, {outcome.virtual_s:.0f} s, broken: {list(outcome.broken) or 'nothing'}")
    return bool(outcome.broken)


def batch(first: int, count: int) -> int:
    """Run many, report, and return how many are broken."""
    chunks = [range(at, min(at + CHUNK, first + count)) for at in range(first, first + count, CHUNK)]
    faults: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    broken, virtual_s, steps, began = [], 0.0, 0, time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for outcome in (each for chunk in pool.imap(lived, chunks) for each in chunk):
            faults.update(outcome.faults)
            seen.update(outcome.seen)
            virtual_s += outcome.virtual_s
            steps += outcome.steps
            if outcome.broken:
                broken.append({"seed": outcome.seed, "what": outcome.broken})
                click.echo(f"BROKEN seed {outcome.seed}: {outcome.broken[0]}; replay: {SELF} --replay {outcome.seed}")
                click.echo("\n".join(f"  {line}" for line in outcome.tail))
    seconds = time.perf_counter() - began
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "first_seed": first,
        "seeds": count,
        "seconds": round(seconds, 1),
        "seeds_per_minute": round(60 * count / seconds),
        "virtual_hours": round(virtual_s / 3_600, 1),
        "steps": steps,
        "faults": dict(sorted(faults.items())),
        "seen": dict(seen),
        "broken": len(broken),
        "broken_seeds": broken,
    }
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(
        f"{count} seeds, {virtual_s / 3_600:.0f} h of virtual time in {seconds:.0f} s, {sum(faults.values())} faults, {len(broken)} broken"
    )
    return len(broken)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2_000)
    parser.add_argument("--from", type=int, default=1, dest="first")
    parser.add_argument("--replay", type=int)
    parser.add_argument("--bug", type=Bug, choices=list(Bug), action="append", default=[])
    asked = parser.parse_args()
    return replay(asked.replay, tuple(asked.bug)) if asked.replay is not None else int(batch(asked.first, asked.seeds) > 0)


if __name__ == "__main__":
    sys.exit(main())
