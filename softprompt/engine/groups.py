"""The losses of a batch whose rows belong to several groups, each with a mean of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from softprompt.engine import families
from softprompt.engine.batch import Batch
from softprompt.engine.families import CausalLM
from softprompt.engine.head import own_logits
from softprompt.engine.packed import HiddenRows
from softprompt.engine.plan import Plan
from softprompt.ops.library import AUTO
from softprompt.ops.linear_cross_entropy import linear_cross_entropy


def means_of_groups(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    group_of_prompt: Sequence[int],
    *,
    compact: bool = False,
    backend: str = AUTO,
) -> Tensor:
    """The mean loss of the labels of each group, from one forward over all rows.

    Args:
        model: the causal LM.
        plan: of the model, on a fast route.
        batch: with labels.
        group_of_prompt: [K] the group of each prompt, from 0.
        compact: ignore pads in positions and windows (packed route only).
        backend: of the ops.

    Returns:
        [G] in fp32 (fp64 for fp64 models), differentiable; 0 for a group without labels.
    """
    rows = plan.run(model, batch, compact=compact, backend=backend)
    losses = _losses(model, plan, rows, backend)
    groups = torch.tensor(group_of_prompt, device=losses.device)
    group = groups[_prompt_of_labels(rows, batch)]
    count = losses.new_zeros(max(group_of_prompt) + 1).index_add(0, group, torch.ones_like(losses))
    return torch.zeros_like(count).index_add(0, group, losses) / count.clamp_min(1)


def _prompt_of_labels(rows: HiddenRows, batch: Batch) -> Tensor:
    """[M] the prompt that each label stands behind."""
    label_rows = rows.label_rows[: rows.num_labels].long()
    if rows.layout is None:
        text = label_rows // rows.padded_shape[1]
        return torch.zeros_like(text) if batch.prompt_of_row is None else batch.prompt_of_row.long()[text]
    segment, count = rows.layout.segments[label_rows].long(), len(batch.prompts)
    # The first label of a text is predicted by the prompt itself.
    of_text = rows.layout.prompt_of_row.long()[(segment - count).clamp_min(0)]
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
