"""Whether an encoder-decoder takes the padded route, decided by numbers like the plan of a causal LM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from softprompt.engine import families, model_records, pads, sharding
from softprompt.engine.batch import Batch
from softprompt.engine.encoder_decoder import (
    DecodedRows,
    DecoderInputs,
    decoded_rows,
    shifted,
    trains_decoder,
)
from softprompt.engine.families import CausalLM
from softprompt.engine.fingerprint import fingerprint
from softprompt.engine.lazy import logits_of, with_gradient
from softprompt.engine.losses import losses_of_logits, weighted_sum
from softprompt.engine.overrides import IN_USE
from softprompt.engine.plan import (
    Plan,
    ReferenceFailedError,
    errors,
    evaluating,
    missing_part,
    probe_batch,
    tolerances,
)
from softprompt.engine.precision import whole_batch_obstacle
from softprompt.engine.runner import warn_of_no_labels
from softprompt.engine.seq2seq_logits import head_bias, logits_source, own_logits
from softprompt.ops.linear_cross_entropy import check_num_items, linear_cross_entropy
from softprompt.ops.registry import AUTO

# Settings of encoders in which pads at the end change what stands before them, whatever the mask says:
# windows and blocks that the length is rounded up to, and experts whose places go to the first rows.
_LENGTH_MATTERS = ("attention_window", "local_radius", "block_size", "expert_capacity")
_UNSCALED = ("mt5",)  # relatives of T5 without the scale in front of a tied head
# Decoders that mask pads of their own accord, and only where they keep no cache.
_CACHE_MATTERS = ("t5gemma", "t5gemma2")
REASON = (
    "rows stay padded, since the encoder sees prompt and text of a row both ways; "
    "the head takes label rows only"
)


@dataclass(frozen=True)
class Seq2SeqPlan(Plan):
    """The route of one encoder-decoder, and why."""

    logit_scale: float | None = None  # of the decoder's hidden states in front of the head
    counts_items: bool = False  # the model's loss is divided by num_items_in_batch
    trims: bool = False  # columns that no row uses are dropped
    kept_because: str | None = None  # why not


def seq2seq_plan_for(model: CausalLM, *, sharded: bool = False) -> Seq2SeqPlan:
    """The plan of an encoder-decoder: made on first use, and again after what it depends on has changed.

    Args:
        model: the encoder-decoder.
        sharded: whether FSDP2 has sharded it together with something around it.
    """
    if sharded or sharding.by_fsdp(model):
        return _SHARDED
    with IN_USE:
        key = (*fingerprint(model), *_scales(model))
        return model_records.kept(model, "plan", key, lambda: make_seq2seq_plan(model))


_SHARDED = Seq2SeqPlan(
    "stock", "the weights are sharded by fully_shard, which is served for decoder-only models"
)


def _scales(model: CausalLM) -> tuple[Any, ...]:
    """What the scale in front of T5's head hangs on."""
    return tuple(
        getattr(model.config, name, None) for name in ("scale_decoder_outputs", "tie_word_embeddings")
    )


def make_seq2seq_plan(model: CausalLM) -> Seq2SeqPlan:
    """Tries the candidates in order and takes the first whose loss, prompt gradient and logits are the stock
    forward's.

    Costs two tiny steps and two forwards of the stock model, and one of each candidate that was tried.
    """
    obstacle = missing_part(model)
    if obstacle is not None:
        return Seq2SeqPlan("stock", obstacle)
    try:
        with evaluating(model):
            batch, answers = _probe(model)
            stock, expected = _stock_step(model, batch, answers)
            kept_because = trimming_obstacle(model) or pads.tried(
                lambda: _difference_by_pads(model, batch, answers)
            )
            start = Seq2SeqPlan(
                "padded",
                REASON,
                position_limit=families.position_limit(model, model.get_encoder()),
                output_class=type(stock),
                logits_dtype=stock.logits.dtype,
                vocab_size=stock.logits.shape[-1],
                rotary_switch=families.rotary_switch(model),
                counts_items=_counts_items(model, batch, answers, expected[0]),
                trims=kept_because is None,
                kept_because=kept_because,
            )
            return _first_that_holds(model, start, batch, answers, stock.logits.detach(), expected)
    except ReferenceFailedError as error:
        return Seq2SeqPlan("stock", str(error))


def trimming_obstacle(model: CausalLM) -> str | None:
    """Why columns that are pads in all rows are kept, as a sentence, or None."""
    for name in _LENGTH_MATTERS:
        value = getattr(model.config, name, None)
        if value:
            return f"pads at the end change what the encoder makes of the columns before ({name}={value})"
    return whole_batch_obstacle(model)


def early_end_obstacle(model: CausalLM, plan: Seq2SeqPlan) -> str | None:
    """Why the decoder's columns behind the last label are kept in every call, as a sentence, or None."""
    model_type = model.config.model_type
    if not plan.trims:
        return plan.kept_because
    if model_type in _CACHE_MATTERS:
        return f"a decoder of type {model_type} masks pads of its own accord, but where it keeps a cache"
    return "weights of the decoder are trained" if trains_decoder(model) else None


