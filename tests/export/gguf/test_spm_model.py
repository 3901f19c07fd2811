"""tokenizer.model, written here byte by byte."""

from __future__ import annotations

import struct

import pytest

from autoround_core import ModelError, UnsupportedError
from autoround_export.gguf.tokenizer import tokenizer_fields

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KEY = "tokenizer.ggml."


def message(*parts):
    """A protocol buffer: (field, value) with numbers, floats, or bytes."""
    out = b""
    for field, value in parts:
        if isinstance(value, float):
            out += bytes([field << 3 | 5]) + struct.pack("<f", value)
            continue
        kind, number = (0, value) if isinstance(value, int) else (2, len(value))
        for part in (field << 3 | kind, number):
            while part > 127:
                out, part = out + bytes([part & 127 | 128]), part >> 7
            out += bytes([part])
        out += b"" if kind == 0 else value
    return out


def test_tokenizer_model_alone(tmp_path):
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((token, 0.0, 6) for token in BYTES)]
    pieces += [("▁a", -1.5, 1), ("▁", -2.0, 1), ("a▁b", 0.0, 4)]
    body = [(1, message((1, token.encode()), (2, score), (3, kind))) for token, score, kind in pieces]
    body += [(2, message((3, 2), (41, 1), (42, 2), (43, 2**64 - 1))), (3, message((1, b"identity"), (3, 0), (4, 0)))]
    (tmp_path / "tokenizer.model").write_bytes(message(*body))
    fields = tokenizer_fields(tmp_path, {}, 263)
    assert fields[KEY + "model"] == "llama" and fields[KEY + "add_space_prefix"] is False
    assert fields[KEY + "tokens"][259:] == ["▁a", "▁", "a b", "[PAD262]"]
    assert fields[KEY + "token_type"] == [2, 3, 3] + [6] * 256 + [1, 1, 4, 5]
    assert fields[KEY + "scores"][259:261] == [-1.5, -2.0]
    assert [fields[f"{KEY}{name}_token_id"] for name in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert KEY + "padding_token_id" not in fields and fields[KEY + "add_bos_token"] is True
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for damaged in (whole[:-3], b"\x0b" + whole, b"\xff" * 40, message((1, b"\x0a"))):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(ModelError, match="no model of SentencePiece"):
            tokenizer_fields(tmp_path, {}, 263)


def test_a_unigram_model(tmp_path):
    pieces = [(1, message((1, text.encode()), (2, score), (3, kind))) for text, score, kind in
              (("<unk>", 0.0, 2), ("a", -1.0, 1))]  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(message(*pieces, (2, message((3, 1))), (3, message((1, b"identity")))))
    fields = tokenizer_fields(tmp_path, {}, 2)
    assert fields[KEY + "model"] == "t5" and fields[KEY + "tokens"] == ["<unk>", "a"]
    assert fields[KEY + "add_space_prefix"] is True and fields[KEY + "remove_extra_whitespaces"] is True


@pytest.mark.parametrize(
    ("training", "rules", "reason"),
    [
        ([(3, 2)], [(4, 0)], "token for each byte"),
        ([(3, 2)], [(4, 1)], "several spaces for one"),
        ([(3, 3)], [], "words or characters"),
        ([(3, 1)], [(1, b"nmt_nfkc"), (2, b"xyz")], "rules `nmt_nfkc`"),
    ],
)
def test_models_that_a_gguf_file_cannot_hold(tmp_path, training, rules, reason):
    piece = message((1, b"a"), (2, 0.0))
    (tmp_path / "tokenizer.model").write_bytes(message((1, piece), (2, message(*training)), (3, message(*rules))))
    with pytest.raises(UnsupportedError, match=reason):
        tokenizer_fields(tmp_path, {}, 1)
