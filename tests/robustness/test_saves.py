"""Interrupted writers leave what was there, what is new, or nothing; two at once leave one of the two."""

import contextlib
import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from peft import PromptTuningConfig
from safetensors.torch import load_file

from softprompt import files
from softprompt.prompts import export
from softprompt.prompts.adapters import read_adapter, read_npy, write_npy
from softprompt.tasks.plot import save_figure
from softprompt.tasks.written import write_frame

LENGTHS = {"old": 2, "new": 3}


def prompt_for(which):
    return torch.full((LENGTHS[which], 8), float(LENGTHS[which]))


def save_adapter(which, folder):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTHS[which], token_dim=8)
    export.write_adapter(config, prompt_for(which), folder / "adapter")


def figure_for(which):
    figure = Figure(figsize=(LENGTHS[which], 1))
    figure.add_subplot()
    return figure


# name -> (file, writer)
WRITERS = {
    "array": ("prompt.npy", lambda which, path: write_npy(prompt_for(which), path)),
    "tensor": ("prompt.pt", lambda which, path: export.save_tensor(prompt_for(which), path)),
    "text": ("metrics.json", lambda which, path: files.write_text(path, which)),
    "csv": ("t.csv", lambda which, path: write_frame(pd.DataFrame({"a": [which]}), path)),
    "jsonl": ("t.jsonl", lambda which, path: write_frame(pd.DataFrame({"a": [which]}), path)),
    "picture": ("p.png", lambda which, path: save_figure(figure_for(which), path)),
}
ERRORS = {"no space": OSError(28, "No space left on device"), "ctrl-c": KeyboardInterrupt()}


class Disk:
    """Counts what a writer asks of the file system, and fails at one of the calls."""

    def __init__(self, monkeypatch, fail_at=None, error=None):
        self.calls, self.fail_at, self.error = 0, fail_at, error
        for owner, names in (
            (os, ("replace", "fsync", "unlink", "rmdir", "mkdir")),
            (Path, ("open", "write_text", "write_bytes", "unlink", "chmod")),
        ):
            for name in names:
                monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        monkeypatch.setattr(export, "save_file", self._counted(export.save_file))

    def _counted(self, function):
        def call(*args, **kwargs):
            number, self.calls = self.calls, self.calls + 1
            if number == self.fail_at:
                raise self.error
            return function(*args, **kwargs)

        return call


def calls_of(action):
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        action()
        return disk.calls


def interrupted(action, number, error):
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, number, error)
        # Some of it is only tidying, whose errors a library may keep to itself.
        with contextlib.suppress(type(error)):
            action()


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("file, write", WRITERS.values(), ids=WRITERS)
def test_a_file_whose_writing_fails_anywhere_is_the_old_one_or_the_new_one(tmp_path, file, write, error):
    path, whole = tmp_path / file, {}
    for which in ("new", "old"):
        write(which, path)
        whole[which] = path.read_bytes()
    count = calls_of(lambda: write("new", tmp_path / f"other-{file}"))
    assert count >= 3
    for number in range(count):
        write("old", path)
        interrupted(lambda: write("new", path), number, error)
        assert path.read_bytes() in whole.values()
    assert path.read_bytes() in whole.values()
    write("new", path)
    assert path.read_bytes() == whole["new"]


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_file_whose_writing_fails_leaves_nothing_beside_it(tmp_path, error, monkeypatch):
    files.write_text(tmp_path / "a.json", "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            files.write_text(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_new_file_is_readable_by_those_that_the_system_lets(tmp_path):
    files.write_text(tmp_path / "a.json", "new")
    (tmp_path / "b.json").write_text("new")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("before", [True, False])
def test_an_adapter_whose_writing_fails_anywhere_is_whole_or_none(tmp_path, error, before):
    count = calls_of(lambda: save_adapter("new", tmp_path / "count"))
    assert count >= 6
    found = set()
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        if before:
            save_adapter("old", folder)
        interrupted(lambda folder=folder: save_adapter("new", folder), number, error)
        found.add(state_of(folder / "adapter"))
        save_adapter("new", folder)
        assert state_of(folder / "adapter") == "new"
    assert found <= {"old", "new", "none"}


def state_of(folder):
    """Which adapter a folder holds; "none" where nothing reads it as one."""
    try:
        config, prompt = read_adapter(folder)
    except ValueError as error:
        return "none" if "holds no adapter" in str(error) else "half"
    (which,) = [name for name in LENGTHS if torch.equal(prompt, prompt_for(name))]
    assert config.num_virtual_tokens == LENGTHS[which]
    return which


def save_often(which, folder, times=30):
    for _ in range(times):
        save_adapter(which, folder)


def test_two_processes_that_save_to_one_folder_leave_one_of_the_two_adapters(tmp_path):
    folder, fork = tmp_path / "adapter", multiprocessing.get_context("fork")
    for _ in range(2):
        writers = [fork.Process(target=save_often, args=(which, tmp_path)) for which in LENGTHS]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
        assert [writer.exitcode for writer in writers] == [0, 0]
        # Not through the library's reader, which would refuse a mixture.
        config = json.loads((folder / "adapter_config.json").read_text())
        tensor = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        assert config["num_virtual_tokens"] == len(tensor)
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["adapter_config.json", "adapter_model.safetensors"]


def save_slowly(folder, between, other_done):
    """Waits between the two files for the other process, which has to wait for this one."""
    replace = os.replace

    def slow(source, target):
        replace(source, target)
        if Path(target).name == "adapter_model.safetensors":
            between.set()
            other_done.wait(0.5)

    os.replace = slow
    save_adapter("old", folder)


def test_an_adapter_is_not_written_between_the_two_files_of_another(tmp_path):
    fork = multiprocessing.get_context("fork")
    between, done = fork.Event(), fork.Event()
    slow = fork.Process(target=save_slowly, args=(tmp_path, between, done))
    slow.start()
    assert between.wait(60)
    save_adapter("new", tmp_path)
    done.set()
    slow.join(60)
    assert slow.exitcode == 0
    assert state_of(tmp_path / "adapter") == "new"


def hold(folder, inside):
    with files.alone_by(folder / ".lock"):
        inside.set()
        time.sleep(60)


def test_a_folder_is_free_again_when_its_holder_is_killed(tmp_path):
    fork = multiprocessing.get_context("fork")
    inside = fork.Event()
    holder = fork.Process(target=hold, args=(tmp_path, inside))
    holder.start()
    assert inside.wait(60)
    with (
        pytest.raises(TimeoutError, match="another process holds"),
        files.alone_by(tmp_path / ".lock", waits=False),
    ):
        pass
    holder.kill()
    holder.join(60)
    with files.alone_by(tmp_path / ".lock", waits=False):
        pass


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(37, "No locks available"), "cannot be locked, as some network file systems have no locks"),
        (NotImplementedError("no flock"), "cannot be locked, as some network file systems have no locks"),
        (OSError(30, "Read-only file system", "out/.lock"), "Read-only file system: 'out/.lock'"),
    ],
    ids=["no locks", "no flock", "read-only"],
)
def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(files.FileLock, "acquire", fail)
    with pytest.raises(OSError, match=re.escape(message)) as raised:
        save_adapter("new", tmp_path)
    assert str(raised.value.filename) in (str(tmp_path / ".adapter.lock"), "out/.lock")
    assert state_of(tmp_path / "adapter") == "none"


def test_an_array_that_is_replaced_is_read_whole(tmp_path):
    path = tmp_path / "prompt.npy"
    write_npy(prompt_for("old"), path)
    write_npy(prompt_for("new"), path)
    assert torch.equal(read_npy(path), prompt_for("new"))
