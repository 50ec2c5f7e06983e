"""Loading the frozen model, its tokenizer and trained prompts, with one-line errors."""

import functools
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, PromptTuningConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import softprompt
from softprompt.cli.checks import UsageError, check_model, check_prompt_option, usage_errors
from softprompt.cli.gguf import files_of, load_gguf
from softprompt.cli.options import ComputeOptions
from softprompt.generation.stock import right_options
from softprompt.prompts.adapters import check_prompt, read_adapter, read_npy
from softprompt.prompts.vocabulary import width_of
from softprompt.tasks.classification import TextTask, load_task
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
    task: TextTask | None
    model: str | None


def quiet_libraries() -> None:
    """Keep the progress bars and notices of transformers and PEFT out of the command's own output."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Position ids are not supported")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def choose_device(name: str) -> str:
    """Return "cpu" or "cuda" for the value of `--device`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def prepare(
    compute: ComputeOptions, *, tiny: bool = False, trained: str | None = None
) -> tuple[str, torch.dtype]:
    """Return the device and the dtype of the frozen model, and set the number of CPU threads.

    `trained` is the dtype that an existing prompt was trained in: "auto" takes it where it can be had.
    """
    device = choose_device(compute.device)
    set_threads(compute.threads, tiny=tiny)
    dtype = compute.dtype
    if dtype == "auto" and trained is not None and not (trained == "float16" and device == "cpu"):
        dtype = trained
    return device, choose_dtype(dtype, device, tiny=tiny)


def set_threads(threads: int | None, *, tiny: bool) -> None:
    """Set the number of CPU threads of torch, if it was given or the model is the tiny one."""
    # Threads that share a tiny matrix spend most of their time waiting for each other.
    if threads is not None or tiny:
        torch.set_num_threads(threads or 1)


def choose_dtype(name: str, device: str, *, tiny: bool = False) -> torch.dtype:
    """Return the dtype of the frozen model for the value of `--dtype`."""
    if name == "float16" and device == "cpu":
        raise UsageError("--dtype float16 needs a GPU; use bfloat16 or float32 on the CPU")
    if name == "auto":
        name = "bfloat16" if has_fast_bf16(device) and not tiny else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def has_fast_bf16(device: str) -> bool:
    """Whether a device, "cpu" or "cuda", multiplies bfloat16 matrices itself."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a model."""
    files, arguments = files_of(model)
    try:
        return AutoTokenizer.from_pretrained(files, **arguments)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the tokenizer of {model}: {_sentence(error)}") from error


def load_model(model: str, dtype: torch.dtype | str) -> Any:
    """Load a causal language model in `dtype`, in evaluation mode; "auto" is the dtype of its files."""
    files, arguments = files_of(model)
    if arguments:
        return load_gguf(files, arguments["gguf_file"], dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(files, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the model {model}: {_sentence(error)}") from error


def load_adapters(base: Any, model: str, folders: list[Path]) -> Any:
    """Put adapters on a model: one under PEFT's usual name, several under the names of their folders."""
    peft_model: Any = None
    for folder in folders:
        _check_adapter(base, model, folder)
        name = "default" if len(folders) == 1 else folder.name
        try:
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
            else:
                peft_model.load_adapter(str(folder), name)
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"cannot load the adapter {folder}: {error}") from error
    return peft_model


def _check_adapter(base: Any, model: str, folder: Path) -> None:
    """Raise UsageError for what PEFT would load without a word, or look for on the model hub."""
    with usage_errors():
        config, prompt = read_adapter(folder)
    if config.task_type != "CAUSAL_LM":
        raise UsageError(
            f"the adapter in {folder} is for models of the task type {config.task_type}, expected CAUSAL_LM"
        )
    width, model_width = prompt.shape[1], width_of(base)
    if width != model_width:
        raise UsageError(
            f"the adapter {folder} does not fit the model {model}: its virtual tokens are {width} "
            f"numbers wide, the model's tokens {model_width}; give the --model that it was trained with"
        )


def patch(model: Any, *, positions: str = "padded", no_patch: bool = False) -> Any:
    """Put softprompt's faster path under a PEFT model, or leave it as it is for `--no-patch`."""
    if not no_patch:
        return softprompt.patch(model, positions=positions)
    if right_options(model):
        _say_once(
            f"softprompt: --no-patch: PEFT {peft.__version__} cannot tell from the cache of transformers "
            f"{transformers.__version__} whether it holds the prompt, so labels are written without a cache, "
            "which is slower"
        )
    return model


def open_prompt(source: str, model: str | None) -> SavedPrompt:
    """Read the prompt of `--adapter`; `model` is that of `--model`, which wins over recorded names.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    check_prompt_option("--adapter", source)
    path, task = Path(source), None
    with usage_errors("--adapter: "):
        config, prompt = read_adapter(path) if path.is_dir() else (None, read_npy(path))
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
    with usage_errors(after=f"; the model is {name}: give the --model that it was trained with"):
        check_prompt(saved.prompt, width=width_of(base), source=f"the prompt in {saved.source}")
    return base, name


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _sentence(error: BaseException) -> str:
    return re.split(r"(?<=[.:])\s|\n", str(error).strip(), maxsplit=1)[0] or type(error).__name__
