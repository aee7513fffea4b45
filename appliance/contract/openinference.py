"""The wire of the Open Inference Protocol v2 over HTTP (KServe, Triton): infer requests to `Request`, `Answer` to bytes.

1. JSON tensors, and the binary tensor extension: `Inference-Header-Content-Length` bytes of JSON, then the binary tensors in the order
   of the inputs, each `parameters.binary_data_size` long, with nothing between or after them.
2. Outputs are rendered as asked: `binary_data` of an output, else `binary_data_output` of the request, else JSON.
3. Tags travel in the request's `parameters`, and what made an answer in the answer's: `contract.tags`, shared with gRPC. Unknown parameters
   are ignored, except those that would change what the answer means (`classification`): these are refused.
4. What a server says of itself and of its models stands in `contract.openinference_catalog`, the bounds in `contract.openinference_bounds`.
5. Any fault is a TheirsError that names the tensor or the JSON path; no input raises anything else.
6. Binary inputs are views on the body: whoever keeps them keeps the body.
7. Tensors may stand in memory that the caller lent: `contract.openinference_shared`.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from appliance.contract.admission import check, datatype_of, quoted
from appliance.contract.errors import OursError, TheirsError
from appliance.contract.frames import Regions
from appliance.contract.inference import Answer, Array, Promise, Request
from appliance.contract.openinference_bounds import MAX_JSON_BYTES, MAX_TENSORS, check_counts, check_id, datatype_named
from appliance.contract.openinference_catalog import error, model_metadata, repository_index, server_metadata
from appliance.contract.openinference_data import from_binary, from_json, to_binary, to_json
from appliance.contract.openinference_shared import Part, Placed, Room, lent_input, lent_room
from appliance.contract.tags import DEFAULT, Made, Parameters, made, tags
from appliance.contract.vocabulary import Datatype

__all__ = [
    "HEADER_LENGTH",
    "MAX_JSON_BYTES",
    "MAX_TENSORS",
    "Layout",
    "Parsed",
    "check",
    "error",
    "header_length",
    "model_metadata",
    "parse",
    "promised",
    "render",
    "repository_index",
    "server_metadata",
]

HEADER_LENGTH = "Inference-Header-Content-Length"
_MAX_LENGTH_DIGITS = 12
_JSON = {"Content-Type": "application/json"}


class _Parameters(Parameters):
    binary_data_output: bool = False


_WITHOUT_TAGS = (_Parameters(), _Parameters(binary_data_output=True))
"""Most callers say no more: comparing costs a tenth of reading all tags."""


class _InputParameters(Part):
    binary_data_size: int | None = None


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: msgspec.Raw = msgspec.Raw()
    parameters: _InputParameters | None = None


class _OutputParameters(Part):
    binary_data: bool | None = None
    classification: int = 0


class _Output(msgspec.Struct):
    name: str
    parameters: _OutputParameters | None = None


class _Infer(msgspec.Struct):
    inputs: list[_Input]
    outputs: list[_Output] = []
    id: str = ""
    parameters: _Parameters | None = None


class _Size(msgspec.Struct):
    binary_data_size: int


class _Tensor(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: Sequence[int]
    parameters: _Size | Placed | None = None
    data: msgspec.Raw | None = None


class _Answer(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    parameters: Made
    outputs: list[_Tensor]
    id: str = ""


_decode = msgspec.json.Decoder(_Infer).decode
_encode = msgspec.json.Encoder().encode


class Layout(NamedTuple):
    """How the caller wants the outputs: in binary or in JSON, by output name and for those not named; or in memory that he lent."""

    default_binary: bool = False
    binary: Mapping[str, bool] = {}
    rooms: Mapping[str, Room] = {}


class Parsed(NamedTuple):
    """One infer request, and how to render its answer."""

    request: Request
    layout: Layout


def header_length(text: str | None) -> int | None:
    """Read the value of `Inference-Header-Content-Length`. Raises: TheirsError (`malformed`)."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_LENGTH_DIGITS):
        raise TheirsError("malformed", f"{quoted(text)} is not a length in bytes", where=HEADER_LENGTH)
    return int(text)


def parse(
    model: str,
    version: str,
    length: int | None,
    body: bytes | bytearray | memoryview,
    regions: Regions | None = None,
    *,
    caller: Hashable = None,
) -> Parsed:
    """Parse an infer request; `length` is the JSON part's size where binary tensors follow it, `regions` is memory that callers lent.

    Raises: TheirsError (`malformed`, `datatype`, `shape`, `oversized`, `unknown_region`, `shared_memory`).
    """
    view = memoryview(body)
    if length is not None and not 0 <= length <= len(view):
        raise TheirsError("malformed", f"it says {length} bytes of JSON, the body has {len(view)} bytes", where=HEADER_LENGTH)
    head = view if length is None else view[:length]
    if len(head) > MAX_JSON_BYTES:
        what = f"{len(head)} bytes of JSON, at most {MAX_JSON_BYTES} are allowed"
        raise TheirsError("oversized", what, remedy="send large tensors in binary (binary_data_size)")
    try:
        asked = _decode(head)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        remedy = "" if length is not None else f"where binary tensors follow the JSON, say its size in {HEADER_LENGTH}"
        raise TheirsError("malformed", str(fault), where="infer request", remedy=remedy) from fault
    check_id(asked.id)
    parameters = asked.parameters
    binary: dict[str, bool] = {}
    rooms: Mapping[str, Room] = {}
    if asked.outputs:
        binary = {output.name: _wants_binary(output, parameters) for output in asked.outputs}
        check_counts("outputs", len(asked.outputs), len(binary))
        rooms = _rooms(asked.outputs, regions)
    request = Request(
        id=asked.id,
        model=model,
        inputs=_inputs(asked.inputs, view[len(head) :], regions),
        version=version,
        outputs=tuple(binary),
        tags=DEFAULT if parameters is None or parameters in _WITHOUT_TAGS else tags(parameters),
        caller=caller,
    )
    return Parsed(request, Layout(parameters is not None and parameters.binary_data_output, binary, rooms))


