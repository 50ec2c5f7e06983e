"""`shared_prompt_attention` as dense [T, T] attention in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.ops.shared_prompt_attention.layout import AttentionLayout, AttentionOptions


def visible(layout: AttentionLayout, sliding_window: int | None) -> Tensor:
    """Which token sees which: bool [T, T], entry [q, k] is true where query q sees key k.

    Args:
        layout: of the packed row.
        sliding_window: W, in slots; None: no window.
    """
    query_position, key_position = layout.query_position[:, None], layout.key_position[None, :]
    own = layout.segments[None, :] == layout.segments[:, None]
    shared = layout.segments[None, :] == layout.prefix_id[:, None]
    seen = (own | shared) & (key_position <= query_position)
    if sliding_window is not None:
        seen = seen & (query_position - key_position < sliding_window)
    if layout.branches is not None:
        seen = seen & ((layout.branches == 0) | (layout.branches == layout.branches[:, None]))
    return seen


def shared_prompt_attention(
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    sinks: Tensor | None,  # [Hq]
    layout: AttentionLayout,
    options: AttentionOptions,
) -> Tensor:
    scale, sliding_window, softcap, alibi_slopes, _ = options
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    # A dummy sees only itself, so its output is its value; what it holds must not meet any other row, not
    # even with a probability of zero, because zero times NaN is NaN.
    live = layout.num_live
    group = query.shape[0] // key.shape[0]
    keys = key[:, :live].to(wide).repeat_interleave(group, 0)
    values = value.repeat_interleave(group, 0)

    scores = query[:, :live].to(wide) @ keys.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        positions = layout.position_ids[:live]
        distance = (positions[None, :] - positions[:, None]).to(wide)
        scores = scores + alibi_slopes.to(wide)[:, None, None] * distance

    seen = visible(layout, sliding_window)[:live, :live]
    sees_a_key = seen.any(1, keepdim=True)
    scores = scores.masked_fill(~seen & sees_a_key, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(-1, live, 1)
        scores = torch.cat([scores, column], 2)
    probabilities = scores.softmax(2)[:, :, :live].masked_fill(~sees_a_key, 0)
    out = probabilities @ values[:, :live].to(wide)
    return torch.cat([out.to(value.dtype), values[:, live:]], 1)
