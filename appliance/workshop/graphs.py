"""ONNX files as graphs: read, looked through, run for a look inside, and written so that the same graph gives the same bytes.

1. `onnx` is an optional dependency of engineers, never of a device: it is imported where it is needed, and its absence says what to install.
2. A model is one file below 2 GiB with its weights inside, because one file is what a release carries.
3. Constants are initialisers: what the exporter wrote as `Constant` nodes is moved, so that surgeons need to know only one form.
4. What a graph does at run time (ranks, lengths, sizes) is asked of onnxruntime with a real sample, not guessed from annotations.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Array

LEAST_OPSET = 11
"""The first in which `Clip`, `Pad` and `Softmax` take what the surgeons give them (ONNX changelog)."""
_SILENT = 4
_LONGEST = 300
"""Characters of a foreign error that a person wants to read."""


def toolkit() -> Any:
    """Return the `onnx` package. Raises: WorldError (`missing`) if it is not installed."""
    try:
        import onnx  # noqa: PLC0415 - optional: only engineers install it
    except ImportError as error:
        raise WorldError("missing", "the package onnx is not installed", remedy="pip install appliance[workshop]") from error
    return onnx


def runtime() -> Any:
    """Return the `onnxruntime` package with its telemetry off."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # on by default, and read while the library is imported
    import onnxruntime  # noqa: PLC0415 - must come after the line above

    return onnxruntime


def read(path: Path) -> Any:
    """Read a model (a `ModelProto`) with its constants as initialisers.

    Raises: TheirsError (`model`) if it is none, is damaged, keeps weights elsewhere or is too old; WorldError (`disk`, `missing`).
    """
    onnx = toolkit()
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise WorldError("disk", f"cannot be read: {error.strerror}", where=str(path)) from error
    except Exception as error:  # protobuf's exceptions share no base but Exception
        raise _refused(path, f"not an ONNX model: {error}") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise _refused(path, "its weights lie in other files")
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises what it meets
        raise _refused(path, f"not an ONNX model: {error}") from error
    if opset(model) < LEAST_OPSET:
        what = f"is of opset {opset(model)}, the least is {LEAST_OPSET}"
        raise TheirsError("model", what, where=str(path), remedy="export it with a newer opset")
    _settle_constants(model)
    return model


def _refused(path: Path, what: str) -> TheirsError:
    return TheirsError("model", " ".join(what.split())[:_LONGEST], where=str(path), remedy="export it as one .onnx file")


