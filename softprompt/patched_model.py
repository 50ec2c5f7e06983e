"""A patched causal LM: PEFT's forward and generate, on the fast route where it serves the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor

from softprompt.batches import batch_of, placed, tokens_of
from softprompt.calls import (
    adapters_of_rows,
    check_stock_input,
    foreign_method,
    own_inputs,
    reason_for_stock,
    refuse_joined_texts,
    taking_turns,
)
from softprompt.compiling import asked_for, stock_is_traced, transform_in_use
from softprompt.encoders import prompt_of, with_tensor_of_tasks
from softprompt.engine import Plan, families, plan_for, sharding
from softprompt.engine.answers import trimmed
from softprompt.engine.caches import NAMES
from softprompt.engine.leftovers import without_leftovers
from softprompt.engine.placement import place_in_generation
from softprompt.engine.runner import UnsupportedModelError
from softprompt.engine.token_scores import ASKED
from softprompt.generation import GenerateCall, generate, read_call, refuse_what_goes_wrong, stock_reason
from softprompt.generation.stock import step_inputs, tells_its_length
from softprompt.instances import PatchedInstance, is_own_method, outlives_the_patch
from softprompt.layout import raise_out_of_range
from softprompt.nesting import base_of, has_prompt_below, is_nested
from softprompt.notices import fall_back, say_dropout
from softprompt.ops.library import AUTO
from softprompt.state import runner_of, state_of


class PatchedCausalLM(PatchedInstance, PeftModelForCausalLM):
    """What `patch` puts in front of the class of a causal language model."""

    @outlives_the_patch
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | Sequence[int] | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """PEFT's forward, on the packed route where that serves the call.

        Beside PEFT's arguments `adapter_names` gives each row of the batch its adapter.
        """
        texts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        extra = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "task_ids": task_ids,
            **kwargs,
        }
        if torch.compiler.is_compiling() and stock_is_traced(
            self._softprompt.name, labels is not None, asked_for(extra), adapter_names is not None
        ):
            return self._stock_forward(texts, extra, return_dict)
        return self._own_forward(texts, extra, return_dict, adapter_names)

    @torch.compiler.disable
    @taking_turns
    def _own_forward(
        self,
        texts: dict[str, Tensor | None],
        extra: dict[str, Any],
        return_dict: bool | None,
        adapter_names: Sequence[str] | None,
    ) -> Any:
        input_ids, inputs_embeds = texts["input_ids"], texts["inputs_embeds"]
        reason = transform_in_use(self, texts.values())
        if reason is not None:  # before anything that reads a tensor
            fall_back(self, reason, adapter_names)
            return self._stock_forward(texts, extra, return_dict)
        refuse_joined_texts(texts["attention_mask"], extra)
        names = adapters_of_rows(self, adapter_names, input_ids, inputs_embeds)
        if adapter_names is not None and sharding.is_fsdp(self):
            raise UnsupportedModelError(f"softprompt: {sharding.ROWS_OF_ADAPTERS}")
        plan = plan_of(self)
        # Asked before anything that may differ between ranks: one that did not ask would let the others wait.
        agreed = not _is_sharded(self) or sharding.all_agree(base_of(self), plan.choice)
        given = input_ids if inputs_embeds is None else inputs_embeds
        shape = (0, 0)
        if isinstance(given, Tensor) and given.ndim > 1:
            shape = (given.shape[0], given.shape[1])
        compact = self._softprompt.options.positions == "compact"
        reason = reason_for_stock(self, plan, names, texts["labels"], shape, extra, compact=compact)
        if reason is None and not agreed:
            reason = sharding.DISAGREE
        if reason is not None:
            _refuse_without_peft(self, reason)
            fall_back(self, reason, adapter_names)
            if any(extra.get(name) is not None for name in NAMES):
                return self._stock_forward(texts, extra, return_dict)
            check_stock_input(base_of(self), **texts)
            with without_leftovers(base_of(self)):
                return self._stock_forward(texts, extra, return_dict)
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=extra)
        answer = _fast(
            self,
            plan,
            names,
            **texts,
            task_ids=extra["task_ids"],
            num_items=extra.get("num_items_in_batch"),
            scores=bool(extra.get(ASKED)),
        )
        if extra.get(ASKED):
            return answer
        loss, logits = answer
        if return_dict is False or (return_dict is None and not base_of(self).config.return_dict):
            return (logits,) if loss is None else (loss, logits)
        return plan.output_class(loss=loss, logits=logits)

    def _stock_forward(
        self, texts: dict[str, Tensor | None], extra: dict[str, Any], return_dict: bool | None
    ) -> Any:
        """PEFT's own, with the logits that the patch asks for."""
        output = super().forward(**texts, return_dict=return_dict, **with_tensor_of_tasks(self, extra))
        which = self._softprompt.options.logits
        if which == "full":
            return output
        given = texts["input_ids"] if texts["inputs_embeds"] is None else texts["inputs_embeds"]
        num_virtual_tokens = getattr(self.active_peft_config, "num_virtual_tokens", 0)
        columns = given.shape[1] if isinstance(given, Tensor) and given.ndim > 1 else 0
        return trimmed(output, which, num_virtual_tokens, columns)

    @outlives_the_patch
    @taking_turns
    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """PEFT's generate, with each prompt computed once and kept for later calls.

        Beside the arguments of transformers' generate `adapter_names` gives each row its adapter.
        """
        base = base_of(self)
        kwargs = with_tensor_of_tasks(self, kwargs)
        with own_inputs(base):
            if self._adapters_disabled:
                if adapter_names is not None:
                    raise ValueError("adapter_names was given inside of disable_adapter()")
                return super().generate(*args, **kwargs)
            if sharding.is_fsdp(self):
                raise UnsupportedModelError(f"softprompt: {sharding.ONLY_FORWARD}: generate does not")
            if self._softprompt.options.placement != "prefix":
                if adapter_names is not None:
                    raise UnsupportedModelError("softprompt: adapter_names has no generate behind BOS")
                compact = self._softprompt.options.positions == "compact"
                call = read_call(self, args, kwargs, None, compact=compact, backend=AUTO)
                refuse_what_goes_wrong(call, 'placement="after_bos" puts it behind the first token')
                return self._stock_generate(*args, **kwargs)
            if not hasattr(base, "model"):  # as PEFT does
                base.generation_config = self.generation_config
            plan, options = plan_of(self), self._softprompt.options
            compact = options.positions == "compact"
            call = read_call(self, args, kwargs, adapter_names, compact=compact, backend=options.backend)
            reason = stock_reason(self, plan, call) or _replaced_in_generate(self)
            if reason is not None:
                _refuse_without_peft(self, reason)
                if call.use_cache and not tells_its_length(base):
                    reason = f"{reason}; without a cache, of which PEFT cannot ask whether it has the prompt"
                    kwargs = {**kwargs, "use_cache": False}
                fall_back(self, reason, adapter_names, "generate")
                return self._stock_generate(*args, **kwargs)
            self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=call.arguments)
            call.arguments.pop("task_ids", None)  # of other types of adapters
            return _generate(self, plan, call)

    def _stock_generate(self, *args: Any, **kwargs: Any) -> Any:
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
            compact=options.positions == "compact",
        )


