"""Models with 8-bit or 4-bit weights, by onnxruntime's quantisers; which one is best is measured, not believed.

1. `int8`: weights and activations of convolutions and products in 8 bits, one scale for each channel, activations calibrated on samples
   (`quantize_static`, QDQ). Depthwise convolutions stay as they are: their few weights carry ranges that one scale per tensor does not hold (the
   label reader falls from 95 % to 85 % exactly right with them).
2. `int8-dynamic`: the same for products only, activations scaled at run time (`quantize_dynamic`). For what calibration does not suit.
3. `int8-weights`, `int4-weights`: weights of products in blocks of 32 with one scale each, activations as they are (`MatMulNBits`,
   onnxruntime's own operator). The blocks are packed here, because onnxruntime's packer needs one more package (onnx_ir).
4. Tables that are looked up (word embeddings) get 8 bits with one scale for each row, in all of these.
5. Before that, constants are folded and batch normalisation is merged (onnxruntime's basic optimisation, the same on every machine), and older
   graphs are raised to opset 17, which the scales for each channel need.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Array
from appliance.workshop import graphs
from appliance.workshop.graphs import Emitter, Links
from appliance.workshop.samples import Sample

OPSET = 17
BLOCK = 32
_TABLE_BYTES = 1 << 20
"""Smaller tables are left alone: there is nothing to gain."""
_MATRIX = 2


def prepared(model: Any) -> Any:
    """Return a model of opset 17 or newer with folded constants. Raises: TheirsError (`model`) if onnxruntime does not take it."""
    twin = graphs.copied(model)
    if graphs.opset(twin) < OPSET:
        with contextlib.suppress(Exception):  # where the converter does not know an operator, the older graph may still be quantised
            twin = graphs.toolkit().version_converter.convert_version(twin, OPSET)
    with tempfile.TemporaryDirectory(prefix="ap-") as scratch:
        path = Path(scratch) / "model.onnx"
        graphs.session(twin, save_to=path)
        return graphs.read(path)


def int8(model: Any, calibration: Sequence[Sample]) -> tuple[Any, str]:
    """Return a model with 8-bit weights and activations, and what was done. Raises: TheirsError (`not_quantised`)."""
    from onnxruntime import quantization  # noqa: PLC0415 - imports onnx, which is optional

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
        """Hands the samples out one by one."""

        def __init__(self) -> None:
            self._left = iter(calibration)

        def get_next(self) -> Any:
            return next(self._left, None)

    depthwise = [node.name for node in model.graph.node if node.op_type == "Conv" and _attribute(node, "group", 1) > 1]
    kinds = sorted({node.op_type for node in model.graph.node} & {"Conv", "MatMul", "Gemm"})

    def run(source: Path, target: Path) -> None:
        quantization.quantize_static(
            source, target, Reader(), quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=kinds, per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8, nodes_to_exclude=depthwise,
        )  # fmt: skip

    kept = f", {len(depthwise)} depthwise convolutions as they were" if depthwise else ""
    how = f"weights and activations of {' and '.join(kinds)} in 8 bits, calibrated on {len(calibration)} samples{kept}"
    return _by_files(model, run, bool(kinds)), how


def int8_dynamic(model: Any, _: Sequence[Sample]) -> tuple[Any, str]:
    """Return a model whose products are in 8 bits, and what was done. Raises: TheirsError (`not_quantised`)."""
    from onnxruntime import quantization  # noqa: PLC0415 - imports onnx, which is optional

    def run(source: Path, target: Path) -> None:
        quantization.quantize_dynamic(
            source, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=quantization.QuantType.QInt8
        )

    return _by_files(model, run, bool(_products(model))), "weights of MatMul in 8 bits, activations scaled at run time"


def int8_weights(model: Any, _: Sequence[Sample]) -> tuple[Any, str]:
    """Return a model whose products have 8-bit weights, and what was done. Raises: TheirsError (`not_quantised`)."""
    return _block_weights(model, 8), f"weights of MatMul in 8 bits, blocks of {BLOCK}"


def int4_weights(model: Any, _: Sequence[Sample]) -> tuple[Any, str]:
    """Return a model whose products have 4-bit weights, and what was done. Raises: TheirsError (`not_quantised`)."""
    return _block_weights(model, 4), f"weights of MatMul in 4 bits, blocks of {BLOCK}"


Quantiser = Callable[[Any, Sequence[Sample]], tuple[Any, str]]
QUANTISERS: dict[str, Quantiser] = {"int8": int8, "int8-dynamic": int8_dynamic, "int8-weights": int8_weights, "int4-weights": int4_weights}


def quantised(model: Any, name: str, calibration: Sequence[Sample]) -> tuple[Any, str]:
    """Return a prepared model quantised in one of the ways of `QUANTISERS`, and what was done, in words.

    Raises: TheirsError (`not_quantised`) if it has nothing of the kind, or onnxruntime's quantiser does not take it.
    """
    twin = graphs.copied(model)
    tables = _quantise_tables(twin)
    result, how = QUANTISERS[name](twin, calibration)
    return result, how + (f"; {tables} table{'s' * (tables > 1)} in 8 bits by row" if tables else "")


def packed(weights: Array, bits: int) -> tuple[Array, Array]:
    """Pack a matrix [K, N] as `MatMulNBits` wants it: uint8 [N, blocks, bytes], low half first, and float32 scales [N x blocks].

    Symmetric: a number q stands for (q - 2^(bits-1)) x scale; the scale is the block's extreme over -2^(bits-1), so that the extreme is met exactly.
    """
    depth, width = weights.shape
    blocks = -(-depth // BLOCK)
    padded = np.zeros((blocks * BLOCK, width), dtype=np.float32)
    padded[:depth] = weights
    cut = padded.T.reshape(width, blocks, BLOCK)
    extreme = np.take_along_axis(cut, np.abs(cut).argmax(axis=2)[:, :, np.newaxis], axis=2)
    half = 1 << (bits - 1)
    scales = extreme / np.float32(-half)
    steps = np.divide(cut, scales, out=np.zeros_like(cut), where=scales != 0)
    numbers = np.clip(np.rint(steps) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits < 8:  # noqa: PLR2004 - a byte
        numbers = numbers[:, :, 0::2] | numbers[:, :, 1::2] << np.uint8(bits)
    return numbers, scales.astype(np.float32).ravel()


def _products(model: Any) -> list[tuple[Any, Any]]:
    """Return the products with a constant matrix on the right: (node, tensor)."""
    fixed, kinds = graphs.constants(model), graphs.toolkit().TensorProto
    nodes = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in fixed]
    pairs = [(node, fixed[node.input[1]]) for node in nodes]
    return [(node, tensor) for node, tensor in pairs if len(tensor.dims) == _MATRIX and tensor.data_type == kinds.FLOAT]


def _block_weights(model: Any, bits: int) -> Any:
    products = _products(model)
    if not products:
        raise _nothing()
    emitter = Emitter(f"int{bits}")
    replaced: dict[str, Any] = {}
    for node, tensor in products:
        weights = graphs.toolkit().numpy_helper.to_array(tensor)
        numbers, scales = packed(weights, bits)
        inputs = (node.input[0], emitter.constant(numbers, np.uint8), emitter.constant(scales, np.float32))
        depth, width = weights.shape
        emitter.op(
            "MatMulNBits",
            *inputs,
            out=node.output[0],
            domain="com.microsoft",
            K=depth,
            N=width,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=4,
        )
        replaced[node.output[0]] = emitter.nodes[-1]
    _exchange(model, replaced, emitter.tensors)
    if all(each.domain != "com.microsoft" for each in model.opset_import):
        model.opset_import.append(graphs.toolkit().helper.make_opsetid("com.microsoft", 1))
    return model


def _quantise_tables(model: Any) -> int:
    """Give tables of floats that are looked up by row 8 bits and a scale for each row, in place; return how many."""
    fixed, links, kinds = graphs.constants(model), Links(model.graph), graphs.toolkit().TensorProto
    emitter = Emitter("table")
    count, nodes = 0, []
    for node in model.graph.node:
        table = fixed.get(node.input[0]) if node.op_type == "Gather" and _attribute(node, "axis", 0) == 0 else None
        fit = table is not None and len(table.dims) == _MATRIX and table.data_type == kinds.FLOAT and table.ByteSize() >= _TABLE_BYTES
        if not fit or len(links.readers[node.input[0]]) > 1:
            nodes.append(node)
            continue
        rows = graphs.toolkit().numpy_helper.to_array(table)
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
        first = len(emitter.nodes)
        numbers = emitter.op("Gather", emitter.constant(np.rint(rows / scales), np.int8), node.input[1], axis=0)
        found = emitter.op("Gather", emitter.constant(scales, np.float32), node.input[1], axis=0)
        emitter.op("Mul", emitter.op("Cast", numbers, to=kinds.FLOAT), found, out=node.output[0])
        nodes += emitter.nodes[first:]
        count += 1
    if count:
        graphs.renew(model, nodes, emitter.tensors)
    return count


def _exchange(model: Any, replaced: dict[str, Any], tensors: list[Any]) -> None:
    graphs.renew(model, [replaced.get(node.output[0], node) for node in model.graph.node], tensors)


def _by_files(model: Any, run: Callable[[Path, Path], None], anything: bool) -> Any:
    """Run one of onnxruntime's quantisers, which work from file to file and talk on every channel."""
    if not anything:
        raise _nothing()
    with tempfile.TemporaryDirectory(prefix="ap-") as scratch:
        source, target = Path(scratch) / "float.onnx", Path(scratch) / "quantised.onnx"
        graphs.write_bytes(source, model.SerializeToString())
        try:
            with _hushed():
                run(source, target)
        except OSError as error:
            raise WorldError("disk", f"cannot be written: {error.strerror}", where=scratch, remedy="free space there") from error
        except Exception as error:  # onnxruntime's quantisers raise what they meet
            raise TheirsError("not_quantised", f"onnxruntime's quantiser does not take it: {str(error).splitlines()[0]}") from error
        return graphs.read(target)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _attribute(node: Any, name: str, otherwise: int) -> int:
    return int(next((each.i for each in node.attribute if each.name == name), otherwise))


def _nothing() -> TheirsError:
    return TheirsError("not_quantised", "no weights of the kind that this quantiser knows")
