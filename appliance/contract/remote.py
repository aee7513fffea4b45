"""An inference that travels: tensors as raw bytes behind a small JSON head, from a device to the cloud and back.

1. A frame is `MAGIC`, the head's length (4 bytes, big-endian), the head as JSON, then each tensor's bytes in the order of the head, little-endian
   and C-contiguous, with nothing between or after.
2. Numbers and booleans only; shapes and sizes must agree with the bytes, to the byte.
3. A frame of another size, version or form raises TheirsError that names what is wrong; no input raises anything else.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np

from appliance.contract.errors import OursError, TheirsError
from appliance.contract.inference import DATATYPES, DTYPES, Answer, Array, Request, Tags
from appliance.contract.vocabulary import Datatype, Mode

MAGIC = b"AIF1"
"""Appliance inference frame, version 1."""
FRAME_MAX_BYTES = 4_000_000
"""What the broker takes in one packet (4.2 MB), less topic and properties: larger inputs stay on the device, or travel as features.
A label's class probabilities are up to 1.3 MB."""
HEAD_MAX_BYTES = 16_384
MAX_TENSORS = 64
_LENGTH = struct.Struct(">4sI")
Dim = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


class TensorHead(msgspec.Struct, frozen=True):
    """One tensor of a frame."""

    name: str
    datatype: Datatype
    shape: tuple[Dim, ...]


class AskHead(msgspec.Struct, frozen=True, kw_only=True, tag="infer"):
    """Compute this. `stage`: the tensors are the model's inputs, or its features (the inputs of the head that follows the extractor).

    `residency` and `accept_degradation` are the caller's tags, so that whoever passes the frame on can hold them too.
    """

    model: Annotated[str, msgspec.Meta(max_length=63)]
    version: Annotated[str, msgspec.Meta(max_length=63)]
    within_ms: Annotated[float, msgspec.Meta(gt=0, le=600_000)]
    stage: Literal["input", "features"] = "input"
    outputs: tuple[str, ...] = ()
    residency: str = ""
    accept_degradation: bool = True
    tensors: tuple[TensorHead, ...] = ()


