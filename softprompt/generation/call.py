"""What a call of `generate` asks for, and whether the prompt can be computed beforehand for it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import parse
from torch import Tensor
from transformers.generation import GenerationMode

from softprompt.eligibility import IGNORED_BY_PEFT, adapter_obstacle, foreign_method
from softprompt.engine import Plan, model_spec, sharding
from softprompt.engine.caches import NAMES
from softprompt.engine.model_spec import CausalLM
from softprompt.engine.runner import UnsupportedModelError
from softprompt.generation.prefill import prefill_for
from softprompt.nesting import base_of
from softprompt.prompt_encoders import adapters_of_rows

# Older releases cut the first step as if the cache of the prompt were empty.
CHUNKS_BEHIND_A_CACHE = parse(transformers.__version__) >= parse("5.21")
_STATIC = ("static", "sliding_window", "hybrid", "hybrid_chunked")
_GROWING = (None, "dynamic")
_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
_TEXT = ("inputs", "input_ids", "inputs_embeds", "attention_mask", *NAMES, "use_cache")
_KNOWN = ("tokenizer", "assistant_tokenizer", "trust_remote_code", "logits_to_keep")


@dataclass
class GenerateCall:
    """The arguments of one call, by name, and what they mean."""

    arguments: dict[str, Any]  # for the model's own generate: all but those that are fields here
    config: Any  # the GenerationConfig that counts, a copy
    names: list[str]  # adapters of the rows, or one for all
    input_ids: Tensor | None  # [B, L]
    inputs_embeds: Tensor | None  # [B, L, H]
    attention_mask: Tensor  # [B, L], or longer with a cache that holds a conversation
    cache: Any  # past_key_values of the user
    use_cache: bool
    static: bool  # a static cache was asked for by name
    assistant: Any
    compact: bool  # pads do not exist
    backend: str  # of the ops

    @property
    def device(self) -> torch.device:
        """Where the texts are; transformers moves them to the model step by step."""
        texts = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        return self.attention_mask.device if texts is None else texts.device

    @property
    def expand(self) -> int:
        """Rows of the cache for each row of the call."""
        return max(self.config.num_beams or 1, self.config.num_return_sequences or 1)

    def adapters(self, num_rows: int) -> list[str]:
        """The adapter of each row."""
        return self.names if len(self.names) == num_rows else self.names * num_rows

    def max_new_tokens(self, model: CausalLM) -> int:
        """The longest continuation that the call allows."""
        length = 0 if self.input_ids is None else self.input_ids.shape[1]
        if self.config.max_new_tokens is not None:
            return int(self.config.max_new_tokens)
        if "max_length" not in self.arguments and self._default_length(model):
            return int(self.config.max_length)
        return max(int(self.config.max_length) - length, 0)

    def _default_length(self, model: CausalLM) -> bool:
        own = self.arguments.get("generation_config")
        return model.generation_config.max_length is None and (own is None or own.max_length is None)


def read_call(
    model: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    adapter_names: Sequence[str] | None,
    *,
    compact: bool,
    backend: str,
) -> GenerateCall:
    """Turns the arguments of `generate` of a PEFT model into a GenerateCall.

    Args:
        model: the PEFT model.
        args: by place.
        kwargs: by name.
        adapter_names: one for each row, or None: the active one.
        compact: pads do not exist.
        backend: of the ops.

    Raises:
        ValueError: arguments that contradict each other, or that no prompt-tuned model can serve.
    """
    base = base_of(model)
    bound = inspect.signature(base.generate).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    arguments |= arguments.pop("kwargs", {})
    given = {name: arguments.pop(name, None) for name in _TEXT}
    if given["inputs"] is not None and given["input_ids"] is not None:
        raise ValueError("the texts were given twice: as the first argument and as input_ids")
    ids = given["input_ids"] if given["inputs"] is None else given["inputs"]
    embeds, mask, cache = given["inputs_embeds"], given["attention_mask"], _cache_of(given)
    _check_kinds(ids, embeds, mask, cache)
    own = arguments.get("generation_config")
    use_cache = given["use_cache"] is not False and getattr(own, "use_cache", None) is not False
    config, _ = base._prepare_generation_config(own, **_of_config(arguments, given["use_cache"]))
    if ids is None and embeds is None:
        ids = _beginning(base, config)
    if mask is None:
        mask = _inferred_mask(base, ids if embeds is None else embeds, config)
    names = adapters_of_rows(model, adapter_names, ids, embeds)
    static = config.cache_implementation in _STATIC
    assistant = arguments.pop("assistant_model", None)
    call = GenerateCall(
        arguments,
        config,
        names,
        ids,
        embeds,
        mask,
        cache,
        use_cache,
        static,
        assistant,
        compact,
        backend,
    )
    _check_together(base, call)
    return call


def _cache_of(given: dict[str, Any]) -> Any:
    caches = {name: given[name] for name in NAMES if given[name] is not None}
    if len(caches) > 1:
        raise ValueError(f"the cache was given twice: as {' and as '.join(caches)}")
    return next(iter(caches.values()), None)


def _check_kinds(ids: Any, embeds: Any, mask: Any, cache: Any) -> None:
    for name, value, ndim, shape in (
        ("input_ids", ids, 2, "[B, L]"),
        ("inputs_embeds", embeds, 3, "[B, L, H]"),
        ("attention_mask", mask, 2, "[B, L], without the prompt"),
    ):
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
        if value is not None and value.ndim != ndim:
            raise ValueError(f"{name} must be {shape}, got shape {list(value.shape)}")
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise ValueError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")


def _of_config(arguments: dict[str, Any], use_cache: Any) -> dict[str, Any]:
    """The keyword arguments that a GenerationConfig takes; copied, since the call below keeps lists."""
    other = ("generation_config", "logits_processor", "stopping_criteria", "streamer", "assistant_model")
    rest = {name: value for name, value in arguments.items() if name not in other}
    return rest if use_cache is None else rest | {"use_cache": use_cache}


def _beginning(base: CausalLM, config: Any) -> Tensor:
    """[1, 1] the token that a text begins with, as transformers takes it where no text is given."""
    if config.bos_token_id is None:
        raise ValueError("generate needs input_ids or inputs_embeds, or a bos_token_id to begin with")
    return torch.full((1, 1), int(config.bos_token_id), device=next(base.parameters()).device)


def _check_together(base: CausalLM, call: GenerateCall) -> None:
    config = call.config
    name = config.cache_implementation
    if name is not None and call.cache is not None:
        raise ValueError("generate takes past_key_values or cache_implementation, not both")
    if name not in (*_GROWING, *_STATIC, "offloaded", "quantized"):
        raise ValueError(
            f"cache_implementation={name!r} cannot hold a prompt; 'dynamic', 'static', 'offloaded' and "
            "'quantized' can"
        )
    if getattr(config, "is_assistant", False):
        raise ValueError(
            "a model with a prompt cannot be the assistant of another model: pass its base model"
        )
    for option in ("assistant_early_exit", "use_mtp", "speculation_type"):
        if getattr(config, option, None):
            raise ValueError(f"{option} drafts with layers of this model that know nothing of the prompt")
    if call.inputs_embeds is not None and config.prefill_chunk_size is not None:
        raise ValueError("prefill_chunk_size cuts input_ids; it cannot be used with inputs_embeds")
    if config.prefill_chunk_size is not None and not CHUNKS_BEHIND_A_CACHE:
        raise ValueError(
            "prefill_chunk_size behind a prompt needs transformers 5.21 or newer (got "
            f"{transformers.__version__}), which knows the prompt's place in the cache: leave it out"
        )
    if _static(call) and not _static_works(base):
        raise ValueError(f"{model_spec.config_of(base).model_type} gives wrong tokens with a static cache")


def _inferred_mask(base: CausalLM, texts: Tensor, config: Any) -> Tensor:
    """[B, L] the mask that transformers makes of the pad tokens where none is given."""
    config = copy.copy(config)
    base._prepare_special_tokens(config, True, device=texts.device, batch_size=texts.shape[0])
    mask: Tensor = base._prepare_attention_mask_for_generation(texts, config, {})
    return mask


def _static(call: GenerateCall) -> bool:
    return call.static or bool(getattr(call.cache, "is_compileable", False))


def _static_works(base: CausalLM) -> bool:
    """Whether the model itself decodes rightly from a static cache."""
    config = model_spec.config_of(base)
    return config.model_type != "gpt_neo" and not (
        config.model_type == "falcon" and getattr(config, "alibi", False)
    )


def stock_reason(model: Any, plan: Plan, call: GenerateCall) -> str | None:
    """Why a call goes to PEFT's own generate, as a sentence, or None.

    Raises:
        UnsupportedModelError: PEFT's own generate would give wrong tokens.
    """
    reason = _stock_reason(model, plan, call) or _replaced(model)
    if reason is not None:
        refuse_what_goes_wrong(call, reason, conversations=True)
    return reason


def _replaced(model: Any) -> str | None:
    """Why PEFT's generate has to be called for what was put in place of its parts, or None."""
    name = "prepare_inputs_for_generation"
    own = model.__dict__.get(name)
    if own is not None and not model_spec.is_own_method(model, name, own):
        return f"the model's {name} was replaced on the instance"
    return foreign_method(model, "generate") or foreign_method(model, name)


