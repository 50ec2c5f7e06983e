"""Prompts whose keys and values are kept from call to call."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from softprompt.engine import families
from softprompt.engine.families import CausalLM
from softprompt.engine.states import LayerStates, prompt_states

_SAMPLES = 16  # numbers of each weight


@dataclass(frozen=True, eq=False)
class KnownPrompt:
    """The states of an adapter's prompt, and what they were computed from."""

    prompt: Tensor  # [P, H], a copy
    weights: tuple[Any, ...]
    samples: dict[torch.device, Tensor]
    states: LayerStates
    # Of this computation. Caches remember it, also those that come out of a file of another process.
    number: int = field(default_factory=lambda: uuid.uuid4().int)


def known_prompt(model: CausalLM, known: KnownPrompt | None, prompt: Tensor) -> KnownPrompt:
    """`known` where prompt and model are still those that it was computed from, else computed again.

    The prompt's values are compared, since optimizers that write through `.data` or in a recorded graph leave
    no other trace. So are some values of each weight of the model.
    """
    prompt = prompt.detach()
    weights, samples = _weights_of(model), _samples_of(model)
    if (
        known is not None
        and known.weights == weights
        and known.prompt.device == prompt.device
        and torch.equal(known.prompt, prompt)
        and known.samples.keys() == samples.keys()
        and all(torch.equal(known.samples[device], values) for device, values in samples.items())
    ):
        if not any(_depends_on_more(module) for module in families.body_of(model).modules()):
            return known
        if _equal(known.states, _states(model, prompt)):
            return known
    return KnownPrompt(prompt.clone(), weights, samples, _states(model, prompt))


def _depends_on_more(module: nn.Module) -> bool:
    """Whether only the result tells what a module does: what hooks do may depend on anything, and layers of
    LoRA and its like are switched, scaled and merged.
    """
    return families.has_hooks(module) or isinstance(module, BaseTunerLayer)


def _states(model: CausalLM, prompt: Tensor) -> LayerStates:
    with torch.inference_mode(False), torch.no_grad():
        return prompt_states(model, prompt.clone())


def _equal(one: LayerStates, other: LayerStates) -> bool:
    pairs = zip(one.keys + one.values, other.keys + other.values, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _weights_of(model: CausalLM) -> tuple[Any, ...]:
    """What shows that a model's weights, or the dtype that it computes in, have changed."""
    weights = tuple(
        (
            id(tensor),
            tensor.data_ptr() if _is_plain(tensor) else 0,
            tensor.dtype,
            tensor.device,
            0 if tensor.is_inference() else tensor._version,
        )
        for tensor in _tensors_of(model)
    )
    device_type = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return (*weights, autocast, families.config_of(model)._attn_implementation)


def _samples_of(model: CausalLM) -> dict[torch.device, Tensor]:
    """Some values of each weight, which show what was written through `.data`: no version counts that."""
    parts: dict[torch.device, list[Tensor]] = {}
    for tensor in _tensors_of(model):
        # Numbers of one byte can neither be joined with others nor compared everywhere.
        if _is_plain(tensor) and tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            values, step = tensor.detach().contiguous(), -(-tensor.numel() // _SAMPLES)
            some = values.as_strided((-(-values.numel() // step),), (step,))
            parts.setdefault(tensor.device, []).append(some)
    return {device: torch.cat(values) for device, values in parts.items()}


def _tensors_of(model: CausalLM) -> itertools.chain[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
