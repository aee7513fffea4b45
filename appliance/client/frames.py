"""Frames: memory that this program shares with the appliance, so that a large tensor is written once and never sent.

A frame is anonymous memory (memfd), sealed so that nobody can shrink it; it is registered with a server's frames socket when it is first used
there (contract.frames). A server without that socket gets the frame's bytes in the request's body: the answer is the same, only later.
"""

import contextlib
import fcntl
import math
import mmap
import os
import socket
import threading
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from appliance.contract import frames
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import DATATYPES, Array

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Answer(msgspec.Struct):
    region: str = ""
    error: str = ""
    reason: str = ""


class Frame:
    """One tensor in shared memory: write into `array`, give the frame as an input, or as a place for an output.

    It may be used over and over, at several servers, by the sync and the async client. The model sees what the array holds while the call runs:
    write again when it has returned. After `close`, arrays that were made of it are still readable, and are no longer shared.
    Raises: TheirsError (`datatype`, `shape`), WorldError (`memory`).
    """

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.fd = -1
        kind: np.dtype[Any] = np.dtype(dtype)
        if kind not in DATATYPES:
            raise TheirsError("datatype", f"arrays of {kind} cannot be shared, only {', '.join(DATATYPES.values())}")
        self.nbytes = math.prod(shape) * kind.itemsize
        if self.nbytes < 1:
            raise TheirsError("shape", f"a frame of shape {list(shape)} holds nothing")
        try:
            self.fd = os.memfd_create("frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, self.nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(self.fd, self.nbytes)
        except OSError as error:
            self.close()
            raise WorldError("memory", f"no shared memory of {self.nbytes} bytes: {error.strerror}") from error
        self._array: Array | None = np.ndarray(shape, kind, memory)
        self.lenders: weakref.WeakSet[Lender] = weakref.WeakSet()

    @property
    def array(self) -> Array:
        """The frame's memory, writable. Raises: TheirsError (`closed`)."""
        if self._array is None:
            raise TheirsError("closed", "the frame is closed")
        return self._array

    def __enter__(self) -> Self:
        """Nothing is registered until the first use."""
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Leave no descriptor behind."""
        self.close()

    def close(self) -> None:
        """Take it back from all servers; the memory goes when the last array over it is gone. Idempotent."""
        if self.fd < 0:
            return
        for lender in tuple(getattr(self, "lenders", ())):
            lender.forget(self)
        os.close(self.fd)
        self.fd = -1
        self._array = None


class Lender:
    """The connection to one frames socket, over which frames are registered; they end with it. May be used from several threads."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._names: weakref.WeakKeyDictionary[Frame, str] = weakref.WeakKeyDictionary()
        self._owed = 0
        self._lock = threading.Lock()

    def name(self, frame: Frame) -> str | None:
        """The name under which the server knows a frame already."""
        return self._names.get(frame)

    def lend(self, frame: Frame, within_s: float) -> str | None:
        """Register a frame and return its name, None where that is not to be had: its bytes have to travel.

        Raises: TheirsError (`closed`, `refused`: the server's text).
        """
        if frame.fd < 0:
            raise TheirsError("closed", "the frame is closed")
        with self._lock:
            if frame in self._names:
                return self._names[frame]
            try:
                answer = self._registered(frame, within_s)
            except (OSError, msgspec.MsgspecError):
                self._drop()
                return None
            if answer.reason == "region_limit":
                return None
            if not answer.region:
                raise TheirsError("refused", answer.error, where=self._path)
            self._names[frame] = answer.region
            frame.lenders.add(self)
            return answer.region

    def forget(self, frame: Frame) -> None:
        """Take a frame back; waits for nothing."""
        with self._lock:
            name = self._names.pop(frame, None)
            if name is None or self._socket is None:
                return
            try:
                self._socket.send(frames.encode(frames.Unregister(name)), socket.MSG_DONTWAIT)
                self._owed += 1
            except OSError:
                self._drop()

    def close(self) -> None:
        """Take all frames back; a later `lend` connects again."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._names.clear()
        self._owed = 0
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _registered(self, frame: Frame, within_s: float) -> _Answer:
        if self._socket is None:
            with contextlib.ExitStack() as stack:
                fresh = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                fresh.settimeout(within_s)
                fresh.connect(self._path)
                stack.pop_all()
            self._socket = fresh
        self._socket.settimeout(within_s)
        for _ in range(self._owed):
            self._socket.recv(frames.MAX_MESSAGE_BYTES)
            self._owed -= 1
        socket.send_fds(self._socket, [frames.encode(frames.Register(frame.nbytes))], [frame.fd])
        return msgspec.json.decode(self._socket.recv(frames.MAX_MESSAGE_BYTES), type=_Answer)
