"""The padded forward of an encoder-decoder: prompts on the encoder's inputs, the head on the decoder's label
rows.

The encoder sees a row's prompt and text both ways, so the rows cannot share their prompt. What can go are the
columns at the end that no row uses, in the encoder and in the decoder, and all of the head but the rows that
predict a label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softprompt.engine import families
from softprompt.engine.batch import Batch, check_tensor, holds_integers
from softprompt.engine.families import CausalLM
from softprompt.engine.overrides import IN_USE, override
from softprompt.engine.packed import raise_too_long
from softprompt.layout import IGNORE_INDEX, raise_out_of_range
from softprompt.ops.prepend_prompt import prepend_prompt
from softprompt.ops.registry import AUTO


@dataclass(frozen=True, eq=False)
class DecoderInputs:
    """What the decoder reads and is scored on. Labels alone are shifted to the decoder's ids."""

    labels: Tensor | None = None  # [B, T]
    input_ids: Tensor | None = None  # [B, T]
    inputs_embeds: Tensor | None = None  # [B, T, H]
    attention_mask: Tensor | None = None  # [B, T]
    prompts: tuple[Tensor, ...] | None = None  # K of [P, H], in front of the decoder's inputs


@dataclass(frozen=True, eq=False)
class DecodedRows:
    """What the decoder made of a batch, before any logit."""

    hidden: Tensor  # [B * C, H] hidden states as the decoder gives them
    label_rows: Tensor  # [M]
    label_targets: Tensor  # [M]
    num_labels: int
    shape: tuple[int, int]  # B, C
    length: int  # T, with the columns behind C, which no label needs
    rest: Callable[[Tensor], Tensor] | None  # their logits, from the encoder's hidden states
    encoded: Any  # the encoder's output
    columns: int  # of the encoder's inputs, before those that no row uses were dropped
    output_class: type  # of the decoder


def check_decoder_inputs(
    num_rows: int,
    hidden_size: int,
    *,
    labels: Tensor | None,
    decoder_input_ids: Tensor | None,
    decoder_inputs_embeds: Tensor | None,
    decoder_attention_mask: Tensor | None,
    prompts: tuple[Tensor, ...] | None = None,
) -> DecoderInputs:
    """Turns the decoder's arguments of a forward into DecoderInputs.

    Raises:
        ValueError: says what was given and what is expected.
    """
    shape: list[int] | None = None
    if decoder_input_ids is not None and decoder_inputs_embeds is not None:
        raise ValueError("expected decoder_input_ids or decoder_inputs_embeds, got both")
    for name, value in (
        ("labels", labels),
        ("decoder_input_ids", decoder_input_ids),
        ("decoder_inputs_embeds", decoder_inputs_embeds),
        ("decoder_attention_mask", decoder_attention_mask),
    ):
        if value is None:
            continue
        check_tensor(name, value)
        given, end = list(value.shape), [hidden_size] if name == "decoder_inputs_embeds" else []
        expected = [num_rows, *(["T"] if shape is None else shape[1:]), *end]
        fits = len(given) == len(expected) and given[0] == num_rows and given[2:] == end
        if not fits or (shape is not None and given[:2] != shape) or given[1] == 0:
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"{name} must be [{wanted}] for {num_rows} rows of text, got {given}")
        if name in ("labels", "decoder_input_ids") and not holds_integers(value):
            raise ValueError(f"{name} must be integers, got {value.dtype}")
        if name == "decoder_inputs_embeds" and not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {value.dtype}")
        shape = given[:2]
    if labels is None and decoder_input_ids is None and decoder_inputs_embeds is None:
        raise ValueError(
            "an encoder-decoder needs labels, decoder_input_ids or decoder_inputs_embeds; got none of them"
        )
    return DecoderInputs(labels, decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, prompts)


