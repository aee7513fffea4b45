"""Measures the machine that it runs on, as board data in the form of `bsp/jetson/profiles/*.toml`.

What is measured, each the best of `REPEATS` on `threads` threads: bytes per second of a large copy (read and written), and fp32
operations per second of a large matrix product, both by numpy. The fixed cost of a call is that of a very small product: a floor for any run-time.
"""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from appliance.core.serve.board import BoardProfile

REPEATS = 5
COPY_BYTES = 128 << 20
"""Several times larger than any cache of these boards."""
SIDE = 1024
GPU_MEMORY_FRACTION = 0.5


def measure(memory_total_bytes: int, name: str) -> BoardProfile:
    """Measure this machine; takes about a second. The thread count is numpy's own (OPENBLAS_NUM_THREADS)."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    small = matrix[:8, :8].copy()
    copy_s = _best(lambda: np.copyto(target, source))
    product_s = _best(lambda: matrix @ matrix)
    call_s = _best(lambda: small @ small)
    return BoardProfile(
        name=name,
        description=f"{_processor()}, {len(os.sched_getaffinity(0))} of its {os.cpu_count()} processors, {platform.system()} {platform.machine()}",
        memory_total_bytes=memory_total_bytes,
        gpu_memory_fraction=GPU_MEMORY_FRACTION,
        shared_memory=True,
        bandwidth_bytes_s=2 * COPY_BYTES / copy_s,
        peak_flops={"fp32": 2.0 * SIDE**3 / product_s},
        efficiency=0.8,
        overhead_s=call_s,
        sources={
            "memory_total_bytes": "read from this machine",
            "gpu_memory_fraction": "chosen: other programs run here too",
            "bandwidth_bytes_s": f"measured: a copy of {COPY_BYTES >> 20} MiB, read and written",
            "peak_flops": f"measured: a product of two {SIDE} x {SIDE} matrices in fp32",
            "efficiency": "assumed: convolutions reach less than one large product",
            "overhead_s": "measured: a very small product; a run-time costs at least that",
        },
    )


def toml(board: BoardProfile, day: str) -> str:
    """The board as a file for `board.profile`, measured on `day`. Units as in the other profiles."""
    lines = [
        f"# Measured on {day} by `appliance check --profile --measure`: one machine's own speed, no maker's figures.",
        "# Units: bytes, bytes/s, operations/s, seconds.",
        f"name = {_quoted(board.name)}",
        f"description = {_quoted(board.description)}",
        f"memory_total_bytes = {board.memory_total_bytes}",
        f"gpu_memory_fraction = {board.gpu_memory_fraction}",
        f"shared_memory = {str(board.shared_memory).lower()}",
        f"bandwidth_bytes_s = {board.bandwidth_bytes_s:.4e}",
        f"efficiency = {board.efficiency}",
        f"overhead_s = {board.overhead_s:.4e}",
        "",
        "[peak_flops]",
        *(f"{precision} = {flops:.4e}" for precision, flops in board.peak_flops.items()),
        "",
        "[sources]",
        *(f"{name} = {_quoted(source)}" for name, source in board.sources.items()),
    ]
    return "\n".join(lines) + "\n"


def _best(work: Callable[[], object]) -> float:
    """The shortest of some runs, in seconds."""
    took = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return min(took)


def _processor() -> str:
    """The name that the processor gives itself; its architecture where the kernel does not tell (ARM)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
