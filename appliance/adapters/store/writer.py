"""The one thread that owns the one connection: it commits whatever waits as a group, then answers.

1. A group is what has arrived while the last one was being synced: up to 256 commands or 1 MiB, and never waited for.
2. An answer is given after the commit that it speaks of.
3. A failed group is rolled back and tried again one command at a time, so that a fault hits only the command that has it. If the disk is full,
   the ballast is given up first, and puts are refused (`disk_full`) until there is room for it again: what drains the queue still works.
4. A damaged database is set aside between groups, its readable rows are rescued, and the group's commands get `disk`.
5. Checkpoints run after the answers, when the WAL is long. A failing one is told once, and tried again after the next group.
6. An exception that nobody foresaw is `OursError` for its command and for every later one: the process should end and start anew.
"""

import asyncio
import errno
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import apsw
import structlog

from appliance.adapters.store.database import DAMAGE, checkpoint, connect, foreign, quarantined, set_aside, translated
from appliance.adapters.store.disk import Ballast, Lock, free_bytes
from appliance.adapters.store.inspection import Inspection
from appliance.adapters.store.ledger import Ledger
from appliance.adapters.store.outgoing import Outgoing
from appliance.adapters.store.receiving import Receiving
from appliance.adapters.store.rescue import rescue
from appliance.adapters.store.room import Admission, Room
from appliance.adapters.store.segments import Segments, sync_folder
from appliance.contract.deferral import Instant, Parcel, Rules, Stored
from appliance.contract.errors import ApplianceError, OursError, WorldError

