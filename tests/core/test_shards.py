"""Shards: what is written is read, in any number of files; broken and hostile directories are refused."""

from __future__ import annotations

import itertools
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from autoround_core.errors import CheckpointError
from autoround_core.shards import INDEX, SINGLE, ShardWriter, TensorFiles, read_json, weight_files, write_json


def tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write(directory, tensors, max_bytes=10**9):
    writer = ShardWriter(directory, max_bytes)
    for name, value in tensors.items():
        writer.add(name, value)
    writer.finish()
    return writer


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


# --- writing and reading ------------------------------------------------------------------------------------


def test_a_small_checkpoint_is_one_file_without_an_index(tmp_path):
    tensors = {"b": tensor(3, 4), "a": torch.arange(5), "c": torch.tensor([True, False])}
    writer = write(tmp_path, tensors)
    assert listing(tmp_path) == [SINGLE]
    assert writer.total_bytes == 48 + 40 + 2
    stored = load_file(tmp_path / SINGLE)
    assert stored.keys() == tensors.keys() and all(
        torch.equal(stored[name], tensors[name]) for name in tensors
    )


def test_several_shards_have_an_index_that_engines_read(tmp_path):
    tensors = {f"t{i}": tensor(8, seed=i) for i in range(5)}  # 32 bytes each
    writer = write(tmp_path, tensors, max_bytes=64)
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert listing(tmp_path) == [*names, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 160} and writer.total_bytes == 160
    assert index["weight_map"] == {
        "t0": names[0],
        "t1": names[0],
        "t2": names[1],
        "t3": names[1],
        "t4": names[2],
    }
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert weight_files(tmp_path) == [tmp_path / name for name in names]


@given(sizes=st.lists(st.integers(0, 40), max_size=12), limit=st.integers(1, 120))
def test_no_shard_is_larger_than_asked_unless_one_tensor_is(tmp_path_factory, sizes, limit):
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"layer.{i}": tensor(size, seed=i) for i, size in enumerate(sizes)}
    write(directory, tensors, max_bytes=limit)
    shards = [load_file(path) for path in weight_files(directory)]
    for shard in shards:
        assert (
            sum(value.numel() * 4 for value in shard.values()) <= limit
            or sum(v.numel() > 0 for v in shard.values()) == 1
        )
    files = TensorFiles(directory)
    assert sorted(files.names()) == sorted(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in files.items(files.names()))
    for one, other in itertools.pairwise(shards):
        total = sum(value.numel() * 4 for shard in (one, other) for value in shard.values())
        assert total > limit  # neighbours that fit into one file are in one


def test_nothing_to_store_is_an_empty_file(tmp_path):
    write(tmp_path, {})
    assert listing(tmp_path) == [SINGLE] and TensorFiles(tmp_path).names() == []


def test_views_are_stored_without_what_they_look_into_and_transposed_ones_as_they_read(tmp_path):
    block = tensor(100, 100)
    write(tmp_path, {"row": block[3], "column": block[:, 4], "part": block[10:20, 10:20].T, "same": block[3]})
    files = TensorFiles(tmp_path)
    assert torch.equal(files.get("column"), block[:, 4]) and torch.equal(
        files.get("part"), block[10:20, 10:20].T
    )
    assert torch.equal(files.get("row"), files.get("same"))
    assert (tmp_path / SINGLE).stat().st_size < 4000


def test_a_tensor_may_change_after_it_was_added(tmp_path):
    value = torch.zeros(4)
    writer = ShardWriter(tmp_path)
    writer.add("a", value)
    value.fill_(1.0)
    writer.finish()
    assert TensorFiles(tmp_path).get("a").tolist() == [0.0] * 4


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8, torch.int8]
)
def test_dtypes_survive(tmp_path, dtype):
    value = torch.arange(6).to(dtype)
    write(tmp_path, {"a": value})
    got = TensorFiles(tmp_path).get("a")
    assert got.dtype == dtype and torch.equal(got, value)


def test_a_name_is_stored_once_even_across_shards(tmp_path):
    writer = ShardWriter(tmp_path, max_bytes=8)
    writer.add("a", torch.zeros(4))
    writer.add("b", torch.zeros(4))
    for name in ("a", "b"):
        with pytest.raises(CheckpointError, match=f"tensor `{name}` would be stored twice"):
            writer.add(name, torch.zeros(4))


