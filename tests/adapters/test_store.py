"""The durable queue on a real disk: what it promises while nothing breaks, and over reboots and clock steps."""

import asyncio
import math
import random
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import apsw
import pytest

from appliance.adapters.store import Inspection, Store, read_clocks
from appliance.adapters.store.store import INBOX_COMMANDS
from appliance.contract.deferral import (
    PAYLOAD_LIMIT,
    Bounds,
    Deferred,
    Dropped,
    Instant,
    Kind,
    Leased,
    Overflow,
    Parcel,
    Policy,
    Rules,
    State,
    Stored,
)
from appliance.contract.errors import TheirsError, WorldError
from appliance.core.reach import bounds, deferral

POLICIES = {
    "request": Policy(Overflow.REJECT, 64 << 20, priority=4, ttl_s=3_600.0, max_attempts=3),
    "result": Policy(Overflow.REJECT, 64 << 20, priority=3),
    "event": Policy(Overflow.DROP_EXPIRED_FIRST, 4_000, priority=5, ttl_s=100.0),
    "telemetry": Policy(Overflow.DROP_OLDEST_LOWEST_PRIO, 4_000, priority=8),
}
RULES = Rules(POLICIES, Bounds(min_free_bytes=0))


@dataclass
class Clocks:
    """Clocks that a test owns."""

    boot_id: str = "boot-1"
    boot_s: float = 1_000.0
    wall_s: float = 1_700_000_000.0
    trusted: bool = True

    def __call__(self) -> Instant:
        return Instant(self.boot_id, self.boot_s, self.wall_s, self.trusted)

    def run(self, seconds: float) -> None:
        self.boot_s += seconds
        self.wall_s += seconds

    def reboot(self, boot_id: str, *, off_s: float = 0.0, trusted: bool = True) -> None:
        self.boot_id, self.boot_s, self.trusted = boot_id, 10.0, trusted
        self.wall_s += off_s + 10.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as folder:
        yield Path(folder) / "queue"


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
async def store(folder: Path, clocks: Clocks) -> AsyncIterator[Store]:
    async with opened(folder, clocks) as store:
        yield store


