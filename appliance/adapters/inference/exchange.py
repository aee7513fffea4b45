"""Batches through shared memory: inputs are copied in once, outputs copied out once, nothing is pickled.

1. One region per batch: the inputs in signature order, then room for the outputs. Inputs that lie in a lent region stay there (`shares`).
2. How much room outputs need is learned per input shapes: the first batch of a shape brings its outputs in a memfd of its own.
3. Nothing that the child says is used unchecked: places must lie in the batch's own room, with the axes that the signature fixes.
4. A memfd from the child is read, never mapped: the child could truncate it under a mapping.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from appliance.adapters.inference import tensors
from appliance.adapters.inference.arena import Arena, Region, Segment
from appliance.adapters.inference.protocol import Done, Source
from appliance.adapters.inference.shares import Lent, lent
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.contract.inference import Array, Signature, TensorSpec

_ROOMS = 256
"""Input shapes that are remembered per model; label widths in steps of 8 pixels times batch sizes stay below."""

Sort = tuple[int | tuple[int, ...], ...]


@dataclass(eq=False, slots=True)
class Form:
    """What is the same in all batches of a model."""

    signature: Signature
    rooms: dict[Sort, int] = field(default_factory=dict)


class Parcel(NamedTuple):
    """One batch on its way. `wanted` is a bit mask of outputs; the room is `room_bytes` from `room_at` in the region's segment."""

    form: Form
    sort: Sort
    wanted: int
    region: Region
    room_at: int
    room_bytes: int
    sources: Sequence[Source]


class Exchange:
    """The arena of one child, and what goes through it. `lend` tells the child of a caller's region."""

    def __init__(
        self,
        limit_bytes: int,
        announce: Callable[[Segment, int], None],
        retire: Callable[[Segment], None],
        lend: Callable[[Lent], None],
    ) -> None:
        self._arena = Arena(limit_bytes, announce, retire)
        self._lend = lend
        self._lent: set[int] = set()
        self._freed = asyncio.Event()
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes of shared memory now."""
        return self._arena.size

    async def room(self) -> None:
        """Return when a batch has left since `put` found no room."""
        self._freed.clear()
        await self._freed.wait()

    def put(self, form: Form, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Parcel | None:
        """Copy a checked batch in; None if there is no room for it now.

        Raises: TheirsError (`oversized`), WorldError (`memory`, `worker_lost`).
        """
        arrays = [inputs[spec.name] for spec in form.signature.inputs]
        wanted = sum(1 << bit for bit, spec in enumerate(form.signature.outputs) if not outputs or spec.name in outputs)
        sort: Sort = (wanted, *(array.shape for array in arrays))
        room_bytes = form.rooms.get(sort, 0)
        places = [lent(array) for array in arrays]
        sizes = [array.nbytes if place is None else 0 for array, place in zip(arrays, places, strict=True)]
        offsets, inputs_bytes = tensors.lay(0, sizes)
        if inputs_bytes + room_bytes > self._arena.limit_bytes:
            room_bytes = 0  # the outputs spill: better than a batch that could never run
        region = self._take(inputs_bytes + room_bytes)
        if region is None:
            return None
        sources: list[Source] = []
        for array, place, offset in zip(arrays, places, offsets, strict=True):
            if place is None:
                at = region.offset + offset
                np.copyto(np.ndarray(array.shape, array.dtype, region.segment.memory, at), array)
                sources.append((region.segment.number, at, array.shape))
            else:
                sources.append((self._known(place[0]), place[1], array.shape))
        return Parcel(form, sort, wanted, region, region.offset + inputs_bytes, room_bytes, sources)

    def open(self, parcel: Parcel, done: Done, fd: int | None) -> dict[str, Array]:
        """Copy the outputs out. Raises: OursError (`protocol`), TheirsError (`oversized`)."""
        specs = [spec for bit, spec in enumerate(parcel.form.signature.outputs) if parcel.wanted >> bit & 1]
        if len(specs) != len(done.places):
            raise OursError("protocol", f"{len(done.places)} outputs came, {len(specs)} were asked for")
        if done.spilled_bytes and fd is not None:
            return self._unspill(parcel, specs, done, fd)
        end = parcel.room_at + parcel.room_bytes
        outputs = {}
        for spec, (at, shape) in zip(specs, done.places, strict=True):
            _check(spec, shape, at, parcel.room_at, end)
            outputs[spec.name] = tensors.view(parcel.region.segment.memory, spec.datatype, shape, at).copy()
        return outputs

    def drop(self, parcel: Parcel) -> None:
        """Give a batch's region back."""
        self._arena.give(parcel.region)
        self._freed.set()

    def close(self) -> None:
        """Unmap everything; whoever waits for room is told that the worker is lost."""
        self._closed = True
        self._arena.close()
        self._freed.set()

    def _unspill(self, parcel: Parcel, specs: Sequence[TensorSpec], done: Done, fd: int) -> dict[str, Array]:
        if done.spilled_bytes > self._arena.limit_bytes:
            raise TheirsError(
                "oversized",
                f"outputs of {done.spilled_bytes} bytes; at most {self._arena.limit_bytes} are allowed",
                remedy="send a smaller batch",
            )
        outputs = {}
        for spec, (at, shape) in zip(specs, done.places, strict=True):
            _check(spec, shape, at, 0, done.spilled_bytes)
            array: Array = np.ndarray(shape, tensors.dtype(spec.datatype))
            flat: Any = array.reshape(-1).view(np.uint8)  # numpy's types hide the buffer
            if array.nbytes and os.preadv(fd, [flat], at) != array.nbytes:
                raise OursError("protocol", f"output {spec.name!r} is cut short")
            outputs[spec.name] = array
        if len(parcel.form.rooms) >= _ROOMS:
            parcel.form.rooms.clear()
        parcel.form.rooms[parcel.sort] = done.spilled_bytes
        return outputs

    def forget(self, number: int) -> bool:
        """Forget a lent region; True if the child knew of it, and is to be told."""
        known = number in self._lent
        self._lent.discard(number)
        return known

    def _known(self, mapping: Lent) -> int:
        if mapping.number not in self._lent:
            self._lend(mapping)
            self._lent.add(mapping.number)
        return mapping.number

    def _take(self, size: int) -> Region | None:
        if self._closed:
            raise WorldError("worker_lost", "the process is gone", where="inference child")
        region = self._arena.take(max(size, tensors.ALIGN_BYTES))
        if region is None and not self._arena.used:
            raise TheirsError(
                "oversized", f"a batch of {size} bytes; at most {self._arena.limit_bytes} are allowed", remedy="send a smaller batch"
            )
        return region


def _check(spec: TensorSpec, shape: tuple[int, ...], at: int, start: int, end: int) -> None:
    if at < start or at + tensors.nbytes(spec.datatype, shape) > end:
        raise OursError("protocol", f"output {spec.name!r} lies outside its room")
