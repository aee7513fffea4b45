"""An alarm to the microsecond: event loops round their timers to milliseconds, which would blur every latency below one.

Linux only: timerfd_create(2) on CLOCK_MONOTONIC, which is the clock of `time.perf_counter`.
"""

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from appliance.contract.errors import WorldError

_ABSOLUTE = 1
_EARLIEST_S = 1e-9


class _Spec(ctypes.Structure):
    _fields_ = (("interval_s", ctypes.c_long), ("interval_ns", ctypes.c_long), ("value_s", ctypes.c_long), ("value_ns", ctypes.c_long))


class Alarm:
    """Calls `ring` in the running loop at a time of `time.perf_counter`. Raises: WorldError (`timer`) where there is no timerfd."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise WorldError("timer", f"no timer can be made: {os.strerror(ctypes.get_errno())}", remedy="run on Linux")
        self._ring = ring
        self._spec = _Spec(0, 0, 0, 0)
        self._pointer = ctypes.byref(self._spec)
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._loop.add_reader(self._fd, self._rang)
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Never ring again."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def at(self, when: float) -> None:
        """Ring once at `when`, at once if that is past; an earlier order is replaced."""
        seconds, rest = divmod(max(when, _EARLIEST_S), 1.0)
        self._spec.value_s, self._spec.value_ns = int(seconds), max(int(rest * 1e9), 1)
        self._libc.timerfd_settime(self._fd, _ABSOLUTE, self._pointer, None)

    def _rang(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set anew between the ring and now
            return
        self._ring()
