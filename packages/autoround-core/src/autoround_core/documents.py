"""Where calibration text comes from: a specification, and the rows of the data set that it names.

A specification names data sets, separated by commas, each with options after colons:

    NeelNanda/pile-10k:num=64,./chats.jsonl:apply_chat_template:system_prompt=Be brief.

A backslash before a comma, colon or backslash makes it part of the text. A name is `stdlib` (the
offline corpus), a local file, or a data set of the Hugging Face hub. An unknown option is an error,
because a misspelt one would otherwise calibrate on other data than was asked for.

Rows are handed on as they are found, one at a time; what they mean is the business of
`calibration`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autoround_core.corpus import PARTS, stdlib_documents
from autoround_core.errors import CalibrationError, UsageError, unknown_name

STDLIB = "stdlib"
_KEYS = ("num", "split", "concat", "apply_chat_template", "system_prompt", "images")
_FLAGS = {"true": True, "false": False}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OFFLINE = f"pass `--dataset {STDLIB}` (the offline corpus) or a local file"
_PROBE_SECONDS = 3


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One data set of a specification; `str()` gives its canonical spelling.

    num: rows to take from it, None = its even share. split: splits of a hub data set, () = train.
    concat: all documents make one stream of tokens, otherwise a long one gives a row of its own.
    apply_chat_template: write text as the model's chat template does. system_prompt: put in front
    of a conversation that has none; implies the chat template. images: the folder that its rows name
    images in, for data of vision-language models.
    """

    name: str
    num: int | None = None
    split: tuple[str, ...] = ()
    concat: bool = False
    apply_chat_template: bool = False
    system_prompt: str | None = None
    images: str | None = None

    @property
    def templated(self) -> bool:
        return self.apply_chat_template or self.system_prompt is not None

    def __str__(self) -> str:
        options = [
            f"num={self.num}" if self.num is not None else "",
            f"split={'+'.join(self.split)}" if self.split else "",
            "concat" if self.concat else "",
            "apply_chat_template" if self.apply_chat_template else "",
            f"system_prompt={self.system_prompt}" if self.system_prompt is not None else "",
            f"images={self.images}" if self.images is not None else "",
        ]
        return ":".join(_escape(part) for part in (self.name, *options) if part)


def parse_datasets(text: str) -> tuple[DatasetSpec, ...]:
    """Read a specification. Raises UsageError, with the closest option for one that is unknown."""
    return tuple(_parse_one(part) for part in _cut(text, ","))


