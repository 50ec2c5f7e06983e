"""Chooses the execution plan of a model by numbers: candidates in order, against the reference forward."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from softprompt.engine import (
    attention_overrides,
    fused_modules,
    model_records,
    model_spec,
    precision,
    self_check,
    sharding,
)
from softprompt.engine.attention_overrides import describe_seam, seams_for
from softprompt.engine.batch import Batch
from softprompt.engine.encoder_decoder import (
    CallOptions,
    DecoderInputs,
    decoded_rows,
    logits_source,
    loss_of_decoded,
)
from softprompt.engine.execution_plan import Plan, Positions
from softprompt.engine.guard import guard_of, plan_key
from softprompt.engine.losses import label_losses, weighted_sum
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.overrides import IN_USE, NO_FUSION, Fusion
from softprompt.engine.self_check import GRADIENT, LOGITS, LOSS, Verdict

__all__ = ["Plan", "make_plan", "plan_for"]

# Settings of encoders in which pads at the end change what stands before them, whatever the mask says:
# windows and blocks that the length is rounded up to, and experts whose places go to the first rows.
_LENGTH_MATTERS = ("attention_window", "local_radius", "block_size", "expert_capacity")
_UNSCALED = ("mt5",)  # relatives of T5 without the scale in front of a tied head
BOTH_WAYS = (
    "rows stay padded, since the encoder sees prompt and text of a row both ways; "
    "the head takes label rows only"
)


def plan_for(
    model: CausalLM, *, encoder_decoder: bool = False, sharded: bool = False, fused: bool = True
) -> Plan:
    """The plan of a model: made on first use, and again after its attention, modules, kinds of weights,
    dtype, head or hooks have changed.

    A causal LM that was sharded by FSDP2 since keeps its plan: its weights are not whole here.

    Args:
        model: the language model.
        encoder_decoder: run it as an encoder-decoder; as a decoder-only model it has no fast route.
        sharded: whether FSDP2 has sharded it together with something around it.
        fused: run the modules as one op that can be; False: as their own code has them.
    """
    with IN_USE:
        whole = not (sharded or sharding.by_fsdp(model))
        if encoder_decoder and not whole:
            return _SHARDED
        name = "encoder-decoder plan" if encoder_decoder else "plan"
        key, state = plan_key(model)
        if whole:
            make = functools.partial(make_plan, model, encoder_decoder=encoder_decoder)
            plan = model_records.kept(model, name, key, make)
        else:
            known = model_records.last(model, name)
            plan = known[1] if known is not None and known[0][0] == key[0] else _UNCHECKED
        if encoder_decoder or plan.route == "stock":
            return plan

        # What the route does not depend on may have changed, and the weights are in parts by now.
        def in_this_state() -> Plan:
            fusion = _fusion_in_use(model, plan, whole) if fused else NO_FUSION
            return replace(plan, facts=model_spec.decoder_facts(model, fusion), state=state, fusion=fusion)

        return model_records.kept(model, "plan in this state", (plan, state, fused), in_this_state)


def _fusion_in_use(model: CausalLM, plan: Plan, whole: bool) -> Fusion:
    """The modules that run as one op, tried again after attributes have changed: their code may compute
    something else since. None where the self-check took none, the plan's where weights are in parts.
    """
    return _fusion_now(model) if whole and plan.fusion.classes else plan.fusion


def _fusion_now(model: CausalLM) -> Fusion:
    number = guard_of(model).check().model
    return model_records.kept(model, "fusion", number, lambda: fused_modules.find(model_spec.body_of(model)))


_UNCHECKED = Plan("stock", sharding.UNCHECKED)
_SHARDED = Plan("stock", "the weights are sharded by fully_shard, which is served for decoder-only models")


def make_plan(model: CausalLM, *, encoder_decoder: bool = False) -> Plan:
    """Tries the candidates in order and takes the first whose loss and prompt gradient are the reference
    forward's; of an encoder-decoder also the logits.

    Costs one tiny step of the reference, one of each candidate that was tried, and two reference forwards
    more where pads may be dropped. Training flags, gradients and random states are as before afterwards.
    """
    obstacle = _structural_obstacle(model, encoder_decoder)
    if obstacle is not None:
        return Plan("stock", obstacle)
    try:
        with self_check.evaluating(model):
            return _encoder_decoder_plan(model) if encoder_decoder else _decoder_plan(model)
    except self_check.ReferenceFailedError as error:
        return Plan("stock", str(error))


def _structural_obstacle(model: CausalLM, encoder_decoder: bool) -> str | None:
    """What a model lacks that every route needs, as a sentence, or None."""
    if not encoder_decoder and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "the model is an encoder-decoder; only decoder-only models are packed"
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "get_output_embeddings"):
        return f"{type(model).__name__} is not a transformers model"
    if not isinstance(model.get_input_embeddings(), nn.Module):
        return "the model names no input embeddings"
    obstacle = sharding.obstacle(model)
    if obstacle is not None:
        return obstacle
    if not getattr(model.config, "is_encoder_decoder", False):
        try:
            model_spec.body_of(model)
        except AttributeError as error:
            return str(error)
    if model.get_output_embeddings() is None:
        return f"{type(model).__name__} has no language modelling head"
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        return "the model has no floating point weights"
    if any(
        parameter.device.type == "meta"
        for module in model.modules()
        if not sharding.is_offloaded(module)
        for parameter in module.parameters(recurse=False)
    ):
        return "some weights are on the meta device, so the self-check cannot run"
    if getattr(model.config, "output_router_logits", False):
        return "output_router_logits adds a loss over all tokens, pads and repeated prompts included"
    embedding = model.get_input_embeddings()
    if getattr(embedding, "max_norm", None) is not None and model_spec.is_tied(model):
        return (
            "the embedding renormalises the rows of its table that it reads (max_norm), and the head shares "
            "the table, so pads change the logits"
        )
    mixing = precision.whole_batch_obstacle(model.get_output_embeddings())
    if mixing is not None:
        return f"label rows cannot go through the head without the others: {mixing}"
    return None


def _settled(verdict: Verdict[Plan], otherwise: Plan, head_obstacle: str | None) -> Plan:
    """The chosen plan and what the self-check found of it; the model's own forward where none holds."""
    plan, rejected = verdict.chosen, verdict.rejected
    if plan is None:
        reason = "no faster route gives the numbers of the model's own forward: " + "; ".join(rejected)
        return replace(otherwise, route="stock", reason=reason, rejected=rejected)
    head_reason = head_obstacle
    if head_obstacle is None and not plan.fused_head:
        head_reason = "the fused head gave other numbers than the model's own: " + rejected[-1]
    return replace(
        plan,
        head_reason=head_reason,
        loss_error=verdict.errors[LOSS],
        grad_error=verdict.errors[GRADIENT],
        rejected=rejected,
    )


