"""How an encoder-decoder is run: prompts on the encoder's inputs, the head on the decoder's label rows.

The encoder sees a row's prompt and text both ways, so the rows cannot share their prompt. What can go are the
columns at the end that no row uses, in the encoder and in the decoder, and all of the head but the rows that
predict a label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softprompt.engine import model_spec
from softprompt.engine.batch import Batch, check_tensor, holds_integers, prompts_of_rows
from softprompt.engine.execution_plan import Plan
from softprompt.engine.lazy_logits import logits_of, with_gradient
from softprompt.engine.losses import losses_of_logits, warn_of_no_labels, weighted_sum
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.overrides import IN_USE, returning
from softprompt.engine.packed import raise_too_long
from softprompt.layout import raise_out_of_range
from softprompt.ops.constants import IGNORE_INDEX
from softprompt.ops.linear_cross_entropy import check_num_items, linear_cross_entropy
from softprompt.ops.prepend_prompt import prepend_prompt
from softprompt.ops.registry import AUTO

# Decoders that mask pads of their own accord, and only where they keep no cache.
_CACHE_MATTERS = ("t5gemma", "t5gemma2")


@dataclass(frozen=True, eq=False)
class DecoderInputs:
    """What the decoder reads and is scored on. Labels alone are shifted to the decoder's ids."""

    labels: Tensor | None = None  # [B, T]
    input_ids: Tensor | None = None  # [B, T]
    inputs_embeds: Tensor | None = None  # [B, T, H]
    attention_mask: Tensor | None = None  # [B, T]
    prompts: tuple[Tensor, ...] | None = None  # K of [P, H], in front of the decoder's inputs


@dataclass(frozen=True, eq=False)
class CallOptions:
    """What one call asks for beside its batch."""

    embedding: nn.Module | None = None  # makes the texts' embeddings; None: the model's own
    masked: bool = True  # the texts have a mask
    use_cache: bool | None = False  # as in the model's forward; the cache is dropped
    num_items: int | float | Tensor | None = None  # what the summed loss is divided by; None: its labels
    backend: str = AUTO  # of the ops


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


# ------------------------------------------------------------------------------------------- the whole call
def run_encoder_decoder(
    model: CausalLM, plan: Plan, batch: Batch, inputs: DecoderInputs, options: CallOptions
) -> tuple[Tensor | None, Tensor, Tensor, bool]:
    """Loss (None without labels), lazy logits [B, T, V], the encoder's hidden states [B, P + L, H], and
    whether columns were dropped: the encoder's states are zero in those of its own.

    Raises:
        IndexError: an id or a label outside the vocabulary.
        ValueError: prompt and text are longer than the position table.
    """
    check_num_items(options.num_items)
    rows = decoded_rows(model, plan, batch, inputs, options)
    loss = None if inputs.labels is None else loss_of_decoded(model, plan, rows, options)
    if loss is not None and rows.num_labels == 0:
        warn_of_no_labels()
    source, values_of = logits_source(model, rows)
    bias = getattr(model, "final_logits_bias", None)
    shape = (rows.shape[0], rows.length, plan.vocab_size)
    added = None if bias is None else bias.dtype
    logits = logits_of(source, values_of, shape, plan.logits_dtype, added=added)
    encoded: Tensor = rows.encoded.last_hidden_state
    missing = rows.columns - encoded.shape[1]
    if missing <= 0:
        return loss, logits, encoded, rows.rest is not None

    def filled(states: Tensor) -> Tensor:
        return functional.pad(states, (0, 0, 0, missing))

    shape = (encoded.shape[0], rows.columns, encoded.shape[2])
    return loss, logits, with_gradient(encoded, filled, lambda: filled(encoded), shape, encoded.dtype), True


