"""Places work on the devices of a region: consistent hashing with bounded loads over capacities (Mirrokni, Thorup, Zadimoghaddam 2018).

API: `Ring(slack_percent)`; `.register(device, capacity)` and `.leave(device) -> tickets` as devices come, change and go; `.place(ticket, key, avoid=…) -> device | None`
holds a place until `.release(ticket)`; `.rebalance() -> moves` where work can be moved; `.order(key)`, `.bound(device)`, `.load(device)` to look.

1. A device registers what it can do (a whole number: answers a minute, say), not that it exists: its points on the circle, and its bound, are in
   proportion. Capacity 0 is known but takes nothing (draining).
2. Work goes to the first device clockwise of its key whose load is below its bound: ceil((1 + slack) x all load x its share of capacity), in whole numbers. So nobody has
   more than (1 + slack) times its share (rounded up), whatever the keys are, and equal keys meet the same device as long as it has room.
3. The order in which a key asks devices changes, when one joins, leaves or shrinks, only by that device: nothing moves between two others. `rebalance`
   moves exactly what is above the bounds, nothing else.
4. Hashes are BLAKE2b of the names: the same in every process, on every machine. Placement depends on the order of events and on nothing else.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from appliance.contract.errors import OursError

SLACK_PERCENT = 25
"""A quarter above the fair share: smaller bounds send more keys past their first device (the cost grows as 1 / slack^2 in the paper)."""
POINTS = 64
"""Points on the circle for one unit of capacity: the first choices of keys are then in proportion to about 12 %; the bound does the rest."""
MAX_POINTS = 4_096


@dataclass(frozen=True, slots=True)
class Move:
    """Move this work."""

    ticket: str
    before: str
    after: str


def position(text: str) -> int:
    """Where a name is on the circle: 64 bits."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class Ring:
    """The devices of one region and the work that they hold. `unit` is the capacity that gets `POINTS` points."""

    def __init__(self, slack_percent: int = SLACK_PERCENT, *, unit: int = 1) -> None:
        if slack_percent <= 0 or unit <= 0:
            raise OursError("ring", f"slack {slack_percent} %, unit {unit}: both must be above 0")
        self._slack_percent = slack_percent
        self._unit = unit
        self._points: list[tuple[int, str]] = []
        self._capacity: dict[str, int] = {}
        self._count: dict[str, int] = {}
        self._held: dict[str, dict[str, str]] = {}
        self._where: dict[str, str] = {}

    @property
    def devices(self) -> list[str]:
        """All that are registered, sorted."""
        return sorted(self._capacity)

    def register(self, device: str, capacity: int) -> None:
        """Add a device, or change what it can do; what it holds stays. Raises: OursError (`capacity`), and nothing changed."""
        if capacity < 0:
            raise OursError("capacity", f"{device}: capacity {capacity}, expected 0 or more")
        wanted = min(max(round(POINTS * capacity / self._unit), 1), MAX_POINTS) if capacity > 0 else 0
        self._set_points(device, wanted)
        self._capacity[device] = capacity
        self._held.setdefault(device, {})

    def leave(self, device: str) -> tuple[str, ...]:
        """Remove a device and return the tickets that it held, oldest first: place them again. Unknown: nothing to do."""
        self._set_points(device, 0)
        self._count.pop(device, None)
        self._capacity.pop(device, None)
        tickets = tuple(self._held.pop(device, {}))
        for ticket in tickets:
            del self._where[ticket]
        return tickets

    def load(self, device: str) -> int:
        """How much work a device holds."""
        return len(self._held[device])

    def bound(self, device: str, coming: int = 0) -> int:
        """How much work a device may hold, with `coming` more than there is now (rule 2)."""
        every = 100 * sum(self._capacity.values())
        share = (100 + self._slack_percent) * (len(self._where) + coming) * self._capacity[device]
        return -(-share // every) if every else 0

    def order(self, key: str) -> Iterator[str]:
        """The devices in the order in which a key asks them."""
        start = bisect_left(self._points, (position(key), ""))
        seen = set()
        for index in range(len(self._points)):
            device = self._points[(start + index) % len(self._points)][1]
            if device not in seen:
                seen.add(device)
                yield device
                if len(seen) == len(self._capacity):
                    return

    def place(self, ticket: str, key: str, *, avoid: Collection[str] = ()) -> str | None:
        """Hold a place for this work; None if all that may have it are full. Raises: OursError (`ticket`) if it is placed already."""
        if ticket in self._where:
            raise OursError("ticket", f"{ticket} is on {self._where[ticket]}")
        for device in self.order(key):
            if device not in avoid and self.load(device) < self.bound(device, 1):
                self._held[device][ticket] = key
                self._where[ticket] = device
                return device
        return None

    def release(self, ticket: str) -> None:
        """The work is done, or gone; unknown tickets are ignored, so a late report does no harm."""
        device = self._where.pop(ticket, None)
        if device is not None:
            del self._held[device][ticket]

    def rebalance(self) -> tuple[Move, ...]:
        """Move what is above the bounds, youngest first, each to where it would be placed now."""
        surplus = [
            (device, ticket)
            for device in self.devices
            for ticket in list(reversed(self._held[device]))[: max(0, self.load(device) - self.bound(device))]
        ]
        moves = []
        for device, ticket in surplus:
            key = self._held[device][ticket]
            after = next((other for other in self.order(key) if other != device and self.load(other) < self.bound(other)), None)
            if after is not None:
                del self._held[device][ticket]
                self._held[after][ticket] = key
                self._where[ticket] = after
                moves.append(Move(ticket, device, after))
        return tuple(moves)

    def _set_points(self, device: str, wanted: int) -> None:
        """Give a device its first `wanted` points; the others' are not touched (rule 3)."""
        present = self._count.get(device, 0)
        for index in range(present, wanted):
            insort(self._points, (position(f"{device}#{index}"), device))
        for index in range(wanted, present):
            del self._points[bisect_right(self._points, (position(f"{device}#{index}"), device)) - 1]
        self._count[device] = wanted
