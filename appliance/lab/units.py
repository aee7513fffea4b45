"""Processes as systemd would run them: readiness and status by sd_notify, restart with backoff, and none left behind.

Each process is started through `setpriv --pdeathsig KILL` (util-linux): the kernel kills it when the lab dies, however it dies.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from appliance.contract.errors import WorldError

BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)
STEADY_S = 10.0
"""A process that lived so long starts again with the shortest pause."""
TAIL_BYTES = 2_000


class Unit:
    """One supervised process; its output goes to `log`. `notify`: whether it says READY=1 itself."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        *,
        notify: bool = True,
        fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.status = ""
        self.restarts = -1
        self.on_exit: Callable[[str, int], None] = lambda _name, _code: None
        self._command = ("setpriv", "--pdeathsig", "KILL", "--", *command)
        self._fds = tuple(fds)
        self._environment = dict(environment or {})
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._stopping = False
        self._free = asyncio.Event()
        self._free.set()
        self._notify = notify
        self._address = str(folder / f"{name}.notify")
        self._socket: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The process now, or None between two lives."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def returncode(self) -> int | None:
        """How the last life ended."""
        return self._process.returncode if self._process else None

    async def start(self, timeout_s: float = 30.0) -> None:
        """Start and wait for READY=1 (without `notify`: for the process). Raises: WorldError (`unit`) with the end of its log."""
        if self._notify:
            self._listen()
        self._task = asyncio.create_task(self._supervise(), name=self.name)
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError as error:
            raise WorldError("unit", f"{self.name} was not ready after {timeout_s:g} s\n{self.tail()}", where=str(self.log)) from error

    def tail(self) -> str:
        """The end of the log, for a person."""
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
        return ""

    async def stop(self, timeout_s: float = 10.0) -> int | None:
        """SIGTERM, then SIGKILL; returns the exit code."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(timeout_s):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._close()
        return process.returncode if process else None

    def kill(self) -> None:
        """SIGKILL now; the supervisor starts it again."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    def hold(self) -> None:
        """SIGKILL now, and no start before `release`."""
        self._free.clear()
        self.kill()

    def release(self) -> None:
        """Let it be started again."""
        self._free.set()

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while not self._stopping:
            began = loop.time()
            await self._live()
            failures = 0 if loop.time() - began > STEADY_S else failures + 1
            if not self._stopping:
                self._ready.clear()
                await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
                await self._free.wait()

    async def _live(self) -> None:
        environment = {**os.environ, **self._environment}
        if self._notify:
            environment |= {"NOTIFY_SOCKET": self._address, "WATCHDOG_USEC": "30000000"}
            environment.pop("WATCHDOG_PID", None)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=self._fds,
                start_new_session=True,
            )
        self.restarts += 1
        if not self._notify:
            self._ready.set()
        code = await self._process.wait()
        if not self._stopping:
            self.on_exit(self.name, code)

    def _listen(self) -> None:
        Path(self._address).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.bind(self._address)
        asyncio.get_running_loop().add_reader(self._socket, self._heard)

    def _heard(self) -> None:
        if self._socket is None:
            return
        with contextlib.suppress(BlockingIOError):
            for line in self._socket.recv(4096).decode(errors="replace").splitlines():
                if line == "READY=1":
                    self._ready.set()
                elif line.startswith("STATUS="):
                    self.status = line.removeprefix("STATUS=")

    def _close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            Path(self._address).unlink(missing_ok=True)
