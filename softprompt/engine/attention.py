"""How the packed row's attention gets into a model, for one call, without touching its class.

Four ways ("seams"), from the fastest to the most general; `plan.py` takes the first whose numbers are right:

- `interface`: the model dispatches its attention through transformers' `AttentionInterface`, and its masks
through
  `AttentionMaskInterface`: both are answered by this module, and no mask is ever built.
- `bloom`: BLOOM dispatches nothing; the forward of each of its attention modules is replaced on the instance.
- `mask`: the model's own attention with a dense [T, T] mask, made of transformers' own mask function.
- `dense`: the same mask, handed over as a 4D `attention_mask`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from softprompt.engine import families
from softprompt.engine.families import CausalLM
from softprompt.layout import PackedLayout
from softprompt.ops.library import AUTO
from softprompt.ops.shared_prompt_attention import shared_prompt_attention
from softprompt.ops.shared_prompt_attention.reference import visible

SEAMS = ("interface", "bloom", "mask", "dense")
_INTERFACE, _MASK_SDPA, _MASK_EAGER = "softprompt", "softprompt_sdpa", "softprompt_eager"


class UnsupportedAttentionError(RuntimeError):
    """A model asks of the packed attention something that it does not do."""


@dataclass(eq=False)
class Packing:
    """One packed batch on its way through the attention layers."""

    layout: PackedLayout
    stock: str  # the attention implementation that the user chose
    backend: str = AUTO
    examine: bool = False  # look at the mask functions of the model, not only at their size
    windows: set[int | None] = field(default_factory=set)  # sliding windows met in this forward
    calls: int = 0
    slopes: Tensor | None = None

    def alibi_slopes(self, num_heads: int, device: torch.device) -> Tensor:
        """[Hq] fp32 slopes of BLOOM's ALiBi."""
        if self.slopes is None:
            from transformers.models.bloom.modeling_bloom import build_alibi_tensor

            ones = torch.ones(1, 2, device=device)
            self.slopes = build_alibi_tensor(ones, num_heads, torch.float32)[:, 0, 1].contiguous()
        return self.slopes


# The packing of each model that is inside a packed call, by the id of its configuration objects. Not a
# context variable: autograd recomputes checkpointed layers in threads of its own.
_ACTIVE: dict[int, Packing] = {}
# A packed call sets attributes of the model and of its configuration, which replicas in other threads may
# share: one call at a time.
IN_USE = threading.RLock()


# ---------------------------------------------------------------------------------------------- seam:
# interface
def _layout_mask(
    *args: Any, mask_function: Any, config: Any, local_size: int | None = None, **kwargs: Any
) -> Tensor:
    """Answers transformers' request for a mask with an empty tensor that carries the packing and the
    window.
    """
    packing = _packing_of(config)
    if packing.examine:
        _check_rule(mask_function, local_size)
    packing.windows.add(local_size)
    token = torch.empty(0, device=packing.layout.slots.device)
    token.softprompt_rule = (packing, local_size)  # type: ignore[attr-defined]
    return token


def _packing_of(config: Any) -> Packing:
    packing = _ACTIVE.get(id(config))
    if packing is None:
        raise UnsupportedAttentionError(
            f"the attention implementation {_INTERFACE!r} only works inside a patched forward"
        )
    return packing


def _check_rule(mask_function: Callable[..., Tensor], local_size: int | None) -> None:
    """Raises unless the model's mask is causal, with a sliding window of `local_size` where that is given."""
    edge = local_size or 4
    slots = torch.tensor(sorted({0, 1, 2, edge - 1, edge, edge + 1, 2 * edge, 2 * edge + 1, 3 * edge}))
    zero = torch.zeros(1, 1, dtype=torch.int64)
    query, key = slots[:, None], slots[None, :]
    expected = key <= query
    if local_size is not None:
        expected = expected & (query - key < local_size)
    if not torch.equal(torch.as_tensor(mask_function(zero, zero, query, key)).expand_as(expected), expected):
        raise UnsupportedAttentionError(
            f"the model's mask is neither causal nor a sliding window of {local_size}"
        )


def _rule_of(module: nn.Module, attention_mask: Any) -> tuple[Packing, int | None]:
    rule = getattr(attention_mask, "softprompt_rule", None)
    if rule is not None:
        return rule
    # Reentrant checkpointing hands over copies of the tensors, without their attributes.
    packing = _packing_of(getattr(module, "config", None))
    if len(packing.windows) != 1:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} got no mask of its own, and its model uses {len(packing.windows)} kinds"
        )
    return packing, next(iter(packing.windows))


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
    packing, window = _rule_of(module, attention_mask)
    if position_bias is not None:
        raise UnsupportedAttentionError(f"{type(module).__name__} adds a position bias")
    packing.calls += 1
    out = shared_prompt_attention(
        query[0],
        key[0],
        value[0],
        packing.layout.attention,
        scale=scaling,
        sliding_window=window,
        # transformers' own sdpa ignores the softcap; equal to what the user chose is what is wanted here.
        softcap=None if packing.stock == "sdpa" else softcap,
        sinks=s_aux,
        dropout_p=dropout,
        backend=packing.backend if dropout == 0 else "sdpa",
    )
    return out.transpose(0, 1)[None], None


