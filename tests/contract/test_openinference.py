"""The Open Inference Protocol as bytes: what goes in comes out bit for bit, and whatever else comes in is refused by name."""

import contextlib
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from appliance.contract.admission import check
from appliance.contract.errors import OursError, TheirsError
from appliance.contract.inference import DTYPES, Answer, Array, Request, Signature, Tags, TensorSpec
from appliance.contract.openinference import (
    HEADER_LENGTH,
    MAX_JSON_BYTES,
    MAX_TENSORS,
    Layout,
    error,
    header_length,
    model_metadata,
    parse,
    render,
    repository_index,
    server_metadata,
)
from appliance.contract.vocabulary import Datatype, Mode, Platform

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12).map(str.encode)


def arrays(datatype: Datatype, *, finite: bool = False, text: bool = False) -> st.SearchStrategy[Array]:
    """Arrays of a datatype: any bit pattern, unless finite numbers or UTF-8 are asked for."""
    if datatype is Datatype.BYTES:
        return SHAPES.flatmap(
            lambda shape: hnp.arrays(object, shape, elements=TEXTS if text else st.binary(max_size=12), fill=st.nothing())
        )
    elements = {"allow_nan": False, "allow_infinity": False} if finite and datatype.startswith("FP") else None
    return hnp.arrays(DTYPES[datatype], SHAPES, elements=elements)


def same(one: Array, other: Array) -> bool:
    """Equal to the last bit, signs of zero and payloads of NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.tolist() == other.tolist() if one.dtype == object else one.tobytes() == other.tobytes()


def answered(array: Array, *, binary: bool) -> tuple[int | None, bytes]:
    """Render an array as the output of an answer; return what a header says and the body."""
    headers, parts = render(Answer("7", "m", "3", {"t": array}, Mode.CONSTRAINED), Layout(default_binary=binary))
    return header_length(headers.get(HEADER_LENGTH)), b"".join(parts)


def mirrored(length: int | None, body: bytes) -> tuple[int | None, bytes]:
    """Turn an answer into a request with the same tensors: outputs become inputs, their bytes stay as they are."""
    head = body if length is None else body[:length]
    turned = head.replace(b'"outputs":', b'"inputs":')
    return None if length is None else len(turned), turned + body[len(head) :]


def tensor(**changes: Any) -> dict[str, Any]:
    """A right input of 2x2 FP32 in JSON, with changes; None takes a key away."""
    right = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}
    return {key: value for key, value in right.items() if value is not None}


def asked(*inputs: dict[str, Any], **more: Any) -> bytes:
    """The JSON of an infer request."""
    return json.dumps({"inputs": list(inputs), **more}).encode()


def fault(body: bytes, length: int | None = None) -> TheirsError:
    """Return what is said of a body that must be refused."""
    with pytest.raises(TheirsError) as caught:
        parse("m", "", length, body)
    return caught.value


@pytest.mark.parametrize("datatype", Datatype)
@given(data=st.data())
def test_binary_tensors_round_trip(datatype: Datatype, data: st.DataObject) -> None:
    """Whatever an output holds comes back as an input with every bit in place."""
    array = data.draw(arrays(datatype))
    parsed = parse("m", "", *mirrored(*answered(array, binary=True)))
    assert same(parsed.request.inputs["t"], array)


@pytest.mark.parametrize("datatype", [datatype for datatype in Datatype if datatype is not Datatype.FP16])
@given(data=st.data())
def test_json_tensors_round_trip(datatype: Datatype, data: st.DataObject) -> None:
    """Finite numbers and UTF-8 texts survive JSON bit for bit, single precision and the sign of zero included."""
    array = data.draw(arrays(datatype, finite=True, text=True))
    parsed = parse("m", "", *mirrored(*answered(array, binary=False)))
    assert same(parsed.request.inputs["t"], array)


@given(array=arrays(Datatype.INT32))
def test_nested_data_is_the_same_as_flat(array: Array) -> None:
    """`data` may be nested as the shape says."""
    nested = array.tolist() if array.shape else [array.item()]
    if 0 in array.shape[:-1]:  # JSON cannot say how long the rows of no rows are
        nested = []
    parsed = parse("m", "", None, asked({"name": "x", "shape": list(array.shape), "datatype": "INT32", "data": nested}))
    assert same(parsed.request.inputs["x"], array)


def test_binary_inputs_are_views_on_the_body() -> None:
    """No copy is made of what may be megabytes."""
    length, body = mirrored(*answered(np.arange(6, dtype=np.float32), binary=True))
    view = np.frombuffer(body, np.uint8)
    assert np.shares_memory(parse("m", "", length, body).request.inputs["t"], view)


def test_contiguous_outputs_are_not_copied() -> None:
    """The array's own memory is what goes to the socket; a strided one is put in order first."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    _, parts = render(Answer("", "m", "1", {"y": array}, Mode.FULL), Layout(default_binary=True))
    assert np.shares_memory(np.frombuffer(parts[1], np.uint8), array)
    _, parts = render(Answer("", "m", "1", {"y": array.T}, Mode.FULL), Layout(default_binary=True))
    assert bytes(parts[1]) == array.T.tobytes()


