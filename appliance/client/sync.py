"""The synchronous client: the Open Inference Protocol v2 over HTTP, on TCP or on a Unix socket, tensors in binary or in shared frames.

It tries again where that helps, within the time that it has; it goes on to the next server, and in the end to the caller's own fallback
(`retrying` has the rules, `aio` the same client for asyncio).

Errors are those of the appliance: `TheirsError` for what the caller did wrong, `WorldError` with reason `busy` (and `retry_after_s`) where asking
again helps, `unreachable` where nobody answers, `failed` where a server could not. An answer that breaks the protocol is a `TheirsError`
(`malformed`): no other exception escapes. One connection for each server, kept open; not for several threads at once.
"""

import contextlib
import math
import select
import socket
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from appliance.client.asking import Inputs, Options
from appliance.client.courses import TIMEOUT_S, Compute, Course, Courses, Exchange, Fallback, Lend, Pause, Step
from appliance.client.exchange import Address, Asked, LostError, Reply, ReplyReader
from appliance.client.frames import Frame, Lender
from appliance.client.results import Deferred, Result
from appliance.client.retrying import Policy
from appliance.contract.errors import ApplianceError, WorldError

__all__ = ["TIMEOUT_S", "Appliance", "Deferred", "Frame", "Policy", "Result"]

CONNECT_S = 2.0
LEND_S = 1.0
"""How long a server may take to let us in, and to map a frame."""
_NO_WAIT_S = 1e-3

T = TypeVar("T")


class Connection:
    """One kept connection to one server."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._reader = ReplyReader(address.text)
        self.socket: socket.socket | None = None

    def close(self) -> None:
        """Close; the next exchange connects again."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def exchange(self, asked: Asked, deadline: float) -> Reply:
        """Send a request and return its reply. Raises: TheirsError (`malformed`), WorldError (`unreachable`; a LostError once it was sent)."""
        if self.socket is not None and not self._is_quiet(self.socket):
            self.close()
        if self.socket is None:
            self.socket = self._connected(deadline)
            self._reader = ReplyReader(self._address.text)
        try:
            self._send(self.socket, asked, deadline)
            reply = self._receive(self.socket, deadline)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                why = "it took too long" if isinstance(error, TimeoutError) else str(error)
                raise LostError("unreachable", f"no answer: {why}", where=self._address.text) from error
            raise
        if not reply.keep:
            self.close()
        return reply

    def _is_quiet(self, kept: socket.socket) -> bool:
        """Whether nothing came on a connection that waits: neither its end, nor bytes that belong to no request."""
        try:
            kept.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _connected(self, deadline: float) -> socket.socket:
        address, within_s = self._address, min(CONNECT_S, _left_s(deadline))
        try:
            if not address.path:
                fresh = socket.create_connection((address.host, address.port), within_s)
                fresh.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                fresh.setblocking(False)
                return fresh
            with contextlib.ExitStack() as stack:
                fresh = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                fresh.settimeout(within_s)
                fresh.connect(address.path)
                fresh.setblocking(False)
                stack.pop_all()
                return fresh
        except OSError as error:
            raise WorldError("unreachable", f"no answer: {error}", where=address.text, remedy="is the daemon running?") from error

    def _send(self, to: socket.socket, asked: Asked, deadline: float) -> None:
        parts = [memoryview(part) for part in asked.render(self._address.host) if len(part)]
        while parts:
            try:
                sent = to.sendmsg(parts)
            except BlockingIOError:
                _wait(to, select.POLLOUT, deadline)
                continue
            except (BrokenPipeError, ConnectionResetError):  # it may have refused what was still coming: the answer says why
                return
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][sent:]

    def _receive(self, source: socket.socket, deadline: float) -> Reply:
        reply: Reply | None = None
        while reply is None:
            _wait(source, select.POLLIN, deadline)
            reply = self._reader.filled(source.recv_into(self._reader.buffer()))
        return reply


