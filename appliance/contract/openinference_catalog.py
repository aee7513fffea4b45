"""What a server says of itself and of its models, and what a caller may ask of the model repository (Open Inference Protocol v2, HTTP).

1. Metadata, index and errors are JSON in the protocol's words; `reason` beside `error` is a stable code, an addition that clients ignore.
2. `load` and `unload` are served where the operator said so (`Repository`), and never to a web page; the index is open to everybody.
3. `load` takes no parameters: Triton's `config` and `file:` would replace what was signed and attested by what a caller sends.
4. `unload` takes `unload_dependents` and does not mind it: no model here depends on another.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from appliance.contract.admission import quoted
from appliance.contract.errors import TheirsError
from appliance.contract.inference import Signature, TensorSpec

Repository = Literal["socket", "everywhere", "nowhere"]
"""Where models may be loaded and unloaded: on the Unix socket, whose file permissions decide; on every listener; on none."""
REPOSITORY_EXTENSION = "model_repository"
"""Said only where `load` and `unload` are served too."""
HTTP_EXTENSIONS = ("binary_tensor_data", "parameters")

_encode = msgspec.json.Encoder().encode


class _Index(msgspec.Struct):
    ready: bool = False


class _Change(msgspec.Struct):
    parameters: dict[str, Any] = {}


_index = msgspec.json.Decoder(_Index)
_change = msgspec.json.Decoder(_Change)


def is_open(repository: Repository, *, socket: bool) -> bool:
    """Whether a listener (the Unix socket, or another one) serves `load` and `unload`."""
    return repository == "everywhere" or (socket and repository == "socket")


def check_open(repository: Repository, *, socket: bool) -> None:
    """Check that a listener serves `load` and `unload`. Raises: TheirsError (`forbidden`)."""
    if not is_open(repository, socket=socket):
        remedy = "use the Unix socket" if repository == "socket" else "an operator may open it with serve.repository"
        raise TheirsError("forbidden", "models are not loaded or unloaded through this listener", remedy=remedy)


def server_metadata(name: str, version: str, extensions: Sequence[str] = HTTP_EXTENSIONS) -> bytes:
    """Render the server's metadata with the extensions that it speaks."""
    return _encode({"name": name, "version": version, "extensions": extensions})


def model_metadata(name: str, versions: Sequence[str], signature: Signature, max_batch: int) -> bytes:
    """Render a model's metadata; axes that the model leaves free are -1, `parameters` holds what the file says of itself."""
    return _encode(
        {
            "name": name,
            "versions": list(versions),
            "platform": signature.platform,
            "inputs": [_spec(spec) for spec in signature.inputs],
            "outputs": [_spec(spec) for spec in signature.outputs],
            "parameters": {**signature.metadata, "max_batch": max_batch},
        }
    )


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def state(ready: bool) -> str:
    """The protocol's word for whether a model answers."""
    return "READY" if ready else "UNAVAILABLE"


def repository_index(models: Sequence[tuple[str, str, bool, str]]) -> bytes:
    """Render the repository's index from (name, version, ready, why not)."""
    return _encode([{"name": name, "version": version, "state": state(ready), "reason": why} for name, version, ready, why in models])


def only_ready(body: bytes | bytearray) -> bool:
    """Read an index request: whether only models that are ready are wanted. Raises: TheirsError (`malformed`)."""
    return _decoded(_index, body, "index request").ready if body else False


def check_load(body: bytes | bytearray) -> None:
    """Check the body of a load request. Raises: TheirsError (`malformed`, `override`)."""
    if body:
        refuse_overrides(_decoded(_change, body, "load request").parameters)


def check_unload(body: bytes | bytearray) -> None:
    """Check the body of an unload request. Raises: TheirsError (`malformed`)."""
    if body:
        _decoded(_change, body, "unload request")


def refuse_overrides(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters of a load request. Raises: TheirsError (`override`)."""
    for name in parameters:
        what = f"parameter {quoted(name)} would replace what was released to this device"
        raise TheirsError("override", what, where="load request", remedy="load without parameters; publish a release to change a model")


def _decoded(decoder: "msgspec.json.Decoder[Any]", body: bytes | bytearray, what: str) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        raise TheirsError("malformed", str(fault), where=what) from fault


def error(what: str, reason: str = "") -> bytes:
    """Render an error; `reason` is a stable code for programs, an addition to the protocol that its clients ignore."""
    return _encode({"error": what, "reason": reason} if reason else {"error": what})
