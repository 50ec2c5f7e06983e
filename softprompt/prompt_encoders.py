"""What stands in front of each row of a call: the output of PEFT's prompt encoders, and the batch behind it.

Prompt tuning, P-tuning and multitask prompt tuning differ in how they make [P, H] from their parameters. The
packed route only needs that output, and autograd takes its gradient back into whatever made it. The encoders
get the shapes that PEFT's `get_prompt` gives them, which a hook or an encoder of a user's own may count on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import peft.peft_model
import torch
from peft import PeftType
from peft.tuners import MultitaskPromptEmbedding, PromptEmbedding, PromptEncoder
from torch import Tensor, nn

from softprompt.engine import Plan
from softprompt.engine.batch import Batch, check_batch, check_tensor, integers_on
from softprompt.engine.logits_layout import starts_behind_pads
from softprompt.engine.model_spec import has_hooks, prompt_width
from softprompt.engine.placement import after_bos
from softprompt.nesting import base_of

# Code that computes with its own weights and the ids it is given, and with nothing else.
_PLAIN_MODULES = (
    *(PromptEmbedding, PromptEncoder, MultitaskPromptEmbedding),
    *(nn.Embedding, nn.Sequential, nn.Linear, nn.ReLU, nn.LSTM),
)
SERVED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING)


def adapters_of_rows(
    model: Any,
    adapter_names: Sequence[str] | None,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> list[str]:
    """The adapter of each row, or the active one alone where the call names none.

    Raises:
        ValueError: not one known adapter for each row.
    """
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is not None:
        check_tensor("input_ids" if inputs_embeds is None else "inputs_embeds", given)
    if adapter_names is None:
        return [model.active_adapter]
    if not isinstance(adapter_names, Sequence) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names must be a list of names of adapters, got {adapter_names!r}")
    num_rows = len(given) if given is not None and given.ndim else len(adapter_names)
    if isinstance(adapter_names, str) or len(adapter_names) != num_rows:
        raise ValueError(
            f"adapter_names must name one adapter for each of the {num_rows} rows, got {adapter_names!r}"
        )
    unknown = sorted(set(adapter_names) - set(model.peft_config))
    if unknown:
        raise ValueError(
            f"adapter_names has unknown adapters {', '.join(unknown)}; the model has "
            f"{', '.join(model.peft_config)}"
        )
    return list(adapter_names)


def encoder_obstacle(name: str, config: Any, *, per_row: bool, halves: bool = False) -> str | None:
    """Why the prompt of an adapter is not served, as a sentence, or None.

    Args:
        name: of the adapter.
        config: of the adapter.
        per_row: whether the caller gives the adapter the task of each row.
        halves: whether the model is an encoder-decoder, for which PEFT makes twice the rows.
    """
    if config.peft_type not in SERVED:
        served = ", ".join(kind.value for kind in SERVED)
        return f"adapter {name!r} is of type {PeftType(config.peft_type).value}; {served} are served"
    if config.peft_type == PeftType.MULTITASK_PROMPT_TUNING and not per_row:
        return f"adapter {name!r} is of type MULTITASK_PROMPT_TUNING, whose prompt depends on the row's task"
    if config.num_transformer_submodules not in ((1, 2) if halves else (None, 1)):
        return (
            f"adapter {name!r} has num_transformer_submodules={config.num_transformer_submodules}, not 1"
            + (" or 2" if halves else "")
        )
    if config.num_virtual_tokens == 0:
        return f"adapter {name!r} has no virtual tokens"
    return None


def has_tasks(model: Any, name: str) -> bool:
    """Whether an adapter has one prompt for each of several tasks."""
    return bool(model.peft_config[name].peft_type == PeftType.MULTITASK_PROMPT_TUNING)


def tasks_of_rows(model: Any, names: Sequence[str], task_ids: Any, num_rows: int) -> list[int] | None:
    """The task of each row for adapters that have tasks, None where no adapter of the call has.

    Args:
        model: the PEFT model.
        names: adapter of each row, or one for all.
        task_ids: of the call: [B] or [1] integers. On a GPU reading them makes the host wait.
        num_rows: B.

    Raises:
        ValueError: no task for each row, or no integers.
        IndexError: a task that an adapter does not have.
    """
    tasked = [name for name in dict.fromkeys(names) if has_tasks(model, name)]
    if not tasked:
        return None
    expected = (
        f"adapter {tasked[0]!r} is of type MULTITASK_PROMPT_TUNING and needs task_ids: "
        f"the task of each of the {num_rows} rows"
    )
    if task_ids is None:
        raise ValueError(f"{expected}; task_ids cannot be None")
    try:
        given = torch.as_tensor(task_ids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected}; got task_ids={task_ids!r}, expected integers") from error
    if given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"{expected}; got task_ids in {given.dtype}, expected integers")
    if given.shape not in ((num_rows,), (1,), ()):
        raise ValueError(f"{expected}; got task_ids of shape {list(given.shape)}")
    numbers = given.expand(num_rows).tolist()
    of_rows = names if len(names) == num_rows else [names[0]] * num_rows
    for row, (name, task) in enumerate(zip(of_rows, numbers, strict=True)):
        count = model.prompt_encoder[name].prefix_task_cols.shape[0] if name in tasked else 0
        if count and not 0 <= task < count:
            raise IndexError(f"task_ids[{row}] = {task} is outside the tasks 0 .. {count - 1} of {name!r}")
    return numbers


def with_tensor_of_tasks(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call for PEFT's own methods, which take the tasks of the rows as a tensor only."""
    tasks, name = arguments.get("task_ids"), model.active_adapter
    if tasks is None or isinstance(tasks, Tensor) or not has_tasks(model, name):
        return arguments
    numbers = tasks_of_rows(model, [name], tasks, len(tasks) if isinstance(tasks, Sized) else 1)
    return {
        **arguments,
        "task_ids": torch.tensor(numbers, device=model.prompt_encoder[name].embedding.weight.device),
    }


