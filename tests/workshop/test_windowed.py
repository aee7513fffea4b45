"""Windowed attention against full attention, and against the definition of what each position may see."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from appliance.contract.errors import TheirsError
from appliance.contract.inference import Array
from appliance.workshop import graphs, windowed
from appliance.workshop.windowed import Window
from tests.workshop.small_models import DEPTH, FORMS, HEADS, attention, sample

BITS = 1e-5


def ran(model: Any, feeds: dict[str, Array]) -> Array:
    return graphs.answers(graphs.session(model), feeds)[0]


def allowed(length: int, window: Window) -> Array:
    """Which position (row) may see which: by the words of the module's docstring."""
    blocks = np.arange(length) // window.size
    near = np.abs(blocks[:, np.newaxis] - blocks[np.newaxis]) <= window.reach
    return near | (np.arange(length)[np.newaxis] < window.sinks)


def by_definition(model: Any, feeds: dict[str, Array], window: Window, form: str) -> Array:
    """The attention of `small_models` in numpy, with everything that may not be seen left out."""
    weights = [numpy_helper.to_array(each) for each in model.graph.initializer if list(each.dims) == [DEPTH, DEPTH]]
    x = feeds["x"].astype(np.float64)
    batch, length, _ = x.shape
    queries, keys, values = ((x @ each).reshape(batch, length, HEADS, -1).transpose(0, 2, 1, 3) for each in weights[:3])
    scores = queries @ keys.transpose(0, 1, 3, 2) / np.sqrt(DEPTH / HEADS)
    seen = np.broadcast_to(allowed(length, window), scores.shape).copy()
    if "mask" in feeds:
        seen &= feeds["mask"].astype(bool)[:, np.newaxis, np.newaxis]
    if form == "causal":
        seen &= np.tri(length, dtype=bool)
    scores = np.where(seen, scores, -1e30)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (shares / shares.sum(axis=-1, keepdims=True)) @ values
    return mixed.transpose(0, 2, 1, 3).reshape(batch, length, DEPTH) @ weights[3]


def windows(least: int, most: int) -> st.SearchStrategy[Window]:
    """Windows with blocks of `least` to `most` positions."""
    return st.builds(
        lambda size, reach, sinks: Window(size, reach, min(sinks, size)), st.integers(least, most), st.integers(0, 2), st.integers(0, 3)
    )


@settings(max_examples=40)
@given(form=st.sampled_from(FORMS), length=st.integers(1, 24), window=windows(24, 40))
def test_a_window_as_long_as_the_sequence_changes_nothing(form: str, length: int, window: Window) -> None:
    """Whatever the form of the mask, and with padding in the sequence."""
    model, feeds = attention(form), sample(length, 2, masked=True, form=form)
    found = windowed.windowed(model, sample(30, form=form), window)
    assert np.allclose(ran(found, feeds), ran(model, feeds), atol=BITS)


@settings(max_examples=60)
@given(form=st.sampled_from(FORMS), opset=st.sampled_from((12, 17)), length=st.integers(1, 50), window=windows(1, 12))
def test_each_position_sees_its_neighbourhood_and_nothing_else(form: str, opset: int, length: int, window: Window) -> None:
    """Held against attention written out with all other keys left out; only positions that see anything at all are compared."""
    model, feeds = attention(form, opset=opset), sample(length, 2, masked=True, form=form)
    found = windowed.windowed(model, sample(30, form=form), window)
    expected = by_definition(model, feeds, window, form)
    seen = allowed(length, window) & (feeds["mask"][0].astype(bool) if "mask" in feeds else True)
    compared = (seen & np.tri(length, dtype=bool) if form == "causal" else seen).any(axis=1)
    got = ran(found, feeds)
    assert np.isfinite(got).all()
    assert np.allclose(got[:, compared], expected[:, compared], atol=1e-4)


def test_what_is_far_away_does_not_count() -> None:
    """Changing position 40 of 64 changes its neighbours' answers, and no others: not even by a bit."""
    found = windowed.windowed(attention(), sample(64), Window(8, 1, 1))
    before, feeds = ran(found, sample(64)), sample(64)
    feeds["x"][0, 40] += 1
    changed = (ran(found, feeds) != before).any(axis=(0, 2))
    assert changed.nonzero()[0].tolist() == list(range(32, 56))


