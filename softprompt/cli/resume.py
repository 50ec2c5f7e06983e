"""Interrupting a training run, and going on with it."""

import hashlib
import json
import os
import shlex
import signal
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from softprompt.cli.checks import UsageError, usage_errors
from softprompt.cli.options import option_name
from softprompt.prompts.adapters import read_adapter
from softprompt.tasks.callbacks import StopAtStepEnd
from softprompt.tasks.classification import TextTask
from softprompt.tasks.folders import adapter_folders
from softprompt.tasks.table import Table

# Without them Trainer goes on with a new optimizer and other rows, and says nothing.
STATE_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")

SavedRun = tuple[TextTask, str, dict[str, Any]]


def fingerprint(table: Table) -> str:
    """Return a hash of the texts, labels and other columns that the template reads, in their order."""
    others = [table.others] if table.others else []
    content = json.dumps([table.texts, table.labels, *others]).encode()
    return hashlib.sha256(content).hexdigest()


def check_whole(checkpoint: Path) -> None:
    """Raise UsageError where files of a checkpoint are missing or damaged."""
    damaged = f"--resume: {checkpoint} is damaged ("
    remedy = "): remove it to go on from the checkpoint before, or train without --resume"
    with usage_errors(damaged, remedy):
        for folder in adapter_folders(checkpoint) or [checkpoint]:
            read_adapter(folder)
        for name in STATE_FILES:
            if not _is_whole(checkpoint / name):
                raise ValueError(f"{name} is missing or not what torch wrote")


def _is_whole(file: Path) -> bool:
    """Whether a file of `torch.save` is there, and its checksums are right. Nothing in it is run."""
    try:
        with zipfile.ZipFile(file) as content:
            return content.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def check_same_run(saved: SavedRun, now: SavedRun) -> None:
    """Raise UsageError where (task, model, settings) of this run are not those of the checkpoint."""
    before, after = (
        {"task": "generate" if task.generates else "classify", **vars(task), "model": model, **settings}
        for task, model, settings in (saved, now)
    )
    for name, value in after.items():
        # What the table calls the labels changes nothing that is learnt.
        if name == "label_names" or before.get(name) == value:
            continue
        if name in ("rows", "labels"):
            raise UsageError(
                "--resume: the training rows are not those of the checkpoint: give the same table, and the "
                "same --eval-data, --eval-share, --label-map, --balance-labels and --skip-empty"
            )
        raise UsageError(
            f"--resume: {option_name(name)} is {value!r}, but the checkpoint was trained with "
            f"{before.get(name)!r}: give the same, or train without --resume"
        )


@contextmanager
def stop_on_interrupt(stop: StopAtStepEnd) -> Iterator[None]:
    """Turn the first Ctrl-C into a request to stop after the step; a second one ends at once."""

    def request(signal_number: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the signal may arrive in the middle of another write to the same buffer.
        os.write(2, b"softprompt: stopping after this step; Ctrl-C again to stop at once\n")

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def say_how_to_resume(argv: list[str], step: int, steps: int, output: Path) -> int:
    """Print the command that goes on with an interrupted run; returns the exit code 130."""
    again = [argument for argument in argv if argument not in ("--overwrite", "--resume")]
    print(
        f"softprompt: interrupted after step {step} of {steps}; {output}/checkpoint-{step} is complete. "
        f"Go on with: softprompt {shlex.join([*again, '--resume'])}",
        file=sys.stderr,
    )
    return 130
