"""What the driver says of a process and of a device's memory, told by a library in its place that is compiled from the same declarations."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from appliance.adapters.nvml import Nvml, NvmlBoard, open_nvml
from appliance.contract.vitals import BoardReading

SOURCE = """
typedef struct { unsigned int pid; unsigned long long usedGpuMemory; unsigned int gpuInstanceId; unsigned int computeInstanceId; } info;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { *device = (void *)(unsigned long)(index + 1); return index == 1 ? 2 : 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, info *infos) {
    infos[0] = (info){10, 1ull << 33, 0, 0};
    infos[1] = (info){11, device == (void *)1 ? 5 : 7, 0, 0};
    infos[2] = (info){12, ~0ull, 0, 0};
    *count = 3;
    return 0;
}
typedef struct { unsigned long long total, free, used; } memory;
int refused = 0;
int nvmlDeviceGetMemoryInfo(void *device, memory *memory) {
    memory->total = device == (void *)1 ? 80ull << 30 : 24ull << 30;
    memory->free = device == (void *)1 ? 60ull << 30 : 720ull << 20;
    memory->used = 7;
    return refused;
}
"""
NOT_SUPPORTED = 3
GIB = 1 << 30


class Plain:
    """A board that says what it is told to say."""

    def __init__(self, **words: Any) -> None:
        self.reading = BoardReading({}, 8 * GIB, 6 * GIB, **words)

    def read(self) -> BoardReading:
        return self.reading


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder: Path = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libnvml.so", folder / "nvml.c"], check=True)
    return ctypes.CDLL(str(folder / "libnvml.so"))


@pytest.mark.parametrize(
    ("pid", "held"), [(10, 2 << 33), (11, 12), (12, None), (13, None)], ids=["large", "two GPUs", "not counted", "none"]
)
def test_the_bytes_of_a_process_are_summed_over_gpus(library: Any, pid: int, held: int | None) -> None:
    """Sizes beyond 32 bits arrive whole, a GPU that does not open is left out, and what is not counted is None, not zero."""
    assert Nvml(library)(pid) == held


def test_the_fullest_gpu_is_the_boards(library: Any) -> None:
    """Held is the total less what is free, whatever the driver counts as used; 97 % of 24 GiB are fuller than 25 % of 80."""
    reading = NvmlBoard(Plain(), Nvml(library)).read()
    assert (reading.gpu_memory_used_bytes, reading.gpu_memory_total_bytes) == (24 * GIB - (720 << 20), 24 * GIB)
    assert (reading.memory_total_bytes, reading.memory_available_bytes) == (8 * GIB, 6 * GIB)


def test_a_board_that_reads_its_gpu_itself_is_believed(library: Any) -> None:
    """NvMap's bytes on a Jetson stay what they are: memory that is shared."""
    board = Plain(gpu_memory_used_bytes=5)
    assert NvmlBoard(board, Nvml(library)).read() == board.reading


def test_a_driver_that_refuses_leaves_the_reading_as_it_is(library: Any) -> None:
    """Shared memory is not supported by this call, and a GPU can be lost: no number, never zero."""
    refused = ctypes.c_int.in_dll(library, "refused")
    refused.value = NOT_SUPPORTED
    try:
        assert NvmlBoard(Plain(), Nvml(library)).read() == Plain().reading
    finally:
        refused.value = 0


def test_a_machine_without_a_driver_cannot_tell() -> None:
    """No library, no answer, no error."""
    assert Nvml(None)(1) is None
    assert NvmlBoard(Plain(), Nvml(None)).read() == Plain().reading
    assert open_nvml()(1) is None  # process 1 computes on no GPU
