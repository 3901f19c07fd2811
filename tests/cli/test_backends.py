"""`autoround backends`: what each takes and needs, and why one was chosen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from autoround_cli import inspect
from autoround_core import Backend, Support, get_registry
from autoround_core.registry import Registry

from .conftest import TINY


class Kernel(Backend):
    """A stranger's."""

    def __init__(self, name, priority=0, support=None, problem=None) -> None:
        self.name, self.priority, self._problem = name, priority, problem
        self.support = support or Support()

    def missing(self):
        if self._problem:
            raise self._problem
        return super().missing()

    def build(self, layer, device, dtype):
        raise NotImplementedError


@pytest.fixture
def strangers(monkeypatch):
    """Let these be all the backends there are."""

    def use(*backends):
        monkeypatch.setattr(Registry, "backends", lambda self: {backend.name: backend for backend in backends})

    return use


def listed(autoround) -> dict[str, list[str]]:
    result = autoround("backends")
    assert (result.code, result.err) == (0, "")
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert lines[0] == ["backend", "devices", "numbers", "bits", "sym", "groups", "dtypes", "state"]
    return {line[0]: line[1:] for line in lines[1:]}


def test_the_table_says_what_the_data_say(autoround):
    table = listed(autoround)
    assert table["cpu_int8"] == ["cpu", "int", "8", "sym", "row", "bfloat16", "installed"]
    assert table["reference"] == ["any", "any", "any", "sym, asym", "any", "any", "installed"]
    backends = get_registry().backends()
    assert list(table) == sorted(backends, key=lambda name: (-backends[name].priority, name))


def test_a_backend_of_what_is_not_quantized(autoround, strangers, checkpoint):
    strangers(Kernel("head", 9, Support(devices=("cpu",), data_types=(), dense=True)), Kernel("any"))
    assert listed(autoround)["head"] == ["cpu", "not quantized", "", "", "", "any", "installed"]
    assert all(replies == [("any", "chosen")] for replies in explained(autoround, checkpoint).values())


def test_missing_packages_come_with_the_command(autoround, strangers):
    needs = Support(devices=("cuda", "xpu"), bits=(2, 4), group_sizes=(32, -1), sym=(False,), dtypes=("float16",),
                    data_types=("fp", "mx_fp"), packages=("no_such_kernels",), install="autoround-backends[cuda]")
    strangers(Kernel("low", -1), Kernel("fast", 9, needs), Kernel("odd", 3, problem=OSError("libfoo.so")))
    assert listed(autoround) == {
        "fast": ["cuda, xpu", "fp, mx_fp", "2, 4", "asym", "32, row", "float16",
                 "no_such_kernels not installed; pip install autoround-backends[cuda]"],
        "odd": [*["any"] * 6, "failed: OSError: libfoo.so"],
        "low": [*["any"] * 6, "installed"],
    }
    assert list(listed(autoround)) == ["fast", "odd", "low"]


