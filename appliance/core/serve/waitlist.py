"""The data structure under the backlog: who waits, in order, by shape, by level and by due time.

1. Ordered by (rank, ticket) within each shape; the front is the best of all shapes.
2. Heaps hold numbers only; a request that left is out of the dictionaries at once, with its tensors, and its numbers are dropped
   when they surface or when the gone outnumber the waiting: amortised O(log n) for everything but `front`, which is O(shapes).
"""

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from math import inf
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

PRIORITIES = 10
_SLACK = 64


class Entry(NamedTuple, Generic[T]):
    """One waiting request. `rank` orders (smaller first), `deadline` may be inf, `size` is in samples."""

    ticket: int
    item: T
    size: int
    shape: Hashable
    priority: int
    arrived: float
    deadline: float
    rank: float


def _worst(entry: Entry[T]) -> tuple[int, int]:
    return entry.priority, entry.ticket


class Group:
    """The waiting requests of one shape: a heap of (rank, ticket), some of them already gone, and what of it still waits."""

    __slots__ = ("count", "heap", "samples")

    def __init__(self) -> None:
        self.heap: list[tuple[float, int]] = []
        self.count = 0
        self.samples = 0


class Waitlist(Generic[T]):
    """An empty list. `waiting` counts samples, `level_samples` the same by priority, `groups` holds only shapes that wait."""

    __slots__ = ("_due", "entries", "groups", "level_samples", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.entries: dict[int, Entry[T]] = {}
        self.groups: dict[Hashable, Group] = {}
        self.level_samples = [0] * PRIORITIES
        self._due: list[tuple[float, int]] = []

    def insert(self, entry: Entry[T], due: float) -> None:
        """Add an entry; `due` is when it expires, or inf."""
        group = self.groups.get(entry.shape)
        if group is None:
            group = self.groups[entry.shape] = Group()
        heappush(group.heap, (entry.rank, entry.ticket))
        group.count += 1
        group.samples += entry.size
        self.entries[entry.ticket] = entry
        self.level_samples[entry.priority] += entry.size
        self.waiting += entry.size
        if due != inf:
            heappush(self._due, (due, entry.ticket))

    def remove(self, entry: Entry[T]) -> None:
        """Forget an entry that waits."""
        del self.entries[entry.ticket]
        self.level_samples[entry.priority] -= entry.size
        self.waiting -= entry.size
        group = self.groups[entry.shape]
        group.count -= 1
        group.samples -= entry.size
        if not group.count:
            del self.groups[entry.shape]
        elif len(group.heap) > 2 * group.count + _SLACK:
            self._sweep(group.heap)
        if len(self._due) > 2 * len(self.entries) + _SLACK:
            self._sweep(self._due)

    def front(self) -> Entry[T] | None:
        """The entry of the best rank; None if nobody waits."""
        best: tuple[float, int] | None = None
        for group in self.groups.values():
            top = self._top(group)
            if best is None or top < best:
                best = top
        return self.entries[best[1]] if best else None

    def next_like(self, shape: Hashable) -> Entry[T] | None:
        """The entry of the best rank among one shape; None if there is none."""
        group = self.groups.get(shape)
        return self.entries[self._top(group)[1]] if group else None

    def next_due(self) -> float | None:
        """The earliest due time of an entry that waits; None if none can expire."""
        due = self._due
        while due and due[0][1] not in self.entries:
            heappop(due)
        return due[0][0] if due else None

    def worst_first(self) -> list[Entry[T]]:
        """The youngest of the worst level first; O(n log n), for the few times that somebody may be displaced."""
        return sorted(self.entries.values(), key=_worst, reverse=True)

    def pop_due(self, now: float) -> Entry[T] | None:
        """Remove and return one entry whose due time has come; None if there is none."""
        due = self.next_due()
        if due is None or due > now:
            return None
        entry = self.entries[heappop(self._due)[1]]
        self.remove(entry)
        return entry

    def _top(self, group: Group) -> tuple[float, int]:
        heap, entries = group.heap, self.entries
        while heap[0][1] not in entries:
            heappop(heap)
        return heap[0]

    def _sweep(self, heap: list[tuple[float, int]]) -> None:
        heap[:] = [key for key in heap if key[1] in self.entries]
        heapify(heap)
