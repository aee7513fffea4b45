"""The link on a real mosquitto with mTLS: delivery, requests, losses, rotations, refusals."""

import asyncio
import itertools
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import aiomqtt
import pytest
from structlog.testing import capture_logs

from appliance.adapters.mqtt import LinkSettings, MqttLink, SessionSettings
from appliance.adapters.mqtt.inbox import answer_topic
from appliance.adapters.spiffe import WorkloadIdentity
from appliance.contract import topics
from appliance.contract.errors import OursError, TheirsError, WorldError
from appliance.ports import Inbound, Link
from tests.fakes.private_region import AGGREGATOR, BROKER, CLOUD, REGION, PrivateRegion, answers, device, until

pytestmark = pytest.mark.slow  # real parts and real faults: seconds in all, too long for `make check`

JETSON = device("jetson-1")
OTHER = device("jetson-2")
VITALS = topics.vitals(REGION, "jetson-1")
CHUNK = topics.chunk(REGION, "jetson-1")
ALL_VITALS = topics.vitals(REGION, "+")
ALL_CHUNKS = topics.chunk(REGION, "+")
RELEASE = topics.release(REGION)


@pytest.fixture
def region() -> Iterator[PrivateRegion]:
    """A region with a running broker."""
    with PrivateRegion() as region:
        yield region


async def reverse(request: Inbound) -> bytes:
    """Answer a request with its bytes reversed."""
    return request.payload[::-1]


def collect(into: list[bytes]) -> Callable[[Inbound], Awaitable[None]]:
    """Return a handler that keeps payloads."""

    async def keep(message: Inbound) -> None:
        into.append(message.payload)

    return keep


async def test_a_request_is_answered(region: PrivateRegion) -> None:
    """Requests of both qualities come back with the answer of their own, also many at once."""
    async with region.link(AGGREGATOR, ("serve", ALL_CHUNKS, reverse)), region.link(JETSON) as link:
        port: Link = link
        assert await port.ask(CHUNK, b"abc") == b"cba"
        asked = [f"{number:03}".encode() for number in range(50)]
        for qos in (0, 1):
            got = await asyncio.gather(*(link.ask(CHUNK, payload, qos=qos) for payload in asked))
            assert got == [payload[::-1] for payload in asked]
        assert link.counters.received == 101
        assert link.last_heard is not None
        assert time.clock_gettime(time.CLOCK_BOOTTIME) - link.last_heard < 1


async def test_a_request_downwards_is_answered_by_the_device_that_was_asked(region: PrivateRegion) -> None:
    """The region asks a device, which may answer since the answer's topic is its own; its own asks upwards go on beside it."""
    lent = topics.lent(REGION, "jetson-1")
    async with region.link(JETSON, ("serve", lent, reverse)) as below, region.identity(AGGREGATOR) as identity:
        name, pattern = AGGREGATOR.dns_name, topics.lent_answer(REGION, "+")
        link = MqttLink(
            identity, region.settings(), client_id=name, peer=BROKER.spiffe_id, answers=answers(AGGREGATOR), answers_below=pattern
        )
        link.serve(ALL_CHUNKS, reverse)
        run = asyncio.create_task(link.run())
        await until(lambda: link.connected)
        got = await asyncio.gather(*(link.ask(lent, f"{number:03}".encode(), qos=0) for number in range(20)), below.ask(CHUNK, b"abc"))
        assert got == [f"{number:03}"[::-1].encode() for number in range(20)] + [b"cba"]
        with pytest.raises(WorldError, match="no answer"):
            await link.ask(topics.lent(REGION, "jetson-2"), b"", timeout_s=0.3, qos=0)
        await stop(run)