def test_nothing_is_imported_just_to_ask(tmp_path, checkpoint):
    """Every package that a backend names lies on the path, and breaks the command when it is imported."""
    packages = {package for backend in get_registry().backends().values() for package in backend.support.packages}
    packages = {package.partition(".")[0] for package in packages} - {"torch"} | {"kernels_of_a_stranger"}
    for package in packages:
        (tmp_path / f"{package}.py").write_text("raise SystemExit(f'{__name__} was imported')")
    code = """
import sys
from types import SimpleNamespace
from autoround_core import Backend, Support, get_registry, hookimpl
from autoround_cli.main import main

class Fast(Backend):
    name, priority, support = "fast", 99, Support(packages=("kernels_of_a_stranger",), bits=(3,))
    def build(self, layer, device, dtype): ...

class Plugin:
    @hookimpl
    def autoround_backends(self):
        return [Fast()]

get_registry()._manager.register(Plugin())
try:
    main(sys.argv[1:])
finally:
    assert "kernels_of_a_stranger" not in sys.modules
    assert "transformers" not in sys.modules or "--explain" in sys.argv
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for arguments in (["backends"], ["backends", "--explain", str(checkpoint)]):
        if "--explain" in arguments:  # builds a skeleton with Transformers, and torch imports triton on its own
            (tmp_path / "triton.py").unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": path})
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert "fast\t" in done.stdout


def explained(autoround, *arguments) -> dict[str, list[tuple[str, str]]]:
    """{layers: [(backend, answer)]}."""
    result = autoround("backends", "--explain", *arguments)
    assert (result.code, result.err) == (0, "")
    answers: dict[str, list[tuple[str, str]]] = {}
    key = ""
    for layers, backend, answer in (line.split("\t") for line in result.out.splitlines()[1:]):
        key = layers or key
        answers.setdefault(key, []).append((backend, answer))
    return answers


def test_explain(autoround, checkpoint):
    answers = explained(autoround, checkpoint)
    assert len(answers) == 4 and sum(int(key.split("(")[1].split()[0]) for key in answers) == 42
    assert any(key.startswith("W4G128 256x512 (6 layers, such as model.layers.0.mlp.down_proj)") for key in answers)
    for replies in answers.values():
        states = [answer for _, answer in replies]
        assert states.count("chosen") == 1 and ("cpu_int8", "needs bits 8, got 4") in replies
        assert dict(replies)["reference"] == "would run too, with lower priority"
    other = explained(autoround, checkpoint, "--dtype", "float32")
    for replies in other.values():
        assert ("cpu_int4", "needs bfloat16, got float32; load with --dtype bfloat16") in replies


def test_explain_in_order(autoround, checkpoint, strangers):
    strangers(Kernel("three", 9, Support(bits=(3,))), Kernel("four", 5), Kernel("too", 2), Kernel("gone", 3, Support(
        packages=("no_such_kernels",))))
    (replies, *_) = explained(autoround, checkpoint).values()
    assert replies == [
        ("three", "needs bits 3, got 4"), ("four", "chosen"),
        ("gone", "no_such_kernels not installed; pip install no_such_kernels"),
        ("too", "would run too, with lower priority"),
    ]  # fmt: skip
    strangers(Kernel("three", 9, Support(bits=(3,))))
    (replies, *_) = explained(autoround, checkpoint).values()
    assert replies == [("three", "needs bits 3, got 4")]


def test_explain_takes_the_stored_dtype(autoround, checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    for replies in explained(autoround, copy).values():
        assert dict(replies)["cpu_int4"] == "needs bfloat16, got float16; load with --dtype bfloat16"


def test_explain_says_what_no_backend_runs(autoround, saved, tmp_path):
    for model, options in ((saved("qwen3_moe"), ["--scheme", "W4G32"]), (TINY, ["--format", "gguf:q8_0"])):
        output = tmp_path / model.name
        made = autoround("quantize", "--model", model, "--recipe", "rtn", "--output_dir", output, "--quiet", *options)
        assert made.code == 0, made.err
    path = next((tmp_path / TINY.name).glob("*.gguf"))
    for place, layer in ((tmp_path / saved("qwen3_moe").name, "experts.0"), (path, "model.embed_tokens")):
        dense = [key for key, replies in explained(autoround, place).items() if len(replies) == 1]
        assert dense and all(layer in key for key in dense)
        assert explained(autoround, place)[dense[0]][0][0] == "none"


def test_explain_an_ordinary_model(autoround):
    result = autoround("backends", "--explain", TINY)
    assert result.code == 0 and "no quantized layers" in result.out


@pytest.mark.parametrize(("arguments", "says"), [
    (["--device", "cuba"], "cuba"), (["--dtype", "float61"], "did you mean `float16`"),
])  # fmt: skip
def test_mistakes(autoround, checkpoint, arguments, says):
    result = autoround("backends", "--explain", checkpoint, *arguments)
    assert result.code == 2 and says in result.err and len(result.err.splitlines()) == 1


def test_the_cells_of_a_support_without_limits():
    assert inspect._limits(Kernel("x", support=Support(sym=(True,)))) == ["any", "int", "any", "sym", "any", "any"]
    assert str(torch.bfloat16).endswith("bfloat16")
