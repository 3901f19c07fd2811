"""A GGUF file, opened without trusting it.

    "GGUF" | version u32 | tensors u64 | fields u64 | fields | tensor infos | padding | data

Every count and length is compared with what the file can hold, and with what any model needs, before memory is taken
for it. So a damaged or hostile file costs a message, not the machine. Versions 2 and 3 are read, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autoround_core import CheckpointError

if TYPE_CHECKING:
    import numpy

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_START = struct.Struct("<4sIQQ")
# values that are numbers: {number of the type in the file: (its name, how struct unpacks it)}
_SCALARS = {
    0: ("UINT8", "B"), 1: ("INT8", "b"), 2: ("UINT16", "H"), 3: ("INT16", "h"), 4: ("UINT32", "I"), 5: ("INT32", "i"),
    6: ("FLOAT32", "f"), 7: ("BOOL", "?"), 10: ("UINT64", "Q"), 11: ("INT64", "q"), 12: ("FLOAT64", "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_AXES = 4
# No model comes near these. They bound what a large, hostile file can make us build before it is found out.
_MAX_FIELDS = _MAX_TENSORS = 2**16
_MAX_ITEMS = 2**22  # of all arrays together: a vocabulary of a million takes three arrays
_MAX_HEADER = 2**26  # bytes
# the least that a field and a tensor take: a length, a type and a byte; a length, one axis, a type and an offset
_LEAST_FIELD, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    type: as ggml calls it, `Q4_K`. shape: outermost axis first. offset: from the start of the file. size: in bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


class GgufFile:
    """What a GGUF file says, and its tensors.

    fields: {key: value}; an array is a list. types: {key: type in the file}, `UINT32`, `ARRAY STRING`. tensors:
    {name: TensorInfo} in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for anything but a whole GGUF file (zeros after the last tensor may be missing)."""
        self.path = path
        try:
            # not exists(): a pipe or device would have us wait, or read for ever
            if not path.is_file():
                raise CheckpointError(f"`{shown(path)}` is no file; give the path of a .gguf file")
            size = path.stat().st_size
            if size < _START.size:
                raise CheckpointError(f"`{shown(path)}` is no GGUF file: it has {size} bytes")
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                self.fields, self.types, self.tensors = _parse(_Cursor(path, buffer))
        except OSError as error:
            raise CheckpointError(f"`{shown(path)}` cannot be read: {shown(error)}") from None

    def data(self, name: str) -> numpy.memmap:
        """The bytes of a tensor as they lie in the file, uint8 [rows, bytes of a row]; nothing is read yet."""
        import numpy

        info = self._info(name)
        rows = math.prod(info.shape[:-1])
        return numpy.memmap(self.path, numpy.uint8, "r", info.offset, (rows, info.size // rows))

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of floats, in memory and in its dtype. Raises CheckpointError for one of quantized blocks."""
        import numpy

        info = self._info(name)
        if info.type not in FLOAT_DTYPES:
            raise CheckpointError(
                f"`{shown(self.path)}` holds tensor `{shown(name)}` as {info.type}, not as {', '.join(FLOAT_DTYPES)}"
            )
        return torch.from_numpy(numpy.array(self.data(name))).view(FLOAT_DTYPES[info.type]).view(info.shape)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"`{shown(self.path)}` holds no tensor `{shown(name)}`")
        return self.tensors[name]


def shown(text: object, limit: int = 200) -> str:
    """What came from a file, fit for one line of a message: without control characters, and not endless."""
    text = str(text)
    cut = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in cut)


