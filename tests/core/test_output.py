"""The output directory: refusals before anything is written, and all or nothing after."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoround_core.errors import OutputError
from autoround_core.output import OutputDirectory


def tree(directory):
    """{relative path: text} of all files, and the names of empty directories."""
    return {
        str(path.relative_to(directory)): path.read_text() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


@pytest.fixture
def old(tmp_path):
    """A directory that already holds something."""
    directory = tmp_path / "out"
    (directory / "sub").mkdir(parents=True)
    (directory / "old.txt").write_text("old")
    (directory / "sub" / "deep.txt").write_text("deep")
    return directory


OLD = {"out/old.txt": "old", "out/sub/deep.txt": "deep"}


def test_a_new_directory_appears_when_it_is_complete(tmp_path):
    final = tmp_path / "a" / "b" / "out"
    with OutputDirectory(final) as work:
        (work / "model").write_text("x")
        assert work.parent == final.parent and not final.exists()  # beside it: a rename, not a copy
    assert tree(tmp_path) == {"a/b/out/model": "x"}


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with OutputDirectory(str(tmp_path / "out")) as work:
        (work / "model").write_text("x")
    assert tree(tmp_path) == {"out/model": "x"}


def test_what_is_there_is_replaced_as_a_whole_and_only_at_the_end(old, tmp_path):
    with OutputDirectory(old, overwrite=True) as work:
        (work / "model").write_text("x")
        assert {name: text for name, text in tree(tmp_path).items() if name.startswith("out/")} == OLD
    assert tree(tmp_path) == {"out/model": "x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing_and_is_not_hidden(tmp_path, error):
    with pytest.raises(error), OutputDirectory(tmp_path / "out") as work:
        (work / "model").write_text("x")
        raise error
    assert tree(tmp_path) == {}


def test_a_failure_takes_the_directories_it_made_along_and_no_others(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError), OutputDirectory(tmp_path / "mine" / "a" / "b" / "out"):
        raise ValueError
    assert list((tmp_path / "mine").iterdir()) == []
    with pytest.raises(ValueError), OutputDirectory(tmp_path / "mine" / "a" / "b" / "out") as work:
        (work.parent.parent / "somebody else's").touch()
        raise ValueError
    assert [path.name for path in (tmp_path / "mine" / "a").iterdir()] == ["somebody else's"]


def test_a_failure_keeps_the_old_content(old, tmp_path):
    with pytest.raises(ZeroDivisionError), OutputDirectory(old, overwrite=True) as work:
        (work / "model").write_text("x")
        raise ZeroDivisionError
    assert tree(tmp_path) == OLD


def test_a_failed_rename_keeps_the_old_content(old, tmp_path, monkeypatch):
    rename = Path.rename

    def refuse(path, target):
        if "partial" in path.name:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(OutputError, match="cannot be put in place: No space left"),
        OutputDirectory(old, overwrite=True) as work,
    ):
        (work / "model").write_text("x")
    assert tree(tmp_path) == OLD


def test_what_a_killed_run_left_behind_does_not_get_in(tmp_path):
    with OutputDirectory(tmp_path / "out") as work:
        leftover = work
    leftover.mkdir()
    (leftover / "half").write_text("half")
    (leftover.parent / leftover.name.replace("partial", "replaced")).mkdir()
    with OutputDirectory(tmp_path / "out", overwrite=True) as work:
        assert list(work.iterdir()) == []
        (work / "model").write_text("x")
    assert tree(tmp_path) == {"out/model": "x"}


# --- refusals -----------------------------------------------------------------------------------------------


def refused(says, *arguments, **options):
    with pytest.raises(OutputError, match=says) as caught:
        OutputDirectory(*arguments, **options)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_models_own_directory_and_all_above_it(tmp_path, overwrite):
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    for final in (model, model.parent, tmp_path, model / "..", f"{model}/"):
        refused("is the model's own directory or contains it", final, model, overwrite=overwrite)


def test_a_link_to_the_model_is_the_model(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    refused("is the model's own directory", tmp_path / "link", model, overwrite=True)
    refused("is the model's own directory", model, tmp_path / "link", overwrite=True)


def test_a_directory_beside_or_below_the_model_is_fine(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for final in (tmp_path / "model-w4", model / "w4"):
        with OutputDirectory(final, model) as work:
            (work / "x").write_text("x")
        assert (final / "x").is_file()


def test_a_directory_that_is_not_empty(old, tmp_path):
    refused("is not empty; choose another, or pass --overwrite", old)
    assert tree(tmp_path) == OLD


def test_a_file(tmp_path):
    (tmp_path / "out").write_text("x")
    for overwrite in (False, True):
        refused("is a file", tmp_path / "out", overwrite=overwrite)
        refused("is a file", tmp_path / "out" / "below", overwrite=overwrite)
    assert tree(tmp_path) == {"out": "x"}


def test_the_root_of_the_file_system():
    refused("is the root of the file system", Path(Path.cwd().anchor), overwrite=True)


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    refused(f"cannot be made: `{tmp_path}` is not writable", tmp_path / "a" / "out")
    refused("is not writable", tmp_path / "out")
    assert tree(tmp_path) == {}