def _difference_by_pads(model: CausalLM, batch: Batch, answers: DecoderInputs) -> str | None:
    """Why the columns that the probe's rows do not use have to stay, as a sentence, or None."""
    texts = model.get_input_embeddings()(batch.input_ids)
    ids = shifted(model, cast(Tensor, answers.labels))
    # Its own, which may differ from the encoder's.
    decoder = model.get_decoder().get_input_embeddings() or model.get_input_embeddings()
    both = torch.cat([texts, decoder(ids).to(texts)], 1)
    read = batch.attention_mask.any(0)
    scored = torch.ne(cast(Tensor, answers.labels), -100).any(0)

    def logits_of(embeds: Tensor) -> Tensor:
        first, second = embeds.split([texts.shape[1], ids.shape[1]], 1)
        # A decoder's inputs as labels alone would make them, but for the last one.
        output = stock_seq2seq(
            model,
            replace(batch, input_ids=None, inputs_embeds=first),
            DecoderInputs(),
            decoder_inputs_embeds=second,
        )
        logits: Tensor = output.logits[:, scored]
        return logits

    used = torch.cat([read, scored]).expand(both.shape[:2])
    return pads.difference(model, both, ~used, logits_of)


def _probe(model: CausalLM) -> tuple[Batch, DecoderInputs]:
    """Two rows with a hole, pads of their own and one that they share; some labels do not count, nor does a
    last column of them.
    """
    batch = probe_batch(model)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]], device=batch.attention_mask.device)
    labels = cast(Tensor, batch.input_ids).flip(1)[:, :4].clone()
    labels[0, 1] = labels[1, 2:] = -100
    labels = nn.functional.pad(labels, (0, 1), value=-100)
    return replace(batch, attention_mask=mask, labels=None), DecoderInputs(labels)


def _stock_step(model: CausalLM, batch: Batch, answers: DecoderInputs) -> tuple[Any, tuple[Tensor, Tensor]]:
    try:
        output = stock_seq2seq(model, batch, answers)
        (grad,) = torch.autograd.grad(output.loss, batch.prompts[0])
    except Exception as error:
        raise ReferenceFailedError(
            f"the model's own forward fails on soft prompts: {type(error).__name__}: {error}"
        ) from error
    if not (torch.isfinite(output.loss) and torch.isfinite(grad).all()):
        raise ReferenceFailedError("the model's own loss or prompt gradient is not finite")
    return output, (output.loss.detach(), grad)


def stock_seq2seq(model: CausalLM, batch: Batch, answers: DecoderInputs, **kwargs: Any) -> Any:
    """The padded forward as PEFT runs it, with one prompt for all rows."""
    embeds = batch.inputs_embeds
    if embeds is None:
        embeds = model.get_input_embeddings()(batch.input_ids)
    prompt = batch.prompts[0].to(embeds).expand(batch.shape[0], -1, -1)
    mask = torch.cat([torch.ones_like(prompt[..., 0]).float(), batch.attention_mask.float()], 1)
    return model(
        inputs_embeds=torch.cat([prompt, embeds], 1),
        attention_mask=mask,
        labels=answers.labels,
        use_cache=False,
        return_dict=True,
        **kwargs,
    )


def _counts_items(model: CausalLM, batch: Batch, answers: DecoderInputs, loss: Tensor) -> bool:
    """Whether the model's loss knows `num_items_in_batch`: some classes take it and leave it."""
    try:
        divided = stock_seq2seq(model, batch, answers, num_items_in_batch=torch.tensor(1)).loss.detach()
    except TypeError:
        return False
    return bool((divided - loss).abs() > 0.1 * loss.abs())


def _first_that_holds(
    model: CausalLM,
    start: Seq2SeqPlan,
    batch: Batch,
    answers: DecoderInputs,
    logits: Tensor,
    expected: tuple[Tensor, Tensor],
) -> Seq2SeqPlan:
    obstacle = families.head_weight_obstacle(model)
    rejected: list[str] = []
    scales = _likely_scales(model) if obstacle is None else ()
    plans = [replace(start, fused_head=True, logit_scale=scale) for scale in scales]
    for plan in (*plans, start):
        name = "padded/head " + (f"fused, logits x {plan.logit_scale or 1:.3g}" if plan.fused_head else "own")
        try:
            rows = run_decoder(model, plan, batch, answers, use_cache=False)
            loss = loss_of_decoded(model, plan, rows, None)
            (grad,) = torch.autograd.grad(loss, batch.prompts[0])
            with torch.no_grad():
                source, values_of = logits_source(model, rows)
                got = values_of(source)
        except Exception as error:  # the reason is kept, and the stock forward takes over
            first_line = str(error).splitlines()[0] if str(error) else ""
            rejected.append(f"{name}: {type(error).__name__}: {first_line}")
            continue
        loss_error, grad_error = errors((loss.detach(), grad), expected)
        logits_error = float((got - logits).norm() / logits.norm().clamp_min(1e-12))
        loss_bound, grad_bound = tolerances(model)
        if loss_error <= loss_bound and grad_error <= grad_bound and logits_error <= grad_bound:
            reason = obstacle
            if obstacle is None and not plan.fused_head:
                reason = "the fused head gave other numbers than the model's own: " + rejected[-1]
            return replace(
                plan,
                head_reason=reason,
                loss_error=loss_error,
                grad_error=grad_error,
                rejected=tuple(rejected),
            )
        rejected.append(
            f"{name}: loss off by {loss_error:.1e}, prompt gradient by {grad_error:.1e}, "
            f"logits by {logits_error:.1e}"
        )
    return replace(
        start,
        route="stock",
        reason="no faster route gives the numbers of the model's own forward: " + "; ".join(rejected),
        rejected=tuple(rejected),
    )


