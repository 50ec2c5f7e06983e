"""`pack_layout`: from a padded batch to the index tensors of the packed row."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.ops.registry import AUTO, check_indices, check_same_device, choose_backend, define

MASKED_KEY = 2**31 - 1
POSITIONS = ("slots", "mask", "compact")
IGNORE_INDEX = -100


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
    for name, tensor in (("labels", labels), ("input_ids", input_ids)):
        if tensor is not None and tensor.shape != attention_mask.shape:
            raise ValueError(
                f"{name} must have the shape of attention_mask {list(attention_mask.shape)}, "
                f"got {list(tensor.shape)}"
            )
    for name, tensor in (("labels", labels), ("input_ids", input_ids), ("prompt_of_row", prompt_of_row)):
        if tensor is not None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")
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
    return LayoutTensors(
        *_OP(
            attention_mask,
            labels,
            input_ids,
            prompt_of_row,
            lengths,
            vocab_size,
            positions,
            capacity,
            label_capacity,
            backend,
        )
    )


def _kernel(
    attention_mask: Tensor,
    labels: Tensor | None,
    input_ids: Tensor | None,
    prompt_of_row: Tensor | None,
    prompt_lengths: list[int],
    vocab_size: int,
    positions: str,
    capacity: int,
    label_capacity: int,
    backend: str,
) -> tuple[Tensor, ...]:
    if prompt_of_row is not None:
        check_indices("prompt_of_row", prompt_of_row, len(prompt_lengths))
    chosen = choose_backend("pack_layout", backend, attention_mask.device)
    if chosen == "triton":
        from softprompt.ops.pack_layout.triton import pack_layout as implementation
    elif chosen == "native":
        from softprompt.ops.pack_layout.native import pack_layout as implementation
    else:
        from softprompt.ops.pack_layout.reference import pack_layout as implementation
    return implementation(
        attention_mask,
        labels,
        input_ids,
        prompt_of_row,
        prompt_lengths,
        vocab_size,
        positions,
        capacity,
        label_capacity,
    )


def _fake(
    attention_mask: Tensor,
    labels: Tensor | None,
    input_ids: Tensor | None,
    prompt_of_row: Tensor | None,
    prompt_lengths: list[int],
    vocab_size: int,
    positions: str,
    capacity: int,
    label_capacity: int,
    backend: str,
) -> tuple[Tensor, ...]:
    def empty(size: int) -> Tensor:
        return attention_mask.new_empty(size, dtype=torch.int32)

    row = tuple(empty(capacity) for _ in range(6))
    labels_out = (empty(label_capacity), empty(label_capacity))
    return (*row, empty(attention_mask.shape[0] + 1), *labels_out, empty(5))


_OP = define(
    "pack_layout(Tensor attention_mask, Tensor? labels, Tensor? input_ids, Tensor? prompt_of_row,"
    " int[] prompt_lengths, SymInt vocab_size, str positions, SymInt capacity, SymInt label_capacity,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    fake=_fake,
)
