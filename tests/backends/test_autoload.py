"""Registration without an import of ours: in every order of imports, never in anybody's way. Fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from autoround_core import AutoRound

WHICH = "import transformers.quantizers.auto as a; print('loader:', a.AUTO_QUANTIZER_MAPPING['{}'].__name__)"
OURS, THEIRS = "loader: AutoRoundLoader", "loader: AutoRoundQuantizer"


def run(code, path=(), **environment):
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join([*map(str, path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr, done.stderr


def test_torch_finds_the_entry_point():
    points = entry_points(group="torch.backends", name="autoround_backends")
    assert [point.value for point in points] == ["_autoround_backends_autoload:autoload"]


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "import transformers",
        "import transformers.quantizers.auto",
        "import transformers.modeling_utils",
        "from transformers import AutoConfig",
        "from transformers import pipeline",
        "from transformers import Qwen3ForCausalLM",
        "import accelerate",
    ],
)
def test_every_order_of_imports(first):
    assert run(f"{first}\nimport torch, transformers.modeling_utils\n{WHICH.format('auto-round')}")[0] == OURS


@pytest.mark.parametrize("method", ["auto-round", "gptq", "awq"])
def test_an_explicit_import_registers_all_methods(method):
    code = f"import autoround_backends\n{WHICH.format(method)}"
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")[0] == OURS


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, autoround_backends; print({'torch', 'transformers'} & sys.modules.keys())"
    assert run(code)[0] == "set()"


@pytest.mark.parametrize("switch", ["TORCH_DEVICE_BACKEND_AUTOLOAD", "AUTOROUND_BACKENDS_AUTOLOAD"])
def test_both_switches(switch):
    assert run(f"import torch\n{WHICH.format('auto-round')}", **{switch: "0"})[0] == THEIRS


@pytest.fixture
def peer(tmp_path):
    """A directory with a package `auto_round` in it."""
    (tmp_path / "auto_round").mkdir()
    (tmp_path / "auto_round" / "__init__.py").write_text("")
    return tmp_path


def test_we_yield_to_the_peer(peer):
    code = f"import torch\n{WHICH.format('auto-round')}"
    assert run(code, [peer])[0] == THEIRS
    assert run(code, [peer], AUTOROUND_BACKENDS_OVERRIDE="1")[0] == OURS
    assert run(f"import autoround_backends\n{code}", [peer])[0] == OURS


def test_a_broken_package_does_not_break_torch(tmp_path):
    (tmp_path / "autoround_backends").mkdir()
    (tmp_path / "autoround_backends" / "__init__.py").write_text("raise RuntimeError('broken')")
    out, err = run(f"import torch\n{WHICH.format('auto-round')}", [tmp_path])
    assert out == THEIRS and "autoround-backends: not registered with Transformers: broken" in err


def test_a_checkpoint_loads_without_any_import_of_ours(saved, tmp_path):
    AutoRound(saved("llama"), scheme="W4G32", recipe="rtn").quantize_and_save(tmp_path / "out", "auto_gptq")
    load = f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    code = f"from transformers import AutoModelForCausalLM\nprint(type({load}.hf_quantizer).__name__)"
    assert run(code)[0] == "AutoRoundLoader"
