"""An image to the tensor that a PP-OCR text recogniser takes.

1. Height 48, ratio kept, channels blue-green-red, `(x / 255 - 0.5) / 0.5`, zeros on the right
   (PaddleOCR `resize_norm_img`; the recogniser was trained on images as OpenCV reads them, hence the order).
2. The width is one of `WIDTHS`: a server can only put requests of one shape into one batch, and a network with free width
   would otherwise see hundreds of shapes. A line longer than the widest is squeezed, as PaddleOCR does.
3. Unlike PaddleOCR, which resizes bilinearly, we resize with Lanczos and sharpen: this recogniser loses the spaces between
   words, and hardly ever letters, when a line is soft. The figures are in docs/own-model.md.
4. What is transparent counts as white.
"""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from appliance.contract.errors import TheirsError

HEIGHT = 48
WIDTHS = (160, 320, 480)  # pixels; multiples of 8, the recogniser's step
_SHARPEN = ImageFilter.UnsharpMask(radius=2, percent=150, threshold=0)


def width_for(size: tuple[int, int]) -> int:
    """Return the smallest of `WIDTHS` that holds an image of `size` (width, height) at height 48, else the widest."""
    natural = math.ceil(HEIGHT * size[0] / size[1])
    return next((width for width in WIDTHS if natural <= width), WIDTHS[-1])


def tensor_of(image: Image.Image) -> npt.NDArray[np.float32]:
    """Return a float32 array [1, 3, 48, W], C-contiguous, with W one of `WIDTHS`.

    Raises: TheirsError (`image`) if the image has no pixels or a mode that has no RGB form.
    """
    if 0 in image.size:
        raise TheirsError("image", f"an image of {image.width} x {image.height} pixels has nothing to read")
    width = width_for(image.size)
    shown = min(width, max(1, math.ceil(HEIGHT * image.width / image.height)))
    line = _opaque(image).resize((shown, HEIGHT), Image.Resampling.LANCZOS).filter(_SHARPEN)
    pixels = np.asarray(line, dtype=np.float32)
    padded = np.zeros((1, 3, HEIGHT, width), dtype=np.float32)
    padded[0, :, :, :shown] = pixels[:, :, ::-1].transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)
    return padded


def _opaque(image: Image.Image) -> Image.Image:
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        layer = image.convert("RGBA")
    except ValueError as error:
        raise TheirsError("image", f"mode {image.mode} cannot be shown as RGB", remedy="save it as an 8-bit RGB image") from error
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")
