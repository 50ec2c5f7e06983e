"""Which calls of a PEFT model the fast route serves, and why not."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from peft import PeftModel, PeftModelForSeq2SeqLM
from torch import Tensor, nn

from softprompt import encoders
from softprompt.engine import Plan, families, registry, sharding
from softprompt.engine.batch import check_tensor, check_texts
from softprompt.engine.caches import NAMES
from softprompt.engine.forward import prompt_width
from softprompt.engine.runner import obstacle_to
from softprompt.engine.token_scores import ASKED, scores_tokens
from softprompt.layout import raise_out_of_range
from softprompt.nesting import base_of, nesting_obstacle

Method = TypeVar("Method", bound=Callable[..., Any])
# Where the texts of a row begin, as collators without padding say it.
_JOINED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def without_wrapped(wrapper: Callable[..., Any], method: Method) -> Method:
    """The wrapper, with the method's signature. accelerate unwraps a forward down to the innermost one, and
    would lose the wrapper.
    """
    wrapper.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    del wrapper.__wrapped__  # type: ignore[attr-defined]
    return cast(Method, wrapper)


def taking_turns(method: Method) -> Method:
    """A method of a PEFT model in which one thread at a time is, for all methods and each base model.

    Packed calls choose the attention of the base model, and both kinds of `generate` its inputs: a call in
    another thread, fast or not, would compute with them.
    """

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "get_base_model"):
            return method(self, *args, **kwargs)  # which says what it takes
        # Reentrant: a model may assist itself, or be asked again by a logits processor.
        with registry.lock_of(base_of(self)):
            return method(self, *args, **kwargs)

    return without_wrapped(alone, method)


@contextlib.contextmanager
def own_inputs(base: nn.Module) -> Iterator[None]:
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


def adapters_of_rows(
    model: Any,
    adapter_names: Sequence[str] | None,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> list[str]:
    """The adapter of each row, or the active one alone where the call names none.

    Raises:
        ValueError: not one known adapter for each row.
    """
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is not None:
        check_tensor("input_ids" if inputs_embeds is None else "inputs_embeds", given)
    if adapter_names is None:
        return [model.active_adapter]
    if not isinstance(adapter_names, Sequence) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names must be a list of names of adapters, got {adapter_names!r}")
    num_rows = len(given) if given is not None and given.ndim else len(adapter_names)
    if isinstance(adapter_names, str) or len(adapter_names) != num_rows:
        raise ValueError(
            f"adapter_names must name one adapter for each of the {num_rows} rows, got {adapter_names!r}"
        )
    unknown = sorted(set(adapter_names) - set(model.peft_config))
    if unknown:
        raise ValueError(
            f"adapter_names has unknown adapters {', '.join(unknown)}; the model has "
            f"{', '.join(model.peft_config)}"
        )
    return list(adapter_names)


def prompt_of(model: Any, name: str) -> Tensor:
    """[P, H] of an adapter of a PEFT model, patched or not, through its own encoder."""
    tokens = model.prompt_tokens[name].to(next(model.prompt_encoder[name].parameters()).device)
    return encoders.prompt_of(model, name, tokens)


def foreign_method(model: Any, name: str) -> str | None:
    """Why a method of a PEFT model's class has to be called, as a sentence, or None: it is not PEFT's."""
    state = getattr(model, "_softprompt", None)
    stock: Any = type(model) if state is None else state.stock_class
    if encoders.is_pefts(getattr(stock, name)):
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
    unshared = encoders.unshared(model, names)
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
        obstacle = encoders.encoder_obstacle(
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


def check_stock_input(
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
    raise_out_of_range(ids, labels, families.vocab_size(base))


def refuse_joined_texts(attention_mask: Tensor | None, extra: dict[str, Any]) -> None:
    """Raises ValueError where a row holds several texts.

    PEFT drops what tells them apart: it puts one prompt in front of the row, and each text sees those before.
    """
    found = [name for name in _JOINED if extra.get(name) is not None]
    position_ids = extra.get("position_ids")
    whole = attention_mask is None and all(extra.get(name) is None for name in NAMES)
    if whole and isinstance(position_ids, Tensor) and bool((position_ids[..., 1:] == 0).any()):
        found.append("position_ids that begin again")
    if found:
        raise ValueError(
            f"the rows of this batch hold several texts ({', '.join(found)}): behind a prompt of PEFT each "
            "would see the texts before it; expected one text in each row, padded (TRL: packing=False and "
            "padding_free=False; pads are not computed here, so that packing saves nothing)"
        )


def reason_for_stock(
    model: Any,
    plan: Plan,
    names: list[str],
    labels: Tensor | None,
    text_shape: tuple[int, int],
    extra: dict[str, Any],
    *,
    compact: bool,
) -> str | None:
    """Why this call goes to PEFT's forward, as a sentence, or None.

    Args:
        model: the PEFT model.
        plan: of its base model.
        names: adapters of the call.
        labels: of the call.
        text_shape: B and L.
        extra: the other arguments of the call.
        compact: whether pads are left out of the positions.
    """
    base = base_of(model)
    obstacle = adapter_obstacle(model, names, as_forward=True)
    if obstacle is not None:
        return obstacle
    lengths = {name: model.peft_config[name].num_virtual_tokens for name in names}
    prompts = sum(lengths.values())
    if extra.get("task_ids") is not None or encoders.unshared(model, names):  # of each row, maybe
        prompts = max(lengths.values()) * text_shape[0]
    obstacle = obstacle_to(
        plan,
        compact=compact,
        longest=text_shape[1] + max(lengths.values()),
        rows=prompts + text_shape[0] * text_shape[1],
    )
    if obstacle is not None:
        return obstacle
    for name in ("output_attentions", "output_hidden_states"):
        asked = extra.get(name)
        if asked or (asked is None and getattr(base.config, name, False)):
            return f"{name} was asked for, which only PEFT's own forward has"
    if extra.get("use_cache"):
        return "use_cache=True was asked for, and the fast route keeps none"
    loss = families.own_loss(base) if labels is not None else None
    if loss is not None:
        return f"the model has a loss function of its own ({loss}), which is given whole rows of logits"
    caches = extra.get("use_cache") is None and getattr(base.config, "use_cache", True)
    if caches and labels is None and not model.training:
        return (
            "without labels in evaluation mode the output holds a cache; use_cache=False takes the fast route"
        )
    if extra.get(ASKED) and (sharding.is_fsdp(model) or sharding.by_fsdp(base)):
        return "TRL's fused head reads a weight that fully_shard gathers for the model's own forward only"
    served = ("output_attentions", "output_hidden_states", "use_cache", "num_items_in_batch")
    ignored_by_peft = ("position_ids", "token_type_ids", "task_ids")
    # Of the head itself, which only scores what has a label.
    scored = (ASKED,) if scores_tokens(base) and (labels is not None or not extra.get(ASKED)) else ()
    others = [n for n, v in extra.items() if v is not None and n not in (*served, *ignored_by_peft, *scored)]
    if others:
        return f"the call has arguments that the fast route does not serve: {', '.join(sorted(others))}"
    return None