def test_membership_and_missing_names(tmp_path):
    write(tmp_path, {"a": torch.zeros(1)})
    files = TensorFiles(tmp_path)
    assert "a" in files and "b" not in files
    with pytest.raises(CheckpointError, match="holds no tensor `b`"):
        files.get("b")


# --- broken directories -------------------------------------------------------------------------------------


def indexed(directory, weight_map):
    write_json(directory / INDEX, {"metadata": {}, "weight_map": weight_map})


@pytest.fixture
def two(tmp_path):
    """A directory with two shards, `a` in one and `b` in the other."""
    write(tmp_path, {"a": tensor(4), "b": tensor(4, seed=1)}, max_bytes=16)
    return tmp_path


def test_an_empty_directory(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"holds no model.safetensors and no model.safetensors.index.json"
    ):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt"])
def test_pickle_files_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickle files .* can run code .* convert them to safetensors"):
        TensorFiles(tmp_path)


def test_pickle_files_beside_safetensors_do_not_matter(two):
    (two / "pytorch_model.bin").write_bytes(b"x")
    assert sorted(TensorFiles(two).names()) == ["a", "b"]


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1, -8])
def test_a_truncated_file(tmp_path, keep):
    write(tmp_path, {"a": tensor(64)})
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is no complete safetensors file"):
        TensorFiles(tmp_path)


def test_a_truncated_shard_is_named(two):
    path = two / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors` is no complete"):
        TensorFiles(two)


@pytest.mark.parametrize(
    "header",
    [
        b"{}x",
        b"[]",
        b"\xff\xfe",
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99999]}}',
        b'{"a": {"dtype": "F32", "shape": [400], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}',
    ],
)
def test_a_header_that_lies(tmp_path, header):
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match="is no complete safetensors file"):
        TensorFiles(tmp_path)


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="is no complete safetensors file"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "a\0b"]
)
def test_an_index_may_only_name_plain_files(two, name):
    save_file({"c": torch.zeros(1)}, two.parent / "x.safetensors")
    (two / "sub").mkdir()
    save_file({"c": torch.zeros(1)}, two / "sub" / "x.safetensors")
    indexed(two, {"a": "model-00001-of-00002.safetensors", "c": name})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        TensorFiles(two)


def test_an_index_that_names_a_missing_file(two):
    (two / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names `model-00002-of-00002\.safetensors`, which is missing"):
        TensorFiles(two)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}', "3"]
)
def test_an_index_without_a_weight_map(two, content):
    (two / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        TensorFiles(two)


def test_an_index_that_names_a_tensor_no_file_holds(two):
    indexed(two, {"a": "model-00001-of-00002.safetensors", "z": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"names tensor `z`, which no file holds"):
        TensorFiles(two)


@pytest.mark.parametrize("value", [7, None, ["model.safetensors"], {"x": 1}])
def test_an_index_that_maps_to_something_else_than_a_name(two, value):
    indexed(two, {"a": "model-00001-of-00002.safetensors", "b": value})
    with pytest.raises(CheckpointError, match=r"missing|not a plain file name"):
        TensorFiles(two)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"weights"])
def test_an_index_that_is_no_json(two, content):
    (two / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match="no valid JSON"):
        TensorFiles(two)


def test_one_tensor_in_two_shards(tmp_path):
    for i in (1, 2):
        save_file({"a": torch.zeros(i), f"own{i}": torch.zeros(1)}, tmp_path / f"{i}.safetensors")
    indexed(tmp_path, {"a": "1.safetensors", "own1": "1.safetensors", "own2": "2.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor `a` is in both 1.safetensors and 2.safetensors"):
        TensorFiles(tmp_path)


# --- json ---------------------------------------------------------------------------------------------------


def test_json_there_and_back(tmp_path):
    content = {"b": [1, 2.5, None], "a": {"ü": True}}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json") == content
    assert text.endswith("}\n") and "ü" in text and text.index('"b"') < text.index('"a"')


def test_a_missing_json_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"x.json` is missing"):
        read_json(tmp_path / "x.json")
