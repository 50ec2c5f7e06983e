"""Logits of the texts alone: [B, L, V], without the columns of the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt.engine.packed import DecoderOutput
from softprompt.ops.constants import IGNORE_INDEX

LOGITS = ("full", "text", "labels")


def text_rows(rows: DecoderOutput, hidden: Tensor, which: str, columns: int) -> Tensor:
    """Rows like `hidden` for the columns of the texts.

    What was not computed (a pad) is answered by the last row before it that was: every label finds the row
    that predicts it in the loss.

    Args:
        rows: what the decoder made of the batch.
        hidden: [T, H].
        which: "text": column c is the row of column c; "labels": it is the row that predicts the label of c.
        columns: L. One more than the batch has where the first token of its texts is in the prompt.

    Returns:
        [B, L, H].
    """
    if rows.layout is not None:
        latest = hidden[rows.layout.latest_rows().reshape(-1)]
        latest = latest.view(rows.padded_shape[0], -1, hidden.shape[1])
    else:
        latest = rows.padded(hidden)
    text = latest[:, latest.shape[1] - columns :]
    if which == "text":
        return text
    before = latest[:, : latest.shape[1] - columns][:, -1:]
    # Texts may have no columns at all.
    return torch.cat([before if before.shape[1] else text[:, :1], text[:, :-1]], 1)[:, :columns]


def starts_behind_pads(attention_mask: Tensor) -> Tensor:
    """[B, L] int64 in place of labels: 0 at tokens whose column before is a pad, which a packed row computes
    only where it predicts a label; -100 elsewhere.
    """
    real = attention_mask != 0
    starts = torch.zeros_like(real)
    starts[:, 1:] = real[:, 1:] & ~real[:, :-1]
    return torch.where(starts, 0, IGNORE_INDEX)


def trimmed(output: Any, which: str, num_virtual_tokens: int, columns: int) -> Any:
    """An output of PEFT's forward with the logits that `which` asks for.

    Args:
        output: with logits [B, P + L, V]; logits of another length are left alone.
        which: see `text_rows`; "full" leaves everything alone.
        num_virtual_tokens: P.
        columns: L.
    """
    if which == "full":
        return output
    first = num_virtual_tokens - (which == "labels")

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == num_virtual_tokens + columns:
            return value[:, first : first + columns]
        return value

    if isinstance(output, tuple):
        place = next((n for n, value in enumerate(output) if isinstance(value, Tensor) and value.ndim), None)
        return tuple(cut(value) if number == place else value for number, value in enumerate(output))
    if getattr(output, "logits", None) is not None:
        output.logits = cut(output.logits)
    return output