def refuse_what_goes_wrong(call: GenerateCall, why: str, *, conversations: bool = False) -> None:
    """Raises UnsupportedModelError where PEFT's own generate, which gets the call, would give wrong tokens.

    Args:
        call: the call.
        why: the call goes to PEFT's generate, as a sentence.
        conversations: whether one that goes on from a conversation goes wrong: not where the cache holds the
            prompt.
    """
    wrong = _wrong_in_peft(call, conversations)
    if wrong is not None:
        raise UnsupportedModelError(
            f"softprompt: {wrong} needs a prompt that is computed beforehand, but {why}"
        )


def _stock_reason(model: Any, plan: Plan, call: GenerateCall) -> str | None:
    base, config = base_of(model), call.config
    obstacle = adapter_obstacle(model, call.names)
    if obstacle is not None:
        return obstacle
    if sharding.offloads(base):
        return sharding.BROUGHT
    if base.training:
        active = model_spec.dropout_of(base)
        if active:
            return f"the model is in training mode with dropout ({', '.join(active)}); model.eval() is served"
        if model_spec.uses_gradient_checkpointing(model_spec.body_of(base)):
            raise UnsupportedModelError(
                "softprompt: a model with gradient checkpointing in training mode drops its cache, and the "
                "prompt with it: call model.eval() before generate"
            )
    prefill = prefill_for(base, plan)
    if prefill.way is None:
        return prefill.reason
    if not call.use_cache:
        return "use_cache=False was asked for, and the prompt is kept in a cache"
    if config.cache_implementation not in (*_GROWING, *_STATIC):
        return f"cache_implementation={config.cache_implementation!r} is filled by the model itself"
    if config.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                return f"{name} was asked for, which only the padded forward has for the prompt"
    mode = config.get_generation_mode(call.assistant)
    if mode not in _MODES or call.arguments.get("custom_generate") is not None or config.token_healing:
        return "the decoding method is none of those that are known to leave the texts as they are"
    unknown = _unknown_arguments(base, call)
    if unknown:
        return f"the call has arguments that are not served: {', '.join(unknown)}"
    switch = plan.rotary_switch
    if switch is not None:
        longest = max(model.peft_config[name].num_virtual_tokens for name in call.names)
        longest += call.attention_mask.shape[1] + call.max_new_tokens(base)
        if longest > switch:
            return (
                f"the model's rotary embedding changes beyond {switch} positions, and prompt, text and "
                f"continuation may take {longest}"
            )
    return None


def _unknown_arguments(base: CausalLM, call: GenerateCall) -> list[str]:
    known = {*inspect.signature(base.generate).parameters, *IGNORED_BY_PEFT, *_KNOWN}
    return sorted(
        name
        for name, value in call.arguments.items()
        if value is not None and name not in known and not hasattr(call.config, name)
    )


def _wrong_in_peft(call: GenerateCall, conversations: bool) -> str | None:
    """The part of a call that PEFT's own generate does not do or does wrongly, or None."""
    if _static(call):
        return "a static cache"
    if call.inputs_embeds is not None:
        return "inputs_embeds"
    if call.assistant is not None or call.config.prompt_lookup_num_tokens is not None:
        return "assisted decoding"
    if call.config.prefill_chunk_size is not None:
        return "prefill_chunk_size"
    if conversations and call.cache is not None and int(call.cache.get_seq_length()) > 0:
        return "past_key_values that holds a conversation"
    return None
