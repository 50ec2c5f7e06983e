"""The packed forward, in the order of the data: batch -> layout -> embeddings -> hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from softprompt.engine import model_spec, sharding
from softprompt.engine.attention_overrides import AttentionContext, packed_attention
from softprompt.engine.batch import Batch
from softprompt.engine.model_spec import CausalLM, DecoderFacts
from softprompt.layout import PackedLayout, build_layout
from softprompt.ops.embed_prompt import embed_prompt
from softprompt.ops.registry import AUTO


@dataclass(frozen=True, eq=False)
class DecoderOutput:
    """What the decoder made of a batch, before any logit."""

    hidden: Tensor  # [T, H] normed hidden states
    label_rows: Tensor  # [M]
    label_targets: Tensor  # [M]
    num_labels: int
    layout: PackedLayout | None  # None: hidden is the flattened padded [B, P + L, H]
    padded_shape: tuple[int, int]  # B, P + L
    output_class: type  # of the decoder
    prompt_of_row: Tensor | None = None  # [B]; None: of the layout, or prompt 0

    def prompt_of_label(self) -> Tensor:
        """[M] int64: the prompt that stands in front of each label, dummies left out."""
        if self.layout is not None:
            return self.layout.prompt_of_label()
        row = self.label_rows[: self.num_labels].long() // self.padded_shape[1]
        return torch.zeros_like(row) if self.prompt_of_row is None else self.prompt_of_row.long()[row]

    def padded(self, hidden: Tensor) -> Tensor:
        """Rows like `hidden` as [B, P + L, H]; zero at pads that were not computed."""
        if self.layout is not None:
            return self.layout.scatter_rows(hidden)
        return hidden.view(*self.padded_shape, hidden.shape[1])


def packed_layout(
    batch: Batch,
    *,
    vocab_size: int,
    positions: str,
    position_limit: int | None,
    backend: str = AUTO,
    **room: int,
) -> PackedLayout:
    """The layout of a batch; the host waits here, and nowhere else in a step.

    Args:
        batch: prompts, texts and labels.
        vocab_size: V, for the check of ids and labels.
        positions: see `pack_layout`.
        position_limit: length of the model's position table, None where there is none.
        backend: of `pack_layout`.
        room: buckets and capacities of `build_layout`.

    Raises:
        IndexError: an id or a label outside the vocabulary.
        ValueError: prompt and text are longer than the position table.
    """
    check_length(batch, positions, position_limit)
    layout = build_layout(
        batch.attention_mask,
        batch.prompt_lengths,
        labels=batch.wanted if batch.labels is None else batch.labels,
        input_ids=batch.input_ids,
        prompt_of_row=batch.prompt_of_row,
        vocab_size=vocab_size,
        positions=positions,
        backend=backend,
        **room,
    )
    if position_limit is not None and layout.longest_context > position_limit:
        # Predictors are counted but have no position; only an input this long is looked at again.
        longest = max(batch.prompt_lengths) + int((batch.attention_mask != 0).sum(1).max())
        if longest > position_limit:
            raise_too_long(longest, position_limit)
    return layout


def decode_packed(
    model: CausalLM,
    batch: Batch,
    layout: PackedLayout,
    facts: DecoderFacts,
    *,
    seam: str,
    examine: bool = False,
    backend: str = AUTO,
    call_body: Callable[..., Any] | None = None,
) -> DecoderOutput:
    """Runs the decoder once over a batch that has its layout. Reads nothing back from the device.

    Args:
        model: the causal LM.
        batch: prompts and texts.
        layout: which packed token is what.
        facts: of the model as it is now.
        seam: how the attention gets in, see `attention_overrides`.
        examine: look at the model's mask functions too (self-check).
        backend: of the ops.
        call_body: the decoder as something else calls it (`torch.compile`); None: as it is.
    """
    body = model_spec.body_of(model)
    embeds = embed_rows(model.get_input_embeddings(), batch, layout, backend, readable=facts.reads_embedding)
    context = AttentionContext(layout, facts, backend, examine)
    if facts.uses_gradient_checkpointing(body) and torch.is_grad_enabled():
        output_class: list[type] = []
        hidden = _RecomputingBody.apply(embeds, body, seam, context, output_class)
        return _rows(hidden, layout, output_class[0])
    output = run_body(body, seam, context, embeds, call_body)
    return _rows(output.last_hidden_state, layout, type(output))


def check_length(batch: Batch, positions: str, position_limit: int | None) -> None:
    """Raises ValueError where the padded layout does not fit the model's position table."""
    longest = max(batch.prompt_lengths) + batch.shape[1]
    if position_limit is not None and positions == "slots" and longest > position_limit:
        raise_too_long(longest, position_limit)


