"""`pack_layout`: from a padded batch to the index tensors of the packed row, on the device in one op.

Compiled in csrc/cpu/pack_layout.cpp and csrc/cuda/pack_layout.cu, in Triton in `triton_layout.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.ops.checks import check_indices, check_integers, check_same_device, check_shape_of
from softprompt.ops.constants import IGNORE_INDEX, MASKED_KEY
from softprompt.ops.registry import AUTO, Backends, declare, define_filled

__all__ = ["MASKED_KEY", "LayoutTensors", "pack_layout", "prompt_offsets"]

POSITIONS = ("slots", "mask", "compact")


@functools.lru_cache(maxsize=256)
def prompt_offsets(prompt_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[K + 1] int32: the first row of each prompt, and the first text row.

    Made once, since a copy from the host makes it wait for the device.
    """
    with torch.inference_mode(False):  # what is made inside could not be used in a training step
        return torch.tensor([0, *itertools.accumulate(prompt_lengths)], dtype=torch.int32, device=device)


class LayoutTensors(NamedTuple):
    """What `pack_layout` writes. All int32, on the device of the attention mask.

    The row is `[prompt_0 | ... | prompt_K-1 | text_1 | ... | text_B | dummy ...]`; C is its capacity. A token
    q sees a token k where `(segments[k] == segments[q] or segments[k] == prefix_id[q]) and key_position[k] <=
    query_position[q]`.
    """

    token_index: Tensor  # [C] index into the flattened [B, L] batch; -1 for prompt and dummy tokens
    position_ids: Tensor  # [C] what the model is told
    query_position: (
        Tensor  # [C] column in the padded [prompt | text] layout: causality and windows count these
    )
    key_position: Tensor  # [C] the slot, or MASKED_KEY for a pad that only predicts
    segments: Tensor  # [C] prompt k: k; text b: K + b; dummy: a number of its own
    prefix_id: (
        Tensor  # [C] the segment seen besides the own one: the prompt's of a text, the own one elsewhere
    )
    cu_texts: Tensor  # [B + 1] first row of each text, and the first dummy
    label_rows: Tensor  # [R] row whose logits predict a label; 0 beyond the number of labels
    label_targets: Tensor  # [R] that label; -100 beyond the number of labels
    counts: Tensor  # [5] text tokens N, labels M, ids and labels out of range, longest text, longest context


class Batch(NamedTuple):
    """The padded batch."""

    attention_mask: Tensor  # [B, L]
    labels: Tensor | None  # [B, L]
    input_ids: Tensor | None  # [B, L]
    prompt_of_row: Tensor | None  # [B]


class Packing(NamedTuple):
    """How it is packed."""

    vocab_size: int
    positions: str
    capacity: int
    label_capacity: int


