"""The step graph: forward, loss and prompt gradient of a packed step, recorded once and replayed.

The base is frozen and only d(prompts) is wanted, so a recorded step ends where the backward ends: it reads
static tensors (ids, layout, prompts, the loss's denominator or the labels' weights) and writes `loss`,
`d(prompts)` and the hidden states. `loss.backward()` then only scales d(prompts). A step is recorded when its
size is met the second time: above all the number of packed tokens and of label rows, each rounded up to a
bucket.

Where two training steps in a row took the same for granted, the next one begins before the model is looked at
(`StepGraphs.begin`), so that a GPU has work meanwhile; its results are taken where nothing has changed.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from softprompt.engine import model_spec, sharding
from softprompt.engine.batch import Batch
from softprompt.engine.cuda_graph import RECORDERS, RecordingError, first_line
from softprompt.engine.guard import HOOKED, guard_of, process_obstacle
from softprompt.engine.lazy_logits import in_this_mode
from softprompt.engine.losses import GroupWeights, LossWeights
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.overrides import IN_USE
from softprompt.engine.packed import DecoderOutput
from softprompt.engine.plan import Plan
from softprompt.engine.recorded_step import RecordedStep, Replayed, StepBatch, record_step
from softprompt.layout import PackedLayout, round_up
from softprompt.warn import warn

MAX_GRAPHS = 16
SIGHTINGS = 2  # a size that comes once is not worth a recording, which costs some eager steps
_MAX_SIZES = 512  # sizes whose sightings are counted
_TOKEN_BUCKET, _LABEL_BUCKET = 64, 16


def bucket_of(count: int, smallest: int) -> int:
    """`count` rounded up to a multiple of `smallest`, or of a sixteenth of the power of two below it.

    So at most 6 % of a large count is added, and an octave has 16 buckets.
    """
    return round_up(count, max(smallest, 1 << max(count.bit_length() - 5, 0)))


class Room(NamedTuple):
    """What `build_layout` needs so that a layout can be resized to any bucket."""

    capacity: int
    label_capacity: int


def room_of(batch: Batch) -> Room:
    """Room for the buckets of a batch."""
    num_rows, row_length = batch.shape
    columns = num_rows * row_length
    return Room(
        bucket_of(sum(batch.prompt_lengths) + columns, _TOKEN_BUCKET),
        bucket_of(max(columns, 1), _LABEL_BUCKET),
    )


@dataclass(eq=False)
class Statistics:
    """What became of the training steps of a model."""

    replayed: int = 0
    eager: int = 0
    recorded: int = 0
    dropped: int = 0


class Step(NamedTuple):
    """What a step over a batch gives."""

    loss: Tensor | None  # [] differentiable; None without labels
    losses: Tensor | None  # [M] of the labels; None without, and where a replay needed none
    weights: GroupWeights | None  # of the labels, where they are not all alike
    rows: DecoderOutput


class _Expected(NamedTuple):
    """What the last two training steps took for granted, as the next one is likely to."""

    plan: Plan
    mode: int


@dataclass(frozen=True, eq=False)
class _Staged:
    """A batch as the recorded step of its size reads it."""

    batch: Batch
    layout: PackedLayout  # without dummies
    given: StepBatch
    weights: GroupWeights | None  # of the labels
    backend: str

    @property
    def size(self) -> tuple[Hashable, ...]:
        """Which recorded step it is, in a mode."""
        given = self.given
        return (
            given.layout.num_rows,
            given.layout.label_rows.shape[0],
            given.columns,
            given.input_ids.shape[0],
            given.layout.prompt_lengths,
            given.prompts.shape,
            given.prompts.dtype,
            given.prompts.device,
            self.backend,
            given.weights is not None,
        )

    def run(self, recorded: RecordedStep) -> Replayed:
        """Replays the recorded step of its size on it."""
        return recorded.run(self.given, self.layout.num_rows, self.layout.num_labels)


@dataclass(frozen=True, eq=False)
class EarlyStep:
    """A step that began before the model was looked at."""

    expected: _Expected
    staged: _Staged
    recorded: RecordedStep | None = None
    replayed: Replayed | None = None  # what it gave, if it was replayed

    @property
    def batch(self) -> Batch:
        """What it is a step on."""
        return self.staged.batch

    def layout_for(self, plan: Plan) -> PackedLayout | None:
        """The layout of the batch, where it is that of this plan."""
        made_for = self.expected.plan
        return self.staged.layout if made_for == plan and made_for.state == plan.state else None


class StepGraphs:
    """The recorded steps of one model.

    Args:
        model: the causal LM; not kept alive.
        cuda_graphs: whether to record at all.
        compile: run the decoder through `torch.compile`, recorded or not.
    """

    def __init__(self, model: CausalLM, *, cuda_graphs: bool = True, compile: bool = False) -> None:
        self._model = weakref.ref(model)
        self._enabled = cuda_graphs
        self._compile = compile
        self._compiled: Callable[..., Any] | None = None
        self._state: Hashable = None  # of the model and its weights, for which the graphs were recorded
        self._lasting: str | None = None  # obstacle of the model in this state
        self._modes: dict[Hashable, tuple[int, str | None]] = {}  # mode of the model -> number, obstacle
        self._graphs: OrderedDict[Hashable, RecordedStep] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._said: set[str] = set()
        self._hidden: Tensor | None = None  # where the recorded steps leave their hidden rows
        self._last: _Expected | None = None  # of the last training step
        self._expected: _Expected | None = None
        self.obstacle: str | None = None  # why the last training step was not served
        self.compile_obstacle: str | None = None
        self.statistics = Statistics()

    @property
    def model(self) -> CausalLM:
        """The causal LM."""
        return cast(CausalLM, self._model())

    @property
    def were_asked(self) -> bool:
        """Whether there was a training step that might have been recorded."""
        return self.obstacle is not None or bool(self.statistics.replayed or self.statistics.eager)

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def clear(self) -> None:
        """Drops all graphs."""
        self.statistics.dropped += len(self._graphs)
        self._graphs.clear()
        self._seen.clear()
        self._modes.clear()
        self._hidden = self._last = self._expected = None

    def call_body(self) -> Callable[..., Any] | None:
        """What runs the decoder: None for itself, or its compiled form."""
        if not self._compile or not torch.is_grad_enabled():
            return None
        if self._compiled is None:
            self._compiled = torch.compile(model_spec.body_of(self.model))
        return self._compiled

    def give_up_compiling(self, reason: str) -> None:
        """From now on the decoder runs as it is."""
        self._compile, self._compiled, self.compile_obstacle = False, None, reason
        self.clear()

    def mode_of(self, plan: Plan, batch: Batch) -> int | None:
        """The number of the mode in which the model is, for `step`.

        None: the call is no training step, or it cannot be recorded, and `obstacle` says why. Asked before
        the host waits for the device, so that its time counts little.
        """
        if not self._enabled or plan.route != "packed" or not _is_training(batch):
            return None
        with IN_USE:
            mode, self.obstacle = self._mode_or_obstacle(plan, batch)
        if self.obstacle is None:
            return mode
        self._last = self._expected = None
        self._say(self.obstacle, batch.attention_mask.device)
        return None

    def _mode_or_obstacle(self, plan: Plan, batch: Batch) -> tuple[int | None, str | None]:
        model = self.model
        device = batch.attention_mask.device
        if device.type not in RECORDERS:
            return None, f"CUDA graphs need a CUDA device, the batch is on {device.type}"
        if batch.input_ids is None:
            return None, "the batch comes as inputs_embeds"
        guard = guard_of(model)
        result = plan.state or guard.check()
        state = (result.model, result.weights, device)
        if state != self._state:
            self.clear()
            self._state, self._lasting = state, _lasting_obstacle(model, device)
        if self._lasting is not None:
            return None, self._lasting
        if guard.unseen is not None:
            return None, f"{guard.unseen}, whose changes cannot be seen"
        if result.hooked:
            return None, HOOKED
        obstacle = process_obstacle()
        if obstacle is not None:
            return None, obstacle
        if torch.is_anomaly_enabled():
            return None, "anomaly detection is on"
        mode = (guard.mode(), plan, _numerics(device.type))
        if mode not in self._modes:
            self._modes[mode] = (len(self._modes), _passing_obstacle(model, plan, device.type))
        return self._modes[mode]

    # -------------------------------------------------------------------------- before the model is looked at
    @property
    def expects_a_replay(self) -> bool:
        """Whether a training step that is made now is likely to be replayed."""
        return (
            self._expected is not None
            and torch.is_grad_enabled()
            # These would see the operations of a step that nobody takes.
            and process_obstacle() is None
            and not torch.is_anomaly_enabled()
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        )

    def begin(self, batch: Batch, weights: LossWeights, *, compact: bool, backend: str) -> EarlyStep | None:
        """Replays the step of a batch, unless it is clear by now that another way is taken.

        What is needed to replay it without harm is looked at before: that values are in range, that all sizes
        are those of the recording, and that the weights lie where they did. That the model is the same is
        not; `step` takes the results where it would replay the same step. Until then they are copies that
        nobody holds.

        Args:
            batch: prompts, texts and labels.
            weights: how the losses of the labels are added up.
            compact: whether pads are left out of the positions.
            backend: of the ops.
        """
        expected, device = self._expected, batch.attention_mask.device
        if expected is None or expected.plan.state is None or device.type not in RECORDERS:
            return None
        if batch.input_ids is None or not _is_training(batch):
            return None
        layout = expected.plan.layout(batch, compact=compact, backend=backend, **room_of(batch)._asdict())
        staged = None if layout is None else _staged(batch, layout, weights, backend)
        if staged is None:
            return None
        step = EarlyStep(expected, staged)
        with IN_USE:
            recorded = self._graphs.get((*staged.size, expected.mode))
            if recorded is None or not recorded.leaves_no_trace or self._expected is not expected:
                return step
            if not guard_of(self.model).in_place(expected.plan.state):
                return step
            self._last = self._expected = None  # until its results are taken
            with RECORDERS[device.type].turn(device):
                return replace(step, recorded=recorded, replayed=staged.run(recorded))

    # ---------------------------------------------------------------------------------------------- the step
    def step(
        self,
        plan: Plan,
        batch: Batch,
        layout: PackedLayout,
        mode: int,
        weights: LossWeights,
        backend: str,
    ) -> Step | None:
        """The step of a batch, or None where it is to be run eagerly.

        Args:
            plan: of the model, on the packed route.
            batch: with labels and ids.
            layout: made with `room_of(batch)`.
            mode: what `mode_of` said of this call.
            weights: how the losses of the labels are added up.
            backend: of the ops.
        """
        staged = _staged(batch, layout, weights, backend)
        if staged is None:
            return None
        device = staged.given.prompts.device
        with IN_USE, RECORDERS[device.type].turn(device):
            last, self._last = self._last, _Expected(plan, mode)
            is_as_before = last is not None and (last.mode, last.plan.state) == (mode, plan.state)
            self._expected = self._last if is_as_before else None
            recorded = self._recorded(plan, staged, mode)
            if recorded is None:
                self.statistics.eager += 1
                return None
            replayed = staged.run(recorded)
            self.statistics.replayed += 1
        return self._finished(plan, staged, recorded, replayed)

    def taken(self, early: EarlyStep, plan: Plan, mode: int | None) -> Step | None:
        """The step that was begun, where it is the one that would be replayed now; else None.

        Args:
            early: what `begin` gave for the batch.
            plan: of the model.
            mode: what `mode_of` said of this call.
        """
        key, recorded = (*early.staged.size, mode), early.recorded
        with IN_USE:
            if recorded is None or early.replayed is None or self._graphs.get(key) is not recorded:
                return None
            self._graphs.move_to_end(key)
            self.statistics.replayed += 1
            self._last = self._expected = early.expected
        return self._finished(plan, early.staged, recorded, early.replayed)

    def _finished(self, plan: Plan, staged: _Staged, recorded: RecordedStep, replayed: Replayed) -> Step:
        """A replayed step as an eager one comes."""
        model, batch, layout, prompts = self.model, staged.batch, staged.layout, staged.given.prompts

        def again(prompts: Tensor) -> Tensor:
            own = replace(batch, prompts=(prompts,), labels=None)
            return plan.decode(model, own, layout, backend=staged.backend).hidden

        loss, hidden = replayed.differentiable(prompts, in_this_mode(again, prompts.device.type))
        num_rows, row_length = batch.shape
        rows = DecoderOutput(
            hidden,
            layout.label_rows,
            layout.label_targets,
            layout.num_labels,
            layout,
            (num_rows, max(batch.prompt_lengths) + row_length),
            recorded.output_class,
        )
        return Step(loss, replayed.losses, staged.weights, rows)

    def _recorded(self, plan: Plan, staged: _Staged, mode: int) -> RecordedStep | None:
        """The recorded step of this size, recorded now where it is worth it."""
        batch, key = staged.given, (*staged.size, mode)
        prompts = batch.prompts
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if not self._is_worth_it(key):
            return None
        try:
            recorded = record_step(
                RECORDERS[prompts.device.type],
                cast(Callable[[], CausalLM], self._model),  # weakly: a graph goes with its model
                plan,
                batch,
                self._place_for,
                dtype=torch.promote_types(_compute_weight(self.model).dtype, torch.float32),
                backend=staged.backend,
                call_body=self.call_body(),
            )
        except (RecordingError, RuntimeError) as error:
            self._refuse(mode, f"recording failed: {first_line(error)}")
            self._say(str(self.obstacle), prompts.device)
            return None
        self._graphs[key] = recorded
        self.statistics.recorded += 1
        if len(self._graphs) > MAX_GRAPHS:
            dropped, _ = self._graphs.popitem(last=False)
            self._seen.pop(dropped, None)
            self.statistics.dropped += 1
        return recorded

    def _is_worth_it(self, key: Hashable) -> bool:
        self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > _MAX_SIZES:
            self._seen.popitem(last=False)
        return self._seen[key] >= SIGHTINGS

    def _place_for(self, hidden: Tensor) -> Tensor:
        """[T, H] of a tensor that all graphs share, since a replay's hidden rows are copied away at once."""
        rows, width = hidden.shape
        known = self._hidden
        if known is None or known.shape[0] < rows or known.shape[1] != width or known.dtype != hidden.dtype:
            # Graphs that write to a smaller one keep it.
            self._hidden = hidden.new_empty(1 << (rows - 1).bit_length(), width).detach()
            known = self._hidden
        return known[:rows]

    def _say(self, reason: str, device: torch.device) -> None:
        """One warning for each reason, where the device could have recorded."""
        if device.type in RECORDERS and reason not in self._said:
            self._said.add(reason)
            warn(f"training steps are not recorded: {reason}")

    def _refuse(self, mode: int, reason: str) -> None:
        """No more tries in this mode of the model."""
        self.obstacle = reason
        self._modes = {m: (n, reason if n == mode else known) for m, (n, known) in self._modes.items()}


