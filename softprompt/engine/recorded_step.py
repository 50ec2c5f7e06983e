"""One recorded step: what it reads, what it writes, and its node in the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softprompt.engine.batch import Batch
from softprompt.engine.cuda_graph import Recorder, Run
from softprompt.engine.guard import guard_of
from softprompt.engine.losses import label_losses, weighted_sum
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.plan import Plan
from softprompt.layout import PackedLayout

_COPIED = (
    "token_index",
    "position_ids",
    "query_position",
    "key_position",
    "segments",
    "prefix_id",
    "cu_texts",
    "prompt_of_row",
    "label_rows",
    "label_targets",
)
_NO_MASK = torch.empty(0, 0)


class StepBatch(NamedTuple):
    """What changes from step to step."""

    prompts: Tensor  # [ΣP, H]
    input_ids: Tensor  # [B, L]
    layout: PackedLayout  # resized to the buckets
    num_items: int | float | Tensor  # denominator of the loss
    weights: Tensor | None  # [M] of the labels, fp64; None: all alike

    @property
    def columns(self) -> int:
        """Room for B*L ids: the next power of two."""
        return 1 << max(self.input_ids.numel() - 1, 0).bit_length()


@dataclass(frozen=True, eq=False)
class _Inputs:
    """The static tensors that a recorded step reads."""

    prompts: Tensor  # [ΣP, H]
    input_ids: Tensor  # [1, columns] int64, the batch's flattened
    num_items: Tensor  # []
    weights: Tensor | None  # [M]
    layout: dict[str, Tensor]  # int32, by the field's name
    # [K + 1]; held here, since `prompt_offsets` forgets what was not asked for lately.
    cu_prompts: Tensor
    prompt_lengths: tuple[int, ...]

    @staticmethod
    def like(batch: StepBatch, dtype: torch.dtype) -> _Inputs:
        """Tensors for a batch of this size; `dtype` is the loss's."""
        device = batch.prompts.device
        return _Inputs(
            torch.empty(batch.prompts.shape, dtype=batch.prompts.dtype, device=device).requires_grad_(),
            torch.zeros(1, batch.columns, dtype=torch.int64, device=device),
            torch.empty((), dtype=dtype, device=device),
            None if batch.weights is None else torch.empty(batch.weights.shape, dtype=dtype, device=device),
            {name: torch.empty_like(getattr(batch.layout, name)) for name in _COPIED},
            batch.layout.cu_prompts,
            batch.layout.prompt_lengths,
        )

    @torch.no_grad()
    def fill(self, batch: StepBatch) -> None:
        """Copies a batch in: a handful of launches."""
        torch._foreach_copy_(
            list(self.layout.values()), [getattr(batch.layout, name) for name in self.layout]
        )
        self.prompts.copy_(batch.prompts)
        self.input_ids[0, : batch.input_ids.numel()].copy_(batch.input_ids.reshape(-1))
        if isinstance(batch.num_items, Tensor):
            self.num_items.copy_(batch.num_items.reshape(()))
        else:
            self.num_items.fill_(batch.num_items)
        if self.weights is not None and batch.weights is not None:
            self.weights.copy_(batch.weights)

    def fresh_layout(self) -> PackedLayout:
        """The layout, without what back ends have prepared from the values of an earlier run."""
        tensors: dict[str, Any] = self.layout
        return PackedLayout(
            **tensors,
            cu_prompts=self.cu_prompts,
            prompt_lengths=self.prompt_lengths,
            batch_shape=(1, self.input_ids.shape[1]),
            num_tokens=None,
            num_labels=tensors["label_rows"].shape[0],
            longest_text=None,
            longest_context=tensors["query_position"].shape[0],
        )


