"""By whose fault, as gRPC says it: an error as a status code, a text, and trailing metadata.

1. The caller's fault is INVALID_ARGUMENT, NOT_FOUND or PERMISSION_DENIED; the world's RESOURCE_EXHAUSTED, UNAVAILABLE or DEADLINE_EXCEEDED.
2. `reason` is the stable code that HTTP's error body has. Where waiting helps, `retry-after-ms` says how long.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from grpc import StatusCode

from appliance.contract.errors import ApplianceError, TheirsError

CODES: Mapping[str, StatusCode] = {
    "forbidden": StatusCode.PERMISSION_DENIED,
    "unknown_model": StatusCode.NOT_FOUND,
    "unknown_method": StatusCode.UNIMPLEMENTED,
    "timeout": StatusCode.DEADLINE_EXCEEDED,
    "deadline": StatusCode.DEADLINE_EXCEEDED,
    "backlog_full": StatusCode.RESOURCE_EXHAUSTED,
}
RETRYABLE = frozenset({StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE})
DEFAULT_RETRY_S = 1.0
MAX_TEXT = 1_000
"""Characters: a peer takes 8 KiB of metadata in all."""


class Status(NamedTuple):
    """What a failed call ends with."""

    code: StatusCode
    text: str
    trailing: tuple[tuple[str, str], ...]


def refusal(error: ApplianceError) -> Status:
    """Turn an error into a status; ours must not come here."""
    code = CODES.get(error.reason, StatusCode.INVALID_ARGUMENT if isinstance(error, TheirsError) else StatusCode.UNAVAILABLE)
    trailing = [("reason", error.reason)]
    if code in RETRYABLE:
        after_s = DEFAULT_RETRY_S if error.retry_after_s is None else max(error.retry_after_s, 0.0)
        trailing.append(("retry-after-ms", str(math.ceil(after_s * 1e3))))
    return failure(code, str(error), trailing)


def failure(code: StatusCode, text: str, trailing: list[tuple[str, str]]) -> Status:
    """Make a status of a text that may hold anything."""
    return Status(code, text[:MAX_TEXT].encode(errors="replace").decode(), tuple(trailing))
