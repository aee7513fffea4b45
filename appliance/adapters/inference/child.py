"""The inference child: one process that holds models and runs batches until its daemon goes.

1. It dies with its parent: the kernel kills it (PR_SET_PDEATHSIG), and the end of the socket ends it if the parent died before that was set.
2. It ignores SIGINT and SIGTERM: the daemon decides, after it has drained.
3. Nothing of it can be read from outside: not dumpable, no core file, no new privileges. Under memory pressure it is killed before the daemon.
4. When no batch has come for a while it rests: what the C library keeps for the next batch goes back to the kernel, once. The first
   batch after a rest pays for it (label reader: 10.4 ms become 11.4 to 12.8).
5. What a caller lent (`lent` segments) is mapped for reading: nothing here can write into it.
6. It is nicer than its daemon, which refuses, answers and hands out the next batch while this one computes: on a full processor that must not queue
   behind a batch. Refusals at 120 % load, all on one processor: 99th percentile 12.6 ms alike, 7.1 at 5, 4.0 at 10; admission's prediction of
   what waits was 25 % short alike, and 5 % at 10.
7. Batches run on the main thread in the order of arrival; loads on a second one, so that a model is warmed while another serves
   (onnxruntime leaves the GIL alone while it loads: longest gap 4 ms).
"""

import contextlib
import ctypes
import functools
import gc
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, ACCESS_WRITE, mmap
from pathlib import Path

import msgspec
import numpy as np

from appliance.adapters.inference import protocol, tensors
from appliance.adapters.inference.backend import Backend, make
from appliance.contract.errors import ApplianceError, TheirsError
from appliance.contract.inference import Array, Signature

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
"""Numbers of prctl(2), from linux/prctl.h."""
_OOM_SCORE = "500"
"""Half of the range: clearly before the daemon, not before everything else."""
_NICER = 10
"""Levels below the daemon (1 to 9 parts of a contended processor); other services are the control group's to weigh (systemd/)."""
_TEXT_CHARS = 2_000


@dataclass(frozen=True, slots=True)
class _Held:
    backend: Backend
    signature: Signature


