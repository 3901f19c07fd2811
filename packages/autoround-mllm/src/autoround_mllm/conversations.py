"""Where calibration images come from: the rows of a data set, each made into a conversation about images.

Data of vision-language models come in four shapes: turns with `<image>` in their text (`conversations`), messages as
chat templates take them (`messages`), questions and answers (`texts`), and an image with a caption (`text`, `caption`).
All four end as one: messages of parts, and an image for each part that is one. What cannot be read is an error that
names the file or row; nothing is made up for it, and nothing is passed over unless the caller counts it.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoround_core.calibration import ROW_KEYS
from autoround_core.corpus import PARTS
from autoround_core.documents import STDLIB, DatasetSpec, first_line, open_rows
from autoround_core.errors import CalibrationError, UsageError, unknown_name
from autoround_mllm.conversation import Conversation

if TYPE_CHECKING:
    from PIL.Image import Image

Skip = Callable[[CalibrationError], None] | None
SYNTHETIC = "synthetic"
PLACEHOLDER = "<image>"
_IMAGE_KEYS = ("images", "image", "file_name")  # the first that a row has is the one that counts
_SOURCE_KEYS = ("bytes", "image", "path", "url", "image_url")
_CAPTION_KEYS = ("text", "caption")
_TEXT_KEYS = ("messages", "conversations", "texts", *_CAPTION_KEYS)
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_REMOTE = ("http://", "https://", "data:")
_TIMEOUT = 20  # seconds
_PEEK = 64
_OPAQUE = ("L", "RGB", "CMYK", "YCbCr", "HSV", "LAB")


@dataclass(frozen=True, slots=True)
class Source:
    """An opened data set. folder: where its rows name images. is_text: none of its first rows has an image."""

    spec: DatasetSpec
    rows: Iterator[Any]
    folder: Path | None
    is_text: bool


def open_source(spec: DatasetSpec) -> Source:
    """Open the data set that is named. Raises UsageError or CalibrationError for a name that cannot be meant."""
    if spec.name == SYNTHETIC:
        from autoround_mllm.drawings import drawings

        part = "+".join(spec.split or PARTS[:1])
        if part not in PARTS:
            raise unknown_name(f"split of the data set `{SYNTHETIC}`", part, PARTS)
        return Source(spec, drawings(part), None, False)
    path = Path(spec.name).expanduser()
    if not path.exists() and difflib.get_close_matches(spec.name.lower(), [SYNTHETIC], cutoff=0.8):
        raise unknown_name("dataset", spec.name, [SYNTHETIC, STDLIB], "; other names are files or hub data sets")
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    if spec.images is not None:
        folder = Path(spec.images).expanduser()
        if not folder.is_dir():
            raise CalibrationError(f"images={spec.images} of dataset `{spec.name}` is no folder")
    rows = _pictures(spec, path) if path.is_dir() else None
    return _peeked(spec, open_rows(spec) if rows is None else rows, folder)


def given_source(dataset: Iterable[Any]) -> Source:
    """What the caller holds: Conversations, or rows as a data set has them, with images of Pillow or absolute paths."""
    if isinstance(dataset, (bytes, Mapping, Conversation)) or not isinstance(dataset, Iterable):
        raise UsageError(f"dataset must be a name or a list of conversations or rows, got {type(dataset).__name__}")
    return _peeked(DatasetSpec("given rows"), iter(dataset), None)


def open_conversations(spec: DatasetSpec, skip_bad: Skip = None) -> Iterator[Conversation]:
    """The conversations of one data set, read as they are asked for. Errors as `open_source` and `conversations`."""
    return conversations(open_source(spec), skip_bad)


def conversations(source: Source, skip_bad: Skip = None) -> Iterator[Conversation]:
    """Each row as a conversation. skip_bad: is given the error of a row that cannot be read, which is then passed over.

    Raises CalibrationError for such a row if there is no `skip_bad`, and for a file that is broken as a whole.
    """
    for number, row in enumerate(source.rows, 1):
        where = f"`{row}`" if isinstance(row, Path) else f"row {number} of `{source.spec.name}`"
        try:
            conversation = row if isinstance(row, Conversation) else _conversation(row, source.folder, where)
        except CalibrationError as error:
            if skip_bad is None:
                raise
            skip_bad(error)
            continue
        system = source.spec.system_prompt
        if system is not None and conversation.messages[0]["role"] != "system":
            first = {"role": "system", "content": [_text(system)]}
            conversation = replace(conversation, messages=(first, *conversation.messages))
        yield conversation


def load_image(value: Any, folder: Path | None, where: str) -> Image:
    """An image as RGB, upright, wholly read.

    value: an image of Pillow, its file as bytes or as {"bytes", "path"}, a path relative to `folder`, or a URL. What is
    transparent becomes white, 16 bits become 8. Raises CalibrationError with the name of the file and `where`.
    """
    import io

    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Mapping):
        value = next((value[key] for key in _SOURCE_KEYS if value.get(key) is not None), None)
        if isinstance(value, Mapping):  # {"image_url": {"url": ...}}, or an undecoded image in a message
            return load_image(value, folder, where)
    name = f"of {where}"
    if isinstance(value, (str, os.PathLike)):
        value = os.fspath(value)
        name = f"`{value[:200]}` ({where})"
        value = io.BytesIO(_download(value, name)) if value.startswith(_REMOTE) else _find(value, folder, where)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        value = io.BytesIO(value)
    elif not isinstance(value, Image.Image):
        given = f"got {type(value).__name__}"
        raise CalibrationError(f"{where}: an image must be a path, a URL, bytes or an image of Pillow, {given}")
    try:
        if isinstance(value, Image.Image):
            return _rgb(value)
        with Image.open(value) as image:
            return _rgb(image)
    except UnidentifiedImageError:
        raise CalibrationError(f"the image {name} is no image, or of a kind that Pillow does not know") from None
    except Exception as error:  # each decoder has errors of its own, from SyntaxError to struct.error
        raise CalibrationError(f"the image {name} cannot be read: {first_line(error)}") from error


def _peeked(spec: DatasetSpec, rows: Iterator[Any], folder: Path | None) -> Source:
    head = list(itertools.islice(rows, _PEEK))
    return Source(spec, itertools.chain(head, rows), folder, all(_is_text(row) for row in head))


def _is_text(row: Any) -> bool:
    """Whether a row is for `autoround_core.calibration`: text or token ids, and no image."""
    if not isinstance(row, Mapping):
        return not isinstance(row, (Conversation, Path))
    if any(row.get(key) is not None for key in (*_IMAGE_KEYS, "conversations", "texts")):
        return False
    contents = [m.get("content") for m in row.get("messages") or () if isinstance(m, Mapping)]
    return any(key in row for key in ROW_KEYS) and all(isinstance(content, str) for content in contents)


def _pictures(spec: DatasetSpec, path: Path) -> Iterator[Any] | None:
    """The rows of a folder of images; None if it is something else."""
    if (path / "metadata.jsonl").is_file():
        rows = open_rows(DatasetSpec(str(path / "metadata.jsonl")))
    else:
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not found or (path / "metadata.csv").is_file():
            return None
        rows = iter(found)
    if spec.split:
        raise UsageError(f"`{path}` is a folder of images and has no splits; leave `split=` out")
    return rows


def _conversation(row: Any, folder: Path | None, where: str) -> Conversation:
    if isinstance(row, Path):
        row = {"image": row.absolute(), "text": _caption(row)}
    row = {key: value for key, value in row.items() if value is not None} if isinstance(row, Mapping) else {"text": row}
    sources = next((row[key] for key in _IMAGE_KEYS if key in row), [])
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    messages = _messages(row, len(sources), where)
    slots = [part for message in messages for part in message["content"] if part["type"] == "image"]
    own = sum("source" in slot for slot in slots)
    if len(slots) - own != len(sources):
        places = f"{len(slots) - own} places for images ({PLACEHOLDER})"
        raise CalibrationError(f"{where} has {places} and {len(sources)} images; it needs as many as images")
    rest = iter(sources)
    images = [load_image(slot.pop("source") if "source" in slot else next(rest), folder, where) for slot in slots]
    return Conversation(tuple(messages), tuple(images), where)


def _messages(row: Mapping[str, Any], images: int, where: str) -> list[dict[str, Any]]:
    """The messages of a row. An {"type": "image"} part that names its own image has it as `source`."""
    key = next((key for key in _TEXT_KEYS if key in row), None)
    if key is None:
        found, known = ", ".join(map(str, row)) or "none", ", ".join(_TEXT_KEYS)
        raise CalibrationError(f"{where} has the keys {found}; one of {known} is needed")
    value, pictures = row[key], [{"type": "image"} for _ in range(images)]
    if key in _CAPTION_KEYS:
        if not isinstance(value, str) or not value.strip():
            raise CalibrationError(f"{where}: `{key}` must be text that is not empty, got {type(value).__name__}")
        said = {"role": "assistant" if images else "user", "content": [_text(value.strip())]}
        return [{"role": "user", "content": pictures}, said] if images else [said]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise CalibrationError(f"{where}: `{key}` must be a list of objects, one for each turn")
    if key == "texts":
        turns = [(role, turn.get(role)) for turn in value for role in ("user", "assistant")]
    else:
        turns = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in value]
    if not all(isinstance(role, str) for role, _ in turns):
        raise CalibrationError(f"{where}: each turn needs `role` and `content`, or `from` and `value`")
    messages = [{"role": _ROLES.get(role, role), "content": _content(content, where)} for role, content in turns]
    placed = any(part["type"] == "image" for message in messages for part in message["content"])
    if not placed and (images == 1 or key == "texts"):
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"][:0] = pictures
    return messages


def _content(content: Any, where: str) -> list[dict[str, Any]]:
    """The parts of one message."""
    if isinstance(content, str):
        if PLACEHOLDER not in content:
            return [_text(content)]
        # what stands between a placeholder and its text is the business of the chat template
        first, *others = (piece.strip() for piece in content.split(PLACEHOLDER))
        parts = [_text(first), *(part for piece in others for part in ({"type": "image"}, _text(piece)))]
        return [part for part in parts if part != _text("")]
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, Mapping) for part in content):
        raise CalibrationError(f"{where}: the content of a turn must be text or a list of parts")
    return [_part(part, where) for part in content]


def _part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind, text = part.get("type"), part.get("text")
    if kind == "text" and isinstance(text, str):
        return _text(text)
    if kind in ("image", "image_url"):
        source = {key: part[key] for key in _SOURCE_KEYS if part.get(key) is not None}
        return {"type": "image", "source": source} if source else {"type": "image"}
    raise CalibrationError(f"{where} has a part of type `{kind}`; text (with `text`) and image are what can be used")


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _caption(image: Path) -> str:
    path = image.with_suffix(".txt")
    if not path.is_file():
        wanted = f"write it to `{path}`, or all of them to metadata.jsonl as file_name and text"
        raise CalibrationError(f"the image `{image}` has no caption; {wanted}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"the caption `{path}` cannot be read: {first_line(error)}") from None


def _find(name: str, folder: Path | None, where: str) -> Path:
    path = Path(name).expanduser() if folder is None else folder / Path(name).expanduser()
    if not path.is_file():
        place = "" if folder is None else f" in `{folder}`"
        raise CalibrationError(f"{where}: there is no image `{name}`{place}; say where images are with images=DIR")
    return path


def _download(url: str, name: str) -> bytes:
    import http.client
    import urllib.request

    try:
        request = urllib.request.Request(url, headers={"User-Agent": "autoround"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            return answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        message = f"the image {name} cannot be downloaded: {first_line(error)}"
        raise CalibrationError(f"{message}; name files in the rows instead, and their folder with images=DIR") from None


def _rgb(image: Image) -> Image:
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if image.mode not in _OPAQUE or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image) -> Image:
    """Grey values of 16 bits, or fractions up to 1, as 8 bits: `convert` would cut off all above 255."""
    import numpy as np
    from PIL import Image

    grey = np.asarray(image).astype(np.float64)
    tops = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    top = next((top for top in tops if grey.min() >= 0 and grey.max() <= top), None)
    if top is None:
        raise ValueError(f"grey values from {grey.min():g} to {grey.max():g}; 0 to 65535 is what can be used")
    return Image.fromarray((grey * (255 / top)).round().astype(np.uint8))
