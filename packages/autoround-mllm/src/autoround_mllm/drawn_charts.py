"""Charts and tables whose values are written beside them: bars, lines, slices, rows."""

from __future__ import annotations

from collections.abc import Sequence

from autoround_mllm.canvas import Box, Canvas, Drawing, fitting_font, font, jittered, listed, number

_NAMES = (
    ("January", "February", "March", "April", "May", "June", "July"),
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    ("Apples", "Pears", "Plums", "Cherries", "Figs", "Grapes", "Lemons"),
    ("North", "South", "East", "West", "Center"),
    ("Berlin", "Paris", "Tokyo", "Lima", "Cairo", "Oslo", "Delhi"),
    ("Team A", "Team B", "Team C", "Team D", "Team E"),
    ("2019", "2020", "2021", "2022", "2023", "2024"),
)
_TITLES = ("Sales", "Visitors", "Orders", "Rainfall in mm", "Books lent", "Output in tons", "Calls answered")
_SHARES = ("Share of costs", "Survey results", "Use of time", "Sources of energy", "Market share")
_COLUMNS = ("Price", "Stock", "Weight", "Orders", "Score", "Year", "Age")


def bar_chart(canvas: Canvas) -> Drawing:
    """Upright bars from a common line; every bar has its value above and its name below."""
    rng, pen = canvas.rng, canvas.pen
    names, values = _series(canvas, rng.randint(3, 6))
    title = rng.choice(_TITLES)
    left, top, right, bottom = _frame(canvas, title)
    step, base = (right - left) / len(values), bottom - 1
    per_unit = (bottom - top - _small(canvas) - 6) / max(values)
    one_color = rng.random() < 0.5
    colors = rng.sample(canvas.colors, len(values))
    label = fitting_font(names, step - 4, _small(canvas) + 2, 8)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        x, high = left + (i + 0.5) * step, max(1, round(value * per_unit))
        color = jittered(colors[0 if one_color else i], rng)
        pen.rectangle((round(x - 0.3 * step), base - high + 1, round(x + 0.3 * step), base), fill=color)
        pen.text((x, base - high - 3), str(value), canvas.ink, font(_small(canvas)), anchor="ms")
        pen.text((x, bottom + 6), name, canvas.ink, label, anchor="mt")
    pen.line((left, bottom, right, bottom), canvas.ink)
    caption = f'A bar chart titled "{title}". {_told(names, values)}'
    questions = [("How many bars does the chart have?", f"The chart has {number(len(values))} bars.")]
    if not one_color:
        i = rng.randrange(len(values))
        questions.append((f"What color is the bar of {names[i]}?", f"The bar of {names[i]} is {colors[i]}."))
    return canvas.finished(caption, questions + _about(canvas, title, names, values))


def line_chart(canvas: Canvas) -> Drawing:
    """Points joined by a line, each with its value."""
    rng, pen = canvas.rng, canvas.pen
    names, values = _series(canvas, rng.randint(4, 6))
    title = rng.choice(_TITLES)
    left, top, right, bottom = _frame(canvas, title)
    step, per_unit = (right - left) / len(values), (bottom - top - 3 * _small(canvas)) / max(values)
    floor = bottom - _small(canvas) - 8  # room for a number below the lowest point
    points = [(left + (i + 0.5) * step, floor - value * per_unit) for i, value in enumerate(values)]
    color = rng.choice(canvas.colors)
    pen.line((left, top, left, bottom, right, bottom), canvas.ink)
    pen.line(points, jittered(color, rng), width=rng.randint(2, 4))
    label = fitting_font(names, step - 4, _small(canvas) + 2, 8)
    for i, ((x, y), name, value) in enumerate(zip(points, names, values, strict=True)):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=jittered(color, rng))
        valley = value == min(values[max(0, i - 1) : i + 2])
        at, anchor = (y + 8, "mt") if valley else (y - 8, "ms")  # away from the line
        pen.text((x, at), str(value), canvas.ink, font(_small(canvas)), anchor=anchor)
        pen.text((x, bottom + 6), name, canvas.ink, label, anchor="mt")
    caption = f'A line chart titled "{title}" with one {color} line. {_told(names, values)}'
    i = rng.randrange(len(values) - 1)
    way = "rises" if values[i + 1] > values[i] else "falls"
    questions = [
        ("What color is the line?", f"The line is {color}."),
        (
            f"Does the line rise or fall from {names[i]} to {names[i + 1]}?",
            f"It {way}, from {values[i]} to {values[i + 1]}.",
        ),
    ]
    return canvas.finished(caption, questions + _about(canvas, title, names, values))