def test_several_tensors_mix_json_and_binary() -> None:
    """Binary tensors follow each other in the order of the inputs, whatever stands between them in JSON."""
    one, three = np.array([1, 2], np.int16), np.array([[5.0]], np.float64)
    binary = [
        {"name": "a", "shape": [2], "datatype": "INT16", "parameters": {"binary_data_size": 4}},
        tensor(name="b"),
        {"name": "c", "shape": [1, 1], "datatype": "FP64", "parameters": {"binary_data_size": 8}},
    ]
    head = asked(*binary)
    inputs = parse("m", "", len(head), head + one.tobytes() + three.tobytes()).request.inputs
    assert list(inputs) == ["a", "b", "c"]
    assert same(inputs["a"], one)
    assert same(inputs["c"], three)
    assert inputs["b"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("parameters", "tags"),
    [
        ({}, Tags()),
        ({"priority": 0, "timeout": 150_000, "accept_degradation": False}, Tags(0, 0.15, accept_degradation=False)),
        ({"timeout": 0, "sequence_id": 5, "anything": [{}]}, Tags()),
        ({"priority": 9, "timeout": None}, Tags(9)),
    ],
)
def test_tags_travel_in_parameters(parameters: dict[str, Any], tags: Tags) -> None:
    """Microseconds become seconds, 0 means none as in Triton, and what is unknown is ignored."""
    request = parse("m", "3", None, asked(tensor(), id="7", parameters=parameters)).request
    assert request.tags == tags
    assert (request.id, request.model, request.version) == ("7", "m", "3")


def test_an_answer_says_who_made_it() -> None:
    """Mode and model version stand in `parameters`, the request's id comes back, an absent one stays absent."""
    answer = Answer("7", "m", "3", {"y": np.zeros(1, np.float32)}, Mode.MINIMAL)
    headers, parts = render(answer, Layout())
    document = json.loads(b"".join(parts))
    assert headers == {"Content-Type": "application/json"}
    assert document == {
        "id": "7",
        "model_name": "m",
        "model_version": "3",
        "parameters": {"mode": "C", "model_version": "3", "route": "edge"},
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [0.0]}],
    }
    assert "id" not in json.loads(b"".join(render(Answer("", "m", "3", {}, Mode.FULL), Layout())[1]))


def test_outputs_are_rendered_as_asked() -> None:
    """An output's own wish beats the request's; only what was asked is given, in the order asked."""
    wish = [{"name": "b"}, {"name": "a", "parameters": {"binary_data": False}}]
    request, layout = parse("m", "", None, asked(tensor(), outputs=wish, parameters={"binary_data_output": True}))
    assert request.outputs == ("b", "a")
    outputs = {name: np.ones(1, np.int8) for name in "abc"}
    headers, parts = render(Answer("", "m", "1", outputs, Mode.FULL), layout)
    shown = json.loads(parts[0])["outputs"]
    assert int(headers[HEADER_LENGTH]) == len(parts[0])
    assert [(each["name"], each.get("parameters"), each.get("data")) for each in shown] == [
        ("b", {"binary_data_size": 1}, None),
        ("a", None, [1]),
    ]


def test_what_json_has_no_number_for_is_written_as_triton_does() -> None:
    """NaN and infinities are tokens that Triton's clients and Python read; finite neighbours keep every bit."""
    array = np.array([np.nan, np.inf, -np.inf, np.float32(0.1)], np.float32)
    _, body = answered(array, binary=False)
    assert b"[NaN,Infinity,-Infinity,0.10000000149011612]" in body
    assert np.array_equal(np.array(json.loads(body)["outputs"][0]["data"], np.float32), array, equal_nan=True)


@pytest.mark.parametrize(("array", "named"), [(np.zeros(1, np.float16), "FP16"), (np.array([b"\xff"], object), "UTF-8")])
def test_an_output_that_json_cannot_carry_is_refused(array: Array, named: str) -> None:
    """The caller is told to ask for it in binary."""
    with pytest.raises(TheirsError, match=f"output 't'.*{named}.*binary_data"):
        answered(array, binary=False)


