"""One connection to the broker, from CONNECT to its end: what aiomqtt leaves out, added below it.

1. PUBACK reason codes reach the sender (aiomqtt drops them; a refused publish would look like a delivered one).
2. QoS 1 messages are acknowledged when told, not on receipt (paho's manual acknowledgement): a crash before that redelivers them.
3. A refusal after the TLS 1.3 handshake, where the broker rejects our certificate, fails at once instead of after the timeout.
4. `clean_start` is false and the session expires late, so that the broker keeps queue and subscriptions across connections.
5. Whatever way it ends, also by cancellation in the middle of connecting, its socket is closed and no zombie keeps our client id.
A session is used once; the link makes a new one for each connection. No method may be called from another thread.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiomqtt
from paho.mqtt.client import Client as Paho
from paho.mqtt.client import ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from appliance.contract.errors import ApplianceError, TheirsError, WorldError

FAILURE = 0x80
"""MQTT 5, section 2.4: reason codes from here on mean that nothing was done."""
FOR_EVER = 0xFFFF_FFFF
"""MQTT 5, section 3.1.2.11.2: a session that does not expire."""
NO_SUBSCRIBERS = 0x10
"""A PUBACK's reason code: taken, but nobody subscribes to the topic."""
_OVERHEAD = 1024
"""Bytes of a PUBLISH beside topic and payload: header and the few properties that we set."""
_SILENT = logging.Logger("paho", logging.CRITICAL + 1)  # noqa: LOG001 - unregistered on purpose: it silences only our own client
"""Paho tells of each failed read; the link tells of changes."""
_CLOSE_S = 1.0
"""How long a DISCONNECT may take before the socket is simply closed."""


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How to talk to a broker. The defaults suit one region's LAN.

    Attributes:
        host, port: where the broker listens.
        connect_timeout_s: for TCP, TLS and CONNACK together, roughly; 0.1 to 60.
        keepalive_s: silence after which a ping is sent, and a missing answer ends the session; whole seconds, 1 to 600.
        session_expiry_s: how long the broker keeps queue and subscriptions of an absent client; `FOR_EVER` spares the broker its list of
            sessions that expire: mosquitto 2.0.11 aborted there once clients of one name had come again (seen in a chaos run; the cause is inferred).
        inflight: QoS 1 messages under way in each direction; at most the broker's `max_inflight_messages`.
        packet_bytes: the largest packet that we accept.
    """

    host: str = "127.0.0.1"
    port: int = 8883
    connect_timeout_s: float = 5.0
    keepalive_s: int = 10
    session_expiry_s: int = FOR_EVER
    inflight: int = 20
    packet_bytes: int = 4_200_000


@dataclass(frozen=True, slots=True)
class Terms:
    """The properties of a message that we use (MQTT 5, section 3.3.2.3); empty and None mean absent."""

    response_topic: str = ""
    correlation: bytes = b""
    content_type: str = ""
    expiry_s: int | None = None


_NO_TERMS = Terms()


@dataclass(frozen=True, slots=True)
class Outbound:
    """A message on its way out; `done` gets the broker's reason code, or 0 when a QoS 0 message has left."""

    topic: str
    payload: bytes
    qos: int
    done: asyncio.Future[int]
    retain: bool = False
    terms: Terms = _NO_TERMS


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message that came in; `mid` is meant for `acknowledge` of the session that brought it."""

    topic: str
    payload: bytes
    qos: int
    mid: int
    terms: Terms


class Session(aiomqtt.Client):
    """One connection. `deliver` is called for each inbound message, `heard` at each arrival of bytes, both in the loop's thread."""

    def __init__(
        self,
        settings: SessionSettings,
        client_id: str,
        context: ssl.SSLContext,
        deliver: Callable[["Session", Arrived], None],
        heard: Callable[[], None],
    ) -> None:
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = settings.session_expiry_s
        properties.ReceiveMaximum = settings.inflight
        properties.MaximumPacketSize = settings.packet_bytes
        super().__init__(
            settings.host,
            settings.port,
            identifier=client_id,
            logger=_SILENT,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=False,
            properties=properties,
            tls_context=context,
            keepalive=settings.keepalive_s,
            timeout=settings.connect_timeout_s,
            max_inflight_messages=settings.inflight,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        self._client.manual_ack_set(True)
        self._client.connect_timeout = settings.connect_timeout_s
        self._deliver = deliver
        self._heard = heard
        self._sent: dict[int, asyncio.Future[int]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._packet_limit = 268_435_455
        self._abandoned = False
        self.ended = asyncio.Event()
        self.cause = ""
        self.present = False
        """Whether the broker still had our session."""
        self.draining = False
        """While set, new QoS 1 messages should be left unacknowledged: the broker sends them again to the next session."""

    async def open(self) -> None:
        """Connect. Raises: WorldError (`broker_unreachable`, `tls`), TheirsError (`broker_identity`, `broker_refused`)."""
        try:
            await self.__aenter__()
            obey_cancellation()
        except aiomqtt.MqttCodeError as error:
            self.abort()
            remedy = "check that this workload's SVID is valid and registered for the region"
            raise TheirsError(
                "broker_refused", f"the broker refused the connection: {error}", where=self._where(), remedy=remedy
            ) from error
        except aiomqtt.MqttError as error:
            self.abort()
            raise WorldError("broker_unreachable", f"cannot connect: {error}", where=self._where()) from error
        except BaseException:
            self.abort()
            raise

    async def close(self) -> None:
        """Disconnect in good order, or after a second in none."""
        if not self.ended.is_set():
            with suppress(aiomqtt.MqttError, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self.__aexit__(None, None, None)
        self.abort()
        obey_cancellation()

    def abort(self) -> None:
        """Close the socket now; harmless when it is closed already."""
        self._abandoned = True
        if self._misc_task is not None:
            self._misc_task.cancel()
        self._client._sock_close()  # noqa: SLF001 - paho has no public way to drop a connection without a packet
        self._finish("closed by us")
        for future in (self._connected, self._disconnected):
            if future.done() and not future.cancelled():
                future.exception()  # marks it as seen

    def send(self, message: Outbound) -> None:
        """Queue a message for writing. Raises: TheirsError (`oversized`) if the broker would cut the connection for it."""
        size = len(message.topic) + len(message.payload) + _OVERHEAD
        if size > self._packet_limit:
            raise TheirsError("oversized", f"{size} bytes with headers, the broker takes {self._packet_limit}", where=message.topic)
        info = self._client.publish(message.topic, message.payload, message.qos, message.retain, _wire(message.terms))
        self._sent[info.mid] = message.done
        self._idle.clear()

    def acknowledge(self, message: Arrived) -> None:
        """Tell the broker that a message is dealt with; in vain, and harmless, when the session has ended."""
        if not self.ended.is_set():
            self._client.ack(message.mid, message.qos)

    async def settle(self) -> None:
        """Return when the broker has answered everything that was sent, or the session has ended."""
        await self._idle.wait()

    async def subscribe_to(self, patterns: list[str], *, fresh: bool) -> None:
        """Subscribe at QoS 1; retained messages come if `fresh` or if the broker did not know the subscription.

        A restarted process needs them again although its session is known; a mere reconnection does not.
        Raises: WorldError (`broker_unreachable`), TheirsError (`not_authorised`).
        """
        if not patterns:
            return
        handling = SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if fresh else SubscribeOptions.RETAIN_SEND_IF_NEW_SUB
        options = [(pattern, SubscribeOptions(qos=1, retainHandling=handling)) for pattern in patterns]
        try:
            codes: Sequence[int | ReasonCode] = await self.subscribe(options)
            obey_cancellation()
        except aiomqtt.MqttError as error:
            raise WorldError("broker_unreachable", f"cannot subscribe: {error}", where=self._where()) from error
        refused = [
            pattern for pattern, code in zip(patterns, codes, strict=True) if (code if isinstance(code, int) else code.value) >= FAILURE
        ]
        if refused:
            raise TheirsError("not_authorised", f"the broker refused subscriptions to {', '.join(refused)}", where=self._where())

    def _where(self) -> str:
        return f"broker {self._hostname}:{self._port}"

    def _client_connect(self) -> None:
        """Connect in the executor's thread; TLS failures keep their meaning instead of becoming texts."""
        try:
            super()._client_connect()
        except ssl.SSLCertVerificationError as error:
            remedy = "this is not our broker, its SVID expired, or our trust bundle is old; nothing was sent"
            raise TheirsError(
                "broker_identity", getattr(error, "verify_message", "") or str(error.args[0]), where=self._where(), remedy=remedy
            ) from error
        except ssl.SSLError as error:
            raise WorldError("tls", f"no TLS 1.3 session: {error}", where=self._where()) from error

    def _on_connect(
        self, client: Paho, userdata: Any, flags: ConnectFlags, reason_code: ReasonCode, properties: Properties | None = None
    ) -> None:
        self.present = flags.session_present
        self._packet_limit = getattr(properties, "MaximumPacketSize", self._packet_limit)
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self, client: Paho, userdata: Any, flags: DisconnectFlags, reason_code: ReasonCode, properties: Properties | None = None
    ) -> None:
        if not self._connected.done():
            self._connected.set_exception(aiomqtt.MqttCodeError(reason_code, "connection closed before CONNACK"))
        elif not self._connected.cancelled():
            super()._on_disconnect(client, userdata, flags, reason_code, properties)
        self._finish(str(reason_code))

    def _on_message(self, client: Paho, userdata: Any, message: MQTTMessage) -> None:  # noqa: ARG002 - paho's signature
        self._deliver(self, Arrived(message.topic, bytes(message.payload), message.qos, message.mid, _terms(message.properties)))

    def _on_publish(self, client: Paho, userdata: Any, mid: int, reason_code: ReasonCode, properties: Properties) -> None:  # noqa: ARG002 - paho's signature
        done = self._sent.pop(mid, None)
        if done is not None and not done.done():
            done.set_result(reason_code.value)
        if not self._sent:
            self._idle.set()

    def _on_socket_open(self, client: Paho, userdata: Any, sock: Any) -> None:  # noqa: ARG002 - paho's signature
        """Register the socket, from the executor's thread; a session that was given up meanwhile must not come alive."""
        if self._abandoned:
            sock.close()
            raise ConnectionAbortedError("given up")
        self._loop.call_soon_threadsafe(self._adopt, sock)

    def _adopt(self, sock: Any) -> None:
        if not self._abandoned and sock.fileno() >= 0:
            self._loop.add_reader(sock.fileno(), self._readable)
            self._misc_task = self._loop.create_task(self._misc_loop())

    def _readable(self) -> None:
        """Read until nothing is left, also inside the TLS layer, where the selector cannot see it."""
        self._heard()
        try:
            while True:
                self._client.loop_read()
                pending = getattr(self._client.socket(), "pending", None)
                if pending is None or pending() == 0:
                    return
        except Exception as error:  # noqa: BLE001 - whatever paho raises here means a broken connection
            self._finish(str(error))

    def _on_socket_register_write(self, client: Paho, userdata: Any, sock: Any) -> None:  # noqa: ARG002 - paho's signature
        self._loop.call_soon_threadsafe(self._writable_wanted, sock)

    def _writable_wanted(self, sock: Any) -> None:
        """Register for writing unless the socket was closed since paho asked (aiomqtt would meet a bad descriptor)."""
        if not self._abandoned and sock.fileno() >= 0:
            self._loop.add_writer(sock.fileno(), self._write)

    def _write(self) -> None:
        try:
            self._client.loop_write()
        except Exception as error:  # noqa: BLE001 - whatever paho raises here means a broken connection
            self._finish(str(error))

    def _on_socket_unregister_write(self, client: Paho, userdata: Any, sock: Any) -> None:  # noqa: ARG002 - paho's signature
        if sock.fileno() >= 0:
            self._loop.remove_writer(sock.fileno())

    def _finish(self, cause: str) -> None:
        if not self.ended.is_set():
            self.cause = cause
            self.ended.set()
            self._idle.set()


def obey_cancellation() -> None:
    """Raise the cancellation that aiomqtt may have dropped.

    It waits by `asyncio.wait_for`, which on Python 3.11 returns normally if the task is cancelled just as the future completes: a link that is
    told to stop while CONNACK arrives would run for ever (CPython issue 86296, mended in 3.12).
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def refusal(code: int, topic: str) -> ApplianceError:
    """Translate a PUBACK reason code from `FAILURE` on (MQTT 5, table 3-5)."""
    if code == _QUOTA_EXCEEDED:
        return WorldError("quota_exceeded", "the broker's quota is exhausted", where=topic)
    if code == _NOT_AUTHORISED:
        remedy = "the broker's permissions follow the SVID's name; check the topic and the registration"
        return TheirsError("not_authorised", "the broker does not let this workload publish here", where=topic, remedy=remedy)
    return TheirsError("not_accepted", f"the broker refused the message with reason code {code:#04x}", where=topic)


_NOT_AUTHORISED = 0x87
_QUOTA_EXCEEDED = 0x97


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]  # paho left this constructor unannotated


def _wire(terms: Terms) -> Properties:
    properties = _properties(PacketTypes.PUBLISH)
    if terms.response_topic:
        properties.ResponseTopic = terms.response_topic
    if terms.correlation:
        properties.CorrelationData = terms.correlation
    if terms.content_type:
        properties.ContentType = terms.content_type
    if terms.expiry_s is not None:
        properties.MessageExpiryInterval = terms.expiry_s
    return properties


def _terms(properties: Properties | None) -> Terms:
    return Terms(
        response_topic=getattr(properties, "ResponseTopic", ""),
        correlation=getattr(properties, "CorrelationData", b""),
        content_type=getattr(properties, "ContentType", ""),
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
    )