class Replayed(NamedTuple):
    """What one replay has left, copied from where the next one writes."""

    loss: Tensor  # []
    losses: Tensor | None  # [M] of the labels, where they have weights
    grad: Tensor  # [ΣP, H]
    hidden: Tensor  # [live, H]

    def differentiable(
        self, prompts: Tensor, again: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:  # prompts: [ΣP, H]
        """The loss and the hidden rows, differentiable in the prompts of the batch.

        Args:
            prompts: of the batch.
            again: computes the [live, H] hidden rows anew from prompts; only called where a gradient reaches
                the hidden rows by another way than the loss.
        """
        loss, hidden = _Replay.apply(prompts, self, again)
        return loss, hidden


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """A step that can be run again on other values of the same sizes."""

    inputs: _Inputs
    loss: Tensor  # []
    losses: Tensor | None  # [M] of the labels, where they have weights
    grad: Tensor  # [ΣP, H]
    hidden: Tensor  # [T, H]
    output_class: type  # of the decoder
    replay: Run
    leaves_no_trace: bool  # a replay whose results nobody takes cannot be noticed

    @torch.no_grad()
    def run(self, batch: StepBatch, live: int, num_labels: int) -> Replayed:
        """Replays the step on a batch; within a turn of the recorder.

        Args:
            batch: of the recorded sizes.
            live: rows that are no dummies.
            num_labels: labels that are no dummies.
        """
        self.inputs.fill(batch)
        self.replay()
        losses = None if self.losses is None else self.losses[:num_labels].clone()
        return Replayed(self.loss.clone(), losses, self.grad.clone(), self.hidden[:live].clone())


class _Replay(torch.autograd.Function):
    """Its gradient exists before the forward is called."""

    @staticmethod
    def forward(
        ctx: Any, prompts: Tensor, replayed: Replayed, again: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # A copy, since an optimizer may change the prompts before the backward, as it may in an eager step.
        ctx.save_for_backward(prompts.clone(), replayed.grad)
        ctx.again = again
        return replayed.loss, replayed.hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss, of_hidden = grads
        prompts, grad = ctx.saved_tensors
        total = None if of_loss is None else grad * of_loss.to(grad.dtype)
        if of_hidden is not None:
            # Something other than the loss was made of the hidden rows, logits as a rule.
            with torch.enable_grad():
                own = prompts.detach().requires_grad_()
                (more,) = torch.autograd.grad(ctx.again(own), own, of_hidden)
            total = more if total is None else total + more
        return total, None, None


def record_step(
    recorder: Recorder,
    model_of: Callable[[], CausalLM],
    plan: Plan,
    batch: StepBatch,
    place_for: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype,
    backend: str,
    call_body: Callable[..., Any] | None,
) -> RecordedStep:
    """Records forward, loss and prompt gradient of a batch.

    Args:
        recorder: of the device.
        model_of: the causal LM, as a weak reference.
        plan: of the model, on the packed route.
        batch: any values of the sizes to be recorded.
        place_for: where hidden rows like the given ones are left.
        dtype: of the loss.
        backend: of the ops.
        call_body: see `decode_packed`.

    Raises:
        RecordingError: the recorder cannot.
        RuntimeError: a run fails, or memory runs out.
    """
    inputs = _Inputs.like(batch, dtype)
    inputs.fill(batch)
    loss = torch.empty((), dtype=dtype, device=batch.prompts.device)
    losses = None if inputs.weights is None else torch.empty_like(inputs.weights)
    grad = torch.empty_like(inputs.prompts, requires_grad=False)
    left: dict[str, Any] = {}

    def run() -> None:
        model = model_of()
        layout = inputs.fresh_layout()
        own = Batch((inputs.prompts,), layout.prompt_of_row, inputs.input_ids, None, _NO_MASK, None)
        with torch.enable_grad():
            with _uncached_autocast(loss.device.type):
                rows = plan.decode(model, own, layout, backend=backend, call_body=call_body)
                each = label_losses(model, rows, plan.head, backend=backend)
                now = weighted_sum(each, rows.label_targets, inputs.weights, inputs.num_items, backend)
            # Like a backward of the user's, outside of autocast, which would narrow its products in fp32.
            with torch.autocast(loss.device.type, enabled=False):
                (gradient,) = torch.autograd.grad(now, inputs.prompts)
        if not left:
            left.update(hidden=place_for(rows.hidden), output_class=rows.output_class)
        loss.copy_(now.detach())
        if losses is not None:
            losses.copy_(each.detach())
        grad.copy_(gradient)
        left["hidden"].copy_(rows.hidden.detach())

    guard, device = guard_of(model_of()), batch.prompts.device
    before, random_before = guard.snapshot(), _random_states(device)
    replay = recorder.record(run, device)
    after, random_after = guard.snapshot(), _random_states(device)
    # Random numbers are drawn and weights are written in a replay as they were in the recording. Code that is
    # none of the libraries' may write anywhere.
    unseen = not recorder.runs_python and not after.is_open and before.same(after)
    leaves_no_trace = unseen and all(map(torch.equal, random_before, random_after))
    return RecordedStep(inputs, loss, losses, grad, replay=replay, leaves_no_trace=leaves_no_trace, **left)


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the random generators that a step on this device may use."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _uncached_autocast(device_type: str) -> torch.autocast:
    """Autocast as it is, but without its cache of cast weights, which ends with the block that it is in."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