class _Cursor:
    """A place in the header. What lies beyond the header's end or limit is an error, never read."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self._path, self._buffer = path, buffer
        self.position = 0
        self.file_size = len(buffer)
        self._end = min(self.file_size, _MAX_HEADER)
        self._items = 0

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"`{shown(self._path)}` is no valid GGUF file: {what}; get or write it again")

    def claim(self, size: int, what: str) -> int:
        """Step over `size` bytes, return where they start."""
        if size > self._end - self.position:
            if size > self.file_size - self.position:
                raise self.wrong(f"{what} needs {size} bytes at byte {self.position}, the file has {self.file_size}")
            raise self.wrong(f"{what} goes beyond {_MAX_HEADER} bytes, more than any header has")
        start = self.position
        self.position += size
        return start

    def numbers(self, codes: str, what: str) -> tuple[Any, ...]:
        codes = "<" + codes
        return struct.unpack_from(codes, self._buffer, self.claim(struct.calcsize(codes), what))

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, what)[0]

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """In one loop without calls of our own: vocabularies have hundreds of thousands."""
        buffer, position, end, found = self._buffer, self.position, self._end, []
        length_at = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                # the position is stored where something is wrong, for the message
                if position + 8 > end:
                    self.position = position
                    self.claim(8, f"the length of {what}")
                (length,) = length_at(buffer, position)
                position += 8
                if length > end - position:
                    self.position = position
                    self.claim(length, f"the text of {what}")
                found.append(buffer[position : position + length].decode())
                position += length
        except UnicodeDecodeError:
            raise self.wrong(f"the text of {what} at byte {position} is not UTF-8") from None
        self.position = position
        return found

    def array(self, what: str) -> tuple[str, list[Any]]:
        """Its type and values."""
        kind, count = self.numbers("IQ", f"the array of {what}")
        if kind == _ARRAY:
            raise self.wrong(f"{what} is an array of arrays, which no model has")
        if kind != _STRING and kind not in _SCALARS:
            raise self.wrong(f"{what} is an array of unknown value type {kind}")
        least = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind][1])
        if count * least > self.file_size - self.position:
            raise self.wrong(f"{what} claims {count} values, more than the file has")
        self._items += count
        if self._items > _MAX_ITEMS:
            raise self.wrong(f"its arrays claim more than {_MAX_ITEMS} values by {what}, more than any vocabulary has")
        if kind == _STRING:
            return "ARRAY STRING", self.strings(count, what)
        name, code = _SCALARS[kind]
        return f"ARRAY {name}", list(self.numbers(f"{count}{code}", what))

    def value(self, kind: int, what: str) -> tuple[str, Any]:
        """Its type and the value."""
        if kind == _STRING:
            return "STRING", self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.wrong(f"{what} has unknown value type {kind}")
        name, code = _SCALARS[kind]
        return name, self.number(code, what)


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, str], dict[str, TensorInfo]]:
    magic, version, n_tensors, n_fields = cursor.numbers(_START.format.removeprefix("<"), "the start")
    if magic != _MAGIC:
        raise cursor.wrong(f"it starts with {magic!r}, not {_MAGIC!r}")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in _VERSIONS:
            raise cursor.wrong("it is big-endian, and only little-endian files are read")
        raise cursor.wrong(f"it has version {version}, and versions {' and '.join(map(str, _VERSIONS))} are read")
    for count, most, least, what in (
        (n_fields, _MAX_FIELDS, _LEAST_FIELD, "fields"), (n_tensors, _MAX_TENSORS, _LEAST_TENSOR, "tensors"),
    ):  # fmt: skip
        if count > most or count * least > cursor.file_size - cursor.position:
            raise cursor.wrong(f"it claims {count} {what}, more than the file has or any model needs")
    fields, types = _fields(cursor, n_fields)
    alignment = _alignment(cursor, fields, types)
    infos = _tensor_infos(cursor, n_tensors)
    start = -(-cursor.position // alignment) * alignment
    return fields, types, _placed(cursor, infos, start, alignment)


def _fields(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    fields, types = {}, {}
    for i in range(count):
        key = cursor.string(f"key {i}")
        what = f"`{shown(key)}`"
        if not key:
            # padding, read as one field too many, would look like this
            raise cursor.wrong(f"key {i} is empty")
        if key in fields:
            raise cursor.wrong(f"the key {what} appears twice")
        types[key], fields[key] = cursor.value(cursor.number("I", f"the type of {what}"), what)
    return fields, types


def _alignment(cursor: _Cursor, fields: dict[str, Any], types: dict[str, str]) -> int:
    if _ALIGNMENT not in fields:
        return _DEFAULT_ALIGNMENT
    if types[_ALIGNMENT] != "UINT32":
        raise cursor.wrong(f"`{_ALIGNMENT}` is {types[_ALIGNMENT]}, not UINT32")
    alignment = fields[_ALIGNMENT]
    if alignment == 0 or alignment & (alignment - 1):
        raise cursor.wrong(f"`{_ALIGNMENT}` is {alignment}, which is no power of two")
    return alignment


def _tensor_infos(cursor: _Cursor, count: int) -> list[TensorInfo]:
    """As in the file: offsets still count from the start of the data."""
    import gguf

    kinds = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    infos, names = [], set()
    for i in range(count):
        name = cursor.string(f"the name of tensor {i}")
        what = f"tensor `{shown(name)}`"
        if name in names:
            raise cursor.wrong(f"{what} appears twice")
        names.add(name)
        axes = cursor.number("I", what)
        if not 1 <= axes <= _MAX_AXES:
            raise cursor.wrong(f"{what} has {axes} axes, not 1 to {_MAX_AXES}")
        *shape, kind, offset = cursor.numbers(f"{axes}QIQ", what)
        if kind not in kinds:
            raise cursor.wrong(f"{what} has ggml type {kind}, which the installed `gguf` package does not know")
        infos.append(TensorInfo(name, kinds[kind][0], tuple(reversed(shape)), offset, _size(
            shape, *kinds[kind][1:], lambda problem, what=what: cursor.wrong(f"{what} {problem}")
        )))  # fmt: skip
    return infos


def _size(shape: list[int], block: int, block_bytes: int, wrong: Callable[[str], CheckpointError]) -> int:
    """Bytes of a tensor; shape: innermost axis first."""
    if 0 in shape:
        raise wrong("has an axis of length 0")
    if shape[0] % block:
        raise wrong(f"has rows of {shape[0]} numbers, which are no whole blocks of {block}")
    size = math.prod(shape) // block * block_bytes
    if size >= 2**63:
        raise wrong(f"has the shape {tuple(reversed(shape))}, larger than any file")
    return size


def _placed(cursor: _Cursor, infos: Iterable[TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
    """Offsets from the start of the file. Every tensor must lie in it, aligned, and alone."""
    tensors = {}
    for info in infos:
        what = f"tensor `{shown(info.name)}`"
        if info.offset % alignment:
            raise cursor.wrong(f"{what} starts at byte {info.offset} of the data, not at a multiple of {alignment}")
        if start + info.offset + info.size > cursor.file_size:
            raise cursor.wrong(f"{what} ends beyond the end of the file ({cursor.file_size} bytes)")
        tensors[info.name] = TensorInfo(info.name, info.type, info.shape, start + info.offset, info.size)
    by_place = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in pairwise(by_place):
        if before.offset + before.size > after.offset:
            raise cursor.wrong(f"tensors `{shown(before.name)}` and `{shown(after.name)}` overlap")
    return tensors
