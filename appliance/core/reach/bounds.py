"""Decides whether a newcomer may enter the durable queue, and what goes for it: by bytes of its class, bytes of all, and free disk.

API: `admit(item, usage, rules, candidates, now) -> Admit(drop) | Refuse(reason, what)`; `drop_rank(item, rules, now)` orders the candidates.
In SQL: `ORDER BY (expired and its class is drop_expired_first) DESC, priority DESC, seq`.

1. What alone is larger than its bound is refused (`too_large`), and nothing is dropped for it.
2. Accepted items of a class `reject` are never dropped. Of the other classes goes what is not more urgent than the newcomer, or has expired
   where the class says `drop_expired_first`; least urgent first, then oldest.
3. Where the bound of the class is hit, its own items go; where the bound of all or the disk, those of any class that allows it.
4. A refusal drops nothing. After an admission all bounds hold.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from appliance.contract.deferral import PRIORITIES, Instant, Item, Overflow, Rules, Usage
from appliance.contract.errors import OursError
from appliance.core.reach.deferral import expired


@dataclass(frozen=True, slots=True)
class Admit:
    """Keep the newcomer and drop these, in one transaction; each drop is counted with its reason."""

    drop: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Refuse:
    """Keep nothing: `too_large`, `queue_full` or `disk_full`; the caller is told so at once."""

    reason: str
    what: str


def drop_rank(item: Item, rules: Rules, now: Instant) -> tuple[bool, int, int]:
    """Sort by this and the first is the first to go."""
    first = rules.policies[item.kind].overflow is Overflow.DROP_EXPIRED_FIRST and expired(item, now)
    return (not first, -item.priority, item.seq)


def admit(item: Item, usage: Usage, rules: Rules, candidates: Iterable[Item], now: Instant) -> Admit | Refuse:
    """Decide on a newcomer. `candidates` wait, are not leased, and come in the order of `drop_rank`; they are read no further than needed.

    Raises: OursError (`class`, `priority`), and nothing changed.
    """
    policy = rules.policies.get(item.kind)
    if policy is None:
        raise OursError("class", f"class {item.kind!r}, expected one of {sorted(rules.policies)}")
    if not 0 <= item.priority < PRIORITIES:
        raise OursError("priority", f"priority {item.priority}, expected 0 (highest) to {PRIORITIES - 1}")
    largest = min(policy.max_bytes, rules.bounds.max_bytes)
    if item.size_bytes > largest:
        return Refuse("too_large", f"{item.size_bytes} bytes, class {item.kind} holds {largest}")
    excess = _Excess(
        own=usage.class_bytes + item.size_bytes - policy.max_bytes,
        every=usage.total_bytes + item.size_bytes - rules.bounds.max_bytes,
        disk=rules.bounds.min_free_bytes + item.size_bytes - usage.free_bytes,
    )
    drop = _make_room(item, excess, rules, candidates, now)
    if excess.over <= 0:
        return Admit(tuple(drop))
    if excess.own > 0:
        return Refuse("queue_full", f"class {item.kind} holds {usage.class_bytes} of {policy.max_bytes} bytes")
    if excess.every > 0:
        return Refuse("queue_full", f"the queue holds {usage.total_bytes} of {rules.bounds.max_bytes} bytes")
    return Refuse("disk_full", f"{usage.free_bytes} bytes free, {rules.bounds.min_free_bytes} are reserved")


@dataclass(slots=True)
class _Excess:
    """Bytes that must go before the newcomer fits, for each bound; 0 or less: it fits."""

    own: int
    every: int
    disk: int

    @property
    def over(self) -> int:
        return max(self.own, self.every, self.disk)


def _make_room(item: Item, excess: _Excess, rules: Rules, candidates: Iterable[Item], now: Instant) -> list[Item]:
    """Choose what goes, and count it off the excess; another class's item only where the own class's excess would not free enough."""
    drop: list[Item] = []
    if excess.over <= 0:
        return drop
    for candidate in candidates:
        same = candidate.kind == item.kind
        if (same or excess.over > max(excess.own, 0)) and _yields(candidate, item, rules, now):
            drop.append(candidate)
            excess.every -= candidate.size_bytes
            excess.disk -= candidate.size_bytes
            excess.own -= candidate.size_bytes if same else 0
        if excess.over <= 0:
            break
    return drop


def _yields(candidate: Item, newcomer: Item, rules: Rules, now: Instant) -> bool:
    """Whether an accepted item may be dropped for the newcomer (rule 2)."""
    overflow = rules.policies[candidate.kind].overflow
    if overflow is Overflow.REJECT:
        return False
    return candidate.priority >= newcomer.priority or (overflow is Overflow.DROP_EXPIRED_FIRST and expired(candidate, now))
