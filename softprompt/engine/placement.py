"""Where the prompt stands: in front of the texts, or behind the token that all of them begin with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softprompt.engine import model_spec
from softprompt.engine.batch import Batch
from softprompt.engine.model_spec import CausalLM

PLACEMENTS = ("prefix", "after_bos")


def bos_token_id(model: CausalLM) -> int:
    """The token that begins a text of this model, by its configuration.

    Raises:
        ValueError: the configuration names none.
    """
    token = getattr(model_spec.config_of(model), "bos_token_id", None)
    if not isinstance(token, int):
        raise ValueError(
            'placement="after_bos" needs a model whose configuration has a bos_token_id, '
            f'got {token!r}: set model.config.bos_token_id, or use placement="prefix"'
        )
    return token


def after_bos(model: CausalLM, batch: Batch) -> Batch:
    """The batch whose prompts are `[BOS | prompt]` and whose texts have lost their BOS, the first real token.

    The token is the same in all rows and nothing stands before it, so it belongs to what the rows share. What
    follows is the batch of an ordinary prompt of P + 1 rows in front of L - 1 columns: with pads on the left
    `[BOS | prompt | pads | text]`, as PEFT's prompt stands in front of the pads. A label on BOS is dropped,
    since nothing predicts it.

    Args:
        model: the causal LM.
        batch: prompts, texts and labels. On a GPU looking at the first tokens makes the host wait.

    Raises:
        ValueError: a row that does not begin with BOS, or embeddings in place of ids.
    """
    if batch.input_ids is None:
        raise ValueError(
            'placement="after_bos" looks for the BOS token and needs input_ids, not inputs_embeds'
        )
    token = bos_token_id(model)
    first = first_columns(batch.attention_mask)
    check_begins(batch.input_ids, batch.attention_mask, first, token)
    embedding = model.get_input_embeddings()
    begin = embedding(torch.full((1, 1), token, device=batch.input_ids.device))[0]
    return replace(
        batch,
        prompts=tuple(torch.cat([begin.to(prompt.device), prompt]) for prompt in batch.prompts),
        input_ids=without_columns(batch.input_ids, first),
        attention_mask=without_columns(batch.attention_mask, first),
        labels=None if batch.labels is None else without_columns(batch.labels, first),
    )


def first_columns(attention_mask: Tensor) -> Tensor:
    """[B] the column of each row's first real token; 0 in rows that have none."""
    if attention_mask.shape[1] == 0:
        return attention_mask.new_zeros(attention_mask.shape[0], dtype=torch.int64)
    return (attention_mask != 0).int().argmax(1)


def check_begins(input_ids: Tensor, attention_mask: Tensor, first: Tensor, token: int) -> None:
    """Raises ValueError unless the first real token of every row is `token`; one read by the host."""
    if input_ids.shape[1] == 0:
        raise ValueError(
            f'placement="after_bos": every row must begin with the BOS token {token}, got no tokens'
        )
    at = first[:, None]
    found = torch.where(attention_mask.gather(1, at) != 0, input_ids.long().gather(1, at), -1)[:, 0]
    wrong = (found != token).nonzero()[:, 0].tolist()
    if wrong:
        row = wrong[0]
        what = "no token at all" if int(found[row]) == -1 else f"token {int(found[row])}"
        raise ValueError(
            f'placement="after_bos": every row must begin with the BOS token {token}, but row {row} begins '
            f"with {what} ({len(wrong)} of {len(found)} rows): use a tokenizer that adds it, or "
            'placement="prefix"'
        )


def without_columns(tensor: Tensor, first: Tensor) -> Tensor:
    """[B, L - 1, ...] without the column `first` [B] of each row."""
    column = torch.arange(tensor.shape[1] - 1, device=tensor.device)
    index = column + (column >= first[:, None])
    index = index.view(*index.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
    return tensor.gather(1, index)


def bos_first(tensor: Tensor, first: Tensor, num_virtual_tokens: int) -> Tensor:
    """[B, P + L, ...] with what stands at the column `P + first` [B] of each row moved to its front."""
    at = (num_virtual_tokens + first).view(-1, *[1] * (tensor.ndim - 1)).expand(-1, 1, *tensor.shape[2:])
    return torch.cat([tensor.gather(1, at), without_columns(tensor, num_virtual_tokens + first)], 1)


def place_in_generation(
    model: CausalLM, inputs: dict[str, Any], input_ids: Tensor, num_virtual_tokens: int, *, compact: bool
) -> dict[str, Any]:
    """The inputs of one step of PEFT's generate, with the prompt behind BOS.

    Args:
        model: the causal LM.
        inputs: what PEFT hands to the model: the prompt in front, in the mask of every step and in the
            embeddings of the first.
        input_ids: [B, L] tokens so far.
        num_virtual_tokens: P.
        compact: whether pads are left out of the positions; PEFT's generate counts them.

    Raises:
        ValueError: see `after_bos`; pads on the left with `compact`.
    """
    mask = inputs.get("attention_mask")
    text_mask = torch.ones_like(input_ids) if mask is None else mask[:, num_virtual_tokens:]
    first = first_columns(text_mask)
    if inputs.get("inputs_embeds") is not None:
        check_begins(input_ids, text_mask, first, bos_token_id(model))
        if compact and bool((first > 0).any()):
            raise ValueError(
                'placement="after_bos" with positions="compact" generates from texts without pads on the '
                "left: give one row at a time, or rows of one length"
            )
        inputs["inputs_embeds"] = bos_first(inputs["inputs_embeds"], first, num_virtual_tokens)
    if mask is not None:
        inputs["attention_mask"] = bos_first(mask, first, num_virtual_tokens)
    return inputs