def listed(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def opened(folder: Path, clocks: Clocks, rules: Rules = RULES) -> Store:
    return Store(folder, rules, bounds.admit, clocks=clocks)


def parcel(idem: str, kind: str = "request", *, payload: bytes = b"x", key: str = "", priority: int | None = None) -> Parcel:
    return Parcel(kind=kind, idem=idem, payload=payload, key=key, priority=priority)


def idems(items: tuple[Leased, ...]) -> list[str]:
    return [each.item.idem for each in items]


def why(dropped: tuple[Dropped, ...]) -> list[tuple[str, str]]:
    return [(each.idem, each.reason) for each in dropped]


async def test_what_was_put_is_there_for_the_next_process(folder: Path, clocks: Clocks) -> None:
    """Small, compressible, incompressible and large payloads come back byte for byte after a restart; then nothing is left on the disk."""
    payloads = {
        "small": b"s",
        "zeros": bytes(5_000),
        "noise": bytes(range(256)) * 4 + read_clocks().boot_id.encode(),
        "large": b"ab" * 800_000,
    }
    payloads["segment"] = b"".join(number.to_bytes(4, "big") for number in range(200_000))
    async with opened(folder, clocks) as store:
        for idem, payload in payloads.items():
            assert not (await store.put(parcel(idem, payload=payload))).duplicate
        assert len(listed(folder / "segments")) == 1
    async with opened(folder, clocks) as store:
        taken = await store.take(size=1 << 30)
        assert {each.item.idem: each.payload for each in taken.items} == payloads
        assert await store.acknowledge({each.item.seq: None for each in taken.items}) == len(payloads)
        assert (await store.stats()).bytes == {"request": 0}
    assert listed(folder / "segments") == []
    assert mode(folder) == 0o700


async def test_the_same_key_is_one_item_even_after_its_delivery(store: Store) -> None:
    """A duplicate is told, in the same group, while it waits, and for a day after its delivery; it changes nothing."""
    answers = await asyncio.gather(*(store.put(parcel("one", payload=bytes([number]))) for number in range(5)))
    assert [each.duplicate for each in answers] == [False, True, True, True, True]
    assert (await store.put(parcel("one"))).duplicate
    taken = await store.take()
    assert [each.payload for each in taken.items] == [b"\0"]
    await store.acknowledge({taken.items[0].item.seq: b"answer"})
    assert (await store.put(parcel("one"))).duplicate
    fate = await store.fate("one")
    assert fate is not None
    assert (fate.state, fate.result) == (State.DELIVERED, b"answer")
    stats = await store.stats()
    assert stats.items == {"request": 0}


async def test_delivered_keys_are_forgotten_after_a_day(store: Store, clocks: Clocks) -> None:
    """The horizon is a day of queue time; then the key may be used anew and its answer takes no room."""
    seq = (await store.put(parcel("one"))).seq
    await store.acknowledge({seq: b"answer" * 100})
    clocks.run(86_399)
    await store.expire()
    assert await store.fate("one") is not None
    clocks.run(2)
    await store.expire()
    assert await store.fate("one") is None
    assert not (await store.put(parcel("one"))).duplicate


async def test_one_key_goes_in_order_one_at_a_time(store: Store, clocks: Clocks) -> None:
    """A later item of a key waits while the earlier is leased or backs off, and passes when it is delivered or buried."""
    seqs = {name: (await store.put(parcel(name, key="k"))).seq for name in ("a", "b", "c")}
    await store.put(parcel("free"))
    assert idems((await store.take()).items) == ["a", "free"]
    assert idems((await store.take()).items) == []
    await store.retry(seqs["a"], 1, store.now_s() + 30)
    taken = await store.take()
    assert taken.items == ()
    assert taken.deadline == pytest.approx(store.now_s() + 30)
    clocks.run(30)
    assert idems((await store.take()).items) == ["a"]
    await store.acknowledge({seqs["a"]: None})
    assert idems((await store.take()).items) == ["b"]
    assert why(await store.bury(seqs["b"], "refused")) == [("b", "refused")]
    assert idems((await store.take()).items) == ["c"]


async def test_a_duplicate_never_holds_its_key_back(store: Store) -> None:
    """A duplicate with a key in the same group as a fresh item of that key does not leave the fresh one waiting for nobody."""
    await store.put(parcel("known"))
    first, second = await asyncio.gather(store.put(parcel("known", key="k")), store.put(parcel("fresh", key="k")))
    assert (first.duplicate, second.duplicate) == (True, False)
    assert set(idems((await store.take()).items)) == {"known", "fresh"}


async def test_urgent_goes_first_and_old_becomes_urgent(store: Store, clocks: Clocks) -> None:
    """Priority orders; a minute of waiting is worth one level; ties go by age. Classes that are not asked for stay."""
    await store.put(parcel("low", priority=9))
    await store.put(parcel("high", priority=0))
    await store.put(parcel("other", "result", priority=0))
    taken = await store.take([Kind.REQUEST])
    assert idems(taken.items) == ["high", "low"]
    await store.release([each.item.seq for each in taken.items])
    clocks.run(9 * 60 + 1)
    await store.put(parcel("new", priority=0))
    assert idems((await store.take()).items) == ["high", "other", "low", "new"]


async def test_a_lease_ends_by_itself(store: Store, clocks: Clocks) -> None:
    """A sender that forgot its items loses them after the lease; a late acknowledgement still counts."""
    seq = (await store.put(parcel("one"))).seq
    await store.take(lease_s=60.0)
    clocks.run(59)
    assert (await store.take()).items == ()
    clocks.run(2)
    assert (await store.take()).items[0].item.attempts == 1
    assert await store.acknowledge({seq: None}) == 1


async def test_an_item_that_kills_its_process_ends_among_the_dead_letters(folder: Path, clocks: Clocks) -> None:
    """Attempts are on disk before they are made: after `max_attempts` restarts without a settlement the item is buried, and its key passes."""
    for attempt in range(3):
        async with opened(folder, clocks) as store:
            if attempt == 0:
                await store.put(parcel("poison", key="k"))
                await store.put(parcel("next", key="k"))
            taken = await store.take()
            assert [(each.item.idem, each.item.attempts) for each in taken.items] == [("poison", attempt)]
    async with opened(folder, clocks) as store:
        taken = await store.take()
        assert taken.items == ()
        assert why(taken.dropped) == [("poison", "attempts")]
        assert taken.deadline == store.now_s()
        assert idems((await store.take()).items) == ["next"]
        assert [item.idem for item in await store.listing(dead=True)] == ["poison"]
        assert (await store.stats()).drops == {"request:attempts": 1}


async def test_a_released_item_has_not_been_tried(store: Store) -> None:
    """Not reaching the receiver costs no attempt."""
    seq = (await store.put(parcel("one"))).seq
    for _ in range(5):
        taken = await store.take()
        assert taken.items[0].item.attempts == 0
        await store.release([seq])


async def test_operators_may_revive_and_drop(store: Store) -> None:
    """A dead letter revived keeps its place in its key; a dropped one is counted and its fate is told."""
    seq = (await store.put(parcel("a", key="k"))).seq
    await store.put(parcel("b", key="k"))
    await store.bury(seq, "refused")
    fate = await store.fate("a")
    assert fate is not None
    assert (fate.state, fate.reason) == (State.DEAD, "refused")
    assert (await store.put(parcel("a"))).duplicate
    assert await store.revive("a")
    assert not await store.revive("nobody")
    assert idems((await store.take()).items) == ["a"]
    assert why(await store.drop("a")) == [("a", "operator")]
    assert await store.drop("a") == ()
    fate = await store.fate("a")
    assert fate is not None
    assert (fate.state, fate.reason) == (State.DROPPED, "operator")
    assert idems((await store.take()).items) == ["b"]


async def test_floor_rises_only_past_what_is_gone(store: Store) -> None:
    """The floor is the least `seq` held, dead letters included."""
    first, second = [(await store.put(parcel(name))).seq for name in ("a", "b")]
    await store.bury(first, "refused")
    await store.acknowledge({second: None})
    assert (await store.take()).floor == first
    await store.drop("a")
    assert (await store.take()).floor == second + 1


async def test_ttl_in_one_boot_is_counted_by_boot_time(store: Store, clocks: Clocks) -> None:
    """Steps of the wall clock by an hour either way expire nothing and keep nothing; an expired promise keeps its fate."""
    await store.put(parcel("one"))
    clocks.wall_s += 3_601
    assert await store.expire() == ()
    clocks.wall_s -= 7_200
    clocks.run(3_599)
    assert await store.expire() == ()
    clocks.run(2)
    assert why(await store.expire()) == [("one", "expired")]
    fate = await store.fate("one")
    assert fate is not None
    assert fate.state is State.EXPIRED
    assert not (await store.put(parcel("one"))).duplicate


@pytest.mark.parametrize(("off_s", "trusted", "gone"), [(3_000, True, False), (3_601, True, True), (10_000, False, False)])
async def test_ttl_over_a_reboot(folder: Path, clocks: Clocks, off_s: float, *, trusted: bool, gone: bool) -> None:
    """Over boots the wall clock counts if it is trusted; else only the uptime of this boot is known to have passed."""
    async with opened(folder, clocks) as store:
        await store.put(parcel("one"))
    clocks.reboot("boot-2", off_s=off_s, trusted=trusted)
    async with opened(folder, clocks) as store:
        taken = await store.take()
        assert (taken.items == ()) is gone
        if not trusted:
            await store.release([taken.items[0].item.seq])
            clocks.run(3_600)
            assert (await store.take()).items == ()


async def test_a_wall_clock_that_is_set_later_counts_for_what_was_put_before(folder: Path, clocks: Clocks) -> None:
    """An item put before NTP answered gets its true wall time once the clock is trusted, and expires by it after a reboot."""
    clocks.trusted, clocks.wall_s = False, 0.0
    async with opened(folder, clocks) as store:
        await store.put(parcel("one"))
        clocks.run(60)
        clocks.trusted, clocks.wall_s = True, 1_700_000_060.0
        assert await store.expire() == ()
    clocks.reboot("boot-2", off_s=3_600)
    async with opened(folder, clocks) as store:
        assert why((await store.take()).dropped) == [("one", "expired")]


async def test_queue_time_never_runs_backwards(folder: Path, clocks: Clocks) -> None:
    """Reboots and clock steps leave the order: what was put later has the later queue time."""
    stamps = []
    for boot in range(4):
        async with opened(folder, clocks) as store:
            await store.put(parcel(f"{boot}"))
            stamps.append(store.now_s())
        clocks.reboot(f"boot-{boot + 2}", off_s=-3_600)
    async with opened(folder, clocks) as store:
        assert idems((await store.take()).items) == ["0", "1", "2", "3"]
    assert stamps == sorted(stamps)


async def test_a_full_class_drops_what_its_policy_says(store: Store, clocks: Clocks) -> None:
    """Telemetry makes room by dropping its oldest and least urgent; events first what has expired, however urgent it was; each drop is told with its reason."""
    noise = [random.Random(number).randbytes(500) for number in range(10)]
    dropped: list[tuple[str, str]] = []
    for number in range(10):
        dropped += why((await store.put(parcel(f"t{number}", "telemetry", payload=noise[number], priority=9 - number % 2))).dropped)
    assert dropped == [(f"t{number}", "room") for number in (0, 2, 4, 6, 8)]
    large = parcel("large", "telemetry", payload=random.Random(5).randbytes(4_000))
    with pytest.raises(WorldError, match="class telemetry holds") as refused:
        await store.put(large)
    assert refused.value.reason == "too_large"
    await store.put(parcel("old", "event", payload=noise[0], priority=0))
    clocks.run(101)
    for number in range(4):
        await store.put(parcel(f"e{number}", "event", payload=noise[number], priority=9))
    answers = [await store.put(parcel(f"late{number}", "event", payload=noise[number])) for number in range(2)]
    assert [why(answer.dropped) for answer in answers] == [[("old", "room")], [("e0", "room")]]
    assert (await store.stats()).drops == {"telemetry:room": 5, "event:room": 2}
    assert await store.fate("t0") is None


async def test_promised_items_are_refused_rather_than_lost(folder: Path, clocks: Clocks) -> None:
    """At the bound of the store a request is refused, and every accepted one stays."""
    async with opened(folder, clocks, Rules(POLICIES, Bounds(max_bytes=3_000, min_free_bytes=0))) as store:
        answers = await asyncio.gather(*(store.put(parcel(f"{number}")) for number in range(100)), return_exceptions=True)
        accepted = [f"{number}" for number, answer in enumerate(answers) if isinstance(answer, Stored)]
        assert 0 < len(accepted) < 100
        assert {each.reason for each in answers if isinstance(each, WorldError)} == {"queue_full"}
        assert (await store.put(parcel("0"))).duplicate
        assert idems((await store.take()).items) == accepted


async def test_free_disk_is_left_to_others(folder: Path, clocks: Clocks) -> None:
    """Below `min_free_bytes` nothing enters, and the error says what is free."""
    async with opened(folder, clocks, Rules(POLICIES, Bounds(min_free_bytes=1 << 60))) as store:
        with pytest.raises(WorldError, match="reserved") as refused:
            await store.put(parcel("one"))
        assert refused.value.reason == "disk_full"


async def test_dead_letters_are_bounded(folder: Path, clocks: Clocks) -> None:
    """Beyond `max_dead_bytes` the oldest dead letters go, counted; a promised one keeps its fate."""
    async with opened(folder, clocks, Rules(POLICIES, Bounds(min_free_bytes=0, max_dead_bytes=600))) as store:
        gone: list[tuple[str, str]] = []
        for number in range(4):
            gone += why(await store.bury((await store.put(parcel(f"{number}"))).seq, "refused"))
        assert [each for each in gone if each[1] != "refused"] == [("0", "dead_letters_full"), ("1", "dead_letters_full")]
        fate = await store.fate("0")
        assert fate is not None
        assert fate.state is State.DROPPED
        stats = await store.stats()
        assert (stats.dead_items, stats.dead_bytes <= 600) == (2, True)


async def test_what_is_malformed_is_refused_alone(store: Store) -> None:
    """A wrong class, key, priority or size is the caller's fault and does not touch the others of its group."""
    puts = [
        store.put(parcel("good")),
        store.put(parcel("a", "nonsense")),
        store.put(parcel("")),
        store.put(parcel("b", priority=10)),
        store.put(parcel("c", payload=bytes(PAYLOAD_LIMIT + 1))),
        store.put(parcel("also good")),
    ]
    answers = await asyncio.gather(*puts, return_exceptions=True)
    assert [each.reason if isinstance(each, TheirsError) else "" for each in answers] == ["", "class", "idem", "priority", "oversized", ""]
    assert idems((await store.take()).items) == ["good", "also good"]


async def test_the_receiver_applies_each_key_of_each_sender_once(store: Store, clocks: Clocks) -> None:
    """A resend is a duplicate, another sender's same key is not; what is passed on enters in the same transaction or not at all."""

    def message(seq: int, idem: str, floor: int = 1) -> Deferred:
        return Deferred(incarnation="i", seq=seq, floor=floor, item_kind="event", idem=idem, payload=idem.encode())

    assert await store.accept("dev-1", message(1, "a"), forward=parcel("onward"))
    assert not await store.accept("dev-1", message(1, "a"), forward=parcel("onward again"))
    assert await store.accept("dev-2", message(1, "a"))
    with pytest.raises(TheirsError):
        await store.accept("dev-1", message(2, "b"), forward=parcel("bad", "nonsense"))
    assert not await store.seen("dev-1", "b")
    assert [(each.sender, each.payload) for each in await store.pending()] == [("dev-1", b"a"), ("dev-2", b"a")]
    assert [item.idem for item in await store.listing()] == ["onward"]
    await store.applied((await store.pending())[-1].number)
    assert await store.pending() == ()
    clocks.run(86_401)
    assert not await store.accept("dev-1", message(1, "a"))
    assert await store.accept("dev-1", message(3, "c", floor=2))
    assert not await store.seen("dev-1", "a")
    assert await store.seen("dev-2", "a")


async def test_waiting_callers_are_bounded_and_all_served(store: Store) -> None:
    """More puts at once than the writer's inbox holds: never more inside than allowed, and all of them are kept."""
    most = 0

    async def put(number: int) -> None:
        nonlocal most
        await store.put(parcel(f"{number}"))
        most = max(most, store._commands)

    await asyncio.gather(*(put(number) for number in range(3 * INBOX_COMMANDS)))
    assert most <= INBOX_COMMANDS
    stats = await store.stats()
    assert stats.items["request"] == 3 * INBOX_COMMANDS
    assert stats.committed / stats.commits > 16


async def test_a_cancelled_put_leaves_the_queue_whole(store: Store) -> None:
    """Whoever stops waiting knows nothing; the key may be put again, and neither loses nor doubles the item."""
    task = asyncio.create_task(store.put(parcel("one")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.put(parcel("one"))
    assert idems((await store.take()).items) == ["one"]
    assert store._commands == 0


async def test_the_loop_is_never_blocked(store: Store) -> None:
    """While a megabyte is written and synced again and again, the loop's other tasks go on."""
    longest, last = 0.0, asyncio.get_running_loop().time()

    async def tick() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.001)
            now = asyncio.get_running_loop().time()
            longest, last = max(longest, now - last), now

    ticking = asyncio.create_task(tick())
    payload = b"".join(number.to_bytes(4, "big") for number in range(250_000))
    for number in range(20):
        await store.put(parcel(f"{number}", payload=payload))
    ticking.cancel()
    assert 0 < longest < 0.5


async def test_only_one_process_writes_but_others_may_read(store: Store, folder: Path, clocks: Clocks) -> None:
    """A second writer is refused with a remedy; a reader on its own connection sees what was committed."""
    await store.put(parcel("one", payload=b"content"))
    with pytest.raises(WorldError) as refused:
        await opened(folder, clocks).__aenter__()
    assert refused.value.reason == "store_locked"
    reader = Inspection.open(folder)
    assert [item.idem for item in reader.list()] == ["one"]
    assert reader.payload("one") == b"content"
    assert reader.counters()["usage"]["request"][0] == 1
    reader.close()


async def test_lone_puts_are_counted_though_the_counters_wait(folder: Path, clocks: Clocks, tmp_path: Path) -> None:
    """Puts one at a time do not rewrite the counters; a reader beside them, and who opens after a kill, knows every row, and gives no `seq` twice."""
    async with opened(folder, clocks) as store:
        seqs = [(await store.put(parcel(f"{number}", key="k" * (number % 2)))).seq for number in range(70)]
        again = await store.put(parcel("3"))
        stats = await store.stats()
        killed = shutil.copytree(folder, tmp_path / "killed")
        connection = apsw.Connection(str(killed / "queue.db"))
        (written,) = connection.execute("SELECT json ->> '$.next_seq' FROM state").fetchone() or (0,)
        connection.close()
        reader = Inspection.open(folder)
        counters = reader.counters()
        reader.close()
    assert again.duplicate
    assert written <= seqs[-1], "the counters did not wait: this test shows nothing"
    assert counters["usage"]["request"] == [70, stats.bytes["request"]]
    async with opened(killed, clocks) as store:
        after = await store.stats()
        assert (after.items, after.bytes) == (stats.items, stats.bytes)
        assert (await store.put(parcel("new"))).seq > seqs[-1]
        assert [item.idem for item in await store.listing()] == [*map(str, range(70)), "new"]
        heads = [each.item.idem for each in (await store.take(items=100)).items]
        assert [idem for idem in heads if idem != "new" and int(idem) % 2] == ["1"], "of one key only the first is handed out"


async def test_a_closed_store_says_so_and_leaves_no_thread(folder: Path, clocks: Clocks) -> None:
    """After closing, a call raises instead of waiting for ever."""
    async with opened(folder, clocks) as store:
        await store.put(parcel("one"))
    with pytest.raises(WorldError) as refused:
        await store.put(parcel("two"))
    assert refused.value.reason == "store_closed"
    assert not [thread for thread in threading.enumerate() if thread.name == "store"]
    assert (folder / "lock").read_bytes() == b"0"


def test_the_real_clocks_are_read() -> None:
    """The boot id is one, boot time grows, and the kernel has a word on the wall clock."""
    first, second = read_clocks(), read_clocks()
    assert first.boot_id == second.boot_id
    assert len(first.boot_id) == 36
    assert first.boot_s < second.boot_s < math.inf
    assert isinstance(first.trusted, bool)


async def test_cores_own_policies_and_types_serve_as_rules(folder: Path) -> None:
    """The rules of `core.reach` have the shape that the store asks for."""
    rules = Rules({kind: replace(policy, max_bytes=1 << 20) for kind, policy in deferral.POLICIES.items()}, Bounds(min_free_bytes=0))
    async with Store(folder, rules, bounds.admit) as store:
        await store.put(parcel("one"))
        assert idems((await store.take()).items) == ["one"]
