"""The functional form: a causal LM, prompts and a padded batch, without PEFT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from softprompt.engine import model_spec, sharding
from softprompt.engine.batch import (
    ON_UNSUPPORTED,
    POSITIONS,
    check_batch,
    check_option,
    check_switch,
    refuse_prompt_model,
)
from softprompt.engine.model_spec import CausalLM, prompt_width
from softprompt.engine.runner import ModelRunner, RunOptions, UnsupportedModelError, obstacle_to, runner_of
from softprompt.engine.self_check import reference_forward
from softprompt.layout import raise_out_of_range
from softprompt.ops.registry import AUTO, BACKENDS
from softprompt.warn import warn


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
    options = RunOptions(positions, backend)
    runner = runner_of(model) if cuda_graphs else ModelRunner(model, cuda_graphs=False)
    early = runner.begin(lambda: batch, options, num_items_in_batch)
    plan, compact = runner.plan(), options.compact
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
        raise_out_of_range(batch.input_ids, batch.labels, model_spec.vocab_size(model))
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        output = reference_forward(model, batch, **extra)
        if not hasattr(output, "loss") or not hasattr(output, "logits"):
            raise TypeError(
                f"softprompt.forward takes a causal language model, got {type(model).__name__}, whose "
                "forward gives no loss and logits"
            )
        return CausalLMOutputWithPast(loss=output.loss, logits=output.logits)
    loss, logits = runner.run(plan, batch, options, num_items=num_items_in_batch, early=early)
    return CausalLMOutputWithPast(loss=loss, logits=logits)
