"""The lab as an operator sees it: two at once, and nothing left however it ends."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("bundle")]


def start(state: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "appliance", "lab", "--state", str(state), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left(state: Path) -> list[str]:
    """Command lines of processes that belong to this lab."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if (str(state) + "/") in line or f"HOME={state}/".encode() in environment:
                found.append(line)
    return found


def wait_for_log(state: Path, word: str, within_s: float = 60.0) -> None:
    log, end = state / "log" / "dev-001.log", time.monotonic() + within_s
    while not (log.exists() and word in log.read_text()):
        assert time.monotonic() < end, f"{word} is not in {log}"
        time.sleep(0.1)


def test_a_taken_directory_is_replaced_and_a_killed_lab_leaves_no_process() -> None:
    """A second lab takes the next directory; SIGKILL of the first ends all its processes, SIGINT of the second ends it in order."""
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as folder:
        state, other = Path(folder) / "lab", Path(folder) / "lab-2"
        first = start(state)
        wait_for_log(state, "model_mounted")
        second = start(state)
        wait_for_log(other, "model_mounted")
        assert left(state)

        first.kill()
        first.communicate()
        end = time.monotonic() + 5
        while left(state) and time.monotonic() < end:
            time.sleep(0.1)
        assert left(state) == []

        time.sleep(3)
        second.send_signal(signal.SIGINT)
        output, _ = second.communicate(timeout=30)
        assert "Traceback" not in output
        assert "labels read" in output
        assert second.returncode == 0, output
        assert left(other) == []


def test_a_short_run_reports_and_removes() -> None:
    """RUN_FOR ends by itself with exit code 0 and figures; --remove leaves no directory."""
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as folder:
        state = Path(folder) / "lab"
        ran = start(state, "--run-for", "12", "--remove")
        output, _ = ran.communicate(timeout=90)
        assert ran.returncode == 0, output
        assert not state.exists()
        figures = json.loads((ROOT / "build/reports/run.json").read_text())
        assert figures["labels"] > 50
        assert figures["differing"] == figures["failed"] == 0
        assert {"exact", "p50_ms", "p99_ms", "rotations"} <= figures.keys()
