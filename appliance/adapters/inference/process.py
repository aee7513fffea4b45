"""The daemon's view of one child process: its start, its work in flight, its end.

1. A process lives once. Whatever ends it (exit, hang, a broken packet) fails everything in flight with `worker_lost` at once.
2. Past the deadline of what comes first (`lanes`) the child hangs, and SIGKILL ends it, stopped or not. Before that is judged,
   the socket is read: a daemon that slept itself must not blame its child.
3. A child that says what it must not (a tensor outside its room, an answer out of turn) is ended like one that hangs.
4. A process that is to `leave` is ended as soon as nothing is in flight in it.
5. It is reaped through a pidfd: no thread, no SIGCHLD handler, and nobody else's children.
"""

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from appliance.adapters.inference import protocol
from appliance.adapters.inference.arena import Segment
from appliance.adapters.inference.exchange import Exchange, Form
from appliance.adapters.inference.lanes import Lane, Pending
from appliance.adapters.inference.recipe import Recipe, start
from appliance.adapters.inference.shares import Lent
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.contract.inference import DTYPES, Array, Signature
from appliance.contract.vocabulary import Platform

_SIGNATURE_BYTES = 16_777_216
"""Metadata is at most 1 MiB, and JSON may escape a byte into six; the rest is names."""

OnLost = Callable[["Process", str, tuple[str, ...]], None]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a successful load said; the file's size and the growth on the GPU are added by who knows them."""

    signature: Signature
    provider: str
    grew_bytes: int
    needs_bytes: int
    weights_bytes: int = 0
    gpu_bytes: int = 0