def _is_training(batch: Batch) -> bool:
    """Whether a gradient reaches the prompts of a batch, and its loss is asked for."""
    wanted = batch.labels is not None and torch.is_grad_enabled()
    return wanted and any(prompt.requires_grad for prompt in batch.prompts)


def _staged(batch: Batch, layout: PackedLayout, weights: LossWeights, backend: str) -> _Staged | None:
    """A batch with ids, in the buckets of its tokens and labels; None: the host does not know how many.

    Args:
        batch: prompts, texts and labels.
        layout: made with `room_of(batch)`.
        weights: how the losses of the labels are added up.
        backend: of the ops.
    """
    if batch.input_ids is None or layout.num_tokens is None:
        return None
    of_labels = weights.of_labels(layout)
    labels = bucket_of(max(layout.num_labels, 1), _LABEL_BUCKET)
    given = StepBatch(
        batch.joined_prompts(batch.input_ids.device),
        batch.input_ids,
        layout.resized(bucket_of(layout.num_rows, _TOKEN_BUCKET), labels),
        max(layout.num_labels, 1) if weights.num_items is None else weights.num_items,
        None if of_labels is None else functional.pad(of_labels.values, (0, labels - layout.num_labels)),
    )
    return _Staged(batch, layout, given, of_labels, backend)


