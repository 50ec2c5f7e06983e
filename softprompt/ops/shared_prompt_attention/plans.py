"""What the `sdpa` back end prepares once a step: index tensors and score biases, kept in `layout.plans`.

All layers of a model use the same ones. They are made of the layout's tensors and of sizes that the host
knows, so nothing is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from softprompt.ops.shared_prompt_attention.layout import AttentionLayout

Plan = TypeVar("Plan")


@dataclass(frozen=True, eq=False)
class TextIndex:
    """How the texts are laid out as a padded batch: queries [B, Lmax], keys [B, S] with S = Pmax + Lmax.

    A row's keys are its prompt, padded to Pmax, and then its own tokens. Places without a token hold the
    index of some row of the layout; the bias hides them as keys, and as queries nothing reads them.
    """

    query_index: Tensor  # [B * Lmax] row of the packed row
    query_is_pad: Tensor  # [B * Lmax]
    query_inverse: Tensor  # [N] place in the padded queries of each text row
    key_index: Tensor  # [B * S] row of the packed row
    key_is_pad: Tensor  # [B, S]
    key_inverse: Tensor  # [N] place in the padded keys of each text row
    prompt_inverse: Tensor  # [ΣP] place of each prompt row in [K, Pmax]
    prompt_of_row: Tensor  # [B]
    prompt_lengths: tuple[int, ...]
    num_rows: int  # T
    num_live: int  # ΣP + N
    batch_size: int  # B
    longest_prompt: int  # Pmax
    longest_text: int  # Lmax
    rows_of_prompt: int | None  # texts of each prompt where they stand together, prompt by prompt, else None


@dataclass(frozen=True, eq=False)
class Bias:
    """An additive score bias, -inf where a key is hidden, that carries no gradient."""

    scores: Tensor  # [..., 1 or Hq, queries, keys]
    sees_nothing: Tensor | None  # [..., queries] rows whose output is zero; they have a finite bias
    slopes: Tensor | None  # kept alive, because plans are found by its identity


def remember(layout: AttentionLayout, key: Hashable, make: Callable[[], Plan]) -> Plan:
    """The plan of that key, made at its first use."""
    if key not in layout.plans:
        with torch.no_grad():
            layout.plans[key] = make()
    plan: Plan = layout.plans[key]
    return plan


def index_texts(layout: AttentionLayout) -> TextIndex:
    """The index tensors of the padded texts; needs at least one text token.

    Raises:
        ValueError: the layout does not know its sizes.
    """
    if layout.longest_text is None:
        raise ValueError("the padded form needs a layout that knows its longest text")
    device = layout.query_position.device
    prompts, live = layout.prompt_tokens, layout.num_live
    batch_size, longest = layout.prompt_of_row.shape[0], layout.longest_text
    longest_prompt = max(layout.prompt_lengths)

    starts = layout.cu_texts.long()
    offsets = torch.arange(longest, device=device)
    rows = starts[:-1, None] + offsets
    is_pad = rows >= starts[1:, None]
    rows = rows.masked_fill(is_pad, prompts)

    prompt_starts = layout.cu_prompts.long()
    prompt_of_row = layout.prompt_of_row.long()
    prompt_offsets = torch.arange(longest_prompt, device=device)
    prompt_rows = prompt_starts[prompt_of_row][:, None] + prompt_offsets
    prompt_is_pad = prompt_rows >= prompt_starts[prompt_of_row + 1][:, None]
    prompt_rows = prompt_rows.masked_fill(prompt_is_pad, 0)

    text = layout.segments[prompts:live].long() - len(layout.prompt_lengths)
    within = torch.arange(prompts, live, device=device) - starts[text]
    prompt = layout.segments[:prompts].long()
    within_prompt = torch.arange(prompts, device=device) - prompt_starts[prompt]
    return TextIndex(
        query_index=rows.reshape(-1),
        query_is_pad=is_pad.reshape(-1),
        query_inverse=text * longest + within,
        key_index=torch.cat([prompt_rows, rows], 1).reshape(-1),
        key_is_pad=torch.cat([prompt_is_pad, is_pad], 1),
        key_inverse=text * (longest_prompt + longest) + longest_prompt + within,
        prompt_inverse=prompt * longest_prompt + within_prompt,
        prompt_of_row=prompt_of_row,
        prompt_lengths=layout.prompt_lengths,
        num_rows=layout.num_rows,
        num_live=live,
        batch_size=batch_size,
        longest_prompt=longest_prompt,
        longest_text=longest,
        rows_of_prompt=_rows_of_prompt(prompt_of_row, len(layout.prompt_lengths)),
    )


def _rows_of_prompt(prompt_of_row: Tensor, num_prompts: int) -> int | None:
    """B / K where the texts of each prompt stand together, as many for each, or None.

    Of several prompts this is only known by looking, which is free on a CPU, and not while a graph is traced.
    """
    batch_size = prompt_of_row.shape[0]
    if num_prompts == 1:
        return batch_size
    if type(prompt_of_row) is not Tensor or prompt_of_row.device.type != "cpu" or batch_size % num_prompts:
        return None
    each = batch_size // num_prompts
    expected = [prompt for prompt in range(num_prompts) for _ in range(each)]
    return each if prompt_of_row.tolist() == expected else None


def bias_of_texts(
    layout: AttentionLayout,
    texts: TextIndex,
    window: int | None,
    slopes: Tensor | None,
    dtype: torch.dtype,
) -> Bias:
    """[B, 1 or Hq, Lmax, S]: the bias of the padded texts."""

    def queries(values: Tensor) -> Tensor:
        return values[texts.query_index].view(texts.batch_size, -1, 1)

    def keys(values: Tensor) -> Tensor:
        return values[texts.key_index].view(texts.batch_size, 1, -1)

    seen = (
        _reaches(queries(layout.query_position), keys(layout.key_position), window)
        & ~texts.key_is_pad[:, None]
    )
    if layout.branches is not None:
        seen &= _on_the_way(queries(layout.branches), keys(layout.branches))
    distance = keys(layout.position_ids) - queries(layout.position_ids)
    return _bias(seen, distance, window, slopes, dtype)


def bias_of_prompt(
    layout: AttentionLayout,
    rows: slice,
    num_prompts: int,
    window: int | None,
    slopes: Tensor | None,
    dtype: torch.dtype,
) -> Bias:
    """[num_prompts, 1 or Hq, P, P]: the bias of prompts of one length, which stand in `rows`."""
    query_position, key_position, positions = (
        values[rows].view(num_prompts, -1)
        for values in (layout.query_position, layout.key_position, layout.position_ids)
    )
    seen = _reaches(query_position[:, :, None], key_position[:, None, :], window)
    # A prompt's row always sees itself, whatever the window.
    return _bias(seen, positions[:, None, :] - positions[:, :, None], None, slopes, dtype)


def bias_of_all(
    layout: AttentionLayout, window: int | None, slopes: Tensor | None, dtype: torch.dtype
) -> Bias:
    """[1, 1 or Hq, ΣP + N, ΣP + N]: the bias of the whole row without its dummies."""
    query_position, key_position, segments, prefix_id, positions = (
        values[: layout.num_live]
        for values in (
            layout.query_position,
            layout.key_position,
            layout.segments,
            layout.prefix_id,
            layout.position_ids,
        )
    )
    same = (segments[:, None] == segments) | (prefix_id[:, None] == segments)
    seen = same & _reaches(query_position[:, None], key_position, window)
    if layout.branches is not None:
        branches = layout.branches[: layout.num_live]
        seen &= _on_the_way(branches[:, None], branches)
    return _bias(seen[None], (positions - positions[:, None])[None], window, slopes, dtype)


def _reaches(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    seen = key_position <= query_position
    return seen if window is None else seen & (query_position - key_position < window)


def _on_the_way(query_branches: Tensor, key_branches: Tensor) -> Tensor:
    return (key_branches == 0) | (key_branches == query_branches)


def _bias(
    seen: Tensor,  # [..., queries, keys]
    distance: Tensor,  # [..., queries, keys] key position - query position
    window: int | None,
    slopes: Tensor | None,  # [Hq]
    dtype: torch.dtype,
) -> Bias:
    sees_nothing = None
    if window is not None:
        # Softmax over no key at all is undefined, and back ends differ in what they make of it.
        sees_nothing = ~seen.any(-1)
        seen = seen | sees_nothing[..., None]
    if slopes is None:
        scores = torch.zeros(seen.shape, dtype=dtype, device=seen.device).unsqueeze(-3)
    else:
        scores = slopes.to(dtype)[:, None, None] * distance.to(dtype).unsqueeze(-3)
    return Bias(scores.masked_fill_(~seen.unsqueeze(-3), -torch.inf), sees_nothing, slopes)
