"""What comes back: replies to results, promises and errors.

1. 4xx is a TheirsError (`refused`) with the server's text; 429 and 503 are a WorldError (`busy`) with `retry_after_s`, other 5xx `failed`.
2. An answer that breaks the protocol is a TheirsError (`malformed`): no other exception escapes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from appliance.client.exchange import Reply
from appliance.contract.errors import ApplianceError, TheirsError, WorldError
from appliance.contract.inference import DTYPES, Array
from appliance.contract.openinference import HEADER_LENGTH
from appliance.contract.vocabulary import Datatype

OK = 200
ACCEPTED = 202
NOT_FOUND = 404
GONE = 410
RETRYABLE = {429, 503}
SERVER_FAULT = 500
DEFAULT_RETRY_S = 1.0
LONGEST_RETRY_S = 3600.0
LOCAL = "local"
"""The route of an answer that the caller's own fallback gave."""


class _Output(msgspec.Struct):
    name: str
    datatype: Datatype
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)


class _Answer(msgspec.Struct):
    outputs: list[_Output]
    id: str = ""
    model_version: str = ""
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)


class _Promise(msgspec.Struct):
    id: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What came back: outputs by name, who made them, and in which mode. What the server did not say is empty or None.

    Attributes:
        parameters: all that the server said of its answer.
        server: who answered; empty for the caller's own fallback.
        id: the request's id.
    """

    outputs: Mapping[str, Array]
    model_version: str
    mode: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    server: str = ""
    id: str = ""

    @property
    def route(self) -> str:
        """Where it was computed: `edge`, `split`, `cloud`, `neighbour`, `stale`, or `local` for the caller's own fallback."""
        return _text(self.parameters.get("route"))

    @property
    def why(self) -> str:
        """Why this mode and this place answered, in one phrase."""
        return _text(self.parameters.get("why"))

    @property
    def confidence(self) -> float | None:
        """The measured accuracy (0 to 1) of what answered, less what age took."""
        return _number(self.parameters.get("confidence"))

    @property
    def cost(self) -> float | None:
        """What it cost, in dollars."""
        return _number(self.parameters.get("cost"))

    @property
    def stale_age_s(self) -> float | None:
        """How old a stale answer is, in seconds; None for a fresh one."""
        return _number(self.parameters.get("stale_age_s"))


@dataclass(frozen=True, slots=True)
class Deferred:
    """A promise: `server` holds the request on its disk and answers it later; `fetch` it by this, or by the id alone. `why`: not now."""

    id: str
    server: str
    retry_after_s: float = DEFAULT_RETRY_S
    why: str = ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def local(outputs: Mapping[str, Array], why: ApplianceError) -> Result:
    """The caller's own answer in place of the appliance's."""
    return Result(outputs, "", "", {"route": LOCAL, "why": str(why)})


def fault(reply: Reply, where: str) -> ApplianceError | None:
    """What is wrong, by the reply's status; None for 2xx."""
    if OK <= reply.status < OK + 100:
        return None
    text = _said(reply, "error") or f"HTTP status {reply.status}"
    if reply.status in RETRYABLE:
        return WorldError("busy", text, where=where, retry_after_s=retry_after_s(reply.headers))
    return (WorldError("failed", text, where=where)) if reply.status >= SERVER_FAULT else TheirsError("refused", text, where=where)


def reason(reply: Reply) -> str:
    """The server's code for what is wrong; empty where it gives none."""
    return "" if reply.status < OK + 100 else _said(reply, "reason")


def _said(reply: Reply, key: str) -> str:
    try:
        return str(json.loads(reply.body)[key])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds until it is worth asking again: our milliseconds if given, else `Retry-After` in seconds, else one second."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            after_s = float(headers[name]) * unit_s
        except (KeyError, ValueError):  # absent, or a date, which no server of this protocol sends
            continue
        if 0 <= after_s <= LONGEST_RETRY_S:
            return after_s
    return DEFAULT_RETRY_S


