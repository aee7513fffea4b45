"""The receiver's side: an item is accepted once, in the transaction that its receipt speaks of.

1. A key is known by its sender's name, which the broker proved, so no device can use up another's keys.
2. The payload waits for its effect until `applied`; what a receiver passes on enters its own queue in the same transaction.
3. A key is forgotten when its sender's floor has passed it *and* a day of queue time is over (core.reach.deferral, rule 6). The keys of a sender that
   began anew have no floor any more; they are kept for `ABANDONED_S`.
"""

import zlib

from appliance.adapters.store.ledger import Ledger
from appliance.contract.deferral import DEDUPE_HORIZON_S, Accepted, Deferred

ABANDONED_S = 90 * 86_400.0
"""Longer than any TTL of the usual classes: a store that was lost cannot send again, but a disk image that was restored can."""


class Receiving:
    """What one transaction does for a receiver."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def accept(self, sender: str, message: Deferred) -> bool:
        """Take in an item; False if it had been taken in before."""
        ledger = self._ledger
        codec, stored = ledger.packer.pack(f"from {message.item_kind}", message.payload)
        before = ledger.connection.total_changes()
        ledger.connection.execute(
            "INSERT INTO accepted(sender, idem, incarnation, seq, at_s, kind, codec, raw_len, checksum, data) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT(sender, idem) DO NOTHING",
            (
                sender, message.idem, message.incarnation, message.seq, ledger.now_s, message.item_kind, int(codec), len(message.payload),
                zlib.crc32(stored), stored,
            ),
        )  # fmt: skip
        fresh = ledger.connection.total_changes() != before
        ledger.connection.execute(
            "DELETE FROM accepted WHERE sender = ? AND incarnation = ? AND seq < ? AND at_s <= ? AND data IS NULL",
            (sender, message.incarnation, message.floor, ledger.now_s - DEDUPE_HORIZON_S),
        )
        return fresh

    def seen(self, sender: str, idem: str) -> bool:
        """Whether this key of this sender was taken in."""
        return self._ledger.one("SELECT 1 FROM accepted WHERE sender = ? AND idem = ?", (sender, idem)) is not None

    def pending(self, after: int, limit: int) -> tuple[Accepted, ...]:
        """What waits for its effect, in the order of arrival. Raises: WorldError (`damaged`)."""
        ledger = self._ledger
        rows = ledger.connection.execute(
            "SELECT n, sender, kind, idem, codec, raw_len, checksum, data FROM accepted WHERE data IS NOT NULL AND n > ? ORDER BY n LIMIT ?",
            (after, limit),
        )
        return tuple(Accepted(n, sender, kind, idem, ledger.packer.unpack(*stored)) for n, sender, kind, idem, *stored in rows)

    def applied(self, upto: int) -> None:
        """Forget the payloads up to this number; their keys stay (rule 3)."""
        ledger = self._ledger
        ledger.connection.execute("UPDATE accepted SET data = NULL WHERE data IS NOT NULL AND n <= ?", (upto,))
        ledger.connection.execute(
            "DELETE FROM accepted WHERE n IN (SELECT n FROM accepted ORDER BY n LIMIT 64) AND at_s <= ?", (ledger.now_s - ABANDONED_S,)
        )
