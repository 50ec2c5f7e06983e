"""Which calls of a PEFT model the fast route serves, and why the others are PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModelForSeq2SeqLM
from torch import Tensor

from softprompt import prompt_encoders
from softprompt.engine import Plan, model_spec, sharding
from softprompt.engine.batch import check_texts
from softprompt.engine.caches import NAMES
from softprompt.engine.model_spec import prompt_width
from softprompt.engine.runner import obstacle_to
from softprompt.engine.trl_head import ASKED, scores_tokens
from softprompt.layout import raise_out_of_range
from softprompt.nesting import base_of, nesting_obstacle

# Where the texts of a row begin, as collators without padding say it.
_JOINED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_SERVED = ("output_attentions", "output_hidden_states", "use_cache", "num_items_in_batch")
IGNORED_BY_PEFT = ("position_ids", "token_type_ids", "task_ids")


def foreign_method(model: Any, name: str) -> str | None:
    """Why a method of a PEFT model's class has to be called, as a sentence, or None: it is not PEFT's."""
    state = getattr(model, "_softprompt", None)
    stock: Any = type(model) if state is None else state.stock_class
    if prompt_encoders.is_pefts(getattr(stock, name)):
        return None
    return f"{stock.__name__} has a {name} of its own, which the packed one would not call"


def adapter_obstacle(model: Any, names: Sequence[str], *, as_forward: bool = False) -> str | None:
    """Why these adapters of a PEFT model are not served, as a sentence, or None.

    Args:
        model: the PEFT model.
        names: of the adapters.
        as_forward: whether the caller does all that a patched forward does: gives multitask adapters the task
            of each row, and puts the prompt where the patch wants it.
    """
    state = getattr(model, "_softprompt", None)
    if state is not None and state.options.placement != "prefix" and not as_forward:
        return f'the model is patched with placement="{state.options.placement}", which only forward serves'
    unshared = prompt_encoders.unshared(model, names)
    if as_forward:
        obstacle = foreign_method(model, "forward")
        if obstacle is not None:
            return obstacle
        if unshared is not None and list(names) != [model.active_adapter] * len(names):
            return f"{unshared}: it gives prompts of the active adapter alone, and adapter_names has others"
    elif unshared is not None:
        return f"{unshared}, and only forward asks it for the prompt of each row"
    seq2seq = isinstance(model, PeftModelForSeq2SeqLM)
    for name in dict.fromkeys(names):
        obstacle = prompt_encoders.encoder_obstacle(
            name,
            model.peft_config[name],
            per_row=as_forward,
            halves=seq2seq,
        )
        if obstacle is not None:
            return obstacle
    obstacle = nesting_obstacle(model)
    if obstacle is not None:
        return obstacle
    base = base_of(model)
    if not as_forward and (sharding.is_fsdp(model) or sharding.by_fsdp(base)):
        return sharding.ONLY_FORWARD
    if sharding.has_foreign_hooks(base, known_forward=scores_tokens(base)):
        return "the language model itself has hooks or a replaced forward, which the fast route would skip"
    # T5's encoder has an embedding of its own, with the weight of the model's: it is handed to the route.
    if not seq2seq and model.word_embeddings is not base.get_input_embeddings():
        return "PEFT embeds tokens with another module than the model's input embeddings"
    return None


def check_peft_input(
    base: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> None:
    """Raises the errors of the fast route, for a call that PEFT serves."""
    ids, _ = check_texts(
        prompt_width(base),
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        labels=labels,
    )
    raise_out_of_range(ids, labels, model_spec.vocab_size(base))


def refuse_joined_texts(arguments: dict[str, Any]) -> None:
    """Raises ValueError where a row of a call holds several texts.

    PEFT drops what tells them apart: it puts one prompt in front of the row, and each text sees those before.
    """
    found = [name for name in _JOINED if arguments.get(name) is not None]
    position_ids = arguments.get("position_ids")
    whole = all(arguments.get(name) is None for name in ("attention_mask", *NAMES))
    if whole and isinstance(position_ids, Tensor) and bool((position_ids[..., 1:] == 0).any()):
        found.append("position_ids that begin again")
    if found:
        raise ValueError(
            f"the rows of this batch hold several texts ({', '.join(found)}): behind a prompt of PEFT each "
            "would see the texts before it; expected one text in each row, padded (TRL: packing=False and "
            "padding_free=False; pads are not computed here, so that packing saves nothing)"
        )


def reason_for_peft(model: Any, plan: Plan, names: list[str], arguments: dict[str, Any]) -> str | None:
    """Why a call goes to PEFT's forward, as a sentence, or None.

    Args:
        model: the patched model.
        plan: of its base model.
        names: adapters of the call.
        arguments: of PEFT's forward, by name.
    """
    base = base_of(model)
    obstacle = adapter_obstacle(model, names, as_forward=True) or _too_long(model, plan, names, arguments)
    if obstacle is not None:
        return obstacle
    for name in ("output_attentions", "output_hidden_states"):
        asked = arguments.get(name)
        if asked or (asked is None and getattr(base.config, name, False)):
            return f"{name} was asked for, which only PEFT's own forward has"
    use_cache, labelled = arguments.get("use_cache"), arguments.get("labels") is not None
    if use_cache:
        return "use_cache=True was asked for, and the fast route keeps none"
    loss = model_spec.own_loss(base) if labelled else None
    if loss is not None:
        return f"the model has a loss function of its own ({loss}), which is given whole rows of logits"
    if use_cache is None and getattr(base.config, "use_cache", True) and not labelled and not model.training:
        return (
            "without labels in evaluation mode the output holds a cache; use_cache=False takes the fast route"
        )
    if arguments.get(ASKED) and (sharding.is_fsdp(model) or sharding.by_fsdp(base)):
        return "TRL's fused head reads a weight that fully_shard gathers for the model's own forward only"
    # Of the head itself, which only scores what has a label.
    scored = scores_tokens(base) and (labelled or not arguments.get(ASKED))
    known = {*model._inputs, *_SERVED, *IGNORED_BY_PEFT, *((ASKED,) if scored else ())}
    others = [name for name, value in arguments.items() if value is not None and name not in known]
    if others:
        return f"the call has arguments that the fast route does not serve: {', '.join(sorted(others))}"
    return _reason_of_tasks(model, names, arguments)


def _too_long(model: Any, plan: Plan, names: list[str], arguments: dict[str, Any]) -> str | None:
    """Why the plan's fast route cannot take a call of this size, as a sentence, or None."""
    texts = arguments.get("input_ids")
    texts = texts if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
    num_rows, length = texts.shape[:2] if isinstance(texts, Tensor) and texts.ndim > 1 else (0, 0)
    lengths = {name: model.peft_config[name].num_virtual_tokens for name in names}
    prompts = sum(lengths.values())
    # Each row may have its own.
    if arguments.get("task_ids") is not None or prompt_encoders.unshared(model, names):
        prompts = max(lengths.values()) * num_rows
    return obstacle_to(
        plan,
        compact=model._softprompt.options.compact,
        longest=length + max(lengths.values()),
        rows=prompts + num_rows * length,
    )


def _reason_of_tasks(model: Any, names: Sequence[str], arguments: dict[str, Any]) -> str | None:
    """Why a call of an encoder-decoder with multitask prompt tuning goes to PEFT's forward, or None."""
    if not isinstance(model, PeftModelForSeq2SeqLM) or not prompt_encoders.has_tasks(model, names[0]):
        return None
    given = [n for n, value in arguments.items() if value is not None and n.startswith("decoder_")]
    if not given and arguments.get("labels") is not None:
        return None
    what = f"got {', '.join(given)}" if given else "got no labels"
    return f"multitask prompt tuning makes the decoder's inputs from the labels, and {what}"
