"""Frames in a caller's shared memory: read where they lie, whoever dies or closes meanwhile, and refused where they could hurt."""

import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from appliance.adapters.inference import shares
from appliance.adapters.inference.shares import Shares, lent
from appliance.adapters.inference.workers import Workers
from appliance.contract.errors import TheirsError
from appliance.contract.vocabulary import Platform

BYTES = 6 << 20
FRAME = np.random.default_rng(7).integers(0, 255, BYTES, np.uint8)
LITTLE = 2 << 20
"""An arena below this has seen no copy of a frame."""


def graph(nodes: list[onnx.NodeProto], inputs: list[tuple[str, int]], kind: int) -> bytes:
    values = [helper.make_tensor_value_info(name, each, ["n"]) for name, each in inputs]
    made = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", kind, [])])
    model: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return model


LARGEST = graph([helper.make_node("ReduceMax", ["x"], ["y"], keepdims=0)], [("x", TensorProto.UINT8)], TensorProto.UINT8)
PRODUCT = graph(
    [helper.make_node("Mul", ["a", "b"], ["p"]), helper.make_node("ReduceSum", ["p"], ["y"], keepdims=0)],
    [("a", TensorProto.INT64), ("b", TensorProto.INT64)],
    TensorProto.INT64,
)
SUM = graph([helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], [("x", TensorProto.FLOAT)], TensorProto.FLOAT)


def weights(content: bytes) -> Callable[[], int]:
    def opened() -> int:
        fd = os.memfd_create("weights", os.MFD_CLOEXEC)
        os.write(fd, content)
        return fd

    return opened


def sealed(size: int = BYTES, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    async with Workers(batch_deadline_s=2.0) as pool:
        await pool.load("largest", Platform.ONNX, weights(LARGEST))
        yield pool


@pytest.fixture
def fd() -> Iterator[int]:
    fd = sealed()
    yield fd
    os.close(fd)


async def largest(workers: Workers, x: np.ndarray) -> int:
    return int((await workers.run("largest", {"x": x}, ()))["y"])


def maps(pid: int | str) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:frame" in line]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def arena(workers: Workers) -> int:
    return workers.stats()[0].arena_bytes


async def test_a_frame_is_read_where_it_lies(workers: Workers, fd: int) -> None:
    """The model sees what the owner wrote last, the arena stays small, and the child maps the region for reading only."""
    share = workers.share(fd, BYTES)
    frame = np.frombuffer(share.memory, np.uint8)
    assert await largest(workers, frame) == 0
    os.pwrite(fd, b"\x07", 4_000_000)
    assert await largest(workers, frame) == 7
    assert await largest(workers, frame[64 * 62_501 :]) == 0
    assert await largest(workers, frame[64 * 62_500 :]) == 7
    assert arena(workers) < LITTLE
    [mapped] = maps(workers.pids()[0])
    assert mapped.split()[1] == "r--s"


async def test_a_batch_of_views_is_the_same_bits_as_a_batch_of_copies(workers: Workers, fd: int) -> None:
    """Sums over a shared region at any offset equal those over own arrays, bit for bit; what is strided or askew is copied, and as right."""
    await workers.load("sum", Platform.ONNX, weights(SUM))
    memory = workers.share(fd, BYTES).memory
    floats = np.frombuffer(memory, np.float32)
    floats[:] = np.random.default_rng(3).random(len(floats), np.float32)
    there = (floats, floats[16:900], floats[-16:].reshape(4, 4).reshape(16))
    copied = (floats[1:1001], floats[::2], floats[::-1], floats[:0], np.frombuffer(memory, np.float32, 1000, 2))
    assert [lent(view) is not None for view in (*there, *copied)] == [True] * len(there) + [False] * len(copied)
    for view in (*there, *copied):
        shared, own = (await workers.run("sum", {"x": view}, ()))["y"], (await workers.run("sum", {"x": view.copy()}, ()))["y"]
        assert shared.tobytes() == own.tobytes()


async def test_what_may_be_an_index_is_copied(workers: Workers, fd: int) -> None:
    """An owner cannot change an index between its check and its use: 32 and 64 bit integers never stay in its memory."""
    await workers.load("product", Platform.ONNX, weights(PRODUCT))
    integers = np.frombuffer(workers.share(fd, BYTES).memory, np.int64)[:1000]
    integers[:] = np.arange(1000)
    assert lent(integers) is None
    answer = await workers.run("product", {"a": integers, "b": np.arange(1000)}, ())
    assert int(answer["y"]) == sum(i * i for i in range(1000))


@pytest.mark.parametrize(
    ("make", "size", "remedy"),
    [
        (lambda: sealed(seals=0), BYTES, "F_ADD_SEALS, F_SEAL_SHRINK"),
        (lambda: sealed(seals=fcntl.F_SEAL_GROW), BYTES, "F_ADD_SEALS, F_SEAL_SHRINK"),
        (lambda: sealed(100), 101, "100 bytes, 101 were announced"),
        (lambda: sealed(100), 0, "100 bytes, 0 were announced"),
        (lambda: sealed(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE), BYTES, "do not seal it against writing"),
        (lambda: os.open(__file__, os.O_RDWR), 1, "memfd_create"),
        (lambda: os.pipe()[0], 1, "memfd_create"),
        (lambda: 9_999, 1, "memfd_create"),
    ],
    ids=["unsealed", "sealed otherwise", "too small", "empty", "read-only", "file", "pipe", "nothing"],
)
def test_memory_that_could_hurt_is_refused(make: Callable[[], int], size: int, remedy: str) -> None:
    """What its owner could truncate under the daemon, or what is no such memory at all, is refused with the way to make it right."""
    regions, fd = Shares(lambda _number: None), make()
    with pytest.raises(TheirsError) as caught:
        regions.open(fd, size)
    with contextlib.suppress(OSError):
        os.close(fd)
    assert caught.value.reason == "shared_memory"
    assert remedy in str(caught.value)
    assert not regions.regions


def test_regions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client cannot use up the daemon's descriptors: beyond the bound a region is refused until another is closed."""
    monkeypatch.setattr(shares, "REGIONS_MAX", 2)
    regions, fd = Shares(lambda _number: None), sealed(4096)
    first, _ = regions.open(fd, 4096), regions.open(fd, 4096)
    with pytest.raises(TheirsError, match="2 regions"):
        regions.open(fd, 4096)
    first.close()
    regions.open(fd, 4096)
    regions.close()
    os.close(fd)
    assert not regions.regions


CLIENT = """
    import fcntl, os, socket, sys, time
    fd = os.memfd_create("frame", os.MFD_ALLOW_SEALING)
    os.write(fd, bytes([3]) * int(sys.argv[2]))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"x"], [fd])
    time.sleep(60)
"""


@contextlib.contextmanager
def client() -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Another process, and the descriptor of a region that it made."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", textwrap.dedent(CLIENT), str(theirs.fileno()), str(BYTES)]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
            _, [fd], _, _ = socket.recv_fds(ours, 1, 1)
            yield fd, process
            os.close(fd)
            process.kill()