def metadata(reply: Reply, where: str) -> dict[str, Any]:
    """Read a model's metadata. Raises: TheirsError, WorldError (rules 1 and 2)."""
    if (wrong := fault(reply, where)) is not None:
        raise wrong
    try:
        return msgspec.json.decode(reply.body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TheirsError("malformed", f"the model's metadata: {error}", where=where) from error


def answer(reply: Reply, into: Mapping[str, Array], where: str) -> Result:
    """Read an answer; outputs that were asked `into` arrays are returned as views on them. Raises: TheirsError, WorldError (rules 1 and 2)."""
    if (wrong := fault(reply, where)) is not None:
        raise wrong
    try:
        return _result(reply, into, where)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError) as error:
        raise TheirsError("malformed", f"the answer: {error}", where=where) from error


def promise(reply: Reply, where: str) -> Deferred:
    """Read a promise (202). Raises: TheirsError (`malformed`)."""
    try:
        given = msgspec.json.decode(reply.body, type=_Promise)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TheirsError("malformed", f"the promise: {error}", where=where) from error
    return Deferred(given.id, where, retry_after_s(reply.headers), given.why)


def promised(reply: Reply, asked: str, where: str) -> Result | Deferred:
    """Read what became of a promise. Raises: TheirsError (`unknown_promise`), WorldError (`dropped`), and rules 1 and 2."""
    if reply.status == ACCEPTED:
        return Deferred(asked, where, retry_after_s(reply.headers))
    if reply.status == NOT_FOUND:
        raise TheirsError("unknown_promise", _said(reply, "error") or f"nothing is known of {asked!r}", where=where)
    if reply.status == GONE:
        raise WorldError("dropped", _said(reply, "error") or "the request was dropped", where=where)
    return answer(reply, {}, where)


def _result(reply: Reply, into: Mapping[str, Array], where: str) -> Result:
    """Parse an answer. Raises: ValueError, TypeError, OverflowError or MsgspecError that says what is wrong with it."""
    body, length = reply.body, reply.headers.get(HEADER_LENGTH.lower())
    at = len(body) if length is None else int(length)
    if reply.status != OK or not 0 <= at <= len(body):
        raise ValueError(f"status {reply.status}, {HEADER_LENGTH} {at}, a body of {len(body)} bytes")
    whole = memoryview(body)
    parsed = msgspec.json.decode(whole[:at], type=_Answer)
    outputs: dict[str, Array] = {}
    for output in parsed.outputs:
        size = output.parameters.get("binary_data_size")
        room = into.get(output.name)
        if "shared_memory_region" in output.parameters and room is not None:
            outputs[output.name] = _lent(output, room)
            continue
        if size is not None and (not isinstance(size, int) or not 0 <= size <= len(body) - at):
            raise ValueError(f"output {output.name} has binary_data_size {size}, {len(body) - at} bytes are left")
        array = _array(output, None if size is None else whole[at : at + size])
        at += size or 0
        outputs[output.name] = array if room is None else _copied(output, array, room)
    return Result(outputs, parsed.model_version, str(parsed.parameters.get("mode", "")), parsed.parameters, where, parsed.id)


def _array(output: _Output, raw: memoryview | None) -> Array:
    dtype = DTYPES.get(output.datatype)
    if dtype is None:
        raise ValueError(f"output {output.name} has datatype {output.datatype}, which this client does not read")
    if raw is not None:
        array: Array = np.frombuffer(bytes(raw), dtype.newbyteorder("<"))  # a copy, so the array is aligned and the body can go
    elif output.data is not None:
        array = np.array(output.data, dtype)
    else:
        raise ValueError(f"output {output.name} has neither data nor a binary_data_size")
    if min(output.shape, default=0) < 0 or math.prod(output.shape) != array.size:
        raise ValueError(f"output {output.name} of shape {output.shape} came with {array.size} elements")
    return array.reshape(output.shape)


def _lent(output: _Output, room: Array) -> Array:
    """The part of a room that an output fills."""
    dtype = DTYPES.get(output.datatype)
    count = math.prod(output.shape)
    if dtype != room.dtype or min(output.shape, default=0) < 0 or count > room.size:
        raise ValueError(f"output {output.name} of {output.datatype} {output.shape} does not fit {room.dtype} {list(room.shape)}")
    return room.reshape(-1)[:count].reshape(output.shape)


def _copied(output: _Output, array: Array, room: Array) -> Array:
    part = _lent(output, room)
    np.copyto(part, array)
    return part
