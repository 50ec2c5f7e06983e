"""What a call is given, checked before anything is computed: its options and its batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

ON_UNSUPPORTED = ("fallback", "error")
POSITIONS = ("padded", "compact")


@dataclass(frozen=True, eq=False)
class Batch:
    """A padded batch and the prompts that stand in front of it."""

    prompts: tuple[Tensor, ...]  # K of [P_k, H]
    prompt_of_row: Tensor | None  # [B] int; None: all rows see prompt 0
    input_ids: Tensor | None  # [B, L]
    inputs_embeds: Tensor | None  # [B, L, H]
    attention_mask: Tensor  # [B, L]
    labels: Tensor | None  # [B, L]
    wanted: Tensor | None = None  # [B, L] in place of labels: what only logits predict

    @cached_property
    def prompt_lengths(self) -> tuple[int, ...]:
        """P_k."""
        return tuple(prompt.shape[0] for prompt in self.prompts)

    @property
    def shape(self) -> tuple[int, int]:
        """B, L."""
        return self.attention_mask.shape[0], self.attention_mask.shape[1]

    def joined_prompts(self, device: torch.device) -> Tensor:
        """[ΣP, H] on `device`."""
        prompts = [prompt.to(device) for prompt in self.prompts]
        return prompts[0] if len(prompts) == 1 else torch.cat(prompts)


def prompts_of_rows(prompts: tuple[Tensor, ...], batch: Batch, like: Tensor) -> Tensor:
    """[B, P, H] the prompt of each row, zeros behind those that are shorter than the longest.

    Args:
        prompts: K of [P_k, H], as many as the batch has.
        batch: says which row has which.
        like: gives dtype and device.
    """
    longest = max(prompt.shape[0] for prompt in prompts)
    stacked = torch.stack(
        [functional.pad(prompt.to(like.device), (0, 0, 0, longest - prompt.shape[0])) for prompt in prompts]
    )
    if batch.prompt_of_row is None:
        return stacked.expand(batch.shape[0], -1, -1).to(like.dtype)
    return stacked[batch.prompt_of_row.long()].to(like.dtype)


def check_batch(
    prompts: Tensor | Sequence[Tensor],
    hidden_size: int,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    prompt_of_row: Tensor | Sequence[int] | None,
) -> Batch:
    """Turns the arguments of a forward into a Batch; one prompt may come without a list.

    Raises:
        ValueError: says what was given and what is expected.
    """
    input_ids, attention_mask = check_texts(
        hidden_size,
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        labels=labels,
    )
    num_rows, device = attention_mask.shape[0], attention_mask.device
    try:
        prompts = [prompts] if isinstance(prompts, Tensor) else list(prompts)
    except TypeError as error:
        raise ValueError(
            f"prompts must be a tensor [P, {hidden_size}] or a list of them, got {type(prompts).__name__}"
        ) from error
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    for number, prompt in enumerate(prompts):
        check_tensor(f"prompt {number}", prompt)
        if not prompt.is_floating_point():
            raise ValueError(f"prompt {number} must be floating point, got {prompt.dtype}")
        if prompt.ndim != 2 or prompt.shape[1] != hidden_size:
            raise ValueError(f"prompt {number} must be [P, {hidden_size}], got {list(prompt.shape)}")
        if prompt.shape[0] == 0:
            raise ValueError(f"prompt {number} has no virtual tokens, expected at least one")
    if prompt_of_row is None and len(prompts) > 1:
        raise ValueError(f"{len(prompts)} prompts need prompt_of_row: the number of the prompt of each row")
    rows: Tensor | None = None
    if prompt_of_row is not None:
        rows = _checked_rows(prompt_of_row, num_rows, len(prompts), device)
    return Batch(tuple(prompts), rows, input_ids, inputs_embeds, attention_mask, labels)


def check_texts(
    hidden_size: int,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """The input ids that count (None beside `inputs_embeds`), and a mask.

    Raises:
        ValueError: says what was given and what is expected.
    """
    for name, value in (
        ("input_ids", input_ids),
        ("inputs_embeds", inputs_embeds),
        ("attention_mask", attention_mask),
        ("labels", labels),
    ):
        if value is not None:
            check_tensor(name, value)
    if inputs_embeds is not None:
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != hidden_size:
            raise ValueError(f"inputs_embeds must be [B, L, {hidden_size}], got {list(inputs_embeds.shape)}")
        if not inputs_embeds.is_floating_point():
            raise ValueError(f"inputs_embeds must be floating point, got {inputs_embeds.dtype}")
        shape, device, input_ids = inputs_embeds.shape[:2], inputs_embeds.device, None
    elif input_ids is not None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [B, L], got shape {list(input_ids.shape)}")
        if not holds_integers(input_ids):
            raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
        shape, device = input_ids.shape, input_ids.device
    else:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    num_rows = shape[0]
    if num_rows == 0:
        raise ValueError(f"the batch is empty: expected at least one row, got shape {list(shape)}")
    if attention_mask is None:
        attention_mask = torch.ones(shape, dtype=torch.int8, device=device)
    elif attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must be [B, L] = {list(shape)}, without the prompt, got shape "
            f"{list(attention_mask.shape)}"
        )
    if attention_mask.is_complex():
        raise ValueError(f"attention_mask must be 1 and 0, got {attention_mask.dtype}")
    if labels is not None:
        if labels.shape != shape:
            raise ValueError(
                f"labels must be [B, L] = {list(shape)}, without the prompt, got shape {list(labels.shape)}"
            )
        if not holds_integers(labels):
            raise ValueError(f"labels must be integers, got {labels.dtype}")
    return input_ids, attention_mask


def check_tensor(name: str, value: object) -> None:
    """Raises ValueError unless it is a tensor with one place for each of its numbers."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a dense tensor, got a {layout} one")


def holds_integers(value: Tensor) -> bool:
    """Whether its dtype is one of whole numbers."""
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _checked_rows(
    prompt_of_row: Tensor | Sequence[int], num_rows: int, num_prompts: int, device: torch.device
) -> Tensor:
    # A list is not made a tensor: reading one back counts as a wait of the host.
    given: Any = prompt_of_row.tolist() if isinstance(prompt_of_row, Tensor) else prompt_of_row
    numbers: list[Any] = list(given) if isinstance(given, Iterable) else [None]
    if any(isinstance(number, bool) or not hasattr(number, "__index__") for number in numbers):
        raise ValueError(f"prompt_of_row must be [B] integers, one for each row, got {prompt_of_row!r}")
    if len(numbers) != num_rows:
        raise ValueError(f"prompt_of_row must have one entry for each of {num_rows} rows, got {len(numbers)}")
    for row, number in enumerate(numbers):
        if not 0 <= number < num_prompts:
            raise ValueError(f"prompt_of_row[{row}] = {number} is not one of the {num_prompts} prompts")
    return integers_on(device, numbers, torch.int32)


def integers_on(device: torch.device, numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """[N] numbers that the host knows, on a device; it does not wait for the copy."""
    made = torch.tensor(numbers, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def check_option(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_switch(name: str, value: bool) -> None:
    """Raises ValueError unless `value` is True or False: a text, as "False", would count as True."""
    if not isinstance(cast(object, value), bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def refuse_prompt_model(model: Any, function: str) -> None:
    """Raises TypeError for a PEFT model with a prompt, which would stand behind those of the call."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise TypeError(
            f"{function} takes a language model and prompts, got a {type(model).__name__} that has a prompt "
            "itself: give model.get_base_model(), or call the model after softprompt.patch(model)"
        )
