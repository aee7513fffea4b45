"""Tensor data of the Open Inference Protocol, bytes to arrays and back, in JSON and in binary.

1. Binary data is the array in C order, little endian, as in memory; an array over the caller's bytes is a read-only view that may be unaligned.
2. Binary BYTES elements are each a 4-byte little-endian length and that many bytes (binary tensor data extension).
3. Binary BOOL is one byte, 0 or 1; anything else is refused.
4. JSON data is flat or nested as the shape says; FP16 travels in binary only.
5. A JSON number of FP32 is written as the shortest decimal of the same value in double precision: read back as a double and rounded to
   single it is the same bits. JSON has no NaN or infinity: on output they are the tokens NaN, Infinity and -Infinity, which Triton writes
   and its clients read; on input they are refused. NaN payloads survive in binary only.
6. Nothing is allocated for a shape before the data has been seen to hold as many elements.
"""

import math
import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from appliance.contract.admission import quoted
from appliance.contract.errors import OursError, TheirsError
from appliance.contract.inference import DTYPES, Array
from appliance.contract.vocabulary import Datatype

MAX_RANK = 8
"""As TensorRT (Dims::MAX_DIMS)."""
MAX_DIM = 2**31 - 1
"""The largest dimension that TensorRT takes (int32); far beyond what a body holds."""

_OPENING = re.compile(rb"(?:[ \t\r\n]*\[){0,%d}" % (MAX_RANK + 1))
_LENGTH = struct.Struct("<I")
_FLOATS = frozenset({Datatype.FP32, Datatype.FP64})


def count(name: str, shape: Sequence[int]) -> int:
    """Return how many elements an input's shape holds. Raises: TheirsError (`shape`)."""
    if len(shape) > MAX_RANK:
        raise TheirsError("shape", f"shape has {len(shape)} axes, at most {MAX_RANK} are served", where=f"input {quoted(name)}")
    extent = 1
    for axis, dim in enumerate(shape):
        if not 0 <= dim <= MAX_DIM:
            seen = "negative" if dim < 0 else "too large"
            raise TheirsError("shape", f"axis {axis} of the shape is {seen}, expected 0 to {MAX_DIM}", where=f"input {quoted(name)}")
        extent *= dim or 1
    if extent > MAX_DIM:  # also with an axis of 0, where numpy would overflow
        raise TheirsError("shape", f"shape {list(shape)} is larger than {MAX_DIM} elements", where=f"input {quoted(name)}")
    return math.prod(shape)


def from_binary(name: str, datatype: Datatype, shape: Sequence[int], view: memoryview) -> Array:
    """Return an array over the bytes of one binary input. Raises: TheirsError (`shape`, `malformed`)."""
    elements = count(name, shape)
    if datatype is Datatype.BYTES:
        return object_array(_split(name, elements, view), shape)
    dtype = DTYPES[datatype]
    if elements * dtype.itemsize != len(view):
        what = f"shape {list(shape)} of {datatype} needs {elements * dtype.itemsize} bytes, binary data has {len(view)}"
        raise TheirsError("shape", what, where=f"input {quoted(name)}")
    if datatype is Datatype.BOOL and elements and int(np.frombuffer(view, np.uint8).max()) > 1:
        raise TheirsError("malformed", "a BOOL byte is neither 0 nor 1", where=f"input {quoted(name)}")
    array: Array = np.frombuffer(view, dtype)
    return array.reshape(shape)


def _split(name: str, elements: int, view: memoryview) -> list[bytes]:
    if elements * _LENGTH.size > len(view):
        raise TheirsError("shape", f"{elements} BYTES elements do not fit into {len(view)} bytes of data", where=f"input {quoted(name)}")
    items: list[bytes] = []
    offset = 0
    for index in range(elements):
        start = offset + _LENGTH.size
        if start > len(view):
            raise TheirsError("malformed", f"binary data ends before the length of element {index}", where=f"input {quoted(name)}")
        offset = start + _LENGTH.unpack_from(view, offset)[0]
        if offset > len(view):
            raise TheirsError(
                "malformed", f"element {index} ends {offset - len(view)} bytes beyond the data", where=f"input {quoted(name)}"
            )
        items.append(bytes(view[start:offset]))
    if offset != len(view):
        raise TheirsError("shape", f"{len(view) - offset} bytes are left after {elements} BYTES elements", where=f"input {quoted(name)}")
    return items


