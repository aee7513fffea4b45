"""LiteRT (TensorFlow Lite) models on ai-edge-litert.

1. The model is mapped from its memfd by path (`/proc/self/fd/N`); the mapping outlives the descriptor, so weights exist once.
2. Shapes are fixed at compilation. If the interpreter can be resized to another batch and every output follows on axis 0, axis 0 is
   free (-1); if not (the face detector folds the batch into its anchors), the signature says the fixed batch and the caller obeys it.
3. Outputs are views into the interpreter, valid until its next call.
4. What executes the model is chosen by loading: each delegate library of `Options.delegates` (GPU first), then XNNPACK, then the built-in
   kernels. A delegate may load and yet take nothing, so the graph is asked whether a part of it was handed over.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType, load_delegate

from appliance.adapters.inference.backend import Options
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import DATATYPES, Array, Signature, TensorSpec
from appliance.contract.vocabulary import Platform

_TRIAL_BATCH = 3
"""A batch that no compiled model has by accident; only shapes are looked at."""


XNNPACK, PLAIN = "XNNPACK", "built-in kernels"


class LiteRtModel:
    """One LiteRT interpreter."""

    def __init__(self, threads: int, options: Options) -> None:
        self._threads = threads
        self._libraries = options.delegates
        self._interpreter: Any = None
        self._provider = ""
        self._inputs: list[dict[str, Any]] = []
        self._outputs: dict[str, int] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}

    @property
    def provider(self) -> str:
        """The delegate library, or XNNPACK, which covers the operators that it knows; the rest run on the built-in kernels."""
        return self._provider

    def load(self, fd: int, size: int) -> Signature:
        """Map the model and allocate its tensors with the first that takes it. Raises: TheirsError (`model`), WorldError (`memory`)."""
        refusals: list[Exception] = []
        for attempt in self._attempts(f"/proc/self/fd/{fd}"):
            try:
                self._provider, self._interpreter = attempt()
                break
            except Exception as error:  # noqa: BLE001  (the next may take it; if none does, the last reason is raised)
                refusals.append(error)
        else:
            raise _translated(refusals[-1], f"these {size} bytes") from refusals[-1]
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
        """Drop the interpreter; the mapping of the model and the delegate go with it."""
        self._interpreter = None

    def _attempts(self, path: str) -> Iterator[Callable[[], tuple[str, Any]]]:
        for library in self._libraries:
            yield functools.partial(self._delegated, path, library)
        for resolver in (OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES):
            yield functools.partial(self._builtin, path, resolver)

    def _delegated(self, path: str, library: str) -> tuple[str, Any]:
        ctypes.CDLL(library)  # raises OSError where there is none; `load_delegate` would, and print another error when it is collected
        interpreter = Interpreter(model_path=path, num_threads=self._threads, experimental_delegates=[load_delegate(library)])
        if not _handed_over(interpreter):  # before the allocation, which lets XNNPACK take what is left
            raise ValueError(f"{library} takes no part of this model")
        interpreter.allocate_tensors()
        return library, interpreter

    def _builtin(self, path: str, resolver: Any) -> tuple[str, Any]:
        interpreter = Interpreter(model_path=path, num_threads=self._threads, experimental_op_resolver_type=resolver)
        interpreter.allocate_tensors()
        return (XNNPACK if _handed_over(interpreter) else PLAIN), interpreter

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


def _handed_over(interpreter: Any) -> bool:
    """Whether a delegate took a part of the graph."""
    return any(one["op_name"] == "DELEGATE" for one in interpreter._get_ops_details())  # noqa: SLF001  (nothing public tells)


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
