"""The load generator's HTTP: whatever way an answer arrives, it is read alike; hints and modes are read, broken answers are lost."""

import asyncio
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import TheirsError
from appliance.contract.openinference import parse
from appliance.workshop.load_http import Address, HttpAsker, Reply, address, infer_request

BODY = b'{"parameters":{"mode":"B"},"outputs":[]}'
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nDate: x\r\n\r\n%s" % (len(BODY), BODY)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
REFUSAL = b'HTTP/1.1 429 Busy\r\nRetry-After: 1\r\nRetry-After-Ms: 20\r\nContent-Length: 23\r\n\r\n{"reason":"backlog_fu"}'


def heard(answer: bytes, cuts: list[int]) -> list[Reply]:
    """What a caller hears of an answer that arrives in pieces."""
    replies: list[Reply] = []
    asker = HttpAsker(Address(host="127.0.0.1", port=1), b"")
    asker.connection_made(asyncio.Transport())
    asker._done = replies.append
    places = sorted({0, len(answer), *(cut % len(answer) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        asker.data_received(answer[start:end])
    return replies


@given(st.sampled_from([PLAIN, CHUNKED]), st.lists(st.integers(0, 10_000), max_size=12))
def test_an_answer_is_read_alike_however_it_is_cut(answer: bytes, cuts: list[int]) -> None:
    """One answer is heard once, with its mode, whatever pieces it came in."""
    assert heard(answer, cuts) == [Reply(200, mode="B")]


def test_a_refusal_tells_its_hint_and_reason() -> None:
    """Our milliseconds win over seconds, and the reason is what the server calls it."""
    assert heard(REFUSAL, [30]) == [Reply(429, 0.02, reason="429 backlog_fu")]


@pytest.mark.parametrize(
    ("head", "hint"),
    [
        (b"Retry-After: 2\r\n", 2.0),
        (b"retry-after-ms: 7\r\nRetry-After: 9\r\n", 0.007),
        (b"Retry-After: Wed, 21 Oct\r\n", None),
        (b"", None),
    ],
)
def test_hints_are_read_in_both_forms(head: bytes, hint: float | None) -> None:
    """Seconds, milliseconds, and no hint where there is none that we understand."""
    assert heard(b"HTTP/1.1 503 Busy\r\n" + head + b"Content-Length: 0\r\n\r\n", []) == [Reply(503, hint, reason="503")]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\nforever", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab"])
def test_an_answer_of_no_certain_length_is_lost(answer: bytes) -> None:
    """An answer whose end cannot be told is not counted as one."""

    class Quiet(asyncio.Transport):
        def set_protocol(self, protocol: asyncio.BaseProtocol) -> None: ...

        def abort(self) -> None: ...

    replies: list[Reply] = []
    asker = HttpAsker(Address(host="127.0.0.1", port=1), b"")
    asker.connection_made(Quiet())
    asker._done = replies.append
    asker.data_received(answer)
    assert [reply.status for reply in replies] == [0]


def test_a_request_is_what_the_contract_reads() -> None:
    """The prebuilt bytes are an infer request of the protocol, tensors and parameters included."""
    x = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    head, _, body = infer_request("a/b", {"x": x}, {"priority": 2}).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines[1:])
    assert lines[0] == "POST /v2/models/a%2Fb/infer HTTP/1.1"
    assert int(fields["Content-Length"]) == len(body)
    request = parse("a/b", "", int(fields["Inference-Header-Content-Length"]), body).request
    assert request.tags.priority == 2
    assert np.array_equal(request.inputs["x"], x)
    assert json.loads(body[: int(fields["Inference-Header-Content-Length"])])["parameters"]["binary_data_output"] is True


def test_addresses_are_read_or_refused() -> None:
    """A path, a host and port, or an error that says how to write one."""
    assert address("unix:/run/a.sock") == Address(path="/run/a.sock")
    assert address("http://h:81") == Address(host="h", port=81)
    for wrong in ("h:81", "https://h", "http://h:port"):
        with pytest.raises(TheirsError, match="http://host:port"):
            address(wrong)
