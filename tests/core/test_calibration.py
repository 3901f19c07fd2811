"""Calibration sets: the specification, reading each kind of data, packing, and errors that help."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoround_core.calibration import DEFAULT_DATASET, load_calibration, pack
from autoround_core.documents import DatasetSpec, open_rows, parse_datasets, share_rows
from autoround_core.errors import AutoRoundError, CalibrationError, UnknownNameError, UsageError

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
EOS = 0
unhurried = settings(deadline=None, max_examples=50)  # a loaded machine is no failure


class CharTokenizer:
    """One token a character, so that what a row holds can be read."""

    eos_token_id = EOS
    chat_template = None

    def __len__(self):
        return 128

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert verbose is False
        return {"input_ids": [ord(char) for char in text]}


class ChatTokenizer(CharTokenizer):
    chat_template = "there is one"

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def load(dataset, nsamples=1, seqlen=4, tokenizer=None, **options):
    tokenizer = tokenizer or CharTokenizer()
    return load_calibration(dataset, tokenizer, nsamples=nsamples, seqlen=seqlen, **options)


def rows_as_text(calibration):
    return ["".join(map(chr, row)).replace(chr(EOS), "|") for row in calibration.input_ids.tolist()]


# --- the specification ---------------------------------------------------------------------------

names = st.text(min_size=1, max_size=20).map(str.strip).filter(bool)
specs = st.builds(
    DatasetSpec,
    name=names,
    num=st.none() | st.integers(1, 10**8),
    split=st.lists(names.filter(lambda name: "+" not in name), max_size=3).map(tuple),
    concat=st.booleans(),
    apply_chat_template=st.booleans(),
    system_prompt=st.none() | st.text(min_size=1, max_size=20),
)


@unhurried
@given(st.lists(specs, min_size=1, max_size=3))
def test_a_specification_is_read_back_as_it_was_written(given_specs):
    assert parse_datasets(",".join(map(str, given_specs))) == tuple(given_specs)


options = st.sampled_from(["num", "split", "concat", "system_prompt", "=", ":", ",", "\\", "true"])


@unhurried
@given(st.lists(options | st.text(max_size=4), max_size=12).map("".join))
def test_any_text_is_a_specification_or_a_usage_error_of_one_line(text):
    try:
        assert parse_datasets(text)
    except UsageError as error:
        assert "\n" not in str(error) or "\n" in text


def test_the_grammar_by_example():
    assert parse_datasets(
        "NeelNanda/pile-10k:num=64, ./a.jsonl:concat=TRUE:split=x+y,b:apply-chat-template,"
        "c:concat=false:system_prompt=Be kind\\, brief\\: yes=no,C\\:\\dir\\f.txt"
    ) == (
        DatasetSpec("NeelNanda/pile-10k", num=64),
        DatasetSpec("./a.jsonl", concat=True, split=("x", "y")),
        DatasetSpec("b", apply_chat_template=True),
        DatasetSpec("c", system_prompt="Be kind, brief: yes=no"),
        DatasetSpec("C:\\dir\\f.txt"),
    )
    assert DatasetSpec("c", system_prompt="x").templated


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no name"),
        ("a,,b", "has no name"),
        (":num=3", "has no name"),
        ("a:nmu=3", "did you mean `num`"),
        ("a:", "unknown option"),
        ("a:num", "num of dataset `a` must be a positive whole number"),
        ("a:num=0", "got 0"),
        ("a:num=-1", "got -1"),
        ("a:num=" + "9" * 5000, "whole number"),
        ("a:split", "needs a value"),
        ("a:split=b+", "joined by +"),
        ("a:concat=maybe", "true or false"),
        ("a:concat:concat=false", "twice"),
        ("a:system_prompt=", "needs a value"),
        ("a:system_prompt=x:apply_chat_template=false", "not false"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(text, message):
    with pytest.raises(UsageError) as error:
        parse_datasets(text)
    assert message in str(error.value)


@unhurried
@given(st.lists(st.none() | st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 200))
def test_shares_keep_what_is_fixed_and_split_the_rest_evenly(numbers, nsamples):
    wanted = [DatasetSpec("a", num=number) for number in numbers]
    try:
        shares = share_rows(wanted, nsamples)
    except UsageError:
        rest, free = nsamples - sum(n or 0 for n in numbers), numbers.count(None)
        assert rest < free or (rest > 0 and not free)
        return
    assert sum(shares) == nsamples
    free = [share for share, number in zip(shares, numbers, strict=True) if number is None]
    assert all(s == n for s, n in zip(shares, numbers, strict=True) if n is not None)
    assert not free or (min(free) >= 1 and max(free) - min(free) <= 1 and free[0] == max(free))


# --- packing -------------------------------------------------------------------------------------

letters = st.characters(min_codepoint=97, max_codepoint=122)


@unhurried
@given(st.lists(st.text(letters, max_size=6), max_size=20), st.integers(7, 12))
def test_every_token_of_short_documents_is_in_a_row_or_counted_as_unused(texts, seqlen):
    kept = [text for text in texts if text]
    stream = chr(EOS).join(kept)
    count = len(stream) // seqlen
    assume(count)
    calibration = load(texts, count, seqlen)
    assert "".join(map(chr, calibration.input_ids.flatten().tolist())) == stream[: count * seqlen]
    # with more rows asked for, nothing is left unread
    packed = pack([([*map(ord, text)], EOS) for text in texts], count + 1, seqlen)
    assert packed.rows == calibration.input_ids.tolist()
    assert count * seqlen + packed.unused == len(stream)
    assert packed.documents == len(kept)


@unhurried
@given(st.lists(st.lists(st.integers(1, 99), max_size=20), max_size=15), st.integers(2, 9))
def test_with_concat_every_token_of_every_document_is_conserved(documents, seqlen):
    stream = list(itertools.chain(*documents))
    packed = pack([(ids, None) for ids in documents], 10**6, seqlen, concat=True)
    assert list(itertools.chain(*packed.rows)) == stream[: len(packed.rows) * seqlen]
    assert packed.unused == len(stream) - len(packed.rows) * seqlen < seqlen
    assert (packed.tokens, packed.documents) == (len(stream), sum(map(bool, documents)))


@unhurried
@given(
    st.lists(st.integers(0, 20), max_size=12), st.integers(2, 9), st.integers(1, 30), st.booleans()
)
def test_rows_are_disjoint_pieces_of_the_data(lengths, seqlen, wanted, concat):
    fresh = itertools.count(1)  # every token of the data is another number
    documents = [list(itertools.islice(fresh, length)) for length in lengths]
    packed = pack([(ids, EOS) for ids in documents], wanted, seqlen, concat=concat)
    flat = [token for row in packed.rows for token in row if token != EOS]
    assert len(flat) == len(set(flat))
    assert all(len(row) == seqlen for row in packed.rows)
    assert len(packed.rows) <= wanted
    if not concat:
        possible = sum(len(ids) // seqlen for ids in documents if len(ids) >= seqlen)
        assert len(packed.rows) >= min(wanted, possible)


def test_rows_keep_the_order_of_the_data():
    calibration = load(["abcdef", "gh", "ijklm", "no", "pqrst"], nsamples=4)
    # "gh|no" is full only when "no" has come
    assert rows_as_text(calibration) == ["abcd", "ijkl", "gh|n", "pqrs"]
    assert (calibration.documents, calibration.unused_tokens) == (5, 1)


def test_one_long_text_gives_many_rows_and_several_take_turns():
    assert rows_as_text(load(["abcdefghijklmn"], nsamples=3)) == ["abcd", "efgh", "ijkl"]
    calibration = load(["abcdefghijkl", "ABCDEFGH"], nsamples=5)
    assert rows_as_text(calibration) == ["abcd", "ABCD", "efgh", "EFGH", "ijkl"]


def test_a_separator_that_the_tokenizer_wrote_itself_is_not_doubled():
    packed = pack([([5, EOS], EOS), ([6, EOS], EOS), ([7], EOS)], 1, 5)
    assert packed.rows == [[5, EOS, 6, EOS, 7]]


def test_a_tokenizer_without_end_of_text_joins_directly():
    tokenizer = CharTokenizer()
    tokenizer.eos_token_id = None
    assert rows_as_text(load(["ab", "cd"], tokenizer=tokenizer)) == ["abcd"]


def test_reading_stops_as_soon_as_there_are_enough_rows():
    def endless():
        for index in itertools.count():
            assert index < 3, "read too far"
            yield "abcdef"

    assert load(endless(), nsamples=3).documents == 3


def test_concat_joins_long_documents(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["abcdef", "gh"]))
    assert rows_as_text(load(f"{path}:concat", nsamples=2)) == ["abcd", "ef|g"]


def test_rows_of_token_ids_stay_as_they_are():
    rows = [[1, 2, 3, 4], [5, 6, 7, 8]]
    for given_rows in (
        rows,
        [torch.tensor(row) for row in rows],
        [torch.tensor([row]) for row in rows],
        torch.tensor(rows),
        torch.tensor(rows).numpy(),
        [{"input_ids": row} for row in rows],
        [{"input_ids": torch.tensor([row])} for row in rows],
        [{"input_ids": [0, *row], "attention_mask": [0, 1, 1, 1, 1]} for row in rows],
    ):
        calibration = load_calibration(given_rows, None, nsamples=2, seqlen=4)
        assert calibration.input_ids.tolist() == rows
        assert calibration.input_ids.dtype == torch.int64
        assert calibration.unused_tokens == 0


def test_the_digest_names_tokens_and_shape():
    one, same = load(["abcdefgh"], nsamples=2), load(["abcd", "efgh"], nsamples=2)
    reshaped, other = load(["abcdefgh"], seqlen=8), load(["abcdefgx"], nsamples=2)
    assert one.sha256 == same.sha256
    assert len({one.sha256, reshaped.sha256, other.sha256}) == 3
    numbers = b"".join(ord(char).to_bytes(8, "little") for char in "abcdefgh")
    assert one.sha256 == hashlib.sha256(b"2x4:" + numbers).hexdigest()
    assert (one.samples, one.seqlen, one.tokens) == (2, 4, 8)


def test_several_data_sets_share_the_rows_and_are_shuffled_by_the_seed(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 40)
    text = f"{tmp_path}/a.txt:num=1,{tmp_path}/b.txt,{tmp_path}/c.txt"
    calibration = load(text, nsamples=6)
    expected = ["aaaa", "bbbb", "bbbb", "bbbb", "cccc", "cccc"]
    random.Random(42).shuffle(expected)
    assert rows_as_text(calibration) == expected
    assert calibration.sha256 == load(text, nsamples=6, seed=42).sha256
    assert calibration.sha256 != load(text, nsamples=6, seed=43).sha256
    assert (calibration.source, calibration.documents) == (text, 3)
    with pytest.raises(CalibrationError, match=r"b.txt` gives 10 rows .* or pass :num=10 or"):
        load(text, nsamples=41)


# --- reading -------------------------------------------------------------------------------------


lines = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"))


@unhurried
@given(documents=st.lists(lines, min_size=1))
def test_a_text_file_gives_the_documents_between_its_nul_lines(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes("\n\0\n".join(documents).encode())
    assume(not documents[0].startswith("\ufeff"))
    assert list(open_rows(DatasetSpec(str(path)))) == documents


ROWS = [{"text": "abcd", "id": 1}, {"text": "efgh", "id": 2}]


def write_parquet(path, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "lines.json", "list.json", "text.json"])
def test_each_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / kind
    if kind == "a.parquet":
        write_parquet(path, ROWS)
    elif kind == "list.json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")
    elif kind == "text.json":
        path.write_text(json.dumps([row["text"] for row in ROWS]))
    else:
        path.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    assert rows_as_text(load(str(path), nsamples=2)) == ["abcd", "efgh"]


def test_a_parquet_file_of_token_ids_needs_no_tokenizer(tmp_path):
    write_parquet(tmp_path / "ids.parquet", [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    calibration = load_calibration(f"{tmp_path}/ids.parquet", None, nsamples=1, seqlen=4)
    assert calibration.input_ids.tolist() == [[1, 2, 3, 4]]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CalibrationError, match="pip install pyarrow"):
        load(f"{tmp_path}/a.parquet")


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "option", "text"),
    [
        ({"messages": CHAT, "text": "no"}, "", "hi\nyo"),
        ({"messages": CHAT}, ":apply_chat_template", "<user>hi<assistant>yo"),
        ({"messages": CHAT}, ":system_prompt=S\\:", "<system>S:<user>hi<assistant>yo"),
        ({"messages": [{"role": "system", "content": "Q"}]}, ":system_prompt=S", "<system>Q"),
        ({"text": "abc"}, ":apply_chat_template=true", "<user>abc"),
        ({"text": "abc"}, ":apply_chat_template=false", "abc"),
    ],
)
def test_conversations_and_the_chat_template(tmp_path, row, option, text):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    calibration = load(f"{tmp_path}/a.jsonl{option}", 1, len(text), ChatTokenizer())
    assert rows_as_text(calibration) == [text]


def test_the_offline_corpus_and_its_parts():
    calibration = load("stdlib", 2, 16, AsciiTokenizer())
    evaluation = load("stdlib:split=evaluation", 2, 16, AsciiTokenizer())
    assert calibration.sha256 != evaluation.sha256
    with pytest.raises(UnknownNameError, match="evaluation"):
        load("stdlib:split=evaluate")
    with pytest.raises(UsageError, match="one split"):
        load("stdlib:split=calibration+evaluation")


class AsciiTokenizer(CharTokenizer):
    def __call__(self, text, **options):
        return {"input_ids": [min(ord(char), 127) for char in text]}


# --- the hub, without a network ------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """The libraries of the hub, with every request failing."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    def unreachable(self, name, timeout):
        raise TimeoutError("no route\nto host")

    def never(*args, **options):
        raise AssertionError("must not be tried when the hub is out of reach")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", never)
    return monkeypatch


