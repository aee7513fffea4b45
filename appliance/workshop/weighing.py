"""Weighs a model file: time of one sample on one thread, and by how much loading it grows a process.

1. Time is CPU time of the thread that runs the model: on one thread that is what a caller waits on an idle machine, and a busy one does not
   change it much. Median of `rounds` runs.
2. A variant runs in turn with the full model, so that both see the same minutes; what is reported is the median of the pairs' ratios,
   and milliseconds that keep this ratio to the full model's.
3. Memory is the growth of PSS (`/proc/self/smaps_rollup`) of a fresh process from onnxruntime imported to the model loaded and run once. Left out is what is not the model's: pages of
   files (onnxruntime's own code, whose share moves with other processes that map it), and what the allocator keeps for later. What is left
   comes out the same to 1 % from run to run.
"""

import contextlib
import ctypes
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from appliance.contract.errors import WorldError
from appliance.contract.inference import Array
from appliance.workshop import graphs

_CHILD_TIMEOUT_S = 300.0
_WARM = 3


def pairs_ms(full: Any, variant: Any, full_sample: Mapping[str, Array], rounds: int) -> tuple[list[float], float]:
    """Run two sessions in turn on one sample; return the full model's times in milliseconds, and the variant's share of them.

    Raises: TheirsError (`samples`) if one of them does not run.
    """
    for opened in (full, variant):
        for _ in range(_WARM):
            graphs.answers(opened, full_sample)
    times = [(_once_ms(full, full_sample), _once_ms(variant, full_sample)) for _ in range(rounds)]
    return [first for first, _ in times], statistics.median(second / first for first, second in times)


def growth_bytes(path: Path, sample: Mapping[str, Array]) -> int:
    """Return by how many bytes loading and running a model once grows a fresh process, at least 1. Raises: WorldError (`child`)."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(sample)
    np.savez(buffer, **arrays)
    command = [sys.executable, "-m", __name__, str(path)]
    try:
        done = subprocess.run(command, input=buffer.getvalue(), capture_output=True, check=True, timeout=_CHILD_TIMEOUT_S)
        return int(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        told = getattr(error, "stderr", None) or b""
        last = told.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        raise WorldError("child", f"the process that weighs it failed: {last[0]}", where=str(path)) from error


def _once_ms(opened: Any, sample: Mapping[str, Array]) -> float:
    began = time.thread_time()
    graphs.answers(opened, sample)
    return (time.thread_time() - began) * 1e3


def _pss_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    sizes = {name: int(size.split()[0]) * 1024 for name, size in (line.split(":", 1) for line in lines[1:])}
    return sizes["Pss"] - sizes.get("Pss_File", 0)


def main() -> None:
    """The fresh process: a sample comes on stdin as .npz, the growth goes to stdout."""
    sample = dict(np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False))
    graphs.runtime()
    before = _pss_bytes()
    opened = graphs.session(Path(sys.argv[1]))
    graphs.answers(opened, sample)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later comes and goes by megabytes, and is not the model's
    sys.stdout.write(f"{max(1, _pss_bytes() - before)}\n")


if __name__ == "__main__":
    main()
