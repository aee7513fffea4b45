"""Data keys reach the reader they were wrapped for, and nobody else, under nothing else's name."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.contract.errors import OursError, TheirsError
from appliance.contract.models import RegionKeyAsk
from appliance.core.trust.envelope import region_public, unwrap_for_device, unwrap_for_region, wrap_for_device, wrap_for_region

KEYS = st.binary(min_size=32, max_size=32)
NONCES = st.binary(min_size=12, max_size=12)
HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)
ARTIFACT = "ab" * 32
KEY, PRIVATE, EPHEMERAL, KEK, NONCE = bytes([1] * 32), bytes([2] * 32), bytes([3] * 32), bytes([4] * 32), bytes([5] * 12)


@settings(deadline=None)
@given(HASHES, KEYS, KEYS, KEYS)
def test_region_round_trip(artifact: str, data_key: bytes, private: bytes, ephemeral: bytes) -> None:
    """Any key, any pair: the region reads what the cloud wrote, and the wire does not carry it."""
    answer = wrap_for_region(RegionKeyAsk(artifact=artifact, public=region_public(private)), data_key, ephemeral)
    assert unwrap_for_region(answer, artifact, private) == data_key
    assert data_key not in msgspec.json.encode(answer) + answer.wrapped


@settings(deadline=None)
@given(HASHES, KEYS, KEYS, NONCES, st.integers(0, 2**31))
def test_device_round_trip(artifact: str, data_key: bytes, kek: bytes, nonce: bytes, epoch: int) -> None:
    """The device reads what the region wrote; the epoch travels beside it."""
    answer = wrap_for_device(artifact, data_key, kek=kek, epoch=epoch, nonce=nonce)
    assert unwrap_for_device(answer, artifact, kek) == data_key
    assert answer.epoch == epoch


@settings(deadline=None)
@given(st.integers(0, 47), st.integers(1, 255))
def test_changed_bytes_do_not_open(at: int, flip: int) -> None:
    """Every byte of both envelopes counts."""
    region = wrap_for_region(RegionKeyAsk(artifact=ARTIFACT, public=region_public(PRIVATE)), KEY, EPHEMERAL)
    device = wrap_for_device(ARTIFACT, KEY, kek=KEK, epoch=1, nonce=NONCE)
    changed = region.wrapped[:at] + bytes([region.wrapped[at] ^ flip]) + region.wrapped[at + 1 :]
    with pytest.raises(TheirsError):
        unwrap_for_region(msgspec.structs.replace(region, wrapped=changed), ARTIFACT, PRIVATE)
    changed = device.wrapped[:at] + bytes([device.wrapped[at] ^ flip]) + device.wrapped[at + 1 :]
    with pytest.raises(TheirsError):
        unwrap_for_device(msgspec.structs.replace(device, wrapped=changed), ARTIFACT, KEK)


def test_key_of_another_artifact_does_not_open() -> None:
    """Neither under its own name nor under the one that was asked for: the hash is authenticated."""
    other = "cd" * 32
    region = wrap_for_region(RegionKeyAsk(artifact=other, public=region_public(PRIVATE)), KEY, EPHEMERAL)
    device = wrap_for_device(other, KEY, kek=KEK, epoch=1, nonce=NONCE)
    for renamed in (region, msgspec.structs.replace(region, artifact=ARTIFACT)):
        with pytest.raises(TheirsError) as caught:
            unwrap_for_region(renamed, ARTIFACT, PRIVATE)
        assert caught.value.reason == "unwrap"
    for renamed_device in (device, msgspec.structs.replace(device, artifact=ARTIFACT)):
        with pytest.raises(TheirsError) as caught:
            unwrap_for_device(renamed_device, ARTIFACT, KEK)
        assert caught.value.reason == "unwrap"


def test_answer_to_another_question_is_named() -> None:
    """The error says whose key came instead: a mixed-up answer is told from a forged one."""
    other = wrap_for_device("cd" * 32, KEY, kek=KEK, epoch=1, nonce=NONCE)
    with pytest.raises(TheirsError, match="the key is for artifact cdcd"):
        unwrap_for_device(other, ARTIFACT, KEK)


def test_another_reader_cannot_open() -> None:
    """Another region, another device, and an envelope with another sender's key put into it."""
    region = wrap_for_region(RegionKeyAsk(artifact=ARTIFACT, public=region_public(PRIVATE)), KEY, EPHEMERAL)
    device = wrap_for_device(ARTIFACT, KEY, kek=KEK, epoch=1, nonce=NONCE)
    for attempt in (
        lambda: unwrap_for_region(region, ARTIFACT, bytes([9] * 32)),
        lambda: unwrap_for_region(msgspec.structs.replace(region, ephemeral=region_public(KEK)), ARTIFACT, PRIVATE),
        lambda: unwrap_for_device(device, ARTIFACT, bytes([9] * 32)),
        lambda: unwrap_for_device(msgspec.structs.replace(device, nonce=bytes(12)), ARTIFACT, KEK),
        lambda: unwrap_for_device(msgspec.structs.replace(device, nonce=b""), ARTIFACT, KEK),
        lambda: unwrap_for_device(msgspec.structs.replace(device, wrapped=b""), ARTIFACT, KEK),
    ):
        with pytest.raises(TheirsError) as caught:
            attempt()
        assert caught.value.reason == "unwrap"


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"", bytes(31), bytes(33)])
def test_public_keys_that_give_the_secret_away_are_refused(public: bytes) -> None:
    """Points of low order make the shared secret zero, known to all: refused on both sides, as are wrong lengths."""
    with pytest.raises(TheirsError) as caught:
        wrap_for_region(RegionKeyAsk(artifact=ARTIFACT, public=public), KEY, EPHEMERAL)
    assert caught.value.reason == "public_key"
    answer = wrap_for_region(RegionKeyAsk(artifact=ARTIFACT, public=region_public(PRIVATE)), KEY, EPHEMERAL)
    with pytest.raises(TheirsError) as caught:
        unwrap_for_region(msgspec.structs.replace(answer, ephemeral=public), ARTIFACT, PRIVATE)
    assert caught.value.reason == "public_key"


def test_short_keys_are_our_own_fault() -> None:
    """A caller that passes 16 bytes for 32 has a bug; it must not become a weaker cipher."""
    for attempt in (
        lambda: wrap_for_device(ARTIFACT, KEY[:16], kek=KEK, epoch=1, nonce=NONCE),
        lambda: wrap_for_device(ARTIFACT, KEY, kek=KEK[:16], epoch=1, nonce=NONCE),
        lambda: wrap_for_device(ARTIFACT, KEY, kek=KEK, epoch=1, nonce=NONCE[:8]),
        lambda: wrap_for_region(RegionKeyAsk(artifact=ARTIFACT, public=region_public(PRIVATE)), KEY[:16], EPHEMERAL),
        lambda: region_public(PRIVATE[:31]),
    ):
        with pytest.raises(OursError):
            attempt()
