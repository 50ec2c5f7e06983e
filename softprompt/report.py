"""`explain`: what a model's patch does, why, and what would make it faster."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM, PeftType
from torch import nn

from softprompt.eligibility import adapter_obstacle
from softprompt.engine import Plan, model_spec, sharding
from softprompt.engine.attention import attention_backend
from softprompt.engine.attention_overrides import runs_the_op
from softprompt.engine.encoder_decoder import early_end_obstacle
from softprompt.engine.fused_modules import describe as describe_fusion
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.trl_head import scores_tokens
from softprompt.generation.prefill import describe, prefill_for
from softprompt.nesting import base_of
from softprompt.ops.registry import AUTO, PREFERRED, availability, choose_backend, triton_availability
from softprompt.ops.shared_prompt_attention.api import usual_backend
from softprompt.prompt_encoders import has_tasks, unshared
from softprompt.state import PatchState, plan_of, state_of

_OPS_OF_ROUTE = {
    "packed": ("pack_layout", "embed_prompt", "shared_prompt_attention", "linear_cross_entropy"),
    "padded": ("prepend_prompt", "linear_cross_entropy"),
    "stock": (),
}

_SERVED = (PeftModelForCausalLM, PeftModelForSeq2SeqLM)

_ATTENTION = {
    "triton": "kernels for heads of up to 256; SDPA for wider ones, fp64 and dropout",
    "native": "compiled for the CPU; SDPA under dropout",
    "sdpa": "PyTorch's SDPA on gathered texts",
    "reference": "dense, in fp32 or better",
}


@dataclass(frozen=True)
class Report:
    """What `explain` found; `print(report)` is meant for people."""

    model: str
    patched: bool
    route: str  # "packed", "padded" or "stock"
    reason: str
    details: tuple[tuple[str, str], ...]
    backends: tuple[tuple[str, str, str], ...]  # op, back end, why
    rejected: tuple[str, ...]  # candidates that failed the self-check
    fallbacks: tuple[tuple[str, int], ...]  # reason, calls so far
    advice: tuple[str, ...]  # what would make it faster

    def __str__(self) -> str:
        """Some lines of text."""
        lines = [f"softprompt on {self.model}", f"  route: {self.route} ({self.reason})"]
        if not self.patched:
            lines.append("  not patched: softprompt.patch(model) would take this route")
        lines += [f"  {name}: {text}" for name, text in self.details]
        for title, rows in (
            ("back ends", [f"{op}: {backend} ({why})" for op, backend, why in self.backends]),
            ("rejected before", list(self.rejected)),
            ("calls on PEFT's own forward", [f"{count} x {reason}" for reason, count in self.fallbacks]),
            ("what would make it faster", list(self.advice)),
        ):
            if rows:
                lines.append(f"  {title}:")
                lines += [f"    - {row}" for row in rows]
        return "\n".join(lines)


def explain(model: CausalLM) -> Report:
    """Which route a model takes and why, the back end of each op, the fallbacks so far, and advice.

    Args:
        model: a PEFT model, patched or not, or a transformers causal LM (for `softprompt.forward`).

    Returns:
        A Report; print it. A model that was not looked at before runs the self-check first.

    Raises:
        TypeError: not a model.
    """
    if not isinstance(cast(object, model), nn.Module):
        raise TypeError(f"softprompt.explain takes a model, got {type(model).__name__}")
    state = state_of(model)
    base = base_of(model)
    plan = plan_of(model)
    refusal = state.refusal if state is not None else None
    if refusal is None and isinstance(model, _SERVED):
        refusal = adapter_obstacle(model, [model.active_adapter], as_forward=True)
    route, reason = ("stock", refusal) if refusal else (plan.route, plan.reason)
    device = _device_of(base)
    backend = state.options.backend if state is not None else AUTO
    details = (*_prompts(model, state), *_details(base, plan, state)) if route != "stock" else ()
    return Report(
        model=f"{type(base).__name__} ({', '.join([*_dtype_of(base), str(device)])})",
        patched=state is not None,
        route=route,
        reason=reason,
        details=(*details, *_generate(model, base, plan, refusal)),
        backends=_backends(route, plan, backend, device),
        rejected=plan.rejected if route != "stock" else (),
        fallbacks=tuple(state.fallbacks.items()) if state is not None else (),
        advice=_advice(base, plan, route, device.type),
    )


def _device_of(base: CausalLM) -> torch.device:
    """Where the texts are embedded; the first weight's where the model names no embedding."""
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    if isinstance(embedding, nn.Module):
        return sharding.device_of(embedding)
    weight = next(base.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def _dtype_of(base: nn.Module) -> list[str]:
    """Of the first weight. Copies of nn.DataParallel have none."""
    return [str(weight.dtype) for weight in itertools.islice(base.parameters(), 1)]


def _prompts(model: CausalLM, state: PatchState | None) -> tuple[tuple[str, str], ...]:
    """What stands in front of the texts of a PEFT model."""
    if not isinstance(model, _SERVED):
        return ()
    name = str(model.active_adapter)
    config: Any = model.peft_config[name]
    text = f"{config.num_virtual_tokens} virtual tokens of {name!r} ({PeftType(config.peft_type).value})"
    if has_tasks(model, name):
        text += f", one prompt for each of {config.num_tasks} tasks (task_ids)"
    options = None if state is None else state.options
    if options is not None and options.placement == "after_bos":
        text += ", behind the BOS token of each text"
    why = unshared(model, [name])
    if why is not None:
        text += f", one for each row: {why}"
    rows = [("prompt", text)]
    if options is not None and options.logits != "full" and isinstance(model, PeftModelForCausalLM):
        rows.append(("logits", f"[B, L, V], without the prompt's ({options.logits!r})"))
    return tuple(rows)


def _details(base: CausalLM, plan: Plan, state: PatchState | None) -> tuple[tuple[str, str], ...]:
    positions = state.options.positions if state is not None else "padded"
    obstacle = model_spec.embedding_obstacle(base.get_input_embeddings())
    layout = ("positions", f"{positions} ({plan.positions} in the padded layout)")
    if plan.encoder_decoder:
        pads = "dropped at the end" if plan.trims else f"kept: {plan.kept_because}"
        layout = ("columns that are pads in all rows", pads)
    rows = [
        ("attention", f"{plan.seam} seam" if plan.seam else "the model's own"),
        layout,
        ("embedding", "read from its table" if obstacle is None else f"called as a module: {obstacle}"),
        (
            "head",
            "fused: the loss reads its weight on label rows"
            if plan.fused_head
            else f"the model's own head on label rows: {plan.head_reason}",
        ),
    ]
    if scores_tokens(base):
        rows.append(("TRL's fused head", "called with the label rows of the packed row; not recorded"))
    if plan.encoder_decoder:
        rows += _left_out(base, plan)
    if plan.route == "packed":
        rows += _fused(plan, state)
    if plan.route == "packed" and state is not None:
        rows += _recording(state)
    if plan.loss_error is not None and plan.grad_error is not None:
        rows.append(
            (
                "self-check",
                f"loss off by {plan.loss_error:.1e}, prompt gradient by {plan.grad_error:.1e} "
                "relative to the stock forward",
            )
        )
    return tuple(rows)


def _left_out(base: CausalLM, plan: Plan) -> list[tuple[str, str]]:
    """What an encoder-decoder does not compute of its columns."""
    kept = early_end_obstacle(base, plan)
    early = "left out of the decoder where a call gives labels alone; their logits are made when looked at"
    rows = [("columns behind the last label", early if kept is None else f"kept: {kept}")]
    if plan.trims and model_spec.dropout_of(base):
        rows.append(("dropout", "columns that are left out draw no masks (same expectation, other numbers)"))
    return rows


def _generate(model: Any, base: CausalLM, plan: Plan, refusal: str | None) -> list[tuple[str, str]]:
    """How `generate` of a PEFT model is served."""
    if isinstance(model, PeftModelForSeq2SeqLM):
        return [("generate", "PEFT's own: the encoder runs once for a call, prompt included")]
    if not isinstance(model, PeftModelForCausalLM):
        return []
    refusal = refusal or adapter_obstacle(model, [model.active_adapter])
    if refusal is None and sharding.offloads(base):
        refusal = sharding.BROUGHT
    return [("generate", f"PEFT's own: {refusal}" if refusal else describe(prefill_for(base, plan)))]


def _recording(state: PatchState) -> list[tuple[str, str]]:
    """What became of the training steps so far."""
    rows = []
    graphs = None if state.runner is None else state.runner.graphs
    if not state.options.cuda_graphs:
        rows.append(("step graph", "off (cuda_graphs=False)"))
    elif graphs is None or not graphs.were_asked:
        rows.append(("step graph", "no training step yet"))
    else:
        count = graphs.statistics
        text = f"{len(graphs)} recorded, {count.replayed} steps replayed, {count.eager} not yet worth it"
        if count.dropped:
            text += f", {count.dropped} dropped"
        rows.append(("step graph", text if graphs.obstacle is None else f"no: {graphs.obstacle}"))
    if state.options.compile:
        obstacle = None if graphs is None else graphs.compile_obstacle
        rows.append(("torch.compile", obstacle or "the decoder of training steps"))
    return rows


def _fused(plan: Plan, state: PatchState | None) -> list[tuple[str, str]]:
    if state is not None and not state.options.fused:
        return [("fused modules", "none: patch(fused=False)")]
    if state is not None and state.options.compile:
        return [("fused modules", "left to torch.compile")]
    fused, left = describe_fusion(plan.fusion)
    return [("fused modules", fused or "none"), *([("not fused", left)] if left else [])]


def _backends(route: str, plan: Plan, backend: str, device: torch.device) -> tuple[tuple[str, str, str], ...]:
    rows = []
    for op in (*_OPS_OF_ROUTE[route], *plan.fusion.ops):
        if op == "shared_prompt_attention":
            if plan.seam is not None and runs_the_op(plan.seam):
                chosen = attention_backend(backend, device)
                if chosen == AUTO:
                    chosen = usual_backend(device.type)
                rows.append((op, chosen, _ATTENTION[chosen]))
            continue
        if op == "linear_cross_entropy" and not plan.fused_head:
            continue
        chosen = choose_backend(op, backend, device)
        rows.append((op, chosen, _why(chosen, backend, device.type)))
    return tuple(rows)


def _why(chosen: str, asked: str, device_type: str) -> str:
    """Why a back end serves the ops of a device."""
    if asked != AUTO:
        return "asked for"
    missing = [
        availability(name, device_type).reason
        for name in itertools.takewhile(lambda name: name != chosen, PREFERRED.get(device_type, ()))
    ]
    return "; ".join(missing) or "chosen for this device"


def _advice(base: CausalLM, plan: Plan, route: str, device_type: str) -> tuple[str, ...]:
    rows = []
    if route == "stock":
        rows.append("nothing in this version: the reason above is what keeps the packed route away")
        return tuple(rows)
    if plan.seam in ("mask", "dense"):
        rows.append(
            "an attention that dispatches through transformers' AttentionInterface: it needs no [T, T] mask"
        )
    if not plan.fused_head:
        rows.append("a head that is a plain nn.Linear without hooks: its loss then comes from one fused op")
    if not plan.encoder_decoder and model_spec.uses_gradient_checkpointing(model_spec.body_of(base)):
        rows.append(
            "no gradient checkpointing: the packed step needs little memory, and recomputing costs a third"
        )
    dropout = model_spec.dropout_of(base)
    if dropout:
        rows.append(f"dropout off in the frozen model ({', '.join(dropout)}): model.eval() or p = 0")
    if device_type == "cuda" and not triton_availability("cuda").usable:
        rows.append(triton_availability("cuda").reason)
    return tuple(rows)