# ------------------------------------------------------------------------------------- the decoder's columns
def decoded_rows(
    model: CausalLM, plan: Plan, batch: Batch, inputs: DecoderInputs, options: CallOptions
) -> DecodedRows:
    """Runs encoder and decoder through the model's own forward, and its head over next to nothing.

    Args:
        model: the encoder-decoder.
        plan: of the model.
        batch: prompts, of any lengths, and texts.
        inputs: what the decoder reads, and its labels.
        options: of the call.

    Raises:
        IndexError: an id or a label outside the vocabulary.
        ValueError: prompt and text are longer than the position table.
    """
    embedding = model.get_input_embeddings() if options.embedding is None else options.embedding
    num_embeddings = int(getattr(embedding, "num_embeddings", 0)) or plan.vocab_size
    counts = _counts(batch, inputs, num_embeddings, plan.vocab_size).tolist()
    num_labels, used, answered = counts[:3]
    if any(counts[3:]):
        raise_out_of_range(batch.input_ids, None, num_embeddings)
        raise_out_of_range(None, inputs.labels, plan.vocab_size)
        raise_out_of_range(inputs.input_ids, None, plan.vocab_size, name_of_ids="decoder_input_ids")
    columns = max(batch.prompt_lengths) + batch.shape[1]
    if plan.trims:
        batch = _first_columns(embedding, batch, max(used, 1))
    embeds, mask = prompted_texts(embedding, batch, options.backend)
    labels, arguments = _arguments(model, batch, inputs, embedding)
    num_rows, length = next(value for value in arguments.values() if value is not None).shape[:2]
    _check_positions(plan.position_limit, embeds.shape[1], length)
    seen = max(answered, 1) if _may_end_early(inputs) and early_end_obstacle(model, plan) is None else length
    asked = {
        "attention_mask": mask if options.masked or len(set(batch.prompt_lengths)) > 1 else None,
        "use_cache": options.use_cache if model.config.model_type in _CACHE_MATTERS else False,
        "return_dict": True,
    }
    first = {name: None if value is None else value[:, :seen] for name, value in arguments.items()}
    with _kept_outputs(model, 0 if plan.fused_head else 1) as outputs:
        model(inputs_embeds=embeds, **asked, **first)
    if len(outputs) < 2:
        raise RuntimeError(f"{type(model).__name__} does not call the encoder and the decoder that it names")
    encoded, decoded = outputs["encoder"], outputs["decoder"]
    hidden = decoded.last_hidden_state.reshape(num_rows * seen, -1)
    rows = targets = torch.empty(0, dtype=torch.int64, device=hidden.device)
    if labels is not None:
        flat = labels[:, :seen].reshape(-1).to(hidden.device)
        rows = torch.nonzero_static(flat != IGNORE_INDEX, size=num_labels)[:, 0]
        targets = flat[rows].long()

    def rest(states: Tensor) -> Tensor:
        with IN_USE:
            output = model(encoder_outputs=type(encoded)(last_hidden_state=states), **asked, **arguments)
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
        type(decoded),
    )


def early_end_obstacle(model: CausalLM, plan: Plan) -> str | None:
    """Why the decoder's columns behind the last label are kept in every call, as a sentence, or None.

    The decoder is causal, so they change nothing; but where a mask hides all that a column sees, it sees all
    columns. Their logits are computed when they are looked at: from the encoder's hidden states alone, and by
    weights that are then as now.
    """
    model_type = model.config.model_type
    if not plan.trims:
        return plan.kept_because
    if model_type in _CACHE_MATTERS:
        return f"a decoder of type {model_type} masks pads of its own accord, but where it keeps a cache"
    if any(parameter.requires_grad for parameter in model.get_decoder().parameters()):
        return "weights of the decoder are trained"
    return None


def _may_end_early(inputs: DecoderInputs) -> bool:
    """Whether a call lets the decoder stop behind the last label: its columns see the ids before them."""
    given = (inputs.inputs_embeds, inputs.attention_mask, inputs.prompts)
    return inputs.labels is not None and all(value is None for value in given)


@contextlib.contextmanager
def _kept_outputs(model: CausalLM, columns: int) -> Iterator[dict[str, Any]]:
    """Yields a dictionary of what encoder and decoder give in the block, behind the hooks of others; the head
    gets the decoder's first columns alone. One thread at a time is inside.
    """
    outputs: dict[str, Any] = {}

    def with_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"return_dict": True}

    def keep_encoded(module: nn.Module, args: Any, output: Any) -> None:
        outputs["encoder"] = output

    def keep_decoded(module: nn.Module, args: Any, output: Any) -> Any:
        outputs["decoder"] = output
        return type(output)(last_hidden_state=output.last_hidden_state.detach()[:, :columns])

    with IN_USE, contextlib.ExitStack() as hooks:
        for part, keep in ((model.get_encoder(), keep_encoded), (model.get_decoder(), keep_decoded)):
            hooks.enter_context(part.register_forward_pre_hook(with_names, with_kwargs=True))
            hooks.enter_context(part.register_forward_hook(keep))
        yield outputs