def test_a_missing_output_is_our_fault() -> None:
    """An answer without an output that was admitted breaks an invariant of ours."""
    with pytest.raises(OursError, match="'y'"):
        render(Answer("", "m", "1", {}, Mode.FULL), Layout(binary={"y": True}))


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"data": [1, 2, 3]}, "shape", r"input 'x': .*\[2, 2\] holds 4 elements, data has 3"),
        ({"data": [[1, 2, 3, 4]]}, "shape", r"data has shape \[1, 4\], expected \[2, 2\]"),
        ({"data": [[1, 2, 3], [4]]}, "malformed", "data is not FP32 of shape"),
        ({"data": [[[1, 2, 3, 4]]]}, "shape", "nested 3 deep"),
        ({"data": [1, 2, 3, "4"]}, "malformed", "input 'x': .*FP32"),
        ({"data": [1, 2, 3, None]}, "malformed", "FP32"),
        ({"data": [1, 2, 3, 1e39]}, "malformed", "beyond the range of FP32"),
        ({"data": {"a": 1, "b": 2, "c": 3, "d": 4}}, "shape", "nested 0 deep"),
        ({"data": None}, "malformed", "neither data nor binary_data_size"),
        ({"datatype": "INT8", "data": [1, 2, 3, 128]}, "malformed", "INT8"),
        ({"datatype": "UINT64", "data": [1, 2, 3, -1]}, "malformed", "UINT64"),
        ({"datatype": "INT64", "data": [1, 2, 3, 2**63]}, "malformed", "INT64"),
        ({"datatype": "INT32", "data": [1, 2, 3, 4.5]}, "malformed", "INT32"),
        ({"datatype": "BOOL", "data": [1, 0, 1, 0]}, "malformed", "BOOL"),
        ({"datatype": "FP16"}, "datatype", "FP16 travels in binary only"),
        ({"datatype": "BF16"}, "datatype", "'BF16' is unknown, expected one of BOOL"),
        ({"datatype": "BYTES", "data": ["a", "b", "c"]}, "shape", r"data has shape \[3\]"),
        ({"datatype": "BYTES", "data": [["a"], ["b", "c", "d"]]}, "malformed", "rows differ"),
        ({"shape": [-1, 2]}, "shape", "axis 0 of the shape is negative"),
        ({"shape": [2**64, 2]}, "shape", "axis 0 of the shape is too large"),
        ({"shape": [2**31 - 1, 2**31 - 1]}, "shape", "larger than"),
        ({"shape": [0, 2**31 - 1, 2**31 - 1], "data": []}, "shape", "larger than"),
        ({"shape": [1] * 9}, "shape", "9 axes, at most 8"),
        ({"shape": [2, 2.5]}, "malformed", r"inputs\[0\].shape\[1\]"),
        ({"shape": "2,2"}, "malformed", r"inputs\[0\].shape"),
        ({"name": None}, "malformed", "name"),
        ({"parameters": {"shared_memory_region": "r"}}, "malformed", "input 'x': shared memory"),
        ({"parameters": {"binary_data_size": 16}}, "malformed", "both data and binary_data_size"),
        ({"data": None, "parameters": {"binary_data_size": -1}}, "malformed", "binary_data_size is -1"),
        ({"data": None, "parameters": {"binary_data_size": 2**70}}, "malformed", "has 0 bytes left"),
    ],
)
def test_a_wrong_json_tensor_is_refused_by_name(changes: dict[str, Any], reason: str, words: str) -> None:
    """The refusal says which tensor, what was expected and what was seen."""
    refused = fault(asked(tensor(**changes)))
    assert refused.reason == reason
    assert re.search(words, str(refused)), str(refused)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "infer request"),
        (b"null", "infer request"),
        (b"{}", "inputs"),
        (b'{"inputs": [', "infer request"),
        (b"[" * 200_000, "infer request"),
        (b'{"inputs": [], "x": ' + b"[" * 200_000, "infer request"),
        (b'{"inputs": [{"name": "\xff"}]}', "infer request"),
        (asked(tensor(), tensor()), "inputs: 2 are listed under 1 names"),
        (asked(tensor(), outputs=[{"name": "y"}, {"name": "y"}]), "outputs: 2 are listed under 1 names"),
        (asked(*[tensor(name=str(n)) for n in range(MAX_TENSORS + 1)]), "65 inputs, at most 64"),
        (asked(tensor(), outputs=[{"name": "y", "parameters": {"classification": 3}}]), "output 'y': classification"),
        (asked(tensor(), outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]), "output 'y': shared memory"),
        (asked(tensor(), id="i" * 257), "id has 257 characters"),
        (asked(tensor(), id=7), "id"),
        (asked(tensor(), parameters={"priority": 10}), "priority"),
        (asked(tensor(), parameters={"timeout": -1}), "timeout"),
        (asked(tensor(), parameters={"timeout": "soon"}), "timeout"),
        (asked(tensor()) + b"\0", "infer request"),
    ],
)
def test_a_wrong_request_is_refused(body: bytes, words: str) -> None:
    """What is wrong is named by its path or its word."""
    refused = fault(body)
    assert refused.reason == "malformed"
    assert words in str(refused)


