"""How the packed row's attention gets into a model, for one call, without touching its class.

The ways ("seams"), from the fastest to the most general; `plan.py` takes the first whose numbers are right:

- `interface`: the model dispatches its attention through transformers' `AttentionInterface`, and its masks
  through `AttentionMaskInterface`: both are answered by this module, and no mask is ever built.
- `bloom`, `falcon`, `mpt`, `gpt_neo`: these dispatch nothing; their attention modules are answered one by
  one (`attention_modules.py`), and no mask is built either.
- `mask`: the model's own attention with a dense [T, T] mask, made of transformers' own mask function.
- `dense`: the same mask, handed over as a 4D `attention_mask`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softprompt.engine import attention_modules, model_spec
from softprompt.engine.attention import CALLS, AttentionContext, UnsupportedAttentionError, attend, current
from softprompt.engine.model_spec import CausalLM, is_foreign
from softprompt.engine.overrides import IN_USE
from softprompt.engine.structure import structure_of
from softprompt.ops.shared_prompt_attention.reference import visible

__all__ = [
    "AttentionContext",
    "UnsupportedAttentionError",
    "describe_seam",
    "packed_attention",
    "runs_the_op",
    "seams_for",
]

# Attention whose mask is a buffer indexed by the place in the row; too short a probe would not show it.
_MASKS_BY_PLACE = ("gpt_neo",)
_INTERFACE, _MASK_SDPA, _MASK_EAGER = "softprompt", "softprompt_sdpa", "softprompt_eager"


# ----------------------------------------------------------------------------------------- seam: interface
@torch.compiler.disable
def _layout_mask(*args: Any, mask_function: Any, local_size: int | None = None, **kwargs: Any) -> Tensor:
    """Answers transformers' request for a mask with an empty tensor [0, window], 0 for none.

    The window is the tensor's shape, since attributes are lost where checkpointing or a compiler copies it.
    """
    context = current()
    device = context.layout.query_position.device
    if context.examine:
        _check_rule(mask_function, local_size, device)
    return torch.empty(0, local_size or 0, device=device)


def _check_rule(mask_function: Callable[..., Tensor], local_size: int | None, device: torch.device) -> None:
    """Raises unless the model's mask is causal, with a sliding window of `local_size` where that is given."""
    edge = local_size or 4
    # On the model's device: a mask function may compare them with what the model keeps there.
    slots = torch.tensor(
        sorted({0, 1, 2, edge - 1, edge, edge + 1, 2 * edge, 2 * edge + 1, 3 * edge}), device=device
    )
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    query, key = slots[:, None], slots[None, :]
    expected = key <= query
    if local_size is not None:
        expected = expected & (query - key < local_size)
    if not torch.equal(
        torch.as_tensor(mask_function(zero, zero, query, key), device=device).expand_as(expected), expected
    ):
        raise UnsupportedAttentionError(
            f"the model's mask is neither causal nor a sliding window of {local_size}"
        )


@torch.compiler.disable
def _packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    context = current()
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.shape[0] != 0:
        raise UnsupportedAttentionError(f"{type(module).__name__} was not handed the mask that was made")
    if position_bias is not None:
        raise UnsupportedAttentionError(f"{type(module).__name__} adds a position bias")
    out = attend(
        query,
        key,
        value,
        scale=scaling,
        window=attention_mask.shape[1] or None,
        # transformers' own sdpa ignores the softcap; equal to what the user chose is what is wanted here.
        softcap=None if context.facts.attention == "sdpa" else softcap,
        sinks=s_aux,
        dropout_p=dropout,
    )
    return out, None


# ---------------------------------------------------------------------------------------------- seam: mask
@torch.compiler.disable
def _dense_mask(
    *args: Any,
    mask_function: Any,
    config: Any,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor:
    """Transformers' own rule for this layer kind, on the slots of the packed tokens, and the packed row's
    own.
    """
    layout = current().layout
    zero = torch.zeros(1, 1, dtype=torch.int64, device=layout.query_position.device)
    slots = layout.query_position.long()
    allowed = mask_function(zero, zero, slots[:, None], slots[None, :]) & visible(layout.attention, None)
    if config._attn_implementation == _MASK_EAGER:
        return _additive(allowed, dtype)[None, None]
    mask: Tensor = allowed[None, None]
    return mask


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )


def _own_eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The `eager_attention_forward` of the file that the module comes from."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


