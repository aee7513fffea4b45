"""Bytes to messages and back: JSON on control topics, with a version and a size limit for each message.

1. A message larger than its type's `limit` is refused before it is parsed.
2. A message of another major version is refused by number; unknown fields are ignored, so minor additions are free.
3. Anything malformed raises `TheirsError` that names the field; no foreign exception escapes.

Why JSON: readable on the wire and no slower than MessagePack here (docs/decisions/0014).
"""

from typing import ClassVar, TypeVar

import msgspec

from appliance.contract.errors import TheirsError

VERSION = 1


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """The base of all control messages. `v` is the contract's major version; `limit` is the largest encoded size in bytes."""

    limit: ClassVar[int] = 16_384
    v: int = VERSION


class Refused(Message, frozen=True, tag="refused"):
    """The answer to any request that the peer will not serve; the fields are those of `ApplianceError`."""

    limit: ClassVar[int] = 4_096
    reason: str
    what: str
    where: str = ""
    remedy: str = ""


M = TypeVar("M", bound=Message)


class _Probe(msgspec.Struct):
    v: int = VERSION


def encode(message: Message) -> bytes:
    """Encode a message as JSON. Raises: TheirsError (`oversized`) if it exceeds its own limit."""
    payload = msgspec.json.encode(message)
    _check_size(payload, type(message))
    return payload


def decode(payload: bytes, expected: type[M]) -> M:
    """Decode one message of a known type.

    Raises: TheirsError with reason `oversized`, `malformed` or `version`.
    """
    _check_size(payload, expected)
    try:
        probe = msgspec.json.decode(payload, type=_Probe)
        if probe.v != VERSION:
            raise TheirsError("version", f"speaks contract version {probe.v}, this side speaks {VERSION}", where=expected.__name__)
        return msgspec.json.decode(payload, type=expected)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TheirsError("malformed", str(error), where=expected.__name__) from error


def _check_size(payload: bytes, expected: type[Message]) -> None:
    if len(payload) > expected.limit:
        raise TheirsError("oversized", f"{len(payload)} bytes, at most {expected.limit} are allowed", where=expected.__name__)