def test_a_hub_out_of_reach_is_one_line_that_offers_the_offline_corpus(hub):
    with pytest.raises(CalibrationError) as error:
        load(DEFAULT_DATASET)
    assert str(error.value) == (
        "dataset `NeelNanda/pile-10k` could not be downloaded (TimeoutError: no route); "
        "pass `--dataset stdlib` (the offline corpus) or a local file"
    )


def test_offline_mode_fails_quickly():
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        start = time.monotonic()
        with pytest.raises(CalibrationError, match="--dataset stdlib"):
            load("nobody/nothing-of-this-name")
    assert time.monotonic() - start < 3


class Streamed(list):
    """A data set of `datasets`: what it would decode may be left as it lies there."""

    def decode(self, enable):
        assert not enable  # a broken image would end the iteration
        return self


def test_hub_rows_are_streamed_split_by_split(hub):
    import datasets
    import huggingface_hub

    def load_dataset(name, split, streaming):
        assert (name, streaming) == ("owner/name", True)
        return Streamed([{"text": split * 4}])

    hub.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    hub.setattr(datasets, "load_dataset", load_dataset)
    assert rows_as_text(load("owner/name:split=a+b", nsamples=2)) == ["aaaa", "bbbb"]
    assert rows_as_text(load("owner/name")) == ["trai"]


