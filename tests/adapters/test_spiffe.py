"""The identity adapter against the lab's Workload API."""

import asyncio
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from appliance.adapters.spiffe import WorkloadIdentity
from appliance.contract.errors import WorldError
from appliance.lab.authority import Authority, Svid
from tests.fakes.private_region import AGGREGATOR, BROKER, PrivateRegion, device, until

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`

JETSON = device("jetson-1")


@pytest.fixture
def region() -> Iterator[PrivateRegion]:
    """A Workload API without a running broker."""
    region = PrivateRegion()
    yield region
    region.__exit__()


def server(svid: Svid) -> int:
    """Accept one TLS connection with this SVID on the port that is returned."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(svid.pem)
        file.flush()
        context.load_cert_chain(file.name)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection, suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                tls.sendall(tls.recv(100))

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def echo(context: ssl.SSLContext, port: int) -> bytes:
    """Send a word through a connection made with this context."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
        tls.sendall(b"hello")
        return tls.recv(100)


def descriptors() -> int:
    """Count this process's open descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_an_identity_is_renewed_by_push(region: PrivateRegion) -> None:
    """`renewed` returns when the agent pushes a newer SVID, for everyone who waits."""
    async with region.identity(JETSON) as identity:
        assert identity.spiffe_id == JETSON.spiffe_id
        assert 3500 < identity.not_after - time.time() <= 3600
        waiting = [asyncio.create_task(identity.renewed()) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        region.api.renew(JETSON.spiffe_id)
        async with asyncio.timeout(5):
            await asyncio.gather(*waiting)


async def test_only_the_right_peer_passes_the_handshake(region: PrivateRegion) -> None:
    """The peer's SPIFFE ID decides; a valid SVID of another workload, or of another authority, is refused before a byte is sent."""
    async with region.identity(JETSON) as identity:
        context = identity.client_context(BROKER.spiffe_id)
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert await asyncio.to_thread(echo, context, server(region.authority.issue(BROKER))) == b"hello"
        with pytest.raises(ssl.SSLCertVerificationError, match=r"expected spiffe://appliance\.lab/region/eu-1/broker"):
            await asyncio.to_thread(echo, context, server(region.authority.issue(AGGREGATOR)))
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(echo, context, server(Authority().issue(BROKER)))


async def test_the_peer_is_checked_on_asyncio_streams_too(region: PrivateRegion) -> None:
    """The same context protects asyncio's transports, which use another TLS class."""
    async with region.identity(JETSON) as identity:
        context = identity.client_context(AGGREGATOR.spiffe_id)
        with pytest.raises(ssl.SSLCertVerificationError, match="expected"):
            await asyncio.open_connection("127.0.0.1", server(region.authority.issue(BROKER)), ssl=context)


async def test_contexts_leave_no_descriptor_behind(region: PrivateRegion) -> None:
    """The key goes to OpenSSL through memory that is given back."""
    async with region.identity(JETSON) as identity:
        identity.client_context(BROKER.spiffe_id)
        before = descriptors()
        for _ in range(20):
            identity.client_context(BROKER.spiffe_id)
        assert descriptors() == before


async def test_an_expired_svid_is_not_used(region: PrivateRegion) -> None:
    """The library would serve it for ever; we look at the clock."""
    now = [time.time()]
    identity = await WorkloadIdentity.open(region.register(JETSON), wall=lambda: now[0])
    try:
        identity.client_context(BROKER.spiffe_id)
        region.api.hang_up(JETSON.spiffe_id)
        now[0] += 3601
        with pytest.raises(WorldError) as caught:
            identity.client_context(BROKER.spiffe_id)
        assert caught.value.reason == "svid_expired"
    finally:
        await identity.close()


async def test_a_missing_socket_is_named_in_time() -> None:
    """Without an agent `open` fails within its timeout and names the socket."""
    began = time.monotonic()
    with pytest.raises(WorldError, match=r"unix:/nowhere/agent\.sock") as caught:
        await WorkloadIdentity.open("/nowhere/agent.sock", timeout_s=0.5)
    assert caught.value.reason == "workload_api"
    assert time.monotonic() - began < 2


async def test_a_late_agent_is_waited_for(region: PrivateRegion) -> None:
    """A socket that appears while `open` waits is used."""
    address = region.register(JETSON)
    region.api.hang_up(JETSON.spiffe_id)
    await asyncio.to_thread(Path(address.removeprefix("unix:")).unlink, missing_ok=True)
    opening = asyncio.create_task(WorkloadIdentity.open(address, timeout_s=10))
    await asyncio.sleep(0.3)
    region.api.serve(JETSON.spiffe_id)
    identity = await opening
    assert identity.spiffe_id == JETSON.spiffe_id
    await identity.close()


async def test_a_denial_tells_its_reason(region: PrivateRegion) -> None:
    """The library only times out; the error must say that there is no entry."""
    address = region.register(JETSON)
    region.api.revoke(JETSON.spiffe_id)
    with pytest.raises(WorldError, match="no identity issued"):
        await WorkloadIdentity.open(address, timeout_s=1.5)


async def test_a_source_that_closed_for_good_is_replaced(region: PrivateRegion) -> None:
    """Any parsing error closes the library's source; the watchdog makes another and renewals flow again."""
    async with region.identity(JETSON) as identity:
        dead = identity._source
        assert dead is not None
        dead.close()
        await until(lambda: identity._source is not None and identity._source is not dead)
        renewed = asyncio.create_task(identity.renewed())
        await asyncio.sleep(0)
        region.api.renew(JETSON.spiffe_id)
        await asyncio.wait_for(renewed, 5)


@pytest.mark.slow
async def test_an_agent_that_was_away_is_found_again(region: PrivateRegion) -> None:
    """The old SVID serves meanwhile; after the agent's return the identity is renewed without help."""
    async with region.identity(device("jetson-1", ttl_s=6.0)) as identity:
        region.api.hang_up(JETSON.spiffe_id)
        first = identity.not_after
        await until(lambda: time.time() > first, 10)
        with pytest.raises(WorldError, match="expired"):
            identity.client_context(BROKER.spiffe_id)
        region.api.serve(JETSON.spiffe_id)
        await until(lambda: identity.not_after > first, 8)
        identity.client_context(BROKER.spiffe_id)
