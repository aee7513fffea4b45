"""What both clients promise of a call: they try again where it helps, go elsewhere, keep promises, and say what answered."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.client.aio import CONNECTIONS, AsyncAppliance
from appliance.client.asking import parameters_of
from appliance.client.results import Deferred, Result
from appliance.client.retrying import ONCE, Policy
from appliance.client.sync import Appliance
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import Answer, Promise, Tags
from appliance.contract.tags import tags_in
from appliance.contract.vocabulary import Mode

X = {"x": np.array([[1, 2, 3, 4]], np.float32)}
QUICK = Policy(backoff_s=0.01, backoff_max_s=0.02)
GONE = "unix:/nowhere/s"
ClientOf = Callable[..., Any]


def answered(**parameters: Any) -> tuple[int, dict[str, str], bytes]:
    """An answer with one output."""
    output = {"name": "y", "datatype": "FP32", "shape": [1], "data": [1.5]}
    return 200, {}, json.dumps({"model_version": "3", "id": "i", "parameters": parameters, "outputs": [output]}).encode()


def said(status: int, text: str = "no", **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps({"error": text}).encode()


def in_turn(*replies: tuple[int, dict[str, str], bytes]) -> Callable[..., tuple[int, dict[str, str], bytes]]:
    """Answer one after the other, the last one for ever."""
    left = list(replies)
    return lambda *_: left.pop(0) if len(left) > 1 else left[0]


def head(asked: tuple[str, str, dict[str, str], bytes]) -> dict[str, Any]:
    """The JSON part of an infer request."""
    _, _, headers, body = asked
    return json.loads(body[: int(headers["inference-header-content-length"])])


def test_an_answer_says_what_made_it(site: Any, client_of: ClientOf) -> None:
    """Mode, version, route, reason, confidence, cost and age are read; what is not said, or said in a wrong kind, is empty."""
    site.reply = in_turn(
        answered(mode="C", route="stale", why="no fresh answer", confidence=0.7, cost=0.001, stale_age_s=12), answered(why=3, cost=True)
    )
    with client_of(site.unix) as client:
        full, bare = client.infer("m", X), client.infer("m", X)
    assert (full.mode, full.model_version, full.route, full.why) == ("C", "3", "stale", "no fresh answer")
    assert (full.confidence, full.cost, full.stale_age_s, full.server, full.id) == (0.7, 0.001, 12.0, site.unix, "i")
    assert (bare.mode, bare.route, bare.why, bare.confidence, bare.cost, bare.stale_age_s) == ("", "", "", None, None, None)


tags = st.builds(
    Tags,
    priority=st.integers(0, 9),
    timeout_s=st.one_of(st.none(), st.floats(0.001, 1000)),
    slo_s=st.one_of(st.none(), st.floats(0.001, 1000)),
    accept_degradation=st.booleans(),
    accept_stale=st.booleans(),
    accept_deferral=st.booleans(),
    data_residency=st.sampled_from(["", "device", "region"]),
    max_cost=st.one_of(st.none(), st.floats(0, 10)),
)


@given(tags)
def test_tags_arrive_as_they_were_meant(asked: Tags) -> None:
    """What the client writes into `parameters` is what the server reads there; nothing is written where nothing was said."""
    read = tags_in(parameters_of(asked, asked.timeout_s))
    assert read.timeout_s == (None if asked.timeout_s is None else pytest.approx(asked.timeout_s, abs=1e-6))
    assert read.slo_s == (None if asked.slo_s is None else pytest.approx(asked.slo_s))
    for name in ("priority", "accept_degradation", "accept_stale", "accept_deferral", "data_residency", "max_cost"):
        assert getattr(read, name) == getattr(asked, name)
    assert parameters_of(Tags(), None) == {}


def test_tags_version_outputs_and_id_travel(site: Any, client_of: ClientOf) -> None:
    """Each stands where the protocol has it; the time-out on the wire is what is left of the tags'."""
    site.reply = in_turn(answered())
    with client_of(site.tcp) as client:
        client.infer("m", X, tags=Tags(priority=1, timeout_s=5.0), outputs=["y"], version="2/b", id="me", parameters={"own": 1})
    asked = head(site.asked[0])
    assert site.asked[0][1] == "/v2/models/m/versions/2%2Fb/infer"
    assert (asked["id"], asked["outputs"], asked["parameters"]["own"], asked["parameters"]["priority"]) == ("me", [{"name": "y"}], 1, 1)
    assert 4e6 < asked["parameters"]["timeout"] <= 5e6


