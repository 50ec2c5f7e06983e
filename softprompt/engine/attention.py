"""One packed batch on its way through the attention layers of a model, and the attention that they all end
in.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softprompt.layout import PackedLayout
from softprompt.ops.registry import AUTO
from softprompt.ops.shared_prompt_attention import shared_prompt_attention

if TYPE_CHECKING:
    from softprompt.engine.model_spec import DecoderFacts
    from softprompt.engine.states import TextStates


class UnsupportedAttentionError(RuntimeError):
    """A model asks of the packed attention something that it does not do."""


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """One packed batch, and how its attention is to be computed."""

    layout: PackedLayout
    facts: DecoderFacts  # of the model
    backend: str = AUTO
    examine: bool = False  # look at the mask functions of the model, not only at their size
    states: TextStates | None = None  # of a row whose prompts are known: only its texts are computed


# The packed calls that this process is inside of, the innermost last; `overrides.IN_USE` lets one thread in
# at a time. Not a context variable: autograd recomputes checkpointed layers in threads of its own.
CALLS: list[AttentionContext] = []


def current() -> AttentionContext:
    """The context of the innermost packed call.

    Raises:
        UnsupportedAttentionError: there is none.
    """
    if not CALLS:
        raise UnsupportedAttentionError("the packed attention only works inside a patched forward")
    return CALLS[-1]


# A compiled decoder is cut here: what follows differs from batch to batch, and back ends keep on the layout
# what all layers of a step share. So a compiler sees neither a layout nor its tensors.
@torch.compiler.disable
def attend(
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, Dv]
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Callable[[AttentionContext], Tensor] | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The attention of the current packed row.

    Args:
        query: [1, Hq, T, D].
        key: [1, Hkv, T, D].
        value: [1, Hkv, T, Dv].
        scale: see `shared_prompt_attention`; so are softcap, sinks and dropout_p.
        window: sliding window, in slots.
        softcap: of the scores.
        slopes: gives the ALiBi slopes [Hq].
        sinks: [Hq].
        dropout_p: of the probabilities.

    Returns:
        [1, T, Hq, Dv].
    """
    context = current()
    num_texts = query.shape[2]
    if context.states is not None:
        query, key, value = context.states.join(query, key, value)
    out = shared_prompt_attention(
        # Not by an index, whose gradient is a tensor of zeros with a copy in it.
        query.squeeze(0),
        key.squeeze(0),
        value.squeeze(0),
        context.layout.attention,
        scale=scale,
        sliding_window=window,
        softcap=softcap,
        alibi_slopes=None if slopes is None else slopes(context),
        sinks=sinks,
        dropout_p=dropout_p,
        backend=attention_backend(context.backend, query.device) if dropout_p == 0 else "sdpa",
    )
    if context.states is not None:
        out = out[:, out.shape[1] - num_texts :]
    return out.transpose(0, 1)[None]


def attention_backend(backend: str, device: torch.device) -> str:
    """The attention's back end where all ops were asked to use `backend`: it is compiled for the CPU only."""
    return AUTO if backend == "native" and device.type != "cpu" else backend


@functools.cache
def alibi_slopes(
    model_type: str, num_heads: int, device: torch.device, factor: float = 1.0
) -> Tensor:  # [Hq] fp32
    """The slopes that a model's own code makes on this device, times `factor`.

    Made once and kept: they are never made while a stream is recorded, since the self-check came before that,
    and all layers of a step share the bias that belongs to one tensor of slopes.

    Args:
        model_type: "bloom", "falcon" (which rounds its slopes to bf16) or "mpt".
        num_heads: Hq.
        device: where the model's own code would make them.
        factor: what the model multiplies its bias with.
    """
    code = sys.modules[f"transformers.models.{model_type}.modeling_{model_type}"]
    with torch.inference_mode(False), torch.no_grad():
        if model_type == "mpt":
            slopes = -code.build_mpt_alibi_tensor(num_heads, 2, device=device)[:, 0, 0]
        else:
            mask = torch.ones(1, 2, device=device)
            slopes = code.build_alibi_tensor(mask, num_heads, torch.float32)[:, 0, 1]
        scaled: Tensor = (slopes.float() * factor).contiguous()
        return scaled
