"""From what a decoder gave to the logits of all of its columns, and what the head adds to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softprompt.engine.encoder_decoder import DecodedRows
from softprompt.engine.families import CausalLM
from softprompt.engine.overrides import returning


def own_logits(model: CausalLM, hidden: Tensor, encoded: Any, output_class: type) -> Tensor:
    """The model's own logits of what its decoder gave: its forward with parts that answer.

    Args:
        model: the encoder-decoder.
        hidden: [B, T, H] as the decoder gives them.
        encoded: the encoder's output.
        output_class: of the decoder.

    Returns:
        [B, T, V].
    """
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with returning(model.get_decoder(), output_class(last_hidden_state=hidden)):
        logits: Tensor = model(
            encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False, return_dict=True
        ).logits
    return logits


def logits_source(model: CausalLM, rows: DecodedRows) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the logits of all T columns are computed from, and what computes them, differentiably."""

    def first(hidden: Tensor) -> Tensor:
        return own_logits(model, hidden.view(*rows.shape, -1), rows.encoded, rows.output_class)

    hidden, states, rest = rows.hidden, rows.encoded.last_hidden_state, rows.rest
    if rest is None:
        return hidden, first

    def both(joined: Tensor) -> Tensor:
        logits = first(joined[: hidden.numel()].to(hidden))
        others = rest(joined[hidden.numel() :].view(states.shape).to(states))
        return torch.cat([logits, others.to(logits)], 1)

    return torch.cat([hidden.reshape(-1), states.reshape(-1).to(hidden.device)]), both


def head_bias(model: CausalLM) -> Tensor | None:
    """[V] what the model adds to the product with its head's weight, or None."""
    own, added = model.get_output_embeddings().bias, getattr(model, "final_logits_bias", None)
    if added is None:
        return own  # type: ignore[no-any-return]
    added = added.reshape(-1)
    return added if own is None else own + added