AttentionInterface.register(_INTERFACE, _packed_attention)
AttentionMaskInterface.register(_INTERFACE, _layout_mask)
AttentionInterface.register(_MASK_SDPA, sdpa_attention_forward)
AttentionMaskInterface.register(_MASK_SDPA, _dense_mask)
AttentionInterface.register(_MASK_EAGER, _own_eager_attention)
AttentionMaskInterface.register(_MASK_EAGER, _dense_mask)


# ---------------------------------------------------------------------------------------------- the call
def packing_obstacle(model: CausalLM) -> str | None:
    """Why rows of this model cannot share one packed row, or None."""
    model_type = model_spec.config_of(model).model_type
    if model_type in _MASKS_BY_PLACE:
        unanswered = attention_modules.obstacle(model_spec.body_of(model), model_type)
        if unanswered is not None:
            return (
                f"{model_type} masks tokens by their place in the row, which packing changes, "
                f"and {unanswered}"
            )
    return model_spec.packing_obstacle(model)


def seams_for(model: CausalLM) -> tuple[str, ...]:
    """The seams worth trying on this model, best first."""
    config = model_spec.config_of(model)
    own = has_own_attention(model_spec.body_of(model))
    if config.model_type not in attention_modules.FAMILIES:
        return ("dense",) if own else ("interface", "mask", "dense")
    if config.model_type == "falcon" and not config.alibi:
        return ("dense",) if own else ("falcon", "dense")
    # With a dense mask the others would count places in the row, in their biases or their masks.
    return (str(config.model_type),)


def has_own_attention(body: nn.Module) -> bool:
    """Whether an attention function of a decoder is neither transformers' nor PyTorch's.

    It may do more than compute attention, or another one from some time on: it is called, with a dense mask.
    """
    names = {getattr(config, "_attn_implementation", None) for config in model_spec.attention_configs(body)}
    functions = [ALL_ATTENTION_FUNCTIONS.get(name) for name in names if name is not None]
    if "eager" in names:
        files = dict.fromkeys(type(module).__module__ for module in structure_of(body)[1])
        functions += [getattr(sys.modules.get(name), "eager_attention_forward", None) for name in files]
    if "sdpa" in names:
        functions.append(nn.functional.scaled_dot_product_attention)
    return any(function is not None and is_foreign(function) for function in functions)


def runs_the_op(seam: str | None) -> bool:
    """Whether the attention of a seam is `shared_prompt_attention`."""
    return seam == "interface" or seam in attention_modules.FAMILIES


def describe_seam(seam: str) -> str:
    """Half a sentence for people."""
    if seam in attention_modules.FAMILIES:
        return f"the attention modules of {seam} are answered one by one"
    return {
        "interface": "its attention runs through transformers' attention interface",
        "mask": "its own attention runs with a dense mask made of its own mask function",
        "dense": "its own attention runs with a dense mask",
    }[seam]


@contextlib.contextmanager
def packed_attention(body: nn.Module, seam: str, context: AttentionContext) -> Iterator[Tensor | None]:
    """Makes `body` run on the packed row inside the block; yields the attention mask to call it with.

    Whatever it sets is put back at the end, also after an exception. One thread at a time is inside.
    """
    with IN_USE:
        yield from _packed_attention_alone(body, seam, context)


def _packed_attention_alone(body: nn.Module, seam: str, context: AttentionContext) -> Iterator[Tensor | None]:
    answered = attention_modules.answered(body, seam) if seam in attention_modules.FAMILIES else []
    answered += context.facts.fusion.modules(body)
    restore = [(config, config._attn_implementation_internal) for config in context.facts.attention_configs]
    # A packed call inside of a packed call of the same body finds them answered, and leaves them so.
    answered = [(module, stock, new) for module, stock, new in answered if type(module) is stock]
    mask = None
    if seam == "dense":
        allowed = visible(context.layout.attention, None)[None, None]
        mask = (
            allowed
            if context.facts.attention == "sdpa"
            else _additive(allowed, next(body.parameters()).dtype)
        )
    name = {"mask": _MASK_SDPA if context.facts.attention == "sdpa" else _MASK_EAGER}.get(seam, _INTERFACE)
    CALLS.append(context)
    try:
        if seam != "dense":
            for config, _ in restore:
                config._attn_implementation_internal = name
        for module, _, new in answered:
            object.__setattr__(module, "__class__", new)
        yield mask
    finally:
        for module, stock, _ in answered:
            object.__setattr__(module, "__class__", stock)
        for config, implementation in restore:
            config._attn_implementation_internal = implementation
        CALLS.pop()
