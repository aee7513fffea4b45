"""The durable queue at both of its ends."""

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from appliance.contract.deferral import Accepted, Deferred, Dropped, Fate, Item, Parcel, Stats, Stored, Taken


class Outbox(Protocol):
    """The durable queue at its sender. A call returns after its commit; all of them raise WorldError (`disk`) and then changed nothing.

    Nothing that was accepted is lost unless a `Dropped` says so: log and count each one.
    """

    @property
    def incarnation(self) -> str:
        """The name of this store's `seq` numbers; another one after its disk was lost."""

    def now_s(self) -> float:
        """Queue time now."""

    async def put(self, parcel: Parcel) -> Stored:
        """Keep a parcel until its receiver has committed it; the same `idem` again is a duplicate and changes nothing.

        Raises: TheirsError (`class`, `idem`, `priority`, `oversized`), WorldError (`queue_full`, `too_large`, `disk_full`, `disk`).
        """

    async def take(self, kinds: Collection[str] = ..., *, items: int = 64, size: int = 1_048_576, lease_s: float = 60.0) -> Taken:
        """Lease what is due now, in order, up to so many items and stored bytes (but at least one); the attempt is counted on disk first."""

    async def acknowledge(self, results: Mapping[int, bytes | None]) -> int:
        """Delete these `seq` and remember their keys, with the receiver's answers; returns how many were still here."""

    async def retry(self, seq: int, attempts: int, not_before_s: float) -> bool:
        """End a lease: not before this queue time again, and so many attempts count; False if the item is gone."""

    async def release(self, seqs: Iterable[int]) -> None:
        """End leases as if the items had not been taken."""

    async def bury(self, seq: int, reason: str) -> tuple[Dropped, ...]:
        """Make an item a dead letter; the later ones of its key may pass. The oldest dead letters go if there are too many."""

    async def expire(self) -> tuple[Dropped, ...]:
        """Delete what is too old; call it now and then while nothing is taken."""

    async def listing(self, *, dead: bool = False, kind: str = "", after: int = 0, limit: int = 100) -> tuple[Item, ...]:
        """Waiting items, or dead letters, with a `seq` above `after`."""

    async def fate(self, idem: str) -> Fate | None:
        """What is known of a key; None: nothing, or no longer."""

    async def revive(self, idem: str) -> bool:
        """An operator's retry: a dead letter waits again, a waiting item is due now; False if it is not here."""

    async def drop(self, idem: str) -> tuple[Dropped, ...]:
        """An operator's drop of an item or dead letter."""

    async def stats(self) -> Stats:
        """Sizes and counts."""


class Inbox(Protocol):
    """The durable queue at its receiver: each key of each sender takes effect once. All calls raise WorldError (`disk`)."""

    async def accept(self, sender: str, message: Deferred, forward: Parcel | None = None) -> bool:
        """Commit an item, and what is passed on because of it, in one transaction; False if it was accepted before. Then send the `Receipt`.

        `sender` is the name that the broker proved. Raises: as `Outbox.put` for `forward`, and nothing was accepted.
        """

    async def seen(self, sender: str, idem: str) -> bool:
        """Whether this key of this sender was accepted."""

    async def pending(self, *, after: int = 0, limit: int = 64) -> tuple[Accepted, ...]:
        """Accepted items whose effect is still to come, in the order of arrival. Raises: WorldError (`damaged`)."""

    async def applied(self, upto: int) -> None:
        """Forget the payloads up to this number; the keys stay."""