class Child:
    """Serves one socket. `threads` is how many threads one batch may use, `rest_s` after how long without a batch it rests."""

    def __init__(self, sock: socket.socket, threads: int, rest_s: float) -> None:
        self._sock = sock
        self._threads = threads
        self._rest_s = rest_s
        self._resting = False
        self._ran_at = time.monotonic()
        self._libc = ctypes.CDLL(None)
        self._base_bytes = 0
        self._segments: dict[int, mmap] = {}
        self._models: dict[int, _Held] = {}
        self._loads: queue.SimpleQueue[tuple[protocol.Load, int]] = queue.SimpleQueue()

    def serve(self) -> None:
        """Answer messages until the daemon closes its end."""
        threading.Thread(target=self._load_forever, daemon=True, name="loads").start()
        _, self._base_bytes = _memory()
        self._send(protocol.Hello(0, self._measured()))
        while True:
            packet, fd = protocol.receive(self._sock)
            if not packet:
                return
            message = protocol.decode_for_child(packet)
            if isinstance(message, protocol.Run):
                self._answer(message.id, functools.partial(self._run, message))
                self._resting, self._ran_at = False, time.monotonic()
            else:
                self._obey(message, fd)

    def _obey(self, message: protocol.ToChild, fd: int | None) -> None:
        match message:
            case protocol.Load() if fd is not None:
                self._loads.put((message, fd))
            case protocol.Unload(id=number, handle=handle):
                held = self._models.pop(handle, None)
                if held is not None:
                    held.backend.unload()
                    del held
                self._trim()
                self._send(protocol.Measured(number, self._measured()))
            case protocol.Measure(id=number):
                self._send(protocol.Measured(number, self._measured()))
            case protocol.Segment(number=number, size=size, lent=lent) if fd is not None:
                self._segments[number] = mmap(fd, size, access=ACCESS_READ if lent else ACCESS_WRITE)
                os.close(fd)
            case protocol.Drop(number=number):
                del self._segments[number]

    def _load_forever(self) -> None:
        """Load what is asked for; in between, look whether it is time to rest."""
        while True:
            try:
                ask, fd = self._loads.get(timeout=self._rest_s / 2 if self._rest_s else None)
            except queue.Empty:
                if not self._resting and self._idle():
                    self._trim()
                    self._resting = self._idle()
                continue
            self._answer(ask.id, functools.partial(self._load, ask, fd))

    def _idle(self) -> bool:
        return time.monotonic() - self._ran_at >= self._rest_s

    def _load(self, ask: protocol.Load, fd: int) -> None:
        before, held_before = _memory()
        try:
            backend = make(ask.platform, self._threads, ask.options)
            _, imported = _memory()
            signature = backend.load(fd, ask.size)
        except ImportError as error:
            raise TheirsError("model", f"no run-time for {ask.platform} on this machine: {error}", remedy="install it") from error
        finally:
            os.close(fd)
        if len(signature.outputs) > protocol.OUTPUTS_MAX:
            raise TheirsError("model", f"has {len(signature.outputs)} outputs, at most {protocol.OUTPUTS_MAX} are supported")
        self._models[ask.handle] = _Held(backend, signature)
        self._libc_trim()  # parsing leaves holes: 15 of 61 MB with the label reader
        after, held = _memory()
        self._base_bytes += imported - held_before
        told = os.memfd_create("signature", os.MFD_CLOEXEC)
        try:
            os.write(told, msgspec.json.encode(signature))
            self._send(protocol.Loaded(ask.id, backend.provider, after - before, max(0, held - imported), self._measured()), told)
        finally:
            os.close(told)

    def _run(self, ask: protocol.Run) -> None:
        held = self._models.get(ask.handle)
        if held is None:  # unloaded while this batch waited for room
            raise TheirsError("model", "is not loaded any more")
        memory = self._segments[ask.segment]
        inputs = {
            spec.name: tensors.view(self._segments[segment], spec.datatype, shape, at)
            for spec, (segment, at, shape) in zip(held.signature.inputs, ask.sources, strict=True)
        }
        wanted = [spec.name for bit, spec in enumerate(held.signature.outputs) if ask.wanted >> bit & 1]
        started = time.perf_counter_ns()
        results = held.backend.run(inputs, wanted)
        busy_ns = time.perf_counter_ns() - started
        arrays = [results[name] for name in wanted]
        offsets, end = tensors.lay(ask.room_at, (array.nbytes for array in arrays))
        if end <= ask.room_at + ask.room_bytes:
            for array, at in zip(arrays, offsets, strict=True):
                np.copyto(np.ndarray(array.shape, array.dtype, memory, at), array)
            self._send(protocol.Done(ask.id, busy_ns, 0, [(at, array.shape) for array, at in zip(arrays, offsets, strict=True)]))
        else:
            self._spill(ask.id, busy_ns, arrays)

    def _spill(self, number: int, busy_ns: int, arrays: Sequence[Array]) -> None:
        offsets, end = tensors.lay(0, (array.nbytes for array in arrays))
        fd = os.memfd_create("outputs", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, end)
            with mmap(fd, end) as memory:
                for array, at in zip(arrays, offsets, strict=True):
                    np.copyto(np.ndarray(array.shape, array.dtype, memory, at), array)
            self._send(protocol.Done(number, busy_ns, end, [(at, array.shape) for array, at in zip(arrays, offsets, strict=True)]), fd)
        finally:
            os.close(fd)

    def _answer(self, number: int, work: Callable[[], None]) -> None:
        try:
            work()
        except ApplianceError as error:
            self._send(protocol.Failed(number, "memory" if error.reason == "memory" else "model", str(error)[:_TEXT_CHARS]))
        except MemoryError:
            self._send(protocol.Failed(number, "memory", "no memory"))

    def _send(self, message: protocol.ToDaemon | protocol.Done, fd: int | None = None) -> None:
        protocol.send(self._sock, protocol.encode(message), fd)

    def _measured(self) -> protocol.Memory:
        pss, held = _memory()
        return protocol.Memory(pss, held, self._base_bytes, self._resting)

    def _trim(self) -> None:
        gc.collect()
        self._libc_trim()

    def _libc_trim(self) -> None:
        """Return freed memory to the kernel; glibc keeps what lies below its heap's top otherwise."""
        with contextlib.suppress(AttributeError):  # musl has none, and needs none
            self._libc.malloc_trim(0)


def harden(parent: int) -> None:
    """Tie this process to its parent's life and close it to others. Raises: SystemExit if the parent is gone already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(0)
    with contextlib.suppress(OSError):  # before the process turns undumpable, and these files root's
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    with contextlib.suppress(OSError):  # a sandbox without setpriority(2): slower under load, and as right
        os.nice(_NICER)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def main(arguments: Sequence[str]) -> None:
    """Serve a socket. The arguments: its descriptor, the parent's pid, threads per batch, seconds until a rest."""
    fd, parent, threads = map(int, arguments[:3])
    harden(parent)
    threading.excepthook = _die
    os.set_inheritable(fd, False)  # a run-time that starts a helper process must not keep our socket open
    with socket.socket(fileno=fd) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        Child(sock, threads, float(arguments[3])).serve()


def _memory() -> tuple[int, int]:
    """This process's share of memory (PSS), and its anonymous memory, in bytes (takes about 2 ms); 0 on a kernel that does not count it."""
    found = {"Pss": 0, "Anonymous": 0}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found["Pss"], found["Anonymous"]


def _die(failure: threading.ExceptHookArgs) -> None:
    """End the process when its loading thread breaks: the daemon replaces it at once, instead of waiting for the load's deadline."""
    traceback.print_exception(failure.exc_value)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