# ---------------------------------------------------------------------------------------- loss and logits
def loss_of_decoded(model: CausalLM, plan: Plan, rows: DecodedRows, options: CallOptions) -> Tensor:
    """The loss from the label rows alone: a scalar in fp32 (fp64 for fp64 models), 0 without labels."""
    num_items = options.num_items if plan.counts_items else None
    if not plan.fused_head:
        logits = _own_logits(model, rows, rows.hidden[rows.label_rows][None])[0]
        losses = losses_of_logits(logits, rows.label_targets)
        return weighted_sum(losses, rows.label_targets, None, num_items)
    loss: Tensor = linear_cross_entropy(
        rows.hidden,
        model.get_output_embeddings().weight,
        rows.label_rows,
        rows.label_targets,
        bias=_head_bias(model),
        softcap=model_spec.head_facts(model).softcap,
        logit_scale=plan.logit_scale,
        num_items=num_items,
        backend=options.backend,
    )
    return loss


def _head_bias(model: CausalLM) -> Tensor | None:
    """[V] what the model adds to the product with its head's weight, or None."""
    bias: Tensor | None = model.get_output_embeddings().bias
    added: Tensor | None = getattr(model, "final_logits_bias", None)
    if added is None:
        return bias
    return added.reshape(-1) if bias is None else bias + added.reshape(-1)


def logits_source(model: CausalLM, rows: DecodedRows) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the logits of all T columns are computed from, and what computes them, differentiably."""

    def first(hidden: Tensor) -> Tensor:
        return _own_logits(model, rows, hidden.view(*rows.shape, -1))

    hidden, states, rest = rows.hidden, rows.encoded.last_hidden_state, rows.rest
    if rest is None:
        return hidden, first

    def both(joined: Tensor) -> Tensor:
        logits = first(joined[: hidden.numel()].to(hidden))
        others = rest(joined[hidden.numel() :].view(states.shape).to(states))
        return torch.cat([logits, others.to(logits)], 1)

    return torch.cat([hidden.reshape(-1), states.reshape(-1).to(hidden.device)]), both


def _own_logits(model: CausalLM, rows: DecodedRows, hidden: Tensor) -> Tensor:
    """[B, T, V] the model's own logits of [B, T, H] as its decoder gives them: its forward, in which
    neither encoder nor decoder runs.
    """
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with returning(model.get_decoder(), rows.output_class(last_hidden_state=hidden)):
        logits: Tensor = model(
            encoder_outputs=rows.encoded, decoder_input_ids=ids, use_cache=False, return_dict=True
        ).logits
    return logits


# ------------------------------------------------------------------------------------------------ the inputs
_NAMES = ("labels", "decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")


def check_decoder_inputs(
    arguments: Mapping[str, Any],
    num_rows: int,
    hidden_size: int,
    prompts: tuple[Tensor, ...] | None = None,
) -> DecoderInputs:
    """Turns the decoder's arguments of a forward into DecoderInputs.

    Args:
        arguments: of the forward, by name; those of the decoder and the labels are read.
        num_rows: B of the texts.
        hidden_size: H.
        prompts: of the decoder.

    Raises:
        ValueError: says what was given and what is expected.
    """
    shape: list[int] | None = None
    labels, ids, embeds, mask = (arguments.get(name) for name in _NAMES)
    if ids is not None and embeds is not None:
        raise ValueError("expected decoder_input_ids or decoder_inputs_embeds, got both")
    for name in _NAMES:
        value = arguments.get(name)
        if value is None:
            continue
        check_tensor(name, value)
        got, end = list(value.shape), [hidden_size] if name == "decoder_inputs_embeds" else []
        expected = [num_rows, *(["T"] if shape is None else shape[1:]), *end]
        fits = len(got) == len(expected) and got[0] == num_rows and got[2:] == end
        if not fits or (shape is not None and got[:2] != shape) or got[1] == 0:
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"{name} must be [{wanted}] for {num_rows} rows of text, got {got}")
        if name in ("labels", "decoder_input_ids") and not holds_integers(value):
            raise ValueError(f"{name} must be integers, got {value.dtype}")
        if name == "decoder_inputs_embeds" and not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {value.dtype}")
        shape = got[:2]
    if labels is None and ids is None and embeds is None:
        raise ValueError(
            "an encoder-decoder needs labels, decoder_input_ids or decoder_inputs_embeds; got none of them"
        )
    return DecoderInputs(labels, ids, embeds, mask, prompts)


def _arguments(
    model: CausalLM, batch: Batch, inputs: DecoderInputs, embedding: nn.Module
) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    """Labels of all the decoder's columns, and its arguments."""
    labels, ids, embeds = inputs.labels, inputs.input_ids, inputs.inputs_embeds
    if labels is not None and ids is None and embeds is None:
        ids = shifted(model, labels, as_bart=inputs.prompts is not None)
    if inputs.prompts is not None:
        embeds = embedding(ids) if embeds is None else embeds
        prompts = prompts_of_rows(inputs.prompts, batch, embeds)
        ids, embeds = None, torch.cat([prompts, embeds], 1)
        if labels is not None:
            labels = functional.pad(labels, (prompts.shape[1], 0), value=IGNORE_INDEX)
    return labels, {
        "decoder_input_ids": ids,
        "decoder_inputs_embeds": embeds,
        "decoder_attention_mask": inputs.attention_mask,
    }


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


