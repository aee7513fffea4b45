"""The wire of the Open Inference Protocol v2 (KServe, Triton): infer requests to `Request`, `Answer` to bytes, metadata and errors.

1. JSON tensors, and the binary tensor extension: `Inference-Header-Content-Length` bytes of JSON, then the binary tensors in the order
   of the inputs, each `parameters.binary_data_size` long, with nothing between or after them.
2. Outputs are rendered as asked: `binary_data` of an output, else `binary_data_output` of the request, else JSON.
3. Tags travel in the request's `parameters`: `priority` (0 highest to 9), `timeout` (microseconds as in Triton; 0 means none),
   `latency_slo_ms`, `accept_degradation`, `accept_stale`, `accept_deferral`, `data_residency` and `max_cost_per_inference` (dollars).
   Unknown parameters are ignored, except those that would change what the answer means (`classification`): these are refused.
4. The answer's `parameters` say `mode`, `model_version` and `route`, and where there is something to say `confidence`, `why`, `cost`, `stale_age_s`.
5. Any fault is a TheirsError that names the tensor or the JSON path; no input raises anything else.
6. Binary inputs are views on the body: whoever keeps them keeps the body.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from appliance.contract.admission import check, datatype_of, quoted
from appliance.contract.errors import OursError, TheirsError
from appliance.contract.inference import Answer, Array, Request, Signature, Tags, TensorSpec
from appliance.contract.openinference_data import from_binary, from_json, to_binary, to_json
from appliance.contract.vocabulary import Datatype

__all__ = [
    "HEADER_LENGTH",
    "Layout",
    "Parsed",
    "check",
    "error",
    "header_length",
    "model_metadata",
    "parse",
    "render",
    "repository_index",
    "server_metadata",
]

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_TENSORS = 64
"""Inputs, and outputs, of one request: more than any model here has."""
MAX_JSON_BYTES = 16 * 1024 * 1024
"""JSON numbers take 32 bytes each while they are parsed: this bounds it to about 0.25 GiB. Larger tensors travel in binary."""
MAX_ID = 256
PRIORITIES = range(10)
_MICROSECONDS = 1e6
_MOST_SLO_MS = 86_400_000
_MAX_LENGTH_DIGITS = 12
_DATATYPES = {str(datatype): datatype for datatype in Datatype}
_DEFAULT_TAGS = Tags()
_JSON = {"Content-Type": "application/json"}


class _Parameters(msgspec.Struct):
    binary_data_output: bool = False
    priority: int | None = None
    timeout: int | None = None
    accept_degradation: bool = True
    accept_stale: bool = False
    accept_deferral: bool = False
    latency_slo_ms: float | None = None
    data_residency: Literal["", "device", "region"] = ""
    max_cost_per_inference: Annotated[float, msgspec.Meta(ge=0)] | None = None


class _InputParameters(msgspec.Struct):
    binary_data_size: int | None = None
    shared_memory_region: str | None = None


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: msgspec.Raw = msgspec.Raw()
    parameters: _InputParameters | None = None


class _OutputParameters(msgspec.Struct):
    binary_data: bool | None = None
    classification: int = 0
    shared_memory_region: str | None = None


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
    parameters: _Size | None = None
    data: msgspec.Raw | None = None


class _Made(msgspec.Struct, omit_defaults=True):
    mode: str
    model_version: str
    route: str
    why: str = ""
    confidence: float | None = None
    cost: float | None = None
    stale_age_s: float | None = None


class _Answer(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    parameters: _Made
    outputs: list[_Tensor]
    id: str = ""


_decode = msgspec.json.Decoder(_Infer).decode
_encode = msgspec.json.Encoder().encode


class Layout(NamedTuple):
    """How the caller wants the outputs: in binary or in JSON, by output name and for those not named."""

    default_binary: bool = False
    binary: Mapping[str, bool] = {}


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


def parse(model: str, version: str, length: int | None, body: bytes | bytearray | memoryview) -> Parsed:
    """Parse an infer request; `length` is the JSON part's size where binary tensors follow it.

    Raises: TheirsError (`malformed`, `datatype`, `shape`, `oversized`).
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
    if len(asked.id) > MAX_ID:
        raise TheirsError("malformed", f"id has {len(asked.id)} characters, at most {MAX_ID} are allowed")
    parameters = asked.parameters
    binary = {output.name: _wants_binary(output, parameters) for output in asked.outputs} if asked.outputs else {}
    _check_numbers("outputs", len(asked.outputs), len(binary))
    request = Request(
        id=asked.id,
        model=model,
        inputs=_inputs(asked.inputs, view[len(head) :]),
        version=version,
        outputs=tuple(binary),
        tags=_DEFAULT_TAGS if parameters is None else _tags(parameters),
    )
    return Parsed(request, Layout(parameters is not None and parameters.binary_data_output, binary))