def pack_layout(
    attention_mask: Tensor,  # [B, L]
    prompt_lengths: Sequence[int],  # [K]
    *,
    labels: Tensor | None = None,  # [B, L]
    input_ids: Tensor | None = None,  # [B, L]
    prompt_of_row: Tensor | None = None,  # [B]
    vocab_size: int = 2**31 - 1,
    positions: str = "slots",
    capacity: int | None = None,
    label_capacity: int | None = None,
    backend: str = AUTO,
) -> LayoutTensors:
    """Builds the index tensors of the packed row.

    A column of the batch becomes a packed token where its mask is not 0, and also where it is a pad that
    predicts the label of the next column ("predictor": it sees the prompt and the earlier tokens of its text
    and is seen by no token). The label of column c is predicted by column c - 1, that of column 0 by the last
    row of the prompt. With `positions="compact"` pads do not exist: no predictors, a label is predicted by
    the previous real token of its row (or the prompt), and labels on pads are dropped.

    Args:
        attention_mask: [B, L], any integer, bool or float dtype; not 0 = a real token.
        prompt_lengths: P_k of the K prompts in front of the row, each at least 1.
        labels: [B, L] integers, -100 = no label.
        input_ids: [B, L] integers; only compared with `vocab_size`, and counted.
        prompt_of_row: [B] integers in 0 .. K-1: the prompt that a text sees. None: prompt 0.
        vocab_size: V; ids and labels outside 0 .. V-1 are counted.
        positions: position_ids of texts. "slots": the column in the padded layout (pads count); "mask": the
            rank among the real tokens (pads do not count; a predictor gets -1), query_position still counts
            pads; "compact": the rank, for position_ids and query_position.
        capacity: C >= ΣP + B*L, size of the row's tensors (default ΣP + B*L); the rest are dummy tokens.
        label_capacity: R >= B*L (default B*L).
        backend: "auto", "reference", "triton" or "native".

    Returns:
        LayoutTensors; `counts` is the only thing that a host has to read.

    Raises:
        ValueError: shapes, dtypes, capacities or option values that do not fit.
        IndexError: on a CPU, a prompt_of_row outside 0 .. K-1.
    """
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be [B, L], got shape {list(attention_mask.shape)}")
    num_rows, row_length = attention_mask.shape
    check_shape_of("attention_mask", attention_mask.shape, labels=labels, input_ids=input_ids)
    check_integers(labels=labels, input_ids=input_ids, prompt_of_row=prompt_of_row)
    lengths = [int(length) for length in prompt_lengths]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"prompt_lengths must hold at least one length, each at least 1, got {lengths}")
    if prompt_of_row is not None and prompt_of_row.shape != (num_rows,):
        raise ValueError(f"prompt_of_row must be [{num_rows}], got shape {list(prompt_of_row.shape)}")
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    smallest = sum(lengths) + num_rows * row_length
    capacity = smallest if capacity is None else capacity
    label_capacity = num_rows * row_length if label_capacity is None else label_capacity
    if capacity < smallest:
        raise ValueError(f"capacity must be at least {smallest} (prompts plus B*L), got {capacity}")
    if label_capacity < num_rows * row_length:
        raise ValueError(
            f"label_capacity must be at least B*L = {num_rows * row_length}, got {label_capacity}"
        )
    check_same_device(
        "pack_layout",
        attention_mask=attention_mask,
        labels=labels,
        input_ids=input_ids,
        prompt_of_row=prompt_of_row,
    )
    batch = Batch(attention_mask, labels, input_ids, prompt_of_row)
    return LayoutTensors(*_OP(*batch, lengths, vocab_size, positions, capacity, label_capacity, backend))


