from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from autoround_cli.main import main

TINY = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def autoround(capsys, monkeypatch):
    """Run the command in this process; what it prints and its exit code."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(exit_.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def rows(tmp_path) -> Path:
    """Calibration rows of ready token ids: four of 32."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"input_ids": [(7 * i + j) % 4000 for j in range(32)]}) + "\n" for i in range(4))
    )
    return path


@pytest.fixture
def model_copy(tmp_path) -> Path:
    """A model directory that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A W4G128 checkpoint, and what making it printed."""
    output = tmp_path_factory.mktemp("cli") / "w4"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from autoround_cli.main import main; main()",
            "quantize",
            "--model",
            str(TINY),
            "--recipe",
            "rtn",
            "--output-dir",
            str(output),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"saved and verified: {output}"
    assert done.stderr == ""
    return output
