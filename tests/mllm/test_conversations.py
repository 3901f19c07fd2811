"""Data sets of images and text: every shape of row, every kind of image, and errors that name the file or the row."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import itertools
import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from autoround_core.documents import DatasetSpec, parse_datasets
from autoround_core.errors import CalibrationError, UnknownNameError, UsageError
from autoround_mllm.conversation import Conversation
from autoround_mllm.conversations import conversations, given_source, load_image, open_conversations, open_source

RED, BLUE = (255, 0, 0), (0, 0, 255)
IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


def picture(colour=RED, size=(8, 6)):
    return Image.new("RGB", size, colour)


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(rows, **options):
    return list(conversations(given_source(rows), **options))


def only(row):
    (conversation,) = read([row])
    return conversation


def colours(conversation):
    return [image.getpixel((0, 0)) for image in conversation.images]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def spec_of(text):
    (spec,) = parse_datasets(text)
    return spec


# --- the shapes of rows ---------------------------------------------------------------------------

ASKED = (user(IMAGE, text("What is it?")), assistant("A square."))
SAME = [
    {"image": RED, "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]},
    {"image": [RED], "conversations": [
        {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A square."}]},
    {"images": [RED], "messages": [
        {"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A square."}]},
    {"images": RED, "messages": [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A square.", "image": None}]}]},
    {"messages": [
        {"role": "user", "content": [{"type": "image", "image": RED}, text("What is it?")]},
        {"role": "assistant", "content": "A square."}]},
    {"images": [RED], "texts": [{"user": "What is it?", "assistant": "A square.", "source": "shapes"}]},
]


def with_pictures(value):
    """The row with an image for each colour."""
    if isinstance(value, tuple):
        return picture(value)
    if isinstance(value, dict):
        return {key: with_pictures(each) for key, each in value.items()}
    return [with_pictures(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("row", SAME, ids=lambda row: " ".join(row))
def test_every_shape_of_row_is_the_same_conversation(row):
    made = only(with_pictures(row))
    assert made.messages == ASKED
    assert colours(made) == [RED]
    assert made.where == "row 1 of `given rows`"


@pytest.mark.parametrize("key", ["text", "caption"])
def test_a_caption_is_what_the_model_says_about_an_image(key):
    made = only({"image": picture(), key: " A red square.\n"})
    assert made.messages == (user(IMAGE), assistant("A red square."))


def test_images_stand_where_the_text_has_them():
    said = [{"from": "human", "value": "Is <image> left of <image>\n?"}, {"from": "gpt", "value": "No."},
            {"from": "system", "value": "be brief"}, {"from": "human", "value": "And <image>"}]
    made = only({"image": [picture(RED), picture(BLUE), picture()], "conversations": said})
    assert made.messages == (
        user(text("Is"), IMAGE, text("left of"), IMAGE, text("?")), assistant("No."),
        {"role": "system", "content": [text("be brief")]}, user(text("And"), IMAGE),
    )
    assert colours(made) == [RED, BLUE, RED]


def test_images_of_the_parts_and_of_the_row_keep_their_order():
    content = [IMAGE, {"type": "image", "path": None, "url": picture(BLUE)}, text("?"), {**IMAGE, "text": None}]
    made = only({"images": [picture(RED), picture((0, 255, 0))], "messages": [{"role": "user", "content": content}]})
    assert made.messages == (user(IMAGE, IMAGE, text("?"), IMAGE),)
    assert colours(made) == [RED, BLUE, (0, 255, 0)]


def test_several_questions_about_several_images():
    texts = [{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}]
    made = only({"images": [picture(), picture(BLUE)], "texts": texts})
    assert made.messages == (user(IMAGE, IMAGE, text("q")), assistant("a"), user(text("r")), assistant("b"))
    assert colours(made) == [RED, BLUE]


@pytest.mark.parametrize("row", [
    {"image": None, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]},
    {"images": [], "messages": [{"role": "user", "content": [text("Hello")]}, {"role": "assistant", "content": "Hi."}]},
    {"texts": [{"user": "Hello", "assistant": "Hi."}]},
])
def test_a_row_without_an_image_is_a_text_conversation(row):
    made = only(row)
    assert made.messages == (user(text("Hello")), assistant("Hi."))
    assert made.images == ()


def test_conversations_that_are_given_are_taken_as_they_are():
    ready = Conversation(ASKED, (picture(),), "mine")
    assert read([ready]) == [ready]


words = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=12)


@given(st.lists(words, min_size=1, max_size=6))
def test_placeholders_split_any_text(pieces):
    turn = {"from": "human", "value": "<image>".join(pieces)}
    row = {"image": [picture()] * (len(pieces) - 1), "conversations": [turn]}
    ((message,),) = (made.messages for made in read([row]))
    written = "".join("<image>" if part == IMAGE else part["text"] for part in message["content"])
    # white space around an image is the only thing that may get lost
    kept = pieces if len(pieces) == 1 else [piece.strip() for piece in pieces]
    assert written == "<image>".join(kept)


BAD_ROWS = [
    ({"image": 3, "text": "a"}, "an image must be a path, a URL, bytes or an image of Pillow, got int"),
    ({"image": picture(), "label": 3}, "has the keys image, label; one of messages, conversations, texts, text"),
    ({"image": picture(), "text": " "}, "`text` must be text that is not empty"),
    ({"image": picture(), "conversations": []}, "`conversations` must be a list of objects"),
    ({"image": picture(), "conversations": [{"value": "a"}]}, "each turn needs `role` and `content`"),
    ({"image": picture(), "conversations": [{"from": "gpt", "value": 3}]}, "must be text or a list of parts"),
    ({"image": picture(), "messages": [user({"type": "video"})]}, "a part of type `video`"),
    ({"image": picture(), "conversations": [{"from": "human", "value": "<image><image>"}]},
     r"2 places for images \(<image>\) and 1 images"),
    ({"image": [picture()] * 2, "conversations": [{"from": "human", "value": "no place"}]},
     r"0 places for images \(<image>\) and 2 images"),
    ({"conversations": [{"from": "human", "value": "<image>"}]}, "1 places for images"),
    ({"image": "a.png", "text": "a"}, "there is no image `a.png`; say where images are with images=DIR"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message[:30] for _, message in BAD_ROWS])
def test_a_bad_row_is_an_error_with_its_number_or_is_counted(row, message):
    good = {"image": picture(), "text": "fine"}
    with pytest.raises(CalibrationError, match=message) as caught:
        read([good, row, good])
    assert "row 2 of `given rows`" in str(caught.value) and "\n" not in str(caught.value)
    errors = []
    made = read([good, row, good], skip_bad=errors.append)
    assert [each.where for each in made] == ["row 1 of `given rows`", "row 3 of `given rows`"]
    assert [str(error) for error in errors] == [str(caught.value)]


# --- images ----------------------------------------------------------------------------------------


def half_transparent():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 51))
    image.putpixel((0, 0), (9, 9, 9, 0))
    return image


def paletted(transparent):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([1, 2, 3, 10, 20, 30])
    return file_of(image, transparency=1) if transparent else file_of(image)


def sixteen_bits(kind):
    values = np.array([[0, 257 * 100], [257 * 200 + 60, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    return file_of(image, kind)


def grey(array):
    return file_of(Image.fromarray(array), "TIFF")


# (bytes, the pixels that they mean: worked out by hand from the format's definition)
KINDS = {
    "rgb": (file_of(picture((1, 2, 3))), {(0, 0): (1, 2, 3)}),
    "grey": (file_of(Image.new("L", (4, 4), 77)), {(0, 0): (77, 77, 77)}),
    "black and white": (file_of(Image.new("1", (4, 4), 1)), {(0, 0): (255, 255, 255)}),
    # 0.2 * 255 + 0.8 * 255, and 0.8 * 255
    "alpha": (file_of(half_transparent()), {(1, 1): (255, 204, 204), (0, 0): (255, 255, 255)}),
    "grey and alpha": (file_of(Image.new("LA", (4, 4), (0, 51))), {(0, 0): (204, 204, 204)}),
    "grey with a transparent value": (
        file_of(Image.new("L", (4, 4), 7), transparency=7), {(0, 0): (255, 255, 255)}),
    "palette": (paletted(False), {(0, 0): (10, 20, 30)}),
    "transparent palette": (paletted(True), {(0, 0): (255, 255, 255)}),
    "16 bits png": (sixteen_bits("PNG"), {(0, 0): (0,) * 3, (1, 0): (100,) * 3, (0, 1): (200,) * 3}),
    "16 bits tiff": (sixteen_bits("TIFF"), {(1, 0): (100,) * 3, (1, 1): (255,) * 3}),
    "32 bits": (grey(np.array([[0, 65535]], np.int32)), {(0, 0): (0,) * 3, (1, 0): (255,) * 3}),
    "32 bits that are 8": (grey(np.array([[0, 200]], np.int32)), {(1, 0): (200,) * 3}),
    "fractions": (grey(np.array([[0, 0.2, 1]], np.float32)), {(1, 0): (51,) * 3, (2, 0): (255,) * 3}),
    "cmyk": (file_of(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), {(0, 0): RED}),
    "gif": (file_of(Image.new("RGB", (4, 4), BLUE), "GIF"), {(0, 0): BLUE}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_rgb(kind):
    data, pixels = KINDS[kind]
    image = load_image(data, None, "here")
    assert image.mode == "RGB"
    assert {place: image.getpixel(place) for place in pixels} == pixels


def test_an_image_is_turned_as_its_camera_was_held():
    upright = picture(RED, (6, 8))
    upright.paste(BLUE, (0, 0, 6, 2))  # the sky
    # orientation 6: the file's first row is the right edge of what was seen
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = load_image(file_of(stored, exif=exif), None, "here")
    assert seen.size == (6, 8)
    assert seen.tobytes() == upright.tobytes()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("data", [
    file_of(NOISE)[:4000], file_of(NOISE, "JPEG")[:1500], file_of(NOISE, "WEBP")[:900], file_of(NOISE, "GIF")[:2000],
    b"", b"not an image", file_of(NOISE)[:20], grey(np.array([[-1.0, 2]], np.float32)),
], ids=["png", "jpeg", "webp", "gif", "empty", "text", "a header", "strange values"])
def test_a_broken_image_is_an_error_with_its_name(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(CalibrationError, match=r"the image `a.png` \(row 7\)") as caught:
        load_image("a.png", tmp_path, "row 7")
    assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)
    with pytest.raises(CalibrationError, match="the image of row 7"):
        load_image(data, None, "row 7")


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CalibrationError, match="cannot be read: DecompressionBombError"):
        load_image(file_of(NOISE), None, "here")


def test_an_image_is_found_by_bytes_path_or_dictionary(tmp_path):
    path = tmp_path / "sub" / "a.png"
    path.parent.mkdir()
    path.write_bytes(file_of(picture()))
    ways = [path, str(path), "sub/a.png", {"path": "sub/a.png", "bytes": None},
            {"bytes": path.read_bytes(), "path": "x"}, {"bytes": bytearray(path.read_bytes())},
            {"image": {"path": "sub/a.png"}},
            {"image_url": {"url": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()}}]
    assert [load_image(way, tmp_path, "here").getpixel((0, 0)) for way in ways] == [RED] * len(ways)
    with pytest.raises(CalibrationError, match=r"here: there is no image `sub/b.png` in `.*`; say where"):
        load_image("sub/b.png", tmp_path, "here")


@contextlib.contextmanager
def serving(content):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in content else 404)
            self.end_headers()
            self.wfile.write(content.get(self.path, b""))

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_image_is_downloaded_and_a_refusal_names_its_address(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving({"/a.png": file_of(picture(BLUE)), "/b.png": b"<html>"}) as address:
        assert load_image(f"{address}/a.png", None, "here").getpixel((0, 0)) == BLUE
        with pytest.raises(CalibrationError, match=r"/b.png` \(here\) is no image"):
            load_image(f"{address}/b.png", None, "here")
        refused = r"the image `.*/c.png` \(here\) cannot be downloaded: HTTPError.*images=DIR"
        with pytest.raises(CalibrationError, match=refused):
            load_image(f"{address}/c.png", None, "here")
    with pytest.raises(CalibrationError, match=r"`.*/a.png` \(here\) cannot be downloaded: URLError"):
        load_image(f"{address}/a.png", None, "here")
    with pytest.raises(CalibrationError, match="cannot be downloaded"):
        load_image("http://[1/a.png", None, "here")


# --- data sets -------------------------------------------------------------------------------------


def test_a_folder_of_images_with_captions(tmp_path):
    for name, colour in (("b.PNG", BLUE), ("a.jpg", RED)):
        picture(colour).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"{name}\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    made = list(open_conversations(DatasetSpec(str(tmp_path))))
    assert [each.messages for each in made] == [(user(IMAGE), assistant("a.jpg")), (user(IMAGE), assistant("b.PNG"))]
    assert colours(made[1]) == [BLUE]
    assert "a.jpg" in made[0].where

    picture().save(tmp_path / "aa.png")
    with pytest.raises(CalibrationError, match=r"the image `.*aa.png` has no caption; write it to `.*aa.txt`"):
        list(open_conversations(DatasetSpec(str(tmp_path))))
    (tmp_path / "aa.txt").write_bytes(b"\xff")
    errors = []
    assert len(list(open_conversations(DatasetSpec(str(tmp_path)), errors.append))) == 2
    assert len(errors) == 1 and "aa.txt` cannot be read" in str(errors[0])
    with pytest.raises(UsageError, match="has no splits"):
        open_source(DatasetSpec(str(tmp_path), split=("train",)))


def test_a_folder_with_metadata(tmp_path):
    for name, colour in (("1.png", RED), ("2.png", BLUE)):
        picture(colour).save(tmp_path / name)
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}]
    rows = [{"file_name": "2.png", "text": "blue"}, {"file_name": "1.png", "conversations": turns}]
    jsonl(tmp_path / "metadata.jsonl", rows)
    made = list(open_conversations(DatasetSpec(str(tmp_path))))
    assert [colours(each) for each in made] == [[BLUE], [RED]]
    assert [each.messages[-1] for each in made] == [assistant("blue"), assistant("red")]
    assert made[1].where == f"row 2 of `{tmp_path}`"


def written(tmp_path, kind, rows):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        jsonl(path, rows)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_files_name_images_beside_them_or_in_the_given_folder(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    picture(RED).save(tmp_path / "a.png")
    picture(BLUE).save(tmp_path / "elsewhere" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    path = written(tmp_path, kind, [{"id": 1, "image": "a.png", "conversations": turns}])
    (made,) = open_conversations(DatasetSpec(str(path)))
    assert made.messages == ASKED and colours(made) == [RED]
    (made,) = open_conversations(spec_of(f"{path}:images={tmp_path / 'elsewhere'}"))
    assert colours(made) == [BLUE]
    with pytest.raises(CalibrationError, match="images=nowhere of dataset .* is no folder"):
        open_source(DatasetSpec(str(path), images="nowhere"))


def test_images_inside_a_parquet_file(tmp_path):
    data = [file_of(picture(colour)) for colour in (RED, BLUE)]
    rows = [{"image": {"bytes": data[0], "path": "a.png"}, "caption": "red"},
            {"image": {"bytes": data[1][:50], "path": None}, "caption": "broken"},
            {"image": {"bytes": data[1], "path": None}, "caption": "blue"}]
    path = written(tmp_path, "parquet", rows)
    errors = []
    made = list(open_conversations(DatasetSpec(str(path)), errors.append))
    assert [colours(each) for each in made] == [[RED], [BLUE]]
    assert len(errors) == 1 and f"row 2 of `{path}`" in str(errors[0])


def test_a_folder_as_a_hub_has_it(tmp_path):
    import datasets

    features = {"images": datasets.List(datasets.Image()), "texts": datasets.List(
        {"user": datasets.Value("string"), "assistant": datasets.Value("string")})}
    rows = [{"images": [picture(colour)], "texts": [{"user": "What is it?", "assistant": "A square."}]}
            for colour in (RED, BLUE)]
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    made.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    made = list(open_conversations(DatasetSpec(str(tmp_path))))
    assert [colours(each) for each in made] == [[RED], [BLUE]]
    assert made[0].messages == ASKED


def test_a_system_prompt_is_put_where_there_is_none(tmp_path):
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": [IMAGE]}]
    rows = [{"image": "a.png", "text": "red"}, {"image": "a.png", "messages": own}]
    picture().save(tmp_path / "a.png")
    path = jsonl(tmp_path / "a.jsonl", rows)
    made = list(open_conversations(spec_of(f"{path}:system_prompt=Be brief.")))
    assert [each.messages[0]["content"] for each in made] == [[text("Be brief.")], [text("mine")]]
    assert [len(each.messages) for each in made] == [3, 2]


def test_the_drawn_set():
    first, again, other = (
        next(open_conversations(spec_of(name)))
        for name in ("synthetic", "synthetic:split=calibration", "synthetic:split=evaluation")
    )
    assert first.messages == again.messages and first.images[0].tobytes() == again.images[0].tobytes()
    assert first.images[0].tobytes() != other.images[0].tobytes()
    with pytest.raises(UnknownNameError, match="evaluation"):
        open_source(spec_of("synthetic:split=evalution"))
    with pytest.raises(UnknownNameError, match="did you mean `synthetic`"):
        open_source(spec_of("sinthetic"))


def test_names_that_are_nothing():
    with pytest.raises(CalibrationError, match="no such file"):
        open_source(DatasetSpec("missing.jsonl"))
    for wrong in (3, b"bytes", {"image": picture()}, Conversation((), (), "one")):
        with pytest.raises(UsageError, match="dataset must be a name or a list of conversations"):
            given_source(wrong)


TEXT_ROWS = ["plain", {"text": "a"}, {"input_ids": [1, 2]}, [1, 2], {"messages": [{"role": "user", "content": "a"}]},
             {"text": "a", "image": None}]
IMAGE_ROWS = [{"text": "a", "image": "a.png"}, {"text": "a", "images": []}, {"conversations": []}, {"texts": []},
              {"messages": [user(text("a"))]}, {"file_name": "a.png", "text": "a"}, {"caption": "a"},
              Conversation((), (), "one")]


def test_what_a_data_set_is_is_seen_in_its_rows():
    assert [given_source([row]).is_text for row in TEXT_ROWS] == [True] * len(TEXT_ROWS)
    assert [given_source([row]).is_text for row in IMAGE_ROWS] == [False] * len(IMAGE_ROWS)
    assert not given_source([*TEXT_ROWS, IMAGE_ROWS[0]]).is_text


def test_rows_are_read_as_they_are_asked_for():
    asked = []

    def rows():
        for number in itertools.count():
            asked.append(number)
            yield {"image": picture(), "text": str(number)}

    stream = conversations(given_source(rows()))
    assert [next(stream).messages[-1] for _ in range(100)][-1] == assistant("99")
    assert len(asked) == 100