def is_pefts(method: Any) -> bool:
    """Whether a method is PEFT's code. A wrapper around it is not: it has the globals of its own module."""
    return getattr(method, "__globals__", None) is vars(peft.peft_model)


def unshared(model: Any, names: Sequence[str]) -> str | None:
    """Why each row of a call brings a prompt of its own, as a sentence, or None.

    What PEFT's `get_prompt` gives is the same for all rows of an adapter and a task. What another one gives
    may differ from row to row, and so may what a multitask encoder gives that is not PEFT's alone, since it
    sees all rows at once.
    """
    if not is_pefts(model.get_prompt):
        return "get_prompt was replaced"
    for name in dict.fromkeys(names):
        encoder = model.prompt_encoder[name] if has_tasks(model, name) else None
        if encoder is None:
            continue
        if type(encoder) is not MultitaskPromptEmbedding or any(map(has_hooks, encoder.modules())):
            return f"the encoder of adapter {name!r} has hooks, or is not PEFT's"
    return None


def leave_no_trace(model: Any, names: Sequence[str]) -> bool:
    """Whether the encoders of these adapters can be run once more without anybody noticing: they have no
    hooks, draw no random numbers, and are PEFT's.
    """
    return is_pefts(model.get_prompt) and all(
        type(module) in _PLAIN_MODULES and not has_hooks(module) and not vars(module).get("dropout")
        for name in dict.fromkeys(names)
        for module in model.prompt_encoder[name].modules()
    )


def prompt_of_each_row(
    model: Any, name: str, tasks: Sequence[int] | None, num_rows: int
) -> dict[tuple[str, int | None], Tensor]:
    """B prompts [P, H] by adapter and row: what `get_prompt` gives to PEFT's forward.

    Args:
        model: the PEFT model.
        name: its active adapter.
        tasks: of each row, see `tasks_of_rows`.
        num_rows: B.

    Raises:
        ValueError: `get_prompt` gave something else.
    """
    device = model.prompt_encoder[name].embedding.weight.device
    task_ids = None if tasks is None else integers_on(device, tasks)
    made: Any = model.get_prompt(batch_size=num_rows, task_ids=task_ids)
    length = model.prompt_tokens[name].shape[0]
    if not isinstance(made, Tensor) or made.ndim != 3 or made.shape[:2] != (num_rows, length):
        given = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"get_prompt must give [B, P, H] = [{num_rows}, {length}, H], got {given}")
    return {(name, row): prompt for row, prompt in enumerate(made.unbind(0))}


def prompts_of_rows(
    model: Any,
    names: Sequence[str],
    tasks: Sequence[int] | None,
    tokens: dict[str, Tensor],
    num_rows: int,
    *,
    shared: bool,
) -> tuple[dict[tuple[str, int | None], Tensor], list[int] | None]:
    """The distinct prompts of a call, and which of them each row sees.

    Args:
        model: the PEFT model.
        names: adapter of each row, or one for all.
        tasks: of each row, see `tasks_of_rows`.
        tokens: [P] PEFT's virtual token ids of each adapter, on the device of its encoder.
        num_rows: B.
        shared: whether rows of an adapter and a task share a prompt, see `unshared`.

    Returns:
        K prompts [P_k, H] by adapter and task (None: the adapter has no tasks) or row (where they are not
        shared), and the number of each row's prompt: None where all rows see the only one.
    """
    if not shared:
        made = prompt_of_each_row(model, names[0], tasks, num_rows)
        return made, None if num_rows == 1 else list(range(num_rows))
    if tasks is not None and len(names) == 1:
        names = [names[0]] * len(tasks)
    keys = [
        (name, tasks[row] if tasks is not None and has_tasks(model, name) else None)
        for row, name in enumerate(names)
    ]
    tasks_of: dict[str, list[int]] = {}
    for name, task in dict.fromkeys(keys):
        tasks_of.setdefault(name, []).extend([] if task is None else [task])
    made = {}
    for name, wanted in tasks_of.items():
        if wanted:
            made |= {(name, task): prompt for task, prompt in _of_tasks(model, name, wanted, tokens[name])}
        else:
            made[name, None] = prompt_of(model, name, tokens[name])
    numbers = {key: number for number, key in enumerate(made)}
    return made, None if len(made) == 1 else [numbers[key] for key in keys]