def object_array(items: list[bytes], shape: Sequence[int]) -> Array:
    """Return BYTES elements as an array of objects."""
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def from_json(name: str, datatype: Datatype, shape: Sequence[int], data: bytes) -> Array:
    """Return a new array from the JSON text of one input's `data`. Raises: TheirsError (`shape`, `datatype`, `malformed`)."""
    where = f"input {quoted(name)}"
    elements = count(name, shape)
    if datatype is Datatype.FP16:
        raise TheirsError("datatype", "FP16 travels in binary only", where=where, remedy="send it with binary_data_size")
    # Between numbers every comma separates two elements, nested or not, so the length is known before anything is allocated.
    if datatype is not Datatype.BYTES and elements and (seen := data.count(b",") + 1) != elements:
        raise TheirsError("shape", f"shape {list(shape)} holds {elements} elements, data has {seen}", where=where)
    opening = _OPENING.match(data)
    depth = opening[0].count(b"[") if opening else 0
    if depth not in {1, max(1, len(shape))}:
        raise TheirsError("shape", f"data is nested {depth} deep, expected 1 (flat) or {len(shape)} as its shape", where=where)
    try:
        values = _decoder(datatype, depth).decode(data)
        array = _array(datatype, values)
    except (ValueError, OverflowError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors too
        raise TheirsError("malformed", f"data is not {datatype} of shape {list(shape)}: {str(error)[:200]}", where=where) from error
    if array.shape != tuple(shape) and (depth > 1 or array.size != elements):
        raise TheirsError("shape", f"data has shape {list(array.shape)}, expected {list(shape)}", where=where)
    return array.reshape(shape)


@lru_cache(maxsize=64)
def _decoder(datatype: Datatype, depth: int) -> "msgspec.json.Decoder[Any]":
    element: Any = int
    if datatype in _FLOATS:
        element = float
    elif datatype is Datatype.BOOL:
        element = bool
    elif datatype is Datatype.BYTES:
        element = str
    for _ in range(depth):
        element = list[element]
    return msgspec.json.Decoder(element)


def _array(datatype: Datatype, values: list[Any]) -> Array:
    if datatype is Datatype.BYTES:
        texts: Array = np.array(values, object)
        flat = texts.ravel().tolist()
        if not all(isinstance(text, str) for text in flat):  # numpy makes an array of lists where rows differ in length
            raise ValueError("its rows differ in length")
        return object_array([text.encode() for text in flat], texts.shape)
    with np.errstate(over="ignore"):
        array: Array = np.array(values, DTYPES[datatype])
    if datatype is Datatype.FP32 and not np.isfinite(array).all():
        raise ValueError("a number is beyond the range of FP32")
    return array


def to_binary(array: Array) -> "memoryview | bytes":
    """Return an output's bytes for the wire, without a copy where the array is contiguous."""
    if array.dtype.hasobject:
        return b"".join(_LENGTH.pack(len(item)) + item for item in _items(array))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def to_json(name: str, datatype: Datatype, array: Array) -> bytes:
    """Return the flat JSON list of an output. Raises: TheirsError (`datatype`) where JSON cannot carry it."""
    if datatype is Datatype.FP16:
        raise TheirsError("datatype", "FP16 travels in binary only", where=f"output {quoted(name)}", remedy="ask for it with binary_data")
    if datatype is Datatype.BYTES:
        try:
            return msgspec.json.encode([item.decode() for item in _items(array)])
        except UnicodeDecodeError as error:
            what = f"its bytes are not UTF-8 ({error.reason})"
            raise TheirsError("datatype", what, where=f"output {quoted(name)}", remedy="ask for it with binary_data") from error
    values = array.ravel().tolist()
    if datatype in _FLOATS and not np.isfinite(array).all():
        return ("[" + ",".join(_number(value) for value in values) + "]").encode()
    return msgspec.json.encode(values)


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _items(array: Array) -> list[bytes]:
    items = [item.encode() if isinstance(item, str) else item for item in array.ravel().tolist()]
    if not all(isinstance(item, bytes) for item in items):
        raise OursError("datatype", "a BYTES tensor holds something that is neither bytes nor str")
    return items
