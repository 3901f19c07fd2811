"""The README's code runs as it is written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from autoround_cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def beside_examples(tmp_path, monkeypatch):
    """An empty working directory in which `examples/` is found."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_first_screen_is_two_commands():
    setup = next(code for _, code in BLOCKS if "tox" in code)
    commands = [line.partition("#")[0].strip() for line in setup.splitlines()]
    assert commands == ["pip install tox && tox -e quickstart", "pip install tox && tox"]
    assert README.index(setup) < 1200
    ini = (ROOT / "tox.ini").read_text()
    assert "[testenv:quickstart]" in ini and "python examples/quickstart.py" in ini
    assert "pip install tox && tox\n" in (ROOT / ".ci" / "run").read_text()


def test_python_example(beside_examples):
    code = next(code for language, code in BLOCKS if language == "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (beside_examples / "tiny-w4" / "config.json").is_file()
    assert names["model"].config.model_type == "qwen3"


def test_commands(beside_examples, capsys):
    code = next(code for _, code in BLOCKS if code.startswith("autoround quantize"))
    # the example tunes for minutes; what is checked here is that each line works
    shorter = {
        "quantize": ["--iters", "1", "--nsamples", "4"], "eval": ["--windows", "2"], "run": ["--max_new_tokens", "2"],
    }
    for line in code.splitlines():
        words = shlex.split(line)
        with pytest.raises(SystemExit) as done:
            main([*words[1:], *shorter[words[1]]])
        captured = capsys.readouterr()
        assert not done.value.code, captured.err
    assert captured.out.startswith("def read_file(path):")


def test_packages_to_install_exist():
    install = next(code for _, code in BLOCKS if code.startswith("pip install ./packages"))
    for word in install.split()[2:]:
        assert (ROOT / word.partition("[")[0] / "pyproject.toml").is_file(), word


def test_every_command_is_listed():
    from autoround_cli.main import cli
    from autoround_core import get_registry

    get_registry().add_commands(cli)
    table = README[README.index("## Commands") : README.index("## Packages")]
    for name in cli.commands:
        assert f"`autoround {name}`" in table or f"`{name}`" in table, name
