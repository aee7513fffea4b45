"""Installs each peer into a virtual environment of its own under build/peers, at pinned versions; what cannot be installed is told, not hidden.

Run: `python tests/bench/peers/install.py [NAME…]`; a peer whose pins are installed already is skipped. Writes build/peers/NAME.failed if it failed.
"""

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
VENVS = HERE.parents[2] / "build" / "peers"
TIMEOUT_S = 300.0


def install(pins: Path) -> str:
    """Install one peer; returns why not, or nothing."""
    venv, stamp, failed = VENVS / pins.stem, VENVS / pins.stem / ".installed", VENVS / f"{pins.stem}.failed"
    if stamp.exists() and stamp.read_text() == pins.read_text():
        return ""
    failed.unlink(missing_ok=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(pins)]
    try:
        for command in ([sys.executable, "-m", "venv", str(venv)], pip):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        why = (error.stderr or error.stdout).strip()[-400:]
    except (subprocess.TimeoutExpired, OSError) as error:
        why = str(error)
    else:
        stamp.write_text(pins.read_text())
        return ""
    failed.write_text(why)
    return why


def main(names: list[str]) -> None:
    """Install all, or those named; never fails: bench_serve reports what is missing."""
    VENVS.mkdir(parents=True, exist_ok=True)
    for pins in sorted(HERE.glob("*.txt")):
        if not names or pins.stem in names:
            began = time.monotonic()
            why = install(pins)
            sys.stdout.write(f"{pins.stem}: {why or 'installed'} ({time.monotonic() - began:.0f} s)\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
