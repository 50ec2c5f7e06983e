"""`patch`: a PEFT prompt-tuning model, made fast in place.

The instance's class becomes a subclass of its own class whose `forward` takes the packed route and whose
`super().forward` is PEFT's. Nothing else is touched, and `unpatch` sets the class back.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft import PeftModel, PeftModelForCausalLM
from torch import Tensor, nn

from softprompt.batches import batch_of, placed, tokens_of
from softprompt.calls import (
    adapters_of_rows,
    check_stock_input,
    own_inputs,
    reason_for_stock,
    taking_turns,
)
from softprompt.encoders import prompt_of
from softprompt.engine import Plan, families, plan_for, run_plan
from softprompt.engine.answers import LOGITS, trimmed
from softprompt.engine.forward import (
    ON_UNSUPPORTED,
    POSITIONS,
    UnsupportedModelError,
    check_option,
    obstacle_to,
)
from softprompt.engine.graphs import StepGraphs
from softprompt.engine.placement import PLACEMENTS, bos_token_id, place_in_generation
from softprompt.generation import (
    GenerateCall,
    KnownPrompt,
    generate,
    read_call,
    refuse_what_goes_wrong,
    stock_reason,
)
from softprompt.layout import raise_out_of_range
from softprompt.ops.library import AUTO

Model = TypeVar("Model", bound=nn.Module)
_STATE = "_softprompt"


@dataclass(frozen=True)
class PatchOptions:
    """What `patch` was asked for."""

    positions: str = "padded"
    on_unsupported: str = "fallback"
    backend: str = AUTO
    cuda_graphs: bool = True
    compile: bool = False
    placement: str = "prefix"
    logits: str = "full"

    @property
    def without_stock(self) -> str | None:
        """The option that PEFT's own forward does not know, None where it knows all."""
        if self.positions == "compact":
            return 'positions="compact"'
        return None if self.placement == "prefix" else f'placement="{self.placement}"'


@dataclass
class PatchState:
    """What a patched instance carries beside its class: options, what it keeps, and the fallbacks met."""

    options: PatchOptions
    stock_class: type
    graphs: StepGraphs | None = None
    tokens: dict[str, tuple[Tensor, int, Tensor]] = field(default_factory=dict)  # see `tokens_of`
    prompts: dict[str, KnownPrompt] = field(default_factory=dict)  # adapter -> for generate
    refusal: str | None = None  # why the class was left alone
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> number of calls
    said: set[str] = field(default_factory=set)  # notes that were given once


