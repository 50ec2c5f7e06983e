"""Keys and values of prompts, computed once, and of the texts that are packed behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt.engine import model_spec
from softprompt.engine.caches import cache_argument
from softprompt.engine.model_spec import CausalLM


@dataclass(frozen=True, eq=False)
class LayerStates:
    """Keys and values of all layers, as the model's own cache holds them."""

    keys: tuple[Tensor, ...]  # each [rows, Hkv, tokens, D]
    values: tuple[Tensor, ...]  # each [rows, Hkv, tokens, Dv]

    @property
    def num_tokens(self) -> int:
        """Tokens of each row."""
        return int(self.keys[0].shape[2])

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerStates:
        """The states of which each tensor is `change` of one of these."""
        return LayerStates(tuple(map(change, self.keys)), tuple(map(change, self.values)))


@torch.no_grad()
def prompt_states(model: CausalLM, prompt: Tensor) -> LayerStates:  # prompt: [P, H]
    """The states of one prompt, [1, Hkv, P, D] in every layer: one run of the decoder over P tokens."""
    embedding = model.get_input_embeddings()
    device = next(embedding.parameters()).device
    # Quantised tables and hooks decide about the dtype of what they return.
    dtype = embedding(torch.zeros(1, 1, dtype=torch.int64, device=device)).dtype
    cache = DynamicCache()  # made without a configuration, it also keeps what has left a sliding window
    body = model_spec.body_of(model)
    body(
        inputs_embeds=prompt.detach().to(device, dtype)[None],
        attention_mask=torch.ones(1, prompt.shape[0], dtype=torch.int64, device=device),
        use_cache=True,
        return_dict=True,
        **{cache_argument(body): cache},
    )
    return LayerStates(
        tuple(layer.keys.detach() for layer in cache.layers),
        tuple(layer.values.detach() for layer in cache.layers),
    )


def joined(states: Sequence[LayerStates], dim: int = 2) -> LayerStates:
    """Several prompts in a row, as at the beginning of a packed row: [1, Hkv, ΣP, D]; or as rows (dim 0)."""
    if len(states) == 1:
        return states[0]
    return LayerStates(
        tuple(torch.cat(keys, dim) for keys in zip(*(one.keys for one in states), strict=True)),
        tuple(torch.cat(values, dim) for values in zip(*(one.values for one in states), strict=True)),
    )


class TextStates:
    """Puts the known states of the prompts in front of packed texts, layer by layer, and keeps the texts'."""

    def __init__(self, prompts: LayerStates) -> None:
        self._prompts = prompts
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def join(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values of the whole packed row; the prompts' queries are zeros.

        Args:
            query: [1, Hq, N, D] of the texts.
            key: [1, Hkv, N, D].
            value: [1, Hkv, N, Dv].

        Raises:
            ValueError: the decoder attends more often than it keeps states.
        """
        layer = len(self._keys)
        if layer == len(self._prompts.keys):
            raise ValueError(
                f"the decoder attends more than {layer} times, but keeps states of {layer} layers"
            )
        prompt_key, prompt_value = self._prompts.keys[layer], self._prompts.values[layer]
        # Falcon keeps the heads of a group one by one, and all are the same.
        group = prompt_key.shape[1] // key.shape[1]
        self._keys.append(key.repeat_interleave(group, 1) if group > 1 else key)
        self._values.append(value.repeat_interleave(group, 1) if group > 1 else value)
        prompt_query = query.new_zeros(*query.shape[:2], prompt_key.shape[2], query.shape[3])
        return (
            torch.cat([prompt_query, query], 2),
            torch.cat([prompt_key[:, ::group].to(key.dtype), key], 2),
            torch.cat([prompt_value[:, ::group].to(value.dtype), value], 2),
        )

    def collected(self) -> LayerStates:
        """Prompts and texts of all layers, [1, Hkv, ΣP + N, D].

        Raises:
            ValueError: some layers did not pass by.
        """
        if len(self._keys) != len(self._prompts.keys):
            raise ValueError(
                f"the decoder attended {len(self._keys)} times, {len(self._prompts.keys)} layers keep states"
            )
        return joined([self._prompts, LayerStates(tuple(self._keys), tuple(self._values))])
