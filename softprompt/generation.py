"""`generate` with the prompt computed once: what a call asks for, and what is done about it.

The keys and values of an adapter's prompt are computed at its first call and kept until its values change.
Each call gets a cache that begins with them, and transformers' own `generate` does the rest: it sees the
user's ids, so lengths, processors and streamers are about those alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache

from softprompt.engine import Plan, families
from softprompt.engine.batch import Batch, check_batch
from softprompt.engine.families import CausalLM
from softprompt.engine.forward import UnsupportedModelError, prompt_width
from softprompt.engine.prefill import (
    Start,
    counts_places,
    fill,
    filled_cache,
    prefill_for,
    start_packed,
    start_shared,
)
from softprompt.engine.states import LayerStates, prompt_states
from softprompt.generation_calls import GenerateCall
from softprompt.layout import raise_out_of_range

_NUMBERS = itertools.count()
# A call sets methods of the model: threads that share one take turns. Reentrant, since a model may assist itself.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


# ---------------------------------------------------------------------------------------- prompts that are kept
@dataclass(frozen=True, eq=False)
class KnownPrompt:
    """The states of an adapter's prompt, and what they were computed from."""

    prompt: Tensor  # [P, H], a copy
    weights: tuple[Any, ...]
    states: LayerStates
    number: int = field(default_factory=lambda: next(_NUMBERS))  # of this computation; caches remember it


def known_prompt(model: CausalLM, known: KnownPrompt | None, prompt: Tensor) -> KnownPrompt:
    """`known` where prompt and model are still those that it was computed from, else computed again.

    The prompt's values are compared, since optimizers that write through `.data` or in a recorded graph leave
    no other trace.
    """
    prompt = prompt.detach()
    weights = _weights_of(model)
    if (
        known is not None
        and known.weights == weights
        and known.prompt.device == prompt.device
        and torch.equal(known.prompt, prompt)
    ):
        return known
    with torch.inference_mode(False), torch.no_grad():
        return KnownPrompt(prompt.clone(), weights, prompt_states(model, prompt.clone()))