def _compute_weight(model: CausalLM) -> Tensor:
    head = getattr(model.get_output_embeddings(), "weight", None)
    weight: Tensor = head if isinstance(head, Tensor) else next(iter(model.parameters()))
    return weight


def _numerics(device_type: str) -> tuple[Hashable, ...]:
    """Process-wide settings that choose kernels."""
    autocast = torch.is_autocast_enabled(device_type)
    return (
        torch.get_autocast_dtype(device_type) if autocast else None,
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )


def _lasting_obstacle(model: CausalLM, device: torch.device) -> str | None:
    """What lasts as long as the weights stay where they are."""
    obstacle = sharding.shared_device_obstacle(model)
    if obstacle is not None:
        return obstacle
    weight = _compute_weight(model)
    if weight.device != device:
        return f"the weights are on {weight.device}, the batch is on {device}"
    if any(parameter.requires_grad for parameter in model.parameters()):
        return "the language model has trainable weights, whose gradients a recorded step does not make"
    if model_spec.rotary_switch(model) is not None:
        return "its rotary embedding depends on the longest position, which the host has to read"
    return None


def _passing_obstacle(model: CausalLM, plan: Plan, device_type: str) -> str | None:
    """What depends on training flags and autocast."""
    body = model_spec.body_of(model)
    training = any(module.training for module in model.modules())
    dropout = model_spec.dropout_of(model) if training else []
    if dropout:
        return f"dropout is on in the language model ({', '.join(dropout)})"
    if model_spec.uses_gradient_checkpointing(body):
        return "gradient checkpointing is on"
    if model_spec.compute_dtype(_compute_weight(model)) == torch.float16:
        return "fp16 gradients have to be scaled before the backward, and a recorded step scales them after"
    return None
