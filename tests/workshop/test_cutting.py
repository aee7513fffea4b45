"""Both halves of a cut against the whole."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from appliance.contract.errors import TheirsError
from appliance.workshop import cutting, graphs
from appliance.workshop.cutting import Cut
from tests.workshop.small_models import Net, attention, reader, sample


def whole_and_halves(model: Any, feeds: dict[str, Any], cut: Cut) -> tuple[list[Any], list[Any], cutting.Halves]:
    made = cutting.halves(model, {name: array[:1] for name, array in feeds.items()}, cut)
    between = graphs.answers(graphs.session(made.features), feeds)
    names = [each.name for each in made.features.graph.output]
    rest = graphs.answers(graphs.session(made.head), dict(zip(names, between, strict=True)))
    return graphs.answers(graphs.session(model), feeds), rest, made


def possible(model: Any, feeds: dict[str, Any], tensor: str) -> Cut | None:
    try:
        return cutting.at(model, feeds, tensor)
    except TheirsError:
        return None


@pytest.mark.parametrize("form", ["plain", "key_mask", "causal"])
def test_every_cut_puts_together_the_whole(form: str) -> None:
    """Wherever an attention can be cut, features and head answer what the whole answers, for a batch of another size and length too."""
    model, one, other = attention(form), sample(12, form=form), sample(9, 3, seed=2, masked=True, form=form)
    cuts = [cut for node in model.graph.node[:-1] for name in node.output if (cut := possible(model, one, name)) is not None]
    assert {"matmul", "transpose", "reshape"} <= {cut.tensor.split("_")[0] for cut in cuts}
    for cut in cuts:
        whole, rest, made = whole_and_halves(model, other, cut)
        assert np.allclose(whole[0], rest[0], atol=1e-5)
        assert [each.name for each in made.head.graph.input] == [each.name for each in made.features.graph.output]


def test_what_the_head_needs_besides_crosses_too() -> None:
    """A mask that is an input is handed through under a name of its own."""
    net = Net()
    seen = net.op("Relu", net.op("MatMul", "x", net.weight(8, 8)), out="seen")
    net.op("Mul", net.op("MatMul", seen, net.weight(8, 8)), net.op("Cast", "mask", to=TensorProto.FLOAT), out="y")
    model = net.model({"x": (TensorProto.FLOAT, ["batch", 8]), "mask": (TensorProto.INT64, ["batch", 8])}, {"y": ["batch", 8]})
    feeds = {"x": net.rng.standard_normal((1, 8)).astype(np.float32), "mask": np.arange(8).reshape(1, 8)}
    cut = cutting.at(model, feeds, "seen")
    assert cut.crossing == ("mask", "seen")
    assert cut.crossing_bytes == 8 * 8 + 8 * 4
    whole, rest, made = whole_and_halves(model, feeds, cut)
    assert [each.name for each in made.head.graph.input] == ["mask_passed", "seen"]
    assert np.array_equal(whole[0], rest[0])


def test_the_found_cut_is_small_and_spares_the_device() -> None:
    """On a reader whose last product is wide: cut behind the convolutions, where little crosses."""
    model = reader()
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 24)).astype(np.float32)}
    cut = cutting.find(model, feeds)
    assert cut.crossing_bytes == 24 * 8 * 4
    assert min(cut.operations, cut.weights) <= 0.9
    assert cut.operations >= 0.5
    whole, rest, _ = whole_and_halves(model, feeds, cut)
    assert np.allclose(whole[0], rest[0], atol=1e-6)
    assert cutting.find(model, feeds) == cut


def test_names_that_cut_nothing_are_refused() -> None:
    """No such tensor, an output, and one beside which every input would cross."""
    model, feeds = reader(), {"x": np.zeros((1, 3, 8, 24), dtype=np.float32)}
    for tensor in ("nowhere", "y", "w0"):
        with pytest.raises(TheirsError) as caught:
            cutting.at(model, feeds, tensor)
        assert caught.value.reason == "no_cut"
        assert f"'{tensor}'" in str(caught.value)
    net = Net()
    net.op("Add", net.op("Relu", "x", out="aside"), net.op("Neg", "x"), out="y")
    beside = net.model({"x": (TensorProto.FLOAT, ["batch", 4])}, {"y": ["batch", 4]})
    with pytest.raises(TheirsError) as caught:
        cutting.at(beside, {"x": np.ones((1, 4), dtype=np.float32)}, "aside")
    assert "the head would need all inputs as well" in str(caught.value)


def test_a_model_that_cannot_be_spared_anything_is_refused() -> None:
    """One product: whatever is cut off, nothing is left of it."""
    net = Net()
    net.op("MatMul", "x", net.weight(4, 4), out="y")
    model = net.model({"x": (TensorProto.FLOAT, ["batch", 4])}, {"y": ["batch", 4]})
    with pytest.raises(TheirsError) as caught:
        cutting.find(model, {"x": np.ones((1, 4), dtype=np.float32)})
    assert "--features" in caught.value.remedy


def test_what_has_no_batch_axis_does_not_cross() -> None:
    """A length that was computed before the cut cannot be put together for several requests."""
    net = Net()
    shape = net.op("Shape", net.op("Relu", "x", out="seen"), out="shape")
    doubled = net.op("Mul", "seen", net.tensor(2.0), out="doubled")
    net.op("Reshape", doubled, shape, out="y")
    model = net.model({"x": (TensorProto.FLOAT, ["batch", 4])}, {"y": ["batch", 4]})
    feeds = {"x": np.ones((1, 4), dtype=np.float32)}
    assert cutting.at(model, feeds, "seen").crossing == ("seen",)
    with pytest.raises(TheirsError):
        cutting.at(model, feeds, "shape")


def test_an_output_before_the_cut_is_refused() -> None:
    """The head could not give it."""
    model = reader()
    model.graph.output.append(helper.make_tensor_value_info("steps", TensorProto.FLOAT, None))
    wide = next(node.output[0] for node in model.graph.node if node.op_type == "MatMul")
    with pytest.raises(TheirsError) as caught:
        cutting.at(model, {"x": np.zeros((1, 3, 8, 24), dtype=np.float32)}, wide)
    assert "an output of the model lies before it" in str(caught.value)
