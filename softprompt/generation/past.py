"""Conversations: caches that a call left, and that a later call goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from softprompt.generation.call import GenerateCall


@dataclass(frozen=True, eq=False)
class Past:
    """What a cache that `generate` began holds in front; kept on the cache itself."""

    names: tuple[str, ...]  # adapter of each row
    numbers: tuple[int, ...]  # of the prompts, row by row
    given_mask: Tensor  # [rows, L] of the call that began it
    mask: Tensor  # [rows, W] in slots of the cache
    longest_prompt: int
    compact: bool
    beams: bool


_PAST = "_softprompt_past"


def remember(cache: Cache, past: Past) -> None:
    """Notes on a cache what it begins with."""
    setattr(cache, _PAST, past)


def past_of(cache: Any) -> Past | None:
    """What a cache knows of the prompts in it, None where it holds none."""
    if cache is None or int(cache.get_seq_length()) == 0:
        return None
    past: Past | None = getattr(cache, _PAST, None)
    if past is None:
        raise ValueError(
            "past_key_values was not begun by this model's generate, so nothing says whether the prompt is "
            "in it: pass the cache that generate(..., return_dict_in_generate=True) returned, or an empty one"
        )
    return past


def check_goes_on(call: GenerateCall, past: Past, numbers: Mapping[str, int]) -> Tensor:
    """The input ids of a call that goes on with a cache.

    Args:
        call: the call.
        past: what its cache began with.
        numbers: of the known prompts, by adapter.

    Raises:
        ValueError: the cache does not fit the call.
    """
    ids = call.input_ids
    if ids is None or call.inputs_embeds is not None or call.config.prefill_chunk_size is not None:
        raise ValueError(
            "past_key_values that holds a conversation takes input_ids alone, without prefill_chunk_size"
        )
    if past.beams:
        raise ValueError(
            "past_key_values was left by beam search, whose beams are not the returned sequences"
        )
    if past.compact != call.compact:
        raise ValueError("past_key_values was begun with another setting of patch(positions=...)")
    if len(past.names) != ids.shape[0] or call.expand != 1:
        raise ValueError(
            f"past_key_values holds {len(past.names)} rows, the call has {ids.shape[0]} rows with "
            f"{call.expand} sequences each: a conversation goes on with one sequence for each of its rows"
        )
    if past.names != tuple(call.adapters(ids.shape[0])):
        raise ValueError(
            f"past_key_values holds the prompts of adapters {', '.join(dict.fromkeys(past.names))}; the call "
            f"asks for {', '.join(dict.fromkeys(call.names))}"
        )
    if past.numbers != tuple(numbers[name] for name in past.names):
        raise ValueError(
            "past_key_values holds a prompt or weights as they were before they changed: begin the "
            "conversation again"
        )
    return ids


def whole_mask(mask: Tensor, ids: Tensor, past: Past, cached: int) -> Tensor:
    """[B, W] mask in slots: what the cache began with, then the columns that came later.

    Args:
        mask: [B, columns] of the call, without prompts.
        ids: [B, L], all ids of the conversation or the last ones.
        past: what the cache began with.
        cached: slots that the cache holds.

    Raises:
        ValueError: the mask does not fit the cache.
    """
    given, begun = torch.ne(mask, 0), torch.ne(past.given_mask, 0)
    expected = cached - past.longest_prompt
    num_new = given.shape[1] - expected
    if given.shape[0] != ids.shape[0] or not 1 <= num_new <= ids.shape[1] <= given.shape[1]:
        raise ValueError(
            f"past_key_values holds {expected} tokens of the conversation: attention_mask must be "
            f"[{ids.shape[0]}, {expected} and the new tokens], and input_ids all tokens or the new ones; "
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
