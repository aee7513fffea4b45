"""Shared memory between the daemon and one child: segments of memfd, handed out in regions.

1. Memory is anonymous (memfd): nothing reaches a disk, and it is gone with the last process that maps it.
2. A segment is sealed against shrinking and growing: a child cannot make the daemon fault (SIGBUS) by truncating it.
3. The arena starts empty and grows by segments of twice the size; smaller ones go when their last region is given back.
4. All segments together stay within the bound; a region that cannot fit now is None, and the caller waits for one to be given back.
"""

import fcntl
import mmap
import os
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from appliance.contract.errors import WorldError

FIRST_BYTES = 1_048_576
"""The first segment: several batches of a small model (8 label images are 737 kB), and 256 pages to fault in."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class FreeList:
    """First-fit allocation in `size` bytes; neighbours that are free merge."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self._holes: list[tuple[int, int]] = [(0, size)]

    def take(self, size: int) -> int | None:
        """Return the offset of a free range of `size` bytes, None if there is none."""
        for index, (at, length) in enumerate(self._holes):
            if length >= size:
                self._holes[index : index + 1] = [(at + size, length - size)] if length > size else []
                self.used += size
                return at
        return None

    def give(self, at: int, size: int) -> None:
        """Give a range back that `take` returned."""
        self.used -= size
        if not self.used:
            self._holes = [(0, self.size)]
            return
        insort(self._holes, (at, size))
        merged: list[tuple[int, int]] = []
        for start, length in self._holes:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._holes = merged


@dataclass(eq=False, slots=True)
class Segment:
    """One mapped memfd."""

    number: int
    memory: mmap.mmap
    ranges: FreeList


class Region(NamedTuple):
    """A range of a segment, owned by one batch."""

    segment: Segment
    offset: int
    size: int


@dataclass(slots=True)
class Arena:
    """The segments of one child. `announce` is called with each new segment and its descriptor, `retire` with each that goes."""

    limit_bytes: int
    announce: Callable[[Segment, int], None]
    retire: Callable[[Segment], None]
    _segments: list[Segment] = field(default_factory=list)
    _count: int = 0

    @property
    def size(self) -> int:
        """Bytes of all segments."""
        return sum(segment.ranges.size for segment in self._segments)

    @property
    def used(self) -> int:
        """Bytes in regions that are not yet given back."""
        return sum(segment.ranges.used for segment in self._segments)

    def take(self, size: int) -> Region | None:
        """Return a region of at least `size` bytes; None if it does not fit now. Raises: WorldError (`memory`)."""
        for segment in reversed(self._segments):
            at = segment.ranges.take(size)
            if at is not None:
                return Region(segment, at, size)
        return self.take(size) if self._grow(size) else None

    def give(self, region: Region) -> None:
        """Give a region back; a segment that a larger one replaced goes with its last region."""
        region.segment.ranges.give(region.offset, region.size)
        if region.segment.ranges.used == 0 and region.segment is not self._segments[-1]:
            self._remove(region.segment)

    def close(self) -> None:
        """Unmap everything."""
        for segment in self._segments:
            segment.memory.close()
        self._segments.clear()

    def _grow(self, size: int) -> bool:
        for segment in [one for one in self._segments if one.ranges.used == 0]:
            self._remove(segment)
        free = self.limit_bytes - self.size
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if pages > free:
            return False
        largest = max((one.ranges.size for one in self._segments), default=0)
        self._add(max(pages, min(free, max(FIRST_BYTES, 2 * largest, 1 << (size - 1).bit_length()))))
        return True

    def _add(self, size: int) -> None:
        try:
            fd = os.memfd_create("tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise WorldError("memory", f"no shared memory: {error}", where="inference arena") from error
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            segment = Segment(self._count, mmap.mmap(fd, size), FreeList(size))
            self._count += 1
            self._segments.append(segment)
            self.announce(segment, fd)
        except OSError as error:
            raise WorldError("memory", f"no shared memory of {size} bytes: {error}", where="inference arena") from error
        finally:
            os.close(fd)

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        segment.memory.close()
        self.retire(segment)
