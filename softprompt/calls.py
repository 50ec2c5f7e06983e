"""Which calls of a PEFT model the fast route serves, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from softprompt.encoders import encoder_obstacle
from softprompt.engine import Plan, families
from softprompt.engine.batch import check_texts
from softprompt.engine.forward import obstacle_to, prompt_width
from softprompt.layout import raise_out_of_range


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
    if adapter_names is None:
        return [model.active_adapter]
    given = input_ids if inputs_embeds is None else inputs_embeds
    num_rows = len(adapter_names) if given is None else given.shape[0]
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


def adapter_obstacle(model: Any, names: Sequence[str], *, as_forward: bool = False) -> str | None:
    """Why these adapters of a PEFT model are not served, as a sentence, or None.

    Args:
        model: the PEFT model.
        names: of the adapters.
        as_forward: whether the caller does all that a patched forward does: gives multitask adapters the task
            of each row, and puts the prompt where the patch wants it.
    """
    state = getattr(model, "_softprompt", None)
    if state is not None and state.options.placement != "prefix" and not as_forward:
        return f'the model is patched with placement="{state.options.placement}", which only forward serves'
    for name in dict.fromkeys(names):
        obstacle = encoder_obstacle(name, model.peft_config[name], per_row=as_forward)
        if obstacle is not None:
            return obstacle
    if families.has_hooks(model.get_base_model()):
        return "the language model itself has hooks or a replaced forward, which the packed route would skip"
    if model.word_embeddings is not model.get_base_model().get_input_embeddings():
        return "PEFT embeds tokens with another module than the model's input embeddings"
    return None


def check_stock_input(
    base: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> None:
    """Raises the errors of the fast route, for a call that PEFT serves."""
    ids, _ = check_texts(
        prompt_width(base),
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        labels=labels,
    )
    raise_out_of_range(ids, labels, families.vocab_size(base))


def reason_for_stock(
    model: Any,
    plan: Plan,
    names: list[str],
    labels: Tensor | None,
    text_length: int,
    extra: dict[str, Any],
    *,
    compact: bool,
) -> str | None:
    """Why this call goes to PEFT's forward, as a sentence, or None.

    Args:
        model: the PEFT model.
        plan: of its base model.
        names: adapters of the call.
        labels: of the call.
        text_length: L.
        extra: the other arguments of the call.
        compact: whether pads are left out of the positions.
    """
    base = model.get_base_model()
    obstacle = adapter_obstacle(model, names, as_forward=True)
    if obstacle is not None:
        return obstacle
    longest = text_length + max(model.peft_config[name].num_virtual_tokens for name in names)
    obstacle = obstacle_to(plan, compact=compact, longest=longest)
    if obstacle is not None:
        return obstacle
    for name in ("output_attentions", "output_hidden_states"):
        asked = extra.get(name)
        if asked or (asked is None and getattr(base.config, name, False)):
            return f"{name} was asked for, which only the padded forward has"
    if extra.get("use_cache"):
        return "use_cache=True was asked for, and the packed row has no cache"
    caches = extra.get("use_cache") is None and getattr(base.config, "use_cache", True)
    if caches and labels is None and not model.training:
        return (
            "without labels in evaluation mode the output holds a cache; use_cache=False takes the fast route"
        )
    served = ("output_attentions", "output_hidden_states", "use_cache", "num_items_in_batch")
    ignored_by_peft = ("position_ids", "token_type_ids", "task_ids")
    others = [n for n, v in extra.items() if v is not None and n not in (*served, *ignored_by_peft)]
    if others:
        return f"the call has arguments that the packed route does not serve: {', '.join(sorted(others))}"
    return None