def prompt_of(model: Any, name: str, tokens: Tensor | None = None) -> Tensor:
    """[P, H] of an adapter with one prompt for all rows, as PEFT's `get_prompt` makes it.

    Args:
        model: the PEFT model, patched or not.
        name: of the adapter.
        tokens: [P] PEFT's virtual token ids, on the device of the encoder. None: they are copied there.

    Raises:
        ValueError: an encoder that gives no [1, P, H].
    """
    encoder = model.prompt_encoder[name]
    if model.peft_config[name].inference_mode:
        # A loaded P-tuning adapter holds what its head made, and no head.
        prompt: Tensor = encoder.embedding.weight
        return prompt
    if tokens is None:
        tokens = model.prompt_tokens[name].to(next(encoder.parameters()).device)
    given: Any = encoder(tokens[None])
    if isinstance(given, Tensor) and given.ndim == 2:  # PEFT repeats it for each row all the same
        given = given[None]
    if not isinstance(given, Tensor) or given.ndim != 3 or given.shape[:2] != (1, len(tokens)):
        what = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"the prompt encoder of adapter {name!r} must give [1, P, H] = [1, {len(tokens)}, H], got {what}"
        )
    return given[0]


def _of_tasks(model: Any, name: str, tasks: list[int], tokens: Tensor) -> list[tuple[int, Tensor]]:
    """Each task with its [P, H]."""
    prompts = model.prompt_encoder[name](tokens.expand(len(tasks), -1), integers_on(tokens.device, tasks))
    return list(zip(tasks, prompts, strict=True))


# ----------------------------------------------------------------------------------------------- the batch
def batch_of(model: Any, names: Sequence[str], arguments: Mapping[str, Any]) -> tuple[Batch, list[str]]:
    """A call of a patched model as a batch behind prompts, and the adapter of each of the K prompts.

    Args:
        model: the patched model.
        names: adapter of each row, or one for all.
        arguments: of its forward, by name.

    Raises:
        IndexError: a task that an adapter does not have.
        ValueError: says what was given and what is expected.
    """
    prompts, prompt_of_row, _ = _prompts_of(model, names, arguments)
    batch = check_batch(
        list(prompts.values()),
        prompt_width(base_of(model)),
        **_texts_of(arguments),
        labels=arguments.get("labels"),
        prompt_of_row=prompt_of_row,
    )
    return batch, [name for name, _ in prompts]


def _texts_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")}


def seq2seq_batch_of(
    model: Any, names: Sequence[str], arguments: Mapping[str, Any]
) -> tuple[Batch, tuple[Tensor, ...] | None]:
    """A call of a patched encoder-decoder as a batch behind prompts, and the prompts of its decoder.

    PEFT makes prompts for both parts of the model. Multitask prompt tuning uses both; the other types leave
    the decoder's alone, which has a gradient of zero then.

    Raises:
        IndexError: a task that an adapter does not have.
        ValueError: says what was given and what is expected.
    """
    made, prompt_of_row, tasks = _prompts_of(model, names, arguments)
    lengths = [model.peft_config[name].num_virtual_tokens for name, _ in made]
    batch = check_batch(
        [prompt[:length] for prompt, length in zip(made.values(), lengths, strict=True)],
        prompt_width(base_of(model)),
        **_texts_of(arguments),
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
    model: Any, names: Sequence[str], arguments: Mapping[str, Any]
) -> tuple[dict[tuple[str, int | None], Tensor], list[int] | None, list[int] | None]:
    """What `prompts_of_rows` gives for a call, and the task of each row."""
    given = arguments.get("inputs_embeds")
    given = arguments.get("input_ids") if given is None else given
    num_rows = len(names) if given is None or given.ndim == 0 else given.shape[0]
    tasks = tasks_of_rows(model, names, arguments.get("task_ids"), num_rows)
    why = unshared(model, names)
    if why is not None:
        note = f"{why}: it is asked for the prompt of each row, and rows share none (slower)"
        model._softprompt.say_once(note)
    tokens = {name: tokens_of(model, name) for name in dict.fromkeys(names)}
    return *prompts_of_rows(model, names, tasks, tokens, num_rows, shared=why is None), tasks


def placed(model: Any, plan: Plan, batch: Batch) -> Batch:
    """The batch with its prompts where the options of a patched model put them.

    Raises:
        ValueError: a text that has no such place.
    """
    options = model._softprompt.options
    if options.placement == "after_bos":
        batch = after_bos(base_of(model), batch)
    if batch.labels is None and not options.compact and plan.route == "packed":
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
    copied: Tensor = known[2]
    return copied
