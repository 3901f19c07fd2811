"""Pictures of text: signs, numbers, paragraphs, a clock."""

from __future__ import annotations

import functools
import itertools
import math
import re

from autoround_core.corpus import stdlib_documents
from autoround_core.errors import CalibrationError
from autoround_mllm.canvas import Canvas, Color, Drawing, fitting_font, font, jittered, number, sentence, with_article

_MODULES = 40  # documents to take sentences from: some hundreds, read in less than a second
_MOST = 6  # sentences of a page
_SENTENCE = re.compile(r"(?<![^\s])[A-Z][a-z]+(?:,? [A-Za-z]+(?:[-'][a-z]+)?){3,13}\.(?=\s|$)")
_WORDS = (
    "OPEN CLOSED EXIT ENTRANCE STOP SALE BAKERY LIBRARY HOTEL MUSEUM POLICE TAXI MARKET STATION PARKING "
    "COFFEE WELCOME DANGER PULL PUSH TICKETS PHARMACY SCHOOL GARDEN AIRPORT HARBOR THEATER REPAIRS "
    "FLOWERS BICYCLES"
)
SIGNS = tuple(_WORDS.split(" "))


def sign(canvas: Canvas) -> Drawing:
    """One word on a colored board."""
    word, color = canvas.rng.choice(SIGNS), canvas.rng.choice(canvas.colors)
    letters = _board(canvas, word, color)
    caption = sentence(f'{with_article(color)} sign with the word "{word}" in {letters} letters')
    questions = [
        ("What does the sign say?", f'The sign says "{word}".'),
        ("What color is the sign?", f"The sign is {color}."),
        ("What color are the letters?", f"The letters are {letters}."),
        ("How many letters does the word have?", f'The word "{word}" has {number(len(word))} letters.'),
        ("Spell the word on the sign.", "-".join(word) + "."),
    ]
    return canvas.finished(caption, questions)


def plate(canvas: Canvas) -> Drawing:
    """A number, a price or a license plate on a board."""
    rng = canvas.rng
    kind, text = rng.choice(
        (
            ("number", str(rng.randint(10, 99999))),
            ("price", f"${rng.randint(1, 999)}.{rng.randint(0, 99):02}"),
            ("code", "".join(rng.choices("ABCDEFGHKLMNPRSTUVWXYZ", k=3)) + f"-{rng.randint(100, 9999)}"),
            ("date", f"{rng.randint(1950, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"),
        )
    )
    color = rng.choice(canvas.colors)
    letters = _board(canvas, text, color)
    digits = sum(map(str.isdigit, text))
    caption = f"The {kind} {text} in {letters} on {with_article(color)} board."
    questions = [
        (f"What is the {kind}?", f"The {kind} is {text}."),
        ("Read the text in the image.", f"{text}"),
        ("What color is the board?", f"The board is {color}."),
        ("How many digits are written on it?", f"There are {number(digits)} digits."),
    ]
    return canvas.finished(caption, questions)


