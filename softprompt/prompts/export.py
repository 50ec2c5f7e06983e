"""`softprompt.export`: a trained prompt for other programs.

`save_npy` for anything that reads arrays, `save_peft` for PEFT, `prompt_embeds` and `completion_request` for
servers that take embeddings in the place of a text, such as vLLM with `--enable-prompt-embeds`.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PromptTuningConfig
from safetensors.torch import save_file
from torch import Tensor

from softprompt.files import alone_by, atomic_write, sync
from softprompt.nesting import base_of
from softprompt.prompt_paths import ADAPTER_CONFIG, WEIGHTS
from softprompt.prompts.adapters import check_prompt, prompt_parameter, write_npy
from softprompt.prompts.vocabulary import dtype_of, embed, width_of

__all__ = ["completion_request", "encode", "prompt_embeds", "save_npy", "save_peft", "save_tensor"]


def save_npy(prompt: Tensor, path: str | Path) -> None:
    """Writes [P, H] as a .npy file of float32, which `numpy.load` and `softprompt.init.from_file` read.

    Raises:
        ValueError: the name does not end in .npy, or `prompt` is not a finite [P, H].
    """
    if Path(path).suffix != ".npy":
        raise ValueError(f"{path} must end in .npy")
    is_prompt = isinstance(cast(object, prompt), Tensor) and prompt.ndim == 2
    write_npy(check_prompt(prompt, width=prompt.shape[1] if is_prompt else 0), path)


def save_peft(model: Any, prompt: Tensor, folder: str | Path) -> None:
    """Writes [P, H] as a PEFT adapter for the base model `model`, in a folder that is made if need be.

    `PeftModel.from_pretrained(base, folder)` loads it. The configuration, without which nothing reads a
    folder as an adapter, is written last.

    Raises:
        ValueError: another width than the model's tokens, or values that are not finite.
    """
    check_prompt(prompt, width=width_of(model))
    base = base_of(model)
    sizes = base.config.get_text_config()
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name_or_path or None,
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        num_layers=getattr(sizes, "num_hidden_layers", None),
        num_attention_heads=getattr(sizes, "num_attention_heads", None),
        inference_mode=True,
    )
    write_adapter(config, prompt, folder)


def write_adapter(config: PromptTuningConfig, prompt: Tensor, folder: str | Path) -> None:
    """Writes the two files of a prompt-tuning adapter, which always belong together.

    An interrupt leaves the adapter that was there, the new one, or none: the configuration, without which
    nothing reads a folder as an adapter, leaves first and arrives last. Of two processes that write one
    folder at once, the later one's adapter stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder.resolve()  # by any name, the lock is beside the folder, which holds the adapter alone
    tensor = prompt.detach().to("cpu").contiguous()
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as name:
        stage = Path(name)
        save_file({"prompt_embeddings": tensor}, stage / WEIGHTS[0], metadata={"format": "pt"})
        config.save_pretrained(str(stage))
        for file in (WEIGHTS[0], ADAPTER_CONFIG):
            sync(stage / file)
        with alone_by(whole.with_name(f".{whole.name}.lock")):
            (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
            for file in (WEIGHTS[0], ADAPTER_CONFIG):
                os.replace(stage / file, folder / file)


def prompt_embeds(
    model: Any,
    input_ids: Sequence[int] | Tensor,
    prompt: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[P+L, H]: a prompt and behind it the vectors of L tokens, as the model receives them.

    This is the `inputs_embeds` of the text without padding. What the model does to `inputs_embeds` itself
    (a multiplier, a normalisation) is not in it: a server does it again.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        input_ids: [L] of one text, special tokens included where the model was tuned with them.
        prompt: [P, H]; by default the active adapter's.
        dtype: by default the one of the model's embeddings.

    Raises:
        TypeError: no prompt, and not a PEFT model.
        ValueError: `input_ids` of another rank, no integers or outside of the vocabulary, or a prompt that
            does not fit or is not finite in this dtype.
    """
    if prompt is None:
        prompt = prompt_parameter(model)
    try:
        ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"input_ids must be integers [L], got {input_ids!r}") from error
    if ids.ndim != 1:
        raise ValueError(f"input_ids must be those of one text, [L], got shape {list(ids.shape)}")
    if len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(f"input_ids must be integers, got {ids.dtype}")
    dtype = dtype_of(model) if dtype is None else dtype
    check_prompt(prompt, width=width_of(model), dtype=dtype)
    joined = torch.cat([prompt.detach().to("cpu", torch.float32), embed(model, ids)])
    return joined.to(dtype)


def encode(embeds: Tensor) -> str:
    """The tensor as vLLM's servers read it: what `torch.save` writes, in base64.

    Raises:
        ValueError: not [P+L, H] of fp32, bf16 or fp16.
    """
    if not isinstance(cast(object, embeds), Tensor):
        raise ValueError(f"expected a tensor [P+L, H], got {type(embeds).__name__}")
    if embeds.ndim != 2 or embeds.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"expected [P+L, H] of float32, bfloat16 or float16, got {embeds.dtype} of {list(embeds.shape)}"
        )
    return base64.b64encode(_saved(embeds)).decode("ascii")


def save_tensor(embeds: Tensor, path: str | Path) -> None:
    """Writes the tensor with `torch.save`, for vLLM's offline `LLM.generate({"prompt_embeds": tensor})`."""
    with atomic_write(path) as partial:
        partial.write_bytes(_saved(embeds))


def completion_request(
    served_model: str,
    embeds: Tensor,
    *,
    max_tokens: int,
    stop_token_ids: Sequence[int] = (),
    temperature: float = 0.0,
) -> dict[str, Any]:
    """The JSON body of a request to vLLM's `/v1/completions`.

    Args:
        served_model: the name under which the server serves the base model.
        embeds: [P+L, H] of `prompt_embeds`.
        max_tokens: at most so many tokens are written.
        stop_token_ids: tokens that end the answer; a label ends with the end token it was trained with.
        temperature: 0 writes the likeliest tokens.
    """
    body = {
        "model": served_model,
        "prompt_embeds": encode(embeds),
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    return body | ({"stop_token_ids": list(stop_token_ids)} if stop_token_ids else {})


def _saved(embeds: Tensor) -> bytes:
    # A view would be written with all of the storage behind it.
    buffer = io.BytesIO()
    torch.save(embeds.detach().to("cpu").clone(), buffer)
    return buffer.getvalue()
