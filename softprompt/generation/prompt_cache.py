"""Prompts whose keys and values are kept from call to call."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from softprompt.engine import model_spec
from softprompt.engine.guard import Snapshot, guard_of
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.states import LayerStates, prompt_states


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """The states of an adapter's prompt, and what they were computed from."""

    prompt: Tensor  # [P, H], a copy
    decoder: Snapshot
    states: LayerStates
    # Of this computation. Caches remember it, also those that come out of a file of another process.
    number: int = field(default_factory=lambda: uuid.uuid4().int)


def cached_prompt(model: CausalLM, cached: CachedPrompt | None, prompt: Tensor) -> CachedPrompt:
    """`cached` where prompt and model still give its states, else computed again.

    The prompt's values are compared, since optimizers that write through `.data` or in a recorded graph leave
    no other trace. So are some values of each weight of the model. Where something else than these and the
    attributes of modules may count, the states are computed at every call, and compared.
    """
    prompt = prompt.detach()
    decoder = guard_of(model_spec.body_of(model)).snapshot()
    if cached is None or cached.prompt.device != prompt.device or not torch.equal(cached.prompt, prompt):
        return CachedPrompt(prompt.clone(), decoder, _states(model, prompt))
    same = cached.decoder.same(decoder)
    if same and not decoder.is_open:
        return cached
    states = _states(model, prompt)
    if not _equal(cached.states, states):
        return CachedPrompt(prompt.clone(), decoder, states)
    return cached if same else replace(cached, decoder=decoder)


def _states(model: CausalLM, prompt: Tensor) -> LayerStates:
    with torch.inference_mode(False), torch.no_grad():
        return prompt_states(model, prompt.clone())


def _equal(one: LayerStates, other: LayerStates) -> bool:
    pairs = zip(one.keys + one.values, other.keys + other.values, strict=True)
    return all(a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in pairs)
