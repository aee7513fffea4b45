"""65,536 attestations with restarts of device and region at any step: nothing leaks, memory stays flat. Writes build/reports/trust.json.

The real loops of both sides run on a paper TPM for all of them, and on a software TPM (swtpm) for as many as fit in SWTPM_S seconds.

    python tests/bench/bench_attestations.py [count | refusals]

`refusals` only runs the tests of the refusal table (docs/rooms/trust.md) and counts its rows.
"""

import asyncio
import json
import logging
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TSS2_LOG", "all+none")

import structlog  # noqa: E402

from appliance.adapters.tpm import EsysTpm  # noqa: E402
from appliance.adapters.tpm.objects import handles  # noqa: E402
from appliance.contract.errors import WorldError  # noqa: E402
from appliance.lab import softtpm  # noqa: E402
from tests.fakes.paper_region import PaperSite  # noqa: E402
from tests.fakes.soft_tpm import Software  # noqa: E402

COUNT = 65_536
SWTPM_S = 100.0
REPORT = ROOT / "build/reports/trust.json"
WARM = 2_048


class Fate:
    """Restarts and losses at random steps of the exchange. One in 32 asks restarts the region before it answers, one in 64 loses the answer."""

    def __init__(self, site: PaperSite, seed: int) -> None:
        self.site = site
        self.rng = random.Random(seed)
        self.restarts = {"region": 0, "device": 0, "power": 0}
        self.lost = 0

    async def bend(self, _word: str, payload: bytes, ask: Any) -> bytes:
        """Stand between device and region."""
        chance = self.rng.random()
        if chance < 1 / 32:
            self.restarts["region"] += 1
            self.site.restart_region()
        answer: bytes = await ask(payload)
        if chance > 1 - 1 / 64:
            self.lost += 1
            raise WorldError("timeout", "no answer")
        return answer

    async def between(self) -> None:
        """Between two rounds: one in 64 restarts the device's daemon, one in 256 cuts its power."""
        chance = self.rng.random()
        if chance < 1 / 256 and hasattr(self.site.port, "reboot"):
            self.restarts["power"] += 1
            self.site.port.reboot()
        if chance < 1 / 64:
            self.restarts["device"] += 1
            self.site.restart_device()
            await self.site.boot()


def say(text: str) -> None:
    """One line, now."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def rss_kib() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


async def paper(count: int) -> dict[str, object]:
    """All of them on paper."""
    site = PaperSite(reattest_s=10.0)
    fate = Fate(site, 1)
    site.wire.bend = fate.bend
    good = failed = 0
    memory: list[int] = []
    began, cpu = time.perf_counter(), time.process_time()
    while good + failed < count:
        await fate.between()
        before = site.port.unsealed.count("session")
        await site.round()
        good += site.port.unsealed.count("session") - before
        failed += site.port.unsealed.count("session") == before
        site.port.unsealed.clear()
        site.wait(10.0)
        await site.tick()
        if (good + failed) % WARM == 0:
            memory.append(rss_kib())
            say(f"  {good + failed:6d} of {count}: {memory[-1]} KiB, {len(site.port.sessions)} sessions")
    settled = memory[1] if len(memory) > 1 else memory[-1]
    return {
        "attestations": good + failed,
        "good": good,
        "interrupted": failed,
        "answers_lost": fate.lost,
        "restarts": fate.restarts,
        "sessions_at_most": site.port.most_sessions,
        "sessions_left": len(site.port.sessions),
        "files_of_the_device": len(site.kept.files),
        "files_of_the_region": len(site.records.files),
        "rss_kib_settled": settled,
        "rss_kib_end": memory[-1],
        "rss_growth_bytes_each": round((memory[-1] - settled) * 1024 / max(1, count - 2 * WARM), 2),
        "cpu_ms_each": round((time.process_time() - cpu) * 1e3 / count, 3),
        "wall_s": round(time.perf_counter() - began, 1),
    }


async def software(seconds: float) -> dict[str, object]:
    """As many as fit on swtpm, restarts of daemon and region included; power cuts of the TPM are tests/adapters/test_tpm_refusals.py's."""
    chip = Software()
    chip.start()
    try:
        site = PaperSite(reattest_s=10.0)
        tpm = EsysTpm(chip.tcti)
        await chip.boot(tpm)
        return await _software(site, tpm, chip, seconds)
    finally:
        chip.cut()
        shutil.rmtree(chip.state)


