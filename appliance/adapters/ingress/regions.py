"""The memory that callers lent: who owns which region, how much there is, and when it may be unmapped.

1. Names are 144 random bits: knowing one is the right to use it, and only its owner was told.
2. A region ends with its owner, or when he takes it back: no new request finds it. It is unmapped when the last array over it is gone, for a
   batch may still run whose caller is gone.
3. Number and bytes are bounded, for each owner and for all together; what is not yet unmapped counts for all.
"""

import asyncio
import contextlib
import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from appliance.adapters.ingress.bounds import Bounds
from appliance.contract.admission import quoted
from appliance.contract.errors import TheirsError, WorldError
from appliance.ports import Share

_NAME_BYTES = 18


@dataclass(eq=False, slots=True)
class Owner:
    """One connection's regions."""

    names: set[str] = field(default_factory=set)
    size: int = 0


@dataclass(eq=False, slots=True)
class _Region:
    share: Share
    size: int
    owner: Owner
    ended: bool = False
    lent: int = 0
    loans: "dict[int, weakref.ref[Any]]" = field(default_factory=dict)


class LentRegions:
    """All regions of one ingress. `share(fd, size)` maps memory (`ports.Engine.share`); all calls are the event loop's."""

    def __init__(self, share: Callable[[int, int], Share], bounds: Bounds) -> None:
        self._share = share
        self._bounds = bounds
        self._regions: dict[str, _Region] = {}
        self._size = 0
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def size(self) -> int:
        """Bytes that are mapped now."""
        return self._size

    @property
    def count(self) -> int:
        """Regions that are mapped now."""
        return self._count

    def register(self, owner: Owner, fd: int, size: int) -> str:
        """Map a memfd and return the region's name; the descriptor stays the caller's.

        Raises: TheirsError (`shared_memory`, `region_limit`), WorldError (`region_limit`: all owners together have too much).
        """
        bounds = self._bounds
        if size < 1:
            raise TheirsError("shared_memory", f"byte_size is {size}, expected at least 1")
        if len(owner.names) >= bounds.regions or owner.size + size > bounds.region_bytes:
            what = f"one connection has at most {bounds.regions} regions of together {bounds.region_bytes} bytes"
            raise TheirsError("region_limit", what, remedy="unregister regions, and use a few of them over and over")
        if self._count >= bounds.all_regions or self._size + size > bounds.all_regions_bytes:
            what = f"all callers together have at most {bounds.all_regions} regions of {bounds.all_regions_bytes} bytes"
            raise WorldError("region_limit", what, remedy="send the data in the body", retry_after_s=1.0)
        self._loop = asyncio.get_running_loop()
        region = _Region(self._share(fd, size), size, owner)
        name = secrets.token_urlsafe(_NAME_BYTES)
        self._regions[name] = region
        self._size += size
        self._count += 1
        owner.names.add(name)
        owner.size += size
        return name

    def unregister(self, owner: Owner, name: str) -> None:
        """Take a region back. Raises: TheirsError (`unknown_region`) if it is not the owner's."""
        if name not in owner.names:
            raise _unknown(name)
        self._end(name)

    def leave(self, owner: Owner) -> None:
        """End all regions of an owner."""
        for name in tuple(owner.names):
            self._end(name)

    def lend(self, region: str, offset: int, size: int, *, writable: bool) -> npt.NDArray[np.uint8]:
        """Return a part of a region (`contract.frames.Regions`). Raises: TheirsError (`unknown_region`, `shared_memory`)."""
        found = self._regions.get(region)
        if found is None:
            raise _unknown(region)
        if offset < 0 or size < 1 or offset + size > found.size:
            what = f"{size} bytes from offset {offset} do not lie in a region of {found.size} bytes"
            raise TheirsError("shared_memory", what)
        # An array over a view of the share keeps itself as the base of all its own views: when it dies, they are all gone.
        loan = np.frombuffer(found.share.memory, np.uint8, size, offset)
        loan.flags.writeable = writable
        found.lent = number = found.lent + 1
        found.loans[number] = weakref.ref(loan, lambda _: self._returned(found, number))
        return loan

    def _returned(self, region: _Region, number: int) -> None:
        """Hear that no array over a part is left; it still holds the memory while it dies, and in whichever thread, so unmapping comes later."""
        region.loans.pop(number, None)
        if region.ended and not region.loans and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends, and the memory with it
                self._loop.call_soon_threadsafe(self._unmap, region)

    def _end(self, name: str) -> None:
        region = self._regions.pop(name)
        region.owner.names.remove(name)
        region.owner.size -= region.size
        region.ended = True
        if not region.loans:
            self._unmap(region)

    def _unmap(self, region: _Region) -> None:
        self._size -= region.size
        self._count -= 1
        region.share.close()


def _unknown(name: str) -> TheirsError:
    remedy = "register it on the frames socket; it ends with the connection that registered it"
    return TheirsError("unknown_region", f"no region is called {quoted(name)} here", remedy=remedy)