def test_a_busy_server_is_asked_again_when_it_said(site: Any, client_of: ClientOf) -> None:
    """Refused twice, answered then, and never sooner than the server's milliseconds."""
    site.reply = in_turn(said(429, Retry_After_Ms="80", Retry_After="1"), said(503, Retry_After_Ms="40"), answered(mode="A"))
    started = time.monotonic()
    with client_of(site.tcp, policy=QUICK) as client:
        assert client.infer("m", X).mode == "A"
    assert 0.12 <= time.monotonic() - started < 1
    assert len(site.asked) == 3


def test_no_pause_goes_beyond_the_deadline(site: Any, client_of: ClientOf) -> None:
    """Where the server's hint is later than the caller can wait, the caller knows at once; the tags' time-out is a deadline too."""
    site.reply = in_turn(said(429, "full", Retry_After_Ms="3000"))
    started = time.monotonic()
    with client_of(site.tcp) as client:
        for options in ({"timeout_s": 2.0}, {"tags": Tags(timeout_s=2.0)}):
            with pytest.raises(WorldError, match="full") as caught:
                client.infer("m", X, **options)
            assert (caught.value.reason, caught.value.retry_after_s) == ("busy", 3.0)
    assert time.monotonic() - started < 1
    assert len(site.asked) == 2


@pytest.mark.parametrize("status", [400, 404, 413, 500, 504])
def test_what_repeating_cannot_help_is_asked_once(site: Any, client_of: ClientOf, status: int) -> None:
    """A refusal and a server's own failure are final."""
    site.reply = in_turn(said(status))
    with client_of(site.tcp, policy=QUICK, fallback=None) as client, pytest.raises((TheirsError, WorldError)):
        client.infer("m", X)
    assert len(site.asked) == 1


def test_the_next_server_is_asked_where_one_is_gone(site: Any, client_of: ClientOf) -> None:
    """An unreachable server costs no pause, and the next call begins where the last was answered."""
    site.reply = in_turn(answered(mode="B"))
    with client_of([GONE, site.tcp]) as client:
        assert client.ready()
        results = [client.infer("m", X) for _ in range(2)]
    assert [(each.mode, each.server) for each in results] == [("B", site.tcp)] * 2


def test_a_silent_server_leaves_time_for_the_next(site: Any, client_of: ClientOf) -> None:
    """A server that accepts and says nothing is given half of the time."""
    site.reply = in_turn(answered())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with client_of([f"http://127.0.0.1:{silent.getsockname()[1]}", site.tcp], timeout_s=1.6) as client:
            assert client.infer("m", X).server == site.tcp
        assert 0.75 < time.monotonic() - started < 1.6


def test_the_callers_own_fallback_is_the_last_resort(site: Any, client_of: ClientOf) -> None:
    """It is taken where the world failed, says so, and is never taken for what the caller did wrong."""
    threads: list[threading.Thread] = []

    def mean(model: str, inputs: Any) -> Any:
        threads.append(threading.current_thread())
        return {"y": inputs["x"].mean(keepdims=True), "m": np.array(model)}

    with client_of(GONE, fallback=mean, policy=ONCE) as client:
        result = client.infer("m", X)
    assert (result.outputs["y"].tolist(), result.route, result.mode, result.server) == ([[2.5]], "local", "", "")
    assert "/nowhere/s" in result.why
    site.reply = in_turn(said(400, "bad shape"))
    with client_of(site.tcp, fallback=mean) as client, pytest.raises(TheirsError, match="bad shape"):
        client.infer("m", X)
    assert len(threads) == 1


def test_a_daemon_that_restarts_costs_no_call(daemon: Any, client_of: ClientOf) -> None:
    """A kept connection that has ended is replaced, and a daemon that is away for a moment is waited for."""
    with client_of(daemon.url) as client:
        assert client.infer("double", X).outputs["y"].tolist() == [[2, 4, 6, 8]]
        daemon.stop()
        back = threading.Timer(0.3, daemon.start)
        back.start()
        assert client.infer("double", X).outputs["y"].tolist() == [[2, 4, 6, 8]]
        back.join()


