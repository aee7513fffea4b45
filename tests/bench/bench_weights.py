"""What opening weights costs beside reading and hashing the same file: MiB per CPU-second, and peak memory at two sizes.

Run: `python tests/bench/bench_weights.py [MIB]`; writes build/reports/weights.json. Each measurement is a process of its own; they alternate, and the
best of `ROUNDS` is reported, because the machine is shared. Peak memory is the process's own (`VmHWM`); the memfd holds the model besides.
`opening` checks root, tags and the plaintext's SHA-256; `opening_root_only` leaves the last out, which is the only difference.
"""

import hashlib
import json
import os
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
REPORT = HERE.parents[2] / "build" / "reports" / "weights.json"
KEY, SALT = bytes(32), bytes(range(32))
ROUNDS = 5
SMALL_MIB = 16
READ = 1 << 20


def read_and_hash(folder: Path) -> None:
    """The yardstick: read the container in pieces of 1 MiB and hash it."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ))
    with (folder / "model.aem").open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])


def opening(folder: Path, *, check_plaintext: bool = True) -> None:
    """Open the container into a memfd."""
    artifact = msgspec.json.decode((folder / "artifact.json").read_bytes(), type=CompiledArtifact)
    os.close(Sealed(check_plaintext=check_plaintext).open(str(folder / "model.aem"), artifact, KEY))


def sealing(folder: Path) -> None:
    """Encrypt the model into a container."""
    seal(folder / "model", folder / "again.aem", KEY, SALT)


WORKS: dict[str, Callable[[Path], None]] = {
    "read_sha256": read_and_hash,
    "opening": opening,
    "opening_root_only": lambda folder: opening(folder, check_plaintext=False),
    "sealing": sealing,
}


def child(work: str, folder: Path) -> None:
    """Do one work and print its CPU seconds, wall seconds and the peak memory in KiB."""
    began, wall = time.process_time(), time.perf_counter()
    WORKS[work](folder)
    spent, lasted = time.process_time() - began, time.perf_counter() - wall
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    sys.stdout.write(f"{spent} {lasted} {peak}\n")


def measure(work: str, folder: Path) -> tuple[float, float, float]:
    """Run one work in a process of its own; seconds of CPU, seconds, peak MiB."""
    done = subprocess.run([sys.executable, str(HERE), "--child", work, str(folder)], check=True, capture_output=True, text=True)
    spent, lasted, peak = map(float, done.stdout.split())
    return spent, lasted, peak / 1024


def prepare(folder: Path, mib: int) -> Path:
    """Write and seal a model of random bytes."""
    folder.mkdir()
    with (folder / "model").open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    artifact = seal(folder / "model", folder / "model.aem", KEY, SALT)
    (folder / "artifact.json").write_bytes(msgspec.json.encode(artifact))
    return folder


def main(mib: int) -> None:
    """Measure, print and write the report."""
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/var/tmp") as scratch:
        large, small = prepare(Path(scratch) / "large", mib), prepare(Path(scratch) / "small", SMALL_MIB)
        runs = [{work: measure(work, large) for work in WORKS} for _ in range(ROUNDS)]
        small_peak = measure("opening", small)[2]
    report: dict[str, float] = {"mib": mib, "rounds": ROUNDS}
    for work in WORKS:
        report[f"{work}_mib_per_cpu_s"] = round(mib / min(run[work][0] for run in runs), 1)
        report[f"{work}_mib_per_s"] = round(mib / min(run[work][1] for run in runs), 1)
        report[f"{work}_peak_mib"] = round(max(run[work][2] for run in runs), 1)
    yardstick = report["read_sha256_mib_per_cpu_s"]
    report["opening_over_read_sha256"] = round(report["opening_mib_per_cpu_s"] / yardstick, 3)
    report["opening_root_only_over_read_sha256"] = round(report["opening_root_only_mib_per_cpu_s"] / yardstick, 3)
    report["opening_peak_mib_at_16"] = round(small_peak, 1)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(REPORT.read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
