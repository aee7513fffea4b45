"""Decides for the durable queue: what goes next, what a failure means, what is too old, what may be forgotten.

The store keeps rows, this module has no SQL. API, in the order of an item's life (`contract.deferral.Item` has no payload: the store alone sees bytes):
`bounds.admit` says whether it may enter; `Item.rank_s` orders (index it, ties by `seq`); `due(items, now_s, leased=…, limit=…) -> Due(items,
deadline)` is the reference that the store's query must equal; `replay.ReplayPace` says when; `settle(item, failure, policy, now_s, chance) ->
Retry(attempts, not_before_s) | Bury(reason)`; `expired(item, now)`; `mended(put, now)`; `forgettable(…)` at the receiver.
Two kinds of time: `Instant` is a reading of boot time and wall time; `now_s`, `queued_s` and `not_before_s` are queue time (`Epoch.queue_s`):
seconds that only grow, also over reboots.

1. Order: by priority 0..9 (0 first) less one level for each `AGEING_S` (one minute) waited, then by `seq`. Ageing is linear, so the key is constant.
2. Items of one key go one at a time, in the order of `seq`; one that waits for its backoff holds the later ones of its key. The empty key orders nothing.
3. TTL survives a clock without battery: in one boot, boot time counts. Over boots the wall clocks count if both readings were trusted (NTP
   synchronised); else an item of an earlier boot is at least as old as this boot, and no more is claimed. What is not known to be expired is kept.
4. Bytes and disk are bounded by a policy per class: `bounds`.
5. Not reaching the receiver is no fault of the item: no attempt is counted. A failure at the receiver is retried with exponential backoff and buried after
   `max_attempts`; a refusal buries at once. A buried item (dead letter) lets the later ones of its key pass; an operator's retry keeps its `seq`.
6. The receiver forgets an idempotency key only when the sender's floor (least `seq` that it still holds, dead letters included) has passed it *and* the
   horizon is over: by time alone a resend after a long partition would be applied twice.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from appliance.contract.deferral import DEDUPE_HORIZON_S, Instant, Item, Kind, Overflow, Policy

__all__ = [
    "CONSEQUENCES",
    "POLICIES",
    "Bury",
    "Consequence",
    "Due",
    "Epoch",
    "Failure",
    "Policy",
    "Retry",
    "age_s",
    "backoff_s",
    "due",
    "expired",
    "forgettable",
    "mended",
    "resumed",
    "settle",
]
_DOUBLINGS = 40


class Failure(StrEnum):
    """Why an item that was sent is still here."""

    UNREACHED = "unreached"
    FAILED = "failed"
    REFUSED = "refused"


class Consequence(StrEnum):
    """What a failure does to an item."""

    HOLD = "hold"
    RETRY = "retry"
    BURY = "bury"


CONSEQUENCES: Mapping[Failure, Consequence] = {
    Failure.UNREACHED: Consequence.HOLD,
    Failure.FAILED: Consequence.RETRY,
    Failure.REFUSED: Consequence.BURY,
}


@dataclass(frozen=True, slots=True)
class Epoch:
    """Joins boots into one queue time. Keep it with the store; call `resumed` when the store is opened."""

    boot_id: str
    base_s: float

    def queue_s(self, boot_s: float) -> float:
        """Queue time at this boot time."""
        return self.base_s + boot_s


def resumed(last: Epoch | None, latest_s: float, now: Instant) -> Epoch:
    """The epoch after (re)opening: `last` within one boot, else one that goes on at `latest_s`, the greatest queue time in the store (0 if none)."""
    if last is not None and last.boot_id == now.boot_id:
        return last
    return Epoch(now.boot_id, latest_s - now.boot_s)


POLICIES: Mapping[str, Policy] = {
    Kind.REQUEST: Policy(Overflow.REJECT, 64 << 20, priority=4, ttl_s=7 * 86_400.0),
    Kind.RESULT: Policy(Overflow.REJECT, 64 << 20, priority=3),
    Kind.EVENT: Policy(Overflow.DROP_EXPIRED_FIRST, 16 << 20, priority=5, ttl_s=30 * 86_400.0),
    Kind.TELEMETRY: Policy(Overflow.DROP_OLDEST_LOWEST_PRIO, 32 << 20, priority=8, ttl_s=3 * 86_400.0),
}
"""The usual classes. What was promised to a caller (a deferred request, its result) is never dropped; what describes the device may be."""


@dataclass(frozen=True, slots=True)
class Due:
    """Send these, in this order; look again at `deadline` (queue time) even if nothing arrives or is settled; None: no need."""

    items: tuple[Item, ...]
    deadline: float | None


@dataclass(frozen=True, slots=True)
class Retry:
    """Keep the item with these values; its lease is over."""

    attempts: int
    not_before_s: float


@dataclass(frozen=True, slots=True)
class Bury:
    """Move the item to the dead letters."""

    reason: str


def age_s(put: Instant, now: Instant) -> float:
    """Seconds that have passed since `put` at least (rule 3); never negative."""
    if put.boot_id == now.boot_id:
        return max(0.0, now.boot_s - put.boot_s)
    known_s = now.wall_s - put.wall_s if put.trusted and now.trusted else 0.0
    return max(known_s, now.boot_s, 0.0)


def expired(item: Item, now: Instant) -> bool:
    """Whether the item is known to be older than its TTL."""
    return item.ttl_s is not None and age_s(item.put, now) >= item.ttl_s


def mended(put: Instant, now: Instant) -> Instant:
    """The same reading with its wall time filled in afterwards, once the clock of the same boot is trusted; else unchanged."""
    if put.trusted or not now.trusted or put.boot_id != now.boot_id:
        return put
    return replace(put, wall_s=now.wall_s - (now.boot_s - put.boot_s), trusted=True)


def due(items: Iterable[Item], now_s: float, *, leased: Collection[int] = (), limit: int = 1) -> Due:
    """Choose what to send now from all that wait (any order); `leased` are the `seq` of what is being sent (rules 1 and 2)."""
    heads: dict[str, Item] = {}
    free: list[Item] = []
    for item in items:
        if not item.key:
            free.append(item)
        elif item.key not in heads or item.seq < heads[item.key].seq:
            heads[item.key] = item
    ready = [item for item in (*heads.values(), *free) if item.seq not in leased]
    chosen = sorted((item for item in ready if item.not_before_s <= now_s), key=lambda item: (item.rank_s, item.seq))
    waits = [item.not_before_s for item in ready if item.not_before_s > now_s]
    return Due(tuple(chosen[:limit]), min(waits, default=None))


def backoff_s(attempts: int, policy: Policy, chance: float) -> float:
    """Seconds to wait after so many attempts (from 1): doubled each time up to the cap, half of it fixed, half of it by `chance` (0 to 1)."""
    whole = min(policy.backoff_s * 2.0 ** min(attempts - 1, _DOUBLINGS), policy.backoff_max_s)
    return whole * (1 + chance) / 2


def settle(item: Item, failure: Failure, policy: Policy, now_s: float, chance: float) -> Retry | Bury:
    """Decide what becomes of an item that was sent and not acknowledged (rule 5). Success needs no decision: the row goes, its key is remembered."""
    consequence = CONSEQUENCES[failure]
    if consequence is Consequence.HOLD:
        return Retry(item.attempts, now_s + backoff_s(1, policy, chance))
    attempts = item.attempts + 1
    if consequence is Consequence.BURY:
        return Bury("refused")
    if attempts >= policy.max_attempts:
        return Bury(f"failed {attempts} times")
    return Retry(attempts, now_s + backoff_s(attempts, policy, chance))


def forgettable(seq: int, done_s: float, floor: int, now_s: float, horizon_s: float = DEDUPE_HORIZON_S) -> bool:
    """Whether a key that was applied at `done_s` may be forgotten (rule 6). `floor` comes with each message of its sender."""
    return seq < floor and now_s - done_s >= horizon_s