def pie_chart(canvas: Canvas) -> Drawing:
    """Slices clockwise from the top, with a list of their colors, names and percentages."""
    rng, pen = canvas.rng, canvas.pen
    names = _some_names(canvas, rng.randint(3, 5))
    shares = _shares(canvas, len(names))
    title, colors = rng.choice(_SHARES), rng.sample(canvas.colors, len(names))
    _title(canvas, title)
    side = min(canvas.width // 2 - 12, canvas.height - 50)
    box, start = (8, 40, 8 + side, 40 + side), -90.0
    rows = canvas.width // 2 + 4
    told = [f"{name} {share}%" for name, share in zip(names, shares, strict=True)]
    label = fitting_font(told, rows - 32, 24, 9)
    for i, (text, share, color) in enumerate(zip(told, shares, colors, strict=True)):
        shade = jittered(color, rng)
        pen.pieslice(box, start, start + 3.6 * share, fill=shade)
        start += 3.6 * share
        y = 52 + i * min(40, (canvas.height - 60) // len(names))
        pen.rectangle((rows, y - 6, rows + 12, y + 6), fill=shade)
        pen.text((rows + 18, y), text, canvas.ink, label, anchor="lm")
    caption = f'A pie chart titled "{title}" with {number(len(names))} slices: {listed(told)}.'
    i, most = rng.randrange(len(names)), max(range(len(names)), key=shares.__getitem__)
    questions = [
        (f"What percentage does {names[i]} have?", f"{names[i]} has {shares[i]}%."),
        ("Which slice is the largest?", f"The largest slice is {names[most]} with {shares[most]}%."),
        (f"Which color stands for {names[i]}?", f"{names[i]} is shown in {colors[i]}."),
        (f"What does the {colors[i]} slice stand for?", f"The {colors[i]} slice stands for {names[i]}."),
        ("How many slices are there?", f"There are {number(len(names))} slices."),
    ]
    return canvas.finished(caption, questions)


def table(canvas: Canvas) -> Drawing:
    """Rows with a name and two or three numbers, ruled or striped, under a line of headings."""
    rng, pen = canvas.rng, canvas.pen
    names = _some_names(canvas, rng.randint(3, 5))
    heads = rng.sample(_COLUMNS, 2 if canvas.width < 300 else rng.randint(2, 3))
    columns = [rng.sample(range(2, 1000), len(names)) for _ in heads]
    wide, high = (canvas.width - 12) / (len(heads) + 1.4), min(56, (canvas.height - 12) // (len(names) + 1))
    letters = fitting_font([*names, *heads, "000"], wide - 10, min(26, high - 8), 9)
    edges = [6, *(round(6 + wide * (1.4 + i)) for i in range(len(heads) + 1))]
    tint = jittered(rng.choice(canvas.colors), rng)
    for row, cells in enumerate((("", *heads), *zip(names, *(map(str, c) for c in columns), strict=True))):
        y = 6 + row * high
        if row == 0:
            pen.line((6, y + high, edges[-1], y + high), tint, width=3)
        elif rng.random() < 0.7:
            pen.line((6, y + high, edges[-1], y + high), canvas.ink)
        for column, cell in enumerate(cells):
            place, anchor = (edges[0] + 4, "lm") if column == 0 else (edges[column + 1] - 4, "rm")
            pen.text((place, y + high / 2), cell, canvas.ink, letters, anchor=anchor)
    rows = [
        f"{n}: " + ", ".join(f"{h} {v}" for h, v in zip(heads, vs, strict=True))
        for n, *vs in zip(names, *columns, strict=True)
    ]
    caption = f"A table with the columns {listed(heads)}. {'; '.join(rows)}."
    i, j = rng.randrange(len(names)), rng.randrange(len(heads))
    most, least = (pick(range(len(names)), key=columns[j].__getitem__) for pick in (max, min))
    questions = [
        (f"What is the {heads[j]} of {names[i]}?", f"The {heads[j]} of {names[i]} is {columns[j][i]}."),
        (f"Which row has the highest {heads[j]}?", f"{names[most]} has the highest {heads[j]}, {columns[j][most]}."),
        (f"Which row has the lowest {heads[j]}?", f"{names[least]} has the lowest {heads[j]}, {columns[j][least]}."),
        ("How many rows are below the headings?", f"There are {number(len(names))} rows below the headings."),
    ]
    return canvas.finished(caption, questions)


def _some_names(canvas: Canvas, count: int) -> list[str]:
    """Names of one group, in their usual order."""
    group = canvas.rng.choice([group for group in _NAMES if len(group) >= count])
    return [group[i] for i in sorted(canvas.rng.sample(range(len(group)), count))]


def _series(canvas: Canvas, count: int) -> tuple[list[str], list[int]]:
    """Names, and a different value for each."""
    return _some_names(canvas, count), canvas.rng.sample(range(3, canvas.rng.choice((31, 100, 100, 500))), count)


def _shares(canvas: Canvas, count: int) -> list[int]:
    """Different percentages of at least five that add up to a hundred, the largest alone."""
    while True:
        cuts = sorted(canvas.rng.sample(range(1, 100), count - 1))
        shares = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
        if min(shares) >= 5 and len(set(shares)) == count:
            return shares


def _small(canvas: Canvas) -> int:
    """The size of letters beside bars and points."""
    return max(12, min(canvas.width, canvas.height) // 24)


def _title(canvas: Canvas, title: str) -> None:
    letters = fitting_font([title], canvas.width - 16, 24)
    canvas.pen.text((canvas.width / 2, 8), title, canvas.ink, letters, anchor="mt")


def _frame(canvas: Canvas, title: str) -> Box:
    """Write the title; where the chart goes, with room for names below."""
    _title(canvas, title)
    return 12, 40, canvas.width - 12, canvas.height - 14 - _small(canvas)


def _told(names: Sequence[str], values: Sequence[int]) -> str:
    pairs = listed([f"{name} {value}" for name, value in zip(names, values, strict=True)])
    return f"The values are {pairs}."


def _about(canvas: Canvas, title: str, names: list[str], values: list[int]) -> list[tuple[str, str]]:
    """Questions about a series of different values."""
    rng, order = canvas.rng, sorted(range(len(values)), key=values.__getitem__)
    i, j = rng.sample(range(len(values)), 2)
    high, low = (i, j) if values[i] > values[j] else (j, i)
    return [
        (f"What is the value for {names[i]}?", f"The value for {names[i]} is {values[i]}."),
        ("Which value is the highest?", f"{names[order[-1]]} has the highest value, {values[order[-1]]}."),
        ("Which value is the lowest?", f"{names[order[0]]} has the lowest value, {values[order[0]]}."),
        ("What is the title of the chart?", f'The title is "{title}".'),
        (
            f"By how much does {names[high]} exceed {names[low]}?",
            f"{names[high]} exceeds {names[low]} by {values[high] - values[low]}.",
        ),
    ]