def test_a_huge_json_part_is_refused_unread() -> None:
    """Numbers in JSON cost many times their size in memory: large tensors are sent to the binary extension."""
    refused = fault(b" " * (MAX_JSON_BYTES + 1))
    assert (refused.reason, "binary_data_size" in refused.remedy) == ("oversized", True)


@pytest.mark.parametrize(
    ("size", "sent", "words"),
    [
        (16, 8, "binary_data_size is 16, the body has 8 bytes left"),
        (8, 8, r"needs 16 bytes, binary data has 8"),
        (16, 20, "4 bytes are left in the body after the last input"),
    ],
)
def test_a_body_of_the_wrong_length_is_refused(size: int, sent: int, words: str) -> None:
    """Truncated and overlong binary data are told apart, with both numbers."""
    head = asked(tensor(data=None, parameters={"binary_data_size": size}))
    assert words in str(fault(head + bytes(sent), len(head)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x01\0\0\0a", "do not fit"),
        (b"\x05\0\0\0abcd", "element 0 ends 1 bytes beyond"),
        (b"\x04\0\0\0aaaa", "before the length of element 1"),
        (b"\x00\0\0\0\x00\0\0\0z", "1 bytes are left"),
        (b"\xff\xff\xff\xff\x00\0\0\0", "beyond the data"),
    ],
)
def test_binary_texts_that_lie_about_their_length_are_refused(data: bytes, words: str) -> None:
    """A length that points outside of the data is never followed."""
    head = asked({"name": "s", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}})
    refused = fault(head + data, len(head))
    assert "input 's'" in str(refused)
    assert words in str(refused)


def test_a_binary_truth_value_is_0_or_1() -> None:
    """A byte of 2 would be a boolean that is neither true nor false to half of numpy."""
    head = asked({"name": "x", "shape": [2], "datatype": "BOOL", "parameters": {"binary_data_size": 2}})
    assert "neither 0 nor 1" in str(fault(head + b"\x01\x02", len(head)))


def test_a_header_length_beyond_the_body_is_refused() -> None:
    """Neither a slice nor a negative index is made of it."""
    assert "the body has 2 bytes" in str(fault(b"{}", 3))
    assert "the body has 2 bytes" in str(fault(b"{}", -1))


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "0x10", "\uff11\uff12", "1_0", " 1", "9" * 13, "many"])
def test_a_header_length_is_a_plain_number(text: str) -> None:
    """Python's own ideas of a number are not the protocol's."""
    with pytest.raises(TheirsError, match=HEADER_LENGTH):
        header_length(text)


def test_a_callers_text_is_shortened_and_escaped() -> None:
    """An error is one short line, whatever names a caller thinks up."""
    refused = fault(asked(tensor(name="\n" * 5000, shape=[3])))
    assert len(str(refused)) < 400
    assert "\n" not in str(refused)


@given(data=st.data())
def test_no_mutation_raises_anything_but_their_fault(data: st.DataObject) -> None:
    """A right request, cut short or with bytes changed, parses or is refused; nothing else happens."""
    datatype = data.draw(st.sampled_from(list(Datatype)))
    length, body = mirrored(*answered(data.draw(arrays(datatype)), binary=True))
    broken = bytearray(body)
    for _ in range(data.draw(st.integers(0, 4))):
        if broken:
            broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    del broken[data.draw(st.integers(0, len(broken))) :]
    shift = data.draw(st.sampled_from([0, 0, -1, 1, 40, -40]))
    with contextlib.suppress(TheirsError):
        parse("m", "", None if length is None else max(length + shift, -1), bytes(broken))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(list(Datatype)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "shape", "data", "parameters"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(data=st.data())
def test_no_json_raises_anything_but_their_fault(data: st.DataObject) -> None:
    """Any JSON value in any place of the request parses or is refused."""
    changes = data.draw(
        st.dictionaries(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), JSON_VALUES | st.just([2, 2]), max_size=3)
    )
    more = data.draw(st.dictionaries(st.sampled_from(["id", "outputs", "parameters", "inputs"]), JSON_VALUES, max_size=1))
    body = json.dumps({"inputs": [{**tensor(), **changes}], **more}).encode()
    with contextlib.suppress(TheirsError):
        parse("m", "", None, body)


