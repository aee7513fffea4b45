"""The durable queue under kill -9, with the promises collected by another process, and under strace: no written file is unsynced when a promise is given."""

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.adapters.store import Store
from appliance.contract.deferral import Bounds, Deferred, Rules
from appliance.core.reach.bounds import admit
from appliance.core.reach.deferral import POLICIES

RULES = Rules(POLICIES, Bounds(min_free_bytes=0))
CHILD = textwrap.dedent(
    """
    import asyncio, os, random, sys
    from pathlib import Path
    from appliance.adapters.store import Store
    from appliance.contract.deferral import Bounds, Parcel, Rules
    from appliance.core.reach.bounds import admit
    from appliance.core.reach.deferral import POLICIES

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    async def put(store, run, producer, count):
        for number in range(count):
            idem = f"{run}-{producer}-{number}"
            size = 300_000 if number % 40 == 7 else random.Random(idem).randrange(2_000)
            await store.put(Parcel(kind="request", idem=idem, payload=random.Random(idem).randbytes(size), key=f"{producer}"))
            say("put", idem)

    async def send(store):
        while True:
            taken = await store.take(items=16)
            for each in taken.items:
                say("sent", each.item.idem)
            if taken.items:
                await store.acknowledge({each.item.seq: None for each in taken.items})
                for each in taken.items:
                    say("done", each.item.idem)
            await asyncio.sleep(0.002)

    async def main(folder, run, count):
        async with Store(Path(folder), Rules(POLICIES, Bounds(min_free_bytes=0)), admit) as store:
            say("open")
            if sys.argv[4] == "rounds":
                for number in range(count):
                    names = [f"{producer}-{number}" for producer in range(int(sys.argv[5]))]
                    payloads = (random.Random(name).randbytes(300_000 if name.endswith("-7") else 1_000) for name in names)
                    parcels = (Parcel(kind="request", idem=name, payload=payload) for name, payload in zip(names, payloads))
                    await asyncio.gather(*(store.put(parcel) for parcel in parcels))
                    for name in names:
                        say("put", name)
                return
            sending = asyncio.create_task(send(store) if sys.argv[4] == "send" else asyncio.sleep(0))
            await asyncio.gather(*(put(store, run, producer, count) for producer in range(8)))
            sending.cancel()

    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    """
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ap-", dir="/tmp") as folder:
        yield Path(folder) / "queue"


def rounds() -> int:
    """20 in the suite; `STORE_KILLS=200` for the long run."""
    return int(os.environ.get("STORE_KILLS", "20"))


@pytest.mark.slow
async def test_kill_9_loses_nothing_and_delivers_in_order(folder: Path) -> None:
    """Killed at random again and again: every promised item is delivered or still there, nothing delivered comes back, each key stays in order."""
    chance = random.Random(os.environ.get("STORE_SEED", "1"))
    promised: set[str] = set()
    done: set[str] = set()
    sent: list[str] = []
    for run in range(rounds()):
        for word, idem in killed_at_random(folder, run, chance):
            if word == "put":
                promised.add(idem)
            elif word == "done":
                done.add(idem)
            else:
                assert idem not in done, f"{idem} was sent again after its delivery was committed and told"
                sent.append(idem)
    assert len(promised) > 20 * rounds()
    async with Store(folder, RULES, admit) as store:
        assert (await store.stats()).quarantined == 0
        left: list[str] = []
        while (taken := await store.take()).items:
            for each in taken.items:
                assert each.payload == random.Random(each.item.idem).randbytes(len(each.payload))
                left.append(each.item.idem)
            await store.acknowledge({each.item.seq: None for each in taken.items})
    assert promised - set(sent) <= set(left), "lost"
    assert not done & set(left), "delivered twice"
    for producer in range(8):
        order = list(dict.fromkeys(idem for idem in (*sent, *left) if idem.split("-")[1] == f"{producer}"))
        assert order == sorted(order, key=lambda idem: [int(part) for part in idem.split("-")])


def killed_at_random(folder: Path, run: int, chance: random.Random, *, send: bool = True) -> list[tuple[str, str]]:
    """Start the child, let it open, kill it after 10 to 300 ms; return what it had said until then."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), f"{run}", "100000", "send" if send else "keep"], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        time.sleep(chance.uniform(0.01, 0.3))
        child.send_signal(signal.SIGKILL)
        lines = child.stdout.read().split("\n")
    return [(word, idem) for word, _, idem in (line.partition(" ") for line in lines[:-1])]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("producers", [8, 1])
def test_no_written_file_is_unsynced_when_a_promise_is_given(folder: Path, producers: int) -> None:
    """In groups and alone: follow every write, sync and new file of the process: whenever it tells a group's promises, nothing of the queue waits for the disk."""
    log = folder.parent / "trace"
    calls = "trace=openat,close,write,pwrite64,writev,pwritev,ftruncate,fsync,fdatasync,rename,unlink,mkdir"
    subprocess.run(
        ["strace", "-f", "-y", "-s", "64", "-e", calls, "-o", str(log), sys.executable, "-c", CHILD, str(folder), "0", "48", "rounds", f"{producers}"],
        check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    promises, dirty_promises, seen = judged(log.read_text(), str(folder))
    assert promises == producers * 48
    assert dirty_promises == []
    assert "pwrite64" in seen
    assert seen & {"fdatasync", "fsync"}


def judged(trace: str, folder: str) -> tuple[int, list[str], set[str]]:
    """Count the promises, and name those that were given while a file or a new name was unsynced.

    Exempt is what needs no sync: the shared memory of the WAL (`-shm`, rebuilt at open), the lock's byte, the checkpoint's target before its own
    sync (`queue.db`: its content is in the synced WAL until then), and payload files that are removed (an orphan is swept).
    """
    dirty: dict[str, str] = {}
    promises, bad, seen = 0, [], set()
    for line in trace.splitlines():
        call = re.search(r"^\d+ +(?:<\.\.\. )?(\w+)", line)
        name = call[1] if call else ""
        path = re.search(r"\(\d+<([^>]*)>", line)
        where = path[1] if path else ""
        if name == "write" and '"put ' in line:
            promises += 1
            if dirty:
                bad.append(f"{line}: {dirty}")
        elif where.startswith(folder):
            seen.add(name)
            if name in {"fsync", "fdatasync"}:
                dirty.pop(where, None)
            elif name in {"write", "pwrite64", "writev", "pwritev", "ftruncate"} and not where.endswith(("-shm", "/lock", "/queue.db")):
                dirty[where] = line
        elif name == "openat" and "O_CREAT" in line and (made := re.search(r'"(' + re.escape(folder) + r'/segments/[^"]+)"', line)):
            dirty[str(Path(made[1]).parent)] = line
    return promises, bad, seen


def test_the_judge_convicts() -> None:
    """A trace with an unsynced write, or an unsynced directory, is found guilty."""
    put = '7 write(1<pipe:[1]>, "put a\\n", 6) = 6'
    write = '7 pwrite64(5</q/queue.db-wal>, "..."..., 4096, 0) = 4096'
    sync = "7 fdatasync(5</q/queue.db-wal>) = 0"
    made = '7 openat(AT_FDCWD</>, "/q/segments/1.payload", O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0600) = 6</q/segments/1.payload>'
    assert judged(f"{write}\n{put}", "/q")[1]
    assert judged(f"{made}\n{put}", "/q")[1]
    assert judged(f"{write}\n{sync}\n{put}", "/q") == (1, [], {"pwrite64", "fdatasync"})


@pytest.mark.slow
def test_effects_come_exactly_once_though_receipts_are_lost(folder: Path) -> None:
    """Items of killed processes go to a receiver, and half of the receipts are lost: each promised item takes effect, and none twice."""
    effects = folder.parent / "region"
    chance = random.Random(3)
    promised: set[str] = set()
    for run in range(max(rounds() // 4, 5)):
        promised |= {idem for word, idem in killed_at_random(folder, run, chance, send=False) if word == "put"}
    asyncio.run(relayed(folder, effects, chance))
    asyncio.run(counted(effects, promised))


async def relayed(folder: Path, effects: Path, chance: random.Random) -> None:
    """Carry everything over, losing half of the receipts."""
    async with Store(folder, RULES, admit) as sender, Store(effects, RULES, admit) as receiver:
        while (taken := await sender.take()).items:
            messages = [
                Deferred(
                    incarnation=sender.incarnation,
                    seq=each.item.seq,
                    floor=taken.floor,
                    item_kind="request",
                    idem=each.item.idem,
                    payload=each.payload,
                )
                for each in taken.items
            ]
            await asyncio.gather(*(receiver.accept("dev-1", message) for message in messages))
            heard = {message.seq for message in messages if chance.random() < 0.5}
            await sender.acknowledge(dict.fromkeys(heard))
            await asyncio.gather(*(sender.retry(message.seq, 0, 0.0) for message in messages if message.seq not in heard))


async def counted(effects: Path, promised: set[str]) -> None:
    async with Store(effects, RULES, admit) as receiver:
        applied: list[str] = []
        while items := await receiver.pending(limit=512):
            applied += [item.idem for item in items]
            await receiver.applied(items[-1].number)
    assert len(applied) == len(set(applied)), "an effect came twice"
    assert set(applied) >= promised, "lost"
