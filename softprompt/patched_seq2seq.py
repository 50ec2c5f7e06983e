"""A patched encoder-decoder: PEFT's forward and generate, on the padded route where it serves the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModelForSeq2SeqLM
from torch import Tensor

from softprompt.batches import seq2seq_batch_of
from softprompt.calls import adapters_of_rows, check_stock_input, own_inputs, reason_for_stock, taking_turns
from softprompt.compiling import asked_for, stock_is_traced, transform_in_use
from softprompt.encoders import has_tasks, with_tensor_of_tasks
from softprompt.engine import sharding
from softprompt.engine.forward import prompt_width
from softprompt.engine.seq2seq import check_answers, prompted_texts
from softprompt.engine.seq2seq_plan import Seq2SeqPlan, run_seq2seq, seq2seq_plan_for
from softprompt.instances import PatchedInstance, outlives_the_patch
from softprompt.layout import raise_out_of_range
from softprompt.notices import fall_back, say_dropout

LEFT_OUT = "pads that all rows have, and columns behind the last label, are left out and draw no masks"


class PatchedSeq2SeqLM(PatchedInstance, PeftModelForSeq2SeqLM):
    """What `patch` puts in front of the class of an encoder-decoder."""

    @outlives_the_patch
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | Sequence[int] | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """PEFT's forward, on the padded route where that serves the call.

        Beside PEFT's arguments `adapter_names` gives each row of the batch its adapter.
        """
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        decoder = {
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
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
            return self._stock_forward(texts, decoder, extra, return_dict)
        return self._own_forward(texts, decoder, extra, return_dict, adapter_names)

    @torch.compiler.disable
    @taking_turns
    def _own_forward(
        self,
        texts: dict[str, Tensor | None],
        decoder: dict[str, Tensor | None],
        extra: dict[str, Any],
        return_dict: bool | None,
        adapter_names: Sequence[str] | None,
    ) -> Any:
        input_ids, inputs_embeds, labels = texts["input_ids"], texts["inputs_embeds"], decoder["labels"]
        reason = transform_in_use(self, (*texts.values(), *decoder.values()))
        if reason is not None:  # before anything that reads a tensor
            fall_back(self, reason, adapter_names)
            return self._stock_forward(texts, decoder, extra, return_dict)
        names = adapters_of_rows(self, adapter_names, input_ids, inputs_embeds)
        base = self.get_base_model()
        plan = seq2seq_plan_for(base, sharded=sharding.is_fsdp(self))
        given = input_ids if inputs_embeds is None else inputs_embeds
        shape = (0, 0)
        if isinstance(given, Tensor) and given.ndim > 1:
            shape = (given.shape[0], given.shape[1])
        compact = self._softprompt.options.positions == "compact"
        reason = reason_for_stock(self, plan, names, labels, shape, extra, compact=compact)
        reason = reason or _reason_of_tasks(self, names, decoder)
        if reason is not None:
            fall_back(self, reason, adapter_names)
            if extra.get("encoder_outputs") is None:
                check_stock_input(base, labels=None, **texts)
            if isinstance(labels, Tensor) and labels.ndim == 2 and plan.vocab_size:
                raise_out_of_range(None, labels, plan.vocab_size)
            return self._stock_forward(texts, decoder, extra, return_dict)
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=extra)
        output = _fast(
            self,
            plan,
            names,
            texts=texts,
            decoder=decoder,
            task_ids=extra["task_ids"],
            use_cache=extra.get("use_cache"),
            num_items=extra.get("num_items_in_batch"),
        )
        as_tuple = return_dict is False or (return_dict is None and not base.config.return_dict)
        return output.to_tuple() if as_tuple else output

    def _stock_forward(
        self,
        texts: dict[str, Tensor | None],
        decoder: dict[str, Tensor | None],
        extra: dict[str, Any],
        return_dict: bool | None,
    ) -> Any:
        """PEFT's own."""
        return super().forward(
            **texts, **decoder, return_dict=return_dict, **with_tensor_of_tasks(self, extra)
        )

    @outlives_the_patch
    @taking_turns
    def generate(self, *, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """PEFT's generate, whose encoder runs once for a call, prompt included.

        Beside the arguments of PEFT's generate `adapter_names` gives each row its adapter.
        """
        base = self.get_base_model()
        with own_inputs(base):
            if adapter_names is None:
                return super().generate(**with_tensor_of_tasks(self, kwargs))
            if self._adapters_disabled:
                raise ValueError("adapter_names was given inside of disable_adapter()")
            return base.generate(**_prompted_inputs(self, adapter_names, kwargs))


def _reason_of_tasks(model: Any, names: Sequence[str], decoder: dict[str, Tensor | None]) -> str | None:
    """Why a call of multitask prompt tuning goes to PEFT's forward, as a sentence, or None."""
    given = [name for name, value in decoder.items() if value is not None and name != "labels"]
    if not has_tasks(model, names[0]) or not (given or decoder["labels"] is None):
        return None
    what = f"got {', '.join(given)}" if given else "got no labels"
    return f"multitask prompt tuning makes the decoder's inputs from the labels, and {what}"


def _fast(
    model: Any,
    plan: Seq2SeqPlan,
    names: list[str],
    *,
    texts: dict[str, Tensor | None],
    decoder: dict[str, Tensor | None],
    task_ids: Tensor | Sequence[int] | None,
    use_cache: bool | None,
    num_items: Any,
) -> Any:
    base = model.get_base_model()
    batch, decoder_prompts = seq2seq_batch_of(model, names, task_ids=task_ids, **texts)
    answers = check_answers(batch.shape[0], prompt_width(base), prompts=decoder_prompts, **decoder)
    loss, logits, encoded, trimmed = run_seq2seq(
        base,
        plan,
        batch,
        answers,
        embedding=model.word_embeddings,
        masked=texts["attention_mask"] is not None,
        use_cache=use_cache,
        num_items=num_items,
        backend=model._softprompt.options.backend,
    )
    if trimmed and base.training:
        say_dropout(model, base, LEFT_OUT)
    return plan.output_class(loss=loss, logits=logits, encoder_last_hidden_state=encoded)


@torch.no_grad()
def _prompted_inputs(model: Any, adapter_names: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the base model's generate, with the prompt of each row in front of its text."""
    if "input_ids" not in kwargs:
        raise ValueError("input_ids must be provided for Peft model generation")
    arguments = dict(kwargs)
    input_ids, mask = arguments.pop("input_ids"), arguments.pop("attention_mask", None)
    names = adapters_of_rows(model, adapter_names, input_ids, None)
    batch, _ = seq2seq_batch_of(
        model,
        names,
        input_ids=input_ids,
        attention_mask=mask,
        inputs_embeds=None,
        task_ids=arguments.pop("task_ids", None),
    )
    base = model.get_base_model()
    check_stock_input(base, input_ids, None, mask, None)
    embeds, mask = prompted_texts(model.word_embeddings, batch, model._softprompt.options.backend)
    return {**arguments, "inputs_embeds": embeds, "attention_mask": mask}
