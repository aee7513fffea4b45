"""Reads the lines that NVIDIA's `tegrastats` prints, so that a recorded log can be replayed as a board.

1. Three formats are known, told apart by what they hold: Orin Nano (R36.5), AGX Orin with swap and idle cores, Thor (R38.4).
2. Only RAM is always there. SWAP, EMC_FREQ (needs root), GR3D's load, single cores and rails may be absent or `off`.
3. `A/BmW` is power now and on average; `lfb NxMMB` are the N largest free blocks of memory; MB are 1024 x 1024 bytes.
4. A zone outside -50 to 150 degrees is off (a gated one says -256) and left out.
5. Blank lines and lines that begin with # are skipped by `readings`: a made-up log says so there.

Source: recorded lines of each board (docs/rooms/serve.md); NVIDIA publishes no grammar.
"""

import re
from dataclasses import dataclass

from appliance.contract.errors import TheirsError
from appliance.contract.vitals import BoardReading

MIB = 1_048_576
COLDEST_C, HOTTEST_C = -50.0, 150.0


@dataclass(frozen=True, slots=True)
class Core:
    """One processor core: load in percent, clock in MHz."""

    load_percent: int
    clock_mhz: int


@dataclass(frozen=True, slots=True)
class Rail:
    """One power rail in milliwatts."""

    now_mw: int
    average_mw: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One line. A core that is off is None; clocks of the GPU come one per cluster (GPC), 0 for one that is off."""

    at: str
    ram_used_bytes: int
    ram_total_bytes: int
    largest_blocks_bytes: int | None
    swap_used_bytes: int | None
    cores: tuple[Core | None, ...]
    emc_load_percent: int | None
    gpu_load_percent: int | None
    gpu_clocks_mhz: tuple[int, ...]
    temperatures_c: dict[str, float]
    rails: dict[str, Rail]


_AT = re.compile(r"^\d\d-\d\d-\d{4} \d\d:\d\d:\d\d")
_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB(?: \(lfb (\d+)x(\d+)(MB|kB)\))?")
_SWAP = re.compile(r"\bSWAP (\d+)/\d+MB")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_CORE = re.compile(r"(\d+)%@(\d+)|off")
_EMC = re.compile(r"\bEMC_FREQ (\d+)%")
_GPU = re.compile(r"\bGR3D_FREQ (?:(\d+)%)?(?:@(?:\[([\d,]*)\]|(\d+)))?")
_ZONE = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b")
_RAIL = re.compile(r"\b([A-Z]\w*) (\d+)mW/(\d+)mW")


def sample(line: str) -> Sample:
    """Read one line. Raises: TheirsError (`tegrastats`) if it holds no RAM figure, without which it is no reading."""
    ram = _RAM.search(line)
    if not ram:
        raise TheirsError("tegrastats", f"no `RAM used/totalMB` in {line[:60]!r}", remedy="record with `tegrastats --interval 1000`")
    at, swap, emc, gpu = _AT.match(line), _SWAP.search(line), _EMC.search(line), _GPU.search(line)
    clocks = (gpu[2] or gpu[3] or "") if gpu else ""
    return Sample(
        at=at[0] if at else "",
        ram_used_bytes=int(ram[1]) * MIB,
        ram_total_bytes=int(ram[2]) * MIB,
        largest_blocks_bytes=int(ram[3]) * int(ram[4]) * (MIB if ram[5] == "MB" else 1024) if ram[4] else None,
        swap_used_bytes=int(swap[1]) * MIB if swap else None,
        cores=_cores(line),
        emc_load_percent=int(emc[1]) if emc else None,
        gpu_load_percent=int(gpu[1]) if gpu and gpu[1] else None,
        gpu_clocks_mhz=tuple(int(clock) for clock in clocks.split(",") if clock),
        temperatures_c={name: float(value) for name, value in _ZONE.findall(line) if COLDEST_C <= float(value) <= HOTTEST_C},
        rails={name: Rail(int(now), int(average)) for name, now, average in _RAIL.findall(line)},
    )


def reading(seen: Sample) -> BoardReading:
    """What the board would have said; the log does not tell the reasons of throttling, so none are given."""
    fastest_mhz = max(seen.gpu_clocks_mhz, default=0)
    return BoardReading(
        temperatures_c=seen.temperatures_c,
        memory_total_bytes=seen.ram_total_bytes,
        memory_available_bytes=max(0, seen.ram_total_bytes - seen.ram_used_bytes),
        gpu_clock_hz=fastest_mhz * 1e6 if fastest_mhz else None,
        gpu_load=None if seen.gpu_load_percent is None else seen.gpu_load_percent / 100,
        largest_free_block_bytes=seen.largest_blocks_bytes,
    )


def readings(log: str) -> list[BoardReading]:
    """Read a whole log in its order. Raises: TheirsError (`tegrastats`), naming the line, if one cannot be read or none is there."""
    found = []
    for number, line in enumerate(log.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            try:
                found.append(reading(sample(line)))
            except TheirsError as error:
                raise TheirsError(error.reason, error.what, where=f"line {number}", remedy=error.remedy) from error
    if not found:
        raise TheirsError("tegrastats", "the log holds no line", remedy="record with `tegrastats --interval 1000`")
    return found


def _cores(line: str) -> tuple[Core | None, ...]:
    listed = _CPU.search(line)
    if not listed:
        return ()
    return tuple(Core(int(core[1]), int(core[2])) if core[1] else None for core in _CORE.finditer(listed[1]))
