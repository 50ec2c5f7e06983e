"""From a call of a patched model to the batch that the engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softprompt.encoders import prompts_of_rows, tasks_of_rows, unshared
from softprompt.engine import Plan
from softprompt.engine.answers import starts_behind_pads
from softprompt.engine.batch import Batch, check_batch
from softprompt.engine.forward import prompt_width
from softprompt.engine.placement import after_bos
from softprompt.notices import say_once


def batch_of(
    model: Any,
    names: Sequence[str],
    *,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    task_ids: Tensor | Sequence[int] | None,
) -> tuple[Batch, list[str]]:
    """A call of a patched model as a batch behind prompts, and the adapter of each of the K prompts.

    Raises:
        IndexError: a task that an adapter does not have.
        ValueError: says what was given and what is expected.
    """
    prompts, prompt_of_row, _ = _prompts_of(model, names, task_ids, input_ids, inputs_embeds)
    batch = check_batch(
        list(prompts.values()),
        prompt_width(model.get_base_model()),
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        labels=labels,
        prompt_of_row=prompt_of_row,
    )
    return batch, [name for name, _ in prompts]


def seq2seq_batch_of(
    model: Any,
    names: Sequence[str],
    *,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    task_ids: Tensor | Sequence[int] | None,
) -> tuple[Batch, tuple[Tensor, ...] | None]:
    """A call of a patched encoder-decoder as a batch behind prompts, and the prompts of its decoder.

    PEFT makes prompts for both parts of the model. Multitask prompt tuning uses both; the other types leave
    the decoder's alone, which has a gradient of zero then.

    Raises:
        IndexError: a task that an adapter does not have.
        ValueError: says what was given and what is expected.
    """
    made, prompt_of_row, tasks = _prompts_of(model, names, task_ids, input_ids, inputs_embeds)
    lengths = [model.peft_config[name].num_virtual_tokens for name, _ in made]
    batch = check_batch(
        [prompt[:length] for prompt, length in zip(made.values(), lengths, strict=True)],
        prompt_width(model.get_base_model()),
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        labels=None,
        prompt_of_row=prompt_of_row,
    )
    if tasks is None:
        return batch, None
    rest = tuple(prompt[length:] for prompt, length in zip(made.values(), lengths, strict=True))
    sizes = {prompt.shape[0] for prompt in rest}
    if len(sizes) > 1:
        raise ValueError(
            f"the decoder's prompts of a batch must have one length, got {sorted(sizes)} for adapters "
            f"{', '.join(dict.fromkeys(name for name, _ in made))}"
        )
    return batch, rest if sizes != {0} else None


def _prompts_of(
    model: Any,
    names: Sequence[str],
    task_ids: Tensor | Sequence[int] | None,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[dict[tuple[str, int | None], Tensor], list[int] | None, list[int] | None]:
    """What `prompts_of_rows` gives for a call, and the task of each row."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    num_rows = len(names) if given is None or given.ndim == 0 else given.shape[0]
    tasks = tasks_of_rows(model, names, task_ids, num_rows)
    why = unshared(model, names)
    if why is not None:
        say_once(model, f"{why}: it is asked for the prompt of each row, and rows share none (slower)")
    tokens = {name: tokens_of(model, name) for name in dict.fromkeys(names)}
    return *prompts_of_rows(model, names, tasks, tokens, num_rows), tasks


def placed(model: Any, plan: Plan, batch: Batch) -> Batch:
    """The batch with its prompts where the options of a patched model put them.

    Raises:
        ValueError: a text that has no such place.
    """
    options = model._softprompt.options
    if options.placement == "after_bos":
        batch = after_bos(model.get_base_model(), batch)
    if batch.labels is None and options.positions == "padded" and plan.route == "packed":
        # A loss of the caller's own may look at any column that predicts a token.
        batch = replace(batch, wanted=starts_behind_pads(batch.attention_mask))
    return batch


def tokens_of(model: Any, name: str) -> Tensor:
    """[P] PEFT's virtual token ids on the encoder's device. PEFT keeps them on the CPU; copying waits."""
    tokens: Tensor = model.prompt_tokens[name]
    device = model.prompt_encoder[name].embedding.weight.device
    if tokens.device == device:
        return tokens
    copies = model._softprompt.tokens
    known = copies.get(name)
    if known is None or known[0] is not tokens or known[1] != tokens._version or known[2].device != device:
        with torch.inference_mode(False):
            known = copies[name] = (tokens, tokens._version, tokens.to(device))
    return known[2]
