"""Whether a request fits a model's signature, decided before anybody spends work on it.

1. Input names are exactly the signature's; asked outputs are among the signature's.
2. Datatype and rank agree, and every dimension that the model fixes; a dimension that it leaves free (-1) is at least 1.
3. Axis 0 is the caller's batch where the model leaves it free: the same in all inputs, at least 1 and at most `max_batch`.
4. A fault names the tensor, what was expected and what was seen.
"""

from collections.abc import Iterable

from appliance.contract.errors import TheirsError
from appliance.contract.inference import DATATYPES, Array, Request, Signature, TensorSpec
from appliance.contract.vocabulary import Datatype

_SHOWN = 64
"""Characters of a caller's own text that an error repeats."""


def quoted(text: str) -> str:
    """Return a caller's text fit for an error message: quoted, escaped, at most 64 characters of it."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def datatype_of(array: Array) -> Datatype | None:
    """The protocol's word for an array's element type (object arrays hold BYTES); None if it has none."""
    return Datatype.BYTES if array.dtype.hasobject else DATATYPES.get(array.dtype)


def check(request: Request, signature: Signature, max_batch: int | None = None) -> int:
    """Return the request's batch in rows (1 where no input has a free axis 0).

    Raises: TheirsError (`missing_input`, `unknown_input`, `unknown_output`, `datatype`, `shape`, `batch`).
    """
    _check_names(request, signature)
    rows: int | None = None
    for spec in signature.inputs:
        array = request.inputs[spec.name]
        _check_tensor(spec, array)
        if spec.shape and spec.shape[0] < 0:
            seen = array.shape[0]
            if rows is not None and seen != rows:
                raise TheirsError("batch", f"{seen} rows, but another input has {rows}", where=f"input {quoted(spec.name)}")
            rows = seen
    rows = 1 if rows is None else rows
    if max_batch is not None and rows > max_batch:
        raise TheirsError("batch", f"{rows} rows, at most {max_batch} are served in one request", remedy="send several requests")
    return rows


def _check_names(request: Request, signature: Signature) -> None:
    inputs = request.inputs
    if len(inputs) != len(signature.inputs) or any(spec.name not in inputs for spec in signature.inputs):
        names = [spec.name for spec in signature.inputs]
        if missing := [name for name in names if name not in inputs]:
            raise TheirsError("missing_input", f"inputs {_listed(missing)} are missing; the model takes {_listed(names)}")
        unknown = [name for name in inputs if name not in names]
        raise TheirsError("unknown_input", f"inputs {_listed(unknown)} are unknown; the model takes {_listed(names)}")
    if request.outputs:
        offered = [spec.name for spec in signature.outputs]
        if unknown := [name for name in request.outputs if name not in offered]:
            raise TheirsError("unknown_output", f"outputs {_listed(unknown)} are unknown; the model gives {_listed(offered)}")


def _check_tensor(spec: TensorSpec, array: Array) -> None:
    if (datatype := datatype_of(array)) is not spec.datatype:
        seen = datatype or array.dtype
        raise TheirsError("datatype", f"datatype is {seen}, expected {spec.datatype}", where=f"input {quoted(spec.name)}")
    if len(array.shape) != len(spec.shape):
        raise _misshapen(spec, array, f"it has {len(array.shape)} axes, expected {len(spec.shape)}")
    for axis, (seen_dim, expected) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if seen_dim != expected and (expected >= 0 or seen_dim < 1):
            raise _misshapen(spec, array, f"axis {axis} is {seen_dim}, expected {expected if expected >= 0 else 'at least 1'}")


def _misshapen(spec: TensorSpec, array: Array, why: str) -> TheirsError:
    return TheirsError("shape", f"shape {list(array.shape)} does not fit {list(spec.shape)}: {why}", where=f"input {quoted(spec.name)}")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""  # noqa: PLR2004 - how many names a person reads
    return ", ".join(quoted(name) for name in names[:8]) + more
