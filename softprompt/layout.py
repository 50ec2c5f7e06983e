"""The packed row: `[prompt_1 | ... | prompt_K | text_1 | ... | text_B | dummies]`, one row for a whole batch.

Attention is causal and the prompt comes first, so its hidden states are the same in every row of a padded
batch: here it stands once, every text sees it, and pads are left out. `PackedLayout` holds the tensors that
say which packed token is what; `build_layout` makes them with one read by the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from softprompt.ops.constants import IGNORE_INDEX
from softprompt.ops.pack_layout import LayoutTensors, pack_layout, prompt_offsets
from softprompt.ops.registry import AUTO
from softprompt.ops.shared_prompt_attention.layout import AttentionLayout

_ROW_TENSORS = ("token_index", "position_ids", "query_position", "key_position", "segments", "prefix_id")
_LABEL_TENSORS = ("label_rows", "label_targets")


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Index tensors of one packed batch (int32), cut to T rows and M label rows, and the sizes the host
    knows.

    See `softprompt.ops.pack_layout.LayoutTensors` for the meaning of the tensors.
    """

    token_index: Tensor  # [T]
    position_ids: Tensor  # [T]
    query_position: Tensor  # [T]
    key_position: Tensor  # [T]
    segments: Tensor  # [T]
    prefix_id: Tensor  # [T]
    cu_prompts: Tensor  # [K + 1]
    cu_texts: Tensor  # [B + 1]
    prompt_of_row: Tensor  # [B]
    label_rows: Tensor  # [M], padded to the label bucket with row 0
    label_targets: Tensor  # [M], padded to the label bucket with -100
    prompt_lengths: tuple[int, ...]
    batch_shape: tuple[int, int]  # B, L
    num_tokens: int | None  # N, predictors included; None, as below: only the device knows
    num_labels: int
    longest_text: int | None
    longest_context: int  # largest prompt + text of one row
    uncut: LayoutTensors | None = None  # the tensors that these are cut from
    branches: Tensor | None = None  # [T] see `branch_out`; None: no text has branches

    @property
    def num_rows(self) -> int:
        """T: prompts, texts and dummies."""
        return self.token_index.shape[0]

    @property
    def prompt_tokens(self) -> int:
        """ΣP: rows of the prompts."""
        return sum(self.prompt_lengths)

    @cached_property
    def attention(self) -> AttentionLayout:
        """The part that the attention needs; back ends keep what they prepare once a step on it."""
        return AttentionLayout(
            self.query_position,
            self.position_ids,
            self.key_position,
            self.segments,
            self.prefix_id,
            self.cu_prompts,
            self.cu_texts,
            self.prompt_of_row,
            self.prompt_lengths,
            self.num_tokens,
            self.longest_text,
            self.branches,
        )

    def resized(self, num_rows: int, num_label_rows: int) -> PackedLayout:
        """The same batch with T = `num_rows` (more or fewer dummies) and M = `num_label_rows`.

        Raises:
            ValueError: tokens or labels do not fit, or the layout was made with less room.
        """
        if self.uncut is None or self.num_tokens is None:
            raise ValueError("this layout does not hold the tensors that it was cut from")
        room, label_room = self.uncut.token_index.shape[0], self.uncut.label_rows.shape[0]
        live = self.prompt_tokens + self.num_tokens
        if not (live <= num_rows <= room and self.num_labels <= num_label_rows <= label_room):
            raise ValueError(
                f"expected {live} to {room} rows and {self.num_labels} to {label_room} label rows, "
                f"got {num_rows} and {num_label_rows}"
            )
        return replace(
            self,
            **{name: getattr(self.uncut, name)[:num_rows] for name in _ROW_TENSORS},
            **{name: getattr(self.uncut, name)[:num_label_rows] for name in _LABEL_TENSORS},
        )

    def prompt_of_label(self) -> Tensor:
        """[M] int64: the prompt that stands in front of each label, dummies left out."""
        segments = self.segments[self.label_rows[: self.num_labels].long()].long()
        count = len(self.prompt_lengths)
        # The first label of a text is predicted by the prompt itself.
        of_text = self.prompt_of_row.long()[(segments - count).clamp_min(0)]
        return torch.where(segments < count, segments, of_text)

    def scatter_rows(self, packed: Tensor) -> Tensor:
        """Puts packed rows back into the padded layout.

        Args:
            packed: [T, H].

        Returns:
            [B, P + L, H] with P the longest prompt: a row's prompt (a shorter prompt stands at its end, next
            to the text), then its columns. Columns that were not packed (pads) are zero. Differentiable.

        Raises:
            ValueError: the host does not know how many tokens there are.
        """
        if self.num_tokens is None:
            raise ValueError("rows can only be put back by a layout whose number of tokens is known")
        num_rows, row_length = self.batch_shape
        longest = max(self.prompt_lengths)
        width = longest + row_length
        source = torch.full((num_rows * width,), -1, dtype=torch.int64, device=packed.device)
        first, last = self.prompt_tokens, self.prompt_tokens + self.num_tokens
        index = self.token_index[first:last].long()
        destination = (index // max(row_length, 1)) * width + longest + index % max(row_length, 1)
        source[destination] = torch.arange(first, last, device=packed.device)
        source = source.view(num_rows, width)
        start = self.cu_prompts.long()[self.prompt_of_row.long()]
        length = self.cu_prompts.long()[self.prompt_of_row.long() + 1] - start
        offset = torch.arange(longest, device=packed.device) - (longest - length)[:, None]
        source[:, :longest] = torch.where(offset >= 0, start[:, None] + offset, -1)
        rows = packed[source.clamp_min(0).reshape(-1)]
        return rows.masked_fill((source < 0).reshape(-1, 1), 0).view(num_rows, width, packed.shape[1])

    def latest_rows(self) -> Tensor:
        """[B, 1 + L] int64: the packed row of the prompt's end, then of each column. A column that was not
        packed (a pad) has that of the last one before it.

        Raises:
            ValueError: the host does not know how many tokens there are.
        """
        if self.num_tokens is None:
            raise ValueError("columns can only be found by a layout whose number of tokens is known")
        num_rows, row_length = self.batch_shape
        first, last = self.prompt_tokens, self.prompt_tokens + self.num_tokens
        device = self.token_index.device
        rows = torch.full((num_rows * row_length,), -1, dtype=torch.int64, device=device)
        rows[self.token_index[first:last].long()] = torch.arange(first, last, device=device)
        ends = self.cu_prompts.long()[self.prompt_of_row.long() + 1] - 1
        return torch.cat([ends[:, None], rows.view(num_rows, row_length)], 1).cummax(1).values


def round_up(count: int, bucket: int) -> int:
    """The smallest multiple of `bucket` that is not less than `count`."""
    return -(-count // bucket) * bucket


def build_layout(
    attention_mask: Tensor,  # [B, L]
    prompt_lengths: Sequence[int],
    *,
    labels: Tensor | None = None,  # [B, L]
    input_ids: Tensor | None = None,  # [B, L]
    prompt_of_row: Tensor | None = None,  # [B]
    vocab_size: int = 2**31 - 1,
    positions: str = "slots",
    token_bucket: int = 1,
    label_bucket: int = 1,
    capacity: int | None = None,
    label_capacity: int | None = None,
    backend: str = AUTO,
) -> PackedLayout:
    """Packs a padded batch: one op, one read of its counts by the host, no other synchronisation.

    Args:
        attention_mask: see `pack_layout`; so are labels, input_ids, prompt_of_row, vocab_size and backend.
        prompt_lengths: P_k of the prompts.
        labels: [B, L].
        input_ids: [B, L].
        prompt_of_row: [B].
        vocab_size: V.
        positions: "slots", "mask" or "compact".
        token_bucket: T is rounded up to a multiple of this with dummy tokens that see only themselves.
        label_bucket: M is rounded up to a multiple of this with rows whose target is -100.
        capacity: room for `PackedLayout.resized` beyond ΣP + B*L rows.
        label_capacity: room for `PackedLayout.resized` beyond B*L label rows.
        backend: of `pack_layout`.

    Raises:
        IndexError: an id or a label outside the vocabulary; names its row, column and value.
        ValueError: see `pack_layout`.
    """
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be [B, L], got shape {list(attention_mask.shape)}")
    if token_bucket < 1 or label_bucket < 1:
        raise ValueError(f"buckets must be at least 1, got {token_bucket} and {label_bucket}")
    num_rows, row_length = attention_mask.shape
    prompt_tokens = sum(prompt_lengths)
    if prompt_of_row is None:
        prompt_of_row = torch.zeros(num_rows, dtype=torch.int32, device=attention_mask.device)
    tensors = pack_layout(
        attention_mask,
        prompt_lengths,
        labels=labels,
        input_ids=input_ids,
        prompt_of_row=prompt_of_row,
        vocab_size=vocab_size,
        positions=positions,
        capacity=max(round_up(prompt_tokens + num_rows * row_length, token_bucket), capacity or 0),
        label_capacity=max(round_up(num_rows * row_length, label_bucket), label_capacity or 0),
        backend=backend,
    )
    num_tokens, num_labels, out_of_range, longest_text, longest_context = read_counts(tensors)
    if out_of_range:
        raise_out_of_range(input_ids, labels, vocab_size)
    total = round_up(prompt_tokens + num_tokens, token_bucket)
    labelled = round_up(num_labels, label_bucket)
    return PackedLayout(
        token_index=tensors.token_index[:total],
        position_ids=tensors.position_ids[:total],
        query_position=tensors.query_position[:total],
        key_position=tensors.key_position[:total],
        segments=tensors.segments[:total],
        prefix_id=tensors.prefix_id[:total],
        cu_prompts=prompt_offsets(tuple(prompt_lengths), attention_mask.device),
        cu_texts=tensors.cu_texts,
        prompt_of_row=prompt_of_row.int(),
        label_rows=tensors.label_rows[:labelled],
        label_targets=tensors.label_targets[:labelled],
        prompt_lengths=tuple(int(length) for length in prompt_lengths),
        batch_shape=(num_rows, row_length),
        num_tokens=num_tokens,
        num_labels=num_labels,
        longest_text=longest_text,
        longest_context=longest_context,
        uncut=tensors,
    )


def branch_out(
    layout: PackedLayout,
    attention_mask: Tensor,  # [B, L]
    branch_of_column: Tensor,  # [E]
    place_in_branch: Tensor,  # [E]
    positions: str,
) -> PackedLayout:
    """Makes the last E columns of every row branches of its text: each goes on from the text alone.

    A branch's token sees the prompt, its text, and its branch up to itself; its position follows the text's
    end as if its branch were the only one.

    Args:
        layout: of the batch [B, L + E] whose last E columns are all real tokens; without dummies or labels.
        attention_mask: [B, L] of the texts alone.
        branch_of_column: [E] int32, 1 .. C, the branch that each of the last columns belongs to.
        place_in_branch: [E] int32, the column's place in its branch, from 0.
        positions: what the layout was built with.
    """
    length = attention_mask.shape[1]
    width = length + branch_of_column.shape[0]
    if width == length:
        return layout
    device = attention_mask.device
    index = layout.token_index
    entry = index % width - length
    in_branch = (index >= 0) & (entry >= 0)
    entry = entry.clamp_min(0).long()
    # What the packed row counts from the text's end to this token, and what the branch alone would count.
    excess = entry - place_in_branch[entry]
    ends = (attention_mask != 0) * torch.arange(1, length + 1, device=device)
    ends = torch.cat([torch.zeros_like(ends[:, :1]), ends], 1).amax(1) if length else ends.sum(1)
    pads = (length - ends)[(index // width).clamp_min(0).long()]
    slot_excess = excess if positions == "compact" else excess + pads
    position_excess = excess + pads if positions == "slots" else excess

    def less(values: Tensor, excess: Tensor) -> Tensor:
        return values - torch.where(in_branch, excess, 0).int()

    return replace(
        layout,
        position_ids=less(layout.position_ids, position_excess),
        query_position=less(layout.query_position, slot_excess),
        key_position=less(layout.key_position, slot_excess),
        branches=torch.where(in_branch, branch_of_column[entry], 0).int(),
        uncut=None,
    )


def read_counts(tensors: LayoutTensors) -> list[int]:
    """The one read by the host."""
    counts: list[int] = tensors.counts.tolist()
    return counts


def raise_out_of_range(
    input_ids: Tensor | None, labels: Tensor | None, vocab_size: int, *, name_of_ids: str = "input_ids"
) -> None:
    """Finds the first id or label outside the vocabulary and raises the IndexError that names it."""
    for name, tensor in ((name_of_ids, input_ids), ("labels", labels)):
        if tensor is None:
            continue
        tensor = tensor.long()
        wrong = (tensor < 0) | (tensor >= vocab_size)
        if name == "labels":
            wrong &= tensor != IGNORE_INDEX
        found = wrong.nonzero()
        if found.numel():
            row, column = found[0].tolist()
            raise IndexError(
                f"{name}[{row}, {column}] = {int(tensor[row, column])} is outside the vocabulary 0 .. "
                f"{vocab_size - 1} ({found.shape[0]} such value{'s' if found.shape[0] > 1 else ''})"
            )
