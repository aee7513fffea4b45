"""ONNX models on onnxruntime.

1. The model is read from its memfd by path (`/proc/self/fd/N`): no disk, and no second copy as `bytes` would make
   (measured on 192 MiB of weights: 312 MiB at the peak against 623).
2. The execution provider is chosen by loading: TensorRT, CUDA, CPU, the first that truly takes the session. A provider that is
   built in but lacks its libraries makes onnxruntime fall back silently, so the session is asked what it runs on.
3. Inputs are used where they lie in shared memory. Outputs are copied into it once: bound outputs were no faster (10.6 ms both ways for
   530 kB) and fail where a shape depends on the data.
4. One thread per batch unless told otherwise; the numbers are the same bits as a plain session with the same number of threads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from appliance.adapters.inference.backend import METADATA_BYTES, Options
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Array, Signature, TensorSpec
from appliance.contract.vocabulary import Datatype, Platform

PREFERENCE = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
_SILENT = 4
"""Only fatal messages: errors come back as exceptions, and are reported from there."""

_DATATYPES: Mapping[str, Datatype] = {
    "tensor(bool)": Datatype.BOOL,
    "tensor(uint8)": Datatype.UINT8,
    "tensor(uint16)": Datatype.UINT16,
    "tensor(uint32)": Datatype.UINT32,
    "tensor(uint64)": Datatype.UINT64,
    "tensor(int8)": Datatype.INT8,
    "tensor(int16)": Datatype.INT16,
    "tensor(int32)": Datatype.INT32,
    "tensor(int64)": Datatype.INT64,
    "tensor(float16)": Datatype.FP16,
    "tensor(float)": Datatype.FP32,
    "tensor(double)": Datatype.FP64,
}


class OnnxModel:
    """One onnxruntime session."""

    def __init__(self, threads: int, options: Options) -> None:
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.inter_op_num_threads = 1
        self._options.log_severity_level = _SILENT
        self._options.enable_cpu_mem_arena = options.arena
        if not options.prepacking:
            self._options.add_session_config_entry("session.disable_prepacking", "1")
        self._session: Any = None
        self._names: list[str] = []

    @property
    def provider(self) -> str:
        """The execution provider that the session runs on first."""
        return str(self._session.get_providers()[0])

    def load(self, fd: int, size: int) -> Signature:
        """Open a session on the first provider that takes it. Raises: TheirsError (`model`), WorldError (`memory`)."""
        self._session = self._open(f"/proc/self/fd/{fd}", size)
        metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        length = sum(len(name.encode()) + len(value.encode()) for name, value in metadata.items())
        if length > METADATA_BYTES:
            raise TheirsError("model", f"carries {length} bytes of metadata, at most {METADATA_BYTES} are allowed", where="ONNX metadata")
        outputs = tuple(map(_spec, self._session.get_outputs()))
        self._names = [spec.name for spec in outputs]
        return Signature(Platform.ONNX, tuple(map(_spec, self._session.get_inputs())), outputs, metadata)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Mapping[str, Array]:
        """Run the session. Raises: TheirsError (`model`), WorldError (`memory`)."""
        try:
            arrays = self._session.run(outputs, inputs)
        except Exception as error:
            raise _translated(error) from error
        return {name: np.asarray(array, order="C") for name, array in zip(outputs, arrays, strict=True)}

    def unload(self) -> None:
        """Drop the session; its arena goes with it."""
        self._session = None

    def _open(self, path: str, size: int) -> Any:
        available = onnxruntime.get_available_providers()
        refusals = []
        for provider in (name for name in PREFERENCE if name in available):
            try:
                session = onnxruntime.InferenceSession(path, self._options, providers=list(dict.fromkeys([provider, PREFERENCE[-1]])))
            except Exception as error:  # noqa: BLE001  (the next provider may take it; if none does, the last reason is raised)
                refusals.append(error)
                continue
            if session.get_providers()[0] == provider:
                return session
        raise _translated(refusals[-1]) if refusals else TheirsError("model", f"no provider of {available} takes these {size} bytes")


def _spec(node: Any) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise TheirsError("model", f"has elements of {node.type}; supported are {', '.join(_DATATYPES)}", where=f"tensor {node.name!r}")
    return TensorSpec(node.name, datatype, tuple(axis if isinstance(axis, int) and axis >= 0 else -1 for axis in node.shape))


def _translated(error: Exception) -> TheirsError | WorldError:
    if isinstance(error, MemoryError) or "Failed to allocate memory" in str(error) or "bad_alloc" in str(error):
        return WorldError("memory", str(error), where="onnxruntime")
    return TheirsError("model", str(error), where="onnxruntime")