def patch(
    model: Model,
    *,
    positions: str = "padded",
    on_unsupported: str = "fallback",
    backend: str = AUTO,
    cuda_graphs: bool = True,
    compile: bool = False,
    placement: str = "prefix",
    logits: str = "full",
) -> Model:
    """Makes a PEFT prompt-tuning model compute its loss on the packed route, in place.

    P-tuning (`PromptEncoderConfig`) and multitask prompt tuning (`MultitaskPromptTuningConfig`) are served
    alike: the route needs the output of their encoders, and gives them its gradient.

    The same loop, Trainer, `generate` and adapter files work as before. Calls that the packed route does not
    serve (a request for attentions, hidden states or a cache) go to PEFT's own forward with one warning.
    Patching twice changes the options. A tiny self-check compares the route with the stock forward first.

    Args:
        model: a `PeftModelForCausalLM` with adapters of one of these types.
        positions: "padded": every token has the position that PEFT's padded batch gives it, on any padding
            side; "compact": pads do not exist, so that training on padded batches equals each row alone.
        on_unsupported: what to do where only the stock forward is right: "fallback" (use it, warn once with
            the reason) or "error" (raise UnsupportedModelError).
        backend: "auto", or the back end that all ops use: "reference", "triton" or "native" (there is no
            native attention, which then stays at "auto").
        cuda_graphs: on a GPU, record a training step as one CUDA graph when its size comes the second time,
            and replay it afterwards. Steps that cannot be recorded run as without, with one warning.
        compile: run the decoder of training steps through `torch.compile`; pays on a GPU, after minutes.
        placement: "prefix": the prompt stands in front of the text; "after_bos": behind the text's first
            token, which has to be the model's BOS token in every row.
        logits: "full": `out.logits` is [B, P + L, V], as PEFT gives it; "text": [B, L, V], column c is the
            output at the text's column c and predicts label c + 1, as without a prompt; "labels": [B, L, V],
            column c predicts label c.

    Returns:
        The same model.

    Raises:
        TypeError: not a PEFT model.
        ValueError: an unknown option value; "after_bos" on a model without a BOS token.
        UnsupportedModelError: see `on_unsupported`; also for "compact" on a model that cannot be packed, and
            for "after_bos" on one that has no fast route.
    """
    check_option("positions", positions, POSITIONS)
    check_option("on_unsupported", on_unsupported, ON_UNSUPPORTED)
    check_option("placement", placement, PLACEMENTS)
    check_option("logits", logits, LOGITS)
    if not isinstance(model, PeftModel):
        raise TypeError(
            "softprompt.patch takes a PEFT model (get_peft_model(...) or PeftModel.from_pretrained(...)), "
            f"got {type(model).__name__}; softprompt.forward takes a plain model and prompts"
        )
    options = PatchOptions(positions, on_unsupported, backend, cuda_graphs, compile, placement, logits)
    known: PatchState | None = model.__dict__.get(_STATE)
    state = PatchState(options, known.stock_class if known else type(model))
    state.refusal = _refusal(model)
    obstacle = state.refusal or obstacle_to(plan_for(model.get_base_model()), compact=positions == "compact")
    if obstacle is None and placement == "after_bos":
        bos_token_id(model.get_base_model())
    if obstacle is not None:
        if on_unsupported == "error" or options.without_stock is not None:
            raise UnsupportedModelError(f"softprompt: {obstacle}")
        warnings.warn(f"softprompt: PEFT's own forward stays in use: {obstacle}", stacklevel=2)
        state.said.add(obstacle)
    setattr(model, _STATE, state)
    if state.refusal is None:
        _drop_bound_methods(model)
        model.__class__ = _patched_class(state.stock_class)
    return model


def unpatch(model: Model) -> Model:
    """Takes `patch` back: the model is again what it was. A model that is not patched is returned as it
    is.
    """
    state: PatchState | None = model.__dict__.get(_STATE)
    if state is not None:
        if getattr(model, "_adapters_disabled", False):
            raise RuntimeError(
                "unpatch the model outside of disable_adapter(), which puts its forward back at the end"
            )
        _drop_bound_methods(model)
        model.__class__ = state.stock_class
        delattr(model, _STATE)
    return model


@contextlib.contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """`patch(model, **options)` for the duration of a block; afterwards the model is as it was before."""
    before: PatchState | None = model.__dict__.get(_STATE)
    patch(model, **options)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            setattr(model, _STATE, before)
            if before.refusal is None:
                model.__class__ = _patched_class(before.stock_class)


def state_of(model: nn.Module) -> PatchState | None:
    """The patch state of a model, None where it is not patched."""
    return model.__dict__.get(_STATE)


def _refusal(model: PeftModel) -> str | None:
    """Why the class of this model is left alone, or None."""
    if not isinstance(model, PeftModelForCausalLM):
        return f"{type(model).__name__} is not a causal language model (task type CAUSAL_LM)"
    stock = model.__dict__[_STATE].stock_class if _STATE in model.__dict__ else type(model)
    for name in ("forward", "get_prompt"):
        if getattr(stock, name) is not getattr(PeftModelForCausalLM, name):
            return f"{stock.__name__} has a {name} of its own, which the packed forward would not call"
    if "get_prompt" in model.__dict__:
        return "the model's get_prompt was replaced on the instance"
    replaced = model.__dict__.get("forward")
    if replaced is not None and not _is_own_method(model, "forward", replaced):
        return (
            "the model's forward was replaced on the instance (accelerate's prepare does that); "
            "call softprompt.patch before"
        )
    return None


