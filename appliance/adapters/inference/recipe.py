"""How a child process is made: its command, its environment, its two descriptors."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from appliance.adapters.inference.backend import Options
from appliance.adapters.inference.limits import Limits

_ROOT = str(Path(__file__).parents[3])
_ENVIRONMENT = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime >= 1.29 else reports models' names and hashes to its maker, and keeps a database in ~/.cache
    "OMP_NUM_THREADS": "1",  # numpy must not start thread pools of its own
    "OPENBLAS_NUM_THREADS": "1",
    # The C library keeps what a batch frees for the next one (else it returns and faults in again up to 23 MB per batch of the label reader,
    # 2 % of its time) until the child rests and trims by itself. The first value is the largest that glibc takes.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all children of a pool have in common; `command` gets the arguments of `child.main` appended."""

    limits: Limits = field(default_factory=Limits)
    threads: int = 1
    options: Options = field(default_factory=Options)
    command: Sequence[str] = (sys.executable, "-P", "-m", "appliance.adapters.inference.child")


def start(fd: int, recipe: Recipe) -> tuple[subprocess.Popen[bytes], int]:
    """Start a child on a socket's descriptor, without its daemon's standard streams but stderr; return it and its pidfd. Raises: OSError."""
    search = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search} | _ENVIRONMENT
    command = [*recipe.command, str(fd), str(os.getpid()), str(recipe.threads), str(recipe.limits.rest_s)]
    popen = subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    try:
        return popen, os.pidfd_open(popen.pid)
    except OSError:
        popen.kill()
        popen.wait()
        raise
