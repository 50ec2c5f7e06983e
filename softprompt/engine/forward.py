"""The functional form: a causal LM, prompts and a padded batch, without PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from softprompt.engine import families, sharding
from softprompt.engine.answers import text_rows
from softprompt.engine.batch import Batch, check_batch
from softprompt.engine.families import CausalLM
from softprompt.engine.graphs import StepGraphs, room_of
from softprompt.engine.head import own_logits
from softprompt.engine.lazy import LazyLogits, in_this_mode, with_gradient
from softprompt.engine.packed import HiddenRows, packed_layout, rows_of_layout
from softprompt.engine.plan import Plan, plan_for
from softprompt.engine.recorded import loss_of_hidden
from softprompt.engine.recorders import first_line
from softprompt.engine.stock import stock_forward
from softprompt.engine.token_scores import token_scores
from softprompt.layout import PackedLayout, raise_out_of_range
from softprompt.ops.library import AUTO, BACKENDS
from softprompt.ops.linear_cross_entropy import check_num_items
from softprompt.warn import warn

ON_UNSUPPORTED = ("fallback", "error")
POSITIONS = ("padded", "compact")


class UnsupportedModelError(RuntimeError):
    """With `on_unsupported="error"`: a model or a call that only its stock forward can serve."""


def forward(
    model: CausalLM,
    prompts: Tensor | Sequence[Tensor],  # [P, H], or K of [P_k, H]
    input_ids: Tensor | None = None,  # [B, L]
    attention_mask: Tensor | None = None,  # [B, L]
    labels: Tensor | None = None,  # [B, L]
    prompt_of_row: Tensor | Sequence[int] | None = None,  # [B]
    *,
    inputs_embeds: Tensor | None = None,  # [B, L, H]
    num_items_in_batch: int | Tensor | None = None,
    positions: str = "padded",
    on_unsupported: str = "fallback",
    backend: str = AUTO,
    cuda_graphs: bool = True,
) -> CausalLMOutputWithPast:
    """The loss of a batch behind soft prompts: `CE(model([prompt_of_row(b) | text_b]), labels_b)` over all
    rows b.

    The loss is that of transformers: the label of column c is predicted by column c - 1, that of column 0 by
    the prompt's last row; labels of -100 do not count; the mean over labels, or their sum over
    `num_items_in_batch`.

    Args:
        model: any transformers causal LM; its weights may be frozen or not.
        prompts: one prompt [P, H], or K prompts of any lengths; fp32 as a rule. Gradients arrive in their
            dtype.
        input_ids: [B, L] integers, without the prompt.
        attention_mask: [B, L], 0 = pad, any padding side. None: no pads.
        labels: [B, L] integers, -100 = no label. None: no loss.
        prompt_of_row: [B], the number of the prompt of each row; a list is best, since a tensor on a GPU is
            read back. None: prompt 0 (only with one prompt).
        inputs_embeds: [B, L, H] instead of `input_ids`.
        num_items_in_batch: what the summed loss is divided by (gradient accumulation).
        positions: "padded": as in a padded batch `[prompt | text]`, so equal to PEFT; "compact": pads do not
            exist, so equal to each row alone without padding.
        on_unsupported: "fallback": a model that has no fast route runs on its own forward, with a warning;
            "error": UnsupportedModelError.
        backend: "auto" or the name of a back end of the ops.
        cuda_graphs: on a GPU, record a training step as one CUDA graph when its size comes the second time,
            and replay it afterwards.

    Returns:
        CausalLMOutputWithPast with `loss` (None without labels; 0 with a zero gradient where no label counts)
        and `logits` [B, P + L, V], which are computed when something first uses them (P: the longest prompt).

    Raises:
        TypeError: not a transformers causal LM, or a PEFT model that brings a prompt of its own.
        IndexError: an id or a label outside the vocabulary; names row, column and value.
        ValueError: shapes, dtypes or options that do not fit; says what was given and what is expected.
        UnsupportedModelError: see `on_unsupported`; always for an encoder-decoder, which `patch` serves.
    """
    check_option("positions", positions, POSITIONS)
    check_option("on_unsupported", on_unsupported, ON_UNSUPPORTED)
    check_option("backend", backend, (AUTO, *BACKENDS))
    check_switch("cuda_graphs", cuda_graphs)
    refuse_prompt_model(model, "softprompt.forward")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"softprompt.forward takes decoder-only models, got the encoder-decoder {type(model).__name__}: "
            "softprompt.patch serves it as a PEFT model of task type SEQ_2_SEQ_LM"
        )
    batch = check_batch(
        prompts,
        prompt_width(model),
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        labels=labels,
        prompt_of_row=prompt_of_row,
    )
    plan = plan_for(model, watch=graphs_of(model).watch if cuda_graphs else None)
    compact = positions == "compact"
    longest = max(batch.prompt_lengths) + batch.shape[1]
    rows = sum(batch.prompt_lengths) + batch.shape[0] * batch.shape[1]
    agreed = not sharding.by_fsdp(model) or sharding.all_agree(model, plan.choice)
    obstacle = obstacle_to(plan, compact=compact, longest=longest, rows=rows)
    obstacle = obstacle or (None if agreed else sharding.DISAGREE)
    if obstacle is not None:
        without_stock = compact or len(set(batch.prompt_lengths)) > 1 or sharding.embeds_in_parts(model)
        if on_unsupported == "error" or without_stock:
            raise UnsupportedModelError(obstacle)
        warn(obstacle)
        raise_out_of_range(batch.input_ids, batch.labels, families.vocab_size(model))
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        output = stock_forward(model, batch, **extra)
        if not hasattr(output, "loss") or not hasattr(output, "logits"):
            raise TypeError(
                f"softprompt.forward takes a causal language model, got {type(model).__name__}, whose "
                "forward gives no loss and logits"
            )
        return CausalLMOutputWithPast(loss=output.loss, logits=output.logits)
    loss, logits = run_plan(
        model,
        plan,
        batch,
        compact=compact,
        num_items=num_items_in_batch,
        backend=backend,
        graphs=graphs_of(model) if cuda_graphs else None,
    )
    return CausalLMOutputWithPast(loss=loss, logits=logits)


_GRAPHS = "_softprompt_graphs"


def graphs_of(model: CausalLM) -> StepGraphs:
    """The recorded steps of the functional form.

    The model holds them: they look at its hooks, which may hold the model, and would keep it alive.
    """
    known = model.__dict__.get(_GRAPHS)
    if known is None or not known.are_of(model):
        known = model.__dict__[_GRAPHS] = StepGraphs(model)
    return cast(StepGraphs, known)


def check_option(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_switch(name: str, value: bool) -> None:
    """Raises ValueError unless `value` is True or False: a text, as "False", would count as True."""
    if not isinstance(cast(object, value), bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def obstacle_to(plan: Plan, *, compact: bool, longest: int = 0, rows: int = 0) -> str | None:
    """Why a call cannot take the plan's fast route, as a sentence, or None.

    Args:
        plan: of the model.
        compact: whether pads are left out of the positions.
        longest: prompt and padded text of the call, in tokens.
        rows: all prompts and padded texts of the call, in tokens.
    """
    if plan.route == "stock":
        return f"the model's own forward is used: {plan.reason}"
    if compact and plan.route != "packed":
        return f'positions="compact" needs the packed route: {plan.reason}'
    if plan.rotary_switch is not None and longest > plan.rotary_switch and not compact:
        return (
            f"the model's rotary embedding changes beyond {plan.rotary_switch} positions, and in a padded "
            f"batch of {longest} pads count for that"
        )
    if plan.row_limit is not None and rows > plan.row_limit:
        return (
            f"the model scales its attention by the place in the row, from {plan.row_limit} rows on, and the "
            f"prompts and texts of this batch may take {rows}"
        )
    return None


def refuse_prompt_model(model: CausalLM, function: str) -> None:
    """Raises TypeError for a PEFT model with a prompt, which would stand behind those of the call."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise TypeError(
            f"{function} takes a language model and prompts, got a {type(model).__name__} that has a prompt "
            "itself: give model.get_base_model(), or call the model after softprompt.patch(model)"
        )


