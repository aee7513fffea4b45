"""The durable queue as the loops see it (`ports.Outbox`, `ports.Inbox`): every call is a command to the writer's thread; the loop never blocks.

1. A call returns after the commit that it speaks of. Whoever is cancelled while waiting knows nothing: put again, with the same key.
2. At most `INBOX_COMMANDS` commands or `INBOX_BYTES` wait for the writer; more of them wait in their callers, in turn.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from appliance.adapters.store.clocks import read_clocks
from appliance.adapters.store.room import Admission
from appliance.adapters.store.writer import Command, Desk, Place, Writer
from appliance.contract.deferral import (
    Accepted,
    Deferred,
    Dropped,
    Fate,
    Instant,
    Item,
    Kind,
    Parcel,
    Rules,
    Stats,
    Stored,
    Taken,
)
from appliance.contract.errors import WorldError

INBOX_COMMANDS = 1_024
INBOX_BYTES = 16 * 1_048_576
LEASE_S = 60.0
T = TypeVar("T")


class Store:
    """One folder, one writer. Use as `async with Store(folder, rules, bounds.admit) as store`."""

    def __init__(self, folder: Path, rules: Rules, admit: Admission, *, clocks: Callable[[], Instant] = read_clocks, vfs: str = "") -> None:
        """Nothing is opened yet. `admit` is `core.reach.bounds.admit`, handed in by the composition root."""
        self._place = Place(folder, rules, admit, clocks, vfs)
        self._writer: Writer | None = None
        self._commands = 0
        self._bytes = 0
        self._turns: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> Self:
        """Open. Raises: WorldError (`disk`, `store_locked`, `format`)."""
        self._writer = await asyncio.to_thread(Writer, self._place, self._resolve)
        self._writer.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish what was asked for, then close."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await asyncio.shield(asyncio.to_thread(writer.stop))

    @property
    def incarnation(self) -> str:
        """The name of this store's `seq` numbers; another one after its disk was lost."""
        return self._open().desk.ledger.state.incarnation

    def now_s(self) -> float:
        """Queue time now; what `retry` and `deadline` count in."""
        ledger = self._open().desk.ledger
        return max(ledger.state.base_s + self._place.clocks().boot_s, ledger.now_s)

    async def put(self, parcel: Parcel) -> Stored:
        """See `ports.Outbox.put`."""
        return cast("Stored", await self._ask(parcel, len(parcel.payload)))

    async def take(
        self, kinds: Collection[str] = tuple(Kind), *, items: int = 64, size: int = 1_048_576, lease_s: float = LEASE_S
    ) -> Taken:
        """See `ports.Outbox.take`."""
        return await self._do(lambda desk: desk.outgoing.take(kinds, items, size, lease_s))

    async def acknowledge(self, results: Mapping[int, bytes | None]) -> int:
        """See `ports.Outbox.acknowledge`."""
        return await self._do(lambda desk: desk.outgoing.acknowledge(results), sum(len(each or b"") for each in results.values()))

    async def retry(self, seq: int, attempts: int, not_before_s: float) -> bool:
        """See `ports.Outbox.retry`."""
        return await self._do(lambda desk: desk.outgoing.retry(seq, attempts, not_before_s))

    async def release(self, seqs: Iterable[int]) -> None:
        """See `ports.Outbox.release`."""
        await self._do(lambda desk: desk.outgoing.release(seqs))

    async def bury(self, seq: int, reason: str) -> tuple[Dropped, ...]:
        """See `ports.Outbox.bury`."""
        return await self._do(lambda desk: desk.outgoing.bury(seq, reason))

    async def expire(self) -> tuple[Dropped, ...]:
        """See `ports.Outbox.expire`."""
        return await self._do(lambda desk: desk.outgoing.expire())

    async def listing(self, *, dead: bool = False, kind: str = "", after: int = 0, limit: int = 100) -> tuple[Item, ...]:
        """See `ports.Outbox.listing`."""
        return await self._do(lambda desk: desk.inspection.list(dead=dead, kind=kind, after=after, limit=limit))

    async def fate(self, idem: str) -> Fate | None:
        """See `ports.Outbox.fate`."""
        return await self._do(lambda desk: desk.inspection.fate(idem, frozenset(desk.ledger.leases)))

    async def revive(self, idem: str) -> bool:
        """See `ports.Outbox.revive`."""
        return await self._do(lambda desk: desk.outgoing.revive(idem))

    async def drop(self, idem: str) -> tuple[Dropped, ...]:
        """See `ports.Outbox.drop`."""
        return await self._do(lambda desk: desk.outgoing.discard(idem))

    async def stats(self) -> Stats:
        """See `ports.Outbox.stats`."""
        writer = self._open()
        return await self._do(lambda desk: _stats(desk, writer))

    async def accept(self, sender: str, message: Deferred, forward: Parcel | None = None) -> bool:
        """See `ports.Inbox.accept`."""

        def within(desk: Desk) -> bool:
            if forward is not None and not desk.receiving.seen(sender, message.idem):
                (answer,) = desk.outgoing.put([forward])
                if not isinstance(answer, Stored):
                    raise answer
            return desk.receiving.accept(sender, message)

        return await self._do(within, len(message.payload))

    async def seen(self, sender: str, idem: str) -> bool:
        """See `ports.Inbox.seen`."""
        return await self._do(lambda desk: desk.receiving.seen(sender, idem))

    async def pending(self, *, after: int = 0, limit: int = 64) -> tuple[Accepted, ...]:
        """See `ports.Inbox.pending`."""
        return await self._do(lambda desk: desk.receiving.pending(after, limit))

    async def applied(self, upto: int) -> None:
        """See `ports.Inbox.applied`."""
        await self._do(lambda desk: desk.receiving.applied(upto))

    def _open(self) -> Writer:
        if self._writer is None:
            raise WorldError("store_closed", "the queue is not open", where=str(self._place.folder))
        return self._writer

    async def _do(self, what: Callable[[Desk], T], size: int = 0) -> T:
        return cast("T", await self._ask(what, size))

    async def _ask(self, what: Parcel | Callable[[Desk], Any], size: int) -> Any:
        while self._commands >= INBOX_COMMANDS or self._bytes >= INBOX_BYTES:
            await self._turn()
        writer = self._open()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._commands += 1
        self._bytes += size
        writer.submit(Command(what, future, size))
        return await future

    async def _turn(self) -> None:
        """Wait until somebody was answered."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done():
                self._wake()
            raise

    def _wake(self) -> None:
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _resolve(self, answered: list[tuple[Command, Any]]) -> None:
        """Called in the loop with what one group was answered."""
        for command, answer in answered:
            self._commands -= 1
            self._bytes -= command.size
            future = command.future
            if future is None or future.done():
                continue  # its waiter was cancelled; what was committed stays
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        for _ in range(min(len(answered), len(self._turns))):
            self._wake()


def _stats(desk: Desk, writer: Writer) -> Stats:
    state = desk.ledger.state
    desk.room.observe()
    oldest = desk.ledger.one("SELECT queued_s FROM items WHERE reason IS NULL ORDER BY seq LIMIT 1")
    return Stats(
        items={kind: items for kind, (items, _) in state.usage.items()},
        bytes={kind: size for kind, (_, size) in state.usage.items()},
        dead_items=state.dead[0],
        dead_bytes=state.dead[1],
        leased=len(desk.ledger.leases),
        drops=dict(state.drops),
        oldest_queued_s=oldest[0] if oldest else None,
        free_bytes=desk.room.free_bytes,
        starved=writer.starved,
        quarantined=writer.quarantined,
        commits=writer.commits,
        committed=writer.committed,
    )
