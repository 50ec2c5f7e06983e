"""Output folders: adapters and checkpoints that are there completely or not at all."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softprompt.prompt_paths import ADAPTER_CONFIG, WEIGHTS
from softprompt.tasks.errors import TaskError

TRAINER_STATE = "trainer_state.json"
TASK_FILE = "softprompt.json"
STAGING = ".partial"
LOCK = ".lock"

PROMPT_NAME = "prompt"  # of an ensemble: prompt-1, prompt-2, ...

_PROMPT = re.compile(rf"{PROMPT_NAME}-(\d+)")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def holds_adapter(folder: Path) -> bool:
    """Return whether the folder holds an adapter, an ensemble, or the checkpoint of one."""
    return bool(adapter_folders(folder)) or bool(_checkpoints(folder))


def adapter_folders(folder: Path) -> list[Path]:
    """Return the folder itself where it holds an adapter, else those of its ensemble, in their order."""
    if (folder / ADAPTER_CONFIG).exists():
        return [folder]
    found = [path for path in folder.glob(f"{PROMPT_NAME}-*") if _PROMPT.fullmatch(path.name)]
    members = [path for path in found if (path / ADAPTER_CONFIG).is_file()]
    return sorted(members, key=lambda path: int(path.name.removeprefix(f"{PROMPT_NAME}-")))


def latest_checkpoint(folder: Path | str) -> Path | None:
    """Return the checkpoint with the most steps, passing over those without a readable trainer state."""
    found = _checkpoints(Path(folder))
    complete = [path for path in found if read_object(path / TRAINER_STATE) is not None]
    return complete[-1] if complete else None


def remove_checkpoints(folder: Path, *, keep: int = 0, also: Path | None = None) -> None:
    """Remove the checkpoints but the last `keep` and `also`, and whatever an interrupted save left."""
    checkpoints = _checkpoints(folder)
    with staging(folder) as stage:  # what is half removed must not have its name any more
        for path in checkpoints[: len(checkpoints) - keep]:
            if path != also:
                os.replace(path, stage / path.name)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield an empty folder inside `folder` for files on their way to it; it is gone afterwards.

    There is one for each folder, and what a crash left in it goes: whoever uses it has `folder` to himself,
    see `held`.
    """
    stage = folder / STAGING
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs and sweeps from writing to `folder`, which is made where it is not there.

    Raises:
        TaskError: another process holds it.
    """
    from softprompt.files import alone_by  # locks take a tenth of a second to import

    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone_by(folder / LOCK, waits=False))
        except TimeoutError as error:
            raise TaskError(
                f"another run or sweep is already writing to {folder}: wait until it has ended, or name "
                "another folder"
            ) from error
        yield


def publish_folder(staged: Path, final: Path) -> None:
    """Move a complete folder to its name, in the place of one that has the name already."""
    if final.exists():
        os.replace(final, staged.with_name(f"{final.name}.replaced"))
    os.replace(staged, final)


def publish_adapter(staged: Path, final: Path) -> None:
    """Move the files of a complete adapter, or the folders of a complete ensemble, into `final`.

    The files without which nothing reads a folder as an adapter or an ensemble leave first and arrive last.
    """
    (final / ADAPTER_CONFIG).unlink(missing_ok=True)
    members, is_ensemble = adapter_folders(final), not (staged / ADAPTER_CONFIG).exists()
    if members or is_ensemble:
        (final / TASK_FILE).unlink(missing_ok=True)
    for member in members:
        shutil.rmtree(member)
    if is_ensemble:
        (final / WEIGHTS[0]).unlink(missing_ok=True)
    last = (TASK_FILE, ADAPTER_CONFIG)
    rest = [path.name for path in staged.iterdir() if path.name not in last]
    for name in [*rest, *(name for name in last if (staged / name).exists())]:
        os.replace(staged / name, final / name)


def _checkpoints(folder: Path) -> list[Path]:
    found = [
        path for path in folder.glob("checkpoint-*") if path.is_dir() and _CHECKPOINT.fullmatch(path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