class Appliance:
    """The appliance at `http://host:port` or `unix:/path/of/the/socket`, or several of them in order of preference.

    Attributes:
        timeout_s: how long one call may take, with all its attempts.
        policy: how often and how soon to try again; `retrying.ONCE` for never.
        fallback: answers in the appliance's place where no server does: `fallback(model, inputs)` returns the outputs.
    """

    def __init__(
        self,
        server: str | Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S,
        policy: Policy | None = None,
        fallback: Fallback | None = None,
    ) -> None:
        self._courses = Courses(server, timeout_s=timeout_s, policy=policy or Policy(), fallback=fallback)
        self._connections = {each.text: Connection(each) for each in self._courses.servers}
        self._lenders = {each.text: Lender(each.frames) for each in self._courses.servers if each.frames}

    def __enter__(self) -> Self:
        """Nothing is opened until the first call."""
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections; a later call opens them again."""
        for connection in self._connections.values():
            connection.close()
        for lender in self._lenders.values():
            lender.close()

    def ready(self) -> bool:
        """Whether a server takes requests. Raises: WorldError (`unreachable`) if none answers."""
        return self._run(self._courses.ready())

    def metadata(self, model: str) -> dict[str, Any]:
        """What the model takes and gives, and what its file says of itself (`parameters`). Raises: TheirsError, WorldError."""
        return self._run(self._courses.metadata(model))

    def infer(self, model: str, inputs: Inputs, **options: Unpack[Options]) -> Result:
        """Ask for an answer. `inputs` are arrays or frames whose axis 0 is the batch; `Options` says what else may be asked.

        Raises: TheirsError (the server's text), WorldError (`busy`, `unreachable`, `failed`).
        """
        return self._run(self._courses.infer(model, inputs, options))

    def submit(self, model: str, inputs: Inputs, **options: Unpack[Options]) -> Result | Deferred:
        """As `infer`, but where there is no answer now, a promise is welcome: the server keeps the request on its disk until it is answered."""
        return self._run(self._courses.submit(model, inputs, options))

    def fetch(self, promise: Deferred | str, *, wait_s: float = 0.0) -> Result:
        """Return the answer that was promised, after up to `wait_s`; an id alone is looked for at the first server.

        Raises: TheirsError (`unknown_promise`: or it expired), WorldError (`pending`, `dropped` with the reason, `busy`, `unreachable`).
        """
        return self._run(self._courses.fetch(promise, wait_s))

    def _run(self, course: Course[T]) -> T:
        outcome: Any = None
        raised: ApplianceError | None = None
        with contextlib.closing(course):
            while True:
                try:
                    step = course.send(outcome) if raised is None else course.throw(raised)
                except StopIteration as end:
                    value: T = end.value
                    return value
                outcome, raised = None, None
                try:
                    outcome = self._done(step)
                except ApplianceError as error:
                    raised = error

    def _done(self, step: Step) -> Any:
        match step:
            case Exchange():
                return self._connection(step.address).exchange(step.asked, step.deadline)
            case Lend():
                lender = self._lenders[step.address.text]
                if step.anew:
                    lender.close()
                return lender.lend(step.frame, LEND_S)
            case Pause():
                return time.sleep(step.seconds)
            case Compute():
                return step.work()

    def _connection(self, address: Address) -> Connection:
        """The connection to a server; a promise may name one that this client was not given."""
        found = self._connections.get(address.text)
        return found or self._connections.setdefault(address.text, Connection(address))


def _left_s(deadline: float) -> float:
    """Seconds until the deadline; a socket takes no time-out of 0, which would mean not to wait at all."""
    return max(_NO_WAIT_S, deadline - time.monotonic())


def _wait(waiting: socket.socket, event: int, deadline: float) -> None:
    """Wait until a socket can go on. Raises: TimeoutError at the deadline."""
    poll = select.poll()
    poll.register(waiting, event)
    if not poll.poll(math.ceil(_left_s(deadline) * 1e3)):
        raise TimeoutError