def decoded_rows(
    model: CausalLM,
    batch: Batch,
    answers: DecoderInputs,
    embedding: nn.Module,
    *,
    trims: bool,
    ends_early: bool,
    position_limit: int | None,
    vocab_size: int,
    masked: bool = True,
    use_cache: bool | None = False,
    skips_head: bool = True,
    backend: str = AUTO,
) -> DecodedRows:
    """Runs encoder and decoder through the model's own forward, and its head over next to nothing.

    Args:
        model: the encoder-decoder.
        batch: prompts, of any lengths, and texts.
        answers: what the decoder reads, and its labels.
        embedding: makes the texts' embeddings.
        trims: drop the columns at the end of the texts that no row uses.
        ends_early: leave out the decoder's columns behind the last label, where the call allows it.
        position_limit: length of the model's position table, None where there is none.
        vocab_size: V of the head.
        masked: whether the texts have a mask at all.
        use_cache: as in the model's forward; the cache is dropped.
        skips_head: give the head no row; else one column.
        backend: of the ops.

    Raises:
        IndexError: an id or a label outside the vocabulary.
        ValueError: prompt and text are longer than the position table.
    """
    num_embeddings = int(getattr(embedding, "num_embeddings", 0)) or vocab_size
    counts = _counts(batch, answers, num_embeddings, vocab_size).tolist()
    num_labels, used, answered = counts[:3]
    if any(counts[3:]):
        raise_out_of_range(batch.input_ids, None, num_embeddings)
        raise_out_of_range(None, answers.labels, vocab_size)
        raise_out_of_range(answers.input_ids, None, vocab_size, name_of_ids="decoder_input_ids")
    longest = max(batch.prompt_lengths)
    columns = longest + batch.shape[1]
    if trims:
        batch = _first_columns(_embedded(embedding, batch), max(used, 1))
    embeds, mask = prompted_texts(embedding, batch, backend)
    labels, decoder = _decoder_inputs(model, batch, answers, embedding)
    num_rows, length = next(value for value in decoder.values() if value is not None).shape[:2]
    _check_positions(position_limit, embeds.shape[1], length)
    seen = max(answered, 1) if ends_early and _may_end_early(model, answers) else length
    asked = {
        "attention_mask": mask if masked or len(set(batch.prompt_lengths)) > 1 else None,
        "use_cache": use_cache,
        "return_dict": True,
    }
    watch = _Watch(0 if skips_head else 1)
    with watch.on(model.get_encoder(), watch.encoder), watch.on(model.get_decoder(), watch.decoder):
        first = {name: None if value is None else value[:, :seen] for name, value in decoder.items()}
        model(inputs_embeds=embeds, **asked, **first)
    if watch.hidden is None or watch.encoded is None:
        raise RuntimeError(f"{type(model).__name__} does not call the encoder and the decoder that it names")
    hidden = watch.hidden.reshape(num_rows * seen, -1)
    rows = targets = torch.empty(0, dtype=torch.int64, device=hidden.device)
    if labels is not None:
        flat = labels[:, :seen].reshape(-1).to(hidden.device)
        rows = torch.nonzero_static(flat != IGNORE_INDEX, size=num_labels)[:, 0]
        targets = flat[rows].long()
    encoded = watch.encoded

    def rest(states: Tensor) -> Tensor:
        with IN_USE:
            output = model(encoder_outputs=type(encoded)(last_hidden_state=states), **asked, **decoder)
        logits: Tensor = output.logits[:, seen:]
        return logits

    return DecodedRows(
        hidden,
        rows,
        targets,
        num_labels,
        (num_rows, seen),
        length,
        rest if seen < length else None,
        encoded,
        columns,
        watch.output_class,
    )


def _may_end_early(model: CausalLM, answers: DecoderInputs) -> bool:
    """Whether the decoder may leave out the columns at the end that no label needs.

    It is causal, so they change nothing; but where a mask hides all that a column sees, it sees all columns.
    Their logits are computed when they are looked at: from the encoder's hidden states alone, and by weights
    that are then as now.
    """
    given = (answers.inputs_embeds, answers.attention_mask, answers.prompts)
    if answers.labels is None or any(value is not None for value in given):
        return False
    return not trains_decoder(model)


def trains_decoder(model: CausalLM) -> bool:
    """Whether weights of the decoder get a gradient."""
    return any(parameter.requires_grad for parameter in model.get_decoder().parameters())


