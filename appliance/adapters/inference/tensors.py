"""Tensors against a signature, and tensors in shared memory.

1. A batch is checked before anything is copied: names, element types, and each axis that the model fixes.
2. Tensors start at multiples of 64 bytes (a cache line, and what AVX-512 and NEON loads like best).
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from mmap import mmap

import numpy as np

from appliance.contract.errors import TheirsError
from appliance.contract.inference import DTYPES, Array, Signature, TensorSpec
from appliance.contract.vocabulary import Datatype

ALIGN_BYTES = 64


def check(signature: Signature, inputs: Mapping[str, Array], outputs: Sequence[str]) -> None:
    """Check a batch. Raises: TheirsError (`malformed`) that names the tensor, what the model takes and what came."""
    for spec in signature.inputs:
        array = inputs.get(spec.name)
        if array is None:
            raise TheirsError("malformed", f"is missing; the model takes {describe(spec)}", where=f"input {spec.name!r}")
        if array.dtype != DTYPES[spec.datatype] or not _fits(spec.shape, array.shape):
            seen = f"{array.dtype.name}{list(array.shape)}"
            raise TheirsError("malformed", f"is {seen}; the model takes {describe(spec)}", where=f"input {spec.name!r}")
    if len(inputs) > len(signature.inputs):
        known = {spec.name for spec in signature.inputs}
        extra = next(name for name in inputs if name not in known)
        raise TheirsError("malformed", f"is unknown; the model takes {_names(signature.inputs)}", where=f"input {extra!r}")
    if outputs:
        known = {spec.name for spec in signature.outputs}
        for name in outputs:
            if name not in known:
                raise TheirsError("malformed", f"is unknown; the model gives {_names(signature.outputs)}", where=f"output {name!r}")


def describe(spec: TensorSpec) -> str:
    """Render a tensor's specification, for messages: `FP32[-1, 3, 48, 160]`."""
    return f"{spec.datatype}{list(spec.shape)}"


def lay(at: int, sizes: Iterable[int]) -> tuple[list[int], int]:
    """Give each size (bytes) an aligned offset from `at` on; return the offsets and the aligned end."""
    offsets = []
    for size in sizes:
        offsets.append(at)
        at += -(-size // ALIGN_BYTES) * ALIGN_BYTES
    return offsets, at


def dtype(datatype: Datatype) -> np.dtype[np.generic]:
    """Return the element type that numpy knows a datatype by."""
    return DTYPES[datatype]


def nbytes(datatype: Datatype, shape: Sequence[int]) -> int:
    """Size of a tensor in bytes."""
    return prod(shape) * DTYPES[datatype].itemsize


def view(buffer: mmap, datatype: Datatype, shape: tuple[int, ...], offset: int) -> Array:
    """Return the tensor that lies in the buffer, without a copy. Raises: ValueError if it does not lie inside."""
    return np.ndarray(shape, DTYPES[datatype], buffer, offset)


def _fits(wanted: tuple[int, ...], seen: tuple[int, ...]) -> bool:
    return len(wanted) == len(seen) and all(want in (-1, have) for want, have in zip(wanted, seen, strict=True))


def _names(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(repr(spec.name) for spec in specs)
