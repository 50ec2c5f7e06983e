"""Which route a model takes, decided by numbers: every candidate is run on two short rows beside the stock
forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from softprompt.engine import attention, families, model_records, pads, precision, sharding
from softprompt.engine.attention import describe_seam, seams_for
from softprompt.engine.batch import Batch
from softprompt.engine.families import CausalLM
from softprompt.engine.fingerprint import fingerprint, settings
from softprompt.engine.leftovers import without_leftovers
from softprompt.engine.losses import label_losses, weighted_sum
from softprompt.engine.overrides import IN_USE
from softprompt.engine.packed import HiddenRows, packed_rows
from softprompt.engine.padded import padded_rows
from softprompt.engine.self_check import reference_forward
from softprompt.engine.watch import Watch

# Largest allowed error of the self-check relative to the stock forward: (loss, prompt gradient). Softmax,
# rotary tables and ALiBi are fp32 inside fp64 models; in 16 bit the stock forward itself is this far from the
# truth.
_TOLERANCES = {torch.float64: (1e-5, 1e-4), torch.float32: (1e-4, 2e-3)}
_TOLERANCE_16_BIT = (5e-2, 2e-1)


@dataclass(frozen=True)
class Plan:
    """The route of one model, and why."""

    route: str  # "packed", "padded" or "stock"
    reason: str  # one sentence
    seam: str | None = None  # packed: how the attention gets in
    positions: str = "slots"  # packed: what the model counts under left padding
    fused_head: bool = False  # linear_cross_entropy reads the head's weight
    head_reason: str | None = None  # why not
    position_limit: int | None = None
    loss_error: float | None = None  # of the self-check, relative to the stock forward
    grad_error: float | None = None
    rejected: tuple[str, ...] = ()  # candidates that came before, and what was wrong with each
    output_class: type = CausalLMOutputWithPast  # of the model's own forward
    logits_dtype: torch.dtype = torch.float32  # of the model's own forward, without autocast
    autocast_logits: bool = True  # under autocast the logits have its dtype
    vocab_size: int = 0  # width of its logits
    rotary_switch: int | None = None  # see `families.rotary_switch`
    row_limit: int | None = None  # see `families.row_limit`

    @property
    def choice(self) -> tuple[Any, ...]:
        """What ranks have to agree on; the errors of their self-checks may differ in the last digits."""
        return self.route, self.seam, self.positions, self.fused_head

    def run(self, model: CausalLM, batch: Batch, *, compact: bool = False, **options: Any) -> HiddenRows:
        """The hidden rows of a batch on this route.

        Args:
            model: the model that the plan was made for.
            batch: prompts, texts and labels.
            compact: ignore pads in positions and windows (packed route only).
            options: for `packed_rows` or `padded_rows`.
        """
        if self.route == "padded":
            return padded_rows(model, batch, position_limit=self.position_limit, **options)
        if self.seam is None:
            raise ValueError(f"this model has no fast route: {self.reason}")
        return packed_rows(
            model,
            batch,
            seam=self.seam,
            positions="compact" if compact else self.positions,
            position_limit=self.position_limit,
            **options,
        )


def plan_for(model: CausalLM, *, sharded: bool = False, watch: Watch | None = None) -> Plan:
    """The plan of a causal LM: made on first use, and again after its attention, modules, kinds of weights,
    dtype, head or hooks have changed.

    A model that was sharded by FSDP2 since keeps its plan: its weights are not whole here.

    Args:
        model: the causal LM.
        sharded: whether FSDP2 has sharded it together with something around it.
        watch: of this model, where there is one: it sees sooner that nothing has changed.
    """
    with IN_USE:
        if watch is None or sharded or sharding.in_group():
            return _plan_by_fingerprint(model, sharded)
        sight = watch.look()
        unchanged = sight.same and not sight.hooked
        known: _Known | None = watch.notes.get("plan")
        if unchanged and known is not None and known.settings == settings(model, known.embedding):
            return known.plan
        plan = _plan_by_fingerprint(model, sharded)
        watch.notes.pop("plan", None)
        if unchanged:
            embedding = model.get_input_embeddings()
            watch.notes["plan"] = _Known(plan, embedding, settings(model, embedding))
        return plan


@dataclass(frozen=True, eq=False)
class _Known:
    """A plan, and what has to stay as it is beside modules, hooks, parameters and buffers."""

    plan: Plan
    embedding: Any
    settings: tuple[Any, ...]


def _plan_by_fingerprint(model: CausalLM, sharded: bool) -> Plan:
    key = fingerprint(model)
    if sharded or sharding.by_fsdp(model):
        known = model_records.last(model, "plan")
        return known[1] if known is not None and known[0][0] == key[0] else _UNCHECKED
    return model_records.kept(model, "plan", key, lambda: make_plan(model))


_UNCHECKED = Plan("stock", sharding.UNCHECKED)


def make_plan(model: CausalLM) -> Plan:
    """Tries the candidates in order and takes the first whose loss and prompt gradient are the stock
    forward's.

    Costs one tiny step of the stock model, one of each candidate that was tried, and two forwards more where
    one is packed. Training flags, gradients and random states are as before afterwards.
    """
    obstacle = _structural_obstacle(model)
    if obstacle is not None:
        return Plan("stock", obstacle)
    try:
        limit = families.position_limit(model, families.body_of(model))
        with evaluating(model):
            batch = probe_batch(model)
            output, expected = _stock_step(model, batch)
            plan = _first_that_holds(model, batch, expected, limit)
            return replace(
                plan,
                output_class=type(output),
                logits_dtype=output.logits.dtype,
                autocast_logits=_follows_autocast(model, batch),
                vocab_size=output.logits.shape[-1],
                rotary_switch=families.rotary_switch(model),
                row_limit=families.row_limit(model) if plan.route == "packed" else None,
            )
    except ReferenceFailedError as error:
        return Plan("stock", str(error))


def _structural_obstacle(model: CausalLM) -> str | None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "the model is an encoder-decoder; only decoder-only models are packed"
    return missing_part(model)


def missing_part(model: CausalLM) -> str | None:
    """What a model lacks that every route needs, as a sentence, or None."""
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "get_output_embeddings"):
        return f"{type(model).__name__} is not a transformers model"
    if not isinstance(model.get_input_embeddings(), nn.Module):
        return "the model names no input embeddings"
    obstacle = sharding.obstacle(model)
    if obstacle is not None:
        return obstacle
    if not getattr(model.config, "is_encoder_decoder", False):
        try:
            families.body_of(model)
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
    if getattr(embedding, "max_norm", None) is not None and families.is_tied(model):
        return (
            "the embedding renormalises the rows of its table that it reads (max_norm), and the head shares "
            "the table, so pads change the logits"
        )
    mixing = precision.whole_batch_obstacle(model.get_output_embeddings())
    if mixing is not None:
        return f"label rows cannot go through the head without the others: {mixing}"
    return None


class ReferenceFailedError(RuntimeError):
    """The stock forward itself cannot serve as a reference."""


def _first_that_holds(
    model: CausalLM, batch: Batch, expected: tuple[Tensor, Tensor], limit: int | None
) -> Plan:
    head_obstacle = families.head_obstacle(model)
    packing_obstacle = attention.packing_obstacle(model)
    rejected: list[str] = []
    candidates: list[Plan] = []
    if packing_obstacle is None:
        guess = "mask" if families.positions_from_mask(families.config_of(model)) else "slots"
        for positions in (guess, "slots" if guess == "mask" else "mask"):
            for seam in seams_for(model):
                candidates.append(Plan("packed", "", seam=seam, positions=positions, position_limit=limit))
    else:
        rejected.append(f"packed: {packing_obstacle}")
    candidates.append(Plan("padded", "", position_limit=limit))
    for candidate in candidates:
        if candidate.route == "packed" and packing_obstacle is not None:
            continue
        for fused in (True, False) if head_obstacle is None else (False,):
            plan = replace(candidate, fused_head=fused)
            name = "/".join(part for part in (plan.route, plan.seam, plan.positions, "head") if part)
            name += " fused" if fused else " of the model"
            try:
                got = _step(model, plan, batch)
            except (
                Exception
            ) as error:  # the reason is kept, and a slower candidate or the stock forward takes over
                first_line = str(error).splitlines()[0] if str(error) else ""
                rejected.append(f"{name}: {type(error).__name__}: {first_line}")
                continue
            loss_error, grad_error = errors(got, expected)
            loss_bound, grad_bound = tolerances(model)
            if loss_error <= loss_bound and grad_error <= grad_bound:
                if plan.route == "packed":
                    packing_obstacle = pads.tried(lambda: _difference_by_pads(model, batch))
                    if packing_obstacle is not None:
                        rejected.append(f"packed: {packing_obstacle}")
                        break
                head_reason = head_obstacle
                if head_obstacle is None and not fused:
                    head_reason = "the fused head gave other numbers than the model's own: " + rejected[-1]
                return replace(
                    plan,
                    reason=_praise(plan, packing_obstacle),
                    head_reason=head_reason,
                    loss_error=loss_error,
                    grad_error=grad_error,
                    rejected=tuple(rejected),
                )
            rejected.append(f"{name}: loss off by {loss_error:.1e}, prompt gradient by {grad_error:.1e}")
    return Plan(
        "stock",
        "no faster route gives the numbers of the model's own forward: " + "; ".join(rejected),
        rejected=tuple(rejected),
    )


def _difference_by_pads(model: CausalLM, batch: Batch) -> str | None:
    """Why the probe's pads have to stay, as a sentence, or None."""
    real = batch.attention_mask.bool()

    def logits_of(embeds: Tensor) -> Tensor:
        texts = replace(batch, input_ids=None, inputs_embeds=embeds, labels=None)
        logits: Tensor = reference_forward(model, texts).logits[:, batch.prompt_lengths[0] :]
        return logits[real.to(logits.device)]

    embeds = model.get_input_embeddings()(batch.input_ids)
    return pads.difference(model, embeds, ~real.to(embeds.device), logits_of)


