"""Tensors of an infer request that stand in memory which the caller lent (Triton's shared memory extension, for `contract.frames`).

1. A part of a region is named by `shared_memory_region` and `shared_memory_byte_size`; `shared_memory_offset` is 0 where it is not said.
2. Inputs are read-only views: nothing is copied. What the caller changes while he waits changes what the model sees, and nothing else: names,
   shapes and sizes stand in the request. BOOL bytes are copied, for they are checked, and so are BYTES.
3. Outputs are copied into their part once they are made; the answer says which part and how many bytes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from appliance.contract.admission import quoted
from appliance.contract.errors import TheirsError
from appliance.contract.frames import Regions
from appliance.contract.inference import Array
from appliance.contract.openinference_data import from_binary
from appliance.contract.vocabulary import Datatype


class Part(msgspec.Struct):
    """Where a tensor stands; what a caller writes into its `parameters`."""

    shared_memory_region: str | None = None
    shared_memory_offset: int = 0
    shared_memory_byte_size: int | None = None

    @property
    def is_named(self) -> bool:
        """Whether the caller means memory that he lent."""
        return self.shared_memory_region is not None or self.shared_memory_byte_size is not None


class Placed(msgspec.Struct):
    """Where an output was put; what an answer says in its `parameters`."""

    shared_memory_region: str
    shared_memory_byte_size: int
    shared_memory_offset: int = 0


class Room(NamedTuple):
    """Where an output is to be put."""

    region: str
    offset: int
    memory: memoryview

    def put(self, data: bytes | memoryview, where: str) -> Placed:
        """Copy an output there. Raises: TheirsError (`shared_memory`) if it is larger than its room."""
        size = len(data)
        if size > len(self.memory):
            raise TheirsError("shared_memory", f"it takes {size} bytes, its part of the region has {len(self.memory)}", where=where)
        self.memory[:size] = data
        return Placed(self.region, size, self.offset)


def lent_input(part: Part, name: str, datatype: Datatype, shape: Sequence[int], regions: Regions | None) -> Array:
    """Return an input that stands in lent memory. Raises: TheirsError (`malformed`, `unknown_region`, `shared_memory`, `shape`)."""
    lent = _lent(part, regions, f"input {quoted(name)}", writable=False)
    if datatype is Datatype.BOOL:
        return from_binary(name, datatype, shape, memoryview(lent.tobytes()))
    array = from_binary(name, datatype, shape, lent.data)
    return array if datatype is Datatype.BYTES else lent.view(array.dtype).reshape(shape)  # a view of the loan: the engine knows it by that


def lent_room(part: Part, regions: Regions | None, where: str) -> Room:
    """Return where an output is to be put. Raises: TheirsError (`malformed`, `unknown_region`, `shared_memory`)."""
    lent = _lent(part, regions, where, writable=True)
    return Room(part.shared_memory_region or "", part.shared_memory_offset, lent.data)


def _lent(part: Part, regions: Regions | None, where: str, *, writable: bool) -> npt.NDArray[np.uint8]:
    if regions is None:
        raise TheirsError("malformed", "shared memory is not served here", where=where, remedy="send the data in the body")
    name, size = part.shared_memory_region, part.shared_memory_byte_size
    if name is None or size is None:
        missing = "shared_memory_region" if name is None else "shared_memory_byte_size"
        raise TheirsError("malformed", f"it has no {missing}", where=where)
    try:
        return regions.lend(name, part.shared_memory_offset, size, writable=writable)
    except TheirsError as fault:
        raise TheirsError(fault.reason, fault.what, where=where, remedy=fault.remedy) from fault