# ------------------------------------------------------------------------------------------------- decoders
def _decoder_plan(model: CausalLM) -> Plan:
    batch = self_check.probe_batch(model)
    output, expected = self_check.reference_step(model, batch)
    head_obstacle, packing_obstacle = (
        model_spec.head_obstacle(model),
        attention_overrides.packing_obstacle(model),
    )
    heads = (True, False) if head_obstacle is None else (False,)
    position_limit = model_spec.position_limit(model, model_spec.body_of(model))
    padded = Plan("padded", "", position_limit=position_limit, facts=model_spec.decoder_facts(model))

    def first_of(routes: Iterable[Plan]) -> Verdict[Plan]:
        plans = [replace(plan, fused_head=fused) for plan in routes for fused in heads]
        candidates = {_name(plan): plan for plan in plans}
        return self_check.first_that_holds(
            candidates, lambda plan: _step(model, plan, batch), expected, self_check.tolerances(model)
        )

    verdict: Verdict[Plan] = Verdict()
    if packing_obstacle is None:
        fusion = _fusion_now(model)
        facts = model_spec.decoder_facts(model, fusion)
        verdict = first_of(_packed_candidates(model, replace(padded, fusion=fusion, facts=facts)))
        if verdict.chosen is None and fusion.classes:
            fusion = Fusion(left=(*fusion.left, f"the others: {verdict.rejected[0]}"))
            verdict = first_of(_packed_candidates(model, replace(padded, fusion=fusion)))
        if verdict.chosen is not None:
            packing_obstacle = self_check.padding_obstacle(model, batch)
    if packing_obstacle is not None:
        verdict = Verdict(rejected=(*verdict.rejected, f"packed: {packing_obstacle}"))
    if verdict.chosen is None:
        last = first_of([padded])
        verdict = replace(last, rejected=(*verdict.rejected, *last.rejected))
    plan = _settled(verdict, padded, head_obstacle)
    if plan.route == "packed":
        why = describe_seam(str(plan.seam))
        plan = replace(plan, reason=f"attention-only decoder; {why}", row_limit=model_spec.row_limit(model))
    elif plan.route == "padded":
        why = packing_obstacle or "no packed variant passed the self-check"
        plan = replace(plan, reason=f"rows stay padded, since {why}")
    return replace(
        plan,
        output_class=type(output),
        logits_dtype=output.logits.dtype,
        autocast_logits=_follows_autocast(model, batch),
        vocab_size=output.logits.shape[-1],
        rotary_switch=model_spec.rotary_switch(model),
    )


