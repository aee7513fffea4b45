"""What is asked of a model and what comes back, independent of any wire format."""

from collections.abc import Mapping
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
        accept_degradation: whether an answer from mode B or C is welcome.
    """

    priority: int = 5
    timeout_s: float | None = None
    accept_degradation: bool = True


@dataclass(frozen=True, slots=True)
class Request:
    """One inference request. `inputs` maps input names to arrays whose axis 0 is the caller's own batch."""

    id: str
    model: str
    inputs: Mapping[str, Array]
    version: str = ""
    outputs: tuple[str, ...] = ()
    tags: Tags = field(default_factory=Tags)


@dataclass(frozen=True, slots=True)
class Answer:
    """The outputs of one request, and which mode and model version made them. `model` is the served model's name."""

    id: str
    model: str
    version: str
    outputs: Mapping[str, Array]
    mode: Mode