def share_rows(specs: Sequence[DatasetSpec], nsamples: int) -> list[int]:
    """How many rows each data set gives: `num` where set, an even part of the rest elsewhere."""
    fixed = sum(spec.num or 0 for spec in specs)
    sharing = sum(spec.num is None for spec in specs)
    rest = nsamples - fixed
    if rest < sharing or (rest and not sharing):
        raise UsageError(
            f"nsamples is {nsamples}, but num= fixes {fixed} rows and {sharing} datasets share "
            "the rest: change nsamples or a num="
        )
    even = iter(rest // sharing + (index < rest % sharing) for index in range(sharing))
    return [next(even) if spec.num is None else spec.num for spec in specs]


def open_rows(spec: DatasetSpec) -> Iterator[Any]:
    """The rows of one data set, read as they are asked for: strings, mappings or lists.

    A name that cannot be meant is refused at once, a faulty row when it is reached. Raises
    UsageError or CalibrationError.
    """
    if spec.name == STDLIB:
        if len(spec.split) > 1:
            raise UsageError(f"`{STDLIB}` gives one split at a time, got {'+'.join(spec.split)}")
        return stdlib_documents((spec.split or PARTS)[0])
    path = os.path.expanduser(spec.name)
    if os.path.isdir(path):
        return _hub_rows(spec, path, local=True)
    reader = _READERS.get(os.path.splitext(path)[1].lower())
    if os.path.isfile(path):
        if reader is None:
            kinds = ", ".join(_READERS)
            raise CalibrationError(f"`{path}` is no calibration file; its name must end in {kinds}")
        if spec.split:
            raise UsageError(f"`{path}` is a file and has no splits; leave `split=` out")
        return _file_rows(path, reader)
    if reader is not None or not _HUB_NAME.fullmatch(spec.name):
        raise CalibrationError(f"no such file: `{spec.name}`")
    if difflib.get_close_matches(spec.name.lower(), [STDLIB], cutoff=0.7):
        note = "; other names are local files or hub data sets such as owner/name"
        raise unknown_name("dataset", spec.name, [STDLIB], note)
    return _hub_rows(spec, spec.name, local=False)


def first_line(error: Exception) -> str:
    """An error of somebody else's library, short enough to be part of one line of ours."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _parse_one(text: str) -> DatasetSpec:
    name, *options = _cut(text, ":")
    name = _unescape(name).strip()
    if not name:
        raise UsageError(f"dataset `{text}` has no name; write it like stdlib, my.jsonl:num=64")
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = _unescape(option).partition("=")
        key = key.strip().replace("-", "_")
        if key not in _KEYS:
            raise unknown_name(f"option of dataset `{name}`", key, _KEYS)
        if key in values:
            raise UsageError(f"option `{key}` of dataset `{name}` is given twice")
        values[key] = _value(name, key, value if equals else None)
    if values.get("system_prompt") is not None and values.get("apply_chat_template") is False:
        raise UsageError(f"dataset `{name}`: system_prompt needs apply_chat_template, not false")
    return DatasetSpec(name, **values)


def _value(name: str, key: str, value: str | None) -> Any:
    """The value of an option; None = the option was named without one."""
    if key == "num":
        if value and re.fullmatch("[0-9]{1,9}", value.strip()) and int(value) > 0:
            return int(value)
        raise UsageError(f"num of dataset `{name}` must be a positive whole number, got {value}")
    if key in ("concat", "apply_chat_template"):
        flag = _FLAGS.get(value.strip().lower()) if value is not None else True
        if flag is None:
            raise UsageError(f"{key} of dataset `{name}` must be true or false, got {value}")
        return flag
    if not value:
        raise UsageError(f"{key} of dataset `{name}` needs a value: {key}=...")
    if key == "split":
        splits = tuple(part.strip() for part in value.split("+"))
        if not all(splits):
            raise UsageError(f"split of dataset `{name}` must be names joined by +, got {value}")
        return splits
    return value


def _cut(text: str, separator: str) -> list[str]:
    """Split at each separator that no backslash precedes; the escapes stay for the next cut."""
    parts = [""]
    for piece in re.findall(r"\\[\\,:]|.", text, re.DOTALL):
        if piece == separator:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _escape(text: str) -> str:
    return re.sub(r"([\\,:])", r"\\\1", text)


def _unescape(text: str) -> str:
    return re.sub(r"\\([\\,:])", r"\1", text)


def _file_rows(path: str, reader: Callable[[str], Iterator[Any]]) -> Iterator[Any]:
    try:
        yield from reader(path)
    except UnicodeDecodeError:
        raise CalibrationError(f"`{path}` is not UTF-8 text; convert it first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"`{path}` cannot be read: {first_line(error)}") from None


def _text_rows(path: str) -> Iterator[str]:
    """Documents separated by a line with a NUL; without one the whole file is a document."""
    lines: list[str] = []
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if line.rstrip("\n") == "\0":
                yield "".join(lines).removesuffix("\n")
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)


def _json_rows(path: str) -> Iterator[Any]:
    """A list of rows, or JSON lines under the other name."""
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        yield from json.loads(text)
    else:
        yield from _json_lines(path)


def _json_lines(path: str) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                message = f"line {number} of `{path}` is no JSON: {error.msg}"
                raise CalibrationError(message) from None


def _parquet_rows(path: str) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        message = f"reading `{path}` needs pyarrow: pip install pyarrow"
        raise CalibrationError(message) from None
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[str], Iterator[Any]]] = {
    ".txt": _text_rows,
    ".json": _json_rows,
    ".jsonl": _json_lines,
    ".parquet": _parquet_rows,
}


def _hub_rows(spec: DatasetSpec, path: str, *, local: bool) -> Iterator[Any]:
    """Stream a data set of the hub, or a local folder in the hub's layout, through `datasets`."""
    try:
        import datasets
        from huggingface_hub import HfApi, constants
    except ImportError:
        message = f"dataset `{spec.name}` needs `pip install autoround-core[hf]`; or {_OFFLINE}"
        raise CalibrationError(message) from None
    try:
        if not (local or constants.HF_HUB_OFFLINE):
            # `datasets` tries for half a minute before it admits that there is no network
            HfApi().dataset_info(path, timeout=_PROBE_SECONDS)
        for split in spec.split or ("train",):
            # images as they lie there: one that is broken is then a row of its own, and has a name
            yield from datasets.load_dataset(path, split=split, streaming=True).decode(False)
    except Exception as error:  # network, hub and each kind of file bring errors of their own
        trouble = "read" if local or isinstance(error, ValueError) else "downloaded"
        message = f"dataset `{spec.name}` could not be {trouble} ({first_line(error)}); {_OFFLINE}"
        raise CalibrationError(message) from error
