"""What the driver says of GPUs with a memory of their own (NVML, read through its C library: no package, no `nvidia-smi`).

1. It answers None wherever nobody can tell: no driver, no such call (Orin has no NVML), memory that is shared with the CPU (it is not supported
   there), a GPU that does not count by process (vGPU, MIG), another pid namespace.
2. Structs and names are those of nvml.h since CUDA 11.1 (`nvmlProcessInfo_t`, `..._v3`; `nvmlMemory_t`); the calls take some 0.1 to 1 ms.
3. A device holds its total less what is free: what the driver keeps and what other programs hold cannot be had either.
4. Of several GPUs the fullest one is the board's: which one CUDA gives to a process is not known here.
"""

import ctypes
from dataclasses import replace
from typing import Any

from appliance.contract.vitals import BoardReading
from appliance.ports import Board

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


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


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

    def fullest(self) -> tuple[int, int] | None:
        """The bytes that are held on the fullest GPU, and its total (rules 3 and 4); None if nobody can tell."""
        found = [
            (memory.total - memory.free, memory.total) for memory in map(self._memory, self._devices) if 0 < memory.total < _NOT_AVAILABLE
        ]
        return max(found, key=lambda one: one[0] / one[1], default=None)

    def _used(self, device: ctypes.c_void_p, pid: int) -> list[int]:
        count, processes = ctypes.c_uint(_PROCESSES), (_ProcessInfo * _PROCESSES)()
        status = self._library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), processes)
        if status != _SUCCESS:
            return []
        return [int(one.used) for one in processes[: min(count.value, _PROCESSES)] if one.pid == pid and one.used != _NOT_AVAILABLE]

    def _memory(self, device: ctypes.c_void_p) -> _Memory:
        """All zero if the driver refuses."""
        memory = _Memory()
        status = self._library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
        return memory if status == _SUCCESS else _Memory()


class NvmlBoard:
    """Adds the memory of a discrete GPU to the readings of `plain`, any board that does not read a GPU's memory itself."""

    def __init__(self, plain: Board, nvml: Nvml) -> None:
        self._plain = plain
        self._nvml = nvml

    def read(self) -> BoardReading:
        """Read all sensors now. Raises: WorldError (`board`) if not even memory can be read."""
        reading = self._plain.read()
        memory = self._nvml.fullest() if reading.gpu_memory_used_bytes is None else None
        if memory is None:
            return reading
        used, total = memory
        return replace(reading, gpu_memory_used_bytes=used, gpu_memory_total_bytes=total)


def open_nvml() -> Nvml:
    """Load the driver's library where there is one."""
    try:
        library: Any = ctypes.CDLL(_LIBRARY)
        library.nvmlDeviceGetComputeRunningProcesses_v3  # noqa: B018  (an older driver lacks it: AttributeError)
    except (OSError, AttributeError):
        library = None
    return Nvml(library)