def _inputs(tensors: list[_Input], binary: memoryview) -> dict[str, Array]:
    inputs: dict[str, Array] = {}
    if len(tensors) > MAX_TENSORS:
        _check_numbers("inputs", len(tensors), len(tensors))
    offset = 0
    for tensor in tensors:
        size = None if tensor.parameters is None else _binary_size(tensor, tensor.parameters)
        datatype = _datatype(tensor)
        if size is None:
            inputs[tensor.name] = _json_input(tensor, datatype)
            continue
        left = len(binary) - offset
        if not 0 <= size <= left:
            raise TheirsError("malformed", f"binary_data_size is {size}, the body has {left} bytes left", where=_where(tensor))
        inputs[tensor.name] = from_binary(tensor.name, datatype, tensor.shape, binary[offset : offset + size])
        offset += size
    _check_numbers("inputs", len(tensors), len(inputs))
    if offset != len(binary):
        raise TheirsError("malformed", f"{len(binary) - offset} bytes are left in the body after the last input")
    return inputs


def _json_input(tensor: _Input, datatype: Datatype) -> Array:
    data = bytes(tensor.data)
    if not data:
        raise TheirsError("malformed", "it has neither data nor binary_data_size", where=_where(tensor))
    return from_json(tensor.name, datatype, tensor.shape, data)


def _binary_size(tensor: _Input, parameters: _InputParameters) -> int | None:
    if parameters.shared_memory_region is not None:
        raise TheirsError("malformed", "shared memory is not served here", where=_where(tensor), remedy="send the data in the body")
    if parameters.binary_data_size is not None and bytes(tensor.data):
        raise TheirsError("malformed", "it has both data and binary_data_size", where=_where(tensor))
    return parameters.binary_data_size


def _datatype(tensor: _Input) -> Datatype:
    datatype = _DATATYPES.get(tensor.datatype)
    if datatype is None:
        what = f"datatype {quoted(tensor.datatype)} is unknown, expected one of {', '.join(_DATATYPES)}"
        raise TheirsError("datatype", what, where=_where(tensor))
    return datatype


def _where(tensor: _Input) -> str:
    return f"input {quoted(tensor.name)}"


def _wants_binary(output: _Output, parameters: _Parameters | None) -> bool:
    wanted = output.parameters
    if wanted is not None:
        if wanted.classification or wanted.shared_memory_region is not None:
            word = "classification" if wanted.classification else "shared memory"
            raise TheirsError("malformed", f"{word} is not served here", where=f"output {quoted(output.name)}")
        if wanted.binary_data is not None:
            return wanted.binary_data
    return parameters is not None and parameters.binary_data_output


def _check_numbers(what: str, listed: int, distinct: int) -> None:
    if listed > MAX_TENSORS:
        raise TheirsError("malformed", f"{listed} {what}, at most {MAX_TENSORS} are allowed")
    if listed != distinct:
        raise TheirsError("malformed", f"{what}: {listed} are listed under {distinct} names, expected one of each")