async def test_a_refusal_travels_with_its_fields(region: PrivateRegion) -> None:
    """An ApplianceError of the asked side is the asker's TheirsError; anything else is `internal` and tells no details."""

    async def refuse(request: Inbound) -> bytes:
        if request.payload == b"world":
            raise WorldError("disk", "no space", where="/var", remedy="delete something")
        raise ValueError("secret detail")

    async with region.link(AGGREGATOR, ("serve", ALL_CHUNKS, refuse)), region.link(JETSON) as link:
        with pytest.raises(TheirsError) as caught:
            await link.ask(CHUNK, b"world")
        error = caught.value
        assert (error.reason, error.what, error.where, error.remedy) == ("disk", "no space", "/var", "delete something")
        with capture_logs() as logs:
            for _ in range(3):
                with pytest.raises(TheirsError) as caught:
                    await link.ask(CHUNK, b"?")
        assert caught.value.reason == "internal"
        assert "secret" not in str(caught.value)
        assert [entry["event"] for entry in logs] == ["handler_failed"]


async def test_requests_run_side_by_side_up_to_the_bound(region: PrivateRegion) -> None:
    """Not more than `concurrency` handlers run at a time, and what cannot even wait is refused as busy."""
    running = 0
    peak = 0

    async def slow(_: Inbound) -> bytes:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.1)
        running -= 1
        return b""

    async with region.link(AGGREGATOR, ("serve", ALL_CHUNKS, slow), concurrency=3), region.link(JETSON) as link:
        results = await asyncio.gather(*(link.ask(CHUNK, b"", qos=0) for _ in range(30)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, TheirsError)]
        assert peak == 3
        assert len(refused) == 15
        assert {error.reason for error in refused} == {"busy"}


async def test_silence_is_a_timeout(region: PrivateRegion) -> None:
    """Nobody serves the topic: the call returns when its time is over, and says so."""
    async with region.link(JETSON) as link:
        began = time.monotonic()
        with pytest.raises(WorldError) as caught:
            await link.ask(CHUNK, b"", timeout_s=0.3)
        assert caught.value.reason == "timeout"
        assert 0.25 < time.monotonic() - began < 1


async def test_without_a_broker_every_call_returns_in_time(region: PrivateRegion) -> None:
    """No call hangs on a broker that is away, before the first connection or after a loss; then the link heals by itself."""
    region.kill()
    async with region.link(JETSON, wait=False) as link:
        for qos in (0, 1):
            for call in (link.publish(VITALS, b"", qos=qos, timeout_s=0.2), link.ask(CHUNK, b"", qos=qos, timeout_s=0.2)):
                began = time.monotonic()
                with pytest.raises(WorldError, match="refused") as caught:
                    await call
                assert caught.value.reason == "not_connected"
                assert time.monotonic() - began < 1
        assert not link.connected
        assert link.last_error is not None
        assert link.last_error.reason == "broker_unreachable"
        up = asyncio.create_task(link.changed())
        region.start()
        assert await asyncio.wait_for(up, 5) is True


@pytest.mark.slow
async def test_a_killed_broker_costs_two_log_lines(region: PrivateRegion) -> None:
    """After kill -9, many failed attempts and a restart: one line down, one up, and every request that waited is answered."""
    async with region.link(AGGREGATOR, ("serve", ALL_CHUNKS, reverse)), region.link(JETSON) as link:
        with capture_logs() as logs:
            down = asyncio.create_task(link.changed())
            region.kill()
            assert await asyncio.wait_for(down, 5) is False
            asked = [str(number).encode() for number in range(100, 130)]
            waiting = [asyncio.create_task(link.ask(CHUNK, payload, timeout_s=20)) for payload in asked]
            published = asyncio.create_task(link.publish(VITALS, b"", timeout_s=20))
            await asyncio.sleep(1.5)
            region.start()
            assert await asyncio.gather(*waiting) == [payload[::-1] for payload in asked]
            await published
        own = [entry["event"] for entry in logs if entry.get("client_id") == "jetson-1"]
        assert own == ["link_lost", "link_up"]
        assert (link.counters.losses, link.counters.connections) == (1, 2)


