"""One base model, and how batches are run on it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from softprompt.engine import sharding
from softprompt.engine.batch import Batch
from softprompt.engine.cuda_graph import first_line
from softprompt.engine.lazy_logits import LazyLogits, logits_of
from softprompt.engine.logits_layout import text_rows
from softprompt.engine.losses import (
    LossWeights,
    label_losses,
    own_logits,
    warn_of_no_labels,
    weighted_sum,
)
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.packed import DecoderOutput
from softprompt.engine.plan import Plan, plan_for
from softprompt.engine.step_graph import EarlyStep, Step, StepGraphs, room_of
from softprompt.engine.trl_head import token_scores
from softprompt.layout import PackedLayout
from softprompt.ops.linear_cross_entropy import check_num_items
from softprompt.ops.registry import AUTO
from softprompt.warn import warn


class UnsupportedModelError(RuntimeError):
    """With `on_unsupported="error"`: a model or a call that only its stock forward can serve."""


@dataclass(frozen=True)
class RunOptions:
    """How a batch is to be run."""

    positions: str = "padded"  # or "compact": pads do not exist in positions and windows
    backend: str = AUTO  # of the ops
    logits: str = "full"  # [B, P + L, V]; else [B, L, V], see `text_rows`

    @property
    def compact(self) -> bool:
        """Whether pads are left out of the positions."""
        return self.positions == "compact"


class GroupLosses(NamedTuple):
    """What `ModelRunner.group_losses` found."""

    total: Tensor  # [] the sum of the groups' losses, differentiable
    each: Tensor  # [K] the losses of the G groups, detached, then zeros
    num_labels: int  # of all groups


class ModelRunner:
    """Runs batches on one base model: its plan, its recorded steps, its compiled decoder.

    Args:
        model: the causal LM; not kept alive.
        cuda_graphs: whether to record training steps.
        compile: run the decoder of training steps through `torch.compile`.
        fused: run as one op what modules write out as many; a compiler does that itself.
    """

    def __init__(
        self, model: CausalLM, *, cuda_graphs: bool = True, compile: bool = False, fused: bool = True
    ) -> None:
        self._model = weakref.ref(model)
        self._fused = fused and not compile
        self.graphs = StepGraphs(model, cuda_graphs=cuda_graphs, compile=compile)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None in copies and files of the model: it counts for this instance alone."""
        return type(None), ()

    def is_of(self, model: CausalLM) -> bool:
        """Whether it runs this very model."""
        return self._model() is model

    @property
    def model(self) -> CausalLM:
        """The causal LM."""
        return cast(CausalLM, self._model())

    def plan(self, *, sharded: bool = False) -> Plan:
        """The execution plan of the model as it is now.

        Args:
            sharded: whether FSDP2 has sharded it together with something around it.
        """
        return plan_for(self.model, sharded=sharded, fused=self._fused)

    # ------------------------------------------------------------------------------------------ what it gives
    def begin(
        self,
        batch_of: Callable[[], Batch | None],
        options: RunOptions,
        num_items: int | float | Tensor | None = None,
    ) -> EarlyStep | None:
        """Begins the step of a batch before the model is looked at, where the steps before let expect that it
        can be replayed as it was recorded. Nothing of that can be seen until `run` takes it over.

        Args:
            batch_of: makes the batch; None where that would leave a trace.
            options: how to run it.
            num_items: transformers' `num_items_in_batch`.
        """
        if not self.graphs.expects_a_replay:
            return None
        try:
            check_num_items(num_items)
            batch = batch_of()
            if batch is None:
                return None
            weights = LossWeights(num_items)
            return self.graphs.begin(batch, weights, compact=options.compact, backend=options.backend)
        except Exception:  # the call meets it again, unless the model has changed and it takes another way
            return None

    def run(
        self,
        plan: Plan,
        batch: Batch,
        options: RunOptions,
        *,
        num_items: int | float | Tensor | None = None,
        columns: int = 0,
        early: EarlyStep | None = None,
    ) -> tuple[Tensor | None, LazyLogits]:
        """Loss (None without labels) and lazy logits of a batch on the plan's fast route.

        Args:
            plan: of the model.
            batch: prompts, texts and labels.
            options: how to run it.
            num_items: transformers' `num_items_in_batch`.
            columns: L of the texts that the user gave, for `options.logits`.
            early: what `begin` gave for this very call.
        """
        check_num_items(num_items)

        def run() -> tuple[Tensor | None, LazyLogits]:
            step = self._step(plan, batch, options, LossWeights(num_items), early)
            if step.loss is not None and step.rows.num_labels == 0:
                warn_of_no_labels()
            logits = self._lazy_logits(plan, step.rows, options.logits, columns)
            if not torch.is_grad_enabled() and sharding.by_fsdp(self.model):
                logits.materialize()  # later only all ranks together could; one that looks alone would wait
            return step.loss, logits

        return sharding.inside(self.model, run)

    def group_losses(
        self,
        plan: Plan,
        batch: Batch,
        options: RunOptions,
        group_of_prompt: Sequence[int],
        *,
        num_items: int | float | Tensor | None = None,
    ) -> GroupLosses:
        """The loss of each group of prompts, from one forward over all rows.

        Args:
            plan: of the model, on a fast route.
            batch: with labels.
            options: how to run it.
            group_of_prompt: [K] the group of each prompt, from 0.
            num_items: what the summed loss of each group is divided by. None: its labels.

        Returns:
            Losses in fp32 (fp64 for fp64 models); that of a group without labels is 0.
        """
        check_num_items(num_items)
        step = self._step(plan, batch, options, LossWeights(num_items, group_of_prompt))
        if step.loss is None or step.losses is None or step.weights is None:
            raise ValueError("expected labels, got none")
        if step.rows.num_labels == 0:
            warn_of_no_labels()
        return GroupLosses(step.loss, step.weights.losses(step.losses.detach()), step.rows.num_labels)

    def token_scores(self, plan: Plan, batch: Batch, options: RunOptions, arguments: dict[str, Any]) -> Any:
        """What TRL's head says of a batch on the plan's fast route; see `trl_head.token_scores`. Steps
        are not recorded.
        """
        layout = plan.layout(batch, compact=options.compact, backend=options.backend)
        rows = self._decode(plan, batch, layout, options)
        return token_scores(self.model, batch, rows, compact=options.compact, arguments=arguments)

    # -------------------------------------------------------------------------------------------- one step
    def _step(
        self,
        plan: Plan,
        batch: Batch,
        options: RunOptions,
        weights: LossWeights,
        early: EarlyStep | None = None,
    ) -> Step:
        """One forward, replayed where that can be."""
        # Whatever the host has to think about comes before it waits for the layout's counts.
        mode = self.graphs.mode_of(plan, batch)
        begun = None if early is None else self.graphs.taken(early, plan, mode)
        if begun is not None:
            return begun
        layout = None if early is None else early.layout_for(plan)
        if layout is None:
            room = {} if mode is None else room_of(batch)._asdict()
            layout = plan.layout(batch, compact=options.compact, backend=options.backend, **room)
        if mode is not None and layout is not None:
            step = self.graphs.step(plan, batch, layout, mode, weights, options.backend)
            if step is not None:
                return step
        rows = self._decode(plan, batch, layout, options)
        if batch.labels is None:
            return Step(None, None, None, rows)
        losses = label_losses(self.model, rows, plan.head, backend=options.backend)
        of_labels = weights.of_labels(rows)
        values = None if of_labels is None else of_labels.values.to(losses.dtype)
        loss = weighted_sum(losses, rows.label_targets, values, weights.num_items, options.backend)
        return Step(loss, losses, of_labels, rows)

    def _decode(
        self, plan: Plan, batch: Batch, layout: PackedLayout | None, options: RunOptions
    ) -> DecoderOutput:
        """The decoder's hidden states, from its compiled form where that is wanted."""
        decode = functools.partial(plan.decode, self.model, batch, layout, backend=options.backend)
        compiled = self.graphs.call_body()
        if compiled is None or layout is None:
            return decode()
        try:
            return decode(call_body=compiled)
        except Exception as error:  # compilers fail in many ways; the plain decoder decides whose fault it is
            rows = decode()
            reason = f"torch.compile of the decoder failed, it runs as it is: {first_line(error)}"
            self.graphs.give_up_compiling(reason)
            warn(reason)
            return rows

    def _lazy_logits(self, plan: Plan, rows: DecoderOutput, which: str, columns: int) -> LazyLogits:
        model = self.model

        def values_of(hidden: Tensor) -> Tensor:
            placed = rows.padded(hidden) if which == "full" else text_rows(rows, hidden, which, columns)
            return own_logits(model, placed, rows.output_class)

        num_rows, width = rows.padded_shape
        shape = (num_rows, width if which == "full" else columns, plan.vocab_size)
        # The mixed precision of FSDP2 gathers weights in another dtype than they have.
        dtype = rows.hidden.dtype if sharding.by_fsdp(model) else plan.logits_dtype
        return logits_of(rows.hidden, values_of, shape, dtype, casts=plan.autocast_logits)


_RUNNER = "_softprompt_runner"


def runner_of(model: CausalLM) -> ModelRunner:
    """The runner of the functional form.

    The model holds it: recorded steps look at its hooks, which may hold the model, and would keep it alive.
    """
    known = model.__dict__.get(_RUNNER)
    if known is None or not known.is_of(model):
        known = model.__dict__[_RUNNER] = ModelRunner(model)
    return cast(ModelRunner, known)


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
