"""From hidden rows to a loss or to logits."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softprompt.engine import families, sharding
from softprompt.engine.attention import IN_USE
from softprompt.engine.families import CausalLM
from softprompt.ops.library import AUTO
from softprompt.ops.linear_cross_entropy import linear_cross_entropy

IGNORE_INDEX = -100
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def own_logits(model: CausalLM, hidden: Tensor, output_class: type) -> Tensor:
    """The model's own logits of hidden rows: its forward with a decoder that answers `hidden`.

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
    with decoder_answers(model, hidden, output_class):
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


def decoder_answers(model: CausalLM, hidden: Tensor, output_class: type) -> AbstractContextManager[None]:
    """The model's decoder returns these hidden rows in the block, whatever it is given.

    Args:
        model: the causal LM.
        hidden: [B, T, H] normed hidden states.
        output_class: what the model's decoder returns.

    Raises:
        RuntimeError: the block did not ask the decoder, so that its results come from elsewhere.
    """
    return answering(families.body_of(model), output_class(last_hidden_state=hidden))


@contextlib.contextmanager
def answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """A part of a model answers `answer` in the block, without running and without its hooks.

    Raises:
        RuntimeError: at the end, where nothing has called it.
    """
    asked = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked = True
        return answer

    # What is answered comes from behind the module's hooks: they must not act a second time.
    with replaced(module, forward=forward, **{name: OrderedDict() for name in _HOOKS}):
        yield
    if not asked:
        raise RuntimeError(f"the model never calls the {type(module).__name__} that it holds")


@contextlib.contextmanager
def replaced(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Attributes of an instance, put back as they were; one thread at a time is inside."""
    with IN_USE:
        before = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
        module.__dict__.update(attributes)
        try:
            yield
        finally:
            for name in attributes:
                del module.__dict__[name]
            module.__dict__.update(before)


def loss_of_rows(
    model: CausalLM,
    hidden: Tensor,  # [T, H]
    label_rows: Tensor,  # [M]
    targets: Tensor,  # [M]
    *,
    fused: bool,
    output_class: type,
    num_items: int | float | Tensor | None,
    backend: str = AUTO,
) -> Tensor:
    """The loss of transformers' `ForCausalLMLoss`, from the label rows alone.

    Args:
        model: the causal LM.
        hidden: [T, H].
        label_rows: [M] rows of `hidden` that predict a label.
        targets: [M] labels, -100 = ignored.
        fused: read the head's weight (`linear_cross_entropy`) instead of calling the head.
        output_class: see `own_logits`.
        num_items: transformers' `num_items_in_batch`: divides the sum of the losses. None: their mean.
        backend: of `linear_cross_entropy`.

    Returns:
        A scalar in fp32 (fp64 for fp64 models); 0 where there is no label.
    """
    if fused:
        head, facts = model.get_output_embeddings(), families.head_facts(model)
        with sharding.whole(head):
            return linear_cross_entropy(
                hidden,
                head.weight,
                label_rows,
                targets,
                bias=head.bias,
                softcap=facts.softcap,
                logit_scale=facts.logit_scale,
                num_items=num_items,
                backend=backend,
            )
    losses = losses_of_rows(model, hidden, label_rows, targets, fused=False, output_class=output_class)
    return mean_of(losses, targets, num_items)


def mean_of(losses: Tensor, targets: Tensor, num_items: int | float | Tensor | None) -> Tensor:
    """The sum of [M] losses over `num_items`, or over the number of targets that count."""
    total = losses.sum()
    count = (targets != IGNORE_INDEX).sum().clamp_min(1) if num_items is None else num_items
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def losses_of_rows(
    model: CausalLM,
    hidden: Tensor,  # [T, H]
    label_rows: Tensor,  # [M]
    targets: Tensor,  # [M]
    *,
    fused: bool,
    output_class: type,
    backend: str = AUTO,
) -> Tensor:
    """[M] losses of the label rows, 0 where the target is -100; see `loss_of_rows`."""
    if fused:
        head, facts = model.get_output_embeddings(), families.head_facts(model)
        losses: Tensor = linear_cross_entropy(
            hidden,
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
    return losses_of_logits(own_logits(model, hidden[label_rows][None], output_class)[0], targets)


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """[M] losses in fp32 (fp64 for fp64 logits) of logits [M, V], 0 where the target is -100."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return functional.cross_entropy(logits, targets.long(), ignore_index=IGNORE_INDEX, reduction="none")
