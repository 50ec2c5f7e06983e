"""What is looked at before torch is imported, so that a typing error shows at once; and what errors say."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from softprompt.prompt_paths import check_prompt_path
from softprompt.tasks.folders import adapter_folders
from softprompt.tasks.text_files import check_source

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
# Each with the name of its module.
EXTRA_PACKAGES = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "matplotlib": "matplotlib",
    "pandas": "pandas",
    "rich": "rich",
    "rouge-score": "rouge_score",
    "sacrebleu": "sacrebleu",
    "scikit-learn": "sklearn",
}


class UsageError(Exception):
    """A request that cannot be met; the message is one line with the problem and the remedy. Exit code 2."""


@contextmanager
def usage_errors(before: str = "", after: str = "") -> Iterator[None]:
    """Turn a ValueError of a block into a UsageError that says the same between two texts."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{before}{error}{after}") from error


OUT_OF_MEMORY = (
    "the memory is not enough for this: give a smaller --batch-size, --max-length or --num-virtual-tokens, "
    "or --dtype bfloat16"
)
# What numpy, torch and safetensors say where a file ends too early; none of it names an error of the system.
_CUT_SHORT = ("requested and", "inline_container", "PytorchStreamWriter", "I/O error")


def what_the_machine_lacks(error: BaseException) -> str | None:
    """Return the line for an error that is the machine's and not the program's, None for any other."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    said = str(error)
    # By its name: the command line shows its help without waiting for torch.
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "can't allocate memory" in said:
        return OUT_OF_MEMORY
    if any(words in said for words in _CUT_SHORT):
        return f"a file could not be written, is the disk full? ({' '.join(said.split())})"
    return None


def require_extra() -> None:
    """Raise UsageError naming the packages of the extra `cli` that are not installed."""
    missing = [name for name, module in EXTRA_PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} is not installed: run pip install '.[cli]' in the folder of softprompt's "
            "sources"
        )


def refuse_several_processes() -> None:
    """Raise UsageError behind torchrun or `accelerate launch`, which start the command several times."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UsageError(
            f"the command line runs in one process, and WORLD_SIZE is {processes}: start it without torchrun "
            "or accelerate launch; docs/distributed.md has a script for several processes"
        )


def check_inputs(*tables: str | None, model: str | None) -> None:
    """Raise UsageError or TaskError for the first table or model that is not there; None names none."""
    for table in tables:
        if table is not None:
            check_source(table)
    if model is not None:
        check_model(model)


def check_output_folder(output: str) -> Path:
    """Return the folder of `--output`; raises UsageError for a file."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file: name a folder")
    return folder


def check_output_file(output: str) -> Path:
    """Return the file of `--output`; raises UsageError for a folder."""
    file = Path(output)
    if file.is_dir():
        raise UsageError(f"--output {file} is a folder: name a file")
    return file


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError where there is something under a path, unless it is to be replaced."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already: name another --output or replace it with --overwrite")


def is_gguf(model: str) -> bool:
    """Return whether a model is named by a GGUF file, which need not be there."""
    return Path(model).suffix.lower() == ".gguf" and not Path(model).is_dir()


def check_model(model: str) -> str:
    """Return a model's name, a folder or GGUF file made absolute; raises UsageError for what is no model."""
    folder = Path(model).expanduser()
    if is_gguf(str(folder)):
        return _check_gguf(folder)
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


def _check_gguf(file: Path) -> str:
    if not file.is_file():
        raise UsageError(
            f"the model {file} is not there: give a GGUF file, a model folder or the name of a model"
        )
    with file.open("rb") as content:
        start = content.read(4)
    if start != b"GGUF":
        raise UsageError(f"the model {file} is no GGUF file: it starts with {start!r}; download it again")
    if find_spec("gguf") is None:
        raise UsageError(
            f"the model {file} needs the package gguf: run pip install '.[real]' in the folder of "
            "softprompt's sources"
        )
    # Not resolved: behind a link, as the model hub's cache has them, the file need not be called .gguf.
    return os.path.abspath(file)


def check_prompt_option(option: str, source: str) -> None:
    """Raise UsageError where an option names no prompt, or an ensemble of several."""
    path = Path(source)
    members = adapter_folders(path)
    if len(members) > 1:
        raise UsageError(
            f"{option}: {path} holds an ensemble of {len(members)} prompts: name one of them, {members[0]} "
            f"to {members[-1].name}"
        )
    with usage_errors(f"{option}: "):
        check_prompt_path(path)