def prompted_texts(embedding: nn.Module, batch: Batch, backend: str) -> tuple[Tensor, Tensor]:
    """[B, P + L, H] and its mask. Shorter prompts than the longest leave pads at the end of their rows."""
    one_length = len(set(batch.prompt_lengths)) == 1
    if batch.input_ids is not None and one_length and model_spec.embedding_obstacle(embedding) is None:
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


def _counts(batch: Batch, inputs: DecoderInputs, num_embeddings: int, vocab_size: int) -> Tensor:
    """[6]: labels; columns up to the last that a row uses, and up to the last label; ids, labels and decoder
    ids out of range.
    """
    device = batch.attention_mask.device
    none = torch.zeros((), dtype=torch.int64, device=device)
    counts = [none, _last_column(batch.attention_mask != 0), none, none, none, none]
    if batch.input_ids is not None:
        counts[3] = ((batch.input_ids < 0) | (batch.input_ids >= num_embeddings)).sum()
    if inputs.labels is not None:
        labels = inputs.labels.to(device)
        labelled = labels != IGNORE_INDEX
        counts[0], counts[2] = labelled.sum(), _last_column(labelled)
        counts[4] = (labelled & ((labels < 0) | (labels >= vocab_size))).sum()
    if inputs.input_ids is not None:
        ids = inputs.input_ids.to(device)
        counts[5] = ((ids < 0) | (ids >= vocab_size)).sum()
    return torch.stack(counts)


def _last_column(chosen: Tensor) -> Tensor:
    """Columns of [B, N] up to the last in which a row has something chosen."""
    place = torch.arange(1, chosen.shape[1] + 1, device=chosen.device)
    return (chosen.any(0) * place).amax() if chosen.shape[1] else place.sum()


def _first_columns(embedding: nn.Module, batch: Batch, columns: int) -> Batch:
    """The batch without its other columns. An embedding that has to be called gets all: its hooks may count
    them (NEFTune).
    """
    ids, embeds = batch.input_ids, batch.inputs_embeds
    if ids is not None and model_spec.embedding_obstacle(embedding) is not None:
        ids, embeds = None, embedding(ids)
    ids = None if ids is None else ids[:, :columns]
    embeds = None if embeds is None else embeds[:, :columns]
    mask = batch.attention_mask[:, :columns]
    return replace(batch, input_ids=ids, inputs_embeds=embeds, attention_mask=mask)


def _check_positions(limit: int | None, encoder_length: int, decoder_length: int) -> None:
    if limit is not None and encoder_length > limit:
        raise_too_long(encoder_length, limit)
    if limit is not None and decoder_length > limit:
        raise ValueError(
            f"the decoder's input is {decoder_length} tokens long, but the model has {limit} positions"
        )
