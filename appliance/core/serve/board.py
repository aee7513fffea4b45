"""What a board can do on paper: the data of `bsp/jetson/profiles/*.toml`, and the roofline that guesses a latency from it.

1. A batch takes the overhead of a call plus the longer of computing and moving: overhead + max(flops x n / reachable peak,
   (weights + activations x n) / bandwidth) (Williams, Waterman, Patterson 2009).
2. It is a first guess. `profile` replaces it by measurement wherever there is one.
3. Every number names its source in the file; what nobody states is derived and says how.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from appliance.contract.errors import TheirsError


class BoardProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of board. FLOPS are dense operations per second (a multiply-add is two), by precision (`fp32`, `fp16`, `int8`).

    Attributes:
        gpu_memory_fraction: how much of the memory models may hold; the rest is for the system, decoders and page cache.
        shared_memory: whether CPU and GPU use the same memory (all Jetsons).
        efficiency: the part of the peak that real convolutional networks reach.
        overhead_s: fixed cost of one call into the runtime.
        power_modes: name to watts, as in nvpmodel; 0 where the mode has no cap.
        sources: for each number, or group of numbers, where it is from.
    """

    name: str
    description: str
    memory_total_bytes: int
    gpu_memory_fraction: float
    shared_memory: bool
    bandwidth_bytes_s: float
    peak_flops: dict[str, float]
    efficiency: float
    overhead_s: float
    sources: dict[str, str]
    power_modes: dict[str, float] = {}

    def __post_init__(self) -> None:
        """Refuse numbers outside their range; msgspec reports it as a validation error."""
        positive = [self.memory_total_bytes, self.bandwidth_bytes_s, self.overhead_s, self.efficiency, *self.peak_flops.values()]
        if min(positive) <= 0 or not self.peak_flops:
            raise ValueError("memory, bandwidth, overhead, efficiency and at least one peak must be above 0")
        if not (self.efficiency <= 1 and 0 < self.gpu_memory_fraction <= 1):
            raise ValueError("efficiency and gpu_memory_fraction must be at most 1")

    @property
    def memory_budget_bytes(self) -> int:
        """What all models together may hold."""
        return int(self.memory_total_bytes * self.gpu_memory_fraction)


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """What one model asks of a board: operations and moved bytes per sample, weights once per batch."""

    flops: float
    weight_bytes: float
    activation_bytes: float
    precision: str = "fp32"


def parse_board(data: Mapping[str, Any], where: str) -> BoardProfile:
    """Turn a parsed TOML file into a profile; `where` names the file. Raises: TheirsError (`board_profile`)."""
    try:
        return msgspec.convert(data, BoardProfile)
    except msgspec.ValidationError as error:
        raise TheirsError("board_profile", str(error), where=where, remedy="compare with bsp/jetson/profiles/generic-x86.toml") from error


def roofline_s(board: BoardProfile, cost: ModelCost, samples: int) -> float:
    """Guess the seconds for one batch. A precision that the board does not list runs at its slowest listed peak."""
    peak = board.peak_flops.get(cost.precision, min(board.peak_flops.values())) * board.efficiency
    computing = cost.flops * samples / peak
    moving = (cost.weight_bytes + cost.activation_bytes * samples) / board.bandwidth_bytes_s
    return board.overhead_s + max(computing, moving)


def bound_by(board: BoardProfile, cost: ModelCost, samples: int) -> str:
    """Which roof the guess touches: `overhead`, `compute` or `memory`."""
    peak = board.peak_flops.get(cost.precision, min(board.peak_flops.values())) * board.efficiency
    parts = {
        "overhead": board.overhead_s,
        "compute": cost.flops * samples / peak,
        "memory": (cost.weight_bytes + cost.activation_bytes * samples) / board.bandwidth_bytes_s,
    }
    return max(parts, key=lambda part: parts[part])
