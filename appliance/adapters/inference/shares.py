"""Shared memory that callers bring: mapped here, lent to the children for reading, never copied where a whole input lies in it.

1. A region must be sealed against shrinking, or its owner could fault the daemon (SIGBUS) by truncating it.
2. An input is read where it lies if it is one contiguous array that begins at a multiple of 64 bytes of the region; everything else is
   copied as ever (to such a place: the last bit of a float sum depends on it). An array is recognised by what it is a view of (0.3 us), and no address is asked of one that is not (2 us).
3. Integers of 32 bits and more are always copied: a model may use them as indices, which a run-time checks first and uses later, and the
   owner can write in between. Pixels and floats changed meanwhile give a wrong answer to whoever changed them.
4. The mapping lives as long as an array over it does. `close` ends new use; a child drops a region after the batches sent before.
5. A child is told of a region with the first batch that uses it, so a replacement needs no telling.
"""

import fcntl
import itertools
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from appliance.adapters.inference.tensors import ALIGN_BYTES
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Array

FIRST_NUMBER = 1 << 32
"""Numbers of lent segments begin here, those of a child's arena at 0."""
REGIONS_MAX = 256
"""Regions open at a time; each holds a descriptor here and a mapping in every child."""
_WIDE_BYTES = 4


class Lent(mmap.mmap):
    """A caller's memory as it is mapped here. `fd` is -1 once it is closed; `address` is where it begins."""

    number: int
    fd: int
    address: int


class Region:
    """One shared region: the port `Share`. `retire` is called once with the number when it is closed."""

    def __init__(self, mapping: Lent, retire: Callable[[int], None]) -> None:
        self._mapping: Lent | None = mapping
        self._retire = retire

    @property
    def memory(self) -> memoryview:
        """The shared bytes, writable. Raises: TheirsError (`shared_memory`) when it is closed."""
        if self._mapping is None:
            raise TheirsError("shared_memory", "is closed", where="shared memory region")
        return memoryview(self._mapping)

    def close(self) -> None:
        """Forget it here and in the children. Arrays over it stay valid, and are copied from now on. Idempotent."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            fd, mapping.fd = mapping.fd, -1
            os.close(fd)
            self._retire(mapping.number)


@dataclass(slots=True)
class Shares:
    """The open regions of one engine; `retire` is called with the number of each that closes."""

    retire: Callable[[int], None]
    regions: dict[int, Region] = field(default_factory=dict)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(FIRST_NUMBER))

    def open(self, fd: int, size: int) -> Region:
        """Map a caller's memfd, which stays the caller's. Raises: TheirsError (`shared_memory`), WorldError (`memory`)."""
        if len(self.regions) >= REGIONS_MAX:
            raise TheirsError(
                "shared_memory", f"{REGIONS_MAX} regions are shared already", remedy="unregister one, or share one larger region"
            )
        _check(fd, size)
        try:
            mapping = Lent(fd, size)
        except PermissionError as error:
            raise _refused("cannot be mapped for writing", "open it for reading and writing, and do not seal it against writing") from error
        except (OSError, ValueError) as error:
            raise WorldError("memory", f"{size} bytes cannot be mapped: {error}", where="shared memory region") from error
        mapping.number, mapping.fd = next(self._numbers), os.dup(fd)
        mapping.address = _address(np.frombuffer(mapping, np.uint8))
        region = self.regions[mapping.number] = Region(mapping, self._closed)
        return region

    def close(self) -> None:
        """Close every region."""
        for region in tuple(self.regions.values()):
            region.close()

    def _closed(self, number: int) -> None:
        del self.regions[number]
        self.retire(number)


def lent(array: Array) -> tuple[Lent, int] | None:
    """Return the open region in which an array lies, and the offset of its first byte; None if it must be copied (rules 2, 3)."""
    base: Any = array.base
    while type(base) is np.ndarray:
        base = base.base
    mapping = base.obj if type(base) is memoryview else base
    if type(mapping) is not Lent or mapping.fd < 0 or not array.size:
        return None
    if array.dtype.kind in "iu" and array.itemsize >= _WIDE_BYTES:
        return None
    offset = _address(array) - mapping.address
    placed = offset % ALIGN_BYTES == 0 and 0 <= offset <= len(mapping) - array.nbytes
    return (mapping, offset) if placed and array.flags.c_contiguous else None


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _check(fd: int, size: int) -> None:
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        held = os.fstat(fd).st_size
    except OSError:
        raise _refused("is no memfd", "make it with memfd_create(name, MFD_ALLOW_SEALING)") from None
    if not sealed:
        raise _refused(
            "is not sealed against shrinking",
            "make it with memfd_create(name, MFD_ALLOW_SEALING), ftruncate it, then fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)",
        )
    if not 0 < size <= held:
        raise _refused(f"holds {held} bytes, {size} were announced", "ftruncate it to its size before it is sealed")


def _refused(what: str, remedy: str) -> TheirsError:
    return TheirsError("shared_memory", what, where="shared memory region", remedy=remedy)
