"""By whose fault, as HTTP says it: a refusal as a status, its headers and the protocol's error body."""

import math
from collections.abc import Mapping

from aiohttp import hdrs, web

from appliance.contract.errors import ApplianceError, OursError, TheirsError
from appliance.contract.openinference import error as error_body

STATUS: Mapping[str, int] = {
    "forbidden": 403,
    "unknown_model": 404,
    "unknown_path": 404,
    "unknown_promise": 404,
    "unknown_region": 404,
    "method": 405,
    "timeout": 408,
    "dropped": 410,
    "oversized": 413,
    "encoding": 415,
    "backlog_full": 429,
    "unsupported": 501,
    "worker_lost": 503,
    "not_ready": 503,
    "draining": 503,
    "deadline": 504,
}
BUSY = 503
RETRYABLE = frozenset({429, BUSY})
CLOSING = frozenset({408, 413})
"""After these the rest of the request is not worth reading."""
DEFAULT_RETRY_S = 1.0
JSON = "application/json"


def ok(body: bytes = b"", content_type: str = JSON) -> web.Response:
    """Answer 200; without a body there is no content type."""
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type}) if body else web.Response()


def refusal(error: ApplianceError) -> web.Response:
    """Answer an error: the caller's fault is 4xx, what may work later 429, 503 or 504 with `Retry-After`; ours must not come here."""
    status = STATUS.get(error.reason, 400 if isinstance(error, TheirsError) else 503)
    text = "an internal error" if isinstance(error, OursError) else str(error)
    headers = {}
    if error.reason == "deadline" and error.retry_after_s is not None:  # refused on arrival, with a hint: overload, not a time-out
        status = BUSY
    if status in RETRYABLE:
        headers = _later(DEFAULT_RETRY_S if error.retry_after_s is None else error.retry_after_s)
    if status == 415:  # noqa: PLR2004 - HTTP's number
        headers[hdrs.ACCEPT_ENCODING] = "gzip, deflate"
    return failure(status, text, error.reason, headers)


def accepted(body: bytes, retry_after_s: float) -> web.Response:
    """Answer 202: not yet."""
    return web.Response(status=202, body=body, headers={hdrs.CONTENT_TYPE: JSON, **_later(retry_after_s)})


def _later(after_s: float) -> dict[str, str]:
    after_s = max(after_s, 0.0)
    return {"Retry-After": str(max(math.ceil(after_s), 1)), "Retry-After-Ms": str(math.ceil(after_s * 1e3))}


def failure(status: int, text: str, reason: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """Answer an error in the protocol's words."""
    body = error_body(text.encode(errors="replace").decode(), reason)
    response = web.Response(status=status, body=body, headers={hdrs.CONTENT_TYPE: JSON, **(headers or {})})
    if status in CLOSING:
        response.force_close()
    return response
