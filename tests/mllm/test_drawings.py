"""Is what the words say what the pixels show? Shapes, bars, slices and hands are measured in the image again."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from autoround_core.corpus import stdlib_documents
from autoround_core.errors import CalibrationError, UnknownNameError
from autoround_mllm import drawn_text
from autoround_mllm.canvas import PALETTE, Drawing, listed, new_canvas, noisy, plural
from autoround_mllm.drawings import KINDS, conversation, drawings, seeded
from autoround_mllm.drawn_text import SIGNS, sentences

NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
NUMBERS |= {"ten": 10, "eleven": 11, "twelve": 12}
PLACED = re.compile(r"[Aa]n? (\w+) (\w+) in the ([\w ]+?)(?=,| and|\.)")


def made(kind: str, count: int, shade: str | None = None) -> Iterator[Drawing]:
    for index in range(count):
        yield KINDS[kind](new_canvas(seeded(f"test {kind} {index}"), "calibration", shade))


def pixels(drawing: Drawing) -> numpy.ndarray:
    return numpy.asarray(drawing.image).astype(int)


def near(image: numpy.ndarray, color: tuple[int, int, int], distance: float = 40) -> numpy.ndarray:
    """Where an image [height, width, 3] has a color, give or take shade and noise."""
    return ((image - numpy.array(color)) ** 2).sum(2) < distance**2


def standing_out(image: numpy.ndarray) -> dict[str, tuple[int, int, int]]:
    """The colors of the palette that a drawing on this ground may use: the ground itself is nearly black or white."""
    dark = numpy.median(image[:, 0]) < 128
    return {name: rgb for name, rgb in PALETTE.items() if name not in (("black", "brown") if dark else ("white",))}


def components(mask: numpy.ndarray) -> list[int]:
    """The sizes of the connected parts of a mask, joined through runs of each row."""
    parent: list[int] = []
    size: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    before: list[tuple[int, int, int]] = []
    for row in mask:
        edges = numpy.flatnonzero(numpy.diff(numpy.concatenate([[0], row.astype(int), [0]])))
        runs = []
        for start, end in edges.reshape(-1, 2).tolist():
            label = len(parent)
            parent.append(label)
            size.append(end - start)
            for other_start, other_end, other in before:
                a, b = root(other), root(label)
                if other_start <= end and start <= other_end and a != b:  # diagonal neighbours too
                    parent[b] = a
                    size[a] += size[b]
            runs.append((start, end, label))
        before = runs
    return [size[i] for i in range(len(parent)) if parent[i] == i]


def test_counting_the_shapes_in_the_pixels_gives_the_numbers_of_the_caption() -> None:
    checked = 0
    for drawing in made("counting", 20):
        image = pixels(drawing)
        said = {color: NUMBERS[n] for n, color in re.findall(r"(\w+) (\w+) \w+(?=,| and|\.)", drawing.caption)}
        seen = {name: sum(s > 30 for s in components(near(image, rgb))) for name, rgb in standing_out(image).items()}
        assert {name: count for name, count in seen.items() if count} == said, drawing.caption
        total = next(answer for asked, answer in drawing.questions if "altogether" in asked)
        assert NUMBERS[total.split()[2]] == sum(said.values())
        checked += len(said)
    assert checked > 30


def test_shapes_are_where_the_caption_says_and_the_largest_is() -> None:
    for drawing in made("arrangement", 25):
        image = pixels(drawing)
        high, wide = image.shape[:2]
        areas = {}
        for color, kind, place in PLACED.findall(drawing.caption):
            ys, xs = numpy.nonzero(near(image, PALETTE[color]))
            row, column = int(ys.mean() * 3 / high), int(xs.mean() * 3 / wide)
            names = ("top", "middle", "bottom")[row] + " " + ("left", "center", "right")[column]
            assert place == ("center" if names == "middle center" else names), drawing.caption
            areas[f"{color} {kind}"] = (xs.max() - xs.min() + 1) * (ys.max() - ys.min() + 1)
        assert 3 <= len(areas) <= 5
        largest = re.search(r"The (\w+ \w+) is the largest", drawing.caption)
        assert largest and max(areas, key=areas.__getitem__) == largest[1], (drawing.caption, areas)


def test_relations_agree_with_the_places_of_the_caption() -> None:
    answers = []
    for drawing in made("arrangement", 60):
        at = {f"{color} {kind}": place for color, kind, place in PLACED.findall(drawing.caption)}
        for asked, answer in drawing.questions:
            if found := re.fullmatch(r"Is the (\w+ \w+) (to the left of|above) the (\w+ \w+)\?", asked):
                axis = {"to the left of": ("left", "center", "right"), "above": ("top", "middle", "bottom")}[found[2]]
                ranks = []
                for name in (found[1], found[3]):
                    words = {"center": "middle center"}.get(at[name], at[name]).split()
                    ranks.append(axis.index(words[1 if "left" in found[2] else 0]))
                assert answer.startswith("Yes" if ranks[0] < ranks[1] else "No")
                answers.append(answer.split(",")[0])
    assert {"Yes", "No"} == set(answers)


def values_of(caption: str) -> dict[str, int]:
    told = caption.split("The values are ")[1].rstrip(".")
    return {name: int(value) for name, value in (part.rsplit(" ", 1) for part in re.split(r", | and ", told))}


def test_bars_are_as_high_as_their_values() -> None:
    for drawing in made("bar chart", 25):
        image, values = pixels(drawing), list(values_of(drawing.caption).values())
        colored = numpy.any([near(image, rgb) for rgb in standing_out(image).values()], axis=0)[40:]  # below the title
        step = (colored.shape[1] - 24) / len(values)
        heights = []
        for i in range(len(values)):
            cell = colored[:, round(12 + i * step) : round(12 + (i + 1) * step)]
            filled = cell.sum(1) / step  # a bar takes 0.6 of its cell, the line below it all, letters little
            heights.append(int(((filled > 0.5) & (filled < 0.75)).sum()))
        unit = max(heights) / max(values)
        assert unit * max(values) > 80
        for height, value in zip(heights, values, strict=True):
            assert abs(height - value * unit) <= 2, (heights, values)


def test_slices_cover_what_they_stand_for() -> None:
    for drawing in made("pie chart", 20):
        image = pixels(drawing)
        image = image[40:, : image.shape[1] // 2]  # neither title nor list
        shares = [int(share) for share in re.findall(r"(\d+)%", drawing.caption)]
        assert sum(shares) == 100
        masks = {name: near(image, rgb) for name, rgb in standing_out(image).items()}
        whole = numpy.any(list(masks.values()), axis=0)
        ys, xs = numpy.nonzero(whole)
        circle = numpy.pi / 4 * (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
        assert abs(whole.sum() / circle - 1) < 0.01  # no part is without a color
        parts = {name: 100 * mask.sum() / whole.sum() for name, mask in masks.items()}
        parts = {name: part for name, part in parts.items() if part > 2}
        assert numpy.abs(numpy.array(sorted(parts.values())) - sorted(shares)).max() < 1.5, (parts, shares)
        named = 0
        for _, answer in drawing.questions:
            found = re.fullmatch(r"The (?P<color>\w+) slice stands for (?P<name>.+)\.", answer)
            if found := found or re.fullmatch(r"(?P<name>.+) is shown in (?P<color>\w+)\.", answer):
                share = int(re.search(rf"{re.escape(found['name'])} (\d+)%", drawing.caption)[1])
                assert abs(parts[found["color"]] - share) < 1.5, answer
                named += 1
        assert named == 2


@pytest.mark.parametrize("kind", ["bar chart", "line chart"])
def test_answers_about_values_can_be_computed_from_the_caption(kind: str) -> None:
    for drawing in made(kind, 20):
        values, answers = values_of(drawing.caption), dict(drawing.questions)
        high, low = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        assert answers["Which value is the highest?"] == f"{high} has the highest value, {values[high]}."
        assert answers["Which value is the lowest?"] == f"{low} has the lowest value, {values[low]}."
        for asked, answer in drawing.questions:
            if found := re.fullmatch(r"By how much does (.+) exceed (.+)\?", asked):
                assert answer.endswith(f"by {values[found[1]] - values[found[2]]}.")
                assert values[found[1]] > values[found[2]]
            if found := re.fullmatch(r"Does the line rise or fall from (.+) to (.+)\?", asked):
                way = "rises" if values[found[2]] > values[found[1]] else "falls"
                assert answer == f"It {way}, from {values[found[1]]} to {values[found[2]]}."


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, str]]:
    """Every text that a pen writes from now on: x, y, letters."""
    texts: list[tuple[float, float, str]] = []
    original = ImageDraw.ImageDraw.text

    def text(self, at, letters, *args, **kwargs):
        box = self.textbbox(at, letters, font=args[1], anchor=kwargs.get("anchor"))
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= self.im.size[0] and box[3] <= self.im.size[1], letters
        texts.append((*at, letters))
        return original(self, at, letters, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def test_a_table_says_row_by_row_what_is_written_in_it(written: list) -> None:
    for drawing in made("table", 15):
        rows = {y: [text for _, _, text in group] for y, group in itertools.groupby(written, key=lambda item: item[1])}
        (_, *heads), *lines = rows.values()
        told = [f"{name}: " + ", ".join(f"{h} {v}" for h, v in zip(heads, vs, strict=True)) for name, *vs in lines]
        assert drawing.caption == f"A table with the columns {listed(heads)}. {'; '.join(told)}."
        for asked, answer in drawing.questions:
            if found := re.fullmatch(r"Which row has the (highest|lowest) (\w+)\?", asked):
                column = {name: int(values[heads.index(found[2])]) for name, *values in lines}
                best = (max if found[1] == "highest" else min)(column, key=column.__getitem__)
                assert answer == f"{best} has the {found[1]} {found[2]}, {column[best]}."
        written.clear()


@pytest.mark.parametrize("kind", ["bar chart", "line chart"])
def test_values_are_written_over_their_names_and_inside_the_image(kind: str, written: list) -> None:
    for drawing in made(kind, 20):
        title, *labels = written
        at: dict[float, list[str]] = {}
        for x, _, text in labels:
            at.setdefault(x, []).append(text)
        assert {name: int(value) for value, name in at.values()} == values_of(drawing.caption)
        assert f'"{title[2]}"' in drawing.caption
        written.clear()


@pytest.mark.parametrize("kind", ["sign", "plate", "pie chart", "clock", "page"])
def test_no_text_leaves_the_image(kind: str, written: list) -> None:
    assert len(list(made(kind, 15))) == 15 and len(written) >= 15


def test_the_word_of_a_sign_is_in_the_pixels() -> None:
    for drawing in made("sign", 12):
        word, letters = re.search(r'the word "(\w+)" in (\w+) letters', drawing.caption).groups()
        color = drawing.caption.split()[1]
        board = near(pixels(drawing), PALETTE[color])
        ys, xs = numpy.nonzero(board)
        inside = pixels(drawing)[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        ink = numpy.abs(inside - numpy.array(PALETTE[letters])).sum(2) < 150
        ink = ink[9:-9, 9:-9]  # corners of the board are round and show the ground
        ys, xs = numpy.nonzero(ink)
        ink = ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        fit = {candidate: likeness(ink, candidate) for candidate in SIGNS}
        assert max(fit, key=fit.__getitem__) == word and fit[word] > 0.6, (word, fit)


def likeness(ink: numpy.ndarray, word: str) -> float:
    """The correlation of letters, shrunk to few pixels, with those of a word that is written anew."""
    letters = ImageFont.load_default(80)
    fresh = Image.new("L", (1000, 120))
    ImageDraw.Draw(fresh).text((10, 10), word, 255, letters)
    fresh = fresh.crop(fresh.getbbox())
    small = (48, 10)
    seen = Image.fromarray((255 * ink).astype(numpy.uint8)).resize(small, Image.Resampling.BOX)
    fresh = fresh.resize(small, Image.Resampling.BOX)
    return float(numpy.corrcoef(numpy.asarray(seen).ravel(), numpy.asarray(fresh).ravel())[0, 1])


def test_the_hands_of_a_clock_point_to_its_time() -> None:
    for drawing in made("clock", 24):
        image = pixels(drawing)
        hour, minute = map(int, re.search(r"shows (\d+):(\d+)", drawing.caption).groups())
        face, frame = re.search(r"a (\w+) face and an? (\w+) frame", drawing.caption).groups()
        ys, xs = numpy.mgrid[: image.shape[0], : image.shape[1]]
        xs, ys = xs - image.shape[1] // 2, ys - image.shape[0] // 2
        away = numpy.hypot(xs, ys)
        radius = away[near(image, PALETTE[frame])].max()
        mark = image.mean(2) > 140 if face == "black" else image.mean(2) < 120
        angles = numpy.degrees(numpy.arctan2(xs, -ys))
        for turn, low, high in ((minute / 60, 0.5, 0.6), ((hour + minute / 60) / 12, 0.25, 0.38)):
            apart = numpy.abs(
                (angles[mark & (away > low * radius) & (away < high * radius)] - 360 * turn + 180) % 360 - 180
            )
            assert apart.min() < 6, drawing.caption
            assert low < 0.5 or apart.max() < 12, drawing.caption  # no other hand reaches so far


def test_a_page_has_as_many_lines_as_it_says() -> None:
    for drawing in made("page", 15):
        image = pixels(drawing).mean(2)
        ground = numpy.median(image)
        rows = (numpy.abs(image - ground) > 90).any(1)
        bands = int((numpy.diff(numpy.concatenate([[0], rows.astype(int)])) == 1).sum())
        said = next(answer for asked, answer in drawing.questions if "How many lines" in asked)
        count = NUMBERS.get(said.split()[2]) or int(said.split()[2])
        assert count <= bands <= 2 * count  # a dot of an i can make a band of its own
        assert dict(drawing.questions)["Read the text aloud."] in drawing.caption


def test_a_scene_has_as_many_trees_as_it_says() -> None:
    for drawing in made("scene", 20):
        image, night = pixels(drawing), "It is night" in drawing.caption
        leaves = near(image, (10, 95, 45) if night else (25, 110, 45), 25)
        answers = dict(drawing.questions)
        trees = NUMBERS[answers["How many trees are there?"].split()[2]]
        assert sum(size > 60 for size in components(leaves)) == trees, drawing.caption


def test_sentences_are_those_of_their_part() -> None:
    for part in ("calibration", "evaluation"):
        text = " ".join(" ".join(itertools.islice(stdlib_documents(part), 40)).split())
        found = sentences(part)
        assert len(found) > 100 and all(sentence in text for sentence in found[:20])


def test_a_python_without_sources_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_text, "stdlib_documents", lambda part: iter(()))
    with pytest.raises(CalibrationError, match="found 0 of 6 for `calibration`; use a Python that comes with"):
        sentences.__wrapped__("calibration")


def test_the_stream_mixes_all_kinds_and_its_conversations_are_well_formed() -> None:
    some = list(itertools.islice(drawings(), 3 * len(KINDS)))
    assert {re.search(r"\((.+)\)$", c.where)[1] for c in some} == set(KINDS)
    sizes, turns = set(), set()
    for c in some:
        (image,) = c.images
        assert image.mode == "RGB" and all(224 <= side <= 672 for side in image.size)
        assert [m["role"] for m in c.messages] == ["user", "assistant"] * (len(c.messages) // 2)
        assert [part["type"] for part in c.messages[0]["content"]] == ["image", "text"]
        assert all([part["type"] for part in m["content"]] == ["text"] for m in c.messages[1:])
        assert len({m["content"][-1]["text"] for m in c.messages[::2]}) == len(c.messages) // 2
        sizes.add(image.size)
        turns.add(len(c.messages) // 2)
    assert turns == {1, 2, 3} and len(sizes) > 10


def test_articles_and_numbers_fit_their_nouns() -> None:
    wrong = re.compile(r"\b(a (orange|open)|an (?!orange)|one \w+ \w*[^s]s|There are one|There is (?!one|an?|no))\b")
    for kind in KINDS:
        for drawing in made(kind, 12):
            if kind != "page":
                for text in (drawing.caption, *(answer for _, answer in drawing.questions)):
                    assert not wrong.search(text), text


def digest(part: str, count: int = 22) -> str:
    together = hashlib.sha256()
    for c in itertools.islice(drawings(part), count):
        together.update(c.images[0].tobytes() + repr((c.images[0].size, c.messages)).encode())
    return together.hexdigest()


def test_the_same_part_gives_the_same_images_in_any_process() -> None:
    code = "import test_drawings; print(test_drawings.digest('calibration'))"
    paths = [os.path.dirname(__file__), *sys.path]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(paths)}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert digest("calibration") == digest("calibration") == other.stdout.strip()


def test_an_image_does_not_depend_on_those_before_it() -> None:
    fifth = next(itertools.islice(drawings("evaluation"), 5, None))
    alone = conversation("evaluation", 5)
    assert fifth.messages == alone.messages and fifth.images[0].tobytes() == alone.images[0].tobytes()


def test_parts_share_no_image() -> None:
    seen = [
        {hashlib.sha256(c.images[0].tobytes()).digest() for c in itertools.islice(drawings(p), 66)}
        for p in ("calibration", "evaluation")
    ]
    assert len(seen[0]) == len(seen[1]) == 66 and not seen[0] & seen[1]


def test_another_part_is_refused_at_once() -> None:
    with pytest.raises(UnknownNameError, match="`validation`.*known: calibration, evaluation"):
        drawings("validation")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_noise_changes_no_channel_by_more_than_its_amplitude(amplitude: int, wide: int, high: int, seed: int) -> None:
    image = Image.new("RGB", (wide, high), (120, 40, 200))
    changed = numpy.asarray(noisy(image, amplitude, seeded(str(seed)))).astype(int) - numpy.asarray(image)
    assert numpy.abs(changed).max() <= amplitude


def test_words() -> None:
    assert [plural(word, 2) for word in ("cross", "circle")] == ["crosses", "circles"]
    assert plural("cross", 1) == "cross"
    assert [listed(items) for items in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
