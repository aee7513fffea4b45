"""A connection to a region's broker that heals itself and moves to each renewed SVID (implements `ports.Link`).

1. One supervisor connects, and after a loss connects again with exponential backoff and full jitter (AWS Architecture Blog, "Exponential
   Backoff And Jitter"), up to `backoff_cap_s`; it gives up never.
2. Nothing waits longer than its `timeout_s`. What is sent while the link is down waits for it that long, then fails as `not_connected`.
3. Unacknowledged messages are sent again on the next connection, in order, before newer ones: at least once, never out of order. Requests
   of QoS 0 that still lack an answer are repeated too, because the broker keeps no QoS 0 message for an absent client.
4. A renewed SVID needs a new connection, and the broker allows one for each client id, so: stop taking new QoS 1 messages (they come
   again), let what is under way be acknowledged in both directions, disconnect, connect. Nothing is lost, and if all settles within
   `drain_s` nothing comes twice. `connected` stays true meanwhile unless the new connection fails.
5. At `not_after` the link disconnects by itself: a stock broker lets an expired client stay.
6. A publish that succeeds was taken by the broker, which proves neither storage nor that anyone subscribes (docs/decisions/0004). A request
   that nobody was subscribed to is repeated within its time, since its peer may just be coming back.
7. A refused publish is known at QoS 1 only; the broker drops a refused QoS 0 message silently.
"""

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from appliance.adapters.mqtt.inbox import PROBLEM, Inbox, answer_topic
from appliance.adapters.mqtt.session import FAILURE, NO_SUBSCRIBERS, Arrived, Outbound, Session, SessionSettings, Terms, refusal
from appliance.contract.codec import Refused, decode
from appliance.contract.errors import ApplianceError, OursError, TheirsError, WorldError
from appliance.ports import Identity, Inbound

_log = structlog.get_logger(__name__)

_EXPIRY_LOOK_S = 5.0
"""Between looks at the clock, which may be set while we wait for the SVID's end."""

