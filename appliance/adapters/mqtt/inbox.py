"""What becomes of messages that arrive: handled in order, or answered concurrently, then acknowledged.

1. `on`: one message after the other for each pattern, acknowledged after the handler returned; a crash before that redelivers it.
2. A handler that raises is logged and its message acknowledged all the same: redelivered, it would only raise again, for ever, and hold
   up all behind it. Whoever can fail for a passing reason must wait or keep the message itself before returning.
3. `serve`: at most `concurrency` requests at a time, any order; as many again per slot may wait, the rest is refused as `busy`.
4. An `ApplianceError` is answered as `Refused` with its fields; anything else as `Refused` (`internal`) without details, which stay here.
5. An answer goes only to the asker's own answer topic, which follows from the topic of the request (contract/topics.py) and so from what
   the broker let the asker publish; a request that names another is ignored, or it could make us write where the asker may not.
6. A request older than its expiry is given up: nobody waits for its answer.
Delivery is at least once: after an abrupt loss the broker sends again what was under way, so handlers must bear a repetition.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
from paho.mqtt.matcher import MQTTMatcher

from appliance.adapters.mqtt.session import Arrived, Session, Terms
from appliance.contract.codec import Refused, encode
from appliance.contract.errors import ApplianceError, OursError, TheirsError
from appliance.ports import Inbound

_log = structlog.get_logger(__name__)

PROBLEM = "application/problem+json"
"""Content type of a `Refused` (the name is that of RFC 9457; the fields are ours)."""
RAW = "application/octet-stream"
"""Content type of every other answer."""

_QUEUE_LIMIT = 1024
"""QoS 0 messages that may wait for one handler; QoS 1 is bounded by the session's receive maximum."""
_WAITING_PER_SLOT = 4
"""Requests that may wait for each slot of `concurrency`."""
_PATIENCE_S = 30.0
"""For requests that bear no expiry."""
_TEXT_LIMIT = 512
"""Characters of each field of a `Refused`, so that four of them stay below its size limit."""

Reply = Callable[[str, bytes, int, Terms], Awaitable[None]]
"""Sends an answer: topic, payload, QoS, terms; returns when the broker has it."""


@dataclass(slots=True)
class _Handled:
    """A pattern whose messages are handled in order."""

    handler: Callable[[Inbound], Awaitable[None]]
    queue: asyncio.Queue[tuple[Session, Arrived]] = field(default_factory=asyncio.Queue)
    failing: str = ""


@dataclass(slots=True)
class _Served:
    """A pattern whose messages are requests."""

    handler: Callable[[Inbound], Awaitable[bytes]]
    failing: str = ""