async def test_a_dead_client_takes_nothing_with_it(workers: Workers) -> None:
    """The region of a client that was killed is still read right, and gone when it is closed."""
    with client() as (fd, process):
        share = workers.share(fd, BYTES)
        frame = np.frombuffer(share.memory, np.uint8)
        assert await largest(workers, frame) == 3
        process.kill()
        process.wait()
    assert await largest(workers, frame) == 3
    share.close()
    del frame
    assert not maps("self")


async def test_a_replaced_child_reads_the_same_region(workers: Workers, fd: int) -> None:
    """After a crash the new child is told of the region with the first batch that lies in it."""
    frame = np.frombuffer(workers.share(fd, BYTES).memory, np.uint8)
    frame[:] = FRAME
    assert await largest(workers, frame) == FRAME.max()
    [pid] = workers.pids()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while workers.pids() in ([pid], []):  # noqa: ASYNC110  (what is waited for happens in another process)
            await asyncio.sleep(0.01)
    assert await largest(workers, frame) == FRAME.max()
    assert arena(workers) < LITTLE
    assert len(maps(workers.pids()[0])) == 1


async def test_closing_during_a_run_is_safe(workers: Workers, fd: int) -> None:
    """Batches on their way are answered right, later ones over the same array too (copied), and the child keeps no mapping."""
    share = workers.share(fd, BYTES)
    frame = np.frombuffer(share.memory, np.uint8)
    frame[:] = FRAME
    runs = [asyncio.create_task(largest(workers, frame[64 * size :])) for size in range(8)]
    await asyncio.sleep(0)  # two are with the child, six wait for their turn
    share.close()
    share.close()
    assert await asyncio.gather(*runs) == [FRAME[64 * size :].max() for size in range(8)]
    assert arena(workers) > LITTLE
    assert await largest(workers, frame) == FRAME.max()
    assert not maps(workers.pids()[0])
    with pytest.raises(TheirsError, match="closed"):
        share.memory  # noqa: B018  (it is the access that raises)
    assert len(maps("self")) == 1  # `frame` is still here
    del frame, runs
    gc.collect()
    assert not maps("self")


async def test_a_region_that_closes_while_a_batch_waits_for_room_is_copied(fd: int) -> None:
    """Where the arena is full the batch decides anew when it has room: nothing refers to a region that the child has forgotten."""
    from appliance.adapters.inference.limits import Limits  # noqa: PLC0415  (of this test alone)

    async with Workers(limits=Limits(arena_bytes=BYTES, depth=3)) as workers:
        await workers.load("largest", Platform.ONNX, weights(LARGEST))
        share = workers.share(fd, BYTES)
        frame = np.frombuffer(share.memory, np.uint8)
        frame[:] = FRAME
        own = [asyncio.create_task(largest(workers, FRAME)) for _ in range(2)]
        await asyncio.sleep(0)
        shared = asyncio.create_task(largest(workers, frame[64:]))
        await asyncio.sleep(0)
        share.close()
        assert await asyncio.gather(*own, shared) == [FRAME.max(), FRAME.max(), FRAME[64:].max()]


async def test_closing_the_engine_closes_its_regions() -> None:
    """No descriptor and no mapping is left, although nobody closed the region."""
    before, fd = descriptors(), sealed()
    async with Workers() as workers:
        await workers.load("largest", Platform.ONNX, weights(LARGEST))
        assert await largest(workers, np.frombuffer(workers.share(fd, BYTES).memory, np.uint8)) == 0
    os.close(fd)
    gc.collect()
    assert not maps("self")
    assert descriptors() <= before
