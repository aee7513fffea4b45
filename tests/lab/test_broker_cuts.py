"""A device whose SVID has expired or whose attestation was revoked is cut off, nobody else notices, and roots are replaced under live clients."""

import asyncio
import json
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from structlog.testing import capture_logs

from appliance.adapters.clock import SystemClock
from appliance.adapters.depot import Depot
from appliance.adapters.mqtt import MqttLink
from appliance.contract import identities, topics
from appliance.contract.errors import TheirsError, WorldError
from appliance.lab.authority import Authority, Svid, Workload
from appliance.ports import Inbound
from appliance.regional.attesting import Attesting
from appliance.regional.cutting import CONTROL, REPEAT_S, Cutting
from tests.fakes.paper_region import DEVICE, PaperClock, PaperDepot, PaperSite
from tests.fakes.private_region import AGGREGATOR, BROKER, REGION, PrivateRegion, device, until
from tests.fleet.conftest import Condition, running
from tests.fleet.conftest import until as until_async

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`

JETSON = device("jetson-1")
OTHER = device("jetson-2")
VITALS = topics.vitals(REGION, "jetson-1")
REPORT = Path(__file__).parent.parent.parent / "build/reports/trust.json"
LIMIT_S = 60.0
ADMINISTRATIVE = 152


@pytest.fixture
def region() -> Iterator[PrivateRegion]:
    """A region with a running broker."""
    with PrivateRegion() as region:
        yield region


def context(svid: Svid, root: bytes) -> ssl.SSLContext:
    """TLS with this SVID; no file is written."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=root.decode())
    memory = os.memfd_create("svid")
    os.write(memory, svid.pem)
    context.load_cert_chain(f"/proc/self/fd/{memory}")
    os.close(memory)
    return context


class Stubborn:
    """A client that keeps its first SVID and never leaves by itself: what a stolen device would run."""

    def __init__(self, region: PrivateRegion, svid: Svid, *, will: str = "", claims: str = "", method: str = "") -> None:
        self.svid = svid
        self.connected: int | None = None
        self.left: tuple[int, float] | None = None
        self.heard: list[str] = []
        self.client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, claims or svid.workload.dns_name, protocol=paho.MQTTv5, reconnect_on_failure=False
        )
        self.client.tls_set_context(context(svid, region.authority.root_pem))
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = self._on_disconnect
        self.client.on_message = lambda _client, _mine, message: self.heard.append(message.topic)
        if will:
            self.client.will_set(will, b"")
        properties = Properties(PacketTypes.CONNECT)
        if method:
            properties.AuthenticationMethod = method
        self.client.connect("127.0.0.1", region.port, properties=properties)
        self.client.loop_start()

    def _on_connect(self, _client: object, _mine: object, _flags: object, code: paho.ReasonCode, _properties: Properties | None) -> None:
        self.connected = code.value

    def _on_disconnect(self, _client: object, _mine: object, _flags: object, code: paho.ReasonCode, _properties: Properties | None) -> None:
        self.left = self.left or (code.value, time.time())

    def close(self) -> None:
        """Leave, and end the thread."""
        self.client.disconnect()
        self.client.loop_stop()


def note(key: str, seconds: float) -> None:
    """Put a measured time into the report; what others wrote there stays."""
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    report.setdefault("cut_s", {})[key] = round(seconds, 2)
    REPORT.write_text(json.dumps(report, indent=1) + "\n")


async def refuse_nothing(_: Inbound) -> bytes:
    """Answer a request."""
    return b"answer"


@asynccontextmanager
async def cutting(region: PrivateRegion, folder: Path) -> AsyncIterator[tuple[Cutting, Depot, MqttLink]]:
    """A region's link on which challenges and pings are answered, and its list of those cut off, kept for a while."""
    served = [("serve", topics.challenge(REGION, "+"), refuse_nothing), ("serve", topics.ping(REGION, "+"), refuse_nothing)]
    async with region.link(AGGREGATOR, *served) as link:
        depot = Depot(folder)
        cutting = Cutting(link, SystemClock(), depot)
        task = asyncio.create_task(cutting.run(lambda: None))
        try:
            yield cutting, depot, link
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def may(link: MqttLink, topic: str) -> bool:
    """Whether the broker lets a connected client publish there."""
    await until(lambda: link.connected)
    try:
        await link.publish(topic, b"")
    except TheirsError as error:
        if error.reason == "not_authorised":
            return False
        raise
    return True


async def until_may(link: MqttLink, topic: str, *, allowed: bool, timeout_s: float = 15.0) -> None:
    """Return when the broker lets a client publish there, or does so no more."""

    async def whether() -> bool:
        return await may(link, topic) is allowed

    await until_async(whether, timeout_s)


@pytest.mark.slow
async def test_an_expired_svid_ends_its_connection(region: PrivateRegion) -> None:
    """Who stays connected over the end of its SVID is disconnected; a neighbour that renews his never notices, also after the old ones' end."""
    neighbour = device("jetson-2", ttl_s=4)
    with ExitStack() as stack:
        async with region.link(neighbour) as link:
            stubborn = Stubborn(region, region.authority.issue(device("jetson-1", ttl_s=4)))
            stack.callback(stubborn.close)
            await until(lambda: stubborn.connected == 0)
            stubborn.client.publish(VITALS, b"", 1).wait_for_publish(5)
            async with asyncio.timeout(20):
                while stubborn.left is None or time.time() < stubborn.svid.not_after + 4:
                    await link.publish(topics.vitals(REGION, "jetson-2"), b"")
                    await asyncio.sleep(0.1)
            code, at = stubborn.left
            assert code == ADMINISTRATIVE
            assert 0 <= at - stubborn.svid.not_after < LIMIT_S
            note("svid_expired", at - stubborn.svid.not_after)
            assert link.rotations >= 3
            assert link.counters.losses == 0
            assert "Cut jetson-2" not in region.log()


@pytest.mark.slow
async def test_a_second_connect_does_not_hide_the_first(region: PrivateRegion) -> None:
    """A CONNECT that is refused after its identity was accepted (an unknown method) leaves the first connection's end in force."""
    svid = region.authority.issue(device("jetson-1", ttl_s=4))
    with ExitStack() as stack:
        first = Stubborn(region, svid)
        stack.callback(first.close)
        await until(lambda: first.connected == 0)
        second = Stubborn(region, svid, method="none")
        stack.callback(second.close)
        await until(lambda: second.connected is not None)
        assert second.connected != 0
        assert first.left is None
        await until(lambda: first.left is not None, 10)
    assert first.left is not None
    assert first.left[1] - svid.not_after < LIMIT_S


async def test_a_will_is_held_to_the_same_rights(region: PrivateRegion) -> None:
    """A will on a neighbour's topic is not published when the connection breaks; one on the device's own is."""
    heard: list[str] = []

    async def hear(message: Inbound) -> None:
        heard.append(message.topic)

    async with region.link(AGGREGATOR, ("on", topics.vitals(REGION, "+"), hear)):
        for topic in (topics.vitals(REGION, "jetson-2"), VITALS):
            client = Stubborn(region, region.authority.issue(JETSON), will=topic)
            await until(lambda client=client: client.connected == 0)
            client.client.loop_stop()
            client.client.socket().shutdown(socket.SHUT_RDWR)
        await until(lambda: heard == [VITALS])


@pytest.mark.parametrize(
    ("spiffe_id", "claims"),
    [
        ("spiffe://elsewhere.example/region/eu-1/device/jetson-1", "jetson-1"),
        ("spiffe://appliance.lab/region/us-1/device/jetson-1", "jetson-1"),
        ("spiffe://appliance.lab/region/eu-1/device/cloud", "cloud"),
        ("spiffe://appliance.lab/region/eu-1/device/quarantined", "quarantined"),
        ("spiffe://appliance.lab/region/eu-1/device/+", "+"),
        ("spiffe://appliance.lab/region/eu-1/device/a/b", "a/b"),
        ("spiffe://appliance.lab/region/eu-1/device/", "jetson-1"),
        ("spiffe://appliance.lab/region/eu-1/broker", "broker"),
        ("spiffe://appliance.lab/region/us-1/aggregator", "region-us-1"),
        ("spiffe://appliance.lab/region/eu-1/device/jetson-1", "jetson-2"),
    ],
)
def test_only_a_devices_own_uri_lets_it_in(region: PrivateRegion, spiffe_id: str, claims: str) -> None:
    """Another trust domain or region, a role's name, wildcards, another's client id: refused, whatever the common name says."""
    with ExitStack() as stack:
        client = Stubborn(region, region.authority.issue(Workload(spiffe_id, "jetson-1")), claims=claims)
        stack.callback(client.close)
        deadline = time.monotonic() + 5
        while client.connected is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.connected == 135


def test_the_uri_counts_and_not_the_common_name(region: PrivateRegion) -> None:
    """An SVID with another's common name is who its URI says."""
    with ExitStack() as stack:
        client = Stubborn(region, region.authority.issue(Workload(JETSON.spiffe_id, "jetson-2")), claims="jetson-1")
        stack.callback(client.close)
        client.client.publish(VITALS, b"", 1).wait_for_publish(5)
        assert client.connected == 0
    assert "u'jetson-1'" in region.log()


@pytest.mark.slow
async def test_a_revoked_device_is_cut_until_it_attests(region: PrivateRegion, tmp_path: Path) -> None:
    """Revoked by a file: disconnected, back only to prove itself, hears nothing else; let in by a good proof, not by removing the file."""
    heard: list[str] = []

    async def hear(message: Inbound) -> None:
        heard.append(message.topic)

    routes = ("on", topics.beat(REGION), hear)
    async with cutting(region, tmp_path) as (cut, depot, aggregator), region.link(JETSON, routes) as link, region.link(OTHER) as neighbour:
        assert await may(link, VITALS)
        began = time.monotonic()
        await asyncio.to_thread(depot.save, "revoked-jetson-1", b"stolen\n")
        await until(lambda: link.counters.losses == 1, LIMIT_S)
        note("revoked", time.monotonic() - began)
        assert not await may(link, VITALS)
        assert not await may(link, topics.key(REGION, "jetson-1"))
        assert not await may(link, topics.challenge(REGION, "quarantined"))
        assert not await may(link, topics.challenge(REGION, "jetson-2"))
        assert await link.ask(topics.challenge(REGION, "jetson-1"), b"") == b"answer"
        await aggregator.publish(topics.beat(REGION), b"")
        await asyncio.to_thread(depot.forget, "revoked-jetson-1")
        await asyncio.sleep(1.5)
        assert not await may(link, VITALS)
        assert heard == []
        cut.judged("jetson-1", "attest", "")
        await until_may(link, VITALS, allowed=True)
        assert await neighbour.ask(topics.ping(REGION, "jetson-2"), b"") == b"answer"
        assert neighbour.counters.losses == 0


@pytest.mark.slow
async def test_a_restarted_broker_hears_the_list_again(region: PrivateRegion, tmp_path: Path) -> None:
    """The plugin's list lives in the broker's memory; the region repeats it, so a restart lets nobody back in for long."""
    async with cutting(region, tmp_path) as (cut, _, _), region.link(JETSON) as link:
        cut.judged("jetson-1", "attest", "pcr")
        await until_may(link, VITALS, allowed=False)
        region.kill()
        region.start()
        await until_may(link, VITALS, allowed=False, timeout_s=REPEAT_S + 15)


async def test_nobody_but_the_region_can_cut(region: PrivateRegion) -> None:
    """A device may not write to the plugin's topic, not even its own name."""
    async with region.link(JETSON) as link, region.link(OTHER) as neighbour:
        with pytest.raises(TheirsError, match="does not let"):
            await link.publish(CONTROL, b"jetson-2")
        await asyncio.sleep(1.5)
        assert neighbour.counters.losses == 0


async def test_new_roots_reach_the_broker_under_live_clients(region: PrivateRegion) -> None:
    """A root added to the hash directory is trusted at once, the broker's own SVID moves to it, and a live client loses nothing."""
    fresh = Authority()
    assert region.process is not None
    with ExitStack() as stack:
        async with region.link(OTHER) as link:
            early = Stubborn(region, fresh.issue(JETSON))
            stack.callback(early.close)
            await asyncio.sleep(0.5)
            assert early.connected is None
            region.broker.trust(fresh.root_pem)
            late = Stubborn(region, fresh.issue(JETSON))
            stack.callback(late.close)
            await until(lambda: late.connected == 0)
            region.broker._issue = lambda: fresh.issue(BROKER)
            region.broker.rotate(region.process.pid)
            await until(lambda: shows(region, fresh))
            await link.publish(topics.vitals(REGION, "jetson-2"), b"")
            assert late.left is None
            assert link.counters.losses == 0
            assert link.counters.connections == 1


def shows(region: PrivateRegion, authority: Authority) -> bool:
    """Whether the broker's SVID is one of this authority's now."""
    try:
        with (
            socket.create_connection(("127.0.0.1", region.port)) as raw,
            context(authority.issue(OTHER), authority.root_pem).wrap_socket(raw),
        ):
            return True
    except ssl.SSLError:
        return False


class Ear:
    """A broker that hears, or not."""

    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.down = False

    async def publish(self, topic: str, payload: bytes, *, timeout_s: float) -> None:
        assert (topic, timeout_s > 0) == (CONTROL, True)
        if self.down:
            raise WorldError("not_connected", "the broker was not reached")
        self.told.append(payload)


def paper(depot: PaperDepot, ear: Ear, clock: PaperClock | None = None) -> Cutting:
    """A region's list without a broker."""
    return Cutting(ear, clock or PaperClock(), depot)  # type: ignore[arg-type]  # the parts of them that it uses


@pytest.mark.parametrize(
    ("asked", "refused", "cut"),
    [
        ("attest", "pcr", True),
        ("attest", "anchor", True),
        ("attest", "revoked", True),
        ("attest", "quote", True),
        ("enrol", "ek_changed", True),
        ("prove", "certify", True),
        ("attest", "nonce", False),
        ("attest", "no_challenge", False),
        ("attest", "malformed", False),
        ("challenge", "unknown_device", False),
        ("attest", "generation", False),
        ("key", "not_attested", False),
    ],
)
async def test_only_a_judgement_of_the_device_cuts_it(asked: str, refused: str, *, cut: bool) -> None:
    """What the region refuses because of the exchange, or of its own restart, cuts nobody; a refusal of state or identity does."""
    ear = Ear()
    cutting = paper(PaperDepot(), ear)
    cutting.judged("jetson-1", asked, refused)
    await cutting.look()
    assert ear.told == [b"jetson-1" if cut else b""]


async def test_a_restarted_region_lets_nobody_back_in() -> None:
    """The list is on disk before the broker is told; a region without a broker says so once, and tells it as soon as it is back."""
    depot, ear = PaperDepot(), Ear()
    ear.down = True
    first = paper(depot, ear)
    first.judged("jetson-1", "attest", "pcr")
    with capture_logs() as logs:
        await first.look()
        await first.look()
    assert [entry["event"] for entry in logs] == ["cuts_not_told"]
    ear.down = False
    second = paper(depot, ear)
    await second.look()
    assert ear.told == [b"jetson-1"]
    second.judged("jetson-1", "challenge", "")
    second.judged("jetson-1", "key", "")
    await second.look()
    assert ear.told == [b"jetson-1"]
    second.judged("jetson-1", "attest", "")
    await second.look()
    assert ear.told == [b"jetson-1", b""]
    assert paper(depot, ear).cut == frozenset()


async def test_attesting_says_how_it_judged() -> None:
    """The region's real exchange tells a good proof, and a revocation by its reason."""
    site, heard = PaperSite(), []
    judged: Callable[[str, str, str], None] = lambda *said: heard.append(said)  # noqa: E731 - one expression
    site.attesting._judged = judged
    assert isinstance(site.attesting, Attesting)
    await site.round()
    assert heard[-1] == (DEVICE, "attest", "")
    site.records.save(f"revoked-{DEVICE}", b"stolen")
    site.restart_device()
    site.attesting._judged = judged
    await site.round()
    assert (DEVICE, "attest", "revoked") in heard


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_revoked_device_of_a_lab_is_cut_and_comes_back() -> None:
    """Real daemons: an operator's file ends the device's connection within a minute, and it is whole again after the file is gone."""
    async with running(rate_per_s=0, reattest_s=5.0) as lab:
        name = lab.devices[0].name
        file = lab.site.path / "region" / "state" / "devices" / "state" / f"revoked-{name}"
        log = next(unit.log for unit in lab.units if unit.name == "broker")

        def said(text: str) -> Condition:
            async def whether() -> bool:
                return text in log.read_text()

            return whether

        began = time.monotonic()
        await asyncio.to_thread(file.write_text, "stolen\n")
        await until_async(said(f"Cut {name}: quarantined."), LIMIT_S)
        note("revoked_lab", time.monotonic() - began)
        await until_async(said(f"u'{identities.QUARANTINED}'"), 30)
        await asyncio.to_thread(file.unlink)
        await until_async(said(f"Cut {name}: quarantined no longer."), 60)
