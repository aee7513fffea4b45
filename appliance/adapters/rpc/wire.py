"""Cuts raw tensors out of a serialised `ModelInferRequest`, and puts them into a `ModelInferResponse`, without a copy of their own.

1. `raw_input_contents` become views on the message; only the rest of it is parsed. This saves two copies of each large frame.
2. Before anything is parsed, the rest is bounded in bytes and in fields: protobuf makes 88 bytes of memory from an empty input
   of 2 (measured), and 16 from an empty text of 2: what is let through takes 0.25 GiB at most, as JSON does.
3. The encoding is that of protobuf (developers' guide, "Encoding"): a field is a varint of its number and wire type, then its payload.
   Groups, which no message here has, are refused.
"""

from collections.abc import Iterator
from typing import NamedTuple

from appliance.contract.errors import TheirsError
from appliance.contract.openinference_bounds import MAX_JSON_BYTES, MAX_TENSORS

RAW_INPUT = 7
INPUTS, OUTPUTS = 5, 6
_RAW_OUTPUT_TAG = b"\x32"
"""Field 6, wire type 2."""
MAX_REST_BYTES = MAX_JSON_BYTES
"""Numbers that are not raw are bounded as those in JSON are."""
MAX_FIELDS = 4 * MAX_TENSORS
"""Of a request: inputs, outputs, raw tensors and parameters, each up to `MAX_TENSORS`; also of one tensor's description."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT = 10


class Split(NamedTuple):
    """A request without its raw tensors, and these as views on the whole."""

    rest: bytes
    raw: list[memoryview]


def split(whole: bytes) -> Split:
    """Split a request. Raises: TheirsError (`malformed`, `oversized`)."""
    view = memoryview(whole)
    raw: list[memoryview] = []
    kept: list[memoryview] = []
    for number, start, payload, end in _fields(whole, 0, len(whole)):
        if number == RAW_INPUT:
            raw.append(view[payload:end])
            continue
        kept.append(view[start:end])
        if number in {INPUTS, OUTPUTS}:
            for _field in _fields(whole, payload, end):
                pass
    rest = b"".join(kept)
    if len(rest) > MAX_REST_BYTES:
        what = f"{len(rest)} bytes beside raw_input_contents, at most {MAX_REST_BYTES} are allowed"
        raise TheirsError("oversized", what, remedy="send large tensors in raw_input_contents")
    return Split(rest, raw)


def _fields(whole: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field's number, start, payload's start and end; at most `MAX_FIELDS` of them."""
    for _ in range(MAX_FIELDS):
        if at == end:
            return
        start = at
        tag, at = _varint(whole, at, end)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(whole, at, end)
        elif kind == _VARINT:
            size = _varint(whole, at, end)[1] - at
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise _broken(f"a field has the wire type {kind}")
        if size > end - at:
            raise _broken(f"a field of {size} bytes begins {end - at} bytes before the end")
        yield tag >> 3, start, at, at + size
        at += size
    if at != end:
        raise TheirsError("malformed", f"more than {MAX_FIELDS} fields in one message", where="infer request")


def _varint(whole: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a varint and where it ends."""
    value = 0
    for index in range(min(_MAX_VARINT, end - at)):
        byte = whole[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:  # noqa: PLR2004 - the bit that says that more follows
            return value, at + index + 1
    raise _broken("a number does not end")


def _broken(what: str) -> TheirsError:
    return TheirsError("malformed", f"not a protobuf message: {what}", where="infer request")


def join(rest: bytes, raw: list[memoryview | bytes]) -> bytes:
    """Return a response with its raw tensors: the one copy that they take."""
    parts: list[memoryview | bytes] = [rest]
    for data in raw:
        parts += (_RAW_OUTPUT_TAG, _length(len(data)), data)
    return b"".join(parts)


def _length(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits to a byte
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
