"""What the tiny vision-language model learns: pictures of 64 x 64 pixels, and questions with one right answer each.

Four lessons take turns: different shapes (which color, which shape, where, what), two sorts of scattered shapes (how
many), a written number (which, in what color), four bars (the tallest, the shortest). Every shape, digit and bar keeps
to cells of a grid, which are the patches of the vision tower: what is in a patch it sees at once, and that leaves most
of the work to the language tower, whose rounding is studied. Nothing is asked twice, and a picture that is described is
not asked about, so that no answer can be copied from another.

The parts share no picture, and a number that is written in one is never written in the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from autoround_mllm.canvas import PALETTE, Canvas, font, jittered, listed, noisy, number, plural, with_article
from autoround_mllm.conversation import Conversation
from autoround_mllm.drawings import seeded
from autoround_mllm.drawn_shapes import draw_shape

if TYPE_CHECKING:
    from PIL.Image import Image

CELLS, CELL = 4, 16  # a picture has 4 x 4 cells of 16 x 16 pixels, which the vision tower takes as its patches
SIDE = CELLS * CELL
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
ROWS, COLUMNS = ("top", "upper", "lower", "bottom"), ("first", "second", "third", "fourth")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
EASY = 4800  # pictures until none is easy any more; at first all are, then ever fewer
DESCRIBED = 0.25  # of the pictures for learning; the others are asked about

Turn = tuple[str, str, str]  # kind of question, question, answer
Seen = dict[int, tuple[str, str]]  # cell -> color, and shape or digit


def places(canvas: Canvas, easy: bool) -> tuple[list[Turn], Seen]:
    """Two to five different shapes; each is asked about once."""
    rng = canvas.rng
    count = 1 if easy else rng.randint(2, 5)
    cells = sorted(rng.sample(range(CELLS * CELLS), count))
    things = list(zip(rng.sample(COLORS, count), rng.sample(SHAPES, count), cells, strict=True))
    turns: list[Turn] = []
    for color, shape, cell in things:
        _put(canvas, color, shape, cell)
        asked = [
            ("color", f"What color is the {shape}?", color),
            ("shape", f"Which shape is {color}?", shape),
            ("place", f"Where is the {color} {shape}?", _place(cell)),
            ("place", f"Where is the {shape}?", _place(cell)),
            ("thing", f"What is in the {_place(cell)}?", f"{with_article(color)} {shape}"),
        ]
        turns.append(rng.choice(asked))
    rng.shuffle(turns)
    told = [f"{with_article(color)} {shape} in the {_place(cell)}" for color, shape, cell in things]
    seen: Seen = {cell: (color, shape) for color, shape, cell in things}
    return [*turns, ("caption", "Describe the image.", listed(told))], seen


def counts(canvas: Canvas, easy: bool) -> tuple[list[Turn], Seen]:
    """One to five shapes of each of two sorts, scattered."""
    rng, different = canvas.rng, 1 if easy else 2
    sorts = list(zip(rng.sample(COLORS, different), rng.sample(SHAPES, different), strict=True))
    many = [rng.randint(1, 5) for _ in sorts]
    cells = iter(rng.sample(range(CELLS * CELLS), sum(many)))
    turns, seen = [], {}
    for (color, shape), count in zip(sorts, many, strict=True):
        for cell in itertools.islice(cells, count):
            _put(canvas, color, shape, cell)
            seen[cell] = color, shape
        named = rng.choice((f"{color} {plural(shape, 2)}", plural(shape, 2), f"{color} shapes"))
        turns.append(("count", f"How many {named} are there?", number(count)))
    told = [f"{number(n)} {color} {plural(shape, n)}" for (color, shape), n in zip(sorts, many, strict=True)]
    return [*turns, ("caption", "Describe the image.", listed(told))], seen


def written(canvas: Canvas, easy: bool) -> tuple[list[Turn], Seen]:
    """A number of two or three digits; each belongs to one part, by its remainder."""
    rng = canvas.rng
    while True:
        value = rng.randint(10, 99) if easy or rng.random() < 0.3 else rng.randint(100, 999)
        if (value % 7 == 3) == (canvas.part == "evaluation"):
            break
    digits, color, letters = str(value), rng.choice(COLORS), font(rng.randint(18, 23))
    column, row = rng.randint(0, CELLS - len(digits)), rng.randrange(CELLS)
    shade, x, y = jittered(color, rng), rng.randint(-1, 1), rng.randint(-1, 1)
    seen: Seen = {row * CELLS + column + i: (color, digit) for i, digit in enumerate(digits)}
    for i, digit in enumerate(digits):
        middle = (column + i + 0.5) * CELL + x, (row + 0.5) * CELL + y
        canvas.pen.text(middle, digit, shade, letters, anchor="mm")
    turns = [("number", "What number is written?", digits), ("color", "What color is the number?", color)]
    rng.shuffle(turns)
    return [*turns, ("caption", "Describe the image.", f"the number {digits} in {color}")], seen


def bars(canvas: Canvas, easy: bool) -> tuple[list[Turn], Seen]:
    """Four bars of different colors and clearly different heights."""
    rng = canvas.rng
    count = 2 if easy else CELLS
    columns, colors = sorted(rng.sample(range(CELLS), count)), rng.sample(COLORS, count)
    heights = rng.sample(range(1, 9), count)
    for column, color, height in zip(columns, colors, heights, strict=True):
        x = column * CELL + rng.randint(2, 5)
        canvas.pen.rectangle((x, SIDE - 2 - 7 * height, x + 9, SIDE - 2), fill=jittered(color, rng))
    rising = [color for _, color in sorted(zip(heights, colors, strict=True))]
    turns = [
        ("tallest", "Which bar is the tallest?", rising[-1]),
        ("shortest", "Which bar is the shortest?", rising[0]),
    ]
    rng.shuffle(turns)
    return [*turns, ("caption", "Describe the image.", f"{number(count)} bars: {listed(colors)}")], {}


def _put(canvas: Canvas, color: str, shape: str, cell: int) -> None:
    """Draw a shape anywhere in its cell, a pixel away from the next."""
    rng = canvas.rng
    side = rng.randint(11, CELL - 2)
    x = cell % CELLS * CELL + rng.randint(1, CELL - 1 - side)
    y = cell // CELLS * CELL + rng.randint(1, CELL - 1 - side)
    draw_shape(canvas, shape, (x, y, x + side, y + side), jittered(color, rng))


def _place(cell: int) -> str:
    return f"{ROWS[cell // CELLS]} row, {COLUMNS[cell % CELLS]} column"


LESSONS: tuple[Callable[[Canvas, bool], tuple[list[Turn], Seen]], ...] = (places, counts, written, bars)


def drawn(part: str, index: int, easy: bool = False) -> tuple[Image, list[Turn], Seen]:
    """Picture number `index` of a part, RGB of SIDE x SIDE; what is asked about it, a description last; what is where.

    easy: one shape, one sort, two digits, two bars, so that nothing has to be looked up before it is read.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    rng = seeded(f"tiny {part} {index}")
    span = (15, 45) if rng.random() < 0.4 else (215, 240)
    image = images.new("RGB", (SIDE, SIDE), tuple(rng.randint(*span) for _ in range(3)))
    canvas = Canvas(rng, part, image, ImageDraw.Draw(image), PALETTE["black"], COLORS)
    turns, seen = LESSONS[index % len(LESSONS)](canvas, easy)
    return noisy(image, rng.choice((0, 5, 10)), rng), turns, seen