def _weights_of(model: CausalLM) -> tuple[Any, ...]:
    """What shows that a model's weights, or the dtype that it computes in, have changed."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    weights = tuple(
        (
            id(tensor),
            tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0,
            tensor.dtype,
            tensor.device,
            0 if tensor.is_inference() else tensor._version,
        )
        for tensor in tensors
    )
    device_type = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return (*weights, autocast, families.config_of(model)._attn_implementation)


# ------------------------------------------------------------------------------------------ caches that are reused
@dataclass(frozen=True, eq=False)
class _Past:
    """What a cache that `generate` began holds in front; kept on the cache itself."""

    names: tuple[str, ...]  # adapter of each row
    numbers: tuple[int, ...]  # of the prompts, row by row
    given_mask: Tensor  # [rows, L] of the call that began it
    mask: Tensor  # [rows, W] in slots of the cache
    longest_prompt: int
    compact: bool
    beams: bool


_PAST = "_softprompt_past"


def past_of(cache: Any) -> _Past | None:
    """What a cache knows of the prompts in it, None where it holds none."""
    if cache is None or int(cache.get_seq_length()) == 0:
        return None
    past: _Past | None = getattr(cache, _PAST, None)
    if past is None:
        raise ValueError(
            "past_key_values was not begun by this model's generate, so nothing says whether the prompt is in "
            "it: pass the cache of an output of generate(..., return_dict_in_generate=True), or an empty one"
        )
    return past


# ------------------------------------------------------------------------------------------------- the call
@torch.no_grad()
def generate(
    model: CausalLM,
    plan: Plan,
    call: GenerateCall,
    prompts: Mapping[str, Tensor],  # adapter -> [P, H]
    known: dict[str, KnownPrompt],
    *,
    compact: bool,
) -> Any:
    """The model's own `generate` behind the prompts of the call's rows.

    Args:
        model: the causal LM itself.
        plan: of the model.
        call: what was asked for; `stock_reason` had nothing against it.
        prompts: of the adapters that the call names.
        known: prompts that were computed before, by adapter; is brought up to date.
        compact: pads do not exist.

    Raises:
        IndexError: an id outside the vocabulary.
        ValueError: arguments that do not fit together; says what was given and what is expected.
    """
    with _LOCKS.setdefault(model, threading.RLock()):
        return _generate(model, plan, call, prompts, known, compact)


def _generate(
    model: CausalLM,
    plan: Plan,
    call: GenerateCall,
    prompts: Mapping[str, Tensor],
    known: dict[str, KnownPrompt],
    compact: bool,
) -> Any:
    raise_out_of_range(call.input_ids, None, families.vocab_size(model))
    for name, prompt in prompts.items():
        known[name] = known_prompt(model, known.get(name), prompt)
    past = past_of(call.cache)
    if past is None:
        return _begin(model, plan, call, prompts, known, compact)
    return _continue(model, plan, call, past, known, compact)


def _begin(
    model: CausalLM,
    plan: Plan,
    call: GenerateCall,
    prompts: Mapping[str, Tensor],
    known: Mapping[str, KnownPrompt],
    compact: bool,
) -> Any:
    batch = check_batch(
        list(prompts.values()),
        prompt_width(model),
        input_ids=call.input_ids,
        inputs_embeds=call.inputs_embeds,
        attention_mask=call.attention_mask,
        labels=None,
        prompt_of_row=None if len(prompts) == 1 else [list(prompts).index(name) for name in call.names],
    )
    if batch.shape[1] == 0:
        raise ValueError("the texts are empty: expected at least one token in every row")
    ids, given_mask = call.input_ids, batch.attention_mask
    if ids is not None and ids.shape != given_mask.shape:
        raise ValueError(
            f"input_ids beside inputs_embeds must be [B, L] = {list(given_mask.shape)}, got {list(ids.shape)}"
        )
    if compact:
        batch, ids = _pads_to_the_left(batch, ids)
    states = [known[name].states for name in prompts]
    if prefill_for(model, plan).way == "packed" and call.config.prefill_chunk_size is None:
        start = start_packed(model, plan, batch, states, compact=compact)
    else:
        _check_compact(model, batch, compact)
        start = start_shared(plan, batch, states, compact=compact)
    names = [name for name in _names(call, batch.shape[0]) for _ in range(call.expand)]
    cache = _cache_of(model, call, start, len(names))
    past = _Past(
        tuple(names),
        tuple(known[name].number for name in names),
        given_mask.repeat_interleave(call.expand, 0),
        start.mask.repeat_interleave(call.expand, 0),
        max(batch.prompt_lengths),
        compact,
        call.config.num_beams > 1,
    )
    setattr(cache, _PAST, past)
    columns = _Columns(ids, batch.inputs_embeds, batch.attention_mask, start.mask, start.position_ids)
    output = _run(model, plan, call, columns, cache, compact)
    return _with_ids(output, call.input_ids) if compact else output


def _names(call: GenerateCall, num_rows: int) -> list[str]:
    return call.names if len(call.names) == num_rows else call.names * num_rows


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
        ids = ids.gather(1, order)
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
    cache = StaticCache(config=families.config_of(model), max_cache_len=longest)
    fill(cache, start.states, num_rows)
    return cache


def _continue(
    model: CausalLM,
    plan: Plan,
    call: GenerateCall,
    past: _Past,
    known: Mapping[str, KnownPrompt],
    compact: bool,
) -> Any:
    """A further turn: the cache holds the prompt and the turns before."""
    ids, cache = call.input_ids, call.cache
    if ids is None or call.config.prefill_chunk_size is not None:
        raise ValueError(
            "past_key_values that holds a conversation takes input_ids without prefill_chunk_size"
        )
    if past.beams:
        raise ValueError("past_key_values was left by beam search, whose beams are not the returned sequences")
    if past.compact != compact:
        raise ValueError("past_key_values was begun with another setting of patch(positions=...)")
    if len(past.names) != ids.shape[0] or call.expand != 1:
        raise ValueError(
            f"past_key_values holds {len(past.names)} rows, the call has {ids.shape[0]} rows with "
            f"{call.expand} sequences each: a conversation goes on with one sequence for each of its rows"
        )
    if past.names != tuple(_names(call, ids.shape[0])):
        raise ValueError(
            f"past_key_values holds the prompts of adapters {', '.join(dict.fromkeys(past.names))}; the call "
            f"asks for {', '.join(dict.fromkeys(call.names))}"
        )
    if past.numbers != tuple(known[name].number for name in past.names):
        raise ValueError(
            "past_key_values holds a prompt or weights as they were before they changed: begin the "
            "conversation again"
        )
    mask = _whole_mask(call, ids, past, int(cache.get_seq_length()))
    position_ids = None
    if not compact and plan.positions != "mask":
        missing = (past.mask != 0).int().argmax(1)  # of the longest prompt, in rows with a shorter one
        places = torch.arange(mask.shape[1], device=mask.device)
        position_ids = (places - missing[:, None]).clamp_min(0)
    text_mask = call.attention_mask[:, call.attention_mask.shape[1] - ids.shape[1] :]
    return _run(model, plan, call, _Columns(ids, None, text_mask, mask, position_ids), cache, compact)


def _whole_mask(call: GenerateCall, ids: Tensor, past: _Past, cached: int) -> Tensor:
    """[B, W] mask in slots: what the cache began with, then the columns that came later."""
    given, begun = call.attention_mask != 0, past.given_mask != 0
    expected = cached - past.longest_prompt
    num_new = given.shape[1] - expected
    if given.shape[0] != ids.shape[0] or not 1 <= num_new <= ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {expected} tokens of the conversation: attention_mask must be "
            f"[{ids.shape[0]}, {expected} and the new tokens], where input_ids are all tokens or the new ones; "
            f"got {list(given.shape)} for input_ids of {list(ids.shape)}"
        )
    if past.compact and cached < past.mask.shape[1] - 1:
        raise ValueError('positions="compact": past_key_values was cropped into the text that it began with')
    if not torch.equal(given[:, : begun.shape[1]], begun):
        raise ValueError("attention_mask differs from that of the call that began past_key_values")
    later = given[:, begun.shape[1] :]
    if past.compact and not bool(later.all()):
        raise ValueError('positions="compact" takes no pads inside a conversation')
    return torch.cat([past.mask, later.long()], 1)


@dataclass(frozen=True, eq=False)
class _Columns:
    """What the model's own generate is given of the texts."""

    input_ids: Tensor | None  # [B, L]
    inputs_embeds: Tensor | None  # [B, L, H]
    text_mask: Tensor  # [B, L] of these alone
    mask: Tensor  # [B, W] in slots
    position_ids: Tensor | None  # [B, W]


