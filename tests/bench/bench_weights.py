"""What opening weights costs beside reading and hashing the same file: MiB per CPU-second, and peak memory at two sizes.

Run: `python tests/bench/bench_weights.py [MIB]`; writes build/reports/weights.json, and what trust is asked for into build/reports/trust.json.
Each measurement is a process of its own; they alternate, and the best of `ROUNDS` is reported, because the machine is shared. All read the same
container from the page cache, and each has done its work once before the clock starts. Peak memory is the process's own (`VmHWM`); the memfd holds
the model besides.

`opening` is what the daemon does each time that a model or a worker starts: it has one `Sealed`, and has opened every model once when it took up
the release (`appliance.edge.changing`). `first_opening` is that once (here a new `Sealed` each time), with the plaintext's SHA-256;
`opening_root_only` checks root and tags alone. An opening ends when the descriptor is returned; what the kernel takes to free that memory one day is
told as `closing`.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from appliance.adapters.sealed import Sealed, seal
from appliance.contract.models import CompiledArtifact

HERE = Path(__file__)
REPORTS = HERE.parents[2] / "build" / "reports"
KEY, SALT = bytes(32), bytes(range(32))
ROUNDS = 9
SMALL_MIB = 16
READ = 1 << 20
Work = Callable[[], int | None]
"""What is measured; returns a descriptor, if it made one."""


def read_and_hash(folder: Path) -> Work:
    """The yardstick: read the container in pieces of 1 MiB and hash it."""

    def work() -> None:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(READ))
        with (folder / "model.aem").open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])

    return work


def opening(folder: Path, weights: Callable[[], Sealed]) -> Work:
    """Open the container into a memfd."""
    artifact = msgspec.json.decode((folder / "artifact.json").read_bytes(), type=CompiledArtifact)
    return lambda: weights().open(str(folder / "model.aem"), artifact, KEY)


def daemons(folder: Path) -> Work:
    """Open with one `Sealed` for the life of the process, as a daemon does."""
    weights = Sealed()
    return opening(folder, lambda: weights)


def sealing(folder: Path) -> Work:
    """Encrypt the model into a container."""

    def work() -> None:
        seal(folder / "model", folder / "again.aem", KEY, SALT)

    return work


WORKS: dict[str, Callable[[Path], Work]] = {
    "read_sha256": read_and_hash,
    "opening": daemons,
    "first_opening": lambda folder: opening(folder, Sealed),
    "opening_root_only": lambda folder: opening(folder, lambda: Sealed(check_plaintext=False)),
    "sealing": sealing,
}


def child(name: str, folder: Path) -> None:
    """Do one work twice and measure the second time; print its CPU seconds, wall seconds, the CPU seconds of closing what it opened, and the peak memory in KiB."""
    work = WORKS[name](folder)
    _close(work())
    began, wall = time.process_time(), time.perf_counter()
    descriptor = work()
    spent, lasted = time.process_time() - began, time.perf_counter() - wall
    began = time.process_time()
    _close(descriptor)
    closing = time.process_time() - began
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    sys.stdout.write(f"{spent} {lasted} {closing} {peak}\n")


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def measure(name: str, folder: Path) -> tuple[float, float, float, float]:
    """Run one work in a process of its own; seconds of CPU, seconds, seconds of CPU for closing, peak MiB."""
    done = subprocess.run([sys.executable, str(HERE), "--child", name, str(folder)], check=True, capture_output=True, text=True)
    spent, lasted, closing, peak = map(float, done.stdout.split())
    return spent, lasted, closing, peak / 1024


def prepare(folder: Path, mib: int) -> Path:
    """Write and seal a model of random bytes."""
    folder.mkdir()
    with (folder / "model").open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    artifact = seal(folder / "model", folder / "model.aem", KEY, SALT)
    (folder / "artifact.json").write_bytes(msgspec.json.encode(artifact))
    return folder


def summary(mib: int, runs: list[dict[str, tuple[float, float, float, float]]]) -> dict[str, float]:
    """The best of each work, and its throughput by the yardstick's; the median of the rounds' own ratios shows how steady that is."""
    report: dict[str, float] = {"mib": mib, "rounds": len(runs)}
    best = {name: min(run[name][0] for run in runs) for name in WORKS}
    for name in WORKS:
        report[f"{name}_mib_per_cpu_s"] = round(mib / best[name], 1)
        report[f"{name}_mib_per_s"] = round(mib / min(run[name][1] for run in runs), 1)
        report[f"{name}_peak_mib"] = round(max(run[name][3] for run in runs), 1)
    for name in ("opening", "first_opening", "opening_root_only"):
        report[f"{name}_over_read_sha256"] = round(best["read_sha256"] / best[name], 3)
    report["opening_over_read_sha256_median"] = round(statistics.median(run["read_sha256"][0] / run["opening"][0] for run in runs), 3)
    report["closing_mib_per_cpu_s"] = round(mib / min(run["opening"][2] for run in runs), 1)
    with_closing = min(run["opening"][0] + run["opening"][2] for run in runs)
    report["opening_and_closing_over_read_sha256"] = round(best["read_sha256"] / with_closing, 3)
    return report


def write(name: str, figures: dict[str, float]) -> None:
    """Merge figures into a report."""
    path = REPORTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | figures, indent=1) + "\n")


def main(mib: int) -> None:
    """Measure, print and write both reports."""
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/var/tmp") as scratch:
        large, small = prepare(Path(scratch) / "large", mib), prepare(Path(scratch) / "small", SMALL_MIB)
        runs = [{name: measure(name, large) for name in WORKS} for _ in range(ROUNDS)]
        small_peak = max(measure("opening", small)[3] for _ in range(ROUNDS))
    report = summary(mib, runs) | {f"opening_peak_mib_at_{SMALL_MIB}": round(small_peak, 1)}
    (REPORTS / "weights.json").unlink(missing_ok=True)
    write("weights.json", report)
    asked = ("opening_over_read_sha256", "first_opening_over_read_sha256", "opening_peak_mib", f"opening_peak_mib_at_{SMALL_MIB}")
    write("trust.json", {name: report[name] for name in asked})
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
