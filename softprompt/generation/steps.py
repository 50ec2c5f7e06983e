"""The model's own `generate` on a cache that begins with the prompt, and the methods that this needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import StaticLayer

from softprompt.engine import Plan, model_spec
from softprompt.engine.caches import CACHE
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.overrides import override
from softprompt.generation.call import GenerateCall


@dataclass(frozen=True, eq=False)
class Columns:
    """What the model's own generate is given of the texts."""

    input_ids: Tensor | None  # [B, L]
    inputs_embeds: Tensor | None  # [B, L, H]
    text_mask: Tensor  # [B, L] of these alone
    mask: Tensor  # [B, W] in slots
    position_ids: Tensor | None  # [B, W]


def run(model: CausalLM, plan: Plan, call: GenerateCall, columns: Columns, cache: Cache) -> Any:
    _check_room(model, call, columns, cache)
    arguments = {**call.arguments, CACHE: cache, "attention_mask": columns.mask}
    if call.config.use_cache is not True:
        arguments["use_cache"] = True
    if call.config.cache_implementation is not None:
        arguments["cache_implementation"] = None
    if columns.input_ids is not None:
        arguments["input_ids"] = columns.input_ids
    if columns.inputs_embeds is not None:
        arguments["inputs_embeds"] = columns.inputs_embeds
    if columns.position_ids is not None and model_spec.takes_position_ids(model):
        arguments["position_ids"] = columns.position_ids.to(call.device)
    if call.assistant is not None:
        arguments["assistant_model"] = Assistant(call.assistant)
    prepare = functools.partial(
        _prepare_inputs,
        model.prepare_inputs_for_generation,
        own_cache=cache,
        mask=columns.mask,
        room=_room(plan, columns),
        given=0 if columns.input_ids is None else columns.input_ids.shape[1],
        chunked=call.config.prefill_chunk_size is not None,
        from_mask=plan.layout_positions(call.compact) == "mask",
    )
    no_ids = columns.input_ids is None
    process = functools.partial(
        _logits_processor,
        model._get_logits_processor,
        own_cache=cache,
        text_mask=None if no_ids else columns.text_mask,
    )
    with override(model, prepare_inputs_for_generation=prepare, _get_logits_processor=process):
        return model.generate(**arguments)


def _check_room(model: CausalLM, call: GenerateCall, columns: Columns, cache: Cache) -> None:
    sizes = [layer.max_cache_len for layer in cache.layers if type(layer) is StaticLayer]
    needed = columns.mask.shape[1] + call.max_new_tokens(model) - 1  # the last token is not computed
    if sizes and needed > min(sizes):
        raise ValueError(
            f"past_key_values has room for {min(sizes)} tokens; prompt, text and continuation take {needed}"
        )


def _room(plan: Plan, columns: Columns) -> int | None:
    """How many tokens the model's position table has left for a continuation; None: it has no table."""
    if plan.position_limit is None:
        return None
    counted = columns.mask.shape[1] if columns.position_ids is not None else int(columns.mask.sum(1).max())
    return plan.position_limit - counted


def _prepare_inputs(
    stock: Callable[..., dict[str, Any]],
    input_ids: Tensor,
    next_sequence_length: int | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    is_first_iteration: bool | None = False,
    *,
    own_cache: Cache,
    mask: Tensor,
    room: int | None,
    given: int,
    chunked: bool,
    from_mask: bool,
    **kwargs: Any,
) -> dict[str, Any]:
    """The model's own `prepare_inputs_for_generation`; the first step gets the columns that the cache lacks.

    Args:
        stock: the model's own; so are all arguments but those below.
        input_ids: [rows, columns] so far.
        next_sequence_length: of the last columns that count.
        attention_mask: [rows, slots] or None.
        inputs_embeds: [rows, L, H] or None.
        is_first_iteration: of the call.
        own_cache: of this call; an assistant may be the same model with another one.
        mask: [B, W] slots of prompt and text.
        room: see `_room`.
        given: columns of `input_ids` that the call began with.
        chunked: transformers cuts the first step itself.
        from_mask: the model takes its positions from the mask, where pads have place -1.
        kwargs: others, with the cache among them.
    """
    ours = kwargs.get(CACHE) is own_cache
    num_new = input_ids.shape[1] - given
    if ours and room is not None and num_new > room:
        # On a GPU, reading outside the table would end the process.
        raise ValueError(
            f"the continuation has reached {num_new} tokens, but behind prompt and text the model has "
            f"positions for {max(room, 0)}: ask for fewer new tokens or shorten the text"
        )
    if ours and not (chunked and is_first_iteration):
        width = mask.shape[1] + num_new
        if is_first_iteration:
            next_sequence_length = width - int(own_cache.get_seq_length())
        if attention_mask is not None and attention_mask.shape[1] != width:
            # Assisted decoding cuts it to the columns of the ids; it has one row only.
            attention_mask = nn.functional.pad(mask, (0, width - mask.shape[1]), value=1)
    inputs = stock(
        input_ids,
        next_sequence_length=next_sequence_length,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        is_first_iteration=is_first_iteration,
        **kwargs,
    )
    positions = inputs.get("position_ids")
    if ours and from_mask and positions is not None and attention_mask is not None:
        places = attention_mask.cumsum(1) * attention_mask - 1
        inputs["position_ids"] = places[:, places.shape[1] - positions.shape[1] :]
    return inputs


def _logits_processor(
    stock: Callable[..., Any], *, own_cache: Cache, text_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The model's own processors of logits, with the mask of the ids, where one of them looks for pads."""
    others = kwargs.get("model_kwargs") or {}
    if others.get(CACHE) is not own_cache:  # of another call, inside of this one
        return stock(**kwargs)
    mask = others.get("attention_mask")
    if mask is not None and text_mask is not None:
        text_mask = text_mask.to(mask.device).repeat_interleave(mask.shape[0] // text_mask.shape[0], 0)
    return stock(**kwargs | {"model_kwargs": others | {"attention_mask": text_mask}})


class Assistant:
    """An assistant model that drafts for a model with a prompt, which the assistant does not know."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Without mask and positions, which count the prompt."""
        for name in ("attention_mask", "position_ids"):
            kwargs.pop(name, None)
        return self._model.generate(*args, **kwargs)
