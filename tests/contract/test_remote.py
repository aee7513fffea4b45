"""Inference frames: what goes in comes out bit for bit, and no bytes whatever raise anything but a named error."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from appliance.contract.errors import OursError, TheirsError
from appliance.contract.inference import DTYPES
from appliance.contract.remote import FRAME_MAX_BYTES, AnswerHead, AskHead, pack, unpack_answer, unpack_ask

ASK = AskHead(model="m", version="1", within_ms=150.0)
ARRAYS = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
)


@given(st.dictionaries(st.text(max_size=20), ARRAYS, max_size=4))
def test_tensors_travel_bit_for_bit(tensors: dict[str, np.ndarray]) -> None:
    """Names, order, shapes, types and bytes are those that were packed, in both directions."""
    ask = unpack_ask(pack(ASK, tensors))
    answer = unpack_answer(pack(AnswerHead(version="1", took_ms=1.0, dollars_per_hour=0.5), tensors))
    for seen in (ask.tensors, answer.tensors):
        assert list(seen) == list(tensors)
        for name, array in tensors.items():
            assert (seen[name].shape, seen[name].dtype, seen[name].tobytes()) == (array.shape, array.dtype, array.tobytes())
    assert (ask.head.model, ask.head.within_ms, answer.head.dollars_per_hour) == ("m", 150.0, 0.5)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_named_error(junk: bytes) -> None:
    """Nothing that a peer sends raises anything but TheirsError."""
    for frame in (junk, b"AIF1" + junk):
        for read in (unpack_ask, unpack_answer):
            with pytest.raises(TheirsError):
                read(frame)


@given(st.data())
def test_a_damaged_frame_is_refused_or_still_well_formed(data: st.DataObject) -> None:
    """A flipped byte or a cut never yields arrays that disagree with the head, and never another exception."""
    frame = bytearray(pack(ASK, {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    for damaged in (bytes(frame), cut):
        with contextlib.suppress(TheirsError):
            assert sum(array.nbytes for array in unpack_ask(damaged).tensors.values()) <= len(damaged)


def test_what_does_not_fit_one_message_is_refused_with_what_to_do() -> None:
    """A frame beyond the broker's packet never leaves; text tensors do not travel at all."""
    with pytest.raises(TheirsError, match="variant D"):
        pack(ASK, {"x": np.zeros(FRAME_MAX_BYTES, np.uint8)})
    with pytest.raises(OursError, match="does not travel"):
        pack(ASK, {"x": np.array(["a"], object)})
