"""The losses of a batch whose rows belong to several groups, each with a mean of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from softprompt.engine import families
from softprompt.engine.batch import Batch, integers_on
from softprompt.engine.families import CausalLM
from softprompt.engine.graphs import StepGraphs, room_of
from softprompt.engine.head import own_logits
from softprompt.engine.packed import HiddenRows, packed_layout, rows_of_layout
from softprompt.engine.plan import Plan
from softprompt.layout import PackedLayout
from softprompt.ops.library import AUTO
from softprompt.ops.linear_cross_entropy import linear_cross_entropy


class GroupLosses(NamedTuple):
    """What `losses_of_groups` found."""

    total: Tensor  # [] the sum of the groups' means, to be differentiated
    each: Tensor  # [K] the means of the G groups, detached, then zeros
    num_labels: int  # of all groups


def losses_of_groups(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    group_of_prompt: Sequence[int],
    *,
    compact: bool = False,
    backend: str = AUTO,
    graphs: StepGraphs | None = None,
) -> GroupLosses:
    """The mean loss over the labels of each group, from one forward over all rows.

    Args:
        model: the causal LM.
        plan: of the model, on a fast route.
        batch: with labels.
        group_of_prompt: [K] the group of each prompt, from 0.
        compact: ignore pads in positions and windows (packed route only).
        backend: of the ops.
        graphs: records training steps of the packed route and replays them.

    Returns:
        Losses in fp32 (fp64 for fp64 models); the mean of a group without labels is 0.
    """
    groups = integers_on(batch.attention_mask.device, group_of_prompt)
    mode = None if graphs is None else graphs.mode_of(plan, batch)
    if graphs is None or mode is None:
        rows = plan.run(model, batch, compact=compact, backend=backend)
    else:
        layout = packed_layout(
            model,
            batch,
            positions="compact" if compact else plan.positions,
            position_limit=plan.position_limit,
            backend=backend,
            **room_of(batch)._asdict(),
        )
        exact = layout.resized(layout.prompt_tokens + (layout.num_tokens or 0), layout.num_labels)
        weights = 1 / _counts(groups, _prompts_of_labels(exact, exact.label_rows)).clamp_min(1)
        step = graphs.step(
            plan, _weighted(batch, weights[groups]), layout, mode, num_items=1, backend=backend
        )
        if step is not None:
            summed, rows = step
            with torch.no_grad():
                means = _means(model, plan, batch, rows, groups, backend)
                correction = means.sum() - summed
            return GroupLosses(summed + correction, means, rows.num_labels)
        rows = rows_of_layout(model, batch, exact, seam=str(plan.seam), backend=backend)
    means = _means(model, plan, batch, rows, groups, backend)
    return GroupLosses(means.sum(), means.detach(), rows.num_labels)


def _weighted(batch: Batch, weights: Tensor) -> Batch:
    """The batch whose prompts get `weights` [K] times the gradient. A recorded step knows one denominator."""
    prompts = []
    for prompt, weight in zip(batch.prompts, weights, strict=True):
        still = prompt.detach()
        prompts.append(still + (prompt - still) * weight.to(prompt.dtype))
    return replace(batch, prompts=tuple(prompts))


def _means(
    model: CausalLM, plan: Plan, batch: Batch, rows: HiddenRows, groups: Tensor, backend: str
) -> Tensor:
    """[K] the means of the groups."""
    losses = _losses(model, plan, rows, backend)
    label_rows = rows.label_rows[: rows.num_labels]
    if rows.layout is None:
        text = label_rows.long() // rows.padded_shape[1]
        prompts = torch.zeros_like(text) if batch.prompt_of_row is None else batch.prompt_of_row.long()[text]
    else:
        prompts = _prompts_of_labels(rows.layout, label_rows)
    counts = _counts(groups, prompts).to(losses.dtype)
    return torch.zeros_like(counts).index_add(0, groups[prompts], losses) / counts.clamp_min(1)


def _counts(groups: Tensor, prompts: Tensor) -> Tensor:
    """[K] fp64, labels of each group: there are no more groups than prompts, and what is left stays 0."""
    ones = torch.ones(prompts.shape, dtype=torch.float64, device=prompts.device)
    return torch.zeros_like(groups, dtype=torch.float64).index_add(0, groups[prompts], ones)


def _prompts_of_labels(layout: PackedLayout, label_rows: Tensor) -> Tensor:
    """[M] the prompt that each label stands behind."""
    segment, count = layout.segments[label_rows.long()].long(), len(layout.prompt_lengths)
    # The first label of a text is predicted by the prompt itself.
    of_text = layout.prompt_of_row.long()[(segment - count).clamp_min(0)]
    return torch.where(segment < count, segment, of_text)


def _losses(model: CausalLM, plan: Plan, rows: HiddenRows, backend: str) -> Tensor:
    """[M]."""
    label_rows, targets = rows.label_rows[: rows.num_labels], rows.label_targets[: rows.num_labels]
    if plan.fused_head:
        head, facts = model.get_output_embeddings(), families.head_facts(model)
        losses: Tensor = linear_cross_entropy(
            rows.hidden,
            head.weight,
            label_rows,
            targets,
            bias=head.bias,
            softcap=facts.softcap,
            logit_scale=facts.logit_scale,
            reduction="none",
            backend=backend,
        )
        return losses
    logits = own_logits(model, rows.hidden[label_rows][None], rows.output_class)[0]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return functional.cross_entropy(logits, targets.long(), reduction="none")
