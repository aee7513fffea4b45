"""The fence against releases that come back."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.contract.errors import TheirsError, WorldError
from appliance.contract.models import CompiledArtifact, EdgeConstraints, Manifest, Variant
from appliance.contract.vocabulary import Mode, Platform
from appliance.core.trust.fencing import Fence, fingerprint, unpack

ARTIFACT = CompiledArtifact(size=1, sha256="a", container_size=2, container_sha256="b", root="c")
MANIFEST = Manifest(
    model_id="reader",
    version="1.0",
    sha256="a",
    token=3,
    compiled_artifacts={Platform.ONNX: ARTIFACT},
    edge_constraints=EdgeConstraints(min_vram_gb=1, max_batch_size=8, target_latency_ms=50),
    released_at=1.0,
)


def test_newer_is_admitted_older_refused() -> None:
    """Only forward; the refusal names both tokens and the model."""
    fence = Fence().admit("reader", 5, "x")
    assert fence.admit("reader", 6, "y").highest["reader"].token == 6
    with pytest.raises(TheirsError) as caught:
        fence.admit("reader", 4, "x")
    assert caught.value.reason == "stale_token"
    assert str(caught.value) == "reader: token 4 is older than 5, which was seen already"


def test_equal_token_means_the_same_release() -> None:
    """The same again is harmless; another under its number is refused."""
    fence = Fence().admit("reader", 5, "x")
    assert fence.admit("reader", 5, "x") == fence
    with pytest.raises(TheirsError) as caught:
        fence.admit("reader", 5, "y")
    assert caught.value.reason == "token_reused"


def test_models_do_not_share_a_fence() -> None:
    """One model's tokens say nothing about another's."""
    fence = Fence().admit("reader", 5, "x").admit("detector", 1, "z")
    assert {name: mark.token for name, mark in fence.highest.items()} == {"reader": 5, "detector": 1}


def test_damaged_store_is_not_an_empty_fence() -> None:
    """Whatever is not a stored fence is an error: an empty one would admit everything."""
    for payload in (b"", b"{", b"[]", b'{"highest": {"reader": 5}}', b"{}x", b"\xff"):
        with pytest.raises(WorldError):
            unpack(payload)


def test_fingerprint_is_frozen() -> None:
    """It must not change when the contract grows: a device compares it with one that an older version stored."""
    assert fingerprint(MANIFEST) == "4e2bc8cd613b009cd46ac3135b8a1b7e439c233a389f9ee7c2bd9dc88b8bb48b"


def test_fingerprint_covers_what_makes_a_release() -> None:
    """Each field counts, but for the moment of the release; 1 and 1.0 are the same limit."""
    changes = [
        {"model_id": "other"},
        {"version": "1.1"},
        {"sha256": "b"},
        {"token": 4},
        {"compiled_artifacts": {Platform.LITERT: ARTIFACT}},
        {"compiled_artifacts": {Platform.ONNX: msgspec.structs.replace(ARTIFACT, root="d")}},
        {"edge_constraints": EdgeConstraints(min_vram_gb=2, max_batch_size=8, target_latency_ms=50)},
        {"variants": {Mode.MINIMAL: Variant(compiled_artifacts={Platform.ONNX: ARTIFACT})}},
        {"variants": {Mode.MINIMAL: Variant(compiled_artifacts={Platform.ONNX: msgspec.structs.replace(ARTIFACT, root="d")})}},
    ]
    prints = {fingerprint(msgspec.structs.replace(MANIFEST, **change)) for change in changes}
    assert len(prints | {fingerprint(MANIFEST)}) == len(changes) + 1
    assert fingerprint(msgspec.json.decode(msgspec.json.encode(MANIFEST), type=Manifest)) == fingerprint(MANIFEST)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6), st.sampled_from("xy"))))
def test_what_is_admitted_only_grows(offers: list[tuple[str, int, str]]) -> None:
    """Over any sequence, with a restart after each offer: tokens never fall, one token never has two fingerprints, refusals change nothing."""
    fence = Fence()
    seen: dict[str, dict[int, str]] = {"a": {}, "b": {}}
    for model, token, digest in offers:
        highest = max(seen[model], default=-1)
        allowed = token > highest or (token == highest and seen[model][token] == digest)
        try:
            fence = unpack(fence.admit(model, token, digest).pack())
        except TheirsError:
            assert not allowed
        else:
            assert allowed
            seen[model][token] = digest
        assert {name: mark.token for name, mark in fence.highest.items()} == {name: max(tokens) for name, tokens in seen.items() if tokens}
