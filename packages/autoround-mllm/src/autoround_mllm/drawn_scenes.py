"""A simple outdoor scene: sky and ground, sun or moon, a house, trees, clouds."""

from __future__ import annotations

from autoround_mllm.canvas import PALETTE, Canvas, Color, Drawing, counted, jittered, listed, sentence, with_article

_ROOFS = ("red", "brown", "orange", "purple", "black")
_WALLS = ("white", "yellow", "pink")
_DOORS = ("blue", "red", "purple", "black")


def scene(canvas: Canvas) -> Drawing:
    """A house with a roof, a door and windows between trees, by day or by night."""
    rng, pen, wide, high = canvas.rng, canvas.pen, canvas.width, canvas.height
    night, horizon = rng.random() < 0.35, round(high * rng.uniform(0.6, 0.72))
    sky, ground = ((20, 24, 60), (38, 48, 30)) if night else ((150, 205, 245), (120, 190, 90))
    pen.rectangle((0, 0, wide, horizon), fill=sky)
    pen.rectangle((0, horizon, wide, high), fill=ground)
    side = rng.choice(("left", "right"))
    _light_in_the_sky(canvas, night, side)
    clouds = 0 if night else rng.randint(0, 3)
    for i in range(clouds):
        _cloud(canvas, round(wide * (0.26 + 0.24 * i)), round(high * rng.uniform(0.08, 0.14)))
    roof, wall, door = rng.choice(_ROOFS), rng.choice(_WALLS), rng.choice(_DOORS)
    windows = rng.randint(1, 3)
    _house(canvas, horizon, roof, wall, door, windows)
    trees = rng.randint(1, 4)
    for i in range(trees):  # two on each side of the house at most
        _tree(canvas, round(wide * (0.08, 0.92, 0.21, 0.79)[i]), horizon, night)
    things = [f"{with_article(wall)} house with {with_article(roof)} roof", counted(trees, "tree")]
    things += [counted(clouds, "cloud")] if clouds else []
    light = "moon" if night else "sun"
    caption = sentence(listed(things)) + f" The {light} is in the top {side}. It is {'night' if night else 'day'}."
    return canvas.finished(caption, _questions(trees, clouds, windows, roof, door, night, side))


def _questions(
    trees: int, clouds: int, windows: int, roof: str, door: str, night: bool, side: str
) -> list[tuple[str, str]]:
    light = "moon" if night else "sun"
    return [
        ("How many trees are there?", f"There {'is' if trees == 1 else 'are'} {counted(trees, 'tree')}."),
        ("How many windows does the house have?", f"The house has {counted(windows, 'window')}."),
        ("How many clouds are in the sky?", f"There {'is' if clouds == 1 else 'are'} {counted(clouds, 'cloud')}."),
        ("What color is the roof?", f"The roof is {roof}."),
        ("What color is the door?", f"The door is {door}."),
        ("Is it day or night?", "It is night." if night else "It is day."),
        (f"Where is the {light}?", f"The {light} is in the top {side} of the image."),
    ]


def _light_in_the_sky(canvas: Canvas, night: bool, side: str) -> None:
    radius = round(min(canvas.width, canvas.height) * 0.07)
    x, y = radius + 6 if side == "left" else canvas.width - radius - 6, radius + 6
    color = (235, 235, 215) if night else PALETTE["yellow"]
    canvas.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _cloud(canvas: Canvas, x: int, y: int) -> None:
    r = round(min(canvas.width, canvas.height) * 0.04)
    for dx, dy, size in ((-r, 0, r), (0, -r // 2, round(1.2 * r)), (r, 0, r)):
        canvas.pen.ellipse((x + dx - size, y + dy - size, x + dx + size, y + dy + size), fill=(250, 250, 250))


def _house(canvas: Canvas, horizon: int, roof: str, wall: str, door: str, windows: int) -> None:
    pen, wide, high = canvas.pen, canvas.width, canvas.height
    left, right = round(wide * 0.32), round(wide * 0.68)
    top, bottom = horizon - round(high * 0.14), horizon + round(high * 0.16)
    pen.rectangle((left, top, right, bottom), fill=jittered(wall, canvas.rng))
    peak = top - round(high * 0.16)
    pen.polygon([(left - 8, top), (right + 8, top), ((left + right) // 2, peak)], fill=jittered(roof, canvas.rng))
    size = (right - left) // 8
    middle = (left + right) // 2
    pen.rectangle((middle - size // 2, bottom - 2 * size, middle + size // 2, bottom), fill=jittered(door, canvas.rng))
    for i in range(windows):
        x = left + (right - left) * (i + 1) // (windows + 1)
        pane: Color = (170, 215, 235)
        pen.rectangle((x - size // 2, top + size // 2, x + size // 2, top + size // 2 + size), pane, (60, 60, 60), 2)


def _tree(canvas: Canvas, x: int, horizon: int, night: bool) -> None:
    rng, pen = canvas.rng, canvas.pen
    r = round(canvas.width * 0.055)
    foot = horizon + rng.randint(4, max(5, canvas.height // 8))
    pen.rectangle((x - r // 4, foot - 2 * r, x + r // 4, foot), fill=PALETTE["brown"])
    leaves: Color = (10, 95, 45) if night else (25, 110, 45)
    if rng.random() < 0.5:
        pen.ellipse((x - r, foot - 4 * r, x + r, foot - 2 * r + r // 2), fill=leaves)
    else:
        pen.polygon([(x - r, foot - r), (x + r, foot - r), (x, foot - 4 * r)], fill=leaves)
