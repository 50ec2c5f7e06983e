"""Models in one GGUF file: what `from_pretrained` is told of them, and plain folders for the next time."""

import functools
import hashlib
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt.cli.checks import UsageError, is_gguf
from softprompt.files import alone_by, sync

CACHE_VARIABLE, OFF = "SOFTPROMPT_GGUF_CACHE", "off"
# What transformers and the gguf package say of files that are cut short, or hold what they do not know.
UNREADABLE = (OSError, ValueError, LookupError, AttributeError, TypeError, NotImplementedError, struct.error)


def files_of(model: str) -> tuple[str, dict[str, str]]:
    """Return what `from_pretrained` is told to load a model: a name or a folder, and keyword arguments.

    A GGUF file takes tens of seconds to read, so the first call converts it into a plain folder, which later
    calls and runs find. With `SOFTPROMPT_GGUF_CACHE=off`, or where that folder cannot be written, it is the
    file itself.

    Raises:
        UsageError: the file is no model that transformers can read.
    """
    if not is_gguf(model):
        return model, {}
    folder, name = os.path.split(model)
    root = cache_folder()
    plain = None if root is None else _converted(model, _plain_folder(model, root))
    return (folder, {"gguf_file": name}) if plain is None else (str(plain), {})


def cache_folder() -> Path | None:
    """Return where converted models are kept, None where `SOFTPROMPT_GGUF_CACHE=off` says that none are."""
    named = os.environ.get(CACHE_VARIABLE)
    if named == OFF:
        return None
    return Path(named).expanduser() if named else Path(constants.HF_HOME) / "softprompt" / "gguf"


def _plain_folder(model: str, root: Path) -> Path:
    """The folder of a file's conversion. What it holds never changes: another file has another name."""
    found = os.stat(model)
    identity = f"{model}\n{found.st_size}\n{found.st_mtime_ns}\n{transformers.__version__}"
    return root / f"{Path(model).stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


@functools.cache
def _converted(model: str, plain: Path) -> Path | None:
    """The folder, written where it is not there; None, with a line that says so, where it cannot be."""
    if plain.is_dir():
        return plain
    try:
        plain.parent.mkdir(parents=True, exist_ok=True)
        with alone_by(plain.parent / ".lock"):
            if not plain.is_dir():  # another process may have written it in the meantime
                _convert(model, plain)
    except (OSError, SafetensorError) as error:
        why = " ".join(str(error).split())
        print(
            f"softprompt: {model} is read anew in each run: {plain} cannot be written ({why})",
            file=sys.stderr,
        )
        return None
    return plain


def _convert(model: str, plain: Path) -> None:
    """Write a folder as `save_pretrained` does; it has its name when all of it is on the disk."""
    folder, name = os.path.split(model)
    base = load_gguf(folder, name, torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except UNREADABLE as error:
        raise UsageError(f"cannot load the tokenizer of {model}: {said(error)}") from error
    stage = Path(tempfile.mkdtemp(prefix=f".{plain.name}.", suffix=".partial", dir=plain.parent))
    try:
        base.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        size = 0
        for path in stage.iterdir():
            sync(path)
            size += path.stat().st_size
        stage.chmod(plain.parent.stat().st_mode)  # mkdtemp makes folders that only their owner reads
        os.replace(stage, plain)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    print(
        f"softprompt: {name} was converted into {plain} ({size / 1e6:,.0f} MB), which later runs load at "
        f"once; {CACHE_VARIABLE}={OFF} keeps none",
        file=sys.stderr,
    )


def load_gguf(folder: str, name: str, dtype: torch.dtype | str) -> Any:
    """Load the causal language model in a GGUF file as any other, in a floating-point `dtype`.

    Raises:
        UsageError: the file is no model that transformers can read, or not the whole of one.
    """
    file = os.path.join(folder, name)
    try:
        base, found = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=dtype, output_loading_info=True
        )
    except UNREADABLE as error:
        raise UsageError(f"cannot load the model {file}: {said(error)}") from error
    if found["missing_keys"]:
        # transformers would leave them at random numbers.
        some = ", ".join(sorted(found["missing_keys"])[:3])
        raise UsageError(
            f"cannot load the model {file}: {len(found['missing_keys'])} of its tensors are not in the file "
            f"({some}, ...): is it one of several parts?"
        )
    # The weights are plain tensors now; what says otherwise is what the file held.
    del base.config.quantization_config
    base.hf_quantizer, base.is_quantized, base.quantization_method = None, False, None
    return base


def said(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