def lessons(part: str = "calibration") -> Iterator[Conversation]:
    """Each picture with its description or with all that is asked about it, without end; the first are easy."""
    for index in itertools.count():
        rng = seeded(f"lesson {part} {index}")
        image, turns, _ = drawn(part, index, rng.random() * EASY > index)
        asked = turns[-1:] if rng.random() < DESCRIBED else turns[:-1]
        yield _conversation(image, asked, f"lesson:{part}[{index}]")


def named_cells() -> Iterator[tuple[Image, list[list[str]]]]:
    """Pictures and the words of each of their cells, without end: row, column, and color and shape or digit, if any."""
    for index in itertools.count():
        image, _, seen = drawn("calibration", index)
        if seen:
            cells = range(CELLS * CELLS)
            yield image, [[ROWS[c // CELLS], COLUMNS[c % CELLS], *seen.get(c, ())] for c in cells]


def questions(part: str = "evaluation") -> Iterator[Conversation]:
    """Each question by itself, with its picture, without end; `where` is its kind."""
    for index in itertools.count():
        image, turns, _ = drawn(part, index)
        for turn in turns:
            yield _conversation(image, [turn], turn[0])


def _conversation(image: Image, turns: Iterable[Turn], where: str) -> Conversation:
    messages: list[dict[str, Any]] = []
    for _, question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image"})
    return Conversation(tuple(messages), (image,), where)
