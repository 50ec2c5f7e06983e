import os

import pytest

from softprompt.tasks.classification import load_task
from softprompt.tasks.errors import TaskError
from softprompt.tasks.folders import (
    holds_adapter,
    latest_checkpoint,
    publish_adapter,
    publish_folder,
    remove_checkpoints,
    staging,
)


def make_checkpoint(folder, step, state='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_latest_checkpoint_is_that_with_the_most_steps(tmp_path):
    for step in (5, 10, 9):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-10"


@pytest.mark.parametrize("state", [None, "", '{"global_st'])
def test_a_checkpoint_without_a_whole_trainer_state_is_passed_over(tmp_path, state):
    make_checkpoint(tmp_path, 5)
    make_checkpoint(tmp_path, 10, state)
    assert latest_checkpoint(tmp_path).name == "checkpoint-5"


def test_a_missing_folder_has_no_checkpoint_and_no_adapter(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    assert not holds_adapter(tmp_path / "none")


def test_a_folder_holds_an_adapter_by_its_configuration_or_a_checkpoint(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert not holds_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    make_checkpoint(tmp_path / "b", 1)
    assert holds_adapter(tmp_path / "a")
    assert holds_adapter(tmp_path / "b")


def test_old_checkpoints_go_and_the_last_ones_stay(tmp_path):
    for step in (5, 100, 20):
        make_checkpoint(tmp_path, step)
    (tmp_path / "notes.txt").write_text("mine")
    remove_checkpoints(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-100", "checkpoint-20", "notes.txt"]
    remove_checkpoints(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_crash_while_old_checkpoints_go_leaves_no_half_of_one_under_its_name(tmp_path, monkeypatch):
    for step in (5, 20):
        make_checkpoint(tmp_path, step)

    def crash(folder, **options):
        if folder.exists() and any(folder.iterdir()):
            raise OSError("power cut")

    monkeypatch.setattr("shutil.rmtree", crash)
    with pytest.raises(OSError, match="power cut"):
        remove_checkpoints(tmp_path, keep=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-20"]


def test_staging_is_empty_at_first_and_gone_afterwards_even_after_an_error(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "left").write_text("from a crash")

    def fail_half_way():
        with staging(tmp_path) as stage:
            assert os.listdir(stage) == []
            (stage / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert os.listdir(tmp_path) == []


def test_a_published_folder_takes_the_place_of_the_old_one(tmp_path):
    old = make_checkpoint(tmp_path, 5, "old")
    with staging(tmp_path) as stage:
        publish_folder(make_checkpoint(stage, 5, "new"), old)
    assert (old / "trainer_state.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["checkpoint-5"]


def test_a_crash_while_an_adapter_is_published_leaves_no_configuration(tmp_path, monkeypatch):
    final, staged = tmp_path / "final", tmp_path / "staged"
    for folder, content in ((final, "old"), (staged, "new")):
        folder.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors", "softprompt.json"):
            (folder / name).write_text(content)
    replace, moved = os.replace, []

    def crash_at_the_last(source, target):
        moved.append(source.name)
        if len(moved) == 3:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash_at_the_last)
    with pytest.raises(OSError, match="power cut"):
        publish_adapter(staged, final)
    assert moved[-1] == "adapter_config.json"
    assert not holds_adapter(final)
    monkeypatch.undo()
    publish_adapter(staged, final)
    assert {(path.name, path.read_text()) for path in final.iterdir()} == {
        ("adapter_config.json", "new"),
        ("adapter_model.safetensors", "new"),
        ("softprompt.json", "new"),
    }


def test_a_crash_while_an_ensemble_is_published_leaves_none_that_is_read(tmp_path, monkeypatch):
    final, staged = tmp_path / "final", tmp_path / "staged"
    for folder, content in ((final, "old"), (staged, "new")):
        for name in ("prompt-1", "prompt-2"):
            (folder / name).mkdir(parents=True)
            (folder / name / "adapter_config.json").write_text(content)
        (folder / "softprompt.json").write_text(content)
    replace = os.replace

    def crash_at_the_second(source, target):
        if source.name == "prompt-2":
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash_at_the_second)
    with pytest.raises(OSError, match="power cut"):
        publish_adapter(staged, final)
    with pytest.raises(TaskError, match="has no softprompt"):
        load_task(final)
    monkeypatch.undo()
    publish_adapter(staged, final)
    assert {path.read_text() for path in final.glob("*/*")} == {"new"}
    assert (final / "softprompt.json").read_text() == "new"
