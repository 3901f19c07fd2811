"""Third-party plugins: two that work and a broken one beside them, found, used and survived."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from autoround_core import PluginError, Registry, UnknownNameError
from autoround_core.testing import check_backend, check_format

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml by itself")

HERE = Path(__file__).parent
FOLDERS = [HERE / f"autoround-{name}" for name in ("npz", "blas32", "broken")]
TINY = HERE.parents[1] / "examples" / "tiny-qwen3"
MOST_LINES = 80


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def points() -> list[EntryPoint]:
    """Our own entry points, and those that the example plugins declare."""
    declared = [
        EntryPoint(name, value, "autoround")
        for folder in FOLDERS
        for name, value in project(folder)["entry-points"]["autoround"].items()
    ]
    return [*entry_points(group="autoround"), *declared]


@pytest.fixture
def registry() -> Registry:
    return Registry(points())


def test_plugins_contribute_what_they_promise(registry):
    hooks = {record.name: record.hooks for record in registry.plugins}
    assert hooks["npz"] == ("autoround_formats",)
    assert hooks["blas32"] == ("autoround_backends",)
    assert {"npz", "auto_round", "dense"} <= registry.formats().keys()
    assert {"blas32", "reference"} <= registry.backends().keys()


def test_the_format_conforms(registry, tmp_path):
    assert check_format(registry.format("npz"), tmp_path).cells == 57


def test_the_backend_conforms(registry):
    assert check_backend(registry.backends()["blas32"]).cells >= 336


@pytest.mark.parametrize("folder", FOLDERS[:2], ids=lambda folder: folder.name)
def test_a_plugin_with_its_test_is_short(folder):
    lines = {path: len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    assert any(path.name.startswith("test_") for path in lines)
    assert sum(lines.values()) < MOST_LINES


def test_a_broken_plugin_harms_nobody(registry):
    records = {record.name: record for record in registry.plugins}
    assert records["broken"].error == "ImportError: cannot import name `gone` from `somewhere`"
    assert records["broken"].hooks == ()
    assert [record.name for record in registry.failures] == ["broken"]
    whole = Registry([point for point in points() if point.name != "broken"])
    assert registry.formats().keys() == whole.formats().keys()
    assert registry.backends().keys() == whole.backends().keys()
    assert registry.algorithms().keys() == whole.algorithms().keys()


def test_an_unknown_name_mentions_the_broken_plugin(registry):
    with pytest.raises(UnknownNameError, match=r"unknown format `gone`.*plugin `broken` failed: ImportError"):
        registry.format("gone")


def test_the_allow_list_keeps_others_out():
    registry = Registry(points(), allowed=["core", "npz"])
    assert [record.name for record in registry.plugins] == ["core", "npz"]
    assert list(registry.formats()) == ["npz"]
    assert registry.failures == []


def test_one_name_from_two_plugins_is_an_error_that_names_both(tmp_path, monkeypatch):
    original = HERE / "autoround-npz" / "autoround_npz" / "__init__.py"
    (tmp_path / "autoround_npz_fork.py").write_text(original.read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    fork = EntryPoint("fork", "autoround_npz_fork", "autoround")
    with pytest.raises(PluginError, match=r"`npz` is registered twice .*: by (fork and npz|npz and fork)"):
        Registry([*points(), fork]).formats()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """An environment in which the plugins are installed: their folders, and metadata as pip writes it."""
    site = tmp_path_factory.mktemp("site")
    for folder in FOLDERS:
        about = project(folder)
        info = site / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
        info.mkdir()
        metadata = {"Metadata-Version": "2.1", "Name": about["name"], "Version": about["version"]}
        (info / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in metadata.items()))
        entries = about["entry-points"]["autoround"].items()
        (info / "entry_points.txt").write_text("[autoround]\n" + "".join(f"{k} = {v}\n" for k, v in entries))
    path = os.pathsep.join(map(str, (site, *FOLDERS)))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def autoround(environment: dict[str, str], *arguments: object) -> str:
    """Standard output of the command. Fails the test with its standard error unless it exits with 0."""
    code = "from autoround_cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plugins_shows_each_with_its_package_and_the_failure(installed):
    rows = [line.split("\t") for line in autoround(installed, "plugins").splitlines()]
    found = {row[0]: row[1:] for row in rows}
    assert found["npz"] == ["autoround-npz 0.1.0", "autoround_npz", "autoround_formats", "ok"]
    assert found["blas32"] == ["autoround-blas32 0.1.0", "autoround_blas32", "autoround_backends", "ok"]
    assert found["broken"][0] == "autoround-broken 0.1.0"
    assert found["broken"][3].startswith("failed: ImportError")
    assert found["core"][-1] == found["export"][-1] == "ok"


def test_the_environment_variable_is_the_allow_list(installed):
    limited = {**installed, "AUTOROUND_PLUGINS": "core,cli,blas32"}
    names = [line.split("\t")[0] for line in autoround(limited, "plugins").splitlines()]
    assert sorted(names[1:]) == ["blas32", "cli", "core"]


def test_a_model_is_quantized_described_and_run_through_plugins(installed, tmp_path):
    out = tmp_path / "out"
    options = ["--format", "npz", "--recipe", "rtn", "--group_size", 64, "--output_dir", out, "--quiet"]
    autoround(installed, "quantize", "--model", TINY, *options)
    assert (out / "weights.npz").is_file()
    assert "format npz" in autoround(installed, "info", out)
    text = autoround(installed, "run", out, "def read(", "--backend", "blas32", "--max_new_tokens", 4)
    assert text.startswith("def read(")
