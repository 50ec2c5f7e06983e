"""The execution plan of a model: its route, and the facts that running it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from softprompt.engine.batch import Batch
from softprompt.engine.guard import GuardResult
from softprompt.engine.model_spec import CausalLM, DecoderFacts, HeadFacts
from softprompt.engine.overrides import NO_FUSION, Fusion
from softprompt.engine.packed import DecoderOutput, decode_packed, packed_layout
from softprompt.engine.padded import padded_rows
from softprompt.layout import PackedLayout
from softprompt.ops.registry import AUTO

# What positions count (see `pack_layout`): columns of the padded batch, its tokens that are no pads, or
# tokens where pads do not exist.
Positions = Literal["slots", "mask", "compact"]


@dataclass(frozen=True)
class Plan:
    """The route of one model, and why."""

    route: str  # "packed", "padded" or "stock"
    reason: str  # one sentence
    seam: str | None = None  # packed: how the attention gets in
    positions: Positions = "slots"  # packed: what the model counts under left padding
    fusion: Fusion = NO_FUSION  # packed: modules that can run as one op
    fused_head: bool = False  # linear_cross_entropy reads the head's weight
    head_reason: str | None = None  # why not
    position_limit: int | None = None
    loss_error: float | None = None  # of the self-check, relative to the reference forward
    grad_error: float | None = None
    rejected: tuple[str, ...] = ()  # candidates that came before, and what was wrong with each
    output_class: type = CausalLMOutputWithPast  # of the model's own forward
    logits_dtype: torch.dtype = torch.float32  # of the model's own forward, without autocast
    autocast_logits: bool = True  # under autocast the logits have its dtype
    vocab_size: int = 0  # width of its logits
    rotary_switch: int | None = None  # see `model_spec.rotary_switch`
    row_limit: int | None = None  # see `model_spec.row_limit`
    encoder_decoder: bool = False  # what follows is of encoder-decoders
    logit_scale: float | None = None  # of the decoder's hidden states in front of the head
    counts_items: bool = False  # the model's loss is divided by num_items_in_batch
    kept_because: str | None = None  # why columns that no row uses are kept; None: they are dropped
    # Decoder-only models: what a step asks of the model, and the state of the model that this is of.
    facts: DecoderFacts | None = field(default=None, compare=False, repr=False)
    state: GuardResult | None = field(default=None, compare=False, repr=False)

    @property
    def head(self) -> HeadFacts | None:
        """The head that `linear_cross_entropy` computes from its weight, None where the head is called."""
        return self.known_facts.head if self.fused_head else None

    @property
    def known_facts(self) -> DecoderFacts:
        """The facts of a model that has a fast route.

        Raises:
            ValueError: it has none.
        """
        if self.facts is None:
            raise ValueError(f"this model has no fast route: {self.reason}")
        return self.facts

    @property
    def choice(self) -> tuple[Any, ...]:
        """What ranks have to agree on; the errors of their self-checks may differ in the last digits."""
        return self.route, self.seam, self.positions, self.fused_head

    @property
    def trims(self) -> bool:
        """Whether columns that no row uses are dropped."""
        return self.encoder_decoder and self.kept_because is None

    def layout_positions(self, compact: bool) -> Positions:
        """The positions of a packed layout: the model's own, or those of rows whose pads do not exist."""
        return "compact" if compact else self.positions

    def layout(self, batch: Batch, *, compact: bool = False, **options: Any) -> PackedLayout | None:
        """The packed layout of a batch, None on the padded route.

        Args:
            batch: prompts, texts and labels.
            compact: ignore pads in positions and windows (packed route only).
            options: for `packed_layout`.
        """
        if self.route != "packed":
            return None
        return packed_layout(
            batch,
            vocab_size=self.known_facts.vocab_size,
            positions=self.layout_positions(compact),
            position_limit=self.position_limit,
            **options,
        )

    def decode(
        self,
        model: CausalLM,
        batch: Batch,
        layout: PackedLayout | None,
        *,
        backend: str = AUTO,
        **options: Any,
    ) -> DecoderOutput:
        """The decoder's hidden states of a batch with its layout.

        Args:
            model: the decoder-only model that the plan was made for.
            batch: prompts, texts and labels.
            layout: see `layout`.
            backend: of the ops.
            options: for `decode_packed`.
        """
        facts = self.known_facts
        if layout is None and self.route == "padded":
            return padded_rows(model, batch, facts, position_limit=self.position_limit, backend=backend)
        if layout is None or self.seam is None:
            raise ValueError(f"this model has no fast route: {self.reason}")
        return decode_packed(model, batch, layout, facts, seam=self.seam, backend=backend, **options)
