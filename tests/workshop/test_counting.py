"""The work of one sample, counted by hand and by the counter."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

from appliance.workshop.counting import count


def test_a_convolution_and_a_product_count_two_for_each_multiply_add(tmp_path: Path) -> None:
    """Conv 3 to 4 channels, 3 x 3, on 8 x 8 (same size), then a product 256 to 10; axes that the file leaves free are the sample's."""
    weights = {"w": (4, 3, 3, 3), "m": (256, 10)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Flatten", ["c"], ["f"]),
            helper.make_node("MatMul", ["f", "m"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()],
    )
    path = tmp_path / "m.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    operations, moved = count(path, {"x": [3, 8, 8]})
    assert operations == 2 * (4 * 8 * 8) * (3 * 3 * 3) + 2 * 10 * 256
    assert moved == 2 * 4 * (4 * 8 * 8 + 256), "the two activations between input and output, written and read"
