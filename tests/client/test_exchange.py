"""Replies are read whole however they are cut, within bounds, and nothing but our errors comes of what is none."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.client.exchange import MAX_HEAD_BYTES, Asked, LostError, Reply, ReplyReader, address
from appliance.contract.errors import ApplianceError, TheirsError

SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nA: b\r\n\r\nhello world"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6;x=y\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n"
ENDED = b"HTTP/1.0 200 OK\r\n\r\nhello world"
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + SIZED


def read(data: bytes, cuts: Sequence[int] = (), *, end: bool = True, limit: int = 1000) -> list[Reply]:
    """Feed bytes in pieces, and then the end."""
    reader, found, at = ReplyReader("server", limit), [], 0
    for cut in [*sorted(cuts), len(data)]:
        while at < cut:
            room = reader.buffer()
            size = min(len(room), cut - at)
            room[:size] = data[at : at + size]
            at += size
            reply = reader.filled(size)
            found += [] if reply is None else [reply]
    if end and not found:
        reply = reader.filled(0)
        found += [] if reply is None else [reply]
    return found


@pytest.mark.parametrize(("data", "keep"), [(SIZED, True), (CHUNKED, True), (ENDED, False), (CONTINUED, True)])
@given(cuts=st.lists(st.integers(1, 150), max_size=8))
def test_a_reply_is_the_same_however_it_is_cut(data: bytes, keep: bool, cuts: list[int]) -> None:
    """Any framing, any pieces: status, body, and whether the connection may go on."""
    found = read(data, [cut for cut in cuts if cut < len(data)])
    assert [(reply.status, bytes(reply.body), reply.keep) for reply in found] == [(200, b"hello world", keep)]


@given(st.lists(st.sampled_from([SIZED, CHUNKED, CONTINUED]), min_size=1, max_size=3))
def test_one_reader_reads_one_reply_after_the_other(replies: list[bytes]) -> None:
    """A kept connection's replies do not mix."""
    reader = ReplyReader("server")
    for each in replies:
        reader.buffer()[: len(each)] = each
        reply = reader.filled(len(each))
        assert reply is not None
        assert bytes(reply.body) == b"hello world"


@pytest.mark.parametrize("data", [SIZED[:-1], CHUNKED[:-3], SIZED[:20], b"", CONTINUED[:30]])
def test_an_end_before_the_whole_reply_is_a_loss(data: bytes) -> None:
    """The server may have done what it was asked, so this is not the same as never having been reached."""
    with pytest.raises(LostError) as caught:
        read(data)
    assert caught.value.reason == "unreachable"


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20x OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1001),
        b"HTTP/1.1 200 OK\r\nA: " + b"a" * MAX_HEAD_BYTES,
    ],
)
def test_broken_framing_is_malformed_and_named(data: bytes) -> None:
    """Nothing is guessed, and nothing beyond the bounds is held."""
    with pytest.raises(TheirsError, match="server: the answer") as caught:
        read(data)
    assert caught.value.reason == "malformed"


@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=60).map(lambda tail: SIZED[:-11] + tail),
        st.binary(max_size=60).map(lambda tail: CHUNKED[:50] + tail),
    )
)
def test_whatever_comes_nothing_but_our_errors_escapes(data: bytes) -> None:
    """Garbage is an ApplianceError or a reply."""
    try:
        read(data)
    except ApplianceError:
        return


def test_requests_and_addresses_are_rendered_as_http_says() -> None:
    """The body's length is that of its parts; a POST without a body says so; frames are beside a Unix socket only."""
    assert Asked("GET", "/v2").render("h") == [b"GET /v2 HTTP/1.1\r\nHost: h\r\n\r\n"]
    assert Asked("POST", "/x", (), {"A": "b"}).render("h") == [b"POST /x HTTP/1.1\r\nHost: h\r\nA: b\r\nContent-Length: 0\r\n\r\n"]
    head, *parts = Asked("POST", "/x", [b"ab", memoryview(b"cde")]).render("h")
    assert (bytes(head)[-21:], parts) == (b"Content-Length: 5\r\n\r\n", [b"ab", b"cde"])
    assert (address("unix:/run/a/api.sock").frames, address("http://h:8").frames) == ("/run/a/frames.sock", "")
    assert (address("http://[::1]:8").host, address("http://h").port) == ("::1", 80)
