"""Promises of the synchronous client, on a server that speaks the protocol through the contract's own codec."""

import json
import socket
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.client.retrying import ONCE, Policy
from appliance.client.sync import Appliance
from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.inference import DTYPES, Answer
from appliance.contract.openinference import HEADER_LENGTH, header_length, parse, render
from appliance.contract.vocabulary import Mode

ARRAYS = {str(datatype): (np.arange(6) % 2).reshape(1, 2, 3).astype(dtype) for datatype, dtype in DTYPES.items()}


def echo(_method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Answer with the inputs as outputs, in mode B of version 7, rendered as the request asked."""
    parsed = parse(path.split("/")[3], "", header_length(headers.get(HEADER_LENGTH.lower())), body)
    answer = Answer(
        "", parsed.request.model, "7", {f"{name}_out": array for name, array in parsed.request.inputs.items()}, Mode.CONSTRAINED
    )
    rendered = render(answer, parsed.layout)
    return 200, dict(rendered[0]), b"".join(rendered[1])


def canned(status: int, payload: bytes, **headers: str) -> Any:
    """Answer always the same; header names have `_` for `-`."""
    return lambda *_: (status, {name.replace("_", "-"): value for name, value in headers.items()}, payload)


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_arrays_of_every_datatype_go_and_come_back_bit_for_bit(site: Any, way: str) -> None:
    """What is sent is what arrives, over either kind of socket, with the answer's mode and version."""
    site.reply = echo
    with Appliance(getattr(site, way)) as client:
        result = client.infer("m/1", ARRAYS)
    assert (result.mode, result.model_version) == ("B", "7")
    for name, array in ARRAYS.items():
        got = result.outputs[f"{name}_out"]
        assert got.dtype == array.dtype
        assert got.tobytes() == array.tobytes()
        assert got.shape == (1, 2, 3)
    assert site.asked[0][1] == "/v2/models/m%2F1/infer"


def test_big_endian_and_strided_arrays_are_sent_by_value(site: Any) -> None:
    """The wire is little-endian and dense whatever the caller's memory looks like."""
    site.reply = echo
    array = np.arange(12, dtype=">f4").reshape(3, 4)[:, ::2]
    with Appliance(site.tcp) as client:
        assert client.infer("m", {"x": array}).outputs["x_out"].tolist() == array.tolist()


def test_one_connection_serves_many_calls_and_parameters_travel(site: Any) -> None:
    """The connection is kept, and the caller's parameters reach the server beside ours."""
    site.reply = echo
    with Appliance(site.tcp) as client:
        client.infer("m", {"x": np.zeros(1, np.float32)})
        kept = client._connections[site.tcp].socket
        client.infer("m", {"x": np.zeros(1, np.float32)}, parameters={"priority": 2})
        assert kept is not None
        assert client._connections[site.tcp].socket is kept
    _, _, headers, body = site.asked[1]
    head = json.loads(body[: int(headers["inference-header-content-length"])])
    assert head["parameters"] == {"priority": 2, "binary_data_output": True}


def test_json_outputs_are_read_too(site: Any) -> None:
    """A server that ignores the binary extension is understood."""
    site.reply = canned(200, b'{"model_name":"m","outputs":[{"name":"y","datatype":"FP16","shape":[1,2],"data":[1.5,2]}]}')
    with Appliance(site.tcp) as client:
        result = client.infer("m", {})
    assert (result.outputs["y"].tolist(), result.outputs["y"].dtype, result.mode) == ([[1.5, 2.0]], np.float16, "")


def test_ready_and_metadata(site: Any) -> None:
    """`ready` is the status of the health path; metadata is the model's card."""
    site.reply = canned(200, b'{"name": "m", "parameters": {"character": "a"}}')
    with Appliance(site.unix) as client:
        assert client.ready()
        assert client.metadata("m")["parameters"] == {"character": "a"}
        site.reply = canned(503, b"")
        assert not client.ready()
    assert [path for _, path, _, _ in site.asked] == ["/v2/health/ready", "/v2/models/m", "/v2/health/ready"]


@pytest.mark.parametrize(
    ("headers", "after_s"),
    [
        ({"Retry_After": "2"}, 2.0),
        ({"Retry_After": "1", "Retry_After_Ms": "40"}, 0.04),
        ({"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1.0),
        ({"Retry_After": "nan"}, 1.0),
        ({"Retry_After": "-5"}, 1.0),
        ({"Retry_After_Ms": "soon", "Retry_After": "3"}, 3.0),
        ({}, 1.0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_busy_says_when_to_ask_again(site: Any, status: int, headers: dict[str, str], after_s: float) -> None:
    """429 and 503 are `busy` with the server's text and the finest hint that it gave."""
    site.reply = canned(status, b'{"error": "the backlog is full"}', **headers)
    with Appliance(site.tcp, policy=ONCE) as client, pytest.raises(WorldError, match="the backlog is full") as caught:
        client.infer("m", {})
    assert (caught.value.reason, caught.value.retry_after_s) == ("busy", pytest.approx(after_s))


@pytest.mark.parametrize(
    ("status", "payload", "kind", "reason", "text"),
    [
        (400, b'{"error": "x has shape [1], expected [1, 2]"}', TheirsError, "refused", "x has shape"),
        (404, b"<html>", TheirsError, "refused", "HTTP status 404"),
        (413, b'["error"]', TheirsError, "refused", "HTTP status 413"),
        (500, b'{"error": "broke"}', WorldError, "failed", "broke"),
        (504, b"", WorldError, "failed", "HTTP status 504"),
    ],
)
def test_refusals_carry_the_servers_text(site: Any, *, status: int, payload: bytes, kind: type, reason: str, text: str) -> None:
    """4xx is the caller's fault, 5xx the world's, in the server's own words where it has some."""
    site.reply = canned(status, payload)
    with Appliance(site.tcp) as client, pytest.raises(kind, match=text) as caught:
        client.infer("m", {})
    assert caught.value.reason == reason


def test_nobody_there_is_unreachable() -> None:
    """A closed port, an absent socket and a path that is too long are one kind of failure, once all attempts have failed."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        for server in (f"http://127.0.0.1:{taken.getsockname()[1]}", "unix:/nowhere/s", "unix:/" + "x" * 200):
            with pytest.raises(WorldError) as caught:
                Appliance(server, policy=Policy(attempts=3, backoff_s=0.01)).metadata("m")
            assert caught.value.reason == "unreachable"


def test_a_silent_server_is_given_up_in_time() -> None:
    """The timeout bounds a call to a server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(WorldError) as caught:
        Appliance(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1).ready()
    assert caught.value.reason == "unreachable"


def test_a_truncated_answer_is_unreachable_and_the_next_call_works(site: Any) -> None:
    """A server that dies within its answer costs one call; the client connects anew."""
    site.reply = canned(200, b'{"outputs"', Content_Length="100")
    with Appliance(site.tcp, policy=ONCE) as client:
        with pytest.raises(WorldError) as caught:
            client.infer("m", {})
        assert caught.value.reason == "unreachable"
        site.reply = echo
        assert client.infer("m", {"x": np.ones(2, np.float32)}).outputs["x_out"].tolist() == [1, 1]


@pytest.mark.parametrize("address", ["127.0.0.1:80", "https://h", "http://", "http://h:port", "http://[::1", "ftp://h", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    """An address of another form is named, with the forms that work."""
    with pytest.raises(TheirsError, match="http://host:port or unix:/path"):
        Appliance(address)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([1j]), np.array([None])])
def test_an_array_that_the_protocol_lacks_is_refused_before_sending(site: Any, array: np.ndarray) -> None:
    """The datatype and the input are named; nothing is sent."""
    with Appliance(site.tcp) as client, pytest.raises(TheirsError, match="x: arrays of"):
        client.infer("m", {"x": array})
    assert site.asked == []


def output(length: str | None = None, tail: bytes = b"", **changes: Any) -> tuple[bytes, dict[str, str]]:
    """An answer with one binary output of two FP32, and what the case changes about it."""
    size = changes.pop("size", 8)
    tensor = {"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": size}} | changes
    head = json.dumps({"model_name": "m", "outputs": [tensor]}).encode()
    return head + tail, {"Inference_Header_Content_Length": length or str(len(head))}


DATA = struct.pack("<2f", 1, 2)


@pytest.mark.parametrize(
    ("payload", "headers"),
    [
        output(tail=DATA[:5]),
        output(size=4, tail=DATA[:4]),
        output(size=7, tail=DATA),
        output(size=-8, tail=DATA),
        output(size="8", tail=DATA),
        output(size=10**12, tail=DATA),
        output(shape=[-1], tail=DATA),
        output(shape=[3], tail=DATA),
        output(shape="two", tail=DATA),
        output(datatype="BYTES", tail=DATA),
        output(datatype="FP4", tail=DATA),
        output(length="100000", tail=DATA),
        output(length="-1", tail=DATA),
        output(length="ten", tail=DATA),
        (b"not json", {}),
        (b"\xff\xfe", {}),
        (b"[]", {}),
        (b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1]}]}', {}),
        (b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":["a"]}]}', {}),
        (b'{"outputs":[{"name":"y","datatype":"UINT8","shape":[1],"data":[-1]}]}', {}),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_malformed(site: Any, payload: bytes, headers: dict[str, str]) -> None:
    """Lengths, shapes and types that disagree are never read as data."""
    site.reply = canned(200, payload, **headers)
    with Appliance(site.tcp) as client, pytest.raises(TheirsError) as caught:
        client.infer("m", {})
    assert caught.value.reason == "malformed"


@given(st.binary(max_size=60), st.sampled_from(["", "0", "3", "20", "x"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_back_nothing_but_our_errors_escapes(site: Any, payload: bytes, length: str) -> None:
    """Garbage from a server is an ApplianceError or a result, never a foreign exception."""
    site.reply = canned(200, payload, **({"Inference_Header_Content_Length": length} if length else {}))
    with Appliance(site.unix, policy=ONCE) as client:
        for call in (lambda: client.infer("m", {}), lambda: client.metadata("m")):
            try:
                call()
            except (TheirsError, WorldError):
                continue