def plan_of(model: Any) -> Plan:
    """The plan of the base model."""
    base, sharded = base_of(model), sharding.is_fsdp(model)
    if state_of(model) is None:
        return plan_for(base, sharded=sharded)
    return runner_of(model, base).plan(sharded=sharded)


def _is_sharded(model: Any) -> bool:
    return sharding.is_fsdp(model) or sharding.by_fsdp(base_of(model))


def _refuse_without_peft(model: Any, reason: str) -> None:
    """Raises UnsupportedModelError where PEFT's own forward and generate fail on a sharded model."""
    if sharding.embeds_in_parts(base_of(model)) and not sharding.is_fsdp(model):
        raise UnsupportedModelError(f"softprompt: {reason}; {sharding.NOT_EMBEDDED}")


def _replaced_in_generate(model: Any) -> str | None:
    """Why PEFT's generate has to be called for what was put in place of its parts, or None."""
    name = "prepare_inputs_for_generation"
    own = model.__dict__.get(name)
    if own is not None and not is_own_method(model, name, own):
        return f"the model's {name} was replaced on the instance"
    return foreign_method(model, "generate") or foreign_method(model, name)


def _generate(model: Any, plan: Plan, call: GenerateCall) -> Any:
    known = model._softprompt.prompts
    for name in set(known) - set(model.peft_config):
        del known[name]
    with torch.no_grad():
        prompts = {name: _prompt_of(model, name) for name in dict.fromkeys(call.names)}
    return generate(base_of(model), plan, call, prompts, known)


def _fast(
    model: Any,
    plan: Plan,
    names: list[str],
    *,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    task_ids: Tensor | Sequence[int] | None,
    num_items: Any,
    scores: bool,
) -> Any:
    """Loss and logits, or what TRL's head gives where it was asked for `scores`."""
    base, options = base_of(model), model._softprompt.options
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
    runner = runner_of(model, base)
    try:
        rows = placed(model, plan, batch)
        if scores:
            arguments = {} if num_items is None else {"num_items_in_batch": num_items}
            return runner.token_scores(plan, rows, options, arguments)
        return runner.run(plan, rows, options, num_items=num_items, columns=batch.shape[1])
    except IndexError:
        # Names the column that the user gave it in.
        raise_out_of_range(batch.input_ids, batch.labels, families.vocab_size(base))
        raise


def _prompt_of(model: Any, name: str) -> Tensor:
    """[P, H] of an adapter that has one prompt for all rows, through its own encoder."""
    return prompt_of(model, name, tokens_of(model, name))
