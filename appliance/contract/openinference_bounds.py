"""What one infer request may hold, whichever wire carried it.

1. A bound that is broken is a TheirsError that names it, with both numbers.
2. Names are distinct: nobody has to guess which of two tensors of one name was meant.
"""

from appliance.contract.admission import quoted
from appliance.contract.errors import TheirsError
from appliance.contract.vocabulary import Datatype

MAX_TENSORS = 64
"""Inputs, and outputs, of one request: more than any model here has."""
MAX_JSON_BYTES = 16 * 1024 * 1024
"""JSON numbers take 32 bytes each while they are parsed: this bounds it to about 0.25 GiB. Larger tensors travel in binary."""
MAX_ID = 256
"""Characters of a request's id."""

_DATATYPES = {str(datatype): datatype for datatype in Datatype}


def check_counts(what: str, listed: int, distinct: int) -> None:
    """Check a list of inputs or outputs. Raises: TheirsError (`malformed`)."""
    if listed > MAX_TENSORS:
        raise TheirsError("malformed", f"{listed} {what}, at most {MAX_TENSORS} are allowed")
    if listed != distinct:
        raise TheirsError("malformed", f"{what}: {listed} are listed under {distinct} names, expected one of each")


def check_id(text: str) -> None:
    """Check a request's id. Raises: TheirsError (`malformed`)."""
    if len(text) > MAX_ID:
        raise TheirsError("malformed", f"id has {len(text)} characters, at most {MAX_ID} are allowed")


def datatype_named(tensor: str, text: str) -> Datatype:
    """Return the datatype that an input names. Raises: TheirsError (`datatype`)."""
    datatype = _DATATYPES.get(text)
    if datatype is None:
        what = f"datatype {quoted(text)} is unknown, expected one of {', '.join(_DATATYPES)}"
        raise TheirsError("datatype", what, where=f"input {quoted(tensor)}")
    return datatype