def test_a_sink_is_seen_by_all() -> None:
    """Changing the first position changes every answer if it is a sink, and its neighbourhood's only if not."""
    for sinks, reached in ((1, 64), (0, 16)):
        found = windowed.windowed(attention(), sample(64), Window(8, 1, sinks))
        before, feeds = ran(found, sample(64)), sample(64)
        feeds["x"][0, 0] += 1
        assert (ran(found, feeds) != before).any(axis=(0, 2)).sum() == reached


def test_scores_far_away_are_not_computed() -> None:
    """The product of queries and keys has as many elements as positions times what each sees, not length times length."""
    window = Window(8, 1, 1)
    found = windowed.windowed(attention(), sample(64), window)
    products = [node.output[0] for node in found.graph.node if node.op_type == "MatMul" and node.output[0].startswith("window")]
    seen = graphs.look_inside(found, sample(64), products)
    assert max(array.size for array in seen.values()) == HEADS * 64 * window.keys
    assert "scores" not in {name for node in found.graph.node for name in node.output}


def test_the_model_that_was_given_is_untouched() -> None:
    """Surgery is done on a copy, and done twice it gives the same bytes."""
    model = attention("key_mask")
    before = model.SerializeToString(deterministic=True)
    once, twice = (windowed.windowed(model, sample(30, form="key_mask"), Window(4)) for _ in range(2))
    assert model.SerializeToString(deterministic=True) == before
    assert once.SerializeToString(deterministic=True) == twice.SerializeToString(deterministic=True)


def test_sinks_lie_in_the_first_block() -> None:
    """Elsewhere one of them could be seen twice, and weigh double."""
    with pytest.raises(TheirsError) as caught:
        Window(2, 1, 3)
    assert caught.value.reason == "window"


def refusal(model: Any, feeds: dict[str, Array]) -> str:
    with pytest.raises(TheirsError) as caught:
        windowed.windowed(model, feeds, Window(4))
    assert caught.value.reason == "no_attention"
    assert windowed.longest(model, feeds) == 0
    return str(caught.value)


def test_a_softmax_that_is_no_attention_is_named() -> None:
    """A classifier's last layer has no product of activations before it."""
    model = attention()
    nodes = [node for node in model.graph.node if node.op_type != "Softmax"]
    graphs.renew(model, [*nodes[:-1], helper.make_node("Softmax", [nodes[-1].input[0]], ["y"], name="last")])
    mixing = next(node for node in model.graph.node if node.op_type == "MatMul" and node.input[0].startswith("softmax"))
    mixing.input[0] = "div_9"
    assert "last: no product of two activations stands before it" in refusal(model, sample(30))


def test_attention_between_two_sequences_is_left_alone() -> None:
    """Where queries and keys differ in number, a window has no meaning."""
    model = attention()
    shorter = helper.make_node("Slice", ["x", "start", "end", "axis"], ["half"], name="half")
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[0] == "x" and node.input[1] != model.graph.node[0].input[1]:
            node.input[0] = "half"
    tensors = [numpy_helper.from_array(np.array([value]), name) for name, value in (("start", 0), ("end", 10), ("axis", 1))]
    graphs.renew(model, [shorter, *model.graph.node], tensors)
    assert "30 queries look at 10 keys" in refusal(model, sample(30))


def test_weights_that_somebody_else_reads_are_left_alone() -> None:
    """An attention whose weights are an output cannot be windowed without changing that output."""
    model = attention()
    softmax = next(node.output[0] for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(helper.make_tensor_value_info(softmax, 1, None))
    assert "its weights are read in more than one place" in refusal(model, sample(30))


def test_an_old_softmax_without_an_axis_is_over_more_than_the_keys() -> None:
    """Before opset 13 it was over all axes from the first on: no attention."""
    model = attention(opset=12)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    del softmax.attribute[:]
    assert "the softmax is over axis 1, not over the keys" in refusal(model, sample(30))