class Process:
    """One child process, started by construction; `on_lost(process, cause, models at work)` is called once unless it is closed first.

    Make it in the thread of a running event loop that lives as long as the daemon: the kernel kills a child when the
    thread that started it ends. Raises: WorldError (`worker_lost`) if no process can be started.
    """

    def __init__(self, recipe: Recipe, on_lost: OnLost) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits = recipe.limits
        self._options = recipe.options
        self._on_lost = on_lost
        self._ids = itertools.count(1)
        self._batches = Lane(self._loop, self._judge)
        self._loads = Lane(self._loop, self._judge)
        self._reaped = asyncio.Event()
        self._leaving = False
        self.alive = True
        self.exchange = Exchange(limits.arena_bytes, self._announce, self._retire, self._lend)
        self.memory: protocol.Memory | None = None
        self.busy_ns = 0
        self.batches = 0
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)
        try:
            self._popen, self._pidfd = start(theirs.fileno(), recipe)
        except OSError as error:
            self._sock.close()
            raise WorldError("worker_lost", f"no process could be started: {error}", where="inference child") from error
        finally:
            theirs.close()
        self._loop.add_reader(self._sock, self._read)
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._popen.pid

    @property
    def exit_status(self) -> int | None:
        """How it ended: a status, or minus the signal; None while it runs."""
        return self._popen.returncode

    @property
    def rss_bytes(self) -> int | None:
        """Its resident memory, shared pages included."""
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/{self.pid}/statm", os.O_RDONLY)
            try:
                return int(os.read(fd, 256).split()[1]) * os.sysconf("SC_PAGE_SIZE")
            finally:
                os.close(fd)
        return None

    @property
    def in_flight(self) -> int:
        """Batches that the child holds."""
        return len(self._batches)

    async def hello(self) -> None:
        """Return when the child is up. Raises: WorldError (`worker_lost`)."""
        await self._loads.add(Pending(0, "", self._limits.start_deadline_s, self._loop.create_future()))

    async def load(self, handle: int, model: str, platform: Platform, fd: int) -> LoadReport:
        """Load a model from a descriptor that stays the caller's.

        Raises: TheirsError (`model`), WorldError (`memory`, `worker_lost`).
        """
        pending = Pending(next(self._ids), model, self._limits.load_deadline_s, self._loop.create_future())
        self._post(protocol.Load(pending.id, handle, platform, os.fstat(fd).st_size, self._options), fd)
        report: LoadReport = await self._loads.add(pending)
        return report

    async def unload(self, handle: int) -> None:
        """Return when the model's memory is given back. Raises: WorldError (`worker_lost`)."""
        await self._aside(lambda number: protocol.Unload(number, handle))

    def run(
        self, handle: int, model: str, form: Form, batch: tuple[Mapping[str, Array], Sequence[str]], left: Callable[[], None]
    ) -> asyncio.Future[dict[str, Array]] | None:
        """Send a checked batch (its inputs, and the names of the wanted outputs); None if its tensors find no room now.

        The future raises TheirsError (`model`, `oversized`), WorldError (`memory`, `worker_lost`); cancelling it leaves the batch in the
        child. `left` is called when the child is done with it.
        Raises: the last three.
        """
        parcel = self.exchange.put(form, *batch)
        if parcel is None:
            return None
        future: asyncio.Future[dict[str, Array]] = self._loop.create_future()
        pending = Pending(next(self._ids), model, self._limits.batch_deadline_s, future, parcel, left)
        self._post(
            protocol.Run(pending.id, handle, parcel.region.segment.number, parcel.room_at, parcel.room_bytes, parcel.wanted, parcel.sources)
        )
        self._batches.add(pending)
        return future

    def measure(self) -> None:
        """Ask the child for its memory, if it is idle; `memory` changes when it answers."""
        if self.alive and not self._batches:
            with contextlib.suppress(WorldError):
                self._aside(protocol.Measure).cancel()  # nobody waits

    def forget(self, number: int) -> None:
        """Tell the child, if it knows of it, that a lent region is gone; batches that were sent before still read it."""
        if self.alive and self.exchange.forget(number):
            with contextlib.suppress(WorldError):
                self._post(protocol.Drop(number))

    def leave(self) -> None:
        """End the process when what is in flight is answered; nobody is told. Give it nothing new."""
        self._leaving = True
        self._part()

    def kill(self, cause: str) -> None:
        """End the process now; with the cause `closed` nobody is told."""
        self._end(cause)

    async def reaped(self) -> None:
        """Return when the kernel has let the process go."""
        await self._reaped.wait()

    def _aside(self, message: Callable[[int], protocol.ToChild]) -> asyncio.Future[None]:
        pending = Pending(next(self._ids), "", self._limits.batch_deadline_s, self._loop.create_future())
        self._post(message(pending.id))
        return self._batches.add(pending)

    def _part(self) -> None:
        if self._leaving and not (self._batches or self._loads):
            self._end("closed")

    def _lend(self, mapping: Lent) -> None:
        self._post(protocol.Segment(mapping.number, len(mapping), lent=True), mapping.fd)

    def _announce(self, segment: Segment, fd: int) -> None:
        self._post(protocol.Segment(segment.number, segment.ranges.size), fd)

    def _retire(self, segment: Segment) -> None:
        with contextlib.suppress(WorldError):
            self._post(protocol.Drop(segment.number))

    def _post(self, message: protocol.ToChild | protocol.Run, fd: int | None = None) -> None:
        try:
            protocol.send(self._sock, protocol.encode(message), fd)
        except OSError as error:  # gone, or so stuck that its socket is full: at most `depth` batches are ever on their way
            self._end("exited")
            raise _lost() from error

    def _read(self) -> bool:
        """Receive one packet; False if there is none."""
        try:
            packet, fd = protocol.receive(self._sock)
        except BlockingIOError:
            return False
        except (OSError, OursError):
            self._end("exited")
            return False
        try:
            if packet:
                self._take(protocol.decode_for_daemon(packet), fd)
                if self._leaving:
                    self._part()
            else:
                self._end("exited")
        except OursError:
            self._end("protocol")
        finally:
            if fd is not None:
                os.close(fd)
        return self.alive

    def _take(self, message: protocol.ToDaemon | protocol.Done, fd: int | None) -> None:
        match message:
            case protocol.Done():
                self._finish(message, fd)
            case protocol.Loaded():
                self.memory = message.memory
                report = LoadReport(_signature(fd), message.provider, message.grew_bytes, message.needs_bytes)
                _settle(self._loads.take(message.id), report)
            case protocol.Failed():
                self._fail(message)
            case protocol.Measured():
                self.memory = message.memory
                _settle(_without_parcel(self._batches.take(message.id)), None)
            case protocol.Hello():
                self.memory = message.memory
                _settle(self._loads.take(0), None)

    def _finish(self, done: protocol.Done, fd: int | None) -> None:
        pending = self._batches.take(done.id)
        if pending.parcel is None:
            raise OursError("protocol", f"{done.id} was no batch")
        self.busy_ns += done.busy_ns
        self.batches += 1
        try:
            if not pending.future.done():
                _settle(pending, self.exchange.open(pending.parcel, done, fd))
        except TheirsError as error:
            pending.future.set_exception(error)
        except OursError:
            pending.future.set_exception(_lost())
            raise
        finally:
            self.exchange.drop(pending.parcel)

    def _fail(self, failed: protocol.Failed) -> None:
        pending = (self._batches if failed.id in self._batches else self._loads).take(failed.id)
        if pending.parcel is not None:
            self.exchange.drop(pending.parcel)
        error = WorldError if failed.fault == "memory" else TheirsError
        _settle(pending, error(failed.fault, failed.text, where=f"model {pending.model!r}"))

    def _judge(self, lane: Lane) -> None:
        while self._read():
            pass
        due = lane.due()
        if due is not None and due <= self._loop.time():
            self._end("hang")
        else:
            lane.arm()

    def _end(self, cause: str) -> None:
        if not self.alive:
            return
        self.alive = False
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._popen.kill()
        busy = self._batches.fail(_lost) + self._loads.fail(_lost)
        self.exchange.close()
        if cause != "closed":
            self._on_lost(self, cause, busy)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._popen.poll()
        self._end("exited")
        self._reaped.set()


def _without_parcel(pending: Pending) -> Pending:
    if pending.parcel is not None:
        raise OursError("protocol", f"{pending.id} was a batch")
    return pending


def _settle(pending: Pending, result: object) -> None:
    if pending.future.done():
        return
    if isinstance(result, ApplianceError):
        pending.future.set_exception(result)
    else:
        pending.future.set_result(result)


def _signature(fd: int | None) -> Signature:
    if fd is None:
        raise OursError("protocol", "a signature came without its descriptor")
    try:
        signature = msgspec.json.decode(os.pread(fd, _SIGNATURE_BYTES, 0), type=Signature)
    except msgspec.MsgspecError as error:
        raise OursError("protocol", str(error)) from error
    if any(spec.datatype not in DTYPES for spec in signature.inputs + signature.outputs):
        raise OursError("protocol", "a signature has elements without a fixed size")
    return signature


def _lost() -> WorldError:
    return WorldError(
        "worker_lost",
        "the process was lost while it worked; a new one takes over",
        where="inference child",
        remedy="try again",
        retry_after_s=1.0,
    )