def raise_too_long(longest: int, position_limit: int) -> None:
    """Raises the ValueError for an input that reaches beyond the position table."""
    raise ValueError(
        f"prompt and text are {longest} tokens long, but the model has {position_limit} positions: "
        "shorten the texts or the prompt"
    )


def _rows(hidden: Tensor, layout: PackedLayout, output_class: type) -> DecoderOutput:
    num_rows, row_length = layout.batch_shape
    return DecoderOutput(
        hidden.squeeze(0),
        layout.label_rows,
        layout.label_targets,
        layout.num_labels,
        layout,
        (num_rows, max(layout.prompt_lengths) + row_length),
        output_class,
    )


def embed_rows(embedding: Any, batch: Batch, layout: PackedLayout, backend: str, *, readable: bool) -> Tensor:
    """[1, T, H] in the embedding's dtype; `readable`: its table can be read, it need not be called."""
    if batch.input_ids is not None and readable:
        prompts = batch.joined_prompts(embedding.weight.device)
        return embed_prompt(embedding.weight, batch.input_ids, layout.token_index, prompts, backend=backend)
    index = layout.token_index[layout.prompt_tokens :].long()
    if batch.inputs_embeds is not None:
        rows = batch.inputs_embeds.flatten(0, 1)[index.clamp_min(0)]
    elif batch.input_ids is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    elif sharding.has_foreign_hooks(embedding):
        # A hook may look at the shape (NEFTune scales its noise by it): show it the padded batch.
        rows = embedding(batch.input_ids).flatten(0, 1)[index.clamp_min(0)]
    else:
        rows = embedding(batch.input_ids.reshape(-1)[index.clamp_min(0)][None])[0]
    rows = rows.masked_fill((index < 0)[:, None], 0)
    return torch.cat([batch.joined_prompts(rows.device).to(rows.dtype), rows])[None]


def run_body(
    body: nn.Module,
    seam: str,
    context: AttentionContext,
    embeds: Tensor,
    call_body: Callable[..., Any] | None = None,
) -> Any:
    arguments: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False, "return_dict": True}
    if context.facts.takes_position_ids:
        position_ids = context.layout.position_ids
        arguments["position_ids"] = position_ids[position_ids.shape[0] - embeds.shape[1] :].long()[None]
    with packed_attention(body, seam, context) as mask:
        if mask is None:
            # Without any mask transformers would look for packed sequences in the position ids, and find
            # wrong ones.
            mask = torch.ones(1, embeds.shape[1], dtype=torch.bool, device=embeds.device)
        return (body if call_body is None else call_body)(attention_mask=mask, **arguments)


class _RecomputingBody(torch.autograd.Function):
    """The decoder under gradient checkpointing.

    Its layers are recomputed in the backward pass, when the packed attention has long been put back. So the
    decoder's own graph is kept inside this node, and its backward runs under the packed attention again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeds: Tensor,
        body: nn.Module,
        seam: str,
        context: AttentionContext,
        output_class: list[type],
    ) -> Tensor:
        ctx.inner = embeds.detach().requires_grad_(embeds.requires_grad)
        with torch.enable_grad():
            output = run_body(body, seam, context, ctx.inner)
        ctx.hidden, ctx.again = output.last_hidden_state, (body, seam, context)
        output_class.append(type(output))
        hidden: Tensor = output.last_hidden_state.detach()
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.hidden is None:
            raise RuntimeError(
                "the packed forward was already freed by a backward; pass retain_graph=True to the first one"
            )
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        body, seam, context = ctx.again
        # Modules may have been given other configurations since.
        facts = replace(context.facts, attention_configs=tuple(model_spec.attention_configs(body)))
        with packed_attention(body, seam, replace(context, facts=facts)):
            torch.autograd.backward(ctx.hidden, grads[0], retain_graph=keep)
        grad, ctx.inner.grad = ctx.inner.grad, None
        if not keep:
            ctx.hidden = None
        return grad, None, None, None, None