async def test_an_orderly_restart_keeps_queue_and_retained(region: PrivateRegion) -> None:
    """What the broker promised to keep for an absent device arrives after a SIGTERM restart; the retained release too."""
    commands: list[bytes] = []
    releases: list[bytes] = []
    commands_topic = f"v1/{REGION}/d/jetson-1/dn/command"
    routes = (("on", commands_topic, collect(commands)), ("on", RELEASE, collect(releases)))
    async with region.link(JETSON, *routes):
        pass
    async with region.link(AGGREGATOR) as link:
        await link.publish(RELEASE, b"release 1", retain=True)
        for number in range(5):
            await link.publish(commands_topic, str(number).encode())
        region.terminate()
        region.start()
        async with region.link(JETSON, *routes):
            await until(lambda: len(commands) == 5 and releases)
    assert commands == [b"0", b"1", b"2", b"3", b"4"]
    assert set(releases) == {b"release 1"}


@pytest.mark.parametrize("step", ["__aenter__", "subscribe", "__aexit__"])
async def test_a_link_that_is_told_to_stop_stops(region: PrivateRegion, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Even where aiomqtt drops the cancellation because its own wait completes at that moment (Python 3.11)."""
    real, reached = getattr(aiomqtt.Client, step), asyncio.Event()

    async def deaf(*args: object, **rest: object) -> object:
        result = await real(*args, **rest)
        reached.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(5)
        return result

    async with region.identity(JETSON) as identity:
        link = MqttLink(identity, region.settings(), client_id="jetson-1", peer=BROKER.spiffe_id, answers=answers(JETSON))
        link.on(RELEASE, collect([]))
        monkeypatch.setattr(aiomqtt.Client, step, deaf)
        running = asyncio.create_task(link.run())
        if step == "__aexit__":
            await until(lambda: link.connected)
            region.api.renew(JETSON.spiffe_id)
        await asyncio.wait_for(reached.wait(), 5)
        running.cancel()
        done, _ = await asyncio.wait([running], timeout=3)
        monkeypatch.undo()
        assert done, "the link goes on although it was cancelled"


async def test_a_restarted_process_gets_the_retained_release_again(region: PrivateRegion) -> None:
    """A new process has forgotten it although the broker knows its session; a mere rotation does not bring it twice."""
    releases: list[bytes] = []
    async with region.link(AGGREGATOR) as aggregator:
        await aggregator.publish(RELEASE, b"release 1", retain=True)
        for life in (1, 2):
            async with region.link(JETSON, ("on", RELEASE, collect(releases))) as link:
                await until(lambda life=life: len(releases) == life)
                region.api.renew(JETSON.spiffe_id)
                await until(lambda link=link: link.rotations == 1)
                await asyncio.sleep(0.1)
                assert len(releases) == life


async def test_a_handler_that_did_not_finish_gets_its_message_again(region: PrivateRegion) -> None:
    """The acknowledgement follows the handler: a process that dies in between loses nothing."""
    begun: list[bytes] = []
    got: list[bytes] = []

    async def never(message: Inbound) -> None:
        begun.append(message.payload)
        await asyncio.Event().wait()

    async with region.link(JETSON) as link:
        async with region.link(AGGREGATOR, ("on", ALL_VITALS, never), drain_s=0.1):
            for number in range(10):
                await link.publish(VITALS, str(number).encode())
            await until(lambda: begun)
        async with region.link(AGGREGATOR, ("on", ALL_VITALS, collect(got))):
            await until(lambda: len(got) == 10)
    assert begun == [b"0"]
    assert got == [str(number).encode() for number in range(10)]


async def test_a_poisonous_message_does_not_loop(region: PrivateRegion) -> None:
    """A handler that raises is told once; its message is not delivered again and the next ones are handled."""
    seen: list[bytes] = []

    async def picky(message: Inbound) -> None:
        seen.append(message.payload)
        if message.payload == b"poison":
            raise ValueError(message.payload)

    async with region.link(JETSON) as link, region.link(AGGREGATOR, ("on", ALL_VITALS, picky)) as aggregator:
        with capture_logs() as logs:
            for payload in (b"poison", b"poison", b"food"):
                await link.publish(VITALS, payload)
            await until(lambda: b"food" in seen)
            region.api.renew(AGGREGATOR.spiffe_id)
            await until(lambda: aggregator.rotations == 1)
            await asyncio.sleep(0.1)
        assert seen == [b"poison", b"poison", b"food"]
        assert [entry["event"] for entry in logs].count("handler_failed") == 1


async def test_rotations_lose_nothing() -> None:
    """Two-way traffic at QoS 1 and requests of QoS 0 over six rotations of both ends: all there, in order, nothing twice."""
    up: list[bytes] = []
    down: list[bytes] = []
    asked = 0
    commands = f"v1/{REGION}/d/jetson-1/dn/command"
    with PrivateRegion() as region:
        served = (("on", ALL_VITALS, collect(up)), ("serve", ALL_CHUNKS, reverse))
        async with region.link(AGGREGATOR, *served) as aggregator, region.link(JETSON, ("on", commands, collect(down))) as link:
            stop = asyncio.Event()

            async def talk(sender: MqttLink, topic: str) -> int:
                for number in itertools.count():
                    if stop.is_set():
                        return number
                    await sender.publish(topic, str(number).encode())
                raise AssertionError

            async def pull() -> None:
                nonlocal asked
                while not stop.is_set():
                    assert await link.ask(CHUNK, b"abc", qos=0, timeout_s=2) == b"cba"
                    asked += 1

            async with asyncio.TaskGroup() as tasks:
                sent_up = tasks.create_task(talk(link, VITALS))
                sent_down = tasks.create_task(talk(aggregator, commands))
                tasks.create_task(pull())
                for turn in range(1, 7):
                    await asyncio.sleep(0.1)
                    region.api.renew(JETSON.spiffe_id)
                    if turn % 2:
                        region.api.renew(AGGREGATOR.spiffe_id)
                    await until(lambda turn=turn: link.rotations == turn and aggregator.rotations == (turn + 1) // 2)
                stop.set()
            await until(lambda: len(up) >= sent_up.result() and len(down) >= sent_down.result())
            assert link.counters.losses == aggregator.counters.losses == 0
    assert up == [str(number).encode() for number in range(sent_up.result())]
    assert down == [str(number).encode() for number in range(sent_down.result())]
    assert min(len(up), len(down), asked) > 100


async def test_a_rotation_waits_for_running_handlers(region: PrivateRegion) -> None:
    """What is being handled when the SVID is renewed is finished and acknowledged first, so the broker does not bring it twice."""
    handled: list[bytes] = []

    async def slow(message: Inbound) -> None:
        await asyncio.sleep(0.2)
        handled.append(message.payload)

    async with region.link(JETSON) as link, region.link(AGGREGATOR, ("on", ALL_VITALS, slow)) as aggregator:
        await link.publish(VITALS, b"1")
        region.api.renew(AGGREGATOR.spiffe_id)
        await asyncio.sleep(0.05)
        await link.publish(VITALS, b"2")
        await until(lambda: aggregator.rotations == 1 and len(handled) == 2)
        await asyncio.sleep(0.3)
    assert handled == [b"1", b"2"]


@pytest.mark.slow
async def test_short_lived_svids_are_followed_without_help(region: PrivateRegion) -> None:
    """SVIDs of 8 s, renewed at half (a loaded machine may be seconds late): the link moves on by itself and no publish fails."""
    async with region.link(device("jetson-1", ttl_s=8.0)) as link, asyncio.timeout(60):
        while link.rotations < 2:
            await link.publish(VITALS, b"", timeout_s=4)
            await asyncio.sleep(0.01)
        assert link.counters.losses == 0


@pytest.mark.slow
async def test_the_link_leaves_when_its_svid_expires(region: PrivateRegion) -> None:
    """A stock broker lets an expired client stay; we go by ourselves, say why, and return with the next SVID."""
    async with region.link(device("jetson-1", ttl_s=2.0)) as link:
        region.api.hang_up(JETSON.spiffe_id)
        end = link._identity.not_after
        with capture_logs() as logs:
            await until(lambda: not link.connected, 3)
            assert time.time() - end < 0.5
            region.api.serve(JETSON.spiffe_id)
            await until(lambda: link.connected, 8)
        assert [(entry["event"], entry.get("reason")) for entry in logs if "client_id" in entry] == [
            ("link_lost", "svid_expired"),
            ("link_up", None),
        ]


async def test_an_expired_svid_is_refused_at_once(region: PrivateRegion) -> None:
    """If our clock is wrong, the broker refuses after the TLS 1.3 handshake; the link knows in well under its timeout."""
    identity = await WorkloadIdentity.open(region.register(device("jetson-1", ttl_s=1.0)), wall=lambda: 0.0)
    region.api.hang_up(JETSON.spiffe_id)
    await until(lambda: time.time() > identity.not_after + 0.1)
    link = MqttLink(identity, region.settings(), client_id="jetson-1", peer=BROKER.spiffe_id, wall=lambda: 0.0)
    began = time.monotonic()
    run = asyncio.create_task(link.run())
    await until(lambda: link.last_error is not None)
    assert time.monotonic() - began < 1
    assert link.last_error is not None
    assert link.last_error.reason == "broker_refused"
    await stop(run)
    await identity.close()


async def test_no_connect_reaches_a_wrong_peer(region: PrivateRegion) -> None:
    """The broker's SPIFFE ID is not the expected one: the link ends the handshake, sends no MQTT, and names both."""
    async with region.identity(JETSON) as identity:
        link = MqttLink(identity, region.settings(), client_id="jetson-1", peer="spiffe://appliance.lab/region/us-1/broker")
        with capture_logs() as logs:
            run = asyncio.create_task(link.run())
            await asyncio.sleep(0.5)
            await stop(run)
    assert [(entry["event"], entry["reason"]) for entry in logs] == [("link_not_established", "broker_identity")]
    assert "the peer is spiffe://appliance.lab/region/eu-1/broker, expected spiffe://appliance.lab/region/us-1/broker" in logs[0]["error"]
    assert link.counters.connections == 0
    assert "as jetson-1" not in region.log()


async def test_anothers_topic_is_refused(region: PrivateRegion) -> None:
    """The broker's refusal of a publish or a request is an error, not a silence, and the link stays up."""
    async with region.link(JETSON) as link:
        for call in (link.publish(topics.vitals(REGION, "jetson-2"), b""), link.ask(topics.chunk(REGION, "jetson-2"), b"")):
            with pytest.raises(TheirsError) as caught:
                await call
            assert caught.value.reason == "not_authorised"
        await link.publish(VITALS, b"")
        assert link.counters.losses == 0


async def test_an_answer_goes_to_the_asker_only(region: PrivateRegion) -> None:
    """A request that names another device's answer topic is ignored: the region must not become its messenger."""
    served: list[bytes] = []

    async def serve(request: Inbound) -> bytes:
        served.append(request.payload)
        return b"answer"

    async with region.link(AGGREGATOR, ("serve", ALL_CHUNKS, serve)), region.link(OTHER) as victim, region.identity(JETSON) as identity:
        link = MqttLink(identity, region.settings(), client_id="jetson-1", peer=BROKER.spiffe_id, answers=answers(OTHER))
        run = asyncio.create_task(link.run())
        await until(lambda: link.connected)
        with capture_logs() as logs, pytest.raises(WorldError, match="no answer"):
            await link.ask(CHUNK, b"", timeout_s=0.3)
        assert [entry["event"] for entry in logs] == ["request_ignored"]
        assert victim.counters.received == 0
        assert served == []
        await stop(run)


@pytest.mark.parametrize(
    ("request_topic", "expected"),
    [
        (CHUNK, answers(JETSON)),
        (topics.upstream_chunk(REGION), answers(AGGREGATOR)),
        (topics.lent(REGION, "x"), topics.lent_answer(REGION, "x")),
        (RELEASE, ""),
        ("v1/eu-1/d/x/up", ""),
    ],
)
def test_the_answer_topic_follows_from_the_request(request_topic: str, expected: str) -> None:
    """The rule agrees with the contract's topics."""
    assert answer_topic(request_topic) == expected


async def test_the_cloud_talks_with_the_region(region: PrivateRegion) -> None:
    """The same link carries the hop above: requests up, releases down."""
    releases: list[bytes] = []
    routes = ("on", topics.upstream_release(REGION), collect(releases))
    async with region.link(CLOUD, ("serve", topics.upstream_chunk("+"), reverse)) as cloud, region.link(AGGREGATOR, routes) as link:
        assert await link.ask(topics.upstream_chunk(REGION), b"ab") == b"ba"
        await cloud.publish(topics.upstream_release(REGION), b"release", retain=True)
        await until(lambda: releases == [b"release"])


async def test_a_message_of_a_mebibyte_passes_and_a_larger_one_is_refused(region: PrivateRegion) -> None:
    """A Release may have 1 MiB. What the broker would cut the connection for is refused before it is sent."""
    got: list[bytes] = []
    large = random.Random(1).randbytes(1024 * 1024)
    async with region.link(JETSON, ("on", RELEASE, collect(got))), region.link(AGGREGATOR) as link:
        await link.publish(RELEASE, large, retain=True)
        await until(lambda: got == [large])
        with pytest.raises(TheirsError) as caught:
            await link.publish(RELEASE, large + bytes(3_200_000))
        assert caught.value.reason == "oversized"
        assert link.counters.losses == 0


async def test_a_stolen_client_id_is_refused(region: PrivateRegion) -> None:
    """Who claims another's client id does not get in, and the victim is not disturbed."""
    async with region.link(OTHER) as victim, region.identity(JETSON) as identity:
        thief = MqttLink(identity, region.settings(), client_id="jetson-2", peer=BROKER.spiffe_id)
        run = asyncio.create_task(thief.run())
        await until(lambda: thief.last_error is not None)
        assert not thief.connected
        assert "client id jetson-2, identity jetson-1" in region.log()
        await victim.publish(topics.vitals(REGION, "jetson-2"), b"")
        assert victim.counters.losses == 0
        await stop(run)


async def test_stopping_while_connecting_leaves_nothing_behind(region: PrivateRegion) -> None:
    """A broker that accepts and says nothing: the link stops at once, and its half-open connection goes with it."""
    async with region.identity(JETSON) as identity:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            session = SessionSettings(port=listener.getsockname()[1], connect_timeout_s=1.0)
            link = MqttLink(identity, LinkSettings(session=session), client_id="jetson-1", peer=BROKER.spiffe_id)
            run = asyncio.create_task(link.run())
            connection, _ = await asyncio.to_thread(listener.accept)
            with connection:
                began = time.monotonic()
                await stop(run)
                assert time.monotonic() - began < 0.5
                connection.settimeout(3)
                while await asyncio.to_thread(connection.recv, 4096):
                    pass


async def test_routes_are_fixed_before_the_start(region: PrivateRegion) -> None:
    """A late or double route is a mistake in our program, and is said as one."""
    async with region.link(JETSON, ("on", RELEASE, collect([]))) as link:
        with pytest.raises(OursError, match="before `run`"):
            link.on("v1/eu-1/bcast/late", collect([]))
        with pytest.raises(OursError, match="once"):
            link.serve(RELEASE, reverse)


async def stop(task: "asyncio.Task[None]") -> None:
    """Cancel a link's task and wait for its end."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
