"""Pictures of colored shapes: how many, which, where, how large, and a simple scene."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from autoround_mllm.canvas import (
    Box,
    Canvas,
    Color,
    Drawing,
    counted,
    jittered,
    listed,
    number,
    plural,
    sentence,
    with_article,
)

_GAP = 4  # pixels between two shapes; less and they might be counted as one
PLACES = (
    ("top left", "top center", "top right"),
    ("middle left", "center", "middle right"),
    ("bottom left", "bottom center", "bottom right"),
)


@final
@dataclass(frozen=True, slots=True)
class _Placed:
    """A shape of a 3 x 3 arrangement; large: half as large again as the others."""

    color: str
    kind: str
    row: int
    column: int
    large: bool

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]


def _around(box: Box, radii: list[float], turn: float) -> list[tuple[float, float]]:
    """Corners at equal angles around the middle of a box, at these parts of its half side; the first points up."""
    x, y, half = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2
    angles = [turn + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(x + half * r * math.sin(a), y - half * r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _heart(box: Box) -> list[tuple[float, float]]:
    x, y, half = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2
    angles = [2 * math.pi * i / 48 for i in range(48)]
    across = [16 * math.sin(a) ** 3 for a in angles]
    up = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(x + half * u / 17, y - half * (v + 2.5) / 17) for u, v in zip(across, up, strict=True)]


def _cross(box: Box) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    a, b = (right - left) / 3, (bottom - top) / 3
    xs, ys = (left, left + a, right - a, right - 1), (top, top + b, bottom - b, bottom - 1)
    corners = ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1))
    return [(xs[i], ys[j]) for i, j in corners]


KINDS = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "hexagon", "heart")


def draw_shape(canvas: Canvas, kind: str, box: Box, color: Color, turn: float = 0.0) -> None:
    """Draw one shape of KINDS into a square box; turn: radians, for those that stay what they are when turned."""
    pen, inner = canvas.pen, (box[0], box[1], box[2] - 1, box[3] - 1)
    if kind == "circle":
        pen.ellipse(inner, fill=color)
    elif kind == "ring":
        pen.ellipse(inner, outline=color, width=max(3, (box[2] - box[0]) // 5))
    elif kind == "square":
        pen.rectangle(inner, fill=color)
    elif kind == "cross":
        pen.polygon(_cross(box), fill=color)
    elif kind == "heart":
        pen.polygon(_heart(box), fill=color)
    else:
        radii = {"triangle": [0.98] * 3, "diamond": [0.98, 0.7] * 2, "hexagon": [0.98] * 6, "star": [0.98, 0.42] * 5}
        pen.polygon(_around(box, radii[kind], 0.0 if kind == "diamond" else turn), fill=color)


def counting(canvas: Canvas) -> Drawing:
    """Up to nine shapes of up to three sorts, scattered; no two touch."""
    rng = canvas.rng
    sorts = _sorts(canvas, rng.randint(1, 3))
    wanted = [sort for sort in sorts for _ in range(rng.randint(1, 5 if len(sorts) < 3 else 3))]
    counts = dict.fromkeys(sorts, 0)
    boxes: list[Box] = []
    for color, kind in wanted:
        if box := _free_box(canvas, boxes):
            boxes.append(box)
            counts[color, kind] += 1
            draw_shape(canvas, kind, box, jittered(color, rng), rng.uniform(-0.3, 0.3))
    seen = {sort: count for sort, count in counts.items() if count}
    groups = [counted(count, f"{color} {kind}") for (color, kind), count in seen.items()]
    verb = "is" if next(iter(seen.values())) == 1 else "are"
    caption = rng.choice((f"There {verb} {listed(groups)}.", f"The image shows {listed(groups)}."))
    return canvas.finished(caption, _questions_of_counts(canvas, seen))


def _sorts(canvas: Canvas, count: int) -> list[tuple[str, str]]:
    """Different (color, kind); different colors, so that each sort is known by its color."""
    colors = canvas.rng.sample(canvas.colors, count)
    return [(color, canvas.rng.choice(KINDS)) for color in colors]


def _free_box(canvas: Canvas, taken: list[Box]) -> Box | None:
    """A square that keeps its distance from those taken; None where a hundred tries found no place."""
    rng, short = canvas.rng, min(canvas.width, canvas.height)
    for _ in range(100):
        side = rng.randint(short // 9, short // 4)
        x, y = rng.randint(2, canvas.width - side - 2), rng.randint(2, canvas.height - side - 2)
        box = (x, y, x + side, y + side)
        if all(
            box[0] >= b[2] + _GAP or b[0] >= box[2] + _GAP or box[1] >= b[3] + _GAP or b[1] >= box[3] + _GAP
            for b in taken
        ):
            return box
    return None


def _questions_of_counts(canvas: Canvas, seen: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    rng, total = canvas.rng, sum(seen.values())
    questions = []
    for (color, kind), count in seen.items():
        noun = f"{color} {kind}"
        verb = "is" if count == 1 else "are"
        asked = rng.choice(("How many {} are there?", "How many {} can you see?", "Count the {}."))
        questions.append((asked.format(plural(noun, 2)), f"There {verb} {counted(count, noun)}."))
    verb = "is" if total == 1 else "are"
    shapes = f"{number(total)} {plural('shape', total)}"
    questions.append(("How many shapes are there altogether?", f"There {verb} {shapes} altogether."))
    absent = rng.choice([color for color in canvas.colors if color not in {color for color, _ in seen}])
    questions.append((f"Is there anything {absent} in the image?", f"No, nothing in the image is {absent}."))
    (color, kind), count = rng.choice(list(seen.items()))
    things = plural(kind, count)
    others = [other for other, known in seen if known == kind]
    if len(others) == 1:
        verb = "is" if count == 1 else "are"
        questions.append((f"What color {verb} the {things}?", f"The {things} {verb} {color}."))
    if len(seen) > 1:
        ordered = sorted(seen.items(), key=lambda item: item[1])
        (most, _), first = ordered[-1]
        if first > ordered[-2][1]:
            questions.append(("Which color occurs most often?", f"The most frequent color is {most}."))
    return questions


def arrangement(canvas: Canvas) -> Drawing:
    """Three to five different shapes in a 3 x 3 arrangement, one of them larger."""
    rng, count = canvas.rng, canvas.rng.randint(3, 5)
    cells = rng.sample([(row, column) for row in range(3) for column in range(3)], count)
    colors, kinds = rng.sample(canvas.colors, count), rng.sample(KINDS, count)
    placed = [_Placed(c, k, *cell, i == 0) for i, (c, k, cell) in enumerate(zip(colors, kinds, cells, strict=True))]
    wide, high = canvas.width // 3, canvas.height // 3
    side = round(min(wide, high) * rng.uniform(0.42, 0.58))
    for shape in placed:
        mine = round(side * 1.5) if shape.large else side
        left = shape.column * wide + rng.randint(3, max(3, wide - mine - 3))
        top = shape.row * high + rng.randint(3, max(3, high - mine - 3))
        box = (left, top, left + mine, top + mine)
        draw_shape(canvas, shape.kind, box, jittered(shape.color, rng), rng.uniform(-0.3, 0.3))
    told = sorted(placed, key=lambda shape: (shape.row, shape.column))
    caption = sentence(listed([f"{with_article(s.name)} in the {s.place}" for s in told]))
    caption += f" The {placed[0].name} is the largest."
    return canvas.finished(caption, _questions_of_places(canvas, placed))


def _questions_of_places(canvas: Canvas, placed: list[_Placed]) -> list[tuple[str, str]]:
    rng = canvas.rng
    one, other = rng.sample(placed, 2)
    questions = [
        (f"Where is the {one.name}?", f"The {one.name} is in the {one.place}."),
        (f"What is in the {other.place} of the image?", f"There is {with_article(other.name)} in the {other.place}."),
        (f"What color is the {one.kind}?", f"The {one.kind} is {one.color}."),
        (f"Which shape is {other.color}?", f"The {other.kind} is {other.color}."),
        ("Which shape is the largest?", f"The {placed[0].name} is the largest shape."),
        ("How many different shapes are shown?", f"{number(len(placed)).capitalize()} different shapes are shown."),
    ]
    for word, a, b in (("to the left of", one.column, other.column), ("above", one.row, other.row)):
        if a != b:
            yes, claim = a < b, f"{word} the {other.name}"
            answer = f"Yes, the {one.name} is {claim}." if yes else f"No, the {one.name} is not {claim}."
            questions.append((f"Is the {one.name} {claim}?", answer))
    return questions
