"""The closed vocabularies of the appliance: every word that crosses a room or a wire has one spelling, here."""

from enum import StrEnum


class Mode(StrEnum):
    """How much of a model this device can afford to run now; the letter is what callers see."""

    FULL = "A"
    CONSTRAINED = "B"
    MINIMAL = "C"
    CLOUD = "D"


class LinkState(StrEnum):
    """How well a hop (device to region, region to cloud) is connected."""

    HEALTHY = "HEALTHY"
    DEGRADED = "DEGRADED"
    PARTITIONED = "PARTITIONED"


class Outcome(StrEnum):
    """What became of one inference request: the label `reason` of the metric `inference_requests_total`."""

    ANSWERED = "answered"
    MALFORMED = "malformed"
    UNKNOWN_MODEL = "unknown_model"
    NOT_READY = "not_ready"
    BACKLOG_FULL = "backlog_full"
    DEADLINE = "deadline"
    WORKER_LOST = "worker_lost"
    DRAINING = "draining"
    CANCELLED = "cancelled"
    DEGRADED = "degraded"
    INTERNAL = "internal"


class Platform(StrEnum):
    """The run-times for which a model artifact may be compiled; the words of the Open Inference Protocol."""

    ONNX = "onnxruntime_onnx"
    LITERT = "litert_tflite"


class ReleaseState(StrEnum):
    """Where one offered model release stands on one device."""

    OFFERED = "offered"
    PULLING = "pulling"
    OPENING = "opening"
    SERVING = "serving"
    REFUSED = "refused"
    RETIRED = "retired"


class Datatype(StrEnum):
    """Tensor element types, spelled as in the Open Inference Protocol v2 (section "Tensor Data Types")."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"
