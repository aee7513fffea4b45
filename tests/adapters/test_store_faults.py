"""The durable queue on a disk that fails: I/O errors at every call, power cuts, no space, rot. What was acknowledged is never lost.

The disk is SQLite's own, behind a VFS that counts its writes and syncs and fails the Nth; for power cuts it also keeps, for each file, what was synced and what
was written since, and builds the files as a cut would leave them (peers.md, point 9: the method of SQLite's crash tests).
"""

import asyncio
import ctypes
import ctypes.util
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw
import pytest

from appliance.adapters.store import Store
from appliance.adapters.store import database as opening
from appliance.adapters.store import disk as disking
from appliance.adapters.store import writer as writing
from appliance.adapters.store.disk import BALLAST_BYTES
from appliance.contract.deferral import Bounds, Overflow, Parcel, Policy, Rules, State, Stored
from appliance.contract.errors import WorldError
from appliance.core.reach.bounds import admit

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`

RULES = Rules(
    {
        "request": Policy(Overflow.REJECT, 64 << 20),
        "telemetry": Policy(Overflow.DROP_OLDEST_LOWEST_PRIO, 64 << 20),
    },
    Bounds(min_free_bytes=0),
)


class Disk(apsw.VFS):
    """Counts writes and syncs; fails the Nth, once or from then on; remembers what a power cut would leave."""

    def __init__(self) -> None:
        self.label = f"breaking-{uuid.uuid4().hex}"
        self.calls = 0
        self.fail_at: int | None = None
        self.persistent = False
        self.error: type[apsw.Error] = apsw.IOError
        self.synced: dict[str, bytearray] = {}
        self.pending: dict[str, list[tuple[int, bytes | None]]] = {}
        super().__init__(self.label, "")

    def xOpen(self, name: Any, flags: list[int]) -> "File":  # noqa: N802 - SQLite's name
        return File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802 - SQLite's name
        super().xDelete(filename, syncdir)
        self.synced.pop(filename, None)
        self.pending.pop(filename, None)

    def touch(self) -> None:
        """Count one call, and fail if it is its turn."""
        self.calls += 1
        if self.fail_at is not None and (self.calls == self.fail_at or (self.persistent and self.calls > self.fail_at)):
            raise self.error

    def cut(self, folder: Path, chance: random.Random) -> None:
        """Write the files as after a power cut: all that was synced, and of the rest what the disk happened to have done, perhaps torn."""
        for name, content in self.synced.items():
            left = bytearray(content)
            for offset, data in self.pending.get(name, ()):
                if chance.random() < 0.5:
                    _apply(left, offset, data if data is None or chance.random() < 0.8 else data[: chance.randrange(len(data) + 1)])
            (folder / Path(name).name).write_bytes(left)


class File(apsw.VFSFile):
    """One file of the breaking disk."""

    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else name or ""
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - SQLite's name
        self._disk.touch()
        super().xWrite(data, offset)
        self._disk.pending.setdefault(self._name, []).append((offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802 - SQLite's name
        self._disk.touch()
        super().xTruncate(newsize)
        self._disk.pending.setdefault(self._name, []).append((newsize, None))

    def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's name
        self._disk.touch()
        super().xSync(flags)
        content = self._disk.synced.setdefault(self._name, bytearray())
        for offset, data in self._disk.pending.pop(self._name, ()):
            _apply(content, offset, data)


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        content.extend(bytes(max(0, offset - len(content))))
    else:
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as folder:
        yield Path(folder) / "queue"


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.unregister()


def parcel(idem: str, payload: bytes = b"x" * 100, kind: str = "request", key: str = "") -> Parcel:
    return Parcel(kind=kind, idem=idem, payload=payload, key=key)


class Book:
    """What a caller was told: `promised` must be there, `settled` must not come back; what failed may be either."""

    def __init__(self) -> None:
        self.promised: set[str] = set()
        self.settled: set[str] = set()
        self.unknown: set[str] = set()
        self.failures = 0

    async def put(self, store: Store, idem: str) -> None:
        (answer,) = await asyncio.gather(store.put(parcel(idem, random.Random(idem).randbytes(600), key=idem[0])), return_exceptions=True)
        if isinstance(answer, Stored):
            self.promised.add(idem)
            return
        assert isinstance(answer, WorldError)
        assert answer.reason in {"disk", "disk_full"}
        assert answer.where
        assert answer.remedy
        self.unknown.add(idem)
        self.failures += 1

    async def send(self, store: Store) -> None:
        try:
            taken = await store.take(items=3)
            seqs = {each.item.seq: None for each in taken.items}
            names = {each.item.idem for each in taken.items}
            self.promised -= names
            self.unknown |= names
            await store.acknowledge(seqs)
        except WorldError:
            self.failures += 1
        else:
            self.unknown -= names
            self.settled |= names

    async def work(self, store: Store) -> None:
        for number in range(6):
            await asyncio.gather(*(self.put(store, f"{letter}{number}") for letter in "abc"))
            if number % 2:
                await self.put(store, f"{'ad'[number % 4 // 2]}{number}-alone")
                await self.send(store)

    async def check(self, store: Store) -> None:
        """The store holds what was promised, nothing that was settled, nothing that nobody put; its counters agree with its rows."""
        held = {item.idem for item in await store.listing(limit=1_000)}
        assert held >= self.promised, f"lost: {self.promised - held}"
        assert not held & self.settled
        assert held <= self.promised | self.unknown
        stats = await store.stats()
        assert stats.items.get("request", 0) == len(held)
        assert stats.bytes.get("request", 0) == sum(item.size_bytes for item in await store.listing(limit=1_000))
        while (taken := await store.take()).items:
            assert all(each.payload == random.Random(each.item.idem).randbytes(600) for each in taken.items)
            await store.acknowledge({each.item.seq: None for each in taken.items})
        assert await store.listing() == ()


async def count_calls(folder: Path, disk: Disk) -> int:
    """How many writes and syncs the work makes on a sound disk, after opening."""
    book = Book()
    async with Store(folder, RULES, admit, vfs=disk.label) as store:
        before = disk.calls
        await book.work(store)
        used = disk.calls - before
        await book.check(store)
    assert book.failures == 0
    shutil.rmtree(folder)
    return used


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("error", [apsw.IOError, apsw.FullError], ids=["EIO", "ENOSPC"])
async def test_an_error_at_any_call_loses_nothing(folder: Path, disk: Disk, error: type[apsw.Error], *, persistent: bool) -> None:
    """The Nth write or sync fails, for every N: one EIO is not even seen, the rest is told; after reopening all that was acknowledged is there."""
    calls = await count_calls(folder, disk)
    assert calls > 40
    failed = 0
    for number in range(1, calls + 1, 1 if not persistent else 3):
        book = Book()
        disk.fail_at, disk.error, disk.persistent = None, error, persistent
        async with Store(folder, RULES, admit, vfs=disk.label) as store:
            disk.fail_at = disk.calls + number
            await book.work(store)
            failed += book.failures > 0
            disk.fail_at = None
        async with Store(folder, RULES, admit, vfs=disk.label) as store:
            await book.check(store)
            assert (await store.stats()).quarantined == 0
        shutil.rmtree(folder)
    if error is apsw.IOError and not persistent:
        assert failed == 0
    else:
        assert failed > calls // 6


async def test_a_take_that_failed_leased_nothing(folder: Path, disk: Disk) -> None:
    """While nothing can be written, `take` is refused and holds nothing back: afterwards the same item comes at once, as never tried."""
    async with Store(folder, RULES, admit, vfs=disk.label) as store:
        await store.put(parcel("one"))
        disk.fail_at, disk.persistent = disk.calls + 1, True
        for _ in range(3):
            with pytest.raises(WorldError):
                await store.take()
        disk.fail_at = None
        assert (await store.stats()).leased == 0
        taken = await store.take()
        assert [(each.item.idem, each.item.attempts) for each in taken.items] == [("one", 0)]


async def test_a_failed_open_is_told_and_tried_again(folder: Path, disk: Disk) -> None:
    """The Nth call fails while the store is opened: WorldError, no lock left behind, and the next open finds everything."""
    async with Store(folder, RULES, admit, vfs=disk.label) as store:
        await store.put(parcel("one"))
    number, failures = 0, 0
    while failures == number:
        number += 1
        disk.fail_at = disk.calls + number
        with suppress(WorldError):
            async with Store(folder, RULES, admit, vfs=disk.label):
                disk.fail_at = None
                break
        failures += 1
        disk.fail_at = None
        async with Store(folder, RULES, admit, vfs=disk.label) as store:
            assert [item.idem for item in await store.listing()] == ["one"]
    assert failures > 0


@pytest.mark.parametrize("seed", range(30))
async def test_a_power_cut_at_any_moment_loses_nothing(folder: Path, disk: Disk, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power goes at a random write; of what was not synced, a random part reaches the disk, some of it torn: all promises are kept."""
    monkeypatch.setattr(opening, "_lengthen", lambda _wal: None)  # it writes past the VFS; the cut must know all writes
    monkeypatch.setattr(writing, "WAL_PAGES", 20)  # so that checkpoints are cut too
    chance = random.Random(seed)
    book = Book()
    image = folder.parent / "image"
    image.mkdir()
    async with Store(folder, RULES, admit, vfs=disk.label) as store:
        disk.fail_at, disk.persistent = disk.calls + chance.randrange(1, 150), True
        await book.work(store)
        disk.cut(image, chance)
        disk.fail_at = None
    (image / "lock").write_bytes(b"1")
    async with Store(image, RULES, admit) as store:
        assert (await store.stats()).quarantined == 0
        await book.check(store)


async def test_a_damaged_page_costs_no_more_than_its_rows(folder: Path) -> None:
    """Bytes flipped in the middle of the file after an unclean stop: set aside, counted, the readable rows rescued in order, and it goes on."""
    async with Store(folder, RULES, admit) as store:
        for number in range(400):
            await store.put(parcel(f"{number}", random.Random(number).randbytes(500), key="k"))
        await store.put(parcel("large", random.Random(1).randbytes(400_000)))
    with (folder / "queue.db").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2 // 4_096 * 4_096)
        file.write(random.Random(1).randbytes(4_096))
    (folder / "lock").write_bytes(b"1")
    async with Store(folder, RULES, admit) as store:
        stats = await store.stats()
        assert stats.quarantined == 1
        names = [item.idem for item in await store.listing(limit=1_000)]
        assert len(names) >= 350
        assert names[-1] == "large"
        assert [int(name) for name in names[:-1]] == sorted(int(name) for name in names[:-1])
        taken = await store.take(size=1 << 30)
        assert {each.item.idem for each in taken.items} == {"large", names[0]}
        assert stats.items["request"] == len(names)
        assert (await store.put(parcel("new"))).seq > 401
    assert (folder / "damaged-1" / "queue.db").exists()


async def test_a_file_that_is_no_database_is_set_aside(folder: Path) -> None:
    """Nothing can be read: the store starts empty, and says that something lies aside."""
    write(folder / "queue.db", random.Random(2).randbytes(100_000))
    async with Store(folder, RULES, admit) as store:
        assert (await store.stats()).quarantined == 1
        await store.put(parcel("one"))
        assert [item.idem for item in await store.listing()] == ["one"]


async def test_damage_found_while_running_is_survived(folder: Path) -> None:
    """A page that turns out to be damaged in the middle of work: the caller is told, the rest is rescued, the next put is served."""
    async with Store(folder, RULES, admit) as store:
        await asyncio.gather(*(store.put(parcel(f"x{number}", random.Random(number).randbytes(500))) for number in range(900)))
    with (folder / "queue.db").open("r+b") as file:
        file.seek(80 * 4_096)  # not the last page, which is read when the store opens
        file.write(random.Random(1).randbytes(60 * 4_096))
    async with Store(folder, RULES, admit) as store:
        with pytest.raises(WorldError) as told:
            await drain(store)
        assert told.value.reason == "disk"
        stats = await store.stats()
        assert stats.quarantined == 1
        assert stats.items["request"] > 100
        await store.put(parcel("new"))


async def test_a_rotten_payload_becomes_a_dead_letter(folder: Path) -> None:
    """A payload that SQLite cannot know to be wrong fails its checksum: it is not handed out, its key goes on, and it is counted."""
    async with Store(folder, RULES, admit) as store:
        await store.put(parcel("rotten", b"needle" * 20, key="k"))
        await store.put(parcel("sound", b"other" * 20, key="k"))
    content = (folder / "queue.db").read_bytes()
    assert content.count(b"needle" * 20) == 1
    (folder / "queue.db").write_bytes(content.replace(b"needle", b"noodle", 1))
    async with Store(folder, RULES, admit) as store:
        taken = await store.take()
        assert [(each.idem, each.reason) for each in taken.dropped] == [("rotten", "damaged")]
        assert [each.item.idem for each in (await store.take()).items] == ["sound"]
        fate = await store.fate("rotten")
        assert fate is not None
        assert fate.state is State.DEAD


async def test_a_lost_payload_file_becomes_a_dead_letter(folder: Path) -> None:
    """The file of a large payload is gone or cut: the same."""
    async with Store(folder, RULES, admit) as store:
        seqs = [(await store.put(parcel(name, random.Random(name).randbytes(300_000)))).seq for name in ("gone", "cut", "sound")]
    (folder / "segments" / f"{seqs[0]}.payload").unlink()
    os.truncate(folder / "segments" / f"{seqs[1]}.payload", 100_000)
    (folder / "segments" / "99.payload").write_bytes(b"an orphan of a cut")
    async with Store(folder, RULES, admit) as store:
        taken = await store.take(size=1 << 30)
        assert [(each.idem, each.reason) for each in taken.dropped] == [("gone", "damaged"), ("cut", "damaged")]
        assert [each.item.idem for each in taken.items] == ["sound"]
        assert not (folder / "segments" / "99.payload").exists()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def exists(path: Path) -> bool:
    return path.exists()


async def drain(store: Store) -> None:
    while (taken := await store.take()).items:
        await store.acknowledge({each.item.seq: None for each in taken.items})


def mounted(folder: Path, size: int) -> bool:
    """Mount a tmpfs of so many bytes; False where that is not allowed."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    folder.mkdir()
    return bool(libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()) == 0)


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    if not mounted(folder, 24 << 20):
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    ctypes.CDLL(None).umount2(str(folder).encode(), 2)


async def test_a_full_disk_refuses_promises_and_still_drains(small_disk: Path) -> None:
    """A real file system runs full under the store: puts are refused, what was accepted is taken and deleted; with space come puts again."""
    book: list[str] = []
    other = small_disk / "other"
    async with Store(small_disk, RULES, admit) as store:
        refused: set[str] = set()
        for number in range(400):
            try:
                await store.put(parcel(f"{number}", random.Random(number).randbytes(100_000)))
                book.append(f"{number}")
            except WorldError as error:
                refused.add(error.reason)
                break
            if number == 20:
                fill(other)
        assert refused <= {"disk_full", "disk"}
        assert refused
        assert len(book) >= 20
        sent: list[str] = []
        while (taken := await store.take()).items:
            assert all(each.payload == random.Random(int(each.item.idem)).randbytes(100_000) for each in taken.items)
            sent += [each.item.idem for each in taken.items]
            await store.acknowledge({each.item.seq: None for each in taken.items})
        assert sorted(sent) == sorted(book)
        other.unlink()
        await store.stats()
        await store.put(parcel("with space"))
        assert not (await store.stats()).starved


def fill(path: Path) -> None:
    """Write until the file system is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(65_536))


async def test_the_ballast_is_given_up_and_taken_back(folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a write finds the disk full, the ballast goes, the drain works, and the ballast comes back when there is space."""
    async with Store(folder, RULES, admit, vfs=disk.label) as store:
        seq = (await store.put(parcel("one"))).seq
        assert (folder / "ballast").stat().st_blocks * 512 >= BALLAST_BYTES
        monkeypatch.setattr(disking, "free_bytes", lambda _folder: 0)
        disk.error, disk.fail_at = apsw.FullError, disk.calls + 1
        with pytest.raises(WorldError) as refused:
            await store.put(parcel("two"))
        assert refused.value.reason == "disk_full"
        assert not exists(folder / "ballast")
        assert (await store.stats()).starved
        assert await store.acknowledge({seq: None}) == 1
        monkeypatch.undo()
        await store.put(parcel("two"))
        assert exists(folder / "ballast")