def test_a_folder_is_read_without_asking_the_hub(tmp_path, hub):
    import datasets

    hub.setattr(datasets, "load_dataset", lambda path, **options: Streamed([path[-4:]]))
    (tmp_path / "data").mkdir()
    assert rows_as_text(load(f"{tmp_path}/data")) == ["data"]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "calibration set `{}` is empty"),
        ("a.txt", b"caf\xe9", "`{}` is not UTF-8 text"),
        ("a.txt", b"ab", "add data, or pass a smaller --seqlen"),
        ("a.json", b'[{"text": ', "`{}` cannot be read"),
        ("a.json", b'{\n "a": 1}', "line 1 of `{}` is no JSON"),
        ("a.json", b"[" * 100_000, "`{}` cannot be read"),
        ("a.jsonl", b'"abc"\n{"text"}', "line 2 of `{}` is no JSON"),
        ("a.jsonl", b'{"id": 1, "body": "x"}', "has the keys id, body; one of input_ids, messages"),
        ("a.jsonl", b'{"text": null}', "row 1 of `{}`: `text` must hold text"),
        ("a.jsonl", b'{"messages": ["hi"]}', "must be a list of objects with role and content"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 3}]}', "must hold text"),
        ("a.jsonl", b"3", "is neither text nor token ids [n] or [1, n] (type int)"),
        ("a.jsonl", b'{"input_ids": [1, 2.5]}', "is neither text nor token ids"),
        ("a.jsonl", b'{"input_ids": [1, 2, 3, 999]}', "holds the token id 999; "),
        ("a.jsonl", b'{"input_ids": [1, 2, -100, 3]}', "holds the token id -100; "),
        ("a.jsonl", b'{"input_ids": [1, 2, 3, 99999999999999999999]}', "holds the token id 9999"),
        ("a.parquet", b"no parquet", "`{}` cannot be read"),
        ("a.csv", b"a,b", "`{}` is no calibration file; its name must end in .txt, .json"),
    ],
)
def test_a_faulty_file_is_one_line_that_says_where(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        load(str(path))
    assert message.format(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_too_little_data_names_every_number():
    with pytest.raises(CalibrationError) as error:
        load(["abcdef", "gh"], nsamples=3)
    assert str(error.value) == (
        "`given documents` gives 1 rows of 4 tokens (8 tokens in 2 documents), 3 were asked: "
        "add data, or pass --nsamples 1 or a smaller --seqlen"
    )
    with pytest.raises(CalibrationError, match="pass a smaller --seqlen"):
        load(["ab"])
    with pytest.raises(CalibrationError, match="calibration set `given documents` is empty"):
        load(["", ""])


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ("missing.jsonl", CalibrationError, "no such file: `missing.jsonl`"),
        ("./no/such/folder", CalibrationError, "no such file"),
        ("x" * 5000 + ".txt", CalibrationError, "no such file"),
        ("a text\nthat is no name", CalibrationError, "no such file"),
        ("stdlb", UnknownNameError, "did you mean `stdlib`"),
        ("Stdlib", UnknownNameError, "did you mean `stdlib`"),
        (b"bytes", UsageError, "got bytes"),
        ({"input_ids": [1]}, UsageError, "got dict"),
        (7, UsageError, "got int"),
        (["abc", None], CalibrationError, "row 2 of `given documents` is neither"),
        ("stdlib,stdlib:num=1", UsageError, "nsamples is 1, but num= fixes 1 rows and 1 datasets"),
        ("stdlib:num=5", UsageError, "nsamples is 1, but num= fixes 5 rows and 0 datasets"),
    ],
)
def test_what_cannot_be_a_data_set_is_refused(dataset, error, message):
    with pytest.raises(error) as caught:
        load(dataset)
    assert message in str(caught.value)


