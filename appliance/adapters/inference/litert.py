"""LiteRT (TensorFlow Lite) models on ai-edge-litert.

1. The model is mapped from its memfd by path (`/proc/self/fd/N`); the mapping outlives the descriptor, so weights exist once.
2. Shapes are fixed at compilation. If the interpreter can be resized to another batch and every output follows on axis 0, axis 0 is
   free (-1); if not (the face detector folds the batch into its anchors), the signature says the fixed batch and the caller obeys it.
3. Outputs are views into the interpreter, valid until its next call.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import DATATYPES, Array, Signature, TensorSpec
from appliance.contract.vocabulary import Platform

_TRIAL_BATCH = 3
"""A batch that no compiled model has by accident; only shapes are looked at."""


class LiteRtModel:
    """One LiteRT interpreter, with the XNNPACK delegate that it applies by default."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._interpreter: Any = None
        self._inputs: list[dict[str, Any]] = []
        self._outputs: dict[str, int] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}

    @property
    def provider(self) -> str:
        """XNNPACK, which covers the operators that it knows; the rest run on the built-in kernels."""
        return "XNNPACK"

    def load(self, fd: int, size: int) -> Signature:
        """Map the model and allocate its tensors. Raises: TheirsError (`model`), WorldError (`memory`)."""
        try:
            self._interpreter = Interpreter(model_path=f"/proc/self/fd/{fd}", num_threads=self._threads)
            self._interpreter.allocate_tensors()
        except Exception as error:
            raise _translated(error, f"these {size} bytes") from error
        self._inputs = self._interpreter.get_input_details()
        self._outputs = {str(one["name"]): int(one["index"]) for one in self._interpreter.get_output_details()}
        self._shapes = {int(one["index"]): _axes(one["shape"]) for one in self._inputs}
        free = self._batch_is_free()
        inputs = tuple(_spec(one, free=free) for one in self._inputs)
        outputs = tuple(_spec(one, free=free) for one in self._interpreter.get_output_details())
        return Signature(Platform.LITERT, inputs, outputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Mapping[str, Array]:
        """Run one batch, after a resize where its shape differs from the last one's. Raises: TheirsError (`model`)."""
        try:
            self._resize({int(one["index"]): inputs[str(one["name"])].shape for one in self._inputs})
            for one in self._inputs:
                self._interpreter.set_tensor(one["index"], inputs[str(one["name"])])
            self._interpreter.invoke()
            return {name: self._interpreter.tensor(self._outputs[name])() for name in outputs}
        except Exception as error:
            raise _translated(error, "this batch") from error

    def unload(self) -> None:
        """Drop the interpreter; the mapping of the model goes with it."""
        self._interpreter = None

    def _resize(self, shapes: dict[int, tuple[int, ...]]) -> None:
        if shapes == self._shapes:
            return
        self._shapes = {}  # unknown until the allocation below succeeded
        for index, shape in shapes.items():
            self._interpreter.resize_tensor_input(index, list(shape))
        self._interpreter.allocate_tensors()
        self._shapes = shapes

    def _batch_is_free(self) -> bool:
        compiled = dict(self._shapes)
        before = [_axes(one["shape"]) for one in self._interpreter.get_output_details()]
        if not all(compiled.values()) or not all(before):
            return False  # a scalar has no axis 0
        try:
            self._resize({index: (_TRIAL_BATCH, *shape[1:]) for index, shape in compiled.items()})
            after = [_axes(one["shape"]) for one in self._interpreter.get_output_details()]
            free = after == [(_TRIAL_BATCH, *shape[1:]) for shape in before]
        except (RuntimeError, ValueError):
            free = False  # refused: the shapes are compiled in
        self._resize(compiled)
        return free


def _axes(shape: Any) -> tuple[int, ...]:
    return tuple(int(axis) for axis in shape)


def _spec(one: dict[str, Any], *, free: bool) -> TensorSpec:
    name, dtype = str(one["name"]), np.dtype(one["dtype"])
    if dtype not in DATATYPES:
        raise TheirsError("model", f"has elements of {dtype}, which are not supported", where=f"tensor {name!r}")
    signed = _axes(one["shape_signature"])
    shape = signed if len(signed) else _axes(one["shape"])
    return TensorSpec(name, DATATYPES[dtype], (-1, *shape[1:]) if free else shape)


def _translated(error: Exception, subject: str) -> TheirsError | WorldError:
    if isinstance(error, MemoryError):
        return WorldError("memory", f"no memory for {subject}", where="LiteRT")
    return TheirsError("model", f"{subject}: {error}", where="LiteRT")
