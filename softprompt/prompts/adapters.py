"""Prompts in PEFT models, adapter folders and .npy files: found, checked, read and replaced."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftConfig, PeftModel, PeftType, PromptTuningConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from softprompt.files import atomic_write
from softprompt.prompt_paths import check_adapter_folder, check_file

INITIAL_PROMPT = "initial_prompt.npy"

_KEY = "prompt_embeddings"
Model = TypeVar("Model", bound=nn.Module)


def prompt_parameter(model: nn.Module, adapter_name: str | None = None) -> nn.Parameter:
    """The trained [P, H] parameter of a prompt-tuning adapter, the active one by default.

    Raises:
        TypeError: not a PEFT model.
        ValueError: no such adapter, or one of another type.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a PEFT model with a prompt-tuning adapter, got {type(model).__name__}")
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(model.peft_config)}")
    kind = PeftType(model.peft_config[name].peft_type)
    if kind != PeftType.PROMPT_TUNING:
        raise ValueError(f"adapter {name!r} is of type {kind.value}, expected PROMPT_TUNING")
    parameter: nn.Parameter = model.prompt_encoder[name].embedding.weight
    return parameter


def set_prompt(model: Model, prompt: Tensor, adapter_name: str | None = None) -> Model:
    """Sets the values of a prompt-tuning adapter, in place: optimizers that hold the parameter keep it.

    Args:
        model: a PEFT model.
        prompt: [P, H] of any floating dtype and device; cast to the parameter's.
        adapter_name: the active adapter by default.

    Returns:
        The same model.

    Raises:
        TypeError: not a PEFT model.
        ValueError: no such adapter, another shape than the adapter's, or values that are not finite.
    """
    parameter = prompt_parameter(model, adapter_name)
    length, width = parameter.shape
    check_prompt(prompt, width=width, num_virtual_tokens=length, dtype=parameter.dtype)
    with torch.no_grad():
        parameter.copy_(prompt)
    return model


def check_prompt(
    prompt: Tensor,
    *,
    width: int,
    num_virtual_tokens: int | None = None,
    source: str = "the prompt",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns `prompt` where it is a floating [P, H] of this P (None: any from 1) and H, finite in `dtype`.

    Raises:
        ValueError: it is not; `source` is how the message calls it.
    """
    if not isinstance(prompt, Tensor):
        raise ValueError(f"{source} must be a tensor, got {type(prompt).__name__}")
    expected = f"[{'P' if num_virtual_tokens is None else num_virtual_tokens}, {width}]"
    if prompt.ndim != 2 or not prompt.is_floating_point():
        raise ValueError(
            f"{source} must be floating-point numbers of shape {expected}, got {prompt.dtype} of shape "
            f"{list(prompt.shape)}"
        )
    length, given_width = prompt.shape
    if given_width != width:
        raise ValueError(
            f"{source} is {given_width} numbers wide, the model's tokens {width}: it belongs to another model"
        )
    if length == 0 or num_virtual_tokens not in (None, length):
        raise ValueError(
            f"{source} has {length} virtual tokens, expected {num_virtual_tokens or 'one or more'}"
        )
    if not torch.isfinite(prompt.to(dtype)).all():
        raise ValueError(f"{source} has values that are not finite in {str(dtype).removeprefix('torch.')}")
    return prompt


def read_prompt(path: str | Path) -> Tensor:
    """[P, H] fp32 of a .npy file or an adapter folder.

    Raises:
        ValueError: neither, or one that cannot be read.
    """
    path = Path(path)
    return read_adapter(path)[1] if path.is_dir() else read_npy(path)


def read_npy(path: str | Path) -> Tensor:
    """[P, H] fp32 of a .npy file. Pickled arrays are refused: reading one runs the code in it.

    Raises:
        ValueError: no such file, or not a plain array of numbers with two dimensions.
    """
    path = Path(path)
    check_file(path)
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # broken headers end in errors of NumPy, of its parser and of the zip reader
        raise ValueError(f"{path} is not a readable .npy file without pickled objects: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} holds several arrays (.npz), expected one .npy array [P, H]")
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(
            f"{path} must hold floating-point numbers of shape [P, H], got {array.dtype} of shape "
            f"{list(array.shape)}"
        )
    return torch.from_numpy(array.astype(np.float32))


def write_npy(prompt: Tensor, path: str | Path) -> None:
    """Writes a prompt as a .npy of float32; no half-written file is ever left under the name."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, prompt.detach().to("cpu", torch.float32).numpy(), allow_pickle=False)


def read_adapter(folder: str | Path) -> tuple[PromptTuningConfig, Tensor]:
    """The configuration and the [P, H] fp32 prompt of an adapter folder of PEFT.

    Raises:
        ValueError: not a folder with a prompt-tuning adapter, or one that cannot be read.
    """
    folder = Path(folder)
    check_adapter_folder(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights: dict[str, Any] = load_peft_weights(str(folder), device="cpu")
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"the adapter in {folder} cannot be read: {error}") from error
    if config.peft_type != PeftType.PROMPT_TUNING:
        raise ValueError(
            f"the adapter in {folder} is of type {PeftType(config.peft_type).value}, expected PROMPT_TUNING"
        )
    prompt = weights.get(_KEY)
    if not isinstance(prompt, Tensor) or prompt.ndim != 2 or not prompt.is_floating_point():
        raise ValueError(f"the adapter in {folder} has no floating-point {_KEY} of shape [P, H]")
    expected = (config.num_virtual_tokens or 0) * (config.num_transformer_submodules or 1)
    if len(prompt) != expected:
        raise ValueError(
            f"the adapter in {folder} has {len(prompt)} virtual tokens, its configuration says {expected}"
        )
    prompt = prompt.to(torch.float32)
    if not torch.isfinite(prompt).all():
        raise ValueError(f"the adapter in {folder} has values that are not finite")
    return config, prompt


def check_base(model: Any, config: PromptTuningConfig, source: str) -> None:
    """Raises ValueError where an adapter's configuration names another base model than `model`.

    Names are compared by their last part, so that a local copy of a model is the same model; a name that is
    missing on either side is no difference.
    """
    theirs, ours = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if theirs and ours and Path(theirs).name != Path(ours).name:
        raise ValueError(
            f"{source} was trained for the model {theirs}, not for {ours}: its vectors mean nothing there "
            "unless one is a variant of the other"
        )
