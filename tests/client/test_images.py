"""Promises of the way from an image to the recogniser's tensor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from appliance.client.images import HEIGHT, WIDTHS, tensor_of, width_for
from appliance.contract.errors import TheirsError


@given(st.integers(1, 900), st.integers(1, 120), st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16"]))
@settings(deadline=None, max_examples=60)
def test_every_image_becomes_one_of_few_shapes(width: int, height: int, mode: str) -> None:
    """Whatever the size and mode, the tensor is float32, dense, in -1..1, and of a bucket's width."""
    tensor = tensor_of(Image.new(mode, (width, height)))
    assert tensor.dtype == np.float32
    assert tensor.shape[:3] == (1, 3, HEIGHT)
    assert tensor.shape[3] in WIDTHS
    assert tensor.flags.c_contiguous
    assert np.abs(tensor).max() <= 1


@given(st.integers(1, 5000), st.integers(1, 500))
def test_the_bucket_is_the_smallest_that_holds_the_line(width: int, height: int) -> None:
    """No line is padded more than needed, and only the longest are squeezed."""
    bucket = width_for((width, height))
    natural = HEIGHT * width / height
    assert natural <= bucket or bucket == WIDTHS[-1]
    assert all(smaller < natural for smaller in WIDTHS if smaller < bucket)


def test_channels_are_blue_green_red_and_scaled() -> None:
    """Pure red is the last channel at 1, the others at -1; the right padding is 0."""
    tensor = tensor_of(Image.new("RGB", (100, HEIGHT), (255, 0, 0)))[0]
    assert (tensor[2, :, :100] == 1).all()
    assert (tensor[:2, :, :100] == -1).all()
    assert (tensor[:, :, 100:] == 0).all()


def test_transparent_is_white() -> None:
    """Ink on nothing reads like ink on white, not on black."""
    assert (tensor_of(Image.new("RGBA", (100, HEIGHT), (0, 0, 0, 0)))[0, :, :, :100] == 1).all()


def test_the_same_image_gives_the_same_bits_and_is_left_alone() -> None:
    """The function is pure: requests of one image may be compared bit by bit."""
    image = Image.effect_noise((333, 40), 80).convert("RGB")
    before = image.tobytes()
    assert tensor_of(image).tobytes() == tensor_of(image).tobytes()
    assert image.tobytes() == before


def test_an_image_without_pixels_is_refused() -> None:
    """Nothing to read is said, not divided by."""
    with pytest.raises(TheirsError, match="0 x 10"):
        tensor_of(Image.new("RGB", (0, 10)))
