"""A patched PEFT model: its class becomes a subclass, whose forward and generate take the fast route where
it serves the call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM
from torch import Tensor, nn

from softprompt.compiling import given_names, peft_is_traced, transform_in_use
from softprompt.eligibility import (
    check_peft_input,
    reason_for_peft,
    refuse_joined_texts,
)
from softprompt.engine import Plan, model_records, model_spec, sharding
from softprompt.engine.batch import Batch
from softprompt.engine.caches import NAMES
from softprompt.engine.encoder_decoder import (
    CallOptions,
    check_decoder_inputs,
    prompted_texts,
    run_encoder_decoder,
)
from softprompt.engine.leftovers import without_leftovers
from softprompt.engine.logits_layout import trimmed
from softprompt.engine.model_spec import prompt_width
from softprompt.engine.placement import place_in_generation
from softprompt.engine.runner import UnsupportedModelError
from softprompt.engine.step_graph import EarlyStep
from softprompt.engine.trl_head import ASKED
from softprompt.generation import GenerateCall, generate, read_call, refuse_what_goes_wrong, stock_reason
from softprompt.generation.stock import step_inputs, tells_its_length
from softprompt.layout import raise_out_of_range
from softprompt.nesting import base_of, has_prompt_below, is_nested
from softprompt.ops.registry import AUTO
from softprompt.prompt_encoders import (
    adapters_of_rows,
    batch_of,
    leave_no_trace,
    placed,
    prompt_of,
    seq2seq_batch_of,
    tokens_of,
    with_tensor_of_tasks,
)
from softprompt.state import STATE, PatchState, give_state, plan_of

Method = TypeVar("Method", bound=Callable[..., Any])
_TEXTS = ("input_ids", "attention_mask", "inputs_embeds")
_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels")
_LEFT_OUT = "pads that all rows have, and columns behind the last label, are left out and draw no masks"


# ------------------------------------------------------------------------------------- methods of an instance
def _without_wrapped(wrapper: Callable[..., Any], method: Method) -> Method:
    """The wrapper, with the method's signature. accelerate unwraps a forward down to the innermost one, and
    would lose the wrapper.
    """
    wrapper.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    del wrapper.__wrapped__  # type: ignore[attr-defined]
    return cast(Method, wrapper)


def synchronized(method: Method) -> Method:
    """A method of a PEFT model in which one thread at a time is, for all methods and each base model.

    Packed calls choose the attention of the base model, and both kinds of `generate` its inputs: a call in
    another thread, fast or not, would compute with them.
    """

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "get_base_model"):
            return method(self, *args, **kwargs)  # which says what it takes
        # Reentrant: a model may assist itself, or be asked again by a logits processor.
        with model_records.lock_of(base_of(self)):
            return method(self, *args, **kwargs)

    return _without_wrapped(alone, method)


def outlives_the_patch(method: Method) -> Method:
    """A method of a patched class that may be kept, bound, while the patch comes and goes.

    accelerate's `prepare` and `add_hook_to_module` wrap the forward of an instance, and others keep
    `model.forward` in an attribute. Called after `unpatch`, it is the method that the class has then.
    """

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PatchedModel):
            return method(self, *args, **kwargs)
        return getattr(type(self), method.__name__)(self, *args, **kwargs)

    return _without_wrapped(called, method)


@contextlib.contextmanager
def _without_peft_prepare_inputs(base: nn.Module) -> Iterator[None]:
    """The base model prepares its inputs itself in the block, and as before behind it.

    PEFT's `generate` sets this method to one of its own. It puts the model's first one back, also inside of
    another call that has set another; an interrupt leaves its own there.
    """
    name = "prepare_inputs_for_generation"
    before = base.__dict__.get(name)
    if isinstance(getattr(before, "__self__", None), PeftModel):
        del base.__dict__[name]
    try:
        yield
    finally:
        base.__dict__.pop(name, None)
        if before is not None:
            base.__dict__[name] = before


# -------------------------------------------------------------------------------------------------- the class
def _with_forward_of(stock: type[PeftModel]) -> Callable[[type], type]:
    """Gives a class a forward with the signature of `stock`'s, and `adapter_names`."""
    signature = inspect.signature(stock.forward)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = inspect.Parameter("adapter_names", kind, default=None, annotation="Sequence[str] | None")
    *others, rest = signature.parameters.values()
    signature = signature.replace(parameters=[*others, own, rest])
    _, *names = (name for name, parameter in signature.parameters.items() if parameter.kind == kind)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward, on the fast route where that serves the call.

        Beside PEFT's arguments `adapter_names` gives each row of the batch its adapter.
        """
        arguments = dict(zip(names, args, strict=False))
        if len(args) > len(names):
            raise TypeError(f"forward() takes {len(names)} positional arguments, but {len(args)} were given")
        for name in arguments:
            if name in kwargs:
                raise TypeError(f"forward() got multiple values for argument {name!r}")
        arguments.update(kwargs)
        adapter_names = arguments.pop("adapter_names", None)
        if torch.compiler.is_compiling() and peft_is_traced(
            self._softprompt.name, given_names(arguments), adapter_names is not None
        ):
            return self._peft_forward(arguments)
        return self._forward(arguments, adapter_names)

    forward.__signature__ = signature  # type: ignore[attr-defined]

    def give(cls: type) -> type:
        forward.__qualname__ = f"{cls.__qualname__}.forward"
        cls.forward = outlives_the_patch(forward)  # type: ignore[attr-defined]
        return cls

    return give


class PatchedModel:
    """What stands in front of PEFT's class in the class of a patched model."""

    _softprompt: PatchState

    @torch.compiler.disable
    @synchronized
    def _forward(self, arguments: dict[str, Any], adapter_names: Sequence[str] | None) -> Any:
        """The forward outside of traced graphs.

        Args:
            arguments: of PEFT's forward, by name.
            adapter_names: the adapter of each row, or None: the active one.
        """
        model: Any = self
        base, state = base_of(model), self._softprompt
        reason = transform_in_use(model, arguments.values())
        if reason is not None:  # before anything that reads a tensor
            state.fall_back(reason, adapter_names)
            return self._peft_forward(arguments)
        encoder_decoder = isinstance(model, PeftModelForSeq2SeqLM)
        if not encoder_decoder:  # nothing joins the texts of an encoder
            refuse_joined_texts(arguments)
        names = adapters_of_rows(
            model, adapter_names, arguments.get("input_ids"), arguments.get("inputs_embeds")
        )
        if adapter_names is not None and sharding.is_fsdp(model):
            raise UnsupportedModelError(f"softprompt: {sharding.ROWS_OF_ADAPTERS}")
        early = self._begin(names, arguments)
        plan = plan_of(model)
        # Asked before anything that may differ between ranks: one that did not ask would let the others wait.
        sharded = not encoder_decoder and (sharding.is_fsdp(model) or sharding.by_fsdp(base))
        agreed = not sharded or sharding.all_agree(base, plan.choice)
        reason = reason_for_peft(model, plan, names, arguments)
        if reason is None and not agreed:
            reason = sharding.DISAGREE
        if reason is not None:
            _refuse_without_peft(model, reason)
            state.fall_back(reason, adapter_names)
            return self._checked_peft_forward(plan, arguments)
        others = {"task_ids": None, **arguments}
        model._adjust_prompt_learning_kwargs(model.active_peft_config, kwargs=others)
        output = self._run(plan, names, others, early)
        return_dict = arguments.get("return_dict")
        as_tuple = return_dict is False or (return_dict is None and not base.config.return_dict)
        return output.to_tuple() if as_tuple and not arguments.get(ASKED) else output

    def _peft_forward(self, arguments: dict[str, Any]) -> Any:
        """PEFT's own forward."""
        return super().forward(**with_tensor_of_tasks(self, arguments))  # type: ignore[misc]

    def _checked_peft_forward(self, plan: Plan, arguments: dict[str, Any]) -> Any:
        """PEFT's own forward, behind the checks of the fast route."""
        raise NotImplementedError

    def _begin(self, names: list[str], arguments: dict[str, Any]) -> EarlyStep | None:
        """The step of a call, begun before anything is asked of the model, or None."""
        return None

    def _run(self, plan: Plan, names: list[str], arguments: dict[str, Any], early: EarlyStep | None) -> Any:
        """The output of a call that the fast route serves."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------- copies and files
    def __setstate__(self, values: dict[str, Any]) -> None:
        """A copy, or what a file holds."""
        super().__setstate__(values)  # type: ignore[misc]
        give_state(cast(Any, self), self._softprompt)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and files name the stock class, and leave out what only counts for this instance."""
        model: Any = self
        kept = {
            name: value
            for name, value in model.__getstate__().items()
            if not model_spec.is_own_method(model, name, value)
        }
        state = kept | {STATE: PatchState(self._softprompt.options, self._softprompt.stock_class)}
        front = type(self).__bases__[0]
        return _rebuild, (front, self._softprompt.stock_class), state

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's, which would leave half a folder where a configuration holds a path and no string."""
        for config in cast(Any, self).peft_config.values():
            for name, value in vars(config).items():
                if isinstance(value, os.PathLike):
                    setattr(config, name, os.fspath(value))  # JSON has no paths
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _subclass_of(front: type, stock: type) -> type:
    """The subclass of a PEFT class with `front` before it, under the name of the PEFT class."""
    return type(
        stock.__name__,
        (front, stock),
        {"__module__": stock.__module__, "__qualname__": stock.__qualname__},
    )