def test_a_kept_connection_that_has_ended_is_replaced(daemon: Any, client_of: ClientOf) -> None:
    """Also for who asks but once: the end of an idle connection is seen before a request is wasted on it."""
    with client_of(daemon.url, policy=ONCE) as client:
        for _ in range(3):
            assert client.infer("double", X).model_version == "1"
            daemon.stop()
            daemon.start()


def promise(name: str) -> tuple[int, dict[str, str], bytes]:
    return 202, {"Retry-After-Ms": "30"}, json.dumps({"id": name, "parameters": {"deferred": True}}).encode()


def test_a_promise_is_kept(site: Any, client_of: ClientOf) -> None:
    """202 is a promise; it is asked for as often as the server says, until it is answered."""
    site.reply = in_turn(promise("a/b"))
    with client_of(site.tcp) as client:
        given = client.submit("m", X)
        assert given == Deferred("a/b", site.tcp, 0.03)
        site.reply = in_turn(promise("a/b"), said(503), said(202), answered(mode="B"))
        with pytest.raises(WorldError) as caught:
            client.fetch(given)
        assert (caught.value.reason, caught.value.retry_after_s) == ("pending", 0.03)
        site.reply = in_turn(promise("a/b"), promise("a/b"), answered(mode="B"))
        assert client.fetch(given, wait_s=5.0).mode == "B"
        assert client.fetch("a/b").mode == "B"
    assert head(site.asked[0])["parameters"]["accept_deferral"] is True
    assert len(head(site.asked[0])["id"]) == 32
    assert {(method, path) for method, path, _, _ in site.asked[1:]} == {("GET", "/v2/deferred/a%2Fb")}


class Counter:
    """Knows one promise: not yet answered at first, then answered, then dropped."""

    def __init__(self) -> None:
        self.fetched = 0

    async def fetch(self, promise: str) -> Answer | Promise:
        self.fetched += 1
        if promise != "mine":
            raise TheirsError("unknown_promise", "nothing is known of it")
        if self.fetched < 3:
            return Promise(promise, "no capacity", 0.02)
        if self.fetched == 3:
            return Answer(promise, "double", "1", {"y": X["x"]}, Mode.CONSTRAINED)
        raise WorldError("dropped", "it was too old")


def test_a_promise_of_the_real_ingress_is_fetched(daemon: Any, client_of: ClientOf) -> None:
    """What the daemon says of a promise is what the client reads: why, when to come again, the answer, and its end."""
    daemon.stop()
    daemon.counter = Counter()
    daemon.desk.promise = Promise("mine", "no capacity", 0.02)
    daemon.start()
    with client_of(daemon.url) as client:
        given = client.submit("double", X, id="mine")
        assert given == Deferred("mine", daemon.url, 0.02, "no capacity")
        assert daemon.desk.asked[-1].tags.accept_deferral
        result = client.fetch(given, wait_s=5.0)
        assert (result.mode, result.outputs["y"].tolist()) == ("B", X["x"].tolist())
        with pytest.raises(WorldError, match="too old"):
            client.fetch(given)
        with pytest.raises(TheirsError, match="nothing is known"):
            client.fetch("other")


def test_an_answer_instead_of_a_promise_is_an_answer(site: Any, client_of: ClientOf) -> None:
    """`submit` is `infer` where there is an answer now."""
    site.reply = in_turn(answered(mode="A"))
    with client_of(site.tcp) as client:
        assert isinstance(client.submit("m", X, id="mine"), Result)
    assert head(site.asked[0])["id"] == "mine"


@pytest.mark.parametrize(
    ("reply", "kind", "reason"),
    [
        (said(404, "expired"), TheirsError, "unknown_promise"),
        (said(410, "the queue was full"), WorldError, "dropped"),
        (said(400), TheirsError, "refused"),
        (said(500), WorldError, "failed"),
    ],
)
def test_what_became_of_a_promise_is_told(site: Any, client_of: ClientOf, reply: Any, kind: type, reason: str) -> None:
    """Expired, dropped with the reason, refused: each is final, in the server's words."""
    site.reply = in_turn(reply)
    with client_of(site.tcp) as client, pytest.raises(kind, match=json.loads(reply[2])["error"]) as caught:
        client.fetch("a", wait_s=5.0)
    assert caught.value.reason == reason
    assert len(site.asked) == 1