def tolerances(model: CausalLM) -> tuple[float, float]:
    """Largest allowed errors of loss and prompt gradient relative to those of the stock forward."""
    return _TOLERANCES.get(precision.coarsest_dtype(model), _TOLERANCE_16_BIT)


def tolerance(model: CausalLM) -> float:
    """Largest allowed error of tensors relative to those of the stock forward."""
    return tolerances(model)[1]


def _praise(plan: Plan, packing_obstacle: str | None) -> str:
    if plan.route == "padded":
        return f"rows stay padded, since {packing_obstacle or 'no packed variant passed the self-check'}"
    return f"attention-only decoder; {describe_seam(str(plan.seam))}"


def probe_batch(model: CausalLM) -> Batch:
    """Two left-padded rows with a label on each first token, the hardest case, behind a prompt of real
    embeddings.
    """
    embedding = model.get_input_embeddings()
    vocabulary = families.vocab_size(model)
    device = sharding.device_of(embedding if hasattr(embedding, "weight") else model)
    numbers = torch.arange(3, 19, device=device)
    ids = (numbers * numbers * 31 + numbers * 7) % vocabulary
    input_ids = ids[:12].view(2, 6)
    attention_mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]], device=device)
    labels = torch.where(attention_mask.bool(), input_ids, -100)
    labels[0, 2] = -100
    with torch.no_grad():
        prompt = embedding(ids[None, 12:])[0].detach().clone()
    prompt = prompt.to(torch.promote_types(prompt.dtype, torch.float32)).requires_grad_()
    return Batch((prompt,), None, input_ids, None, attention_mask, labels)


