"""The stream of shelf labels: one image is one printed line as a camera at a shelf's distance sees it, with its true text.

1. The same seed, fonts and Pillow give the same labels; all chance comes from the `random.Random` passed in.
2. Every label carries all degradations lightly, as any camera picture does, and one of them heavily: `Label.degradation`.
3. Only characters of the reader's dictionary are printed (it has $ and ¥, but neither the euro nor the pound sign).

The ranges are chosen by eye and by measurement: a person reads every label, the reader misses some in each heavy class.
Measured shares: docs/own-model.md.
"""

import functools
import math
import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from appliance.contract.errors import WorldError

Range = tuple[float, float]
Colour = tuple[int, int, int]

# degradation: (range on every label, range where it is the heavy one)
DEGRADATIONS: Mapping[str, tuple[Range, Range]] = MappingProxyType(
    {
        "noise": ((1.5, 5.0), (11.0, 20.0)),  # standard deviation of the sensor's noise, 8-bit levels
        "blur": ((0.01, 0.025), (0.03, 0.045)),  # Gaussian radius as a share of the letter size
        "rotation": ((0.0, 0.6), (1.0, 2.2)),  # degrees, either way
        "contrast": ((0.75, 1.0), (0.3, 0.5)),  # what is left between ink and paper
        "shadow": ((0.0, 0.15), (0.4, 0.65)),  # how much light a shadow's dark end takes
        "perspective": ((0.0, 0.04), (0.1, 0.2)),  # by how much of its height one end of the line is smaller
        "distance": ((24.0, 38.0), (15.0, 19.0)),  # letter size (em) on the sensor, pixels
    },
)
FONTS = (
    ("fonts-dejavu-core", ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold")),
    (
        "fonts-liberation",
        (
            "LiberationSans-Regular",
            "LiberationSans-Bold",
            "LiberationSans-Italic",
            "LiberationSerif-Regular",
            "LiberationSerif-Bold",
            "LiberationMono-Bold",
        ),
    ),
)
STOCKS: tuple[tuple[Colour, Colour], ...] = (  # paper, ink
    ((250, 250, 246), (20, 20, 22)),
    ((244, 240, 228), (30, 26, 24)),
    ((255, 222, 40), (16, 16, 16)),
    ((255, 214, 0), (190, 10, 20)),
    ((200, 20, 30), (255, 255, 255)),
    ((20, 90, 60), (250, 250, 240)),
    ((214, 232, 246), (14, 40, 96)),
    ((248, 160, 60), (24, 20, 16)),
)


@dataclass(frozen=True, slots=True)
class Label:
    """One photographed label line (RGB), the text printed on it, the degradation that is heavy, and the font's file name."""

    image: Image.Image
    text: str
    degradation: str
    font: str


def draw(rng: random.Random) -> Label:
    """Print one label and photograph it. Raises: WorldError (`fonts`) if no known font is installed."""
    text = print_text(rng)
    heavy = rng.choice(tuple(DEGRADATIONS))
    amount = {name: rng.uniform(*ranges[name == heavy]) for name, ranges in DEGRADATIONS.items()}
    font = rng.choice(installed_fonts())
    paper, ink = rng.choice(STOCKS)
    image = _typeset(text, _font(font, round(amount["distance"])), paper, ink, rng)
    image = _turn(image, amount["rotation"] * rng.choice((-1, 1)), amount["perspective"] * rng.choice((-1, 1)), paper)
    image = image.filter(ImageFilter.GaussianBlur(amount["blur"] * amount["distance"]))
    return Label(_expose(image, amount, rng), text, heavy, font)


def print_text(rng: random.Random) -> str:
    """Return what one label line says: a product, a price, an offer, a price by unit, or a code."""
    kinds: tuple[Callable[[random.Random], str], ...] = (_product, _price, _offer, _unit, _code)
    return rng.choices(kinds, weights=(50, 20, 12, 10, 8))[0](rng)


@functools.cache
def installed_fonts() -> tuple[str, ...]:
    """Return the known fonts that this machine has. Raises: WorldError (`fonts`)."""
    found = tuple(name for _, names in FONTS for name in names if _has_font(name))
    if not found:
        packages = " ".join(package for package, _ in FONTS)
        raise WorldError("fonts", "none of the fonts that labels are printed in is installed", remedy=f"apt-get install {packages}")
    return found


@functools.cache
def _stock() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("appliance.lab").joinpath("labels.toml").read_text(encoding="utf-8"))


def _product(rng: random.Random) -> str:
    shelf = rng.choice(_stock()["shelf"])
    return rng.choice(("{item} {pack}", "{item} {pack}", "{item} {pack}", "{item}")).format(
        item=rng.choice(shelf["items"]), pack=rng.choice(shelf["packs"])
    )


def _price(rng: random.Random) -> str:
    return _filled("prices", rng)


