"""The workload's SPIFFE identity from the Workload API (library `spiffe`): SVIDs in memory, renewed by push, checked by ourselves.

What the library leaves to its user, and where it is done here:
1. Its constructor and fetches block: they run in a thread, with a timeout. A socket that is not there yet is waited for.
2. An agent that denies shows as a mere timeout: one direct fetch then asks for the reason.
3. A source that met an error is closed for good, and one whose agent was long away may wait two minutes for its next try (gRPC's backoff):
   a watchdog builds a new one when it is closed or when a renewal is overdue.
4. A source serves an expired SVID for ever: `client_context` looks at the clock.
5. It knows no TLS: the key goes from memory to OpenSSL through a memfd, never a file; only the bundle of our own trust domain is trusted; the
   peer's SPIFFE ID is compared inside the handshake, before a byte of ours is sent (SPIFFE X.509-SVID specification, section 5.2).
"""

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import structlog
from cryptography.hazmat.primitives import serialization
from spiffe import WorkloadApiClient, X509Source
from spiffe.errors import PySpiffeError
from spiffe.svid.x509_svid import X509Svid

from appliance.contract.errors import WorldError

_log = structlog.get_logger(__name__)

_RETRY_S = 0.2
"""Between looks at a socket that is not there yet."""
_REASON_S = 1.0
"""How long asking for a denial's reason may take."""
_WATCH_S = 1.0
"""Between looks of the watchdog."""
_REBUILD_S = 3.0
"""How long a new source may take for its first update; an agent answers in about 10 ms."""
_OVERDUE = 0.75
"""The part of an SVID's life after which its renewal is overdue; agents renew at half."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """An SVID and the authorities of its own trust domain. Times are seconds since the epoch."""

    spiffe_id: str
    serial: int
    not_before: float
    not_after: float
    pem: bytes
    authorities_der: bytes


class WorkloadIdentity:
    """Implements `ports.Identity`. Make one with `open`, give it back with `close`."""

    def __init__(self, socket: str, wall: Callable[[], float]) -> None:
        self._socket = socket
        self._wall = wall
        self._loop = asyncio.get_running_loop()
        self._source: X509Source | None = None
        self._snapshot: _Snapshot | None = None
        self._newer = asyncio.Event()
        self._closed = False
        self._watchdog: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, socket: str, *, timeout_s: float = 10.0, wall: Callable[[], float] = time.time) -> Self:
        """Wait for the socket (a path or `unix:/path`) and for the first SVID, then keep it renewed.

        Raises: WorldError (`workload_api`) naming the socket when `timeout_s` is over.
        """
        identity = cls(socket if socket.startswith("unix:") else f"unix:{socket}", wall)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                await identity._connect(max(_RETRY_S, deadline - time.monotonic() - _REASON_S))
                break
            except WorldError:
                if time.monotonic() + _RETRY_S >= deadline:
                    raise
                await asyncio.sleep(_RETRY_S)
        identity._watchdog = asyncio.create_task(identity._watch(), name="workload-api-watchdog")
        return identity

    @property
    def spiffe_id(self) -> str:
        """This workload's own SPIFFE ID."""
        return self._present().spiffe_id

    @property
    def not_after(self) -> float:
        """When the present SVID expires, seconds since the epoch."""
        return self._present().not_after

    def client_context(self, peer: str) -> ssl.SSLContext:
        """Return a TLS 1.3 context with the present SVID that accepts only a server whose SPIFFE ID is `peer`. Takes about 1 ms.

        Raises: WorldError (`svid_expired`, `workload_api`).
        """
        own = self._present()
        if self._wall() >= own.not_after:
            remedy = "check that the SPIFFE agent runs and that the clock is right"
            raise WorldError(
                "svid_expired", f"the SVID expired at {own.not_after:.0f}, it is {self._wall():.0f}", where=self._socket, remedy=remedy
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # a SPIFFE ID stands in place of a host name
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=own.authorities_der)
        _load_key(context, own.pem)
        context.sslsocket_class = _checked_socket(peer)
        context.sslobject_class = _checked_object(peer)
        return context

    async def renewed(self) -> None:
        """Return when a newer SVID than at the time of the call has arrived."""
        await self._newer.wait()

    async def close(self) -> None:
        """Stop the watchdog and the stream to the agent; later contexts are refused."""
        self._closed = True
        if self._watchdog is not None:
            self._watchdog.cancel()
            with suppress(asyncio.CancelledError):
                await self._watchdog
        await self._hang_up()
        self._snapshot = None

    async def _connect(self, timeout_s: float) -> None:
        """Build a source and take its first SVID. Raises: WorldError (`workload_api`)."""
        try:
            source = await asyncio.to_thread(self._build, timeout_s)
        except PySpiffeError as error:
            reason = await asyncio.to_thread(_reason, self._socket, error)
            remedy = "check that the SPIFFE agent runs and has an entry for this workload"
            raise WorldError("workload_api", f"no SVID: {reason}", where=self._socket, remedy=remedy) from error
        self._source = source
        source.subscribe_for_updates(self._updated)
        self._refresh()

    def _build(self, timeout_s: float) -> X509Source:
        """Block for the first update; a thread cannot be cancelled, so whoever closed meanwhile is obeyed here."""
        source = X509Source(socket_path=self._socket, timeout_in_seconds=timeout_s)
        if self._closed:
            source.close()
        return source

    async def _hang_up(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            await asyncio.to_thread(source.close)

    async def _watch(self) -> None:
        """Replace a source that is closed or that has missed a renewal; say so once, and once when SVIDs flow again."""
        told = False
        while True:
            await asyncio.sleep(_WATCH_S)
            lost = self._lost()
            if lost is None:
                if told:
                    _log.info("workload_api_recovered", socket=self._socket)
                told = False
                continue
            await self._hang_up()
            try:
                await self._connect(_REBUILD_S)
            except WorldError as error:
                if not told:
                    _log.warning("workload_api_lost", socket=self._socket, cause=lost, error=str(error))
                told = True

    def _lost(self) -> str | None:
        if self._source is None or self._source.is_closed():
            return "source closed"
        own = self._present()
        overdue = self._wall() > own.not_before + _OVERDUE * (own.not_after - own.not_before)
        return "renewal overdue" if overdue else None

    def _updated(self) -> None:
        """Pass the library's thread's news to the loop; a loop that is gone needs none."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._refresh)

    def _refresh(self) -> None:
        """Take the source's present state; an older or equal SVID (a change of bundle) wakes nobody."""
        if self._source is None:
            return
        try:
            context = self._source.get_x509_context()
        except PySpiffeError:
            return  # closed meanwhile: the watchdog sees it
        svid = context.default_svid
        bundle = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        before, self._snapshot = self._snapshot, _snapshot(svid, bundle.x509_authorities if bundle else ())
        if before is not None and before.serial != self._snapshot.serial:
            self._newer.set()
            self._newer = asyncio.Event()

    def _present(self) -> _Snapshot:
        if self._snapshot is None:
            raise WorldError("workload_api", "no SVID: closed", where=self._socket)
        return self._snapshot


def _snapshot(svid: X509Svid, authorities: Any) -> _Snapshot:
    chain = b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in svid.cert_chain)
    key = svid.private_key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return _Snapshot(
        spiffe_id=str(svid.spiffe_id),
        serial=svid.leaf.serial_number,
        not_before=svid.leaf.not_valid_before_utc.timestamp(),
        not_after=svid.leaf.not_valid_after_utc.timestamp(),
        pem=chain + key,
        authorities_der=b"".join(authority.public_bytes(serialization.Encoding.DER) for authority in authorities),
    )