_NOBODY_S = 0.2
"""Before a request is repeated that the broker could give to nobody, because the one to be asked is not back yet."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """How a link behaves.

    Attributes:
        session: where the broker is and how to talk to it.
        backoff_base_s, backoff_cap_s: the first and the longest mean-doubled pause between attempts.
        stable_s: a connection that lasted this long starts the backoff anew; below it, two workloads that fight for one identity slow down.
        concurrency: requests served at a time.
        drain_s: how long a rotation waits for what is under way.
        rotation_jitter_s: a rotation begins at random within this time, so that a fleet does not reconnect at once.
    """

    session: SessionSettings = field(default_factory=SessionSettings)
    backoff_base_s: float = 0.1
    backoff_cap_s: float = 2.0
    stable_s: float = 5.0
    concurrency: int = 16
    drain_s: float = 1.0
    rotation_jitter_s: float = 0.0


@dataclass(slots=True)
class Counters:
    """What a link did since it was made; bytes are those of topics and payloads, `unheard` is what the broker took and nobody got."""

    sent: int = 0
    sent_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    connections: int = 0
    losses: int = 0
    unheard: int = 0


@dataclass(slots=True)
class _Ask:
    request: Outbound
    answer: asyncio.Future[Arrived]


def _boot_time() -> float:
    """Seconds since boot, as `ports.Clock.monotonic` counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class MqttLink:
    """One workload's link.

    Args:
        identity: gives TLS contexts and tells of renewals.
        client_id: the workload's name, as in its SVID; the broker would replace any other.
        peer: the broker's SPIFFE ID.
        answers: the topic on which answers to `ask` arrive; empty for a workload that never asks.
        answers_below: the pattern of the topics on which those below answer (`.../up/answer`); empty for a workload that never asks downwards.
        chance: for backoff and for correlation data, which must not be guessable; a seeded source belongs in tests only.
        wall: seconds since the epoch. monotonic: seconds that only grow.
    """

    def __init__(
        self,
        identity: Identity,
        settings: LinkSettings,
        *,
        client_id: str,
        peer: str,
        answers: str = "",
        answers_below: str = "",
        chance: random.Random | None = None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = _boot_time,
    ) -> None:
        self._identity = identity
        self._settings = settings
        self._client_id = client_id
        self._peer = peer
        self._answers = answers
        self._answers_below = answers_below
        self._chance = chance or random.SystemRandom()
        self._wall = wall
        self._monotonic = monotonic
        self._inbox = Inbox(settings.concurrency, self._reply)
        self._session: Session | None = None
        self._outgoing: dict[int, Outbound] = {}
        self._keys = itertools.count()
        self._asks: dict[bytes, _Ask] = {}
        self._connected = False
        self._rotating = False
        self._subscribed = False
        self._rotations = 0
        self._change = asyncio.Event()
        self._told: set[str] = set()
        self._last_heard: float | None = None
        self.last_error: ApplianceError | None = None
        """Why the link is, or last was, down."""
        self.counters = Counters()

    @property
    def connected(self) -> bool:
        """Whether the broker's session is up now; a rotation in progress counts as up."""
        return self._connected

    @property
    def rotations(self) -> int:
        """How many times the connection moved to a renewed SVID since start."""
        return self._rotations

    @property
    def identity_left_s(self) -> float:
        """Seconds until the SVID expires; 0 once it has."""
        return max(0.0, self._identity.not_after - self._wall())

    @property
    def last_heard(self) -> float | None:
        """When bytes of any kind last arrived, on `monotonic`'s scale; None before the first."""
        return self._last_heard

    async def changed(self) -> bool:
        """Return the new value of `connected` after its next change; a change undone at once may show only in `counters`."""
        await self._change.wait()
        return self._connected

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1, timeout_s: float = 5.0) -> None:
        """Publish; at QoS 1 return when the broker took it, at QoS 0 when it left.

        Raises: WorldError (`not_connected`, `timeout`, `quota_exceeded`), TheirsError (`not_authorised`, `oversized`, `not_accepted`).
        """
        message = Outbound(topic, payload, qos, _future(), retain=retain)
        try:
            async with asyncio.timeout(timeout_s):
                await self._transmit(message)
        except TimeoutError:
            raise self._late(topic, timeout_s) from None

    async def ask(self, topic: str, payload: bytes, *, timeout_s: float = 5.0, qos: int = 1) -> bytes:
        """Send a request and return the answer's bytes. QoS 0 is for chunks: cheaper, and a lost one is asked for again.

        Raises: WorldError (`not_connected`, `timeout`, `quota_exceeded`), TheirsError (`not_authorised`, `oversized`, or the peer's reason).
        """
        if not self._answers:
            raise OursError("no_answers", "this link was made without a topic for answers", where=topic)
        correlation = self._chance.randbytes(16)
        downwards = bool(self._answers_below) and "/dn/ask/" in topic
        terms = Terms(
            response_topic=answer_topic(topic) if downwards else self._answers,
            correlation=correlation,
            expiry_s=max(1, math.ceil(timeout_s)),
        )
        message = Outbound(topic, payload, qos, _future(), terms=terms)
        ask = self._asks[correlation] = _Ask(message, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                while await self._transmit(message) == NO_SUBSCRIBERS:  # surely lost, so a repetition is no duplicate
                    await asyncio.sleep(_NOBODY_S)
                    message = replace(message, done=_future())
                answer = await ask.answer
        except TimeoutError:
            raise self._late(topic, timeout_s) from None
        finally:
            del self._asks[correlation]
        if answer.terms.content_type == PROBLEM:
            refused = decode(answer.payload, Refused)
            raise TheirsError(refused.reason, refused.what, where=refused.where, remedy=refused.remedy)
        return answer.payload

    def on(self, pattern: str, handler: Callable[[Inbound], Awaitable[None]]) -> None:
        """Subscribe; messages are handled in order, each acknowledged after its handler returned or raised (see inbox, rule 2).

        Patterns must not overlap. Raises: OursError (`route`) after `run`.
        """
        self._inbox.on(pattern, handler)

    def serve(self, pattern: str, handler: Callable[[Inbound], Awaitable[bytes]]) -> None:
        """Answer requests on topics that match; an ApplianceError becomes a `Refused`. Raises: OursError (`route`) after `run`."""
        self._inbox.serve(pattern, handler)

    async def run(self) -> None:
        """Connect, reconnect with backoff, rotate with the SVID; ends only by cancellation. Call once."""
        async with asyncio.TaskGroup() as tasks:
            self._inbox.start(tasks)
            try:
                await self._supervise()
            finally:
                self._stopped()

    async def _supervise(self) -> None:
        failures = 0
        while True:
            began = self._monotonic()
            try:
                await self._live()
            except (WorldError, TheirsError) as error:
                self._went_down(error)
            else:
                continue  # a rotation: connect at once
            if self._monotonic() - began > self._settings.stable_s:
                failures = 0
            ceiling_s = min(self._settings.backoff_cap_s, self._settings.backoff_base_s * 2.0 ** min(failures, 32))
            await asyncio.sleep(self._chance.uniform(0.0, ceiling_s))
            failures += 1

    async def _live(self) -> None:
        """Hold one connection; return when a renewed SVID asks for the next. Raises: WorldError, TheirsError when it was lost."""
        renewed = asyncio.ensure_future(self._identity.renewed())
        await asyncio.sleep(0)  # lets it note which SVID is the present one before we take that
        try:
            context = self._identity.client_context(self._peer)
            session = Session(self._settings.session, self._client_id, context, self._received, self._heard)
            try:
                await session.open()
                patterns = [*self._inbox.patterns, *filter(None, (self._answers, self._answers_below))]
                await session.subscribe_to(patterns, fresh=not self._subscribed)
                self._subscribed = True
                self._went_up(session)
                await self._hold(session, renewed)
            finally:
                self._session = None
                await session.close()
        finally:
            renewed.cancel()

    async def _hold(self, session: Session, renewed: asyncio.Future[None]) -> None:
        """Return, drained, when the SVID was renewed. Raises: WorldError (`connection_lost`, `svid_expired`)."""
        ended = asyncio.ensure_future(session.ended.wait())
        either: list[asyncio.Future[Any]] = [ended, renewed]
        try:
            while not renewed.done():
                left_s = self._identity.not_after - self._wall()
                if left_s <= 0:
                    remedy = "check that the SPIFFE agent runs"
                    raise WorldError("svid_expired", "disconnected because the SVID expired and was not renewed", remedy=remedy)
                await asyncio.wait(either, timeout=min(left_s, _EXPIRY_LOOK_S), return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    raise WorldError("connection_lost", f"the connection ended: {session.cause}")
            await asyncio.wait({ended}, timeout=self._chance.uniform(0.0, self._settings.rotation_jitter_s))
            await self._drain(session)
        finally:
            ended.cancel()

    async def _drain(self, session: Session) -> None:
        """Let what is under way be acknowledged: first what came, whose answers still go out, then what we sent."""
        self._rotating = True
        session.draining = True
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await self._inbox.settle()
                self._session = None
                await session.settle()
        except TimeoutError:
            _log.info("rotation_not_drained", client_id=self._client_id, sending=len(self._outgoing))

    def _went_up(self, session: Session) -> None:
        """Note the new session and send on it, in order, what still waits."""
        self._session = session
        self.counters.connections += 1
        if self._rotating:
            self._rotations += 1
            self._rotating = False
        if not self._connected:
            _log.info("link_up", client_id=self._client_id, peer=self._peer, session_present=session.present)
            self._set_connected(up=True)
        self.last_error = None
        self._told.clear()
        for message in list(self._outgoing.values()):
            self._send(session, message)
        for ask in self._asks.values():
            if ask.request.qos == 0 and ask.request.done.done() and not ask.answer.done():
                self._send(session, replace(ask.request, done=_future()))

    def _went_down(self, error: ApplianceError) -> None:
        """Log the loss, and after it each further reason once."""
        self.last_error = error
        self._rotating = False
        if self._connected:
            self.counters.losses += 1
            _log.warning("link_lost", client_id=self._client_id, peer=self._peer, reason=error.reason, error=str(error))
            self._told.add("broker_unreachable")  # what follows a loss is no news
            self._set_connected(up=False)
        elif error.reason not in self._told:
            _log.warning("link_not_established", client_id=self._client_id, peer=self._peer, reason=error.reason, error=str(error))
        self._told.add(error.reason)

    def _stopped(self) -> None:
        self.last_error = WorldError("not_connected", "the link was stopped")
        if self._connected:
            _log.info("link_stopped", client_id=self._client_id, peer=self._peer)
            self._set_connected(up=False)

    def _set_connected(self, *, up: bool) -> None:
        self._connected = up
        self._change.set()
        self._change = asyncio.Event()

    def _heard(self) -> None:
        self._last_heard = self._monotonic()

    def _received(self, session: Session, message: Arrived) -> None:
        """Take an inbound message: an answer goes to its asker, anything else to the inbox."""
        if message.topic == self._answers or (self._answers_below and message.topic.endswith("/up/answer")):
            ask = self._asks.get(message.terms.correlation)
            if ask is not None and not ask.answer.done():
                ask.answer.set_result(message)
            session.acknowledge(message)
        elif session.draining and message.qos:
            return
        else:
            self._inbox.deliver(session, message)
        self.counters.received += 1
        self.counters.received_bytes += len(message.topic) + len(message.payload)

    async def _transmit(self, message: Outbound) -> int:
        """Send now or when connected; return the reason code when it is done. Raises: WorldError, TheirsError as the broker says."""
        key = next(self._keys)
        self._outgoing[key] = message
        try:
            if self._session is not None:
                self._send(self._session, message)
            code = await message.done
        finally:
            del self._outgoing[key]
        if code >= FAILURE:
            raise refusal(code, message.topic)
        self.counters.unheard += code == NO_SUBSCRIBERS
        return code

    def _send(self, session: Session, message: Outbound) -> None:
        try:
            session.send(message)
        except TheirsError as error:
            if not message.done.done():
                message.done.set_exception(error)
            return
        self.counters.sent += 1
        self.counters.sent_bytes += len(message.topic) + len(message.payload)

    async def _reply(self, topic: str, payload: bytes, qos: int, terms: Terms) -> None:
        await self._transmit(Outbound(topic, payload, qos, _future(), terms=terms))

    def _late(self, topic: str, timeout_s: float) -> WorldError:
        if self._connected:
            return WorldError("timeout", f"no answer within {timeout_s:g} s", where=topic)
        why = f": {self.last_error}" if self.last_error else ""
        return WorldError("not_connected", f"the broker was not reached within {timeout_s:g} s{why}", where=topic)


def _future() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()