def page(canvas: Canvas) -> Drawing:
    """A paragraph of up to six sentences, broken into lines."""
    rng = canvas.rng
    pool = sentences(canvas.part)
    short = min(canvas.width, canvas.height)
    letters = font(rng.randint(14, max(18, short // 16)))
    wide, step = canvas.width - 24, letters.size + 6
    most = int((canvas.height - 24) // step)
    chosen: list[str] = []
    lines: list[str] = []
    for text in rng.sample(pool, rng.randint(2, _MOST)):
        longer = _broken(" ".join([*chosen, text]), wide, letters)
        if chosen and len(longer) > most:
            break
        chosen.append(text)
        lines = longer
    for i, line in enumerate(lines):
        canvas.pen.text((12, 12 + i * step), line, canvas.ink, letters)
    text = " ".join(chosen)
    questions = [
        ("What is the first word?", f'The first word is "{text.split()[0]}".'),
        ("What is the last word?", f'The last word is "{text.rstrip(".").split()[-1]}".'),
        ("Read the text aloud.", text),
        ("How many lines of text are there?", f"There {_lines(len(lines))} of text."),
    ]
    return canvas.finished(f"A page of text that reads: {text}", questions)


def clock(canvas: Canvas) -> Drawing:
    """A round clock with twelve numbers; the longer hand is on a multiple of five minutes."""
    rng, pen = canvas.rng, canvas.pen
    hour, minute = rng.randint(1, 12), rng.randrange(0, 60, 5)
    radius = round(min(canvas.width, canvas.height) * rng.uniform(0.36, 0.46))
    x, y = canvas.width // 2, canvas.height // 2
    color = rng.choice(canvas.colors)
    face, marks = ((250, 250, 250), (25, 25, 25)) if rng.random() < 0.6 else ((25, 25, 30), (240, 240, 240))
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), face, jittered(color, rng), max(4, radius // 12))
    for i in range(1, 13):
        pen.text(_hand(x, y, i / 12, radius * 0.78), str(i), marks, font(max(11, radius // 6)), anchor="mm")
    for turn, length, width in (((hour + minute / 60) / 12, 0.42, 7), (minute / 60, 0.64, 3)):
        pen.line((x, y, *_hand(x, y, turn, radius * length)), marks, width=width)
    time = f"{hour}:{minute:02}"
    light = "white" if face[0] > 128 else "black"
    questions = [
        ("What time does the clock show?", f"The clock shows {time}."),
        ("What color is the frame of the clock?", f"The frame is {color}."),
        ("Is the face of the clock white or black?", f"The face is {light}."),
        ("Which number does the longer hand point to?", f"The longer hand points to {minute // 5 or 12}."),
    ]
    caption = f"A clock with a {light} face and {with_article(color)} frame. It shows {time}."
    return canvas.finished(caption, questions)


@functools.cache
def sentences(part: str) -> tuple[str, ...]:
    """Short plain sentences from the documentation strings of one part of the standard library; no two the same.

    Raises CalibrationError where the running Python has no sources to find them in.
    """
    documents = itertools.islice(stdlib_documents(part), _MODULES)
    found = (" ".join(match.split()) for text in documents for match in _SENTENCE.findall(text))
    different = tuple(dict.fromkeys(found))
    if len(different) < _MOST:
        raise CalibrationError(
            f"the data set `synthetic` draws sentences from the sources of Python's library, and found "
            f"{len(different)} of {_MOST} for `{part}`; use a Python that comes with its sources, or another data set"
        )
    return different


def _board(canvas: Canvas, text: str, color: str) -> str:
    """Write the text on a board of this color, both in the middle; the color of its letters."""
    wide = canvas.width - 40
    size = canvas.rng.randint(24, 80)
    letters = fitting_font([text], wide - 16, size, 12)
    left, top, right, bottom = letters.getbbox(text, anchor="mm")
    x, y = canvas.width / 2, canvas.height / 2 + canvas.rng.randint(-30, 30)
    shade = jittered(color, canvas.rng)
    canvas.pen.rounded_rectangle((x + left - 12, y + top - 12, x + right + 12, y + bottom + 12), 8, fill=shade)
    name, written = ("black", (15, 15, 15)) if _bright(shade) else ("white", (250, 250, 250))
    canvas.pen.text((x, y), text, written, letters, anchor="mm")
    return name


def _bright(color: Color) -> bool:
    return 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] > 130


def _broken(text: str, width: float, letters) -> list[str]:
    """The words in lines that are no wider than `width`."""
    lines: list[str] = []
    for word in text.split():
        if lines and letters.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _lines(count: int) -> str:
    return "is one line" if count == 1 else f"are {number(count)} lines"


def _hand(x: float, y: float, turn: float, length: float) -> tuple[float, float]:
    return x + length * math.sin(2 * math.pi * turn), y - length * math.cos(2 * math.pi * turn)
