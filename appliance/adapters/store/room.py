"""Who may enter a store that is full, and who must leave it: the hands of `core.reach.bounds.admit`, which decides.

1. While everything fits, nobody is asked. Else the decision is the `admit` that the composition root passes in; it reads candidates one by one.
2. Candidates come in its order: expired items of `drop_expired_first` classes, then droppable ones, least urgent first, then oldest. Leased ones stay.
3. What had been promised to somebody (class `reject`) keeps its fate where its caller can read it; the rest only counts.
4. Housekeeping finds expired items by an index for this boot, and once a minute by a scan for earlier boots; leased ones stay.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

from appliance.adapters.store.ledger import Ledger
from appliance.adapters.store.schema import ROWS_AT_ONCE, insert_done
from appliance.contract.deferral import Instant, Item, Overflow, Policy, Rules, State, Usage
from appliance.contract.errors import OursError, TheirsError, WorldError

SWEEP_ITEMS = 256
SCAN_PERIOD_S = 60.0
EXPIRED = """
  i.ttl_s IS NOT NULL AND CASE WHEN i.boot = ?1 THEN max(0.0, ?2 - i.boot_s)
  ELSE max(CASE WHEN i.trusted AND ?3 THEN ?4 - i.wall_s ELSE 0.0 END, ?2, 0.0) END >= i.ttl_s"""
"""SQL for `core.reach.deferral.expired`; ?1 to ?4 are `Room.clocks()`."""


class Admission(Protocol):
    """`core.reach.bounds.admit`: of an `Item`, its `Usage`, the `Rules`, candidates and an `Instant`; returns `drop` (items), or `reason` and `what`."""

    def __call__(self, item: Item, usage: Usage, rules: Rules, candidates: Iterable[Item], now: Instant, /) -> Any:
        """Decide on a newcomer."""


class Room:
    """The bounds of one store. `free` returns the bytes free on its disk."""

    def __init__(self, ledger: Ledger, rules: Rules, admit: Admission, free: Callable[[], int]) -> None:
        self._ledger = ledger
        self._rules = rules
        self._admit = admit
        self._free = free
        self._scanned_s = float("-inf")
        self._untrusted = True
        self._droppable = tuple(kind for kind, policy in rules.policies.items() if policy.overflow != Overflow.REJECT)
        self._perishable = tuple(kind for kind, policy in rules.policies.items() if policy.overflow == Overflow.DROP_EXPIRED_FIRST)
        self.free_bytes = free()

    def observe(self) -> None:
        """Look at the disk, once for a group of items."""
        self.free_bytes = self._free()

    def policy(self, kind: str) -> Policy:
        """The policy of a class. Raises: TheirsError (`class`)."""
        policy = self._rules.policies.get(kind)
        if policy is None:
            raise TheirsError("class", f"class {kind!r}, expected one of {sorted(self._rules.policies)}")
        return policy

    def droppable(self, kind: str) -> bool:
        """Whether accepted items of this class may ever be dropped for others."""
        return kind in self._droppable

    def fits(self, kind: str, size: int) -> bool:
        """Whether an item of this size enters without anybody leaving."""
        state, bounds = self._ledger.state, self._rules.bounds
        held = state.usage.get(kind)
        return (
            (held[1] if held else 0) + size <= self._rules.policies[kind].max_bytes
            and state.total_bytes + size <= bounds.max_bytes
            and self.free_bytes - size >= bounds.min_free_bytes
        )

    def admit(self, item: Item) -> None:
        """Make room for an item that does not fit. Raises: WorldError (`too_large`, `queue_full`, `disk_full`)."""
        ledger = self._ledger
        row = ledger.one("SELECT (SELECT * FROM pragma_freelist_count) * (SELECT * FROM pragma_page_size)")
        usage = Usage(ledger.state.total_bytes, ledger.state.usage.get(item.kind, [0, 0])[1], self.free_bytes + (row[0] if row else 0))
        verdict = self._admit(item, usage, self._rules, self._candidates(), ledger.now)
        if not hasattr(verdict, "drop"):
            raise WorldError(verdict.reason, verdict.what, where=f"queue, class {item.kind}", remedy="try later, or raise the bound")
        self.lose(verdict.drop, State.DROPPED, "room")

    def lose(self, items: Sequence[Item], state: State, reason: str) -> None:
        """Delete accepted items that were not delivered; count them."""
        ledger = self._ledger
        ledger.remove(items)
        for item in items:
            ledger.count_drop(item, reason)
        self.remember([item.idem for item in items if not self.droppable(item.kind)], state, reason)

    def remember(self, idems: Sequence[str], outcome: State, reason: str = "") -> None:
        """Keep the fate of keys (rule 3)."""
        for part in range(0, len(idems), ROWS_AT_ONCE):
            some = idems[part : part + ROWS_AT_ONCE]
            rows = ((idem, self._ledger.now_s, outcome, reason) for idem in some)
            self._ledger.connection.execute(insert_done(len(some)), [*chain.from_iterable(rows)])

    def sweep(self) -> None:
        """Delete up to some hundred expired items (rule 4), and fill in wall times that were not trusted when they were noted."""
        ledger, now = self._ledger, self._ledger.now
        self._mend(now)
        rest = "WHERE i.boot = ? AND i.expires_s <= ? AND i.expires_s IS NOT NULL AND i.reason IS NULL LIMIT ?"
        found = ledger.items(rest, (*self.clocks()[:2], SWEEP_ITEMS), "INDEXED BY perishable")
        if ledger.now_s - self._scanned_s >= SCAN_PERIOD_S:
            rest = f"WHERE i.boot < ?1 AND i.expires_s IS NOT NULL AND i.reason IS NULL AND {EXPIRED} LIMIT ?5"
            old = ledger.items(rest, (*self.clocks(), SWEEP_ITEMS))
            found += old
            self._scanned_s = ledger.now_s if len(old) < SWEEP_ITEMS else self._scanned_s
        self.lose([item for item in found if item.seq not in ledger.leases], State.EXPIRED, "expired")

    def _mend(self, now: Instant) -> None:
        if now.trusted and self._untrusted:
            boot, boot_s, _, wall_s = self.clocks()
            update = "UPDATE items SET trusted = 1, wall_s = ? - (? - boot_s) WHERE boot = ? AND trusted = 0"
            self._ledger.connection.execute(update, (wall_s, boot_s, boot))
        self._untrusted = not now.trusted

    def clocks(self) -> tuple[Any, ...]:
        """What `EXPIRED` is asked with: the first four placeholders."""
        now = self._ledger.now
        return int(now.boot_id), now.boot_s, int(now.trusted), now.wall_s

    def _candidates(self) -> Iterator[Item]:
        if self._perishable:
            rest = f"WHERE i.droppable = 1 AND i.reason IS NULL AND i.kind IN ({_names(self._perishable)}) AND {EXPIRED} ORDER BY i.prio DESC, i.seq"
            yield from self._unleased(rest)
        some = f"(i.kind NOT IN ({_names(self._perishable)}) OR NOT ({EXPIRED}))"
        yield from self._unleased(f"WHERE i.droppable = 1 AND i.reason IS NULL AND {some} ORDER BY i.prio DESC, i.seq")

    def _unleased(self, rest: str) -> Iterator[Item]:
        """In pages, so that what `admit` does not read is not fetched."""
        ledger, offset = self._ledger, 0
        while page := ledger.items(f"{rest} LIMIT ?5 OFFSET ?6", (*self.clocks(), SWEEP_ITEMS, offset)):
            yield from (item for item in page if item.seq not in ledger.leases)
            offset += len(page)


def _names(kinds: tuple[str, ...]) -> str:
    """Class names as SQL text; they are the keys of `policies`, ours and not a caller's. Raises: OursError (`class`)."""
    if not all(kind.isidentifier() for kind in kinds):
        raise OursError("class", f"class names must be identifiers: {kinds}")
    return ", ".join(f"'{kind}'" for kind in kinds) or "''"
