"""Messages of the protocol to the contract's words and back; the same rules as over HTTP (`contract.openinference`, `contract.tags`).

1. Inputs come raw or as numbers, one way for all of a request; outputs go raw.
2. Whatever a caller sends is translated or is a TheirsError that names the tensor or the message.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from appliance.adapters.rpc.contents import from_contents
from appliance.adapters.rpc.messages import CHOICE, message
from appliance.adapters.rpc.wire import join, split
from appliance.contract.admission import datatype_of, quoted
from appliance.contract.errors import OursError, TheirsError
from appliance.contract.inference import Answer, Array, Promise, Request, TensorSpec
from appliance.contract.openinference_bounds import check_counts, check_id, datatype_named
from appliance.contract.openinference_data import from_binary, to_binary
from appliance.contract.tags import said, tags_in
from appliance.ports import ModelCard

MAX_SMALL_BYTES = 64 * 1024
"""Of every message but an infer request: a few names."""


def read(name: str, body: bytes) -> Any:
    """Parse a small message. Raises: TheirsError (`malformed`, `oversized`)."""
    if len(body) > MAX_SMALL_BYTES:
        raise TheirsError("oversized", f"{len(body)} bytes, at most {MAX_SMALL_BYTES} are allowed", where=name)
    return _parsed(name, body)


def read_infer(body: bytes, caller: Hashable = None) -> Request:
    """Parse an infer request of a caller; raw inputs are views on the body. Raises: TheirsError (`malformed`, `datatype`, `shape`, `oversized`)."""
    rest, raw = split(body)
    asked = _parsed("ModelInferRequest", rest)
    check_id(asked.id)
    inputs = {tensor.name: tensor for tensor in asked.inputs}
    check_counts("inputs", len(asked.inputs), len(inputs))
    for tensor in inputs.values():
        _refuse_shared(tensor.parameters, f"input {quoted(tensor.name)}")
    outputs = dict.fromkeys(output.name for output in asked.outputs)
    check_counts("outputs", len(asked.outputs), len(outputs))
    for output in asked.outputs:
        _check_output(output)
    return Request(
        id=asked.id,
        model=asked.model_name,
        inputs=_raw(inputs, raw) if raw else _typed(inputs),
        version=asked.model_version,
        outputs=tuple(outputs),
        tags=tags_in(_values(asked.parameters)),
        caller=caller,
    )


def _raw(tensors: Mapping[str, Any], raw: Sequence[memoryview]) -> dict[str, Array]:
    if len(raw) != len(tensors):
        raise TheirsError(
            "malformed", f"{len(raw)} raw_input_contents for {len(tensors)} inputs", remedy="send one for each, in their order"
        )
    inputs: dict[str, Array] = {}
    for (name, tensor), data in zip(tensors.items(), raw, strict=True):
        if tensor.HasField("contents"):
            raise TheirsError("malformed", "it has contents beside raw_input_contents", where=f"input {quoted(name)}")
        inputs[name] = from_binary(name, datatype_named(name, tensor.datatype), tensor.shape, data)
    return inputs


def _typed(tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {
        name: from_contents(name, datatype_named(name, tensor.datatype), tensor.shape, tensor.contents) for name, tensor in tensors.items()
    }


def _check_output(output: Any) -> None:
    where = f"output {quoted(output.name)}"
    _refuse_shared(output.parameters, where)
    if "classification" in output.parameters:
        raise TheirsError("malformed", "classification is not served here", where=where)


def _refuse_shared(parameters: Any, where: str) -> None:
    if "shared_memory_region" in parameters:
        raise TheirsError("malformed", "shared memory is not served over gRPC", where=where, remedy="send the data, or use the Unix socket")


def _values(parameters: Any) -> dict[str, Any]:
    """Return parameters as plain values; one without a value is as if it were not there."""
    chosen = {name: (value, value.WhichOneof(CHOICE)) for name, value in parameters.items()}
    return {name: getattr(value, choice) for name, (value, choice) in chosen.items() if choice}


def _parsed(name: str, body: bytes) -> Any:
    try:
        return message(name).FromString(body)
    except DecodeError as error:
        raise TheirsError("malformed", f"not a protobuf message of this kind: {str(error)[:200]}", where=name) from error


def render(answer: Answer, outputs: Sequence[str]) -> bytes:
    """Serialise an answer with the outputs asked for, or all. Raises: OursError (`output`: one is missing, or of no known datatype)."""
    reply = message("ModelInferResponse")(model_name=answer.model, model_version=answer.version, id=answer.id)
    _say(reply, said(answer))
    raw = []
    for name in outputs or answer.outputs:
        array = answer.outputs.get(name)
        datatype = None if array is None else datatype_of(array)
        if array is None or datatype is None:
            raise OursError("output", f"output {quoted(name)} of {answer.model} is {'missing' if array is None else array.dtype}")
        reply.outputs.add(name=name, datatype=datatype, shape=array.shape)
        raw.append(to_binary(array))
    return join(reply.SerializeToString(), raw)


def promised(promise: Promise, model: str) -> bytes:
    """Serialise a promise: an answer without outputs, whose parameters say how to fetch them (over HTTP), and why there are none yet."""
    reply = message("ModelInferResponse")(model_name=model, id=promise.id)
    _say(reply, {"promise": promise.id, "why": promise.why, "retry_after_ms": promise.retry_after_s * 1e3})
    return _bytes(reply)


def _say(reply: Any, words: Mapping[str, str | float]) -> None:
    for key, value in words.items():
        if isinstance(value, str):
            reply.parameters[key].string_param = value
        else:
            reply.parameters[key].double_param = value


def model_metadata(card: ModelCard) -> bytes:
    """Serialise a model's metadata; axes that the model leaves free are -1."""
    signature = card.signature
    reply = message("ModelMetadataResponse")(name=card.name, versions=card.versions, platform=signature.platform)
    for tensors, specs in ((reply.inputs, signature.inputs), (reply.outputs, signature.outputs)):
        for spec in specs:
            _add(tensors, spec)
    return _bytes(reply)


def _add(tensors: Any, spec: TensorSpec) -> None:
    tensors.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def repository_index(models: Sequence[tuple[str, str, str, str]]) -> bytes:
    """Serialise the repository's index from (name, version, state, reason)."""
    reply = message("RepositoryIndexResponse")()
    for name, version, state, reason in models:
        reply.models.add(name=name, version=version, state=state, reason=reason)
    return _bytes(reply)


def reply(kind: str, **fields: Any) -> bytes:
    """Serialise a message of a few plain fields."""
    return _bytes(message(kind)(**fields))


def parameters(asked: Any) -> dict[str, Any]:
    """Return the parameters of a repository request."""
    return _values(asked.parameters)


def _bytes(made: Any) -> bytes:
    serialised: bytes = made.SerializeToString()
    return serialised