def write(model: Any, path: Path, like: Any | None = None) -> Path:
    """Write a model deterministically; `like`: the model whose metadata (dictionary, labels) it inherits. Raises: WorldError (`disk`)."""
    if like is not None:
        del model.metadata_props[:]
        model.metadata_props.extend(sorted(like.metadata_props, key=lambda each: each.key))
    used = {node.domain or "" for node in model.graph.node} | {""}
    kept = [each for each in model.opset_import if (each.domain or "") in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.graph.doc_string = ""
    write_bytes(path, model.SerializeToString(deterministic=True))
    return path


def write_bytes(path: Path, payload: bytes) -> None:
    """Write a file of a bundle. Raises: WorldError (`disk`) with what to do."""
    try:
        path.write_bytes(payload)
    except OSError as error:
        raise WorldError("disk", f"cannot be written: {error.strerror}", where=str(path), remedy="free space there") from error


def copied(model: Any) -> Any:
    """Return a copy of a model that may be cut up."""
    twin = toolkit().ModelProto()
    twin.CopyFrom(model)
    return twin


def opset(model: Any) -> int:
    """Return the version of the standard operators that a model was written for."""
    return next((each.version for each in model.opset_import if not each.domain), 0)


def constants(model: Any) -> dict[str, Any]:
    """Return a graph's initialisers (`TensorProto`) by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def reads(node: Any) -> Iterator[str]:
    """Yield the names that a node reads, those that its inner graphs (`If`, `Loop`) take from outside included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            inner = {name for each in graph.node for name in each.output} | {each.name for each in graph.initializer}
            yield from (name for each in graph.node for name in reads(each) if name not in inner)


class Links:
    """Who makes and who reads each tensor of a graph. `makers`: node by output name; `readers`: nodes by input name."""

    def __init__(self, graph: Any) -> None:
        self.makers: dict[str, Any] = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in reads(node):
                self.readers[name].append(node)
        self.given = {each.name for each in graph.input} - {each.name for each in graph.initializer}
        self.wanted = {each.name for each in graph.output}

    def only_reader(self, name: str) -> Any | None:
        """Return the single node that reads a tensor; None if there are others or the graph gives it out."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.wanted else None


def prune(model: Any) -> None:
    """Drop nodes and initialisers that no output needs, in place."""
    graph = model.graph
    needed = {each.name for each in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(reads(node))
            kept.append(node)
    renew(model, list(reversed(kept)))


def renew(model: Any, nodes: Sequence[Any], tensors: Sequence[Any] = ()) -> None:
    """Give a graph these nodes, and these tensors beside its own; initialisers that no node needs are dropped."""
    graph = model.graph
    needed = {name for node in nodes for name in reads(node)} | {each.name for each in graph.output}
    fresh = toolkit().GraphProto()
    fresh.node.extend(nodes)
    fresh.initializer.extend(tensor for tensor in [*graph.initializer, *tensors] if tensor.name in needed)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(fresh.node)
    graph.initializer.extend(fresh.initializer)


def session(model: Any | Path, *, optimised: bool = True, save_to: Path | None = None) -> Any:
    """Open an onnxruntime session on one thread; `save_to`: write the graph after the optimisations that hold on any machine.

    Raises: TheirsError (`model`) if onnxruntime does not take it.
    """
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    if save_to is not None:
        options.graph_optimization_level = levels.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(save_to)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        where = str(model) if isinstance(model, Path) else "ONNX graph"
        raise TheirsError("model", f"onnxruntime does not take it: {str(error).splitlines()[0]}", where=where) from error


def answers(opened: Any, feeds: Mapping[str, Array], names: Sequence[str] | None = None) -> list[Array]:
    """Run a session. Raises: TheirsError (`samples`) if the sample does not fit the model."""
    try:
        found: list[Array] = opened.run(names, dict(feeds))
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise TheirsError("samples", f"the model does not run on {shapes}: {str(error).splitlines()[0]}") from error
    return found


def look_inside(model: Any, feeds: Mapping[str, Array], names: Iterable[str]) -> dict[str, Array]:
    """Run a model on one sample and return the named tensors, its constants and inputs among them.

    Raises: TheirsError (`samples`, `model`).
    """
    onnx = toolkit()
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found: dict[str, Array] = {name: known[name] if name in known else feeds[name] for name in names if name in known or name in feeds}
    asked = sorted(set(names) - found.keys())
    open_model = copied(model)
    present = {each.name for each in open_model.graph.output}
    open_model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked if name not in present)
    values = answers(session(open_model, optimised=False), feeds, asked) if asked else []
    return found | dict(zip(asked, values, strict=True))


class Emitter:
    """Writes new nodes for a graph. `nodes`, `tensors`: what is to be put in; names begin with `prefix` and are unique under it."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._onnx = toolkit()
        self._consts: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Return the name of an initialiser with this value; equal ones are shared."""
        array = np.array(value, dtype=dtype)  # not ascontiguousarray, which makes a scalar one-dimensional
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._consts:
            self._consts[key] = f"{self._prefix}_c{len(self._consts)}"
            self.tensors.append(self._onnx.numpy_helper.from_array(array, self._consts[key]))
        return self._consts[key]

    def op(self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        name = f"{self._prefix}_{len(self.nodes)}_{kind.lower()}"
        self.nodes.append(self._onnx.helper.make_node(kind, list(inputs), [out or name], name=name, domain=domain, **attributes))
        return out or name


def _settle_constants(model: Any) -> None:
    graph = model.graph
    nodes = [node for node in graph.node if not _settle(node, graph)]
    fresh = toolkit().GraphProto()
    fresh.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(fresh.node)


def _settle(node: Any, graph: Any) -> bool:
    if node.op_type != "Constant" or node.domain or node.attribute[0].name != "value":
        return False
    tensor = graph.initializer.add()
    tensor.CopyFrom(node.attribute[0].t)
    tensor.name = node.output[0]
    return True
