"""What the driver says of a process, told by a library in its place that is compiled from the same declarations."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from appliance.adapters.inference.nvml import Nvml, open_nvml

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
"""


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


def test_a_machine_without_a_driver_cannot_tell() -> None:
    """No library, no answer, no error."""
    assert Nvml(None)(1) is None
    assert open_nvml()(1) is None  # process 1 computes on no GPU
