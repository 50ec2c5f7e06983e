"""Prompt ensembles: several prompts of one frozen model, trained in one batch stream and asked together.

Section 6 of Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning": N prompts stand
in for N models, and the frozen model is there once. Here every step packs its batch once per prompt and runs
one forward and one backward for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor

from softprompt.eligibility import adapter_obstacle
from softprompt.engine.batch import POSITIONS, check_batch, check_option
from softprompt.engine.model_spec import prompt_width
from softprompt.engine.runner import RunOptions, UnsupportedModelError, obstacle_to, runner_of
from softprompt.nesting import base_of
from softprompt.ops.registry import AUTO
from softprompt.prompt_encoders import prompt_of
from softprompt.state import state_of

COMBINATIONS = ("vote", "mean")
PROMPT_NAME = "prompt"  # the adapters are prompt-1, prompt-2, ...


class PromptLosses(NamedTuple):
    """What `losses` found."""

    total: Tensor  # [] the sum of the prompts' mean losses: its gradient is that of each prompt trained alone
    each: Tensor  # [K] the mean loss of each prompt, detached


def create(base: Any, configs: Sequence[PromptTuningConfig], *, seeds: Sequence[int] | None = None) -> Any:
    """A PEFT model with one adapter for each configuration, `prompt-1` to `prompt-N`.

    Args:
        base: the frozen causal LM.
        configs: N of them; they may differ in anything, length and initialiser included.
        seeds: of the prompts; each prompt is that of `torch.manual_seed(seed); get_peft_model(base, config)`.
            None: 0 .. N-1. The state of torch's random numbers is left as it was.

    Raises:
        TypeError: something else than configurations.
        ValueError: fewer than two configurations, or not one seed for each.
    """
    if not isinstance(configs, Sequence):
        raise TypeError(f"expected a list of PromptTuningConfig, got {type(configs).__name__}")
    for config in configs:
        if not isinstance(config, PromptTuningConfig):
            raise TypeError(f"expected a list of PromptTuningConfig, got {type(config).__name__} in it")
    if len(configs) < 2:
        raise ValueError(f"an ensemble needs at least two prompts, got {len(configs)}")
    seeds = range(len(configs)) if seeds is None else seeds
    if len(seeds) != len(configs):
        raise ValueError(f"expected one seed for each of {len(configs)} prompts, got {len(seeds)}")
    model: Any = None
    with torch.random.fork_rng(devices=[]):
        for number, (config, seed) in enumerate(zip(configs, seeds, strict=True), start=1):
            # PEFT draws prompts on the CPU. torch.manual_seed would seed GPUs too, which are not put back.
            torch.default_generator.manual_seed(seed)
            name = f"{PROMPT_NAME}-{number}"
            if model is None:
                model = get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    return model


def losses(
    model: Any,
    input_ids: Tensor,  # [B, L]
    attention_mask: Tensor | None = None,  # [B, L]
    labels: Tensor | None = None,  # [B, L]
    *,
    adapters: Sequence[str] | None = None,
    own_rows: bool = False,
    positions: str | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> PromptLosses:
    """The mean loss of a batch behind the prompt of each adapter, in one forward.

    `losses(...).total.backward()` gives every prompt the gradient that it has alone; an optimizer that treats
    parameters one by one (AdamW, Adafactor) then trains each prompt as if it were the only one.

    Args:
        model: a PEFT prompt-tuning model, patched or not.
        input_ids: [B, L], without the prompt.
        attention_mask: [B, L], 0 = pad. None: no pads.
        labels: [B, L], -100 = no label.
        adapters: names of K adapters, two or more. None: all.
        own_rows: every prompt has rows of its own, B / K of them: those of the first prompt come first.
        positions: "padded" or "compact", see `softprompt.patch`. None: what the model was patched with, else
            "padded".
        num_items_in_batch: what each prompt's summed loss is divided by (gradient accumulation). None: the
            labels of this batch.

    Returns:
        `total` [], to be differentiated, and `each` [K], the losses of the prompts.

    Raises:
        TypeError: not a PEFT model.
        ValueError: fewer than two adapters, an unknown or a repeated one, no labels, or rows that cannot be
            dealt out evenly.
        UnsupportedModelError: the model or an adapter is not served by the packed route.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"an ensemble is a PEFT model with several adapters, got {type(model).__name__}")
    if isinstance(adapters, str):
        raise ValueError(f"adapters must be a list of names, got {adapters!r}")
    names = list(model.peft_config) if adapters is None else list(adapters)
    if len(names) < 2:
        raise ValueError(f"an ensemble needs at least two prompts, got {len(names)}")
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise ValueError(
            f"unknown adapters {', '.join(map(str, unknown))}; the model has {', '.join(model.peft_config)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"every adapter must be named once, got {', '.join(names)}")
    if labels is None:
        raise ValueError("an ensemble is trained on labels, got none")
    obstacle = adapter_obstacle(model, names)
    if obstacle is not None:
        raise UnsupportedModelError(f"softprompt: {obstacle}")
    state = state_of(model)
    if positions is None:
        positions = "padded" if state is None else state.options.positions
    check_option("positions", positions, POSITIONS)
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    count = len(names)
    if own_rows and len(input_ids) % count:
        raise ValueError(f"{len(input_ids)} rows cannot be dealt out evenly to {count} prompts")

    def repeated(tensor: Tensor | None) -> Tensor | None:
        repeats = isinstance(tensor, Tensor) and tensor.ndim == 2 and not own_rows
        return tensor.repeat(count, 1) if repeats else tensor  # type: ignore[union-attr]

    base = base_of(model)
    rows_each = len(input_ids) // count if own_rows else len(input_ids)
    # [prompt_1 | ... | prompt_K | texts | texts | ...]: no prompt reaches another one's loss, so one backward
    # of the sum gives each prompt its own gradient.
    batch = check_batch(
        [prompt_of(model, name) for name in names],
        prompt_width(base),
        input_ids=repeated(input_ids),
        inputs_embeds=None,
        attention_mask=repeated(attention_mask),
        labels=repeated(labels),
        prompt_of_row=[number for number in range(count) for _ in range(rows_each)],
    )
    runner = runner_of(base) if state is None else state.runner_of(base)
    plan, options = runner.plan(), RunOptions(positions, AUTO if state is None else state.options.backend)
    longest = max(batch.prompt_lengths) + batch.shape[1]
    most_rows = sum(batch.prompt_lengths) + batch.shape[0] * batch.shape[1]
    reason = obstacle_to(plan, compact=options.compact, longest=longest, rows=most_rows)
    if reason is not None or plan.route != "packed":
        raise UnsupportedModelError(
            f"softprompt: several prompts on one batch need the packed route: {reason or plan.reason}"
        )
    if len(set(batch.prompt_lengths)) > 1 and longest > (plan.rotary_switch or longest):
        raise UnsupportedModelError(
            f"softprompt: prompts of several lengths cannot share a batch of up to {longest} positions: the "
            f"model's rotary embedding changes beyond {plan.rotary_switch}, for all prompts at once"
        )
    found = runner.group_losses(plan, batch, options, range(count), num_items=num_items_in_batch)
    return PromptLosses(found.total, found.each)


def combine(probabilities: Tensor, how: str = "vote") -> tuple[Tensor, Tensor]:
    """One prediction of each row from those of several prompts.

    Args:
        probabilities: [K, N, C] of C labels behind each of K prompts, above 0 or equal to it.
        how: "vote": the label that most prompts prefer; where several labels have as many votes, the one of
            them with the greatest mean log-probability. "mean": the greatest mean log-probability.

    Returns:
        [N] numbers of the chosen labels, and [N, C] the probabilities `∝ exp(mean over prompts of log p)`.

    Raises:
        ValueError: an unknown `how`, another rank or dtype, or numbers that are no probabilities.
    """
    if how not in COMBINATIONS:
        raise ValueError(f"how must be one of {', '.join(map(repr, COMBINATIONS))}, got {how!r}")
    if not isinstance(cast(object, probabilities), Tensor) or not probabilities.is_floating_point():
        raise ValueError(f"probabilities must be a floating-point tensor, got {_kind(probabilities)}")
    if probabilities.ndim != 3 or not (probabilities.shape[0] and probabilities.shape[2]):
        raise ValueError(f"probabilities must be [K, N, C], got {list(probabilities.shape)}")
    if not ((probabilities >= 0) & (probabilities < torch.inf)).all():
        raise ValueError("probabilities must be numbers of at least 0, got some that are not")
    mean = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log().mean(0)
    shares = mean.softmax(1)
    if how == "mean":
        return mean.argmax(1), shares
    choices = probabilities.argmax(2)
    votes = torch.nn.functional.one_hot(choices, probabilities.shape[2]).sum(0)
    tied = votes == votes.amax(1, keepdim=True)
    return mean.masked_fill(~tied, -torch.inf).argmax(1), shares


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
