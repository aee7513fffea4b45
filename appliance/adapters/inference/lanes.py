"""Work in flight in a child, in the order in which it will be answered, with a deadline for what comes first.

1. A piece's clock starts when it comes first: waiting behind another's slow batch is nobody's hang.
2. One timer per lane, moved only when it fires: a batch that is in time costs no timer call.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from appliance.contract.errors import ApplianceError, OursError


@dataclass(eq=False, slots=True)
class Pending:
    """One piece of work: `model` is whose, `deadline_s` how long it may be first, `parcel` what it holds meanwhile.

    `left` is called once, when it leaves the line, whatever became of its future.
    """

    id: int
    model: str
    deadline_s: float
    future: asyncio.Future[Any]
    parcel: Any = None
    left: Callable[[], None] | None = None


class Lane:
    """A line of work; calls `on_overdue` when the first piece is past its deadline."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_overdue: Callable[["Lane"], None]) -> None:
        self._loop = loop
        self._on_overdue = on_overdue
        self._line: dict[int, Pending] = {}
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, number: int) -> bool:
        return number in self._line

    def __iter__(self) -> Iterator[Pending]:
        return iter(self._line.values())

    def add(self, pending: Pending) -> asyncio.Future[Any]:
        """Append a piece; return its future. Cancelling the future leaves the piece in line: the child works on it all the same."""
        if not self._line:
            self._since = self._loop.time()
        self._line[pending.id] = pending
        if self._timer is None:
            self.arm()
        return pending.future

    def take(self, number: int) -> Pending:
        """Remove the first piece, which must be this one. Raises: OursError (`protocol`)."""
        pending = next(iter(self._line.values()), None)
        if pending is None or pending.id != number:
            raise OursError("protocol", f"answer {number} is out of turn")
        self._since = self._loop.time()
        del self._line[number]
        if pending.left is not None:
            pending.left()
        return pending

    def due(self) -> float | None:
        """When the first piece's deadline is, in the loop's time; None if there is no work."""
        first = next(iter(self), None)
        return None if first is None else self._since + first.deadline_s

    def arm(self) -> None:
        """Set the timer to the present deadline."""
        due = self.due()
        self._timer = None if due is None else self._loop.call_at(due, self._fire)

    def fail(self, error: Callable[[], ApplianceError]) -> tuple[str, ...]:
        """Fail all work and stop the timer; return the names of the models it was for."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        line, self._line = self._line, {}
        for pending in line.values():
            if pending.left is not None:
                pending.left()
            if not pending.future.done():
                pending.future.set_exception(error())
        return tuple(dict.fromkeys(pending.model for pending in line.values() if pending.model))

    def _fire(self) -> None:
        self._timer = None
        due = self.due()
        if due is not None and due <= self._loop.time():
            self._on_overdue(self)
        else:
            self.arm()
