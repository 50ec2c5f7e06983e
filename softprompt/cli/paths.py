"""What the paths of a call lead to, looked at before torch is imported: a typing error shows at once."""

from collections.abc import Sequence
from pathlib import Path

from softprompt.cli.errors import UsageError
from softprompt.prompt_paths import check_adapter_folder, check_prompt_path
from softprompt.tasks.classification import load_task
from softprompt.tasks.folders import TASK_FILE, adapter_folders
from softprompt.tasks.sources import check_source

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


def check_inputs(*, tables: Sequence[str | None] = (), model: str | None = None) -> None:
    """Raise UsageError or TaskError for the first table or model that is not there; None names none."""
    for table in tables:
        if table is not None:
            check_source(table)
    if model is not None:
        check_model(model)


def check_model(model: str) -> str:
    """Return the model's name, a folder made absolute; raises UsageError for a folder that is no model."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UsageError(f"the model {model} is not a folder: give a model folder or the name of a model")
        return model
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"the model folder {model} has no config.json: give a folder saved by save_pretrained"
        )
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise UsageError(
            f"the model folder {model} has no weights (*.safetensors or pytorch_model.bin): "
            "download or save the whole model"
        )
    return str(folder.resolve())


def recorded_model(adapter: str) -> str | None:
    """Return the model that `softprompt train` recorded in an adapter folder, None where it has not."""
    folder = Path(adapter)
    return load_task(folder)[1] if (folder / TASK_FILE).is_file() else None


def check_prompt_option(option: str, source: str) -> None:
    """Raise UsageError where an option names no prompt, or an ensemble of several."""
    path = Path(source)
    members = adapter_folders(path)
    if len(members) > 1:
        raise UsageError(
            f"{option}: {path} holds an ensemble of {len(members)} prompts: name one of them, {members[0]} "
            f"to {members[-1].name}"
        )
    try:
        check_prompt_path(path)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def check_prompts(source: str) -> None:
    """Raise ValueError where there is no prompt at `source`; an ensemble is one."""
    for path in adapter_folders(Path(source)) or [Path(source)]:
        check_prompt_path(path)


def check_adapters(folders: Sequence[Path]) -> None:
    """Raise UsageError for a folder without the files of an adapter."""
    try:
        for folder in folders:
            check_adapter_folder(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
