"""The messages of `inference.GRPCInferenceService` as data, built when they are first needed: no generated code, no protoc.

1. Names and numbers are those of KServe's `grpc_predict_v2.proto` and Triton's `grpc_service.proto`, which has `double_param`,
   `uint64_param` and the repository's messages beside them; a test compares every field with the ones in Triton's client.
2. Fields that nobody here reads or writes are left out: protobuf skips what it does not know.
3. They live in a pool of their own: another library in this process may bring the same names (Triton's client does).
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_TENSOR = ("string name = 1", "string datatype = 2", "repeated int64 shape = 3")
_REPOSITORY = ("string repository_name = 1", "string model_name = 2", "map ModelRepositoryParameter parameters = 3")
_MODEL = ("string name = 1", "string version = 2")

MESSAGES: Mapping[str, tuple[str, ...]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("bool live = 1",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("bool ready = 1",),
    "ModelReadyRequest": _MODEL,
    "ModelReadyResponse": ("bool ready = 1",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("string name = 1", "string version = 2", "repeated string extensions = 3"),
    "ModelMetadataRequest": _MODEL,
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "ModelMetadataResponse": (
        "string name = 1",
        "repeated string versions = 2",
        "string platform = 3",
        "repeated ModelMetadataResponse.TensorMetadata inputs = 4",
        "repeated ModelMetadataResponse.TensorMetadata outputs = 5",
    ),
    "InferParameter": (
        "choice bool bool_param = 1",
        "choice int64 int64_param = 2",
        "choice string string_param = 3",
        "choice double double_param = 4",
        "choice uint64 uint64_param = 5",
    ),
    "InferTensorContents": (
        "repeated bool bool_contents = 1",
        "repeated int32 int_contents = 2",
        "repeated int64 int64_contents = 3",
        "repeated uint32 uint_contents = 4",
        "repeated uint64 uint64_contents = 5",
        "repeated float fp32_contents = 6",
        "repeated double fp64_contents = 7",
        "repeated bytes bytes_contents = 8",
    ),
    "ModelInferRequest.InferInputTensor": (*_TENSOR, "map InferParameter parameters = 4", "one InferTensorContents contents = 5"),
    "ModelInferRequest.InferRequestedOutputTensor": ("string name = 1", "map InferParameter parameters = 2"),
    "ModelInferRequest": (
        "string model_name = 1",
        "string model_version = 2",
        "string id = 3",
        "map InferParameter parameters = 4",
        "repeated ModelInferRequest.InferInputTensor inputs = 5",
        "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6",
        "repeated bytes raw_input_contents = 7",
    ),
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "ModelInferResponse": (
        "string model_name = 1",
        "string model_version = 2",
        "string id = 3",
        "map InferParameter parameters = 4",
        "repeated ModelInferResponse.InferOutputTensor outputs = 5",
        "repeated bytes raw_output_contents = 6",
    ),
    "RepositoryIndexRequest": ("string repository_name = 1", "bool ready = 2"),
    "RepositoryIndexResponse.ModelIndex": ("string name = 1", "string version = 2", "string state = 3", "string reason = 4"),
    "RepositoryIndexResponse": ("repeated RepositoryIndexResponse.ModelIndex models = 1",),
    "ModelRepositoryParameter": (
        "choice bool bool_param = 1",
        "choice int64 int64_param = 2",
        "choice string string_param = 3",
        "choice bytes bytes_param = 4",
    ),
    "RepositoryModelLoadRequest": _REPOSITORY,
    "RepositoryModelLoadResponse": (),
    "RepositoryModelUnloadRequest": _REPOSITORY,
    "RepositoryModelUnloadResponse": (),
}
"""A dot says that a message stands inside another. Words before a field's type: `repeated`, `map` (from text), `choice` (one of these), `one`."""
CHOICE = "parameter_choice"

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}


@cache
def message(name: str) -> Any:
    """Return the class of a message of the protocol."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))


@cache
def _pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return pool


def _file() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name in sorted(MESSAGES):  # an outer message comes before those inside it
        outer, _, own = name.rpartition(".")
        made[name] = (made[outer].nested_type if outer else file.message_type).add(name=own)
        for line in MESSAGES[name]:
            _add_field(made[name], name, line.split())
    return file


def _add_field(message: Any, name: str, words: list[str]) -> None:
    *before, kind, field_name, _equals, number = words
    field = message.field.add(name=field_name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if "choice" in before:
        if not message.oneof_decl:
            message.oneof_decl.add(name=CHOICE)
        field.oneof_index = 0
    if "repeated" in before or "map" in before:
        field.label = _Field.LABEL_REPEATED
    if "map" in before:
        entry = message.nested_type.add(name="".join(_camel(field_name)) + "Entry")
        entry.options.map_entry = True
        _add_field(entry, name, ["string", "key", "=", "1"])
        _add_field(entry, name, ["one", kind, "value", "=", "2"])
        kind = f"{name}.{entry.name}"
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"


def _camel(name: str) -> Iterator[str]:
    return (word.capitalize() for word in name.split("_"))
