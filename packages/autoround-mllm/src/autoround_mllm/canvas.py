"""What drawings are made on: a picture with a ground, colors that can be told apart, a font, and words.

A caption is only true if its words fit the pixels. So colors come from a small palette whose members stay apart even
after noise, a ground is so light or so dark that every color allowed on it stands out, and shapes are drawn without
smoothed edges. Ground and noise are there because a vision tower tuned on flat areas alone would see nothing of what it
meets in photographs: texture, gradients, low contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside

PALETTE: dict[str, Color] = {
    "red": (215, 30, 40),
    "green": (35, 155, 60),
    "blue": (35, 70, 210),
    "yellow": (250, 220, 30),
    "orange": (245, 125, 15),
    "purple": (125, 40, 165),
    "pink": (245, 130, 190),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
_ON_LIGHT = tuple(name for name in PALETTE if name != "white")
_ON_DARK = tuple(name for name in PALETTE if name not in ("black", "brown"))
_LIGHT, _DARK = (222, 240), (18, 42)  # the range of each channel of a ground
_NOISE = (0, 3, 6, 10)  # greatest change of a channel
_SIDES = (224, 256, 288, 320, 336, 384, 448, 512, 560, 672)  # longer sides; most are short, for speed
_RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9))
_LEAST = 224
_NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@final
@dataclass(frozen=True, slots=True)
class Drawing:
    """image: RGB. caption: a true description. questions: pairs of a question and its true answer, at least two."""

    image: Image
    caption: str
    questions: tuple[tuple[str, str], ...]


@final
@dataclass(frozen=True, slots=True)
class Canvas:
    """An RGB picture with a ground, a pen on it, and the random numbers that decide about everything.

    part: which documents text is taken from. ink: the color of lines and letters. colors: names from PALETTE that stand
    out from the ground.
    """

    rng: Random
    part: str
    image: Image
    pen: ImageDraw
    ink: Color
    colors: tuple[str, ...]

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    def finished(self, caption: str, questions: Sequence[tuple[str, str]]) -> Drawing:
        """The picture with its noise, and what is true about it."""
        return Drawing(noisy(self.image, self.rng.choice(_NOISE), self.rng), caption, tuple(questions))


def new_canvas(rng: Random, part: str, shade: str | None = None) -> Canvas:
    """A canvas of 224 to 672 pixels a side; shade: "light" or "dark", otherwise either."""
    from PIL import ImageDraw

    longer, (across, down) = rng.choice(_SIDES), rng.choice(_RATIOS)
    scale = longer / max(across, down)
    size = max(_LEAST, round(across * scale)), max(_LEAST, round(down * scale))
    dark = shade == "dark" if shade else rng.random() < 0.3
    image = _ground(size, _DARK if dark else _LIGHT, rng)
    ink = (240, 240, 240) if dark else (25, 25, 25)
    return Canvas(rng, part, image, ImageDraw.Draw(image), ink, _ON_DARK if dark else _ON_LIGHT)


def noisy(image: Image, amplitude: int, rng: Random) -> Image:
    """The image with every channel of every pixel changed by at most `amplitude`."""
    from PIL import Image, ImageChops

    if not amplitude:
        return image
    spread = 2 * amplitude + 1
    noise = Image.frombytes("RGB", image.size, rng.randbytes(3 * image.width * image.height))
    noise = noise.point([value * spread // 256 for value in range(256)] * 3)
    return ImageChops.add(image, noise, offset=-amplitude)


def font(size: int) -> FreeTypeFont | ImageFont:
    """Pillow's own font: the same on every machine, and no file to look for. It has ASCII letters."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def fitting_font(texts: Sequence[str], width: float, largest: int, least: int = 10) -> FreeTypeFont | ImageFont:
    """The largest font from `least` to `largest` in which none of the texts is wider than `width`."""
    for size in range(largest, least, -1):
        letters = font(size)
        if all(letters.getlength(text) <= width for text in texts):
            return letters
    return font(least)


def jittered(color: str, rng: Random, by: int = 7) -> Color:
    """A shade of a color of the palette; near enough to have the same name."""
    red, green, blue = (min(255, max(0, c + rng.randint(-by, by))) for c in PALETTE[color])
    return red, green, blue


def number(count: int) -> str:
    """3 -> "three", 0 -> "no", and digits above twelve."""
    return _NUMBERS[count] if 0 <= count < len(_NUMBERS) else str(count)


def plural(noun: str, count: int) -> str:
    if count == 1:
        return noun
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def counted(count: int, noun: str) -> str:
    """(3, "red circle") -> "three red circles"."""
    return f"{number(count)} {plural(noun, count)}"


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listed(items: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _ground(size: tuple[int, int], span: tuple[int, int], rng: Random) -> Image:
    """An area of one color, a gradient, soft clouds, or lines of a slightly different color."""
    from PIL import Image, ImageDraw, ImageOps

    first, second = (tuple(rng.randint(*span) for _ in range(3)) for _ in range(2))
    kind = rng.choice(("flat", "gradient", "clouds", "lines"))
    if kind == "gradient":
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(size)
        return ImageOps.colorize(ramp, first, second)
    if kind == "clouds":
        coarse = rng.randint(4, 12), rng.randint(4, 12)
        clouds = Image.frombytes("L", coarse, rng.randbytes(coarse[0] * coarse[1])).resize(
            size, Image.Resampling.BICUBIC
        )
        return ImageOps.colorize(clouds, first, second)
    image = Image.new("RGB", size, first)
    if kind == "lines":
        step, pen = rng.randint(9, 40), ImageDraw.Draw(image)
        for x in range(step, size[0] if rng.random() < 0.5 else 0, step):
            pen.line((x, 0, x, size[1]), second)
        for y in range(step, size[1], step):
            pen.line((0, y, size[0], y), second)
    return image
