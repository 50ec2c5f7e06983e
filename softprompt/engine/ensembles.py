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
)
from softprompt.engine.head import IGNORE_INDEX, losses_of_rows
from softprompt.engine.packed import HiddenRows
from softprompt.engine.plan import Plan, plan_for
from softprompt.ops.library import AUTO


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
        backend: "auto" or the name of a back end of the ops.
        cuda_graphs: on a GPU, record the step of all prompts as one graph and replay it; not with `own_rows`.

    Raises:
        UnsupportedModelError: the model is not on the packed route; says why.
        IndexError: an id or a label outside the vocabulary.
        ValueError: shapes, dtypes or options that do not fit.
    """
    check_option("positions", positions, POSITIONS)
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
    plan, compact = plan_for(model), positions == "compact"
    longest = max(batch.prompt_lengths) + batch.shape[1]
    reason = obstacle_to(plan, compact=compact, longest=longest)
    if reason is not None or plan.route != "packed":
        raise UnsupportedModelError(
            f"softprompt: several prompts on one batch need the packed route: {reason or plan.reason}"
        )
    # A graph holds one mean over all labels, which is the prompts' only where they have as many each.
    if cuda_graphs and batch.attention_mask.is_cuda and not own_rows:
        return _recordable(model, plan, batch, compact, backend)
    rows = plan.run(model, batch, compact=compact, backend=backend)
    each = _each(model, plan, rows, batch, backend)
    return PromptLosses(each.sum(), each.detach())


def _recordable(model: CausalLM, plan: Plan, batch: Batch, compact: bool, backend: str) -> PromptLosses:
    """As one loss, which a graph can hold: every prompt has the same number of labels."""
    loss, rows = packed_step(model, plan, batch, compact, None, backend, graphs_of(model))
    if loss is None:
        raise ValueError("expected labels, got none")
    with torch.no_grad():
        each = _each(model, plan, rows, batch, backend)
    return PromptLosses(loss * len(batch.prompts), each)


def _each(model: CausalLM, plan: Plan, rows: HiddenRows, batch: Batch, backend: str) -> Tensor:
    """[K] mean losses; label rows stand in the order of the batch's rows, so prompt by prompt."""
    total = rows.num_labels
    losses = losses_of_rows(
        model,
        rows.hidden,
        rows.label_rows[:total],
        rows.label_targets[:total],
        fused=plan.fused_head,
        output_class=rows.output_class,
        backend=backend,
    )
    count = len(batch.prompts)
    if batch.labels is None:
        raise ValueError("expected labels, got none")
    of_prompt = (batch.labels != IGNORE_INDEX).view(count, -1).sum(1).to(losses.device)  # [K]
    numbers = torch.arange(count, device=losses.device).repeat_interleave(of_prompt, output_size=total)
    return losses.new_zeros(count).index_add(0, numbers, losses) / of_prompt.clamp_min(1)