def _run(
    model: CausalLM, plan: Plan, call: GenerateCall, columns: _Columns, cache: Cache, compact: bool
) -> Any:
    arguments = dict(call.arguments, past_key_values=cache, attention_mask=columns.mask)
    if call.config.use_cache is not True:
        arguments["use_cache"] = True
    if call.config.cache_implementation is not None:
        arguments["cache_implementation"] = None
    if columns.input_ids is not None:
        arguments["input_ids"] = columns.input_ids
    if columns.inputs_embeds is not None:
        arguments["inputs_embeds"] = columns.inputs_embeds
    if columns.position_ids is not None and families.takes_position_ids(model):
        arguments["position_ids"] = columns.position_ids
    if call.assistant is not None:
        arguments["assistant_model"] = Assistant(call.assistant)
    prepare = functools.partial(
        _prepare_inputs,
        model.prepare_inputs_for_generation,
        cache=cache,
        mask=columns.mask,
        room=_room(plan, columns),
        given=0 if columns.input_ids is None else columns.input_ids.shape[1],
        chunked=call.config.prefill_chunk_size is not None,
        from_mask=plan.positions == "mask" and not compact,
    )
    no_ids = columns.input_ids is None
    process = functools.partial(
        _logits_processor, model._get_logits_processor, None if no_ids else columns.text_mask
    )
    own = {"prepare_inputs_for_generation": prepare, "_get_logits_processor": process}
    with _methods(model, own):
        return model.generate(**arguments)


