"""Trained prompts that a command is given: an adapter folder or a .npy file, with all that is known of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PromptTuningConfig
from torch import Tensor

from softprompt.cli.errors import UsageError
from softprompt.cli.models import load_model
from softprompt.cli.paths import check_model, check_prompt_option
from softprompt.prompts.adapters import check_prompt, read_adapter, read_npy
from softprompt.prompts.vocabulary import width_of
from softprompt.tasks.classification import ClassificationTask, load_task
from softprompt.tasks.folders import TASK_FILE


@dataclass(frozen=True, eq=False)
class SavedPrompt:
    """A prompt and where it came from.

    Attributes:
        source: the folder or file.
        prompt: [P, H] fp32.
        config: PEFT's configuration, None for a .npy file.
        task: what `softprompt train` recorded, None where something else wrote the prompt.
        model: name of the base model, None where nothing names it.
    """

    source: Path
    prompt: Tensor
    config: PromptTuningConfig | None
    task: ClassificationTask | None
    model: str | None


def open_prompt(source: str, model: str | None) -> SavedPrompt:
    """Read the prompt of `--adapter`; `model` is that of `--model`, which wins over recorded names.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    check_prompt_option("--adapter", source)
    path, config, task = Path(source), None, None
    try:
        if path.is_dir():
            config, prompt = read_adapter(path)
        else:
            prompt = read_npy(path)
    except ValueError as error:
        raise UsageError(f"--adapter: {error}") from error
    if (path / TASK_FILE).is_file():
        task, trained_model, _ = load_task(path)
        model = model or trained_model
    if config is not None:
        model = model or config.base_model_name_or_path
    return SavedPrompt(path, prompt, config, task, model)


def load_base(saved: SavedPrompt) -> tuple[Any, str]:
    """Load the base model of a prompt in the dtype of its files; returns it and its name.

    Raises:
        UsageError: nothing names a model, it cannot be loaded, or the prompt does not fit it.
    """
    if saved.model is None:
        raise UsageError(f"{saved.source} does not say for which model it was trained: give --model")
    name = check_model(saved.model)
    base = load_model(name, "auto")
    try:
        check_prompt(saved.prompt, width=width_of(base), source=f"the prompt in {saved.source}")
    except ValueError as error:
        raise UsageError(
            f"{error}; the model is {name}: give the --model that it was trained with"
        ) from error
    return base, name