def prompt_width(model: CausalLM) -> int:
    """H of the embeddings that stand beside the prompt.

    Raises:
        TypeError: not a transformers model.
    """
    if not isinstance(cast(object, model), nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"expected a transformers language model, got {type(model).__name__}")
    embedding = model.get_input_embeddings()
    width = getattr(embedding, "embedding_dim", None)
    if width is None:
        weight = getattr(embedding, "weight", None)
        width = weight.shape[1] if isinstance(weight, Tensor) else families.config_of(model).hidden_size
    return int(width)


def run_plan(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    *,
    compact: bool = False,
    num_items: int | float | Tensor | None = None,
    backend: str = AUTO,
    graphs: StepGraphs | None = None,
    logits: str = "full",
    columns: int = 0,
) -> tuple[Tensor | None, LazyLogits]:
    """Loss (None without labels) and lazy logits of a batch on a plan's fast route.

    Args:
        model: the causal LM.
        plan: of the model.
        batch: prompts, texts and labels.
        compact: ignore pads in positions and windows (packed route only).
        num_items: see `loss_of_rows`.
        backend: of the ops.
        graphs: records training steps of the packed route and replays them.
        logits: "full": [B, P + L, V]; else [B, columns, V], see `text_rows`.
        columns: of the texts that the user gave.
    """
    check_num_items(num_items)

    def run() -> tuple[Tensor | None, LazyLogits]:
        return _run_plan(
            model, plan, batch, compact, num_items, backend, graphs=graphs, logits=logits, columns=columns
        )

    return sharding.inside(model, run)