def _room(plan: Plan, columns: _Columns) -> int | None:
    """How many tokens the model's position table has left for a continuation; None: it has no table."""
    if plan.position_limit is None:
        return None
    counted = columns.mask.shape[1] if columns.position_ids is not None else int(columns.mask.sum(1).max())
    return plan.position_limit - counted


# --------------------------------------------------------------------------------------------- the first step
def _prepare_inputs(
    stock: Callable[..., dict[str, Any]],
    input_ids: Tensor,
    next_sequence_length: int | None = None,
    past_key_values: Cache | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    is_first_iteration: bool | None = False,
    *,
    cache: Cache,
    mask: Tensor,
    room: int | None,
    given: int,
    chunked: bool,
    from_mask: bool,
    **kwargs: Any,
) -> dict[str, Any]:
    """The model's own `prepare_inputs_for_generation`, with the columns that the cache lacks in the first step.

    Args:
        stock: the model's own; so are all arguments but those below.
        input_ids: [rows, columns] so far.
        next_sequence_length: of the last columns that count.
        past_key_values: cache.
        attention_mask: [rows, slots] or None.
        inputs_embeds: [rows, L, H] or None.
        is_first_iteration: of the call.
        cache: of this call; an assistant may be the same model with another one.
        mask: [B, W] slots of prompt and text.
        room: see `_room`.
        given: columns of `input_ids` that the call began with.
        chunked: transformers cuts the first step itself.
        from_mask: the model takes its positions from the mask, where pads have place -1.
        kwargs: others.
    """
    ours = past_key_values is cache
    num_new = input_ids.shape[1] - given
    if ours and room is not None and num_new > room:
        # On a GPU, reading outside the table would end the process.
        raise ValueError(
            f"the continuation has reached {num_new} tokens, but behind prompt and text the model has positions "
            f"for {max(room, 0)}: ask for fewer new tokens or shorten the text"
        )
    if ours and not (chunked and is_first_iteration):
        width = mask.shape[1] + num_new
        if is_first_iteration:
            next_sequence_length = width - int(cache.get_seq_length())
        if attention_mask is not None and attention_mask.shape[1] != width:
            # Assisted decoding cuts it to the columns of the ids; it has one row only.
            attention_mask = nn.functional.pad(mask, (0, width - mask.shape[1]), value=1)
    inputs = stock(
        input_ids,
        next_sequence_length=next_sequence_length,
        past_key_values=past_key_values,
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


def _logits_processor(stock: Callable[..., Any], text_mask: Tensor | None, **kwargs: Any) -> Any:
    """The model's own processors of logits. One of them looks for pads in the mask, which shall be the ids'."""
    others = kwargs.get("model_kwargs") or {}
    mask = others.get("attention_mask")
    if mask is not None and text_mask is not None:
        text_mask = text_mask.repeat_interleave(mask.shape[0] // text_mask.shape[0], 0)
    return stock(**kwargs | {"model_kwargs": others | {"attention_mask": text_mask}})


@contextlib.contextmanager
def _methods(model: CausalLM, methods: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Sets methods on an instance, as PEFT does for the length of a call."""
    before = {name: model.__dict__[name] for name in methods if name in model.__dict__}
    model.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del model.__dict__[name]
        model.__dict__.update(before)


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