def _stock_step(model: CausalLM, batch: Batch) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Output, loss and prompt gradient of the padded batch on the model's own forward, as PEFT runs it."""
    try:
        output = reference_forward(model, batch)
        loss = output.loss
        if not loss.requires_grad:
            raise RuntimeError("the loss has no gradient, as layers with rounded activations give none")
        (grad,) = torch.autograd.grad(loss, batch.prompts[0])
    except Exception as error:
        raise ReferenceFailedError(
            f"the model's own forward fails on soft prompts: {type(error).__name__}: {error}"
        ) from error
    if not (torch.isfinite(loss) and torch.isfinite(grad).all()):
        raise ReferenceFailedError("the model's own loss or prompt gradient is not finite")
    return output, (loss.detach(), grad)


def _follows_autocast(model: CausalLM, batch: Batch) -> bool:
    """Whether logits come in autocast's dtype. A linear layer does that; other heads may cast them."""
    if families.head_obstacle(model) is None:
        return True
    device_type = batch.attention_mask.device.type
    dtype = torch.get_autocast_dtype(device_type)
    try:
        with torch.no_grad(), torch.autocast(device_type, dtype=dtype):
            logits = reference_forward(model, replace(batch, labels=None)).logits
    except Exception:  # then nobody will run it under autocast
        return True
    return bool(logits.dtype == dtype)


def _step(model: CausalLM, plan: Plan, batch: Batch) -> tuple[Tensor, Tensor]:
    options = {"examine": True} if plan.route == "packed" else {}
    rows = plan.run(model, batch, **options)
    losses = label_losses(model, rows, fused=plan.fused_head)
    loss = weighted_sum(losses, rows.label_targets, None, None)
    (grad,) = torch.autograd.grad(loss, batch.prompts[0])
    return loss.detach(), grad


def errors(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Errors of loss and prompt gradient relative to what is expected."""
    loss, grad = (x.double() for x in got)
    true_loss, true_grad = (x.double() for x in expected)
    loss_error = float((loss - true_loss).abs() / true_loss.abs().clamp_min(1e-12))
    grad_error = float((grad - true_grad).norm() / true_grad.norm().clamp_min(1e-12))
    return loss_error, grad_error


@contextlib.contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Evaluation mode with gradients, without autocast and what `generate` left; all is put back."""
    flags = [(module, module.training) for module in model.modules()]
    device_type = sharding.device_of(model.get_input_embeddings()).type
    try:
        model.eval()
        with (
            without_leftovers(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_type, enabled=False),
        ):
            yield
    finally:
        for module, flag in flags:
            module.training = flag