def _packed_candidates(model: CausalLM, padded: Plan) -> Iterator[Plan]:
    """Likely positions first, in each the fastest attention first."""
    order: tuple[Positions, ...] = ("slots", "mask")
    for positions in order[::-1] if model_spec.positions_from_mask(model_spec.config_of(model)) else order:
        for seam in seams_for(model):
            yield replace(padded, route="packed", seam=seam, positions=positions)


def _name(plan: Plan) -> str:
    parts = (plan.route, plan.seam, plan.positions, "head fused" if plan.fused_head else "head of the model")
    return "/".join(part for part in parts if part)


def _step(model: CausalLM, plan: Plan, batch: Batch) -> dict[str, Tensor]:
    rows = plan.decode(model, batch, plan.layout(batch), examine=True)
    losses = label_losses(model, rows, plan.head)
    loss = weighted_sum(losses, rows.label_targets, None, None)
    return self_check.loss_and_gradient(loss, batch)


def _follows_autocast(model: CausalLM, batch: Batch) -> bool:
    """Whether logits come in autocast's dtype. A linear layer does that; other heads may cast them."""
    if model_spec.head_obstacle(model) is None:
        return True
    device_type = batch.attention_mask.device.type
    dtype = torch.get_autocast_dtype(device_type)
    try:
        with torch.no_grad(), torch.autocast(device_type, dtype=dtype):
            logits = self_check.reference_forward(model, replace(batch, labels=None)).logits
    except Exception:  # then nobody will run it under autocast
        return True
    return bool(logits.dtype == dtype)


# ----------------------------------------------------------------------------------------- encoder-decoders
def _encoder_decoder_plan(model: CausalLM) -> Plan:
    batch, inputs = self_check.encoder_decoder_probe(model)
    output, expected = self_check.reference_step(model, batch, labels=inputs.labels)
    own_head = Plan(
        "padded",
        BOTH_WAYS,
        position_limit=model_spec.position_limit(model, model.get_encoder()),
        output_class=type(output),
        logits_dtype=output.logits.dtype,
        vocab_size=output.logits.shape[-1],
        rotary_switch=model_spec.rotary_switch(model),
        encoder_decoder=True,
        kept_because=_trimming_obstacle(model) or self_check.padding_obstacle(model, batch, inputs),
        counts_items=_counts_items(model, batch, inputs, expected[LOSS]),
    )
    head_obstacle = model_spec.head_weight_obstacle(model)
    candidates = {}
    for scale in _likely_scales(model) if head_obstacle is None else ():
        fused = replace(own_head, fused_head=True, logit_scale=scale)
        candidates[f"padded/head fused, logits x {scale or 1:.3g}"] = fused
    candidates["padded/head own"] = own_head

    def step(plan: Plan) -> dict[str, Tensor]:
        options = CallOptions()
        rows = decoded_rows(model, plan, batch, inputs, options)
        results = self_check.loss_and_gradient(loss_of_decoded(model, plan, rows, options), batch)
        with torch.no_grad():
            source, values_of = logits_source(model, rows)
            return results | {LOGITS: values_of(source)}

    expected[LOGITS] = output.logits.detach()
    return _settled(
        self_check.first_that_holds(candidates, step, expected, self_check.tolerances(model)),
        own_head,
        head_obstacle,
    )


def _trimming_obstacle(model: CausalLM) -> str | None:
    """Why columns that are pads in all rows are kept, as a sentence, or None."""
    for name in _LENGTH_MATTERS:
        value = getattr(model.config, name, None)
        if value:
            return f"pads at the end change what the encoder makes of the columns before ({name}={value})"
    return precision.whole_batch_obstacle(model)


def _counts_items(model: CausalLM, batch: Batch, inputs: DecoderInputs, loss: Tensor) -> bool:
    """Whether the model's loss knows `num_items_in_batch`: some classes take it and leave it."""
    options = {"labels": inputs.labels, "num_items_in_batch": torch.tensor(1)}
    try:
        divided = self_check.reference_forward(model, batch, **options).loss.detach()
    except TypeError:
        return False
    return bool((divided - loss).abs() > 0.1 * loss.abs())


def _likely_scales(model: CausalLM) -> tuple[float | None, ...]:
    """Scales of the logits to be tried: T5 and its relatives have one where the head is the embedding."""
    width = getattr(model, "model_dim", None)
    if width is None:
        return (model_spec.head_facts(model).logit_scale,)
    tied = getattr(model.config, "tie_word_embeddings", True) and model.config.model_type not in _UNSCALED
    scaled = getattr(model.config, "scale_decoder_outputs", tied)
    candidates = (float(width) ** -0.5, None)
    return candidates if scaled else candidates[::-1]
