"""What a caller asks, as the Open Inference Protocol says it: arrays and frames to a request, tags to parameters."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict
from urllib.parse import quote

import msgspec

from appliance.client.exchange import Asked
from appliance.client.frames import Frame
from appliance.contract.errors import TheirsError
from appliance.contract.inference import DATATYPES, Array, Tags
from appliance.contract.openinference import HEADER_LENGTH
from appliance.contract.openinference_data import to_binary
from appliance.contract.tags import DEFAULT

Inputs = Mapping[str, "Array | Frame"]
Regions = Mapping[str, str]
"""The region's name by input or output name, of the frames that the server knows."""


class Options(TypedDict, total=False):
    """What may be said with an inference, all optional.

    Attributes:
        tags: what is asked of the answer (`appliance.contract.inference.Tags`).
        outputs: names of the outputs to return; none means all.
        into: frames that outputs are put into, by output name; only outputs that are named somewhere are returned then.
        version: the model's version; empty means the one that is served.
        timeout_s: seconds for the whole call, in place of the client's.
        id: the request's id; comes back with the answer, and names a promise.
        parameters: further parameters, as the protocol has them.
    """

    tags: Tags
    outputs: Sequence[str]
    into: Mapping[str, Frame]
    version: str
    timeout_s: float
    id: str
    parameters: Mapping[str, Any]


def parameters_of(tags: Tags, timeout_s: float | None) -> dict[str, Any]:
    """Render tags, without those that say nothing; `timeout_s` is what is left of the tags' own."""
    said = {
        "priority": (tags.priority, DEFAULT.priority),
        "timeout": (None if timeout_s is None else max(1, round(timeout_s * 1e6)), None),
        "latency_slo_ms": (None if tags.slo_s is None else tags.slo_s * 1e3, None),
        "accept_degradation": (tags.accept_degradation, DEFAULT.accept_degradation),
        "accept_stale": (tags.accept_stale, DEFAULT.accept_stale),
        "accept_deferral": (tags.accept_deferral, DEFAULT.accept_deferral),
        "data_residency": (tags.data_residency, DEFAULT.data_residency),
        "max_cost_per_inference": (tags.max_cost, DEFAULT.max_cost),
    }
    return {name: value for name, (value, default) in said.items() if value != default}


def frames_of(inputs: Inputs, options: Options) -> dict[str, Frame]:
    """The frames of a request by the name of their tensor: inputs as `<name`, outputs as `>name`."""
    found = {f"<{name}": value for name, value in inputs.items() if isinstance(value, Frame)}
    return found | {f">{name}": frame for name, frame in options.get("into", {}).items()}


def infer(model: str, inputs: Inputs, options: Options, regions: Regions, timeout_s: float | None) -> Asked:
    """Render an infer request; a frame without a region travels in the body. Raises: TheirsError (`datatype`, `parameters`)."""
    tensors: list[dict[str, Any]] = []
    parts: list[bytes | memoryview] = []
    for name, value in inputs.items():
        region = regions.get(f"<{name}")
        if region is not None and isinstance(value, Frame):
            tensors.append(_tensor(name, value.array) | {"parameters": _part(region, value)})
            continue
        array = value.array if isinstance(value, Frame) else value
        tensor = _tensor(name, array)
        raw = to_binary(array.astype(array.dtype.newbyteorder("<"), copy=False))
        parts.append(raw)
        tensors.append(tensor | {"parameters": {"binary_data_size": len(raw)}})
    tags = parameters_of(options.get("tags", DEFAULT), timeout_s)
    request: dict[str, Any] = {"inputs": tensors, "parameters": {**options.get("parameters", {}), **tags, "binary_data_output": True}}
    if outputs := _outputs(options, regions):
        request["outputs"] = outputs
    if options.get("id"):
        request["id"] = options["id"]
    try:
        head = msgspec.json.encode(request)
    except (TypeError, ValueError) as error:
        raise TheirsError("parameters", f"cannot be sent as JSON: {error}") from error
    headers = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
    return Asked("POST", f"{_path(model, options.get('version', ''))}/infer", [head, *parts], headers)


def metadata(model: str) -> Asked:
    """Render a question for a model's metadata."""
    return Asked("GET", _path(model, ""))


def ready() -> Asked:
    """Render the question whether requests are taken."""
    return Asked("GET", "/v2/health/ready")


def deferred(promise: str) -> Asked:
    """Render a question for a promised answer."""
    return Asked("GET", f"/v2/deferred/{quote(promise, safe='')}")


def _path(model: str, version: str) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _tensor(name: str, array: Array) -> dict[str, Any]:
    datatype = DATATYPES.get(array.dtype.newbyteorder("="))
    if datatype is None:
        raise TheirsError("datatype", f"arrays of {array.dtype} cannot be sent, only {', '.join(DATATYPES.values())}", where=name)
    return {"name": name, "shape": list(array.shape), "datatype": datatype}


def _outputs(options: Options, regions: Regions) -> list[dict[str, Any]]:
    into = options.get("into", {})
    listed: list[dict[str, Any]] = [{"name": name} for name in options.get("outputs", ()) if name not in into]
    for name, frame in into.items():
        region = regions.get(f">{name}")
        listed.append({"name": name} if region is None else {"name": name, "parameters": _part(region, frame)})
    return listed


def _part(region: str, frame: Frame) -> dict[str, Any]:
    return {"shared_memory_region": region, "shared_memory_byte_size": frame.array.nbytes}