async def _software(site: PaperSite, tpm: EsysTpm, chip: Software, seconds: float) -> dict[str, object]:
    from dataclasses import replace  # noqa: PLC0415 - beside its use

    policy = replace(site.authorities.policy, allowed={}, trust_on_first_use=True, allow_zero_anchor=True)
    site.authorities = replace(site.authorities, policy=policy, ek_roots=tuple(softtpm.roots(chip.state)))
    site.port = tpm  # type: ignore[assignment]  # the real one
    tpm.sessions = {}  # type: ignore[attr-defined]  # what the paper site clears at a restart
    site.clock.wall = time.time  # type: ignore[method-assign]  # certificates are of today
    site.restart_region()
    site.restart_device()
    fate = Fate(site, 2)
    site.wire.bend = fate.bend
    good = rounds = most = 0
    memory: list[tuple[int, int]] = []
    end, began = time.monotonic() + seconds, time.perf_counter()
    assert chip.process
    status = Path(f"/proc/{chip.process.pid}/status")
    while time.monotonic() < end:
        await fate.between()
        await site.round()
        rounds += 1
        good += not site.trusting._attester.waiting
        site.clock.now += 10.0
        if rounds % 64 == 0:
            most = max(most, len(await tpm._run(handles)))
            memory.append((rss_kib(), _resident(status)))
    left = len(await tpm._run(handles))
    await tpm.close()
    settled = memory[min(1, len(memory) - 1)] if memory else (0, 0)
    return {
        "attestations": rounds,
        "good": good,
        "restarts": fate.restarts,
        "answers_lost": fate.lost,
        "handles_at_most": most,
        "handles_left": left,
        "rss_kib": [settled[0], memory[-1][0] if memory else 0],
        "swtpm_rss_kib": [settled[1], memory[-1][1] if memory else 0],
        "ms_each": round((time.perf_counter() - began) * 1e3 / max(rounds, 1), 2),
    }


def _resident(status: Path) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", status.read_text())
    return int(found[1]) if found else 0


def refusals() -> dict[str, object]:
    """The rows of the refusal table, and how its tests went."""
    table = (ROOT / "docs/rooms/trust.md").read_text().split("### What is refused", 1)[1].split("###", 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    tests = [
        "tests/adapters/test_tpm.py",
        "tests/adapters/test_tpm_refusals.py",
        "tests/adapters/test_tpm_provision.py",
        "tests/core/trust",
    ]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        subprocess.run([sys.executable, "-m", "pytest", *tests, f"--junitxml={result}"], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        counts = re.search(r'errors="(\d+)" failures="(\d+)" skipped="(\d+)" tests="(\d+)"', result.read_text())
    assert counts
    errors, failures, skipped, total = map(int, counts.groups())
    return {"rows": len(rows), "tests": total, "failed": errors + failures, "skipped": skipped}


def merge(key: str, value: object) -> None:
    """Put one key into the report; the others stay."""
    report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    report[key] = value
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    say(json.dumps({key: value}, indent=1))


def main() -> None:
    """Run, print, and merge into the report."""
    if sys.argv[1:] == ["refusals"]:
        merge("refusals", refusals())
        return
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    say(f"{count} attestations on a paper TPM")
    found = {"paper": asyncio.run(paper(count))}
    say(f"{SWTPM_S:.0f} s of attestations on swtpm")
    found["swtpm"] = asyncio.run(software(SWTPM_S))
    merge("attestations", {**found, "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"})
    merge("refusals", refusals())
    paper_run, swtpm_run = found["paper"], found["swtpm"]
    assert paper_run["sessions_left"] == 0 or paper_run["sessions_at_most"] == 1
    assert swtpm_run["handles_left"] in {0, 1}, "a session or an object leaked"


if __name__ == "__main__":
    main()