# ---------------------------------------------------------------------------------------------- seam: bloom
def _bloom_attention(
    self: Any,
    hidden_states: Tensor,  # [1, T, H]
    residual: Tensor,  # [1, T, H]
    alibi: Tensor,
    attention_mask: Any,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    packing, _ = _rule_of(self, attention_mask)
    packing.calls += 1
    num_tokens = hidden_states.shape[1]
    fused = self.query_key_value(hidden_states).view(num_tokens, self.num_heads, 3, self.head_dim)
    query, key, value = fused.permute(2, 1, 0, 3)  # [3, Hq, T, D]
    dropout = self.attention_dropout.p if self.training else 0.0
    context = shared_prompt_attention(
        query,
        key,
        value,
        packing.layout.attention,
        scale=self.inv_norm_factor,
        alibi_slopes=packing.alibi_slopes(self.num_heads, hidden_states.device),
        dropout_p=dropout,
        backend=packing.backend if dropout == 0 else "sdpa",
    )
    out = self.dense(context.transpose(0, 1).reshape(1, num_tokens, self.hidden_size))
    return residual + functional.dropout(out, self.hidden_dropout, self.training), None


def _bloom_forwards(body: nn.Module) -> list[tuple[Any, Callable[..., Any]]]:
    """The modules of BLOOM whose forward is replaced for a call, and by what.

    Beside the attention that is the GELU, which BLOOM writes out as some twenty elementwise operations: the
    same function (tanh approximation) in one.
    """
    forwards: list[tuple[Any, Callable[..., Any]]] = []
    module: Any
    for module in body.modules():
        kind = type(module).__name__
        if kind not in ("BloomAttention", "BloomGelu"):
            continue
        if "forward" in module.__dict__:
            raise UnsupportedAttentionError(f"the forward of a {kind} was replaced on the instance")
        if kind == "BloomGelu":
            forwards.append((module, functools.partial(functional.gelu, approximate="tanh")))
            continue
        if module.pretraining_tp > 1 and module.slow_but_exact:
            raise UnsupportedAttentionError("BLOOM with pretraining_tp > 1 and slow_but_exact")
        forwards.append((module, functools.partial(_bloom_attention, module)))
    return forwards


# ---------------------------------------------------------------------------------------------- seam: mask
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
    packing = _packing_of(config)
    layout = packing.layout
    zero = torch.zeros(1, 1, dtype=torch.int64, device=layout.slots.device)
    slots = layout.slots.long()
    allowed = mask_function(zero, zero, slots[:, None], slots[None, :]) & visible(layout.attention, None)
    if config._attn_implementation == _MASK_EAGER:
        return _additive(allowed, dtype)[None, None]
    return allowed[None, None]


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
def seams_for(model: CausalLM) -> tuple[str, ...]:
    """The seams worth trying on this model, best first."""
    if families.config_of(model).model_type == "bloom":
        return ("bloom",)
    return ("interface", "mask", "dense")


@contextlib.contextmanager
def packed_attention(body: nn.Module, seam: str, packing: Packing) -> Iterator[Tensor | None]:
    """Makes `body` run on the packed row inside the block; yields the attention mask to call it with.

    Whatever it sets is put back at the end, also after an exception. One thread at a time is inside.
    """
    with IN_USE:
        yield from _packed_attention_alone(body, seam, packing)


def _packed_attention_alone(body: nn.Module, seam: str, packing: Packing) -> Iterator[Tensor | None]:
    configs = families.attention_configs(body)
    restore = [(config, config._attn_implementation_internal, _ACTIVE.get(id(config))) for config in configs]
    replaced = _bloom_forwards(body) if seam == "bloom" else []
    mask = None
    if seam == "dense":
        allowed = visible(packing.layout.attention, None)[None, None]
        mask = allowed if packing.stock == "sdpa" else _additive(allowed, next(body.parameters()).dtype)
    name = {"mask": _MASK_SDPA if packing.stock == "sdpa" else _MASK_EAGER}.get(seam, _INTERFACE)
    try:
        for config in configs:
            _ACTIVE[id(config)] = packing
            if seam != "dense":
                config._attn_implementation_internal = name
        for module, replacement in replaced:
            module.forward = replacement
        yield mask
    finally:
        for module, _ in replaced:
            module.__dict__.pop("forward", None)
        for config, implementation, before in restore:
            config._attn_implementation_internal = implementation
            if before is None:
                _ACTIVE.pop(id(config), None)
            else:
                _ACTIVE[id(config)] = before