def _inputs(tensors: list[_Input], binary: memoryview, regions: Regions | None) -> dict[str, Array]:
    inputs: dict[str, Array] = {}
    if len(tensors) > MAX_TENSORS:
        check_counts("inputs", len(tensors), len(tensors))
    offset = 0
    for tensor in tensors:
        size = None if tensor.parameters is None else _binary_size(tensor, tensor.parameters)
        datatype = datatype_named(tensor.name, tensor.datatype)
        if size is None:
            inputs[tensor.name] = _other_input(tensor, datatype, regions)
            continue
        left = len(binary) - offset
        if not 0 <= size <= left:
            raise TheirsError("malformed", f"binary_data_size is {size}, the body has {left} bytes left", where=_where(tensor))
        inputs[tensor.name] = from_binary(tensor.name, datatype, tensor.shape, binary[offset : offset + size])
        offset += size
    check_counts("inputs", len(tensors), len(inputs))
    if offset != len(binary):
        raise TheirsError("malformed", f"{len(binary) - offset} bytes are left in the body after the last input")
    return inputs


def _other_input(tensor: _Input, datatype: Datatype, regions: Regions | None) -> Array:
    """Read an input that is not in the body's binary part: in JSON, or in memory that the caller lent."""
    data, part = bytes(tensor.data), tensor.parameters
    if part is not None and part.is_named:
        lent = lent_input(part, tensor.name, datatype, tensor.shape, regions)
        if data:
            raise TheirsError("malformed", "it has both data and a shared_memory_region", where=_where(tensor))
        return lent
    if not data:
        raise TheirsError("malformed", "it has neither data nor binary_data_size", where=_where(tensor))
    return from_json(tensor.name, datatype, tensor.shape, data)


def _binary_size(tensor: _Input, parameters: _InputParameters) -> int | None:
    if parameters.binary_data_size is not None and (bytes(tensor.data) or parameters.is_named):
        other = "data" if bytes(tensor.data) else "a shared_memory_region"
        raise TheirsError("malformed", f"it has both {other} and binary_data_size", where=_where(tensor))
    return parameters.binary_data_size


def _where(tensor: _Input) -> str:
    return f"input {quoted(tensor.name)}"


def _wants_binary(output: _Output, parameters: _Parameters | None) -> bool:
    wanted = output.parameters
    if wanted is not None:
        if wanted.classification:
            raise TheirsError("malformed", "classification is not served here", where=f"output {quoted(output.name)}")
        if wanted.binary_data is not None:
            return wanted.binary_data
    return parameters is not None and parameters.binary_data_output


def _rooms(outputs: list[_Output], regions: Regions | None) -> Mapping[str, Room]:
    return {
        each.name: lent_room(each.parameters, regions, f"output {quoted(each.name)}")
        for each in outputs
        if each.parameters is not None and each.parameters.is_named
    }


def render(answer: Answer, layout: Layout) -> tuple[Mapping[str, str], list[bytes | memoryview]]:
    """Render an answer as (headers, body in parts); arrays travel without a copy where they are contiguous.

    Raises: TheirsError (`datatype`: an output that JSON cannot carry was asked in JSON; `shared_memory`: it is larger than the room that was
    given), OursError (an asked output is missing).
    """
    parts: list[bytes | memoryview] = [b""]
    outputs = []
    for name in layout.binary or answer.outputs:
        array = answer.outputs.get(name)
        datatype = None if array is None else datatype_of(array)
        if array is None or datatype is None:
            raise OursError("output", f"output {quoted(name)} of {answer.model} is {'missing' if array is None else array.dtype}")
        if name in layout.rooms:
            placed = layout.rooms[name].put(to_binary(array), f"output {quoted(name)}")
            outputs.append(_Tensor(name, datatype, array.shape, placed))
        elif layout.binary.get(name, layout.default_binary):
            data = to_binary(array)
            parts.append(data)
            outputs.append(_Tensor(name, datatype, array.shape, _Size(len(data))))
        else:
            outputs.append(_Tensor(name, datatype, array.shape, None, msgspec.Raw(to_json(name, datatype, array))))
    head = _encode(_Answer(answer.model, answer.version, made(answer), outputs, answer.id))
    parts[0] = head
    if len(parts) == 1:
        return _JSON, parts
    return {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}, parts


def promised(promise: Promise) -> bytes:
    """Render a promise: the id to fetch the answer with, and why there is none yet."""
    return _encode({"id": promise.id, "why": promise.why})
