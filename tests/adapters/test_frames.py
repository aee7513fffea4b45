"""Memory that callers lend: it reaches the desk uncopied, nobody can use another's, and whoever breaks the rules or dies leaves nothing behind."""

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import shutil
import socket as sockets
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st

from appliance.adapters.inference.shares import Shares, lent
from appliance.adapters.ingress import Bounds, Ingress
from appliance.adapters.ingress.regions import LentRegions, Owner
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.frames import MAX_MESSAGE_BYTES, SOCKET
from appliance.contract.openinference import parse
from tests.fakes.desk import DoublingDesk

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`

PAGE = 4096
BOUNDS = Bounds(header_timeout_s=0.3, close_s=0.2, lenders=3, regions=2, region_bytes=4 * PAGE, all_regions=3, all_regions_bytes=5 * PAGE)
X = np.array([[0.5, -2.5, 3.0, 7.0]], np.float32)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def memfd(size: int = PAGE, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_only() -> int:
    fd = memfd()
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return again


def plain_file() -> int:
    fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    os.ftruncate(fd, PAGE)
    return fd


def register(size: int = PAGE) -> bytes:
    return json.dumps({"ask": "register", "byte_size": size}).encode()


class Lender:
    """A raw connection to the frames socket."""

    def __init__(self, path: Path) -> None:
        self.socket = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.socket.connect(str(path))

    async def say(self, packet: bytes, *fds: int) -> dict[str, Any]:
        """Send a message with descriptors and read the answer; empty if the other side has closed."""
        sockets.send_fds(self.socket, [packet], fds)
        return await self.hear()

    async def hear(self) -> dict[str, Any]:
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                return json.loads(await asyncio.get_running_loop().sock_recv(self.socket, MAX_MESSAGE_BYTES) or b"{}")
        return {}

    async def lend(self, content: bytes = bytes(PAGE)) -> tuple[str, int]:
        """Register memory that holds `content`; return the region's name and the descriptor."""
        fd = memfd(max(len(content), PAGE))
        os.pwrite(fd, content, 0)
        return (await self.say(register(max(len(content), PAGE)), fd))["region"], fd


async def until(holds: Callable[[], bool]) -> None:
    """Wait until it holds, for 5 s at most."""
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it never came to hold")


def descriptors() -> int:
    """How many descriptors of lent memory this process has open."""
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that reads the folder
            found += "memfd:test" in str(each.readlink())
    return found


class Served:
    """A running ingress with frames, its desk, and the engine's part that maps memory."""

    def __init__(self, folder: Path) -> None:
        self.desk = DoublingDesk()
        self.shares = Shares(lambda _number: None)
        self.path = folder / SOCKET
        self.ingress = Ingress(
            self.desk,
            metrics=lambda: b"",
            status=dict,
            bounds=BOUNDS,
            share=self.shares.open,
        )

    @property
    def mapped(self) -> int:
        regions = self.ingress._regions
        assert regions is not None
        assert (regions.count == 0) == (regions.size == 0)
        assert regions.count == len(self.shares.regions)
        return regions.count

    async def until(self, mapped: int) -> None:
        """Wait until so many regions are mapped."""
        await until(lambda: self.mapped == mapped)

    async def post(self, request: dict[str, Any], path: str = "/v2/models/double/infer") -> tuple[int, dict[str, Any]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ingress.port)
        body = json.dumps(request).encode()
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(5):
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), json.loads(answer)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """An ingress that takes memory; afterwards nothing is mapped and no descriptor is left."""
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    before = descriptors()
    served = Served(folder)
    await served.ingress.start("127.0.0.1", 0, None, served.path)
    yield served
    served.desk.asked.clear()
    gc.collect()
    await served.ingress.close()
    await asyncio.sleep(0)
    assert served.mapped == 0
    assert not served.path.exists()
    assert descriptors() == before
    shutil.rmtree(folder)


@pytest.fixture
async def lender(served: Served) -> AsyncIterator[Lender]:
    lender = Lender(served.path)
    yield lender
    lender.socket.close()
    await served.until(0)


def request(region: str, size: int = 16, offset: int | None = None, output: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    part = {"shared_memory_region": region, "shared_memory_byte_size": size} | ({} if offset is None else {"shared_memory_offset": offset})
    asked: dict[str, Any] = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": part, **changes}]}
    return asked | ({} if output is None else {"outputs": [{"name": "y", "parameters": output}]})


async def test_input_and_output_stay_in_the_callers_memory(served: Served, lender: Lender) -> None:
    """The desk sees the caller's memory itself, read-only and known to the engine; the output is put where the caller said, and the answer says so."""
    name, fd = await lender.lend(bytes(64) + X.tobytes())
    room = {"shared_memory_region": name, "shared_memory_offset": 128, "shared_memory_byte_size": 64}
    status, answer = await served.post(request(name, offset=64, output=room))
    assert status == 200
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4], "parameters": {**room, "shared_memory_byte_size": 16}}]
    assert os.pread(fd, 16, 128) == (X * 2).tobytes()
    seen = served.desk.asked.pop().inputs["x"]
    found = lent(seen)
    assert found is not None
    assert found[1] == 64
    assert not seen.flags.writeable
    os.pwrite(fd, np.float32(9).tobytes(), 64)
    assert seen[0, 0] == 9
    os.close(fd)


async def test_tritons_client_uses_a_region_by_its_own_words(served: Served, lender: Lender) -> None:
    """`set_shared_memory` of Triton's client works with the name that the frames socket gave."""
    name, fd = await lender.lend(X.tobytes())

    def ask() -> Any:
        client = triton.InferenceServerClient(f"127.0.0.1:{served.ingress.port}")
        try:
            tensor = triton.InferInput("x", [1, 4], "FP32")
            tensor.set_shared_memory(name, 16)
            wanted = triton.InferRequestedOutput("y")
            wanted.set_shared_memory(name, 16, offset=64)
            return client.infer("double", [tensor], outputs=[wanted]).get_output("y")
        finally:
            client.close()

    output = await asyncio.to_thread(ask)
    assert (output["shape"], output["parameters"]["shared_memory_byte_size"]) == ([1, 4], 16)
    assert os.pread(fd, 16, 64) == (X * 2).tobytes()
    served.desk.asked.clear()
    os.close(fd)


ABUSE: dict[str, tuple[bytes, list[Callable[[], int]], str]] = {
    "no descriptor": (register(), [], "descriptors"),
    "two descriptors": (register(), [memfd, memfd], "descriptors"),
    "ten descriptors": (register(), [memfd] * 10, "descriptors"),
    "a descriptor with unregister": (b'{"ask":"unregister","region":"x"}', [memfd], "descriptors"),
    "size of nothing": (register(0), [memfd], "shared_memory"),
    "negative size": (register(-1), [memfd], "shared_memory"),
    "more than it holds": (register(PAGE + 1), [memfd], "shared_memory"),
    "more than one may have": (register(5 * PAGE), [lambda: memfd(5 * PAGE)], "region_limit"),
    "beyond all numbers": (register(2**70), [memfd], "region_limit"),
    "unsealed": (register(), [lambda: memfd(seals=0)], "shared_memory"),
    "sealed against growing only": (register(), [lambda: memfd(seals=fcntl.F_SEAL_GROW)], "shared_memory"),
    "sealed against writing": (register(), [lambda: memfd(seals=SEALS | fcntl.F_SEAL_WRITE)], "shared_memory"),
    "read-only": (register(), [read_only], "shared_memory"),
    "a file": (register(), [plain_file], "shared_memory"),
    "a pipe": (register(), [lambda: os.dup(2)], "shared_memory"),
    "no JSON": (b"\xff\xfe", [memfd], "malformed"),
    "no message": (b'{"ask":"sing"}', [], "malformed"),
    "a size that is none": (b'{"ask":"register","byte_size":"1"}', [memfd], "malformed"),
    "deeply nested": (b"[" * 4000, [], "malformed"),
    "too long": (b" " * (MAX_MESSAGE_BYTES + 1), [memfd], "oversized"),
    "a region that is none": (b'{"ask":"unregister","region":"x"}', [], "unknown_region"),
}


@pytest.mark.parametrize("abuse", ABUSE)
async def test_what_breaks_the_rules_is_refused_by_name(served: Served, lender: Lender, abuse: str) -> None:
    """A wrong message or descriptor is refused with its reason, leaves nothing open, and the connection goes on."""
    packet, make, reason = ABUSE[abuse]
    fds = [each() for each in make]
    answer = await lender.say(packet, *fds)
    for fd in fds:
        os.close(fd)
    assert answer["reason"] == reason
    assert answer["error"]
    assert served.mapped == 0
    fd = memfd()
    assert (await lender.say(register(), fd)).keys() == {"region"}
    os.close(fd)


async def test_regions_are_bounded_for_each_and_for_all(served: Served, lender: Lender) -> None:
    """One too many, or too large, is refused, whoever asks; what is taken back makes room."""
    fd, big = memfd(2 * PAGE), memfd(4 * PAGE)
    first = (await lender.say(register(), fd))["region"]
    assert "region" in await lender.say(register(), fd)
    assert (await lender.say(register(), fd))["reason"] == "region_limit"
    other = Lender(served.path)
    assert (await other.say(register(4 * PAGE), big))["reason"] == "region_limit"
    assert "region" in await other.say(register(2 * PAGE), fd)
    assert (await other.say(register(), fd))["reason"] == "region_limit"  # three of three
    assert (await other.say(json.dumps({"ask": "unregister", "region": first}).encode()))["reason"] == "unknown_region"
    assert await lender.say(json.dumps({"ask": "unregister", "region": first}).encode()) == {"region": first}
    assert "region" in await other.say(register(), fd)
    other.socket.close()
    await served.until(1)
    os.close(fd)
    os.close(big)


async def test_one_connection_too_many_is_told_so(served: Served) -> None:
    """Beyond the bound a connection is answered and closed; a place that becomes free is given again."""
    lenders = [Lender(served.path) for _ in range(BOUNDS.lenders + 1)]
    assert (await lenders[-1].hear())["reason"] == "region_limit"
    assert await lenders[-1].hear() == {}
    for each in lenders:
        each.socket.close()
    await asyncio.sleep(0.05)
    again, fd = Lender(served.path), memfd()
    assert "region" in await again.say(register(), fd)
    again.socket.close()
    os.close(fd)
    await served.until(0)


async def test_who_does_nothing_or_never_reads_is_let_go(served: Served) -> None:
    """A connection without a region ends after the header time; one that does not read its answers ends when they no longer fit."""
    idle, deaf = Lender(served.path), Lender(served.path)
    for _ in range(100_000):
        try:
            deaf.socket.send(b"{}")
        except BlockingIOError:
            await asyncio.sleep(0)
        except (BrokenPipeError, ConnectionResetError):
            break
    else:
        pytest.fail("it went on")
    assert await idle.hear() == {}
    for each in (idle, deaf):
        each.socket.close()


async def test_a_killed_client_leaves_nothing_behind(served: Served) -> None:
    """The regions of a process end with it, however it ends."""
    script = f"""
        import fcntl, os, socket, sys, time
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING); os.ftruncate(fd, 4096); fcntl.fcntl(fd, fcntl.F_ADD_SEALS, {SEALS})
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])
        socket.send_fds(s, [b'{{"ask":"register","byte_size":4096}}'], [fd]); print(s.recv(999).decode(), flush=True); time.sleep(60)
    """
    arguments = ("-c", textwrap.dedent(script), str(served.path))
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    name = json.loads(await process.stdout.readline())["region"]
    assert served.mapped == 1
    process.kill()
    await process.wait()
    await served.until(0)
    assert (await served.post(request(name)))[0] == 404


async def test_a_region_is_of_use_to_nobody_who_was_not_told(served: Served, lender: Lender) -> None:
    """Names are long and random; another name, a gone one, and none at all are the same 404."""
    name, fd = await lender.lend(X.tobytes())
    other, other_fd = await lender.lend()
    os.close(other_fd)
    assert name != other
    assert min(len(name), len(other)) == 24
    await lender.say(json.dumps({"ask": "unregister", "region": other}).encode())
    for guess in (other, name[:-1], name.swapcase(), "", "frame"):
        status, answer = await served.post(request(guess))
        assert (status, answer["reason"]) == (404, "unknown_region")
        assert "input 'x'" in answer["error"]
    assert served.desk.asked == []
    os.close(fd)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": PAGE + 4}, "do not lie"),
        ({"offset": PAGE - 12}, "do not lie"),
        ({"offset": -4}, "do not lie"),
        ({"offset": 2**63}, "do not lie"),
        ({"size": 0}, "do not lie"),
        ({"size": 12}, "needs 16 bytes"),
        ({"shape": [1, 5]}, "needs 20 bytes"),
        ({"data": [1, 2, 3, 4]}, "both data and a shared_memory_region"),
        ({"parameters": {"shared_memory_byte_size": 16}}, "no shared_memory_region"),
        ({"parameters": {"shared_memory_region": "NAME"}}, "no shared_memory_byte_size"),
        ({"parameters": {"shared_memory_region": "NAME", "shared_memory_byte_size": 16, "binary_data_size": 0}}, "binary_data_size"),
        ({"output": {"shared_memory_region": "NAME", "shared_memory_byte_size": 12}}, "takes 16 bytes"),
        ({"output": {"shared_memory_region": "NAME", "shared_memory_byte_size": PAGE + 1}}, "output 'y'"),
        ({"output": {"shared_memory_region": "NAME"}}, "no shared_memory_byte_size"),
    ],
)
async def test_a_part_that_does_not_fit_is_refused(served: Served, lender: Lender, changes: dict[str, Any], words: str) -> None:
    """What lies outside the region, or is not what the shape says, is the caller's fault by name."""
    name, fd = await lender.lend(X.tobytes())
    told = json.loads(json.dumps(changes).replace("NAME", name))
    status, answer = await served.post(request(name, **told))
    assert (status, words in answer["error"]) == (400, True), answer
    served.desk.asked.clear()
    os.close(fd)


async def test_a_region_that_ends_during_the_request_is_kept_until_it_is_answered(served: Served) -> None:
    """Its owner may close or die while a request runs: the answer is right, and then the memory goes."""
    lender, served.desk.gate = Lender(served.path), asyncio.Event()
    name, fd = await lender.lend(X.tobytes())
    asked = asyncio.create_task(served.post(request(name)))
    await until(lambda: bool(served.desk.asked))
    lender.socket.close()
    await asyncio.sleep(0.05)
    assert served.mapped == 1
    assert (await served.post(request(name)))[0] == 404
    served.desk.gate.set()
    status, answer = await asked
    assert (status, answer["outputs"][0]["data"]) == (200, (X * 2).ravel().tolist())
    assert served.mapped == 1  # this test's desk keeps what it was asked, as a batch does whose caller is gone
    served.desk.asked.clear()
    await served.until(0)
    os.close(fd)


@pytest.mark.parametrize("kind", ["system", "cuda"])
@pytest.mark.parametrize("ask", ["region/a/register", "region/a/unregister", "unregister"])
async def test_tritons_way_of_registering_says_why_not(served: Served, kind: str, ask: str) -> None:
    """Memory by name is not taken, and the answer points to what is."""
    status, answer = await served.post({}, f"/v2/{kind}sharedmemory/{ask}")
    assert (status, answer["reason"]) == (501, "unsupported")
    assert SOCKET in answer["error"]


async def test_tritons_client_is_told_as_well(served: Served) -> None:
    """`status` too is answered with the reason."""

    def ask() -> None:
        client = triton.InferenceServerClient(f"127.0.0.1:{served.ingress.port}")
        try:
            client.get_system_shared_memory_status()
        finally:
            client.close()

    with pytest.raises(triton.InferenceServerException, match=SOCKET):
        await asyncio.to_thread(ask)


async def test_without_an_engine_that_shares_memory_is_not_served() -> None:
    """An ingress that was given no way to map memory opens no frames socket and says so in its refusals."""
    ingress = Ingress(DoublingDesk(), metrics=lambda: b"", status=dict, bounds=BOUNDS)
    folder = Path(tempfile.mkdtemp(prefix="ap-", dir="/tmp"))
    await ingress.start("127.0.0.1", 0, None, folder / SOCKET)
    assert not (folder / SOCKET).exists()
    await ingress.close()
    shutil.rmtree(folder)


async def test_the_socket_is_for_the_daemons_group_and_for_one_daemon(served: Served) -> None:
    """It has the permissions of the API's socket, and a second daemon does not take it."""
    assert served.path.stat().st_mode & 0o777 == 0o660
    second = Served(served.path.parent)
    with pytest.raises(WorldError, match="listen"):
        await second.ingress.start("127.0.0.1", 0, None, served.path)
    await second.ingress.close()
    assert served.path.exists()


def test_what_is_checked_is_copied_first() -> None:
    """BOOL bytes are checked, so their owner must not be able to change them afterwards; FP32 stays where it is."""
    memory = np.zeros(64, np.uint8)

    class Whole:
        def lend(self, _region: str, offset: int, size: int, *, writable: bool) -> Any:
            part = memory[offset : offset + size]
            part.flags.writeable = writable
            return part

    def read(datatype: str, size: int) -> Any:
        part = {"shared_memory_region": "r", "shared_memory_byte_size": size}
        body = json.dumps({"inputs": [{"name": "x", "shape": [4], "datatype": datatype, "parameters": part}]}).encode()
        return parse("m", "", None, body, Whole()).request.inputs["x"]

    flags, floats = read("BOOL", 4), read("FP32", 16)
    memory[:] = 2
    assert flags.tolist() == [False] * 4
    assert floats[0] != 0
    with pytest.raises(TheirsError, match="neither 0 nor 1"):
        read("BOOL", 4)


class Paper:
    """A share of bytes; `close` while an array over it lives is what must not happen."""

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size)
        self.closed = 0

    @property
    def memory(self) -> memoryview:
        assert not self.closed
        return memoryview(self._bytes)

    def close(self) -> None:
        self._bytes.append(0)  # a BufferError while it is exported
        self.closed += 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["register", "unregister", "leave", "lend", "drop"]), st.integers(0, 3), st.integers(1, 3)), max_size=30
    )
)
def test_memory_is_unmapped_once_and_never_under_an_array(steps: list[tuple[str, int, int]]) -> None:
    """Whatever the order of registering, lending, taking back and dying: bounds hold, each share is closed once, and only when nothing uses it."""
    shares: list[Paper] = []
    arrays: list[Any] = []

    def share(_fd: int, size: int) -> Paper:
        shares.append(Paper(size))
        return shares[-1]

    async def run() -> None:
        regions = LentRegions(share, BOUNDS)
        owners = [Owner() for _ in range(4)]
        for what, who, size in steps:
            owner = owners[who]
            name = next(iter(owner.names), "none")
            do: dict[str, Callable[[], object]] = {
                "register": lambda owner=owner, size=size: regions.register(owner, 0, size * PAGE),
                "unregister": lambda owner=owner, name=name: regions.unregister(owner, name),
                "leave": lambda owner=owner: regions.leave(owner),
                "lend": lambda name=name, size=size: arrays.append(regions.lend(name, 0, size, writable=True).reshape(1, size)),
                "drop": arrays.clear,
            }
            with contextlib.suppress(TheirsError, WorldError):
                do[what]()
            await asyncio.sleep(0)
            opened = [each for each in shares if not each.closed]
            assert (regions.count, regions.size) == (len(opened), sum(len(each.memory) for each in opened))
            assert regions.count <= BOUNDS.all_regions
            assert regions.size <= BOUNDS.all_regions_bytes
        for owner in owners:
            regions.leave(owner)
        arrays.clear()
        await asyncio.sleep(0)
        assert [each.closed for each in shares] == [1] * len(shares)
        assert (regions.count, regions.size) == (0, 0)

    asyncio.run(run())