class AnswerHead(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """The outputs; `took_ms` is what the computation took of a machine that costs `dollars_per_hour`.

    `mode`, `why` and `dollars` are told by a device that answered for another: its mode, the reason, and what it cost there.
    """

    version: str
    took_ms: float
    dollars_per_hour: float
    confidence: float | None = None
    mode: Mode | None = None
    why: str = ""
    dollars: float | None = None
    tensors: tuple[TensorHead, ...] = ()


class RequestHead(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """A whole request as it is kept for later."""

    id: str
    model: str
    version: str
    outputs: tuple[str, ...]
    tags: Tags
    tensors: tuple[TensorHead, ...] = ()


class ResultHead(msgspec.Struct, frozen=True, kw_only=True, tag="result"):
    """A whole answer as it is kept until somebody fetches it."""

    id: str
    model: str
    version: str
    mode: Mode
    why: str
    confidence: float | None
    route: str
    cost: float | None
    tensors: tuple[TensorHead, ...] = ()


Head = AskHead | AnswerHead | RequestHead | ResultHead
H = TypeVar("H", AskHead, AnswerHead, RequestHead, ResultHead)


@dataclass(frozen=True, slots=True)
class Ask:
    """A decoded request; its arrays are read-only views of the frame."""

    head: AskHead
    tensors: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Computed:
    """A decoded answer; its arrays are read-only views of the frame."""

    head: AnswerHead
    tensors: Mapping[str, Array]


def pack(head: Head, tensors: Mapping[str, Array], limit: int = FRAME_MAX_BYTES) -> bytes:
    """Make a frame of a head and the tensors that belong to it, of at most `limit` bytes.

    Raises: TheirsError (`oversized`, with what to do), OursError (`datatype`) for a tensor of anything but numbers.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    told = tuple(TensorHead(name, _datatype(name, array), array.shape) for name, array in arrays.items())
    encoded = msgspec.json.encode(msgspec.structs.replace(head, tensors=told))
    size = _LENGTH.size + len(encoded) + sum(array.nbytes for array in arrays.values())
    if size > limit or len(encoded) > HEAD_MAX_BYTES:
        what = f"{size} bytes, at most {limit} go into one frame"
        raise TheirsError("oversized", what, remedy="ask in smaller batches, or give the model a variant D that sends features")
    return b"".join([_LENGTH.pack(MAGIC, len(encoded)), encoded, *(array.tobytes() for array in arrays.values())])


def unpack_ask(frame: bytes) -> Ask:
    """Read a request. Raises: TheirsError (`malformed`, `oversized`)."""
    head, rest = _head(frame, AskHead, FRAME_MAX_BYTES)
    return Ask(head, _tensors(head.tensors, rest))


def unpack_answer(frame: bytes) -> Computed:
    """Read an answer. Raises: TheirsError (`malformed`, `oversized`)."""
    head, rest = _head(frame, AnswerHead, FRAME_MAX_BYTES)
    return Computed(head, _tensors(head.tensors, rest))


def pack_request(request: Request, limit: int) -> bytes:
    """Make a frame of a request that is to be kept. Raises: as `pack`."""
    head = RequestHead(id=request.id, model=request.model, version=request.version, outputs=request.outputs, tags=request.tags)
    return pack(head, request.inputs, limit)


def unpack_request(frame: bytes) -> Request:
    """Read a kept request. Raises: TheirsError (`malformed`)."""
    head, rest = _head(frame, RequestHead, len(frame))
    return Request(head.id, head.model, _tensors(head.tensors, rest), head.version, head.outputs, head.tags)


def pack_result(answer: Answer, limit: int) -> bytes:
    """Make a frame of an answer that is to be kept. Raises: as `pack`."""
    head = ResultHead(
        id=answer.id,
        model=answer.model,
        version=answer.version,
        mode=answer.mode,
        why=answer.why,
        confidence=answer.confidence,
        route=answer.route,
        cost=answer.cost,
    )
    return pack(head, answer.outputs, limit)


def unpack_result(frame: bytes) -> Answer:
    """Read a kept answer. Raises: TheirsError (`malformed`)."""
    head, rest = _head(frame, ResultHead, len(frame))
    tensors = _tensors(head.tensors, rest)
    return Answer(head.id, head.model, head.version, tensors, head.mode, head.why, head.confidence, head.route, head.cost)


def _head(frame: bytes, kind: type[H], limit: int) -> tuple[H, memoryview]:
    if len(frame) > limit:
        raise TheirsError("oversized", f"{len(frame)} bytes, at most {limit} are allowed", where="inference frame")
    if len(frame) < _LENGTH.size:
        raise _malformed(f"{len(frame)} bytes are no frame")
    magic, length = _LENGTH.unpack_from(frame)
    if magic != MAGIC:
        raise _malformed(f"it begins with {magic!r}, expected {MAGIC!r}")
    view = memoryview(frame)[_LENGTH.size :]
    if not 0 < length <= min(HEAD_MAX_BYTES, len(view)):
        raise _malformed(f"a head of {length} bytes in {len(view)} bytes")
    try:
        return msgspec.json.decode(view[:length], type=kind), view[length:]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(str(error)) from error


def _tensors(heads: Sequence[TensorHead], rest: memoryview) -> dict[str, Array]:
    if len(heads) > MAX_TENSORS:
        raise _malformed(f"{len(heads)} tensors, at most {MAX_TENSORS} are allowed")
    tensors: dict[str, Array] = {}
    at = 0
    for head in heads:
        dtype = DTYPES.get(head.datatype)
        if dtype is None:
            raise _malformed(f"tensor {head.name[:64]!r} is {head.datatype}: only numbers travel")
        size = prod(head.shape) * dtype.itemsize
        if size > len(rest) - at:
            raise _malformed(f"tensor {head.name[:64]!r} has {size} bytes by its shape, {len(rest) - at} are left")
        tensors[head.name] = np.frombuffer(rest[at : at + size], dtype).reshape(head.shape)
        at += size
    if at != len(rest) or len(tensors) != len(heads):
        raise _malformed(f"{len(rest) - at} bytes are left after {len(tensors)} tensors of {len(heads)}")
    return tensors


def _datatype(name: str, array: Array) -> Datatype:
    datatype = DATATYPES.get(array.dtype)
    if datatype is None:
        raise OursError("datatype", f"{array.dtype} does not travel", where=f"tensor {name!r}")
    return datatype


def _malformed(what: str) -> TheirsError:
    return TheirsError("malformed", what, where="inference frame")
