"""Messages survive the wire, and nothing malformed, oversized or foreign gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.codec import decode, encode
from appliance.contract.errors import TheirsError
from appliance.contract.models import ChunkAsk, WrappedKey


@given(artifact=st.text(alphabet="0123456789abcdef", max_size=64), index=st.integers(0, 2**53))
def test_a_message_survives_the_wire(artifact: str, index: int) -> None:
    """decode(encode(m)) == m."""
    message = ChunkAsk(artifact=artifact, index=index)
    assert decode(encode(message), ChunkAsk) == message


@given(epoch=st.integers(0, 2**31), nonce=st.binary(max_size=32), wrapped=st.binary(max_size=64))
def test_bytes_survive_the_wire(epoch: int, nonce: bytes, wrapped: bytes) -> None:
    """Binary fields travel in JSON without loss."""
    message = WrappedKey(artifact="a", epoch=epoch, nonce=nonce, wrapped=wrapped)
    assert decode(encode(message), WrappedKey) == message


@given(st.binary(max_size=600))
def test_garbage_is_refused_by_our_own_error(payload: bytes) -> None:
    """Whatever arrives, only TheirsError leaves."""
    with pytest.raises(TheirsError):
        decode(payload, ChunkAsk)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"kind":"chunk_ask","artifact":"a","index":1,"v":2}', "version"),
        (b'{"kind":"chunk_ask","artifact":"a"}', "malformed"),
        (b'{"kind":"vitals","artifact":"a","index":1}', "malformed"),
        (b'{"kind":"chunk_ask","artifact":"' + b"a" * 600 + b'","index":1}', "oversized"),
    ],
)
def test_a_refusal_names_its_reason(payload: bytes, reason: str) -> None:
    """Version, shape and size are told apart."""
    with pytest.raises(TheirsError) as raised:
        decode(payload, ChunkAsk)
    assert raised.value.reason == reason
    assert "ChunkAsk" in str(raised.value)


def test_a_minor_addition_is_ignored() -> None:
    """A newer peer may add fields."""
    assert decode(b'{"kind":"chunk_ask","artifact":"a","index":1,"later":true}', ChunkAsk).index == 1
