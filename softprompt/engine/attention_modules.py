"""Attention modules that dispatch nothing, answered one by one.

BLOOM, Falcon, MPT and GPT-Neo compute their attention inside their modules, and so do not ask transformers'
`AttentionInterface` for it. For the duration of a packed call each of these modules gets a class that is its
own but for `forward`, which is written here: the module's projections around the attention of the packed row.

A class and not a forward on the instance: it is made once, so a compiler meets the same code in every layer
and at every call. A class that was derived from the stock one (FSDP2 does that) is served as long as it runs
the stock `forward`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softprompt.engine import model_records
from softprompt.engine.attention import AttentionContext, UnsupportedAttentionError, alibi_slopes, attend
from softprompt.engine.model_spec import is_foreign
from softprompt.engine.structure import structure_of

Forward = Callable[..., Any]


# -------------------------------------------------------------------------------------------- the forwards
def _bloom_attention(
    self: Any,
    hidden_states: Tensor,  # [1, T, H]
    residual: Tensor,  # [1, T, H]
    alibi: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    fused = self.query_key_value(hidden_states).unflatten(2, (self.num_heads, 3, self.head_dim))
    # Unbound and not indexed: the gradient is then put together in one operation.
    query, key, value = (part.transpose(1, 2) for part in fused.unbind(3))
    context = attend(
        query,
        key,
        value,
        scale=self.inv_norm_factor,
        slopes=functools.partial(_bloom_slopes, self.num_heads, hidden_states.device),
        dropout_p=self.attention_dropout.p if self.training else 0.0,
    )
    out = self.dense(context.flatten(2))
    return residual + functional.dropout(out, self.hidden_dropout, self.training), None


def _bloom_slopes(num_heads: int, device: torch.device, context: AttentionContext) -> Tensor:
    return alibi_slopes("bloom", num_heads, device)


def _bloom_gelu(self: Any, x: Tensor) -> Tensor:
    """BLOOM writes it out as some twenty elementwise operations; here it is one."""
    return functional.gelu(x, approximate="tanh")


def _falcon_attention(
    self: Any,
    hidden_states: Tensor,  # [1, T, H]
    alibi: Tensor | None,
    attention_mask: Any,
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    # One group for each key head: its query heads, then the key, then the value.
    fused = self.query_key_value(hidden_states)
    if self.new_decoder_architecture or self.multi_query:
        group = self.num_heads // self.num_kv_heads
        fused = fused.unflatten(2, (self.num_kv_heads, group + 2, self.head_dim))
    else:
        fused = fused.unflatten(2, (self.num_heads, 3, self.head_dim))
    parts = fused.split((fused.shape[3] - 2, 1, 1), 3)
    query, key, value = (heads.flatten(2, 3).transpose(1, 2) for heads in parts)
    if alibi is None:
        rotate = sys.modules["transformers.models.falcon.modeling_falcon"].apply_rotary_pos_emb
        query, key = rotate(query, key, *position_embeddings)  # type: ignore[misc]
        context = attend(query, key, value)  # without ALiBi the stock attention has no dropout
    else:
        context = attend(
            query,
            key,
            value,
            scale=self.inv_norm_factor,
            slopes=functools.partial(_falcon_slopes, self.num_heads, self.head_dim, hidden_states.device),
            dropout_p=self.attention_dropout.p if self.training else 0.0,
        )
    return self.dense(context.flatten(2)), None


def _falcon_slopes(num_heads: int, head_dim: int, device: torch.device, context: AttentionContext) -> Tensor:
    # Falcon's bias is scaled like its scores, and its eager attention adds it to the scores and to the mask.
    times = 1 if context.facts.attention == "sdpa" else 2
    return alibi_slopes("falcon", num_heads, device, times * head_dim**-0.5)


def _mpt_attention(
    self: Any, hidden_states: Tensor, position_bias: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    fused = self.Wqkv(hidden_states)
    if self.clip_qkv:
        fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = fused.unflatten(2, (3, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    context = attend(
        query,
        key,
        value,
        scale=self.softmax_scale,
        slopes=functools.partial(_mpt_slopes, self.n_heads, hidden_states.device),
        dropout_p=self.attn_dropout_p if self.training else 0.0,
    )
    return self.out_proj(context.flatten(2)), None


def _mpt_slopes(num_heads: int, device: torch.device, context: AttentionContext) -> Tensor:
    return alibi_slopes("mpt", num_heads, device)


def _gpt_neo_attention(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    query, key, value = (
        projection(hidden_states).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    context = attend(
        query,
        key,
        value,
        scale=1.0,
        # Instead of the module's own mask, a buffer that is indexed by the place in the row.
        window=self.config.window_size if self.attention_type == "local" else None,
        dropout_p=self.attn_dropout.p if self.training else 0.0,
    )
    return self.resid_dropout(self.out_proj(context.flatten(2))), None


# ----------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Family:
    """How the modules of one model type are answered."""

    layers: str  # where its body keeps its layers, each with one attention
    attention: str  # qualified name of the stock forward that is answered
    answer: Forward
    others: dict[str, Forward] = field(default_factory=dict)  # of modules that need not be there
    helpers: tuple[str, ...] = ()  # methods that are then not called


FAMILIES = {
    "bloom": Family(
        "h",
        "BloomAttention.forward",
        _bloom_attention,
        {"BloomGelu.forward": _bloom_gelu},
        ("build_alibi_tensor",),
    ),
    "falcon": Family("h", "FalconAttention.forward", _falcon_attention),
    "mpt": Family("blocks", "MptAttention.forward", _mpt_attention, helpers=("build_mpt_alibi_tensor",)),
    "gpt_neo": Family("h", "GPTNeoSelfAttention.forward", _gpt_neo_attention, helpers=("_attn",)),
}


@dataclass(frozen=True)
class _Answers:
    """The modules of one body that are answered, by their number in its structure."""

    classes: tuple[tuple[int, type, type], ...]  # number, its class, its class in a packed call
    obstacle: str | None


_STOCK: dict[type, type] = {}  # class in a packed call -> class


@functools.cache
def answering(stock: type, forward: Forward) -> type:
    """The class of a module in a packed call: its own class with this forward."""
    names = {"forward": forward, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    kind = type(stock.__name__, (stock,), names)
    _STOCK[kind] = stock
    return kind


def obstacle(body: nn.Module, model_type: str) -> str | None:
    """Why the modules of a body cannot be answered, or None."""
    if model_type not in FAMILIES:
        return f"the attention modules of {model_type} are not known"
    return _answers(body, model_type, structure_of(body)[1]).obstacle


def answered(body: nn.Module, model_type: str) -> list[tuple[nn.Module, type, type]]:
    """The modules that are answered in a packed call, each with its class and the one that answers.

    Raises:
        UnsupportedAttentionError: a layer has another attention than the one that is known.
    """
    modules = structure_of(body)[1]
    answers = _answers(body, model_type, modules)
    if answers.obstacle is not None:
        raise UnsupportedAttentionError(answers.obstacle)
    return [(modules[place], stock, answering) for place, stock, answering in answers.classes]


def _answers(body: nn.Module, model_type: str, modules: list[nn.Module]) -> _Answers:
    family = FAMILIES[model_type]
    replaced = [name for module in modules for name in ("forward", *family.helpers) if name in vars(module)]
    for name in replaced:
        if name in family.helpers:
            return _Answers((), f"{name} was replaced on the instance")
    if replaced:
        return _find_answers(body, family, modules)
    classes = tuple(_STOCK.get(kind, kind) for kind in map(type, modules))
    return model_records.kept(body, "answers", classes, lambda: _find_answers(body, family, modules))


def _find_answers(body: nn.Module, family: Family, modules: list[nn.Module]) -> _Answers:
    classes = []
    attentions = set()
    for place, module in enumerate(modules):
        stock = _STOCK.get(type(module), type(module))
        name = name_of_forward(stock)
        forward = family.answer if name == family.attention else family.others.get(name)
        if forward is None:
            continue
        if "forward" in module.__dict__:
            return _Answers((), f"the forward of a {stock.__name__} was replaced on the instance")
        # Of BLOOM: its output projection in slices.
        if getattr(module, "pretraining_tp", 1) > 1 and getattr(module, "slow_but_exact", False):
            return _Answers((), "BLOOM with pretraining_tp > 1 and slow_but_exact")
        if name == family.attention:
            attentions.add(id(module))
        classes.append((place, stock, answering(stock, forward)))
    for number, layer in enumerate(getattr(body, family.layers, ())):
        found = sum(id(module) in attentions for module in layer.modules())
        if found != 1:
            return _Answers((), f"layer {number} has {found} modules with {family.attention}, expected 1")
    if not attentions:
        return _Answers((), f"no module runs {family.attention}")
    return _Answers(tuple(classes), None)


def name_of_forward(kind: type) -> str:
    """Qualified name of a class's forward where it comes from transformers, else an empty string."""
    forward = getattr(kind, "forward", None)
    # A wrapper has the name of what it wraps.
    if is_foreign(forward) or not getattr(forward, "__module__", "").startswith("transformers.models."):
        return ""
    return str(getattr(forward, "__qualname__", ""))