def _reason(socket: str, first: Exception) -> str:
    """Ask once directly, because a source hides why it got nothing; blocks for at most `_REASON_S`."""
    try:
        with WorkloadApiClient(socket_path=socket) as client:
            client.fetch_x509_svid(timeout=_REASON_S)
    except PySpiffeError as error:
        return str(error)
    return str(first)


def _load_key(context: ssl.SSLContext, pem: bytes) -> None:
    """Hand chain and key to OpenSSL, which reads only files, through anonymous memory."""
    memory = os.memfd_create("svid", os.MFD_CLOEXEC)
    try:
        os.write(memory, pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
        os.pwrite(memory, bytes(len(pem)), 0)
    finally:
        os.close(memory)


def _require(certificate: Any, peer: str) -> None:
    """Compare the peer's only URI with the ID that it must have. Raises: ssl.SSLCertVerificationError."""
    uris = [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "URI"]
    if uris != [peer]:
        raise ssl.SSLCertVerificationError(f"the peer is {', '.join(uris) or 'without a SPIFFE ID'}, expected {peer}")


def _checked_socket(peer: str) -> type[ssl.SSLSocket]:
    class CheckedSocket(ssl.SSLSocket):
        """For blocking sockets; closes itself on refusal, because its creator never gets to hold it."""

        def do_handshake(self, block: bool = False) -> None:
            try:
                super().do_handshake(block)
                _require(self.getpeercert(), peer)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except BaseException:
                self.close()
                raise

    return CheckedSocket


def _checked_object(peer: str) -> type[ssl.SSLObject]:
    class CheckedObject(ssl.SSLObject):
        """For asyncio's transports."""

        def do_handshake(self) -> None:
            super().do_handshake()
            _require(self.getpeercert(), peer)

    return CheckedObject