def test_who_waits_for_a_promise_waits_for_a_daemon_that_is_away(client_of: ClientOf) -> None:
    """The promise is on its disk; the wait ends in time nevertheless."""
    with client_of(GONE, policy=QUICK) as client:
        started = time.monotonic()
        with pytest.raises(WorldError) as caught:
            client.fetch("a", wait_s=0.2)
        assert caught.value.reason == "unreachable"
        assert 0.1 < time.monotonic() - started < 2


def test_a_promise_is_never_asked_for_twice(site: Any, client_of: ClientOf) -> None:
    """The answer was lost, so the server may have promised: only it is asked again, under the same id."""
    cut = (200, {"Content-Length": "100"}, b"{")
    site.reply = in_turn(cut, cut, promise("p"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.setblocking(False)
        with client_of([site.tcp, f"http://127.0.0.1:{other.getsockname()[1]}"], policy=QUICK) as client:
            assert isinstance(client.submit("m", X), Deferred)
        with pytest.raises(BlockingIOError):  # nobody called
            other.accept()
    assert len({head(each)["id"] for each in site.asked}) == 1
    assert len(site.asked) == 3


def test_infer_wants_an_answer(site: Any, client_of: ClientOf) -> None:
    """Accepting deferral is for `submit`; a promise that nobody asked for is a broken answer."""
    with client_of(site.tcp) as client:
        with pytest.raises(TheirsError, match="submit"):
            client.infer("m", X, tags=Tags(accept_deferral=True))
        site.reply = in_turn(promise("p"))
        with pytest.raises(TheirsError) as caught:
            client.infer("m", X)
        assert caught.value.reason == "malformed"


def test_what_cannot_be_said_is_refused_before_sending(site: Any, client_of: ClientOf) -> None:
    """Parameters that JSON lacks, no server at all."""
    with client_of(site.tcp) as client, pytest.raises(TheirsError, match="JSON"):
        client.infer("m", X, parameters={"a": object()})
    with pytest.raises(TheirsError, match="no server"):
        client_of([])
    assert site.asked == []


async def test_many_calls_share_a_bounded_number_of_connections(daemon: Any) -> None:
    """Callers wait for a connection rather than open one more; each gets his own answer."""
    async with AsyncAppliance(daemon.url) as client:

        async def ask(number: int) -> bool:
            result = await client.infer("double", {"x": np.full((1, 4), number, np.float32)})
            return result.outputs["y"].tolist() == [[2.0 * number] * 4]

        assert all(await asyncio.gather(*(ask(number) for number in range(200))))
        assert len(client._pools[daemon.url]._idle) <= CONNECTIONS


async def test_cancelling_a_call_takes_the_request_back(daemon: Any, looped: Any) -> None:
    """The server hears that the caller has left, and the client goes on."""

    async def shut() -> None:
        daemon.desk.gate = asyncio.Event()

    looped.run(shut())
    async with AsyncAppliance(daemon.url) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.infer("double", X)
        await asyncio.to_thread(looped.run, daemon.desk.left.wait())
        daemon.desk.gate = None
        assert (await client.infer("double", X)).model_version == "1"


def test_a_time_out_of_the_whole_call_is_kept(daemon: Any, looped: Any, client_of: ClientOf) -> None:
    """A server that works for too long is left in time."""

    async def shut() -> None:
        daemon.desk.gate = asyncio.Event()

    looped.run(shut())
    with client_of(daemon.url, timeout_s=0.3) as client:
        started = time.monotonic()
        with pytest.raises(WorldError) as caught:
            client.infer("double", X)
        assert caught.value.reason == "unreachable"
        assert 0.25 < time.monotonic() - started < 1


def test_a_large_body_that_is_refused_early_is_a_refusal(daemon: Any, client_of: ClientOf) -> None:
    """The server answers before it has read all: its words reach the caller."""
    with client_of(daemon.url) as client, pytest.raises(TheirsError, match="larger than"):
        client.infer("double", {"x": np.zeros(80 << 20, np.uint8)})


def test_the_sync_client_is_the_old_one(site: Any) -> None:
    """Nothing is opened before the first call, and closing twice is no error."""
    client = Appliance(site.tcp)
    client.close()
    client.close()
    assert site.asked == []
