"""One software TPM, used in turns by a device's daemon and by its SPIRE agent: what the kernel's resource manager (/dev/tpmrm0) does on a board.

1. swtpm takes one client at a time, so this is that client; the daemon comes in by TCP (`libtss2-tcti-swtpm`), the agent by a Unix socket, with
   a connection for each command (go-tpm, legacy/tpm2). Both see the very same TPM.
2. The TPM changes hands only between commands, and only while no object is loaded: a bare TPM has room for three, and SPIRE's `tpm_devid`
   needs all of them. Either program flushes what it loads at the end of each piece of work.
3. Objects that nobody has touched for `ABANDONED_S` belong to a program that died, and are flushed.
4. swtpm's control channel is passed through.
"""

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

from appliance.lab import softtpm

ABANDONED_S = 3.0
"""Between two commands of one piece of work there are milliseconds, or an answer of SPIRE's server."""
PAUSE_S = 0.005
_HEADER = struct.Struct(">HII")
"""Tag, size, command code (TPM 2.0 library, part 1, 18)."""
_NO_SESSIONS = 0x8001
_GET_CAPABILITY, _FLUSH_CONTEXT = 0x17A, 0x165
_HANDLES, _TRANSIENT_FIRST, _MOST = 1, 0x80000000, 16

_Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Turnstile:
    """In front of the swtpm on `port` and `port + 1` of `host`. `tcti` is for the daemon, `socket` for the agent."""

    def __init__(self, host: str, port: int, socket: Path) -> None:
        self._host = host
        self.port = softtpm.free_port()
        self.socket = socket
        self._behind = port
        self._turn = asyncio.Lock()
        self._holder = ""
        self._used = 0.0
        self._tpm: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._servers: list[asyncio.Server] = []
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def tcti(self) -> str:
        """How the daemon's TSS reaches the TPM through here."""
        return softtpm.tcti(self.port, self._host)

    async def open(self) -> None:
        """Listen."""
        self._servers.append(await asyncio.start_server(self._guest(self._daemon), self._host, self.port))
        self._servers.append(await asyncio.start_server(self._guest(self._control), self._host, self.port + 1))
        self._servers.append(await asyncio.start_unix_server(self._guest(self._agent), str(self.socket)))

    async def close(self) -> None:
        """Stop listening, and hang up."""
        for server in self._servers:
            server.close()
        for writer in list(self._open):
            writer.close()
        self._hang_up()
        await asyncio.sleep(0)

    def _guest(self, serve: _Serve) -> _Serve:
        """A connection ends when its client goes, or when the TPM does."""

        async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._open.add(writer)
            try:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    await serve(reader, writer)
            finally:
                self._open.discard(writer)
                writer.close()

        return serving

    async def _daemon(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._commands("daemon", reader, writer)

    async def _agent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._commands("agent", reader, writer)

    async def _commands(self, who: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(await self._in_turn(who, await _message(reader)))
            await writer.drain()

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes both ways until either side ends."""
        theirs, ours = await asyncio.open_connection(self._host, self._behind + 1)
        self._open.add(ours)
        try:
            ways = [asyncio.create_task(_pass(reader, ours)), asyncio.create_task(_pass(theirs, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._open.discard(ours)
            ours.close()

    async def _in_turn(self, who: str, command: bytes) -> bytes:
        while True:
            async with self._turn:
                if await self._may(who):
                    self._holder = who
                    answer = await self._transmit(command)
                    self._used = asyncio.get_running_loop().time()
                    return answer
            await asyncio.sleep(PAUSE_S)

    async def _may(self, who: str) -> bool:
        """Whether the TPM is this program's now; what a dead one left in it goes."""
        abandoned = asyncio.get_running_loop().time() - self._used > ABANDONED_S
        if self._holder == who and not abandoned:
            return True
        loaded = await self._loaded()
        if abandoned:
            for handle in loaded:
                await self._transmit(_HEADER.pack(_NO_SESSIONS, 14, _FLUSH_CONTEXT) + struct.pack(">I", handle))
        return abandoned or not loaded

    async def _loaded(self) -> tuple[int, ...]:
        """The handles of all transient objects."""
        ask = _HEADER.pack(_NO_SESSIONS, 22, _GET_CAPABILITY) + struct.pack(">III", _HANDLES, _TRANSIENT_FIRST, _MOST)
        answer = await self._transmit(ask)
        found = answer[_HEADER.size + 9 :]  # after moreData (1 byte), capability (4) and count (4)
        return struct.unpack(f">{len(found) // 4}I", found)

    async def _transmit(self, command: bytes) -> bytes:
        """One command and its answer. Raises: OSError, IncompleteReadError if the TPM went away; the next command finds it again."""
        if self._tpm is None:
            self._tpm = await asyncio.open_connection(self._host, self._behind)
        reader, writer = self._tpm
        try:
            writer.write(command)
            return await _message(reader)
        except BaseException:  # also when cancelled: an answer that nobody read would be taken for the next one
            self._hang_up()
            raise

    def _hang_up(self) -> None:
        if self._tpm is not None:
            self._tpm[1].close()
            self._tpm = None


async def _message(reader: asyncio.StreamReader) -> bytes:
    """One command or answer: its header says how long it is."""
    head = await reader.readexactly(_HEADER.size)
    return head + await reader.readexactly(_HEADER.unpack(head)[1] - len(head))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while content := await reader.read(4096):
        writer.write(content)
        await writer.drain()