def _tags(parameters: _Parameters) -> Tags:
    priority, timeout = parameters.priority, parameters.timeout
    if priority is not None and priority not in PRIORITIES:
        raise TheirsError("malformed", "priority is outside 0 (highest) to 9 (lowest)", where="parameters")
    if timeout is not None and not 0 <= timeout < 2**63:
        raise TheirsError("malformed", "timeout is not a number of microseconds from 0", where="parameters")
    return Tags(
        priority=_DEFAULT_TAGS.priority if priority is None else priority,
        timeout_s=timeout / _MICROSECONDS if timeout else None,
        slo_s=None if parameters.latency_slo_ms is None else _slo_s(parameters.latency_slo_ms),
        accept_degradation=parameters.accept_degradation,
        accept_stale=parameters.accept_stale,
        accept_deferral=parameters.accept_deferral,
        data_residency=parameters.data_residency,
        max_cost=parameters.max_cost_per_inference,
    )


def _slo_s(milliseconds: float) -> float:
    if not 0 < milliseconds < _MOST_SLO_MS:
        raise TheirsError(
            "malformed", f"latency_slo_ms is not a number of milliseconds above 0 and below {_MOST_SLO_MS}", where="parameters"
        )
    return milliseconds / 1e3


def render(answer: Answer, layout: Layout) -> tuple[Mapping[str, str], list[bytes | memoryview]]:
    """Render an answer as (headers, body in parts); arrays travel without a copy where they are contiguous.

    Raises: TheirsError (`datatype`: an output that JSON cannot carry was asked in JSON), OursError (an asked output is missing).
    """
    parts: list[bytes | memoryview] = [b""]
    outputs = []
    for name in layout.binary or answer.outputs:
        array = answer.outputs.get(name)
        datatype = None if array is None else datatype_of(array)
        if array is None or datatype is None:
            raise OursError("output", f"output {quoted(name)} of {answer.model} is {'missing' if array is None else array.dtype}")
        if layout.binary.get(name, layout.default_binary):
            data = to_binary(array)
            parts.append(data)
            outputs.append(_Tensor(name, datatype, array.shape, _Size(len(data))))
        else:
            outputs.append(_Tensor(name, datatype, array.shape, None, msgspec.Raw(to_json(name, datatype, array))))
    made = _Made(answer.mode, answer.version, answer.route, answer.why, answer.confidence, answer.cost, answer.age_s)
    head = _encode(_Answer(answer.model, answer.version, made, outputs, answer.id))
    parts[0] = head
    if len(parts) == 1:
        return _JSON, parts
    return {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}, parts


def model_metadata(name: str, versions: Sequence[str], signature: Signature, max_batch: int) -> bytes:
    """Render a model's metadata; axes that the model leaves free are -1, `parameters` holds what the file says of itself."""
    return _encode(
        {
            "name": name,
            "versions": list(versions),
            "platform": signature.platform,
            "inputs": [_spec(spec) for spec in signature.inputs],
            "outputs": [_spec(spec) for spec in signature.outputs],
            "parameters": {**signature.metadata, "max_batch": max_batch},
        }
    )


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def server_metadata(name: str, version: str) -> bytes:
    """Render the server's metadata with the extensions that it speaks."""
    return _encode({"name": name, "version": version, "extensions": ["binary_tensor_data", "parameters"]})


def repository_index(models: Sequence[tuple[str, str, bool, str]]) -> bytes:
    """Render the repository's index from (name, version, ready, why not)."""
    return _encode(
        [
            {"name": name, "version": version, "state": "READY" if ready else "UNAVAILABLE", "reason": why}
            for name, version, ready, why in models
        ]
    )


def error(what: str, reason: str = "") -> bytes:
    """Render an error; `reason` is a stable code for programs, an addition to the protocol that its clients ignore."""
    return _encode({"error": what, "reason": reason} if reason else {"error": what})