class Inbox:
    """Routes of one link. `concurrency` bounds the requests that are served at a time."""

    def __init__(self, concurrency: int, reply: Reply) -> None:
        self._reply = reply
        self._slots = asyncio.Semaphore(concurrency)
        self._waiting_limit = concurrency * (1 + _WAITING_PER_SLOT)
        self._requests = 0
        self._routes: dict[str, _Handled | _Served] = {}
        self._matcher = MQTTMatcher()  # type: ignore[no-untyped-call]  # paho left it unannotated
        self._tasks: asyncio.TaskGroup | None = None
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.dropped = 0

    @property
    def patterns(self) -> list[str]:
        """All patterns, in the order in which they were registered."""
        return list(self._routes)

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        """Handle messages in order. Raises: OursError (`route`) after `start`, or for a pattern that is taken."""
        self._register(pattern, _Handled(handler))

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        """Answer requests. Raises: OursError (`route`) after `start`, or for a pattern that is taken."""
        self._register(pattern, _Served(handler))

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start a worker for each handled pattern; all tasks end with the group."""
        self._tasks = tasks
        for pattern, route in self._routes.items():
            if isinstance(route, _Handled):
                tasks.create_task(self._work(pattern, route), name=f"on {pattern}")

    def deliver(self, session: Session, message: Arrived) -> None:
        """Take a message. One that matches nothing (a subscription of an earlier version) is acknowledged and dropped."""
        route = next(self._matcher.iter_match(message.topic), None)  # type: ignore[no-untyped-call]  # as above
        if isinstance(route, _Handled) and (message.qos or route.queue.qsize() < _QUEUE_LIMIT):
            self._begin(message)
            route.queue.put_nowait((session, message))
        elif isinstance(route, _Served) and self._tasks is not None:
            self._begin(message)
            self._tasks.create_task(self._answer(route, session, message), name=f"serve {message.topic}")
        else:
            self.dropped += 1
            session.acknowledge(message)

    async def settle(self) -> None:
        """Return when every QoS 1 message that was taken has been acknowledged."""
        await self._idle.wait()

    def _register(self, pattern: str, route: _Handled | _Served) -> None:
        if self._tasks is not None or pattern in self._routes:
            raise OursError("route", "register each pattern once, and before `run`", where=pattern)
        self._routes[pattern] = route
        self._matcher[pattern] = route

    def _begin(self, message: Arrived) -> None:
        if message.qos:
            self._open += 1
            self._idle.clear()

    def _end(self, session: Session, message: Arrived) -> None:
        session.acknowledge(message)
        if message.qos:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _work(self, pattern: str, route: _Handled) -> None:
        while True:
            session, message = await route.queue.get()
            try:
                await route.handler(Inbound(message.topic, message.payload))
                route.failing = ""
            except Exception as error:  # noqa: BLE001 - rule 2: one message must not stop the rest
                route.failing = _tell(route.failing, error, pattern)
            self._end(session, message)

    async def _answer(self, route: _Served, session: Session, message: Arrived) -> None:
        """Serve one request from its arrival to its acknowledgement."""
        to = answer_topic(message.topic)
        if not to or message.terms.response_topic != to or not message.terms.correlation:
            _log.warning("request_ignored", topic=message.topic, response_topic=message.terms.response_topic, expected=to)
            self._end(session, message)
            return
        patience_s = _PATIENCE_S if message.terms.expiry_s is None else message.terms.expiry_s
        self._requests += 1
        try:
            async with asyncio.timeout(patience_s):
                await self._respond(route, message, to)
        except TimeoutError:
            pass  # rule 6
        except ApplianceError as error:
            _log.warning("answer_not_sent", topic=to, reason=error.reason, error=str(error))
        finally:
            self._requests -= 1
        self._end(session, message)

    async def _respond(self, route: _Served, message: Arrived, to: str) -> None:
        try:
            payload = await self._call(route, message)
            await self._reply(to, payload, message.qos, _answer_terms(message, RAW))
        except ApplianceError as error:
            if error.reason == "not_authorised" and error.where == to:
                raise
            await self._reply(to, _refused(error), message.qos, _answer_terms(message, PROBLEM))

    async def _call(self, route: _Served, message: Arrived) -> bytes:
        """Run the handler in a slot. Raises: ApplianceError, and only that."""
        if self._requests > self._waiting_limit:
            raise TheirsError("busy", f"{self._requests} requests are waiting", remedy="ask again later")
        async with self._slots:
            try:
                payload = await route.handler(Inbound(message.topic, message.payload))
            except ApplianceError:
                raise
            except Exception as error:
                route.failing = _tell(route.failing, error, message.topic)
                raise TheirsError(
                    "internal", "the request could not be served", remedy="see the log of the service that was asked"
                ) from error
            route.failing = ""
            return payload


def answer_topic(request: str) -> str:
    """Return where answers to a request on this topic go; empty for no request's topic.

    `<asker>/up/...` is answered on `<asker>/dn/answer`, and what is asked downwards, `<asked>/dn/ask/...`, on `<asked>/up/answer`.
    """
    asked, down, _ = request.partition("/dn/ask/")
    if down:
        return f"{asked}/up/answer"
    asker, up, _ = request.partition("/up/")
    return f"{asker}/dn/answer" if up else ""


def _answer_terms(request: Arrived, content_type: str) -> Terms:
    return Terms(correlation=request.terms.correlation, content_type=content_type, expiry_s=request.terms.expiry_s)


def _refused(error: ApplianceError) -> bytes:
    reason, what, where, remedy = (text[:_TEXT_LIMIT] for text in (error.reason, error.what, error.where, error.remedy))
    return encode(Refused(reason=reason, what=what, where=where, remedy=remedy))


def _tell(failing: str, error: Exception, pattern: str) -> str:
    """Log a failure unless the last one was of the same kind; return its kind."""
    kind = type(error).__name__
    if kind != failing:
        _log.error("handler_failed", pattern=pattern, exc_info=error)
    return kind