@pytest.mark.parametrize("nsamples", [0, -1, True, 1.5, "8"])
def test_nsamples_must_be_a_positive_whole_number(nsamples):
    with pytest.raises(UsageError, match="nsamples must be a whole number of at least 1"):
        load(["abcd"], nsamples=nsamples)


def test_seqlen_must_hold_a_prediction():
    with pytest.raises(UsageError, match="seqlen must be a whole number of at least 2, got 1"):
        load(["abcd"], seqlen=1)


def test_text_needs_a_tokenizer():
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        load_calibration(["abcd"], None, nsamples=1, seqlen=4)


def test_a_file_has_no_splits(tmp_path):
    (tmp_path / "a.txt").write_text("abcd")
    with pytest.raises(UsageError, match="leave `split=` out"):
        load(f"{tmp_path}/a.txt:split=train")


def test_the_chat_template_must_exist_fit_and_have_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcd"}')
    with pytest.raises(CalibrationError, match="the tokenizer has no chat template"):
        load(f"{path}:apply_chat_template")

    class Moody(ChatTokenizer):
        def apply_chat_template(self, messages, tokenize):
            raise KeyError("roles must\nalternate")

    with pytest.raises(CalibrationError, match="the tokenizer refuses row 1 of .*KeyError"):
        load(f"{path}:apply_chat_template", tokenizer=Moody())
    path.write_text('{"input_ids": [1, 2, 3, 4]}')
    with pytest.raises(CalibrationError, match="a chat template needs text"):
        load(f"{path}:apply_chat_template", tokenizer=ChatTokenizer())