class _Watch:
    """Keeps what encoder and decoder of one call give, and hands on the decoder's first columns alone."""

    def __init__(self, columns: int) -> None:
        self.encoded: Any = None
        self.hidden: Tensor | None = None
        self.output_class: type = object
        self._columns = columns

    @contextlib.contextmanager
    def on(self, part: nn.Module, keep: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
        """In the block `keep` gets what a part of the model gives, behind the hooks of others."""
        forward = part.forward

        def with_names(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **(kwargs | {"return_dict": True}))

        with override(part, forward=with_names):
            handle = part.register_forward_hook(keep)
            try:
                yield
            finally:
                handle.remove()

    def encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        self.encoded = output

    def decoder(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.hidden, self.output_class = output.last_hidden_state, type(output)
        return type(output)(last_hidden_state=self.hidden.detach()[:, : self._columns])


def shifted(model: CausalLM, labels: Tensor, *, as_bart: bool = False) -> Tensor:
    """[B, T] what the decoder reads for labels: they, one column later, behind the start token.

    Args:
        model: the encoder-decoder.
        labels: [B, T].
        as_bart: whatever the model has of its own for that.
    """
    own = None if as_bart else getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        ids: Tensor = own(labels)
        return ids
    config = model.config
    start = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
    ids = torch.cat([start, labels[:, :-1]], 1)
    return ids.masked_fill(ids == IGNORE_INDEX, config.pad_token_id)


def _counts(batch: Batch, answers: DecoderInputs, num_embeddings: int, vocab_size: int) -> Tensor:
    """[6]: labels; columns up to the last that a row uses, and up to the last label; ids, labels and decoder
    ids out of range.
    """
    device = batch.attention_mask.device
    none = torch.zeros((), dtype=torch.int64, device=device)
    counts = [none, _last_column(batch.attention_mask != 0), none, none, none, none]
    if batch.input_ids is not None:
        counts[3] = ((batch.input_ids < 0) | (batch.input_ids >= num_embeddings)).sum()
    if answers.labels is not None:
        labels = answers.labels.to(device)
        labelled = labels != IGNORE_INDEX
        counts[0], counts[2] = labelled.sum(), _last_column(labelled)
        counts[4] = (labelled & ((labels < 0) | (labels >= vocab_size))).sum()
    if answers.input_ids is not None:
        ids = answers.input_ids.to(device)
        counts[5] = ((ids < 0) | (ids >= vocab_size)).sum()
    return torch.stack(counts)


def _last_column(chosen: Tensor) -> Tensor:
    """Columns of [B, N] up to the last in which a row has something chosen."""
    place = torch.arange(1, chosen.shape[1] + 1, device=chosen.device)
    return (chosen.any(0) * place).amax() if chosen.shape[1] else place.sum()


def _embedded(embedding: nn.Module, batch: Batch) -> Batch:
    """The batch through an embedding that has to be called: its hooks may count the columns (NEFTune)."""
    if batch.input_ids is None or families.embedding_obstacle(embedding) is None:
        return batch
    return replace(batch, input_ids=None, inputs_embeds=embedding(batch.input_ids))


def _first_columns(batch: Batch, columns: int) -> Batch:
    def first(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:, :columns]

    return replace(
        batch,
        input_ids=first(batch.input_ids),
        inputs_embeds=first(batch.inputs_embeds),
        attention_mask=batch.attention_mask[:, :columns],
    )


def prompted_texts(embedding: nn.Module, batch: Batch, backend: str) -> tuple[Tensor, Tensor]:
    """[B, P + L, H] and its mask. Shorter prompts than the longest leave pads at the end of their rows."""
    one_length = len(set(batch.prompt_lengths)) == 1
    if batch.input_ids is not None and one_length and families.embedding_obstacle(embedding) is None:
        table: Any = embedding.weight
        prepended = prepend_prompt(
            table,
            batch.input_ids,
            batch.joined_prompts(table.device),
            batch.prompt_lengths,
            attention_mask=batch.attention_mask,
            prompt_of_row=batch.prompt_of_row,
            backend=backend,
        )
        return prepended.inputs_embeds, prepended.attention_mask
    embeds = embedding(batch.input_ids) if batch.inputs_embeds is None else batch.inputs_embeds
    embeds = torch.cat([prompts_of_rows(batch.prompts, batch, embeds), embeds], 1)
    device = embeds.device
    lengths = torch.tensor(batch.prompt_lengths, device=device)
    longest = max(batch.prompt_lengths)
    if batch.prompt_of_row is not None:
        lengths = lengths[batch.prompt_of_row.long()]
    real = torch.arange(longest, device=device) < lengths.expand(batch.shape[0])[:, None]
    mask = torch.cat([real.float(), batch.attention_mask.to(device).float()], 1)
    if not one_length:
        text = torch.ones(batch.shape, dtype=torch.bool, device=device)
        order = torch.cat([real, text], 1).int().argsort(dim=1, descending=True, stable=True)
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))
        mask = mask.gather(1, order)
    return embeds, mask


def prompts_of_rows(prompts: tuple[Tensor, ...], batch: Batch, like: Tensor) -> Tensor:
    """[B, P, H] the prompt of each row, zeros behind those that are shorter than the longest."""
    longest = max(prompt.shape[0] for prompt in prompts)
    stacked = torch.stack(
        [functional.pad(prompt.to(like.device), (0, 0, 0, longest - prompt.shape[0])) for prompt in prompts]
    )
    if batch.prompt_of_row is None:
        return stacked.expand(batch.shape[0], -1, -1).to(like.dtype)
    return stacked[batch.prompt_of_row.long()].to(like.dtype)


def _decoder_inputs(
    model: CausalLM, batch: Batch, answers: DecoderInputs, embedding: nn.Module
) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    """Labels of all the decoder's columns, and its arguments."""
    labels, ids, embeds = answers.labels, answers.input_ids, answers.inputs_embeds
    if labels is not None and ids is None and embeds is None:
        ids = shifted(model, labels, as_bart=answers.prompts is not None)
    if answers.prompts is not None:
        embeds = embedding(ids) if embeds is None else embeds
        prompts = prompts_of_rows(answers.prompts, batch, embeds)
        ids, embeds = None, torch.cat([prompts, embeds], 1)
        if labels is not None:
            labels = functional.pad(labels, (prompts.shape[1], 0), value=IGNORE_INDEX)
    return labels, {
        "decoder_input_ids": ids,
        "decoder_inputs_embeds": embeds,
        "decoder_attention_mask": answers.attention_mask,
    }


def _check_positions(limit: int | None, encoder_length: int, decoder_length: int) -> None:
    if limit is not None and encoder_length > limit:
        raise_too_long(encoder_length, limit)
    if limit is not None and decoder_length > limit:
        raise ValueError(
            f"the decoder's input is {decoder_length} tokens long, but the model has {limit} positions"
        )
