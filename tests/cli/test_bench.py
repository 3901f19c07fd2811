"""`autoround bench`: a row for each backend, figures that fit together, and the reason where one cannot run."""

from __future__ import annotations

import json

import pytest

from autoround_core import UnsupportedError, speed

from .conftest import TINY

SHORT = ["--prompt_tokens", 8, "--new_tokens", 2, "--repeats", 2]


@pytest.fixture
def here(monkeypatch):
    """Measure in this process, on a machine that reads 1 GB a second; the trials that were asked for."""
    trials = []

    def call(function, *arguments):
        if function is speed.read_bandwidth:
            return 1e9 if speed.find_device(arguments[0]) else None
        trials.extend(arguments)
        return function(*arguments)

    monkeypatch.setattr(speed, "apart", call)
    return trials


def table(text: str) -> dict[str, dict[str, str]]:
    header, *rows = (line.split("\t") for line in text.splitlines())
    assert header == ["backend", "load s", "prefill tokens/s", "spread", "decode tokens/s", "spread", "bound tokens/s",
                      "reached", "peak MiB", "note"]
    return {row[0]: row for row in rows}


def test_in_processes_of_their_own(autoround, checkpoint):
    result = autoround("bench", checkpoint, "--backend", "reference,cpu_int8", *SHORT, "--threads", 1)
    assert (result.code, result.err) == (0, "")
    said, _, rest = result.out.partition("\n")
    assert said.startswith("bfloat16, 1 threads; a step reads 3.9 MB of weights, and memory gives ")
    rows = table(rest)
    assert list(rows) == ["reference", "cpu_int8"]
    assert rows["reference"][-1] == "reference" and rows["cpu_int8"][1:-1] == [""] * 8
    assert "needs bits 8, got 4" in rows["cpu_int8"][-1]
    assert all(float(cell.replace(",", "").rstrip("%")) >= 0 for cell in rows["reference"][1:-1])
    # Python, torch and Transformers alone take more; this process has more still
    assert 100 < float(rows["reference"][-2].replace(",", "")) < 2000


def test_json(autoround, checkpoint, here):
    result = autoround("bench", checkpoint, "--backend", "auto, reference,cpu_int8", "--json", *SHORT)
    content = json.loads(result.out)
    assert (content["prompt_tokens"], content["new_tokens"], content["bytes_per_second"]) == (8, 2, 1e9)
    assert list(content["backends"]) == ["auto", "reference", "cpu_int8"]
    assert "needs bits 8" in content["backends"]["cpu_int8"]["error"]
    row = content["backends"]["reference"]
    assert row["used"] == ["reference"] and len(row["prefill"]) == len(row["decode"]) == 2
    assert row["bound"] == pytest.approx(1e9 / row["step_bytes"])
    assert row["reached"] == pytest.approx(max(row["decode"]) / row["bound"])
    assert [(trial.backend, trial.prompt_tokens, trial.repeats) for trial in here] == [
        ("auto", 8, 2), ("reference", 8, 2), ("cpu_int8", 8, 2)]  # fmt: skip


def test_the_table_shows_the_best_repeat(autoround, checkpoint, here, monkeypatch):
    found = speed.Speed(("a", "b"), "bfloat16", 2, 1.5, (100.0, 200.0), (9.0, 10.0), 50_000_000, 3 * 2**20)
    monkeypatch.setattr(speed, "measure", lambda trial: found)
    result = autoround("bench", checkpoint)
    assert result.out.splitlines()[0] == (
        "bfloat16, 2 threads; a step reads 50.0 MB of weights, and memory gives 1.0 GB/s")
    assert result.out.splitlines()[2].split("\t") == [
        "auto", "1.50", "200.0", "50.0%", "10.0", "10.0%", "20.0", "50.0%", "3", "a, b"]  # fmt: skip


def test_an_ordinary_model_has_no_backend(autoround, here):
    result = autoround("bench", TINY, "--backend", "auto,reference", "--dtype", "float32", *SHORT)
    assert result.code == 0 and list(table(result.out.partition("\n")[2])) == ["-"]
    assert len(here) == 1 and here[0].backend == "auto" and result.out.startswith("float32, ")


def test_one_when_none_could_run(autoround, checkpoint, here, monkeypatch):
    result = autoround("bench", checkpoint, "--backend", "cpu_int8")
    assert result.code == 1 and list(table(result.out)) == ["cpu_int8"]
    result = autoround("bench", checkpoint, "--backend", "cpu_int8", "--json")
    assert result.code == 1 and list(json.loads(result.out)["backends"]["cpu_int8"]) == ["error"]

    def fail(trial):
        raise UnsupportedError("two\nlines")

    monkeypatch.setattr(speed, "measure", fail)
    assert table(autoround("bench", checkpoint).out)["auto"][-1] == "two lines"


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["--backend", "referense"], 2, "did you mean `reference`"),
    (["--backend", "auto,auto"], 2, "twice"),
    (["--backend", ""], 2, "unknown backend"),
    (["--device", "cuba"], 2, "cuba"),
    (["--dtype", "float61"], 2, "did you mean `float16`"),
    (["--new_tokens", "0"], 2, "x>=1"),
    (["--threads", "0"], 2, "x>=1"),
])  # fmt: skip
def test_mistakes(autoround, checkpoint, here, arguments, code, says):
    result = autoround("bench", checkpoint, *arguments)
    assert (result.code, result.out) == (code, "") and len(result.err.splitlines()) == 1
    assert says in result.err
