"""Packed weights against their definition, and onnxruntime's quantisers on small models."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from appliance.contract.errors import TheirsError
from appliance.contract.inference import Array
from appliance.workshop import graphs, quantised
from tests.workshop.small_models import Net, reader


def unpacked(numbers: Array, scales: Array, bits: int, depth: int) -> Array:
    """The definition of `MatMulNBits` (onnxruntime's ContribOperators.md), in numpy."""
    width, blocks, _ = numbers.shape
    whole = numbers if bits == 8 else np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(width, blocks, -1)
    weights = (whole.astype(np.float32) - 2 ** (bits - 1)) * scales.reshape(width, blocks, 1)
    return weights.reshape(width, -1)[:, :depth].T


@given(depth=st.integers(1, 100), width=st.integers(1, 5), bits=st.sampled_from((4, 8)), seed=st.integers(0, 1_000))
def test_packed_weights_are_within_a_step_and_extremes_are_met(depth: int, width: int, bits: int, seed: int) -> None:
    """One step of a block is its extreme over 2^(bits-1); nothing is further off than that, and the extreme itself is exact."""
    weights = np.random.default_rng(seed).standard_normal((depth, width)).astype(np.float32)
    weights[:, 0] = 0
    numbers, scales = quantised.packed(weights, bits)
    found = unpacked(numbers, scales, bits, depth)
    steps = np.repeat(np.abs(scales).reshape(width, -1).T, quantised.BLOCK, axis=0)[:depth]
    assert (np.abs(found - weights) <= steps * 1.001).all()
    column = np.abs(weights).argmax(axis=0)
    assert np.allclose(found[column, range(width)], weights[column, range(width)], rtol=1e-6)


@pytest.mark.parametrize("name", ["int8-weights", "int4-weights"])
def test_block_weights_run_as_they_are_defined(name: str) -> None:
    """onnxruntime computes with the packed blocks what the definition says, but for its own 8-bit activations."""
    net = Net()
    net.op("MatMul", "x", net.weight(96, 40), out="y")
    model = net.model({"x": (TensorProto.FLOAT, ["batch", 96])}, {"y": ["batch", 40]})
    feeds = {"x": net.rng.standard_normal((1, 96)).astype(np.float32)}
    small, _ = quantised.quantised(model, name, [feeds])
    tensors = {tensor.name: graphs.toolkit().numpy_helper.to_array(tensor) for tensor in small.graph.initializer}
    numbers, scales = (tensors[part] for part in small.graph.node[0].input[1:3])
    expected = feeds["x"] @ unpacked(numbers, scales, 8 if "8" in name else 4, 96)
    assert np.abs(graphs.answers(graphs.session(small), feeds)[0] - expected).max() < 0.02 * np.abs(expected).max()


def test_tables_get_a_scale_for_each_row() -> None:
    """A large table of word vectors keeps every row within half a step of its own extreme."""
    net = Net()
    table = (net.rng.standard_normal((3_000, 100)) * net.rng.uniform(0.01, 10, (3_000, 1))).astype(np.float32)
    net.op("MatMul", net.op("Gather", net.tensor(table), "ids"), net.tensor(np.eye(100)), out="y")
    model = net.model({"ids": (TensorProto.INT64, ["batch", "length"])}, {"y": ["batch", "length", 100]})
    small, how = quantised.quantised(model, "int8-weights", [])
    assert "1 table in 8 bits by row" in how
    assert len(small.SerializeToString()) < len(model.SerializeToString()) / 3
    gathered = next(node.output[0] for node in small.graph.node if node.op_type == "Mul")
    rows = np.array([[0, 7, 2_999]])
    found = graphs.look_inside(small, {"ids": rows}, [gathered])[gathered]
    assert (np.abs(found - table[rows]) <= 0.51 * np.abs(table[rows]).max(axis=-1, keepdims=True) / 127).all()


@pytest.mark.parametrize("name", sorted(quantised.QUANTISERS))
def test_every_quantiser_shrinks_and_keeps_the_answer(name: str) -> None:
    """On a small reader: fewer bytes, nearly the same probabilities, the same bytes when done again."""
    model = reader()
    rng = np.random.default_rng(5)
    calibration = [{"x": rng.standard_normal((1, 3, 8, 24)).astype(np.float32)} for _ in range(8)]
    prepared = quantised.prepared(model)
    small, how = quantised.quantised(prepared, name, calibration)
    again, _ = quantised.quantised(prepared, name, calibration)
    assert len(small.SerializeToString()) < len(prepared.SerializeToString())
    assert ("1 depthwise convolution" in how) == (name == "int8")
    assert small.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    before, after = (graphs.answers(graphs.session(each), calibration[0])[0] for each in (model, small))
    assert np.abs(before - after).max() < 0.1


@pytest.mark.parametrize("name", sorted(quantised.QUANTISERS))
def test_a_model_without_weights_is_refused(name: str) -> None:
    """There is nothing to make smaller."""
    net = Net()
    net.op("Relu", "x", out="y")
    model = net.model({"x": (TensorProto.FLOAT, ["batch", 4])}, {"y": ["batch", 4]})
    with pytest.raises(TheirsError) as caught:
        quantised.quantised(model, name, [{"x": np.ones((1, 4), dtype=np.float32)}])
    assert caught.value.reason == "not_quantised"


def test_older_graphs_are_raised() -> None:
    """Scales for each channel need opset 13 or newer; the answers stay."""
    net = Net()
    net.op("Softmax", net.op("MatMul", "x", net.weight(6, 6)), out="y", axis=1)
    old = net.model({"x": (TensorProto.FLOAT, ["batch", 6])}, {"y": ["batch", 6]}, opset=12)
    new = quantised.prepared(old)
    feeds = {"x": net.rng.standard_normal((3, 6)).astype(np.float32)}
    assert graphs.opset(new) >= quantised.OPSET
    assert np.allclose(*(graphs.answers(graphs.session(each), feeds)[0] for each in (old, new)), atol=1e-6)
