"""The losses of several prompts on one batch, which is packed once per prompt and run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.engine.batch import Batch, check_batch
from softprompt.engine.families import CausalLM
from softprompt.engine.forward import (
    POSITIONS,
    UnsupportedModelError,
    check_option,
    graphs_of,
    obstacle_to,
    packed_step,
    prompt_width,
    warn_of_no_labels,
)
from softprompt.engine.head import IGNORE_INDEX, losses_of_rows
from softprompt.engine.packed import HiddenRows
from softprompt.engine.plan import Plan, plan_for
from softprompt.ops.library import AUTO
from softprompt.ops.linear_cross_entropy import check_num_items


class PromptLosses(NamedTuple):
    """What `losses_of_prompts` found."""

    total: Tensor  # [] the sum of the prompts' mean losses: its gradient is that of each prompt trained alone
    each: Tensor  # [K] the mean loss of each prompt, detached


def losses_of_prompts(
    model: CausalLM,
    prompts: Sequence[Tensor],  # K of [P_k, H]
    input_ids: Tensor,  # [B, L]
    attention_mask: Tensor | None,  # [B, L]
    labels: Tensor,  # [B, L]
    *,
    own_rows: bool = False,
    positions: str = "padded",
    num_items_in_batch: int | Tensor | None = None,
    backend: str = AUTO,
    cuda_graphs: bool = True,
) -> PromptLosses:
    """The mean loss of a batch behind each of K prompts, as K calls of `softprompt.forward` give it.

    All rows behind all prompts are one packed row: `[prompt_1 | ... | prompt_K | texts | texts | ...]`. No
    prompt reaches another one's loss, so one backward of the sum gives each prompt its own gradient.

    Args:
        model: any transformers causal LM on the packed route.
        prompts: K prompts of any lengths.
        input_ids: [B, L].
        attention_mask: [B, L], 0 = pad. None: no pads.
        labels: [B, L], -100 = no label.
        own_rows: every prompt has rows of its own, B / K of them: those of the first prompt come first.
        positions: see `softprompt.forward`.
        num_items_in_batch: what each prompt's summed loss is divided by. None: the labels of the batch.
        backend: "auto" or the name of a back end of the ops.
        cuda_graphs: on a GPU, record the step of all prompts as one graph and replay it; not with `own_rows`.

    Raises:
        UnsupportedModelError: the model is not on the packed route; says why.
        IndexError: an id or a label outside the vocabulary.
        ValueError: shapes, dtypes or options that do not fit.
    """
    check_option("positions", positions, POSITIONS)
    check_num_items(num_items_in_batch)
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    count = len(prompts)
    if own_rows and len(input_ids) % count:
        raise ValueError(f"{len(input_ids)} rows cannot be dealt out evenly to {count} prompts")

    def repeated(tensor: Tensor | None) -> Tensor | None:
        repeats = isinstance(tensor, Tensor) and tensor.ndim == 2 and not own_rows
        return tensor.repeat(count, 1) if repeats else tensor  # type: ignore[union-attr]

    rows_each = len(input_ids) // count if own_rows else len(input_ids)
    batch = check_batch(
        prompts,
        prompt_width(model),
        input_ids=repeated(input_ids),
        inputs_embeds=None,
        attention_mask=repeated(attention_mask),
        labels=repeated(labels),
        prompt_of_row=[number for number in range(count) for _ in range(rows_each)],
    )
    plan, compact = plan_for(model, watch=graphs_of(model).watch), positions == "compact"
    longest = max(batch.prompt_lengths) + batch.shape[1]
    most_rows = sum(batch.prompt_lengths) + batch.shape[0] * batch.shape[1]
    reason = obstacle_to(plan, compact=compact, longest=longest, rows=most_rows)
    if reason is not None or plan.route != "packed":
        raise UnsupportedModelError(
            f"softprompt: several prompts on one batch need the packed route: {reason or plan.reason}"
        )
    if len(set(batch.prompt_lengths)) > 1 and longest > (plan.rotary_switch or longest):
        raise UnsupportedModelError(
            f"softprompt: prompts of several lengths cannot share a batch of up to {longest} positions: the "
            f"model's rotary embedding changes beyond {plan.rotary_switch}, for all prompts at once"
        )
    # A graph holds one mean over all labels, which is the prompts' only where they have as many each.
    if cuda_graphs and batch.attention_mask.is_cuda and not own_rows:
        return _recordable(model, plan, batch, compact, num_items_in_batch, backend)
    rows = plan.run(model, batch, compact=compact, backend=backend)
    each = _each(model, plan, rows, batch, num_items_in_batch, backend)
    return PromptLosses(each.sum(), each.detach())


def _recordable(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    compact: bool,
    num_items: int | Tensor | None,
    backend: str,
) -> PromptLosses:
    """As one loss, which a graph can hold: every prompt has the same number of labels."""
    loss, rows = packed_step(model, plan, batch, compact, num_items, backend, graphs_of(model))
    if loss is None:
        raise ValueError("expected labels, got none")
    with torch.no_grad():
        each = _each(model, plan, rows, batch, num_items, backend)
    # Without a number of items the one loss is the mean over the labels of all prompts.
    return PromptLosses(loss * len(batch.prompts) if num_items is None else loss, each)


def _each(
    model: CausalLM,
    plan: Plan,
    rows: HiddenRows,
    batch: Batch,
    num_items: int | Tensor | None,
    backend: str,
) -> Tensor:
    """[K] losses; label rows stand in the order of the batch's rows, so prompt by prompt."""
    total = rows.num_labels
    if total == 0:
        warn_of_no_labels()
    losses = losses_of_rows(
        model,
        rows.hidden,
        rows.label_rows[:total],
        rows.label_targets[:total],
        fused=plan.fused_head,
        output_class=rows.output_class,
        backend=backend,
    )
    count, device = len(batch.prompts), losses.device
    if batch.labels is None:
        raise ValueError("expected labels, got none")
    of_prompt = (batch.labels != IGNORE_INDEX).view(count, -1).sum(1).to(device)  # [K]
    numbers = torch.arange(count, device=device).repeat_interleave(of_prompt, output_size=total)
    sums = losses.new_zeros(count).index_add(0, numbers, losses)
    if num_items is None:
        return sums / of_prompt.clamp_min(1)
    return sums / (num_items.to(device) if isinstance(num_items, Tensor) else num_items)
