"""What is asked of a model and what comes back, independent of any wire format."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from appliance.contract.vocabulary import Datatype, Mode, Platform

Array = npt.NDArray[np.generic]

DTYPES: Mapping[Datatype, np.dtype[np.generic]] = {
    Datatype.BOOL: np.dtype(np.bool_),
    Datatype.UINT8: np.dtype(np.uint8),
    Datatype.UINT16: np.dtype(np.uint16),
    Datatype.UINT32: np.dtype(np.uint32),
    Datatype.UINT64: np.dtype(np.uint64),
    Datatype.INT8: np.dtype(np.int8),
    Datatype.INT16: np.dtype(np.int16),
    Datatype.INT32: np.dtype(np.int32),
    Datatype.INT64: np.dtype(np.int64),
    Datatype.FP16: np.dtype(np.float16),
    Datatype.FP32: np.dtype(np.float32),
    Datatype.FP64: np.dtype(np.float64),
}
DATATYPES: Mapping[np.dtype[np.generic], Datatype] = {dtype: datatype for datatype, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model. `shape` has -1 where the model leaves an axis free; axis 0 is the batch."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What a loaded model takes and gives. `metadata` is what the model file says of itself (dictionary, labels)."""

    platform: Platform
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tags:
    """What a caller asks of the answer beside the answer; all optional, carried in `parameters` on the wire.

    Attributes:
        priority: 0 (highest) to 9 (lowest).
        timeout_s: seconds after arrival at which the answer is worthless; None means the model's own limit.
        slo_s: seconds within which the answer should come; a route may stretch it by half, where `timeout_s` is a wall.
        accept_degradation: whether an answer from mode B, C or D is welcome.
        accept_stale: whether an older answer to the same input is welcome where there is no fresh one.
        accept_deferral: whether a promise (an id to fetch the answer with later) is welcome where there is no answer now.
        data_residency: where the input may go: `device`, `region`, or empty for anywhere.
        max_cost: the most that this inference may cost, in dollars; None means that nobody asked.
    """

    priority: int = 5
    timeout_s: float | None = None
    slo_s: float | None = None
    accept_degradation: bool = True
    accept_stale: bool = False
    accept_deferral: bool = False
    data_residency: str = ""
    max_cost: float | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One inference request. `inputs` maps input names to arrays whose axis 0 is the caller's own batch.

    `caller` tells callers apart (a connection, a peer), so that one who repeats refused requests cannot starve the others.
    """

    id: str
    model: str
    inputs: Mapping[str, Array]
    version: str = ""
    outputs: tuple[str, ...] = ()
    tags: Tags = field(default_factory=Tags)
    caller: Hashable = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The outputs of one request, and what made them. `model` is the served model's name.

    Attributes:
        why: one phrase that says why this mode and this place answered.
        confidence: the accuracy (0 to 1) that was measured for this mode on the model's own samples, less what age took; None: not measured.
        route: where it was computed: `edge`, `split`, `cloud`, `neighbour` or `stale`.
        cost: what it cost, in dollars; None where nobody prices it.
        age_s: how old a stale answer is; None for a fresh one.
    """

    id: str
    model: str
    version: str
    outputs: Mapping[str, Array]
    mode: Mode
    why: str = ""
    confidence: float | None = None
    route: str = "edge"
    cost: float | None = None
    age_s: float | None = None


@dataclass(frozen=True, slots=True)
class Promise:
    """There is no answer now, but the request is on disk and will be answered; fetch it by `id`, which is the request's where it had one."""

    id: str
    why: str
    retry_after_s: float = 1.0
