"""How much work one sample is: operations and moved bytes, for the roofline's first guess on a board where nothing has run yet.

1. Counted are the operators that do nearly all of it: convolutions and matrix products, in whatever arithmetic; a multiply-add is two operations.
2. Moved bytes are those of every activation, written once and read once; weights are counted from the file's size by the device.
3. Shapes are inferred for the typical sample at batch 1; an operator whose shape stays unknown is not counted, so the count is a lower bound.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from appliance.workshop import graphs

_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "FusedConv": 1}
_PRODUCTS = {"MatMul": 0, "Gemm": 0, "MatMulInteger": 0, "QLinearMatMul": 0, "MatMulNBits": 0, "DynamicQuantizeMatMul": 0, "FusedMatMul": 0}
"""By operator: which input is the weight (of a convolution), or the left factor (of a product)."""


def count(path: Path, shapes: Mapping[str, Sequence[int]]) -> tuple[float, float]:
    """Return (operations, moved bytes) of one sample with these input shapes, batch axis apart. Raises: TheirsError (`model`), WorldError."""
    model = graphs.read(path)
    for tensor in model.graph.input:
        if tensor.name in shapes:
            for axis, size in zip(tensor.type.tensor_type.shape.dim, (1, *shapes[tensor.name]), strict=False):
                axis.dim_value = size
    del model.graph.value_info[:]
    for tensor in model.graph.output:
        tensor.type.tensor_type.ClearField("shape")
    graph = graphs.toolkit().shape_inference.infer_shapes(model, data_prop=True).graph
    known: dict[str, tuple[int, ...] | None] = {each.name: _shape(each) for each in (*graph.input, *graph.output, *graph.value_info)}
    known |= {each.name: tuple(each.dims) for each in graph.initializer}
    operations = sum((_operations(node, known) for node in graph.node), 0.0)
    moved = sum(2.0 * prod(shape) * _bytes(each) for each in graph.value_info if (shape := _shape(each)) is not None)
    return operations, moved


def _operations(node: Any, shapes: Mapping[str, Sequence[int] | None]) -> float:
    """The operations of one node; 0 where it is of another kind, or its shape is not known."""
    made = shapes.get(node.output[0])
    if made is None:
        return 0.0
    if node.op_type in _CONVOLUTIONS:
        weight = shapes.get(node.input[_CONVOLUTIONS[node.op_type]])
        return 2.0 * prod(made) * prod(weight[1:]) if weight else 0.0
    if node.op_type in _PRODUCTS:
        left = shapes.get(node.input[0])
        return 2.0 * prod(made) * left[-1] if left else 0.0
    return 0.0


def _shape(value: Any) -> tuple[int, ...] | None:
    """A tensor's shape; None unless every axis is known."""
    axes = value.type.tensor_type.shape.dim
    shape = tuple(axis.dim_value for axis in axes)
    return shape if value.type.tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in axes) else None


def _bytes(value: Any) -> int:
    """Bytes of one element."""
    helper = graphs.toolkit().helper
    return int(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize)