def _likely_scales(model: CausalLM) -> tuple[float | None, ...]:
    """Scales of the logits to be tried: T5 and its relatives have one where the head is the embedding."""
    width = getattr(model, "model_dim", None)
    if width is None:
        return (families.head_facts(model).logit_scale,)
    tied = getattr(model.config, "tie_word_embeddings", True) and model.config.model_type not in _UNSCALED
    scaled = getattr(model.config, "scale_decoder_outputs", tied)
    candidates = (float(width) ** -0.5, None)
    return candidates if scaled else candidates[::-1]


def run_decoder(
    model: CausalLM,
    plan: Seq2SeqPlan,
    batch: Batch,
    answers: DecoderInputs,
    *,
    embedding: nn.Module | None = None,
    masked: bool = True,
    use_cache: bool | None = None,
    backend: str = AUTO,
) -> DecodedRows:
    """`decoded_rows` as the plan wants it."""
    return decoded_rows(
        model,
        batch,
        answers,
        model.get_input_embeddings() if embedding is None else embedding,
        trims=plan.trims,
        ends_early=plan.trims and model.config.model_type not in _CACHE_MATTERS,
        position_limit=plan.position_limit,
        vocab_size=plan.vocab_size,
        masked=masked,
        use_cache=use_cache if model.config.model_type in _CACHE_MATTERS else False,
        skips_head=plan.fused_head,
        backend=backend,
    )


def loss_of_decoded(
    model: CausalLM,
    plan: Seq2SeqPlan,
    rows: DecodedRows,
    num_items: int | float | Tensor | None,
    backend: str = AUTO,
) -> Tensor:
    """The loss from the label rows alone: a scalar in fp32 (fp64 for fp64 models), 0 without labels."""
    num_items = num_items if plan.counts_items else None
    if not plan.fused_head:
        logits = own_logits(model, rows.hidden[rows.label_rows][None], rows.encoded, rows.output_class)[0]
        losses = losses_of_logits(logits, rows.label_targets)
        return weighted_sum(losses, rows.label_targets, None, num_items)
    loss: Tensor = linear_cross_entropy(
        rows.hidden,
        model.get_output_embeddings().weight,
        rows.label_rows,
        rows.label_targets,
        bias=head_bias(model),
        softcap=families.head_facts(model).softcap,
        logit_scale=plan.logit_scale,
        num_items=num_items,
        backend=backend,
    )
    return loss


def run_seq2seq(
    model: CausalLM,
    plan: Seq2SeqPlan,
    batch: Batch,
    answers: DecoderInputs,
    *,
    embedding: nn.Module,
    masked: bool,
    use_cache: bool | None,
    num_items: int | float | Tensor | None,
    backend: str = AUTO,
) -> tuple[Tensor | None, Tensor, Tensor, bool]:
    """Loss (None without labels), lazy logits [B, T, V], the encoder's hidden states [B, P + L, H], and
    whether columns were dropped: the encoder's states are zero in those of its own.
    """
    check_num_items(num_items)
    rows = run_decoder(
        model,
        plan,
        batch,
        answers,
        embedding=embedding,
        masked=masked,
        use_cache=use_cache,
        backend=backend,
    )
    loss = None if answers.labels is None else loss_of_decoded(model, plan, rows, num_items, backend)
    if loss is not None and rows.num_labels == 0:
        warn_of_no_labels()
    source, values_of = logits_source(model, rows)
    bias = getattr(model, "final_logits_bias", None)
    logits = logits_of(
        source,
        values_of,
        (rows.shape[0], rows.length, plan.vocab_size),
        plan.logits_dtype,
        added=None if bias is None else bias.dtype,
    )
    encoded: Tensor = rows.encoded.last_hidden_state
    missing = rows.columns - encoded.shape[1]
    if missing <= 0:
        return loss, logits, encoded, rows.rest is not None

    def filled(states: Tensor) -> Tensor:
        return nn.functional.pad(states, (0, 0, 0, missing))

    shape = (encoded.shape[0], rows.columns, encoded.shape[2])
    states = with_gradient(encoded, filled, lambda: filled(encoded), shape, encoded.dtype)
    return loss, logits, states, True
