"""The frames socket (contract.frames): takes descriptors of memory that local programs lend, beside the HTTP server.

1. It has the permissions of the API's socket, and nothing on it waits: each packet is read, answered and done within one wake of the loop.
2. Whatever descriptors a packet brings are closed here: what was registered is a mapping.
3. Who does not read his answers, or registers nothing within `header_timeout_s`, is let go.
"""

import array
import asyncio
import contextlib
import os
import secrets
import socket
from pathlib import Path

import structlog

from appliance.adapters.ingress.bounds import Bounds
from appliance.adapters.ingress.regions import LentRegions, Owner
from appliance.adapters.ingress.sockets import bind_unix, unbind_unix
from appliance.contract import frames
from appliance.contract.errors import ApplianceError, OursError, TheirsError
from appliance.contract.openinference_catalog import error as error_body

BACKLOG = 64
RESUME_S = 1.0
"""How long nobody is accepted after the process ran out of descriptors."""
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(2 * _FD_BYTES)
"""Room for two descriptors: one too many is seen, what is beyond is closed by the kernel."""


class FramesSocket:
    """Listens on a path and keeps the regions of each connection for as long as it lives."""

    def __init__(self, regions: LentRegions, bounds: Bounds) -> None:
        self._regions = regions
        self._bounds = bounds
        self._lenders: dict[socket.socket, Owner] = {}
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._log = structlog.get_logger()

    async def start(self, path: Path) -> None:
        """Listen. Raises: WorldError (`listen`)."""
        self._listener = await asyncio.to_thread(bind_unix, path, socket.SOCK_SEQPACKET)
        self._path = path
        self._listener.listen(BACKLOG)
        self._resume()

    async def close(self) -> None:
        """Let all lenders go; the memory goes with the last request that uses it."""
        listener, self._listener = self._listener, None
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        for lender in tuple(self._lenders):
            self._let_go(lender)
        if self._path is not None:
            await asyncio.to_thread(unbind_unix, self._path)
            self._path = None

    def _resume(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            lender, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors: without a pause the loop would do nothing but fail to accept
            self._log.warning("frames_not_accepted", why=error.strerror, resume_s=RESUME_S)
            loop.remove_reader(listener)
            loop.call_later(RESUME_S, self._resume)
            return
        lender.setblocking(False)
        if len(self._lenders) >= self._bounds.lenders:
            self._say(lender, error_body("too many connections are open; send the data in the body", "region_limit"))
            lender.close()
            return
        self._lenders[lender] = Owner()
        loop.add_reader(lender, self._hear, lender)
        loop.call_later(self._bounds.header_timeout_s, self._doubt, lender)

    def _doubt(self, lender: socket.socket) -> None:
        owner = self._lenders.get(lender)
        if owner is not None and not owner.names:
            self._let_go(lender)

    def _hear(self, lender: socket.socket) -> None:
        try:
            packet, ancillary, flags, _ = lender.recvmsg(frames.MAX_MESSAGE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._let_go(lender)
            return
        descriptors = _descriptors(ancillary)
        try:
            if not packet or not self._say(lender, self._answer(lender, packet, descriptors, flags)):
                self._let_go(lender)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, lender: socket.socket, packet: bytes, descriptors: list[int], flags: int) -> bytes:
        try:
            return self._done(self._lenders[lender], packet, descriptors, flags)
        except OursError as error:
            return self._unforeseen(error)
        except ApplianceError as error:
            return error_body(str(error), error.reason)
        except Exception as error:  # noqa: BLE001 - the last line of defence, as in the HTTP server
            return self._unforeseen(error)

    def _done(self, owner: Owner, packet: bytes, descriptors: list[int], flags: int) -> bytes:
        if flags & socket.MSG_TRUNC:
            raise TheirsError("oversized", f"a message has at most {frames.MAX_MESSAGE_BYTES} bytes")
        ask = frames.decode_ask(packet)
        expected = 1 if isinstance(ask, frames.Register) else 0
        if flags & socket.MSG_CTRUNC or len(descriptors) != expected:
            seen = "more" if flags & socket.MSG_CTRUNC else len(descriptors)
            raise TheirsError("descriptors", f"{seen} descriptors came with the message, expected {expected}")
        match ask:
            case frames.Register():
                return frames.encode(frames.Registered(self._regions.register(owner, descriptors[0], ask.byte_size)))
            case frames.Unregister():
                self._regions.unregister(owner, ask.region)
                return frames.encode(frames.Registered(ask.region))

    def _unforeseen(self, error: Exception) -> bytes:
        token = secrets.token_hex(4)
        self._log.error("frames_message_failed", id=token, exc_info=error)
        return error_body(f"an internal error; the log has it under {token}", "internal")

    def _say(self, lender: socket.socket, answer: bytes) -> bool:
        """Send an answer; False if he is gone, or does not read what he is answered."""
        with contextlib.suppress(OSError):
            lender.send(answer, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            return True
        return False

    def _let_go(self, lender: socket.socket) -> None:
        owner = self._lenders.pop(lender)
        asyncio.get_running_loop().remove_reader(lender)
        lender.close()
        self._regions.leave(owner)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """All descriptors that a packet brought."""
    found = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content[: len(content) - len(content) % _FD_BYTES])
    return found.tolist()
