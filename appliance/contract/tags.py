"""What a caller asks of an answer, and what an answer says of itself: the `parameters` of both wires, HTTP and gRPC.

1. Asked: `priority` (0 highest to 9), `timeout` (microseconds as in Triton; 0 means none), `latency_slo_ms`, `accept_degradation`,
   `accept_stale`, `accept_deferral`, `data_residency` (`device`, `region` or empty) and `max_cost_per_inference` (dollars).
2. Said: `mode`, `model_version` and `route`; where there is something to say also `why`, `confidence`, `cost` and `stale_age_s`.
3. A mapping's numbers may be texts: KServe's own gRPC messages have no doubles.
4. Unknown parameters are ignored: a newer caller is served by an older device. A known one of a wrong kind or range is refused by name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from appliance.contract.errors import TheirsError
from appliance.contract.inference import Answer, Tags

PRIORITIES = range(10)
DEFAULT = Tags()
"""What a caller wants who says nothing."""

_MICROSECONDS = 1e6
_MOST_SLO_MS = 86_400_000
_WHERE = "parameters"


class Parameters(msgspec.Struct):
    """The tags of a request as they stand on the wire."""

    priority: int | None = None
    timeout: int | None = None
    accept_degradation: bool = True
    accept_stale: bool = False
    accept_deferral: bool = False
    latency_slo_ms: float | None = None
    data_residency: Literal["", "device", "region"] = ""
    max_cost_per_inference: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Made(msgspec.Struct, omit_defaults=True):
    """What made an answer, as it stands on the wire."""

    mode: str
    model_version: str
    route: str
    why: str = ""
    confidence: float | None = None
    cost: float | None = None
    stale_age_s: float | None = None


def tags(parameters: Parameters) -> Tags:
    """Read the tags of a request. Raises: TheirsError (`malformed`)."""
    priority, timeout = parameters.priority, parameters.timeout
    if priority is not None and priority not in PRIORITIES:
        raise TheirsError("malformed", "priority is outside 0 (highest) to 9 (lowest)", where=_WHERE)
    if timeout is not None and not 0 <= timeout < 2**63:
        raise TheirsError("malformed", "timeout is not a number of microseconds from 0", where=_WHERE)
    return Tags(
        priority=DEFAULT.priority if priority is None else priority,
        timeout_s=timeout / _MICROSECONDS if timeout else None,
        slo_s=None if parameters.latency_slo_ms is None else _slo_s(parameters.latency_slo_ms),
        accept_degradation=parameters.accept_degradation,
        accept_stale=parameters.accept_stale,
        accept_deferral=parameters.accept_deferral,
        data_residency=parameters.data_residency,
        max_cost=parameters.max_cost_per_inference,
    )


def tags_in(parameters: Mapping[str, Any]) -> Tags:
    """Read the tags of a request whose parameters come as a mapping. Raises: TheirsError (`malformed`)."""
    try:
        return tags(msgspec.convert(parameters, Parameters, strict=False))
    except msgspec.ValidationError as fault:
        raise TheirsError("malformed", str(fault), where=_WHERE) from fault


def _slo_s(milliseconds: float) -> float:
    if not 0 < milliseconds < _MOST_SLO_MS:
        what = f"latency_slo_ms is not a number of milliseconds above 0 and below {_MOST_SLO_MS}"
        raise TheirsError("malformed", what, where=_WHERE)
    return milliseconds / 1e3


def made(answer: Answer) -> Made:
    """Say what made an answer."""
    return Made(answer.mode, answer.version, answer.route, answer.why, answer.confidence, answer.cost, answer.age_s)


def said(answer: Answer) -> dict[str, str | float]:
    """Say what made an answer, as a mapping without what there is nothing to say of."""
    words: dict[str, str | float] = msgspec.to_builtins(made(answer))
    return words
