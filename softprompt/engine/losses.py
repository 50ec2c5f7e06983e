"""From hidden states to logits, to the loss of each label, and to their weighted sum."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from softprompt.engine import model_spec, sharding
from softprompt.engine.batch import integers_on
from softprompt.engine.model_spec import CausalLM, HeadFacts
from softprompt.engine.overrides import returning
from softprompt.engine.packed import DecoderOutput
from softprompt.layout import PackedLayout
from softprompt.ops.constants import IGNORE_INDEX
from softprompt.ops.linear_cross_entropy import linear_cross_entropy
from softprompt.ops.linear_cross_entropy.reduction import reduce_losses
from softprompt.ops.registry import AUTO
from softprompt.warn import warn


# ------------------------------------------------------------------------------------------------- logits
def own_logits(model: CausalLM, hidden: Tensor, output_class: type) -> Tensor:
    """The model's own logits of hidden states: its forward with a decoder that returns `hidden`.

    Whatever the model does between its decoder and its logits (scale, softcap, bias, adapters, hooks)
    happens.

    Args:
        model: the causal LM.
        hidden: [B, T, H] normed hidden states.
        output_class: what the model's decoder returns.

    Returns:
        [B, T, V].
    """
    _check_gathered(model)
    with decoder_returns(model, hidden, output_class):
        # FSDP2's hooks belong to a whole forward, inside of which this is.
        call = functools.partial(type(model).forward, model) if sharding.is_fsdp(model) else model
        logits: Tensor = call(inputs_embeds=hidden, use_cache=False, return_dict=True).logits
    return logits


def _check_gathered(model: CausalLM) -> None:
    """Raises RuntimeError where the head's weight is no longer whole."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if (
        sharding.is_part(weight)
        and sharding.by_fsdp(model)
        and not sharding.is_fsdp(model.get_output_embeddings())
    ):
        raise RuntimeError(
            "softprompt: FSDP2 has taken the head's weight apart again, so logits can no longer be computed: "
            "look at out.logits before backward, or evaluate under torch.no_grad(), where they are computed "
            "at once"
        )


def decoder_returns(model: CausalLM, hidden: Tensor, output_class: type) -> AbstractContextManager[None]:
    """The model's decoder returns these hidden states in the block, whatever it is given.

    Args:
        model: the causal LM.
        hidden: [B, T, H] normed hidden states.
        output_class: what the model's decoder returns.

    Raises:
        RuntimeError: the block did not call the decoder, so that its results come from elsewhere.
    """
    return returning(model_spec.body_of(model), output_class(last_hidden_state=hidden))


# ------------------------------------------------------------------------------------------------- losses
def label_losses(
    model: CausalLM, rows: DecoderOutput, head: HeadFacts | None, *, backend: str = AUTO
) -> Tensor:
    """The loss of each label, as transformers' `ForCausalLMLoss` has it, from the label rows alone.

    Args:
        model: the causal LM.
        rows: what the decoder made of a batch.
        head: how logits follow from the head's weight (`linear_cross_entropy`); None: the head is called.
        backend: of `linear_cross_entropy`.

    Returns:
        [M] in fp32 (fp64 for fp64 models), 0 where the target is -100.
    """
    if head is None:
        logits = own_logits(model, rows.hidden[rows.label_rows][None], rows.output_class)[0]
        return losses_of_logits(logits, rows.label_targets)
    module = model.get_output_embeddings()
    with sharding.whole(module):
        losses: Tensor = linear_cross_entropy(
            rows.hidden,
            module.weight,
            rows.label_rows,
            rows.label_targets,
            bias=module.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            reduction="none",
            backend=backend,
        )
    return losses


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """[M] losses in fp32 (fp64 for fp64 logits) of logits [M, V], 0 where the target is -100."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return functional.cross_entropy(logits, targets.long(), ignore_index=IGNORE_INDEX, reduction="none")


# ------------------------------------------------------------------------------------------------ weights
@dataclass(frozen=True, eq=False)
class LossWeights:
    """How much each label counts: the loss of a group of labels is their mean, or their sum over
    `num_items`; the loss of a batch is the sum over its groups.
    """

    num_items: int | float | Tensor | None = None  # transformers' `num_items_in_batch`; None: the mean
    group_of_prompt: Sequence[int] | None = None  # [K] the group of each prompt; None: one for all

    def of_labels(self, rows: DecoderOutput | PackedLayout) -> GroupWeights | None:
        """The weights of the labels of a batch, None where `num_items` alone says them."""
        if self.group_of_prompt is None:
            return None
        prompts = rows.prompt_of_label()
        group_of_prompt = integers_on(prompts.device, self.group_of_prompt)
        groups, num_groups = group_of_prompt[prompts], len(self.group_of_prompt)
        if self.num_items is None:
            ones = torch.ones(groups.shape, dtype=torch.float64, device=groups.device)
            counts = ones.new_zeros(num_groups).index_add(0, groups, ones)
            return GroupWeights(1 / counts[groups], groups, num_groups)
        items = torch.as_tensor(self.num_items, dtype=torch.float64, device=groups.device).reshape(())
        weight = 1 / torch.where(items == 0, 1, items)
        return GroupWeights(weight.expand(groups.shape), groups, num_groups)


@dataclass(frozen=True, eq=False)
class GroupWeights:
    """What the labels of a batch weigh, and the group of each."""

    values: Tensor  # [M] fp64
    groups: Tensor  # [M] int64
    num_groups: int  # at most; those without a label stay 0

    def losses(self, losses: Tensor) -> Tensor:
        """[G] the loss of each group, of the losses [M] of labels."""
        weighted = losses * self.values.to(losses.dtype)
        return weighted.new_zeros(self.num_groups).index_add(0, self.groups, weighted)


def weighted_sum(
    losses: Tensor,  # [M]
    targets: Tensor,  # [M]
    weights: Tensor | None,  # [M]
    num_items: int | float | Tensor | None,
    backend: str = AUTO,
) -> Tensor:
    """`losses @ weights`, where weights that are all alike are given as `num_items`.

    Args:
        losses: [M], see `label_losses`.
        targets: [M] labels, -100 = ignored.
        weights: [M] in the dtype of the losses. None: all alike.
        num_items: what the sum is divided by then, 0 counting as 1. None: the labels that are not ignored.
        backend: of the op.

    Returns:
        A scalar; 0 where there is no label.
    """
    if weights is not None:
        losses, num_items = losses * weights, 1
    return reduce_losses(
        losses,
        targets,
        num_items=num_items,
        reduction="mean",
        ignore_index=IGNORE_INDEX,
        backend=backend,
    )


def warn_of_no_labels() -> None:
    """Warns that a batch without labels has no loss."""
    warn(
        "every label of this batch is -100; the loss is 0 and so is its gradient "
        "(a mean over no labels would be NaN and destroy the prompt)"
    )
