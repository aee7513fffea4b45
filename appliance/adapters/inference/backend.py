"""What the child asks of a run-time, and which class serves which platform.

Run-times are heavy (onnxruntime: 85 ms and 40 MB to import): their modules are imported in the child, when a model first needs them.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.contract.inference import Array, Signature
from appliance.contract.vocabulary import Platform

METADATA_BYTES = 1_048_576
"""The longest metadata, names and values together, that a model may carry (a dictionary of 6,625 characters is 13 kB)."""

_CLASSES: Mapping[Platform, tuple[str, str]] = {
    Platform.ONNX: ("appliance.adapters.inference.onnx", "OnnxModel"),
    Platform.LITERT: ("appliance.adapters.inference.litert", "LiteRtModel"),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What a run-time may trade; the default gives no speed away. Figures are of the label reader (11 MB), one thread, 2-core x86-64.

    Attributes:
        prepacking: keep a copy of the weights in the order in which kernels read them. Without: 3 MB less, 1.3 to 2.2 times the run time
            in a model of matrix products.
        arena: keep the memory of intermediate tensors in onnxruntime's own pool. Without, the C library keeps it while batches come
            (0.96 to 1.01 of the run time) and gives it back when the child rests: 49 MB instead of 73 after batches of 8. Tensors above
            32 MiB are the exception: the C library asks the kernel for each anew.
        delegates: libraries that are offered a LiteRT model before XNNPACK is, by the name under which the loader finds them.
    """

    prepacking: bool = True
    arena: bool = False
    delegates: tuple[str, ...] = ("libtensorflowlite_gpu_delegate.so",)


class Backend(Protocol):
    """One loaded model. Not thread-safe: `run` and `unload` are called by one thread."""

    @property
    def provider(self) -> str:
        """What executes the model, in the run-time's own words (`CPUExecutionProvider`, `XNNPACK`)."""

    def load(self, fd: int, size: int) -> Signature:
        """Load the model from a memfd of `size` bytes; the caller closes it. Raises: TheirsError (`model`), WorldError (`memory`)."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Mapping[str, Array]:
        """Run one batch of checked inputs. The arrays returned are valid until the next call.

        Raises: TheirsError (`model`), WorldError (`memory`).
        """

    def unload(self) -> None:
        """Give back all memory."""


def make(platform: Platform, threads: int, options: Options) -> Backend:
    """Return an empty backend for a platform; `threads` is how many one batch may use. Raises: ImportError."""
    module, name = _CLASSES[platform]
    backend: Backend = getattr(importlib.import_module(module), name)(threads, options)
    return backend
