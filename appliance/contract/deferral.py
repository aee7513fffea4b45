"""The words of the durable queue: what is put, what is taken, what became of it, and the two messages that carry it over a hop.

1. `idem` is the idempotency key: it names an item for its caller, its store and its receiver; the same key twice is one item.
2. `seq` orders the items of one store and only grows; `incarnation` names the store, so that a store that began anew is not taken for the old one.
3. Three clocks: an `Instant` is a reading of boot time and wall time; names that end in `queued_s`, `not_before_s`, `now_s` are queue time: seconds
   that only grow, also over reboots (core/reach/deferral.py).
4. A `Receipt` is sent after the receiver's commit. It, not the broker's PUBACK, is the reason to delete (docs/decisions/0004).
5. `Deferred.floor` is the least `seq` that the sender still holds: below it nothing is ever sent again, so the receiver may forget.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import msgspec

from appliance.contract.codec import Message

PAYLOAD_LIMIT = 8 * 1_048_576
"""Bytes of one payload: a request with a 1080p frame in float16 and room; base64 and a header stay below the broker's packet limit."""
IDEM_LIMIT = 128
"""Characters of an idempotency key; a UUID has 36."""

AGEING_S = 60.0
"""Seconds of waiting that are worth one priority level."""
PRIORITIES = 10
DEDUPE_HORIZON_S = 86_400.0
"""How long an acknowledged key is remembered at least, at the sender (a caller's retry) and at the receiver: one day."""


class Kind(StrEnum):
    """The classes of items; each has one policy."""

    REQUEST = "request"
    RESULT = "result"
    EVENT = "event"
    TELEMETRY = "telemetry"


class Overflow(StrEnum):
    """What may happen to accepted items of a class when room is needed."""

    REJECT = "reject"
    DROP_OLDEST_LOWEST_PRIO = "drop_oldest_lowest_prio"
    DROP_EXPIRED_FIRST = "drop_expired_first"


class State(StrEnum):
    """Where an item stands, as its caller may ask."""

    WAITING = "waiting"
    SENDING = "sending"
    DELIVERED = "delivered"
    EXPIRED = "expired"
    DROPPED = "dropped"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Instant:
    """One reading of the clocks. `boot_s` is CLOCK_BOOTTIME of the boot `boot_id`; `trusted`: the wall clock is synchronised."""

    boot_id: str
    boot_s: float
    wall_s: float
    trusted: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one class. Sizes are bytes as stored; `ttl_s` None: never too old; backoff doubles from `backoff_s` to `backoff_max_s`."""

    overflow: Overflow
    max_bytes: int
    priority: int = 5
    ttl_s: float | None = None
    max_attempts: int = 20
    backoff_s: float = 1.0
    backoff_max_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of the whole store: bytes of all items as stored, free disk that is left to others, bytes of dead letters (the oldest go beyond it)."""

    max_bytes: int = 192 << 20
    min_free_bytes: int = 64 << 20
    max_dead_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True)
class Rules:
    """The policies by class, and the bounds of the whole store."""

    policies: Mapping[str, Policy]
    bounds: Bounds = field(default_factory=Bounds)


@dataclass(frozen=True, slots=True)
class Usage:
    """What is held now. `free_bytes`: free on the disk plus what the store can reuse of its own file."""

    total_bytes: int
    class_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Item:
    """One row without its payload. `seq` only grows; `key` orders (empty: unordered); `idem` is the idempotency key; `size_bytes` as stored."""

    seq: int
    key: str
    kind: str
    priority: int
    idem: str
    size_bytes: int
    put: Instant
    queued_s: float
    ttl_s: float | None = None
    attempts: int = 0
    not_before_s: float = 0.0

    @property
    def rank_s(self) -> float:
        """The constant that orders items, smallest first: by priority, less one level for each `AGEING_S` waited."""
        return self.queued_s + self.priority * AGEING_S


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller puts into the queue.

    Attributes:
        kind: its class (`Kind`).
        idem: idempotency key, 1 to `IDEM_LIMIT` characters.
        key: items with the same key leave one at a time, in the order in which they were put; empty: no order.
        priority: 0 (first) to 9; None: as its class says.
        ttl_s: seconds after which nobody wants it; None: as its class says; infinity: never.
    """

    kind: str
    idem: str
    payload: bytes
    key: str = ""
    priority: int | None = None
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """An accepted item that is gone or was set aside without having been delivered; `reason` is fit for a metric label."""

    seq: int
    kind: str
    idem: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stored:
    """The promise: the item is on disk. `duplicate`: it already was, or was delivered; then `seq` is 0. `dropped` made room for it."""

    seq: int
    duplicate: bool = False
    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True, slots=True)
class Leased:
    """An item in a sender's hands; `item.attempts` are those before this one."""

    item: Item
    payload: bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """What to send now, in this order.

    Attributes:
        floor: least `seq` that the store holds, dead letters included (rule 5).
        deadline: queue time at which to look again even if nothing arrives or is settled; None: no need.
        dropped: what was found too old, damaged, or tried too often on the way.
    """

    items: tuple[Leased, ...]
    floor: int
    deadline: float | None
    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True, slots=True)
class Fate:
    """What is known of an idempotency key. `result` is the answer of the receiver, if it gave one and it is still kept."""

    state: State
    item: Item | None = None
    reason: str = ""
    result: bytes | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """Sizes and counts of a store.

    Attributes:
        items, bytes: waiting items by class.
        drops: by `class:reason`, since the store was created.
        oldest_queued_s: queue time of the oldest waiting item; None if nothing waits.
        starved: the disk is full, the ballast was given up; nothing is taken in until space is free.
        quarantined: how many damaged databases lie aside.
        commits, committed: transactions and the commands in them, since the start of the process.
    """

    items: dict[str, int]
    bytes: dict[str, int]
    dead_items: int
    dead_bytes: int
    leased: int
    drops: dict[str, int]
    oldest_queued_s: float | None
    free_bytes: int
    starved: bool
    quarantined: int
    commits: int
    committed: int


class Deferred(Message, frozen=True, tag="deferred"):
    """One item on its way to the receiver; the sender's name comes from the topic, which the broker checked, not from here."""

    limit: ClassVar[int] = 12 * 1_048_576
    incarnation: str
    seq: int
    floor: int
    item_kind: str
    idem: str
    payload: bytes
    key: str = ""


class Receipt(Message, frozen=True, tag="receipt"):
    """The receiver has committed the item, now or before (`duplicate`); `result` is its answer where the item asked for one."""

    limit: ClassVar[int] = 12 * 1_048_576
    idem: str
    duplicate: bool = False
    result: bytes | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """An item that the receiver committed and whose effect is still to come; `number` only grows, from 1."""

    number: int
    sender: str
    kind: str
    idem: str
    payload: bytes