def reference(batch: Batch, prompt_lengths: list[int], packing: Packing) -> LayoutTensors:
    """The op in plain PyTorch: the specification, and the back end where there is no kernel."""
    attention_mask, labels, input_ids, prompt_of_row = batch
    device = attention_mask.device
    num_rows, row_length = attention_mask.shape
    num_prompts, prompt_tokens = len(prompt_lengths), sum(prompt_lengths)
    compact = packing.positions == "compact"
    # Compared in their own dtype, the uint8 label 156 would be the ignore index.
    labels = None if labels is None else labels.long()
    input_ids = None if input_ids is None else input_ids.long()

    real = attention_mask != 0
    has_label = torch.zeros_like(real) if labels is None else labels != IGNORE_INDEX
    if compact:
        has_label = has_label & real
        packed = real
    else:
        packed = real.clone()
        packed[:, :-1] |= has_label[:, 1:]

    lengths = torch.tensor(prompt_lengths, device=device)
    prompt_end = lengths.cumsum(0)
    if prompt_of_row is None:
        prompt_of_row = torch.zeros(num_rows, dtype=torch.int64, device=device)
    prompt_of_row = prompt_of_row.long()
    prefix = lengths[prompt_of_row][:, None]  # [B, 1]

    column = torch.arange(row_length, device=device).expand(num_rows, row_length)
    rank = real.cumsum(1) - 1
    slot = prefix + (rank if compact else column)
    if packing.positions == "mask":
        position = torch.where(real, prefix + rank, -1)
    else:
        position = slot
    key_slot = torch.where(real, slot, MASKED_KEY)
    row_number = torch.arange(num_rows, device=device)[:, None].expand(num_rows, row_length)

    # Columns that are not packed are scattered to a row behind the last one, which is cut off.
    order = (packed.reshape(-1).cumsum(0) - 1).view(num_rows, row_length) + prompt_tokens
    destination = torch.where(packed, order, packing.capacity).reshape(-1)

    def row_tensor(prompt_values: Tensor, text_values: Tensor, dummy_values: Tensor | int) -> Tensor:
        out = torch.empty(packing.capacity + 1, dtype=torch.int32, device=device)
        out[:] = dummy_values
        out[:prompt_tokens] = prompt_values
        out[destination] = text_values.reshape(-1).int()
        return out[: packing.capacity]

    prompt_number = torch.arange(num_prompts, device=device).repeat_interleave(
        lengths, output_size=prompt_tokens
    )
    within_prompt = torch.arange(prompt_tokens, device=device) - (prompt_end - lengths)[prompt_number]
    no_token = torch.full_like(within_prompt, -1)
    dummy_segment = num_prompts + num_rows + torch.arange(packing.capacity + 1, device=device)

    token_index = row_tensor(no_token, row_number * row_length + column, -1)
    position_ids = row_tensor(within_prompt, position, 0)
    query_position = row_tensor(within_prompt, slot, 0)
    key_position = row_tensor(within_prompt, key_slot, 0)
    segments = row_tensor(prompt_number, num_prompts + row_number, dummy_segment)
    prefix_id = row_tensor(prompt_number, prompt_of_row[:, None].expand_as(column), dummy_segment)

    text_lengths = packed.sum(1)
    cu_texts = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    torch.cumsum(text_lengths, 0, out=cu_texts[1:])
    cu_texts += prompt_tokens

    # The packed row of the previous token: the running maximum of the packed columns before this one.
    last_of_prompt = (prompt_end[prompt_of_row] - 1)[:, None]
    previous = torch.cat([last_of_prompt, torch.where(packed, order, -1)[:, :-1]], 1).cummax(1).values
    previous = torch.maximum(previous[:, :row_length], last_of_prompt)
    label_order = (has_label.reshape(-1).cumsum(0) - 1).view(num_rows, row_length)
    label_destination = torch.where(has_label, label_order, packing.label_capacity).reshape(-1)
    label_rows = torch.zeros(packing.label_capacity + 1, dtype=torch.int32, device=device)
    label_rows[label_destination] = previous.reshape(-1).int()
    label_targets = torch.full((packing.label_capacity + 1,), IGNORE_INDEX, dtype=torch.int32, device=device)
    if labels is not None:
        label_targets[label_destination] = labels.reshape(-1).int()

    out_of_range = torch.zeros((), dtype=torch.int64, device=device)
    for values in (input_ids, labels):
        if values is not None:
            wrong = (values < 0) | (values >= packing.vocab_size)
            out_of_range += (wrong & (labels != IGNORE_INDEX) if values is labels else wrong).sum()
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    counts = torch.stack(
        [
            text_lengths.sum(),
            has_label.sum(),
            out_of_range,
            torch.cat([text_lengths, zero]).max(),
            torch.cat([text_lengths + prefix[:, 0], zero]).max(),
        ]
    )
    return LayoutTensors(
        token_index,
        position_ids,
        query_position,
        key_position,
        segments,
        prefix_id,
        cu_texts.int(),
        label_rows[: packing.label_capacity],
        label_targets[: packing.label_capacity],
        counts.int(),
    )


def _allocate(batch: Batch, prompt_lengths: list[int], packing: Packing) -> LayoutTensors:
    row, labels = packing.capacity, packing.label_capacity
    sizes = (*[row] * 6, batch.attention_mask.shape[0] + 1, labels, labels, 5)
    return LayoutTensors(*(batch.attention_mask.new_empty(size, dtype=torch.int32) for size in sizes))


def _check(batch: Batch, prompt_lengths: list[int], packing: Packing) -> None:
    if batch.prompt_of_row is not None:
        check_indices("prompt_of_row", batch.prompt_of_row, len(prompt_lengths))


def _native(batch: Batch, prompt_lengths: list[int], packing: Packing, *out: Tensor) -> None:
    offsets = prompt_offsets(tuple(prompt_lengths), batch.attention_mask.device)
    positions = packing.positions
    _NATIVE(*batch, offsets, packing.vocab_size, positions == "compact", positions == "slots", *out)


_NATIVE = declare(
    "native_pack_layout(Tensor attention_mask, Tensor? labels, Tensor? input_ids, Tensor? prompt_of_row,"
    " Tensor cu_prompts, int vocab_size, bool compact, bool by_slot, Tensor(a!) token_index,"
    " Tensor(b!) position_ids, Tensor(c!) query_position, Tensor(d!) key_position, Tensor(e!) segments,"
    " Tensor(f!) prefix_id, Tensor(g!) cu_texts, Tensor(h!) label_rows, Tensor(i!) label_targets,"
    " Tensor(j!) counts) -> ()"
)
_OP = define_filled(
    "pack_layout",
    Backends("pack_layout", reference, native=_native, triton="softprompt.ops.triton_layout:pack_layout"),
    _allocate,
    check=_check,
)
