"""The lab's broker: who gets in, who may do what, and how it lives with its SVID."""

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.contract import topics
from appliance.contract.errors import TheirsError
from appliance.lab.authority import Authority
from appliance.lab.broker import MAX_PACKET_BYTES
from appliance.ports import Inbound
from tests.fakes.private_region import AGGREGATOR, BROKER, CLOUD, REGION, PrivateRegion, device, until

JETSON = device("jetson-1")
OTHER = device("jetson-2")


@pytest.fixture
def region() -> Iterator[PrivateRegion]:
    """A region with a running broker."""
    with PrivateRegion() as region:
        yield region


def served_serial(region: PrivateRegion) -> int:
    """Connect without MQTT and return the serial of the certificate that the broker shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", region.port)) as raw, context.wrap_socket(raw) as tls:
        certificate = tls.getpeercert(binary_form=True)
    assert certificate is not None
    return x509.load_der_x509_certificate(certificate).serial_number


def encodings(key: ec.EllipticCurvePrivateKey) -> list[bytes]:
    """Return what of a private key could lie in a file: its number, and the text of both usual containers."""
    found = [key.private_numbers().private_value.to_bytes(32, "big")]
    for form in (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL):
        pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        found += pem.splitlines()[1:-1]
    return found


def talk(tls: ssl.SSLSocket, packet: bytes) -> bytes:
    """Send a packet and return the answer. Raises: OSError when there is none."""
    tls.sendall(packet)
    answer = tls.recv(100)
    if not answer:
        raise ConnectionResetError("closed without an answer")
    return answer


async def test_the_brokers_svid_is_renewed_under_live_clients(region: PrivateRegion) -> None:
    """A new SVID in the inherited memory and a SIGHUP: new connections see it, live ones stay and go on."""
    assert region.process is not None
    async with region.link(JETSON) as link:
        for _ in range(3):
            region.api.renew(BROKER.spiffe_id)
            region.broker.rotate(region.process.pid)
            fresh = region.api.svid(BROKER.spiffe_id).chain[0].serial_number
            await until(lambda fresh=fresh: served_serial(region) == fresh)
            await link.publish(topics.vitals(REGION, "jetson-1"), b"")
        assert link.counters.losses == 0
        assert link.counters.connections == 1


async def test_no_private_key_is_on_disk(region: PrivateRegion) -> None:
    """Through connections, rotations and a saved database, no file holds a key of anyone, in any usual form."""
    assert region.process is not None
    keys = [region.api.svid(BROKER.spiffe_id).key]
    async with region.link(JETSON) as link:
        for workload in (BROKER, JETSON):
            keys.append(region.api.svid(workload.spiffe_id).key)
            region.api.renew(workload.spiffe_id)
            keys.append(region.api.svid(workload.spiffe_id).key)
        region.broker.rotate(region.process.pid)
        await until(lambda: link.rotations == 1)
        await link.publish(topics.vitals(REGION, "jetson-1"), b"", retain=True)
    region.terminate()
    files = [path for path in region.directory.rglob("*") if path.is_file()]
    assert {"mosquitto.conf", "acl", "root-0.pem", "mosquitto.db"} <= {path.name for path in files}
    needles = [needle for key in keys for needle in encodings(key)]
    assert needles
    for path in files:
        content = path.read_bytes()
        assert b"PRIVATE KEY" not in content, path
        assert not any(needle in content for needle in needles), path


async def test_a_replaced_signing_ca_needs_no_restart(region: PrivateRegion) -> None:
    """SVIDs under a new intermediate are accepted at once, because the broker trusts the root."""
    async with region.link(JETSON) as link:
        region.authority.rotate()
        region.api.renew(JETSON.spiffe_id)
        await until(lambda: link.rotations == 1)
        await link.publish(topics.vitals(REGION, "jetson-1"), b"")


@pytest.mark.parametrize("credentials", ["none", "foreign", "expired"])
def test_strangers_are_refused(region: PrivateRegion, credentials: str) -> None:
    """No certificate, one of another authority with a right name, and an expired one: none gets as far as MQTT."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=region.authority.root_pem.decode())
    if credentials != "none":
        svid = Authority().issue(JETSON) if credentials == "foreign" else region.authority.issue(device("jetson-1", ttl_s=-5))
        memory = os.memfd_create("svid")
        os.write(memory, svid.pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
        os.close(memory)
    connect = bytes.fromhex("101500044d5154540502003c0000086a6574736f6e2d31")
    with socket.create_connection(("127.0.0.1", region.port), timeout=5) as raw, context.wrap_socket(raw) as tls:
        with pytest.raises(OSError, match=r"alert|EOF|reset|closed") as caught:  # TLS 1.3 refuses after our side of the handshake
            talk(tls, connect)
        assert not isinstance(caught.value, TimeoutError)
    assert "as jetson-1" not in region.log()


async def test_a_device_reads_only_its_own(region: PrivateRegion) -> None:
    """A subscription to everything is granted by mosquitto, but delivers only what is the device's to read."""
    seen: list[str] = []

    async def note(message: Inbound) -> None:
        seen.append(message.topic)

    own = f"v1/{REGION}/d/jetson-1/dn/command"
    async with region.link(JETSON, ("on", "v1/#", note)), region.link(OTHER) as other, region.link(AGGREGATOR) as aggregator:
        await other.publish(topics.vitals(REGION, "jetson-2"), b"")
        await aggregator.publish(f"v1/{REGION}/d/jetson-2/dn/command", b"")
        await aggregator.publish(topics.upstream_chunk(REGION), b"")
        await aggregator.publish(topics.release(REGION), b"")
        await aggregator.publish(own, b"")
        await until(lambda: own in seen)
    assert seen == [topics.release(REGION), own]


@pytest.mark.parametrize(
    ("workload", "topic"),
    [
        (JETSON, topics.vitals(REGION, "jetson-2")),
        (JETSON, topics.answer(REGION, "jetson-1")),
        (JETSON, topics.release(REGION)),
        (JETSON, topics.upstream_chunk(REGION)),
        (JETSON, "v1/us-1/d/jetson-1/up/vitals"),
        (JETSON, "$SYS/broker/version"),
        (AGGREGATOR, topics.vitals(REGION, "jetson-1")),
        (AGGREGATOR, topics.upstream_release(REGION)),
        (CLOUD, topics.release(REGION)),
        (CLOUD, topics.answer(REGION, "jetson-1")),
        (CLOUD, topics.upstream_chunk(REGION)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.dns_name,
)
async def test_nobody_writes_where_he_may_not(region: PrivateRegion, workload: object, topic: str) -> None:
    """What contract/topics.py does not give to a role, the broker refuses by reason code."""
    async with region.link(workload) as link:  # type: ignore[arg-type]  # parametrised
        with pytest.raises(TheirsError) as caught:
            await link.publish(topic, b"")
        assert caught.value.reason == "not_authorised"


@pytest.mark.slow
async def test_retained_survives_kill_9_after_autosave() -> None:
    """After kill -9 the broker knows what it wrote last; here it writes every second."""
    seen: list[bytes] = []

    async def note(message: Inbound) -> None:
        seen.append(message.payload)

    with PrivateRegion(autosave_s=1) as region:
        async with region.link(AGGREGATOR) as aggregator:
            await aggregator.publish(topics.release(REGION), b"release", retain=True)
            database = region.state / "store" / "mosquitto.db"
            await until(lambda: has(database, b"release"))
            region.kill()
            await asyncio.sleep(0.2)
            region.start()
            async with region.link(JETSON, ("on", topics.release(REGION), note)):
                await until(lambda: seen == [b"release"])


def has(path: Path, needle: bytes) -> bool:
    """Whether a file is there and contains some bytes."""
    return path.exists() and needle in path.read_bytes()


def test_the_documented_configuration_is_the_tested_one(region: PrivateRegion) -> None:
    """docs/broker.md has the lab's options in their order, and its permissions to the letter."""
    page = (Path(__file__).parent.parent.parent / "docs/broker.md").read_text()
    own = [line.split()[0] for line in region.broker.config().splitlines() if not line.startswith("user ")]
    first, permissions = (next(block for block in page.split("```") if f"\n{start}" in block) for start in ("listener", "pattern"))
    assert [line.split()[0] for line in first.strip().splitlines()] == own
    assert permissions.strip() == region.broker.permissions().strip()
    assert f"max_packet_size {MAX_PACKET_BYTES}\n" in first
