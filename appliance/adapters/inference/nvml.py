"""What a process holds on the GPU, as the driver counts it (NVML, read through its C library: no package, no `nvidia-smi`).

1. It answers None wherever nobody can tell: no driver, no such call (Orin has no NVML), a GPU that does not count (vGPU, MIG), another pid namespace.
2. Struct and names are those of nvml.h since CUDA 11.1 (`nvmlProcessInfo_t`, `..._v3`); the calls take some 0.1 to 1 ms.
"""

import ctypes
from typing import Any

_SUCCESS = 0
_NOT_AVAILABLE = (1 << 64) - 1
"""What the driver says instead of a size where it does not count (NVML_VALUE_NOT_AVAILABLE)."""
_PROCESSES = 64
_LIBRARY = "libnvidia-ml.so.1"


class _ProcessInfo(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """Bytes by process on all GPUs of this machine; call it with a pid. `library` is the loaded C library, None where there is none."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._devices: list[ctypes.c_void_p] = []
        if library is not None and library.nvmlInit_v2() == _SUCCESS:
            count = ctypes.c_uint(0)
            library.nvmlDeviceGetCount_v2(ctypes.byref(count))
            for index in range(count.value):
                device = ctypes.c_void_p()
                if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) == _SUCCESS:
                    self._devices.append(device)

    def __call__(self, pid: int) -> int | None:
        """The bytes that a process holds on all GPUs together; None if nobody can tell."""
        found = [used for device in self._devices for used in self._used(device, pid)]
        return sum(found) if found else None

    def _used(self, device: ctypes.c_void_p, pid: int) -> list[int]:
        count, processes = ctypes.c_uint(_PROCESSES), (_ProcessInfo * _PROCESSES)()
        status = self._library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), processes)
        if status != _SUCCESS:
            return []
        return [int(one.used) for one in processes[: min(count.value, _PROCESSES)] if one.pid == pid and one.used != _NOT_AVAILABLE]


def open_nvml() -> Nvml:
    """Load the driver's library where there is one."""
    try:
        library: Any = ctypes.CDLL(_LIBRARY)
        library.nvmlDeviceGetComputeRunningProcesses_v3  # noqa: B018  (an older driver lacks it: AttributeError)
    except (OSError, AttributeError):
        library = None
    return Nvml(library)
