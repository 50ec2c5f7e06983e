"""The padded forward, for models whose rows cannot share one row: fused prepend, and the head on label
rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softprompt.engine import model_spec
from softprompt.engine.batch import Batch, prompts_of_rows
from softprompt.engine.model_spec import CausalLM, DecoderFacts
from softprompt.engine.packed import DecoderOutput, check_length
from softprompt.layout import raise_out_of_range
from softprompt.ops.constants import IGNORE_INDEX
from softprompt.ops.prepend_prompt import prepend_prompt
from softprompt.ops.registry import AUTO


def padded_rows(
    model: CausalLM,
    batch: Batch,
    facts: DecoderFacts,
    *,
    position_limit: int | None,
    backend: str = AUTO,
) -> DecoderOutput:
    """Runs the decoder over `[prompt | text]` rows, with the positions and the mask that PEFT gives them.

    Args:
        model: the causal LM.
        batch: prompts (all of one length), texts and labels.
        facts: of the model as it is now.
        position_limit: length of the model's position table, None where there is none.
        backend: of the ops.

    Raises:
        IndexError: an id or a label outside the vocabulary.
        ValueError: prompts of different lengths; prompt and text are longer than the position table.
    """
    check_length(batch, "slots", position_limit)
    if len(set(batch.prompt_lengths)) > 1:
        raise ValueError(
            f"{model_spec.config_of(model).model_type} takes the padded route, where all prompts of a batch "
            f"must have one length; got {list(batch.prompt_lengths)}"
        )
    embedding, vocabulary = model.get_input_embeddings(), facts.vocab_size
    num_rows, row_length = batch.shape
    length = batch.prompt_lengths[0]
    readable = batch.input_ids is not None and facts.reads_embedding
    if readable and batch.input_ids is not None:
        prepended = prepend_prompt(
            embedding.weight,
            batch.input_ids,
            batch.joined_prompts(embedding.weight.device),
            batch.prompt_lengths,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            prompt_of_row=batch.prompt_of_row,
            backend=backend,
        )
        embeds, mask, labels = prepended.inputs_embeds, prepended.attention_mask, prepended.labels
        num_labels, *out_of_range = prepended.counts.tolist()
    else:
        # Before the embedding is called: on a GPU a wrong id would end the process.
        num_labels, *out_of_range = _counts(batch, vocabulary).tolist()
    if any(out_of_range):
        raise_out_of_range(batch.input_ids, batch.labels, vocabulary)
    if not readable:
        embeds, mask, labels = _prepend(embedding, batch)
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    targets = targets.view(-1)
    rows = torch.nonzero_static(targets != IGNORE_INDEX, size=num_labels)[:, 0]
    output = model_spec.body_of(model)(
        inputs_embeds=embeds, attention_mask=mask, use_cache=False, return_dict=True
    )
    shape = (num_rows, length + row_length)
    hidden = output.last_hidden_state.reshape(shape[0] * shape[1], -1)
    return DecoderOutput(
        hidden, rows, targets[rows], num_labels, None, shape, type(output), batch.prompt_of_row
    )


def _counts(batch: Batch, vocab_size: int) -> Tensor:
    """[3]: labels, ids out of range, labels out of range, as `prepend_prompt` counts them."""
    none = torch.zeros((), dtype=torch.int64, device=batch.attention_mask.device)
    counts = [none, none, none]
    if batch.input_ids is not None:
        counts[1] = ((batch.input_ids < 0) | (batch.input_ids >= vocab_size)).sum()
    if batch.labels is not None:
        labelled = batch.labels != IGNORE_INDEX
        counts[0] = labelled.sum()
        counts[2] = (labelled & ((batch.labels < 0) | (batch.labels >= vocab_size))).sum()
    return torch.stack(counts)


def _prepend(embedding: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, row_length = batch.shape
    length = batch.prompt_lengths[0]
    embeds = embedding(batch.input_ids) if batch.inputs_embeds is None else batch.inputs_embeds
    embeds = torch.cat([prompts_of_rows(batch.prompts, batch, embeds), embeds], 1)
    ones = torch.ones(num_rows, length, device=batch.attention_mask.device)
    mask = torch.cat([ones, batch.attention_mask.float()], 1)
    labels = torch.full((num_rows, length + row_length), IGNORE_INDEX, device=embeds.device)
    if batch.labels is not None:
        labels[:, length:] = batch.labels
    return embeds, mask, labels