GROUP_COMMANDS = 256
GROUP_BYTES = 1_048_576
WAL_PAGES = 3_000
"""12 MiB of WAL before it is copied into the database."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_log = structlog.get_logger(__name__)


class Command(NamedTuple):
    """One wish. `what` is a parcel to put, or what to do with the desk in a transaction; None ends the thread."""

    what: "Parcel | Callable[[Desk], Any] | None"
    future: "asyncio.Future[Any] | None"
    size: int = 0


class Place(NamedTuple):
    """What makes a store: where it is, its rules, core's decision on newcomers, the clocks, and (for tests that break the disk) SQLite's VFS."""

    folder: Path
    rules: Rules
    admit: Admission
    clocks: Callable[[], Instant]
    vfs: str = ""


Resolve = Callable[[list[tuple[Command, Any]]], None]


class Desk:
    """Everything that a command may use while its transaction is open."""

    def __init__(self, ledger: Ledger, place: Place) -> None:
        self.ledger = ledger
        self.room = Room(ledger, place.rules, place.admit, lambda: free_bytes(place.folder))
        self.outgoing = Outgoing(ledger, self.room, place.rules.bounds.max_dead_bytes)
        self.receiving = Receiving(ledger)
        self.inspection = Inspection(ledger.connection, ledger.segments)


class Writer:
    """The thread, its inbox, and the folder that it owns."""

    def __init__(self, place: Place, resolve: Resolve) -> None:
        """Open everything, here and now; `resolve` is called in the loop with what a group was answered.

        Raises: WorldError (`disk`, `store_locked`, `format`).
        """
        self._resolve = resolve
        self._place = place
        folder = self._folder = place.folder
        self.commits = self.committed = 0
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._broken: OursError | None = None
        self._pages = 0
        self._limping = False
        with translated(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = Lock(folder)
            try:
                self._ballast = Ballast(folder)
                self.desk = self._open(check=self._lock.was_unclean)
                sync_folder(folder)
            except BaseException:
                self._lock.release(clean=False)
                raise
        self._thread = threading.Thread(target=self._run, name="store")

    @property
    def starved(self) -> bool:
        """Whether the disk was found full and the ballast could not be taken back yet."""
        return not self._ballast.held

    @property
    def quarantined(self) -> int:
        """How many damaged databases lie aside."""
        return quarantined(self._folder)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Queue a command; from any thread."""
        self._inbox.put(command)

    def stop(self) -> None:
        """Finish what waits, close, let go of the lock; blocks."""
        self._inbox.put(Command(None, None))
        self._thread.join()

    def _open(self, *, check: bool) -> Desk:
        """Open; what is damaged is set aside first."""
        try:
            return self._enter(connect(self._folder, check=check, vfs=self._place.vfs), None)
        except DAMAGE as error:
            return self._begin_anew(error)

    def _begin_anew(self, error: Exception) -> Desk:
        aside = set_aside(self._folder)
        _log.error("damaged_queue_set_aside", folder=str(aside), reason=str(error))
        return self._enter(connect(self._folder, check=False, vfs=self._place.vfs), aside)

    def _enter(self, connection: apsw.Connection, aside: Path | None) -> Desk:
        try:
            ledger = Ledger(connection, Segments(self._folder / "segments"), self._place.clocks)
            ledger.begin()
            ledger.commit()
            if aside is not None:
                _log.error("items_rescued", count=rescue(ledger, aside))
            ledger.segments.sweep({seq for (seq,) in connection.execute("SELECT seq FROM items WHERE codec >= 2")})
        except BaseException:
            connection.close()
            raise
        connection.set_wal_hook(self._note_pages)
        return Desk(ledger, self._place)

    def _note_pages(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._pages = pages
        return int(apsw.SQLITE_OK)

    def _run(self) -> None:
        ending = False
        while not ending:
            group = [self._inbox.get()]
            size = group[0].size
            while len(group) < GROUP_COMMANDS and size < GROUP_BYTES and not self._inbox.empty():
                command = self._inbox.get_nowait()
                group.append(command)
                size += command.size
            ending = any(command.what is None for command in group)
            self._serve([command for command in group if command.what is not None])
        self._close()

    def _serve(self, group: list[Command]) -> None:
        try:
            answers = self._group(group)
        except BaseException as error:  # noqa: BLE001 - the thread must answer, and must not end silently (rule 6)
            if self._broken is None:
                _log.critical("queue_broken", exc_info=error)
                self._broken = OursError("store", f"{type(error).__name__}: {error}", where=str(self._folder))
            answers = [self._broken] * len(group)
        self._answer(group, answers)
        if self._pages > WAL_PAGES and self._broken is None:
            self._checkpoint()

    def _group(self, group: list[Command]) -> list[Any]:
        if self._broken is not None:
            return [self._broken] * len(group)
        if not self._ballast.held:
            self._ballast.restore(self._place.rules.bounds.min_free_bytes)
        try:
            return self._transaction(group)
        except DAMAGE as error:
            return [self._replace(error)] * len(group)
        except (apsw.Error, OSError) as error:
            return [self._alone(command, error) for command in group]

    def _alone(self, command: Command, cause: Exception) -> Any:
        """A command in a transaction of its own, after the group has failed."""
        full = isinstance(cause, apsw.FullError) or (isinstance(cause, OSError) and cause.errno in _FULL)
        if full and self._ballast.held:
            _log.error("disk_found_full", folder=str(self._folder))
            self._ballast.give_up()
        try:
            return self._transaction([command])[0]
        except DAMAGE as error:
            return self._replace(error)
        except (apsw.Error, OSError) as error:
            return foreign(error, self._folder)

    def _transaction(self, group: Sequence[Command]) -> list[Any]:
        """All commands in one transaction; an ApplianceError is the answer of its command alone and changed nothing."""
        desk = self.desk
        alone = self._alone_put(group)
        if alone is not None:
            return [alone]
        answers: list[Any] = []
        try:
            desk.ledger.begin()
            at = 0
            while at < len(group):
                what = group[at].what
                if isinstance(what, Parcel):
                    parcels = _parcels(group, at)
                    answers += self._put(parcels)
                    at += len(parcels)
                else:
                    answers.append(_asked(what, desk))
                    at += 1
            desk.ledger.commit()
        except BaseException:
            desk.ledger.rollback()
            raise
        self.commits += 1
        self.committed += len(group)
        return answers

    def _alone_put(self, group: Sequence[Command]) -> Stored | ApplianceError | None:
        """The answer of a group that is one put; None: it has to go the long way."""
        what = group[0].what if len(group) == 1 else None
        ledger = self.desk.ledger
        if not isinstance(what, Parcel) or self.starved or not ledger.begin_alone():
            return None
        try:
            answer = self.desk.outgoing.put_alone(what)
        except BaseException:
            ledger.rollback()
            raise
        if answer is not None:
            ledger.end_alone()
            self.commits += 1
            self.committed += 1
        return answer

    def _put(self, parcels: list[Parcel]) -> Sequence[Any]:
        if self.starved:
            full = WorldError("disk_full", "the disk is full; nothing is taken in", where=str(self._folder), remedy="free space there")
            return [full] * len(parcels)
        return self.desk.outgoing.put(parcels)

    def _replace(self, error: Exception) -> WorldError:
        """Set the damaged database aside and go on with what can be rescued."""
        failure = foreign(error, self._folder)
        self.desk.ledger.connection.close(True)
        self.desk = self._begin_anew(error)
        return failure

    def _answer(self, group: Sequence[Command], answers: Sequence[Any]) -> None:
        """Hand the answers to the loop in one go; a loop that is gone has nobody who waits."""
        future = group[0].future if group else None
        if future is not None:
            try:
                future.get_loop().call_soon_threadsafe(self._resolve, list(zip(group, answers, strict=True)))
            except RuntimeError as error:
                _log.warning("answers_unheard", count=len(group), reason=str(error))

    def _checkpoint(self) -> None:
        try:
            checkpoint(self.desk.ledger.connection)
        except apsw.Error as error:
            if not self._limping:
                _log.error("checkpoint_failed", folder=str(self._folder), reason=str(error))
            self._limping = True
        else:
            self._limping = False

    def _close(self) -> None:
        clean = self._broken is None
        if clean:
            with suppress(apsw.Error):  # a full disk: who opens next counts anew
                self.desk.ledger.settle()
        try:
            self.desk.ledger.connection.close(True)
        except apsw.Error as error:
            _log.error("queue_closed_uncleanly", folder=str(self._folder), reason=str(error))
            clean = False
        self._lock.release(clean=clean)


def _parcels(group: Sequence[Command], at: int) -> list[Parcel]:
    """The run of puts that begins here."""
    found: list[Parcel] = []
    for command in group[at:]:
        if not isinstance(command.what, Parcel):
            break
        found.append(command.what)
    return found


def _asked(what: Callable[[Desk], Any] | None, desk: Desk) -> Any:
    try:
        return what(desk) if what is not None else None
    except OursError:
        raise
    except ApplianceError as error:
        return error