def _offer(rng: random.Random) -> str:
    return _filled("offers", rng)


def _unit(rng: random.Random) -> str:
    return _filled("units", rng)


def _code(rng: random.Random) -> str:
    return _filled("codes", rng)


def _filled(kind: str, rng: random.Random) -> str:
    template: str = rng.choice(_stock()["words"][kind])
    return template.format(
        n=rng.randint(2, 6),
        price=f"{rng.randint(0, 89)}.{rng.choice(('99', '49', '95', '00', '79', '25', '50', '19'))}",
        cents=f"0.{rng.randint(5, 99):02d}",
        percent=rng.choice((10, 15, 20, 25, 30, 50)),
        yen=rng.randrange(98, 2980, 10),
        code=rng.randint(100_000, 9_999_999),
        day=rng.randint(1, 28),
        month=rng.randint(1, 12),
    )


@functools.lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{name}.ttf", size)


def _has_font(name: str) -> bool:
    try:
        _font(name, 16)
    except OSError:  # Pillow looks through the usual font folders before it says so
        return False
    return True


def _typeset(text: str, font: ImageFont.FreeTypeFont, paper: Colour, ink: Colour, rng: random.Random) -> Image.Image:
    """Print the line on its paper with the margins that a text detector leaves."""
    left, top, right, bottom = font.getbbox(text)
    west, east, north, south = (round(font.size * rng.uniform(*span)) for span in ((0.2, 0.7), (0.2, 0.7), (0.1, 0.25), (0.1, 0.25)))
    image = Image.new("RGB", (math.ceil(right - left) + west + east, math.ceil(bottom - top) + north + south), paper)
    ImageDraw.Draw(image).text((west - left, north - top), text, font=font, fill=ink)
    return image


def _turn(image: Image.Image, degrees: float, keystone: float, paper: Colour) -> Image.Image:
    """Rotate, and shrink the right (keystone > 0) or left end; the frame grows so that nothing is cut."""
    width, height = image.size
    shrink = abs(keystone) * height / 2
    shown = [(0.0, 0.0), (width, 0.0), (width, height), (0.0, height)]
    for corner, inward in ((1, 1), (2, -1)) if keystone > 0 else ((0, 1), (3, -1)):
        shown[corner] = (shown[corner][0], shown[corner][1] + inward * shrink)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    shown = [(x * cos - y * sin, x * sin + y * cos) for x, y in shown]
    west, north = min(x for x, _ in shown), min(y for _, y in shown)
    shown = [(x - west, y - north) for x, y in shown]
    frame = (math.ceil(max(x for x, _ in shown)), math.ceil(max(y for _, y in shown)))
    coefficients = _perspective(shown, [(0, 0), (width, 0), (width, height), (0, height)])
    return image.transform(frame, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC, fillcolor=paper)


def _perspective(seen: Sequence[tuple[float, float]], printed: Sequence[tuple[float, float]]) -> list[float]:
    """Solve for Pillow's eight coefficients that map four points of the picture to those of the print."""
    rows, values = [], []
    for (x, y), (u, v) in zip(seen, printed, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solved: list[float] = np.linalg.solve(np.array(rows), np.array(values)).tolist()
    return solved


def _expose(image: Image.Image, amount: Mapping[str, float], rng: random.Random) -> Image.Image:
    """Light the picture: contrast, brightness, a colour cast, a shadow across it, and the sensor's noise (mostly luminance)."""
    noise = np.random.default_rng(rng.getrandbits(64))
    pixels = np.asarray(image, dtype=np.float32)
    grey = 128 + (1 - amount["contrast"]) * rng.uniform(-60, 60)
    cast = np.array([rng.uniform(0.93, 1.04) for _ in range(3)], dtype=np.float32)
    lit = (grey + (pixels - 128) * np.float32(amount["contrast"])) * cast
    lit *= _shadow(image.size, amount["shadow"], rng)[:, :, np.newaxis]
    lit += noise.standard_normal((*pixels.shape[:2], 1), dtype=np.float32) * np.float32(amount["noise"])
    lit += noise.standard_normal((1, 1, 3), dtype=np.float32) * np.float32(2)
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8), "RGB")


def _shadow(size: tuple[int, int], depth: float, rng: random.Random) -> npt.NDArray[np.float32]:
    """Return the light of each pixel, 1 - depth to 1: a soft slanting edge somewhere along the line."""
    across = (
        np.arange(size[0], dtype=np.float32)[np.newaxis, :] + rng.uniform(-1.5, 1.5) * np.arange(size[1], dtype=np.float32)[:, np.newaxis]
    )
    edge, softness = rng.uniform(0.2, 0.8) * size[0], rng.uniform(0.1, 0.6) * size[1]
    side = rng.choice((-1, 1))
    light = 1 - depth / (1 + np.exp(np.clip(side * (across - edge) / max(softness, 1.0), -30, 30)))
    return light.astype(np.float32)