SIGNATURE = Signature(
    Platform.ONNX,
    (TensorSpec("x", Datatype.FP32, (-1, 3, -1)), TensorSpec("s", Datatype.BYTES, (-1,))),
    (TensorSpec("y", Datatype.FP32, (-1, 2)),),
)


def request(x: Any = None, s: Any = None, **changes: Any) -> Request:
    """A request of two rows that fits `SIGNATURE`, with changes."""
    inputs: dict[str, Array] = {
        "x": np.zeros((2, 3, 5), np.float32) if x is None else x,
        "s": np.array([b"a", b"b"], object) if s is None else s,
    }
    return Request("", "m", **{"inputs": inputs, **changes})


def test_a_fitting_request_has_its_rows_counted() -> None:
    """Free axes take any size, axis 0 is the batch; a model without a free axis 0 takes one row."""
    assert check(request(outputs=("y",)), SIGNATURE, 2) == 2
    fixed = Signature(Platform.ONNX, (TensorSpec("x", Datatype.FP32, (4, 3)), TensorSpec("k", Datatype.INT64, ())), ())
    inputs: dict[str, Array] = {"x": np.zeros((4, 3), np.float32), "k": np.array(5)}
    assert check(Request("", "m", inputs), fixed, 1) == 1


@pytest.mark.parametrize(
    ("wrong", "reason", "words"),
    [
        (request(inputs={"x": np.zeros((2, 3, 5), np.float32)}), "missing_input", "'s' are missing; the model takes 'x', 's'"),
        (request(inputs={**request().inputs, "z": np.zeros(1)}), "unknown_input", "'z' are unknown"),
        (request(inputs={str(n): np.zeros(1) for n in range(60)}), "missing_input", "'x', 's' are missing"),
        (request(outputs=("y", "z")), "unknown_output", "'z' are unknown; the model gives 'y'"),
        (request(x=np.zeros((2, 3, 5))), "datatype", "input 'x': datatype is FP64, expected FP32"),
        (request(s=np.zeros(2, np.uint8)), "datatype", "input 's': datatype is UINT8, expected BYTES"),
        (request(x=np.zeros((2, 3), np.float32)), "shape", "input 'x': shape [2, 3] does not fit [-1, 3, -1]: it has 2 axes, expected 3"),
        (request(x=np.zeros((2, 4, 5), np.float32)), "shape", "axis 1 is 4, expected 3"),
        (request(x=np.zeros((2, 3, 0), np.float32)), "shape", "axis 2 is 0, expected at least 1"),
        (request(x=np.zeros((0, 3, 5), np.float32)), "shape", "axis 0 is 0, expected at least 1"),
        (request(x=np.zeros((3, 3, 5), np.float32)), "batch", "input 's': 2 rows, but another input has 3"),
        (request(x=np.zeros((9, 3, 1), np.float32), s=np.array([b""] * 9, object)), "batch", "9 rows, at most 8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wrong: Request, reason: str, words: str) -> None:
    """Names, datatype, rank, fixed and free axes, batch: each with what was expected and seen."""
    with pytest.raises(TheirsError) as caught:
        check(wrong, SIGNATURE, 8)
    assert caught.value.reason == reason
    assert words in str(caught.value)


def test_metadata_says_what_a_client_needs() -> None:
    """Model, server and repository speak the protocol's words."""
    described = json.loads(model_metadata("m", ["3", "2"], SIGNATURE, 8))
    assert (described["name"], described["versions"], described["platform"]) == ("m", ["3", "2"], "onnxruntime_onnx")
    assert described["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 3, -1]}
    assert described["parameters"]["max_batch"] == 8
    assert json.loads(server_metadata("appliance", "1"))["extensions"] == ["binary_tensor_data", "parameters"]
    assert json.loads(repository_index([("m", "3", False, "warming")])) == [
        {"name": "m", "version": "3", "state": "UNAVAILABLE", "reason": "warming"}
    ]
    assert json.loads(error("no", "shape")) == {"error": "no", "reason": "shape"}
    assert json.loads(error("no")) == {"error": "no"}