def _is_own_method(model: nn.Module, name: str, value: Any) -> bool:
    return (
        inspect.ismethod(value) and value.__self__ is model and value.__func__ is getattr(type(model), name)
    )


def _drop_bound_methods(model: nn.Module) -> None:
    """Removes copies of the class's own methods from the instance (PEFT's `disable_adapter` leaves them
    there).
    """
    for name in ("forward", "prepare_inputs_for_generation"):
        if _is_own_method(model, name, model.__dict__.get(name)):
            del model.__dict__[name]


@functools.cache
def _patched_class(stock: type) -> type:
    return type(
        stock.__name__,
        (_Patched, stock),
        {"__module__": stock.__module__, "__qualname__": stock.__qualname__},
    )


def _rebuild(stock: type) -> Any:
    cls: Any = _patched_class(stock)
    return cls.__new__(cls)


class _Patched(PeftModelForCausalLM):
    """What `patch` puts in front of the class of a model."""

    _softprompt: PatchState

    @taking_turns
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """PEFT's forward, on the packed route where that serves the call.

        Beside PEFT's arguments `adapter_names` gives each row of the batch its adapter.
        """
        names = adapters_of_rows(self, adapter_names, input_ids, inputs_embeds)
        plan = plan_for(self.get_base_model())
        given = input_ids if inputs_embeds is None else inputs_embeds
        shape = (0, 0)
        if isinstance(given, Tensor) and given.ndim > 1:
            shape = (given.shape[0], given.shape[1])
        reason = reason_for_stock(
            self,
            plan,
            names,
            labels,
            shape,
            {
                "output_attentions": output_attentions,
                "output_hidden_states": output_hidden_states,
                "task_ids": task_ids,
                **kwargs,
            },
            compact=self._softprompt.options.positions == "compact",
        )
        if reason is not None:
            _fall_back(self, reason, adapter_names)
            if kwargs.get("past_key_values") is None:
                check_stock_input(self.get_base_model(), input_ids, inputs_embeds, attention_mask, labels)
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                task_ids=task_ids,
                **kwargs,
            )
            num_virtual_tokens = getattr(self.active_peft_config, "num_virtual_tokens", 0)
            return trimmed(output, self._softprompt.options.logits, num_virtual_tokens, shape[1])
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)
        loss, logits = _fast(
            self,
            plan,
            names,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            task_ids=task_ids,
            num_items=kwargs.get("num_items_in_batch"),
        )
        if return_dict is False or (return_dict is None and not self.get_base_model().config.return_dict):
            return (logits,) if loss is None else (loss, logits)
        return plan.output_class(loss=loss, logits=logits)

    @taking_turns
    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """PEFT's generate, with each prompt computed once and kept for later calls.

        Beside the arguments of transformers' generate `adapter_names` gives each row its adapter.
        """
        base = self.get_base_model()
        with own_inputs(base):
            if self._adapters_disabled:
                if adapter_names is not None:
                    raise ValueError("adapter_names was given inside of disable_adapter()")
                return super().generate(*args, **kwargs)
            if self._softprompt.options.placement != "prefix":
                if adapter_names is not None:
                    raise UnsupportedModelError("softprompt: adapter_names has no generate behind BOS")
                compact = self._softprompt.options.positions == "compact"
                call = read_call(self, args, kwargs, None, compact=compact, backend=AUTO)
                refuse_what_goes_wrong(call, 'placement="after_bos" puts it behind the first token')
                return super().generate(*args, **kwargs)
            if not hasattr(base, "model"):  # as PEFT does
                base.generation_config = self.generation_config
            plan, options = plan_for(base), self._softprompt.options
            compact = options.positions == "compact"
            call = read_call(self, args, kwargs, adapter_names, compact=compact, backend=options.backend)
            reason = stock_reason(self, plan, call)
            if reason is not None:
                _fall_back(self, reason, adapter_names, "generate")
                return super().generate(*args, **kwargs)
            self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=call.arguments)
            call.arguments.pop("task_ids", None)  # of other types of adapters
            return _generate(self, plan, call)

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """PEFT's inputs of one step of generate, with the prompt where the patch puts it.

        The signature is PEFT's: generate looks there for the arguments that it may take.
        """
        inputs = super().prepare_inputs_for_generation(*args, task_ids=task_ids, **kwargs)
        options = self._softprompt.options
        if options.placement == "prefix":
            return inputs
        return place_in_generation(
            self.get_base_model(),
            inputs,
            args[0] if args else kwargs["input_ids"],
            self.active_peft_config.num_virtual_tokens,
            compact=options.positions == "compact",
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and files name the stock class, and leave out what only counts for this instance."""
        state = {
            name: value for name, value in self.__dict__.items() if not _is_own_method(self, name, value)
        } | {_STATE: PatchState(self._softprompt.options, self._softprompt.stock_class)}
        return _rebuild, (self._softprompt.stock_class,), state


def _generate(model: Any, plan: Plan, call: GenerateCall) -> Any:
    known = model._softprompt.prompts
    for name in set(known) - set(model.peft_config):
        del known[name]
    with torch.no_grad():
        prompts = {name: _prompt_of(model, name) for name in dict.fromkeys(call.names)}
    return generate(model.get_base_model(), plan, call, prompts, known)


@torch.compiler.disable
def _fast(
    model: Any,
    plan: Plan,
    names: list[str],
    *,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    task_ids: Tensor | None,
    num_items: Any,
) -> tuple[Tensor | None, Tensor]:
    base, options = model.get_base_model(), model._softprompt.options
    batch, _ = batch_of(
        model,
        names,
        input_ids=input_ids,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        labels=labels,
        task_ids=task_ids,
    )
    if base.training:
        say_dropout(model, base)
    try:
        return run_plan(
            base,
            plan,
            placed(model, plan, batch),
            compact=options.positions == "compact",
            num_items=num_items,
            backend=options.backend,
            graphs=graphs_of(model, base),
            logits=options.logits,
            columns=batch.shape[1],
        )
    except IndexError:
        # Names the column that the user gave it in.
        raise_out_of_range(batch.input_ids, batch.labels, families.vocab_size(base))
        raise


def graphs_of(model: Any, base: nn.Module) -> StepGraphs:
    """The recorded steps of a patched model."""
    state: PatchState = model._softprompt
    if state.graphs is None or not state.graphs.are_of(base):
        state.graphs = StepGraphs(base, cuda_graphs=state.options.cuda_graphs, compile=state.options.compile)
    return state.graphs


def _prompt_of(model: Any, name: str) -> Tensor:
    """[P, H] of an adapter that has one prompt for all rows, through its own encoder."""
    return prompt_of(model, name, tokens_of(model, name))


def _fall_back(model: Any, reason: str, adapter_names: Sequence[str] | None, method: str = "forward") -> None:
    state: PatchState = model._softprompt
    if state.options.on_unsupported == "error":
        raise UnsupportedModelError(f"softprompt: {reason}")
    if state.options.without_stock is not None:
        raise UnsupportedModelError(
            f"softprompt: {state.options.without_stock} has no stock {method} to fall back to: {reason}"
        )
    if adapter_names is not None:
        raise UnsupportedModelError(
            f"softprompt: adapter_names has no stock {method} to fall back to: {reason}"
        )
    state.fallbacks[reason] = state.fallbacks.get(reason, 0) + 1
    if reason not in state.said:
        state.said.add(reason)
        # torch calls a forward through two functions of its own.
        level = 6 if method == "forward" else 4
        warnings.warn(f"softprompt: PEFT's own {method} was used: {reason}", stacklevel=level)


def say_dropout(model: Any, base: nn.Module) -> None:
    """One warning where a patched model in training mode has dropout."""
    if "dropout" in model._softprompt.said:
        return
    model._softprompt.said.add("dropout")
    active = families.dropout_of(base)
    if active:
        warnings.warn(
            f"softprompt: the frozen model has dropout ({', '.join(active)}) and is in training mode: the "
            "packed row draws the prompt's masks once per step where PEFT draws them per row (same "
            "expectation, other numbers); model.eval() or p = 0 gives PEFT's numbers",
            stacklevel=8,
        )
