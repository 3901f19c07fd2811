"""GGUF files that are whole are read as gguf's own reader reads them; all others are refused, at once and by name."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy
import pytest
import torch

from autoround_core import CheckpointError
from autoround_export.gguf.file import GgufFile, TensorInfo

U32, STR, ARR, U64 = 4, 8, 9, 10


def text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw)) + raw


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return field(key, U32, struct.pack("<I", value))


def info(name: str | bytes, ne: tuple[int, ...], kind: int = 0, offset: int = 0, axes: int | None = None) -> bytes:
    """ne: innermost axis first."""
    axes = len(ne) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", axes, *ne, kind, offset)


def built(fields: list[bytes] = (), infos: list[bytes] = (), data: int = 0, alignment: int = 32, **start) -> bytes:
    """A file by hand. start: what its first 24 bytes say instead of the truth."""
    head = struct.pack("<4sIQQ", start.get("magic", b"GGUF"), start.get("version", 3),
                       start.get("n_tensors", len(infos)), start.get("n_fields", len(fields)))  # fmt: skip
    head += b"".join(fields) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + bytes(range(256)) * (data // 256) + bytes(data % 256)


def opened(tmp_path: Path, content: bytes) -> GgufFile:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    return GgufFile(path)


GOOD = built([number("n", 7), field("s", STR, text("é"))], [info("w", (4, 2))], 32)

HOSTILE = {
    "empty": (b"", "0 bytes"),
    "short": (b"GGUF\3\0\0\0", "8 bytes"),
    "magic": (built(magic=b"GGML"), "GGML"),
    "version 0": (built(version=0), "version 0"),
    "version 1": (built(version=1), "version 1"),
    "version 99": (built(version=99), "version 99"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "many tensors": (built(n_tensors=2**63), f"{2**63} tensors"),
    "many fields": (built(n_fields=2**63), f"{2**63} fields"),
    "more fields": (built([number("n", 1)], n_fields=2), "key 1 is empty"),
    "long key": (built([struct.pack("<Q", 2**62) + bytes(30)]), "key 0"),
    "long string": (built([field("s", STR, struct.pack("<Q", 2**62))], data=64), f"`s` needs {2**62}|text of `s`"),
    "long array": (built([field("a", ARR, struct.pack("<IQ", U32, 2**61))], data=64), f"`a` claims {2**61}"),
    "longest array": (built([field("a", ARR, struct.pack("<IQ", U32, 2**64 - 1))], data=64), "`a` claims"),
    "long list": (built([field("a", ARR, struct.pack("<IQ", STR, 2**30))], data=64), f"`a` claims {2**30}"),
    "large array": (built([field("a", ARR, struct.pack("<IQ", 0, 2**22 + 1))], data=2**22 + 64), "more than 4194304"),
    "nested": (built([field("a", ARR, struct.pack("<IQIQ", ARR, 1, U32, 1) + bytes(4))]), "array of arrays"),
    "deep": (built([field("a", ARR, struct.pack("<IQ", ARR, 1) * 10**4)]), "array of arrays"),
    "value type": (built([field("x", 13, bytes(8))]), "value type 13"),
    "array type": (built([field("x", ARR, struct.pack("<IQ", 99, 1) + bytes(8))]), "value type 99"),
    "alignment 0": (built([number("general.alignment", 0)]), "is 0"),
    "alignment 24": (built([number("general.alignment", 24)]), "is 24"),
    "alignment type": (built([field("general.alignment", U64, struct.pack("<Q", 32))]), "UINT64, not UINT32"),
    "alignment text": (built([field("general.alignment", STR, text("32"))]), "STRING, not UINT32"),
    "two keys": (built([number("n", 1), number("n", 1)]), "`n` appears twice"),
    "two names": (built([], [info("w", (4,)), info("w", (4,), offset=32)], 64), "`w` appears twice"),
    "no axes": (built([], [info("w", (), axes=0) + bytes(64)]), "0 axes"),
    "five axes": (built([], [info("w", (1, 1, 1, 1, 1))], 32), "5 axes"),
    "all axes": (built([], [info("w", (1,), axes=2**32 - 1)], 32), f"{2**32 - 1} axes"),
    "axis 0": (built([], [info("w", (4, 0))], 32), "length 0"),
    "overflow": (built([], [info("w", (2**32, 2**32))], 32), "larger than any file"),
    "overflow of bytes": (built([], [info("w", (2**62,))], 32), "larger than any file"),
    "wide": (built([], [info("w", (2**63,) * 4)], 32), "larger than any file"),
    "no block": (built([], [info("w", (48, 2), kind=12)], 512), "blocks of 256"),
    "ggml type": (built([], [info("w", (4,), kind=4)], 32), "ggml type 4,"),
    "new ggml type": (built([], [info("w", (4,), kind=10**6)], 32), "ggml type 1000000,"),
    "unaligned": (built([], [info("w", (4,), offset=8)], 64), "multiple of 32"),
    "offset": (built([], [info("w", (4,), offset=2**63)], 64), "beyond the end"),
    "end": (built([], [info("w", (9,))], 32), "beyond the end"),
    "overlap": (built([], [info("w", (16,)), info("v", (4,), offset=32)], 64), "`w` and `v` overlap"),
    "same place": (built([], [info("w", (4,)), info("v", (4,))], 64), "overlap"),
    "key not UTF-8": (built([field(b"\xff\xfe", U32, bytes(4))]), "key 0 .* not UTF-8"),
    "text not UTF-8": (built([field("s", STR, text(b"\xc3"))]), "`s` .* not UTF-8"),
    "list not UTF-8": (built([field("s", ARR, struct.pack("<IQ", STR, 1) + text(b"\x80"))]), "`s` .* not UTF-8"),
    "name not UTF-8": (built([], [info(b"\xff", (4,))], 32), "tensor 0 .* not UTF-8"),
}


def test_what_lies_in_a_file_made_by_hand(tmp_path):
    file = opened(tmp_path, GOOD)
    assert (file.fields, file.types) == ({"n": 7, "s": "é"}, {"n": "UINT32", "s": "STRING"})
    # 24 bytes of start, 17 and 23 of fields, 41 of the tensor are 105; the next multiple of 32 is 128
    assert file.tensors == {"w": TensorInfo("w", "F32", (2, 4), 128, 32)}
    assert file.data("w").shape == (2, 16) and file.tensor("w").shape == (2, 4)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_at_once_in_one_line(tmp_path, case):
    content, says = HOSTILE[case]
    opened(tmp_path, GOOD)  # what is imported on first use is not counted
    path = tmp_path / "b.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"(?s)b\\.gguf.*({says})") as caught:
        GgufFile(path)
    took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).isprintable() and took < 0.1 and peak < 10e6


def test_counts_that_only_a_huge_sparse_file_could_hold(tmp_path):
    cases = [(built([field("a", ARR, struct.pack("<IQ", kind, 2**32))]), "than 4194304 val") for kind in (0, STR, U64)]
    cases += [(built([field("s", STR, struct.pack("<Q", 2**32))]), "more than any header has")]
    cases += [(built(n_tensors=2**17), "131072 tensors"), (built(n_fields=2**17), "131072 fields")]
    path = tmp_path / "a.gguf"
    for content, says in cases:
        path.write_bytes(content)
        os.truncate(path, 2**36)
        with pytest.raises(CheckpointError, match=says):
            GgufFile(path)


def test_every_truncation_is_refused(tmp_path):
    for length in range(len(GOOD)):
        with pytest.raises(CheckpointError):
            opened(tmp_path, GOOD[:length])


def test_a_directory_a_missing_file_and_an_unknown_tensor(tmp_path):
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(CheckpointError, match=path.name):
            GgufFile(path)
    with pytest.raises(CheckpointError, match="no tensor `v`"):
        opened(tmp_path, GOOD).data("v")


def test_names_cannot_write_to_the_terminal(tmp_path):
    for bad in (built([number("a\x1b[2J\nb\u2028", 1)] * 2), built([], [info("a\x1b[2J\nb\u2028", (3,), kind=12)], 32)):
        with pytest.raises(CheckpointError) as caught:
            opened(tmp_path, bad)
        assert str(caught.value).isprintable() and r"`a\x1b[2J\nb\u2028`" in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, built([number("k" * 10**6, 1)] * 2))
    assert len(str(caught.value)) < 500


def test_version_2_and_every_type_of_value(tmp_path):
    values = {"UINT8": (0, "B", 255), "INT8": (1, "b", -128), "UINT16": (2, "H", 65535), "INT16": (3, "h", -7),
              "UINT32": (4, "I", 2**32 - 1), "INT32": (5, "i", -1), "FLOAT32": (6, "f", 0.5), "BOOL": (7, "?", True),
              "UINT64": (10, "Q", 2**64 - 1), "INT64": (11, "q", -(2**63)), "FLOAT64": (12, "d", 0.1)}  # fmt: skip
    fields = [field("none", ARR, struct.pack("<IQ", STR, 0))]
    for name, (kind, code, value) in values.items():
        fields += [field(name, kind, struct.pack("<" + code, value)),
                   field(f"{name}s", ARR, struct.pack("<IQ2" + code, kind, 2, value, value))]  # fmt: skip
    file = opened(tmp_path, built(fields, version=2))
    alone = {name: value for name, (_, _, value) in values.items()}
    assert file.fields == {**alone, **{f"{name}s": [value] * 2 for name, value in alone.items()}, "none": []}
    assert {file.types[name] for name in values} == set(values)
    assert file.types["UINT8s"] == "ARRAY UINT8"


def written(path: Path, alignment: int = 32) -> dict[str, numpy.ndarray]:
    """A file of gguf's own writer, with the tensors that it was given."""
    generator, tensors = numpy.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_name("ein Modell")
    writer.add_block_count(3)
    writer.add_rope_freq_base(10000.0)
    writer.add_add_bos_token(False)
    writer.add_token_list(["a", "Ġb", "日本"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    writer.add_token_types([1, 1, 3])
    for name, kind, shape in (
        ("plain", "F32", (3, 5)), ("half", "F16", (2, 3, 8)), ("brain", "BF16", (2, 16)), ("vector", "F32", (7,)),
        ("four", "Q4_0", (4, 64)), ("eight", "Q8_0", (2, 3, 32)), ("deep", "F32", (2, 1, 3, 4)),
    ):  # fmt: skip
        kind = gguf.GGMLQuantizationType[kind]
        tensors[name] = gguf.quants.quantize(generator.standard_normal(shape).astype(numpy.float32), kind)
        writer.add_tensor(name, tensors[name], raw_dtype=kind)
    finished(writer)
    return tensors


def finished(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_files_of_gguf_read_as_gguf_reads_them(tmp_path, alignment):
    path = tmp_path / "a.gguf"
    given = written(path, alignment)
    file, reader = GgufFile(path), gguf.GGUFReader(path)
    assert file.fields == {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(file.tensors.values()) == [
        TensorInfo(t.name, t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    for name, packed in given.items():
        assert file.data(name).tobytes() == packed.tobytes()
        assert file.data(name).shape[0] == numpy.prod(file.tensors[name].shape[:-1], dtype=int)


def test_floats_come_back_as_tensors_and_blocks_do_not(tmp_path):
    path = tmp_path / "a.gguf"
    given = written(path)
    file = GgufFile(path)
    for name in ("plain", "vector", "deep", "half"):
        assert torch.equal(file.tensor(name), torch.from_numpy(given[name]))
    brain = file.tensor("brain")
    assert brain.dtype == torch.bfloat16 and brain.shape == (2, 16)
    # bfloat16 is the upper half of a float32
    upper = given["brain"].view(numpy.uint16).astype(numpy.uint32) << 16
    assert torch.equal(brain.float(), torch.from_numpy(upper.view(numpy.float32)))
    with pytest.raises(CheckpointError, match="`four` as Q4_0"):
        file.tensor("four")


def test_large_vocabularies_parse_fast(tmp_path):
    tokens = [f"token{i}" for i in range(256_000)]
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    finished(writer)
    start = time.process_time()
    file = GgufFile(path)
    assert time.process_time() - start < 1.5
    assert file.fields["tokenizer.ggml.tokens"] == tokens


def mutated(content: bytearray, header: int, random: random.Random) -> bytes:
    """One to three changes: of bytes, of words set to telling values, of places, of the length."""
    for _ in range(random.randint(1, 3)):
        at = random.randrange(header)
        match random.randrange(5):
            case 0:
                content[at] ^= 1 << random.randrange(8)
            case 1:
                word = random.choice((0, 1, 2, 9, 31, 2**16, 2**22, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
                content[at : at + 8] = struct.pack("<Q", word)
            case 2:
                del content[at : at + random.randint(1, 16)]
            case 3:
                piece = random.randrange(header)
                content[at:at] = content[piece : piece + random.randint(1, 64)]
            case _:
                del content[random.randrange(len(content)) :]
        header = min(header, len(content))
        if not content:
            break
    return bytes(content)


def test_mutated_headers_parse_or_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    written(path)
    content = path.read_bytes()
    header = min(info.offset for info in GgufFile(path).tensors.values())
    generator = random.Random(0)
    refused = slowest = 0
    tracemalloc.start()
    for _ in range(2000):
        path.write_bytes(mutated(bytearray(content), header, generator))
        start = time.process_time()
        try:
            file = GgufFile(path)
        except CheckpointError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            for name in file.tensors:
                assert file.data(name).size == file.tensors[name].size
        slowest = max(slowest, time.process_time() - start)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # most changes are felt; those inside names, numbers and weights are not
    assert 1000 < refused < 2000 and slowest < 0.25 and peak < 10e6