@unhurried
@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=6))
def test_any_rows_give_a_set_or_an_error_of_ours(value):
    try:
        calibration = load([value, {"text": value}, {"input_ids": value}], seqlen=2)
    except AutoRoundError:
        return
    assert calibration.input_ids.shape == (1, 2)


# --- with a real tokenizer -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(TINY)


def test_the_offline_corpus_with_a_real_tokenizer(tokenizer, capsys):
    calibration = load_calibration("stdlib", tokenizer, nsamples=8, seqlen=64)
    again = load_calibration("stdlib", tokenizer, nsamples=8, seqlen=64)
    assert calibration.input_ids.shape == (8, 64)
    assert calibration.sha256 == again.sha256
    first = next(open_rows(DatasetSpec("stdlib")))
    assert first.startswith(tokenizer.decode(calibration.input_ids[0]).rstrip("\ufffd"))
    assert "longer than" not in capsys.readouterr().err


def test_the_chat_template_of_a_real_tokenizer(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    ids = tokenizer(expected)["input_ids"]
    calibration = load_calibration(
        f"{tmp_path}/a.jsonl:apply_chat_template", tokenizer, nsamples=1, seqlen=len(ids)
    )
    assert calibration.input_ids.tolist() == [ids]


def test_text_that_no_tokenizer_can_encode_is_an_error_of_ours(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('"\\ud800"')
    with pytest.raises(CalibrationError, match="refuses row 1|gives 0 rows"):
        load_calibration(f"{tmp_path}/a.jsonl", tokenizer, nsamples=1, seqlen=64)
