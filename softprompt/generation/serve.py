"""One call of `generate`, from its arguments to the model's own `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache

from softprompt.engine import Plan, model_spec
from softprompt.engine.batch import Batch, check_batch
from softprompt.engine.leftovers import without_leftovers
from softprompt.engine.model_spec import CausalLM, prompt_width
from softprompt.engine.runner import UnsupportedModelError
from softprompt.generation.call import GenerateCall
from softprompt.generation.past import Past, check_goes_on, past_of, remember, whole_mask
from softprompt.generation.prefill import (
    Start,
    counts_places,
    fill,
    filled_cache,
    prefill_for,
    start_packed,
    start_shared,
)
from softprompt.generation.prompt_cache import CachedPrompt, cached_prompt
from softprompt.generation.steps import Columns, run
from softprompt.layout import raise_out_of_range


@torch.no_grad()
def generate(
    model: CausalLM,
    plan: Plan,
    call: GenerateCall,
    prompts: Mapping[str, Tensor],  # adapter -> [P, H]
    cached: dict[str, CachedPrompt],
) -> Any:
    """The model's own `generate` behind the prompts of the call's rows.

    Args:
        model: the causal LM itself.
        plan: of the model.
        call: what was asked for; `stock_reason` had nothing against it.
        prompts: of the adapters that the call names.
        cached: prompts that were computed before, by adapter; is brought up to date.

    Raises:
        IndexError: an id outside the vocabulary.
        ValueError: arguments that do not fit together; says what was given and what is expected.
    """
    raise_out_of_range(call.input_ids, None, model_spec.vocab_size(model))
    past = past_of(call.cache)
    with without_leftovers(model):
        for name, prompt in prompts.items():
            cached[name] = cached_prompt(model, cached.get(name), prompt)
        if past is None:
            return _begin(model, plan, call, prompts, cached)
        return _continue(model, plan, call, past, cached)


def _begin(
    model: CausalLM,
    plan: Plan,
    call: GenerateCall,
    prompts: Mapping[str, Tensor],
    cached: Mapping[str, CachedPrompt],
) -> Any:
    device = next(model.get_input_embeddings().parameters()).device
    batch = check_batch(
        list(prompts.values()),
        prompt_width(model),
        input_ids=None if call.input_ids is None else call.input_ids.to(device),
        inputs_embeds=None if call.inputs_embeds is None else call.inputs_embeds.to(device),
        attention_mask=call.attention_mask.to(device),
        labels=None,
        prompt_of_row=None if len(prompts) == 1 else [list(prompts).index(name) for name in call.names],
    )
    if batch.shape[1] == 0:
        raise ValueError("the texts are empty: expected at least one token in every row")
    ids, given_mask = call.input_ids, call.attention_mask.to(call.device)
    if ids is not None and ids.shape != given_mask.shape:
        raise ValueError(
            f"input_ids beside inputs_embeds must be [B, L] = {list(given_mask.shape)}, got {list(ids.shape)}"
        )
    if call.compact:
        batch, ids = _pads_to_the_left(batch, ids)
    states = [cached[name].states for name in prompts]
    positions = plan.layout_positions(call.compact)
    if prefill_for(model, plan).way == "packed" and call.config.prefill_chunk_size is None:
        start = start_packed(model, plan, batch, states, positions=positions, backend=call.backend)
    else:
        _check_compact(model, batch, call.compact)
        start = start_shared(plan, batch, states, positions=positions)
    mask = start.mask.to(call.device)
    names = [name for name in call.adapters(batch.shape[0]) for _ in range(call.expand)]
    cache = _cache_of(model, call, start, len(names))
    past = Past(
        tuple(names),
        tuple(cached[name].number for name in names),
        given_mask.repeat_interleave(call.expand, 0),
        mask.repeat_interleave(call.expand, 0),
        max(batch.prompt_lengths),
        call.compact,
        call.config.num_beams > 1,
    )
    remember(cache, past)
    columns = Columns(ids, batch.inputs_embeds, batch.attention_mask, mask, start.position_ids)
    output = run(model, plan, call, columns, cache)
    return _with_ids(output, call.input_ids) if call.compact else output


def _check_compact(model: CausalLM, batch: Batch, compact: bool) -> None:
    if compact and counts_places(model) and not bool((batch.attention_mask != 0).all()):
        raise UnsupportedModelError(
            'softprompt: positions="compact" with pads between prompt and text needs the packed prefill on a '
            "model that counts places in its windows or biases: leave out prefill_chunk_size, or the pads"
        )


def _pads_to_the_left(batch: Batch, ids: Tensor | None) -> tuple[Batch, Tensor | None]:
    """The same texts (and ids) with all pads, also those inside a text, on the left.

    Raises:
        ValueError: a row has no token.
    """
    mask = batch.attention_mask != 0
    empty = (~mask.any(1)).nonzero()
    if empty.numel():
        raise ValueError(
            f'row {int(empty[0])} has no token: with positions="compact" every row needs at least one'
        )
    order = torch.argsort(mask.int(), dim=1, stable=True)
    embeds = batch.inputs_embeds
    if embeds is not None:
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))
    if ids is not None:
        ids = ids.gather(1, order.to(ids.device))
    moved = replace(
        batch,
        input_ids=ids if embeds is None else None,
        inputs_embeds=embeds,
        attention_mask=mask.gather(1, order).long(),
    )
    return moved, ids


def _with_ids(output: Any, input_ids: Tensor | None) -> Any:
    """An output that begins with the ids as they were given."""
    if input_ids is None:
        return output
    sequences = output if isinstance(output, Tensor) else output.sequences
    rows = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], 0)
    sequences[:, : rows.shape[1]] = rows
    return output


def _cache_of(model: CausalLM, call: GenerateCall, start: Start, num_rows: int) -> Cache:
    if call.cache is not None:  # an empty one that the user made
        fill(call.cache, start.states, num_rows)
        return call.cache
    if not call.static:
        return filled_cache(model, start.states, num_rows)
    longest = start.mask.shape[1] + call.max_new_tokens(model)
    longest = max(longest, call.config.max_cache_len or 0)
    cache = StaticCache(config=model_spec.config_of(model), max_cache_len=longest)
    fill(cache, start.states, num_rows)
    return cache


def _continue(
    model: CausalLM,
    plan: Plan,
    call: GenerateCall,
    past: Past,
    cached: Mapping[str, CachedPrompt],
) -> Any:
    """A further turn: the cache holds the prompt and the turns before."""
    numbers = {name: prompt.number for name, prompt in cached.items()}
    ids, cache = check_goes_on(call, past, numbers), call.cache
    mask = whole_mask(call.attention_mask.to(call.device), ids, past, int(cache.get_seq_length()))
    position_ids = None
    if plan.layout_positions(call.compact) == "slots":
        missing = (past.mask != 0).int().argmax(1)  # of the longest prompt, in rows with a shorter one
        places = torch.arange(mask.shape[1], device=mask.device)
        position_ids = (places - missing[:, None]).clamp_min(0)
    text_mask = call.attention_mask[:, call.attention_mask.shape[1] - ids.shape[1] :]
    return run(model, plan, call, Columns(ids, None, text_mask, mask, position_ids), cache)