def _rebuild(front: type, stock: type) -> Any:
    cls: Any = _subclass_of(front, stock)
    return cls.__new__(cls)


# ---------------------------------------------------------------------------------------------- causal models
@_with_forward_of(PeftModelForCausalLM)
class PatchedCausalLM(PatchedModel, PeftModelForCausalLM):
    """A patched causal language model."""

    _inputs = (*_TEXTS, "labels", "return_dict")  # arguments that are no requests

    def _peft_forward(self, arguments: dict[str, Any]) -> Any:
        """PEFT's own, with the logits that the patch asks for."""
        output = super()._peft_forward(arguments)
        texts = arguments.get("input_ids")
        texts = texts if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
        num_virtual_tokens = getattr(self.active_peft_config, "num_virtual_tokens", 0)
        columns = texts.shape[1] if isinstance(texts, Tensor) and texts.ndim > 1 else 0
        return trimmed(output, self._softprompt.options.logits, num_virtual_tokens, columns)

    def _checked_peft_forward(self, plan: Plan, arguments: dict[str, Any]) -> Any:
        if any(arguments.get(name) is not None for name in NAMES):
            return self._peft_forward(arguments)
        check_peft_input(base_of(self), **{name: arguments.get(name) for name in (*_TEXTS, "labels")})
        with without_leftovers(base_of(self)):
            return self._peft_forward(arguments)

    def _begin(self, names: list[str], arguments: dict[str, Any]) -> EarlyStep | None:
        state = self._softprompt
        runner, options = state.runner, state.options
        if runner is None or options.placement != "prefix" or arguments.get(ASKED):
            return None

        def batch() -> Batch | None:
            is_plain = runner.is_of(base_of(self)) and leave_no_trace(self, names)
            return batch_of(self, names, arguments)[0] if is_plain else None

        return runner.begin(batch, options, arguments.get("num_items_in_batch"))

    def _run(self, plan: Plan, names: list[str], arguments: dict[str, Any], early: EarlyStep | None) -> Any:
        """Loss and logits, or what TRL's head gives where it was asked."""
        base, state = base_of(self), self._softprompt
        num_items = arguments.get("num_items_in_batch")
        batch = batch_of(self, names, arguments)[0] if early is None else early.batch
        if base.training:
            state.say_dropout(base)
        runner = state.runner_of(base)
        try:
            rows = placed(self, plan, batch)
            if arguments.get(ASKED):
                items = {} if num_items is None else {"num_items_in_batch": num_items}
                return runner.token_scores(plan, rows, state.options, items)
            loss, logits = runner.run(
                plan, rows, state.options, num_items=num_items, columns=batch.shape[1], early=early
            )
        except IndexError:
            # Names the column that the user gave it in.
            raise_out_of_range(batch.input_ids, batch.labels, model_spec.vocab_size(base))
            raise
        return plan.output_class(loss=loss, logits=logits)

    @outlives_the_patch
    @synchronized
    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """PEFT's generate, with each prompt computed once and kept for later calls.

        Beside the arguments of transformers' generate `adapter_names` gives each row its adapter.
        """
        base, options = base_of(self), self._softprompt.options
        kwargs = with_tensor_of_tasks(self, kwargs)
        with _without_peft_prepare_inputs(base):
            if self._adapters_disabled:
                if adapter_names is not None:
                    raise ValueError("adapter_names was given inside of disable_adapter()")
                return super().generate(*args, **kwargs)
            if sharding.is_fsdp(self):
                raise UnsupportedModelError(f"softprompt: {sharding.ONLY_FORWARD}: generate does not")
            if options.placement != "prefix":
                if adapter_names is not None:
                    raise UnsupportedModelError("softprompt: adapter_names has no generate behind BOS")
                call = read_call(self, args, kwargs, None, compact=options.compact, backend=AUTO)
                refuse_what_goes_wrong(call, 'placement="after_bos" puts it behind the first token')
                return self._peft_generate(*args, **kwargs)
            if not hasattr(base, "model"):  # as PEFT does
                base.generation_config = self.generation_config
            plan = plan_of(self)
            call = read_call(
                self, args, kwargs, adapter_names, compact=options.compact, backend=options.backend
            )
            reason = stock_reason(self, plan, call)
            if reason is not None:
                _refuse_without_peft(self, reason)
                if call.use_cache and not tells_its_length(base):
                    reason = f"{reason}; without a cache, of which PEFT cannot ask whether it has the prompt"
                    kwargs = {**kwargs, "use_cache": False}
                self._softprompt.fall_back(reason, adapter_names, "generate")
                return self._peft_generate(*args, **kwargs)
            self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=call.arguments)
            call.arguments.pop("task_ids", None)  # of other types of adapters
            return _generate(self, plan, call)

    def _peft_generate(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own. Over another PEFT model it sets its inputs there, where nothing asks for them, and the
        prompt would be left out.
        """
        if is_nested(self):
            if has_prompt_below(self):
                raise UnsupportedModelError(
                    "softprompt: PEFT's own generate cannot put one prompt before another, each in a PEFT "
                    "model of its own: give one model both adapters (model.add_adapter)"
                )
            base_of(self).__dict__["prepare_inputs_for_generation"] = self.prepare_inputs_for_generation
        return super().generate(*args, **kwargs)

    @outlives_the_patch
    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """PEFT's inputs of one step of generate, with the prompt where the patch puts it.

        The signature is PEFT's: generate looks there for the arguments that it may take.
        """
        stock = super().prepare_inputs_for_generation
        inputs = step_inputs(self, stock, *args, task_ids=task_ids, **kwargs)
        options = self._softprompt.options
        if options.placement == "prefix":
            return inputs
        return place_in_generation(
            base_of(self),
            inputs,
            args[0] if args else kwargs["input_ids"],
            self.active_peft_config.num_virtual_tokens,
            compact=options.compact,
        )


def _generate(model: Any, plan: Plan, call: GenerateCall) -> Any:
    known = model._softprompt.prompts
    for name in set(known) - set(model.peft_config):
        del known[name]
    with torch.no_grad():
        prompts = {name: prompt_of(model, name, tokens_of(model, name)) for name in dict.fromkeys(call.names)}
    return generate(base_of(model), plan, call, prompts, known)


# ------------------------------------------------------------------------------------------- encoder-decoders
@_with_forward_of(PeftModelForSeq2SeqLM)
class PatchedSeq2SeqLM(PatchedModel, PeftModelForSeq2SeqLM):
    """A patched encoder-decoder."""

    _inputs = (*_TEXTS, *_DECODER, "return_dict")

    def _checked_peft_forward(self, plan: Plan, arguments: dict[str, Any]) -> Any:
        if arguments.get("encoder_outputs") is None:
            check_peft_input(base_of(self), labels=None, **{name: arguments.get(name) for name in _TEXTS})
        labels = arguments.get("labels")
        if isinstance(labels, Tensor) and labels.ndim == 2 and plan.vocab_size:
            raise_out_of_range(None, labels, plan.vocab_size)
        return self._peft_forward(arguments)

    def _run(
        self, plan: Any, names: list[str], arguments: dict[str, Any], early: EarlyStep | None = None
    ) -> Any:
        """Loss, logits and the encoder's hidden states."""
        base, state = base_of(self), self._softprompt
        batch, decoder_prompts = seq2seq_batch_of(self, names, arguments)
        inputs = check_decoder_inputs(arguments, batch.shape[0], prompt_width(base), decoder_prompts)
        options = CallOptions(
            embedding=self.word_embeddings,
            masked=arguments.get("attention_mask") is not None,
            use_cache=arguments.get("use_cache"),
            num_items=arguments.get("num_items_in_batch"),
            backend=state.options.backend,
        )
        loss, logits, encoded, trimmed_columns = run_encoder_decoder(base, plan, batch, inputs, options)
        if trimmed_columns and base.training:
            state.say_dropout(base, _LEFT_OUT)
        return plan.output_class(loss=loss, logits=logits, encoder_last_hidden_state=encoded)

    @outlives_the_patch
    @synchronized
    def generate(self, *, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """PEFT's generate, whose encoder runs once for a call, prompt included.

        Beside the arguments of PEFT's generate `adapter_names` gives each row its adapter.
        """
        base = base_of(self)
        with _without_peft_prepare_inputs(base):
            if adapter_names is None:
                return super().generate(**with_tensor_of_tasks(self, kwargs))
            if self._adapters_disabled:
                raise ValueError("adapter_names was given inside of disable_adapter()")
            return base.generate(**_prompted_inputs(self, adapter_names, kwargs))


@torch.no_grad()
def _prompted_inputs(model: Any, adapter_names: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the base model's generate, with the prompt of each row in front of its text."""
    if "input_ids" not in kwargs:
        raise ValueError("input_ids must be provided for Peft model generation")
    own = ("input_ids", "attention_mask", "task_ids")
    given = {name: kwargs.get(name) for name in own}
    names = adapters_of_rows(model, adapter_names, given["input_ids"], None)
    batch, _ = seq2seq_batch_of(model, names, given)
    check_peft_input(base_of(model), given["input_ids"], None, given["attention_mask"], None)
    embeds, mask = prompted_texts(model.word_embeddings, batch, model._softprompt.options.backend)
    others = {name: value for name, value in kwargs.items() if name not in own}
    return {**others, "inputs_embeds": embeds, "attention_mask": mask}


# ------------------------------------------------------------------------------------------------ for all
# PEFT's classes, and what the patch puts in front of each.
FRONTS: dict[type[PeftModel], Any] = {
    PeftModelForCausalLM: PatchedCausalLM,
    PeftModelForSeq2SeqLM: PatchedSeq2SeqLM,
}


def patched_class(stock: type) -> type:
    """The class of a patched model whose class was `stock`."""
    return next(_subclass_of(front, stock) for cls, front in FRONTS.items() if issubclass(stock, cls))


def _refuse_without_peft(model: Any, reason: str) -> None:
    """Raises UnsupportedModelError where PEFT's own forward and generate fail on a sharded model."""
    seq2seq = isinstance(model, PeftModelForSeq2SeqLM)
    if not seq2seq and sharding.embeds_in_parts(base_of(model)) and not sharding.is_fsdp(model):
        raise UnsupportedModelError(f"softprompt: {reason}; {sharding.NOT_EMBEDDED}")