def _run_plan(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    compact: bool,
    num_items: int | float | Tensor | None,
    backend: str,
    *,
    graphs: StepGraphs | None,
    logits: str,
    columns: int,
) -> tuple[Tensor | None, LazyLogits]:
    if plan.route == "packed":
        loss, rows = packed_step(model, plan, batch, compact, num_items, backend, graphs)
    else:
        rows = plan.run(model, batch, compact=compact, backend=backend)
        loss = None if batch.labels is None else loss_of_hidden(model, plan, rows, num_items, backend)
    if loss is not None and rows.num_labels == 0:
        warn_of_no_labels()
    lazy = _lazy_logits(model, plan, rows, logits, columns)
    if not torch.is_grad_enabled() and sharding.by_fsdp(model):
        lazy.materialize()  # later only all ranks together could; one that looks alone would wait
    return loss, lazy


def warn_of_no_labels() -> None:
    """Warns that a batch without labels has no loss."""
    warn(
        "every label of this batch is -100; the loss is 0 and so is its gradient "
        "(a mean over no labels would be NaN and destroy the prompt)"
    )


def packed_step(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    compact: bool,
    num_items: int | float | Tensor | None,
    backend: str,
    graphs: StepGraphs | None,
) -> tuple[Tensor | None, HiddenRows]:
    """Loss (None without labels) and hidden rows of a packed batch, replayed where that can be."""
    # Whatever the host has to think about comes before it waits for the layout's counts.
    mode = None if graphs is None else graphs.mode_of(plan, batch)
    layout = packed_layout(
        model,
        batch,
        positions="compact" if compact else plan.positions,
        position_limit=plan.position_limit,
        backend=backend,
        **({} if mode is None else room_of(batch)._asdict()),
    )
    if graphs is not None and mode is not None:
        step = graphs.step(plan, batch, layout, mode, num_items=num_items, backend=backend)
        if step is not None:
            return step
    rows = _rows_compiled_or_not(model, plan, batch, layout, backend, graphs)
    if batch.labels is None:
        return None, rows
    return loss_of_hidden(model, plan, rows, num_items, backend), rows


def run_token_scores(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    *,
    compact: bool,
    backend: str,
    graphs: StepGraphs | None,
    arguments: dict[str, Any],
) -> Any:
    """What TRL's head says of a batch on a plan's fast route; see `token_scores`. Steps are not recorded."""
    if plan.route == "packed":
        positions = "compact" if compact else plan.positions
        layout = packed_layout(
            model, batch, positions=positions, position_limit=plan.position_limit, backend=backend
        )
        rows = _rows_compiled_or_not(model, plan, batch, layout, backend, graphs)
    else:
        rows = plan.run(model, batch, compact=compact, backend=backend)
    return token_scores(model, batch, rows, compact=compact, arguments=arguments)


def _rows_compiled_or_not(
    model: CausalLM,
    plan: Plan,
    batch: Batch,
    layout: PackedLayout,
    backend: str,
    graphs: StepGraphs | None,
) -> HiddenRows:
    call_body = graphs.call_body() if graphs is not None else None
    if graphs is not None and call_body is not None:
        try:
            return rows_of_layout(
                model, batch, layout, seam=str(plan.seam), backend=backend, call_body=call_body
            )
        except Exception as error:  # compilers fail in many ways; the plain decoder decides whose fault it is
            rows = rows_of_layout(model, batch, layout, seam=str(plan.seam), backend=backend)
            reason = f"torch.compile of the decoder failed, it runs as it is: {first_line(error)}"
            graphs.give_up_compiling(reason)
            warn(reason)
            return rows
    return rows_of_layout(model, batch, layout, seam=str(plan.seam), backend=backend)


def _lazy_logits(model: CausalLM, plan: Plan, rows: HiddenRows, which: str, columns: int) -> LazyLogits:
    def values_of(hidden: Tensor) -> Tensor:
        placed = rows.padded(hidden) if which == "full" else text_rows(rows, hidden, which, columns)
        return own_logits(model, placed, rows.output_class)

    num_rows, width = rows.padded_shape
    shape = (num_rows, width if which == "full" else columns, plan.vocab_size)
    # The mixed precision of FSDP2 gathers weights in another dtype than they have.
    dtype = rows.hidden.dtype if sharding.by_fsdp(model) else plan.logits_dtype
    return logits_of(rows.hidden, values_of, shape, dtype, casts=plan.autocast_logits)


def logits_of(
    hidden: Tensor,
    values_of: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    added: torch.dtype | None = None,
    casts: bool = True,
) -> LazyLogits:
    """Lazy logits, with the gradient of `hidden` and the autocast of now.

    Args:
        hidden: what they are made of.
        values_of: makes them.
        shape: of the logits.
        dtype: of the logits without autocast.
        added: dtype of what the model adds to the product with its head, which autocast leaves alone.
        casts: whether the logits follow autocast.
    """
    device_type = hidden.device.type
    casts = casts and dtype in (torch.float32, torch.float16, torch.bfloat16)
    if casts and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        dtype = dtype if added is None else torch.promote_types(dtype, added)
    in_mode = in_this_mode(values_of, device_type)
    return with_gradient(hidden, in_mode, lambda: in_mode(hidden), shape, dtype)
