"""What the engine has to know of a causal LM: its parts, and the few facts that its code does not show.

The self-check (`self_check.py`) confirms or rejects all of it with numbers, but for what depends on length.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from softprompt.engine import precision
from softprompt.engine.overrides import HOOKS, IN_USE, NO_FUSION, Fusion
from softprompt.engine.structure import structure_of


class CausalLM(nn.Module if TYPE_CHECKING else Protocol):  # type: ignore[misc]
    """What the engine uses of a transformers language model, whose classes are not typed."""

    config: Any
    generation_config: Any
    loss_function: Any

    def get_input_embeddings(self) -> Any:
        """Turns ids [B, L] into embeddings [B, L, H]."""

    def get_output_embeddings(self) -> Any:
        """The head: hidden states [B, L, H] to logits [B, L, V]."""

    def get_encoder(self) -> Any:
        """Of an encoder-decoder."""

    def get_decoder(self) -> Any:
        """Of an encoder-decoder."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continues texts."""


_LIBRARIES = {
    *("torch", "torchao", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "softprompt"),
    *sys.stdlib_module_names,
}
# Position ids that come from the attention mask (pads do not count) instead of from arange.
_POSITIONS_FROM_MASK = ("bloom", "opt")
# Position tables that are not an nn.Embedding: (model type, config field with their length).
_POSITION_TABLES = {
    "gptj": "max_position_embeddings",
    "codegen": "max_position_embeddings",
    "mpt": "max_seq_len",
}
# Layers without a cache of their own (DummyLayer) read the keys and values of an earlier layer.
_PLAIN_CACHE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")


@dataclass(frozen=True)
class HeadFacts:
    """How the model makes logits of its hidden rows: `softcap(logit_scale * (hidden @ weight.T + bias))`."""

    logit_scale: float | None
    softcap: float | None


@dataclass(frozen=True, eq=False)
class DecoderFacts:
    """What a step asks of a causal LM and the guard would see change; keeps no module alive."""

    vocab_size: int  # V of the input embeddings
    reads_embedding: bool  # ops read the embedding's table, it is not called
    takes_position_ids: bool  # as an argument of the decoder
    attention: str  # the attention implementation that the user chose
    attention_configs: tuple[Any, ...]  # the distinct configurations that choose it
    head: HeadFacts
    checkpointing: tuple[weakref.ref[Any], ...]  # modules with the switch, which the guard leaves out
    fusion: Fusion  # modules that run as one op

    def uses_gradient_checkpointing(self, body: nn.Module) -> bool:
        """Whether layers of the decoder are recomputed in the backward pass, as its flags are now."""
        return body.training and any(
            getattr(module(), "gradient_checkpointing", False) for module in self.checkpointing
        )


def decoder_facts(model: CausalLM, fusion: Fusion = NO_FUSION) -> DecoderFacts:
    """The facts of a model as it is now, some of whose modules are to run as one op."""
    body = body_of(model)
    structure, modules = structure_of(body)
    with IN_USE:  # a packed call in another thread chooses the attention for its length
        attention = config_of(model)._attn_implementation
    return DecoderFacts(
        vocab_size(model),
        embedding_obstacle(model.get_input_embeddings()) is None,
        takes_position_ids(body),
        attention,
        tuple(structure.configs),
        head_facts(model),
        tuple(weakref.ref(modules[place]) for place in structure.checkpointing),
        fusion,
    )


def config_of(model: CausalLM) -> Any:
    """The text configuration of the model, None for what is no transformers model."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def body_of(model: CausalLM) -> nn.Module:
    """The decoder without its head: what turns [1, T, H] embeddings into [1, T, H] normed hidden states.

    Raises:
        AttributeError: the model has no such part.
    """
    body = getattr(model, "base_model", None)
    if body is None or body is model:
        body = getattr(model, "model", None)
    if not isinstance(body, nn.Module):
        raise AttributeError(f"{type(model).__name__} has no decoder under `base_model` or `model`")
    # OPT's causal LM calls the decoder inside its `base_model`, never the `base_model` itself.
    get_decoder: Any = getattr(body, "get_decoder", None)
    inner = get_decoder() if get_decoder is not None else None
    return inner if isinstance(inner, nn.Module) else body


def vocab_size(model: CausalLM) -> int:
    """V of the input embeddings."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", 0) or config_of(model).vocab_size)


def attention_configs(body: nn.Module) -> list[Any]:
    """The distinct configuration objects that choose an attention implementation below `body`."""
    return structure_of(body)[0].configs


def takes_position_ids(body: nn.Module) -> bool:
    """Whether the decoder's forward has a `position_ids` argument, also behind a wrapper on the instance that
    hands on whatever it is given.
    """
    if "forward" in body.__dict__:
        parameters = inspect.signature(body.forward).parameters
        if "position_ids" in parameters or not _takes_anything(parameters):
            return "position_ids" in parameters
    return "position_ids" in _parameters_of(type(body).forward)


@functools.cache
def _parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def is_library(file: str) -> bool:
    """Whether a Python module of this name belongs to the libraries, whose code is known."""
    return file.split(".")[0] in _LIBRARIES


def is_foreign(function: Any) -> bool:
    """Whether a function is none of the libraries', such as a wrapper around one of theirs."""
    while isinstance(function, functools.partial):
        function = function.func
    own = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None)
    return not is_library(str(own or "torch"))  # builtin functions of torch name no module


def own_loss(model: CausalLM) -> str | None:
    """The name of a loss function that is not transformers', or is not PyTorch's below it; None: theirs."""
    loss = getattr(model, "loss_function", None)
    for function in (loss, nn.functional.cross_entropy):
        if function is not None and is_foreign(function):
            return str(getattr(function, "__qualname__", type(function).__name__))
    return None


def positions_from_mask(config: Any) -> bool:
    """Whether left padding leaves the model's positions alone (see the position ids of `pack_layout`)."""
    return config.model_type in _POSITIONS_FROM_MASK or (
        config.model_type == "falcon" and bool(getattr(config, "alibi", False))
    )


def position_limit(model: CausalLM, body: nn.Module) -> int | None:
    """Length of the position table, for models that have one; a longer input would read outside it."""
    config = config_of(model)
    field = _POSITION_TABLES.get(config.model_type)
    if field is not None:
        return int(getattr(config, field))
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return None
    token_embedding = model.get_input_embeddings()
    for module in body.modules():
        if isinstance(module, nn.Embedding) and module is not token_embedding:
            size = module.num_embeddings - int(getattr(module, "offset", 0))
            if size == longest:
                return int(size)
    return None


def packing_obstacle(model: CausalLM) -> str | None:
    """Why rows of this model cannot share one packed row, whatever its attention, or None."""
    config = config_of(model)
    if getattr(config, "attn_temperature_tuning", False) and row_limit(model) is None:
        return f"{config.model_type} scales its attention by the place in the row, which packing changes"
    if getattr(model, "_is_stateful", False):
        return f"{config.model_type} keeps a recurrent state, which would leak from one text into the next"
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    foreign = sorted(kinds - set(_PLAIN_CACHE_LAYERS))
    if foreign:
        return (
            f"{config.model_type} has layers with state other than keys and values ({', '.join(foreign)}), "
            "which would leak from one text into the next"
        )
    return precision.whole_batch_obstacle(body_of(model))


def prompt_width(model: CausalLM) -> int:
    """H of the embeddings that stand beside the prompt.

    Raises:
        TypeError: not a transformers model.
    """
    if not isinstance(cast(object, model), nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"expected a transformers language model, got {type(model).__name__}")
    embedding = model.get_input_embeddings()
    width = getattr(embedding, "embedding_dim", None)
    if width is None:
        weight = getattr(embedding, "weight", None)
        width = weight.shape[1] if isinstance(weight, Tensor) else config_of(model).hidden_size
    return int(width)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says (hooks, a forward replaced by accelerate)."""
    return "forward" in module.__dict__ or any(getattr(module, name) for name in HOOKS)


def is_own_method(model: nn.Module, name: str, value: Any) -> bool:
    """Whether a value of an instance is its class's own method, bound (PEFT's contexts leave such copies)."""
    return (
        inspect.ismethod(value)
        and value.__self__ is model
        and value.__func__ is getattr(type(model), name, None)
    )


def is_tied(model: CausalLM) -> bool:
    """Whether the head has the embedding's table."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = getattr(embedding, "weight", None)
    return table is not None and getattr(head, "weight", None) is table


def _class_of(module: nn.Module) -> str:
    """The class, with its package where PyTorch has a class of that name too (PEFT's Linear)."""
    name, package = type(module).__name__, type(module).__module__.split(".")[0]
    return f"{package}'s {name}" if hasattr(nn, name) and package != "torch" else f"a {name}"


def embedding_obstacle(embedding: nn.Module) -> str | None:
    """Why the embedding has to be called as a module and its table cannot be read, or None."""
    if type(embedding) is not nn.Embedding:
        return f"the embedding is {_class_of(embedding)}"
    if has_hooks(embedding):
        return "the embedding has hooks"
    obstacle = precision.weight_obstacle("the embedding's table", embedding.weight)
    if obstacle is not None:
        return obstacle
    if embedding.weight.requires_grad:
        return "the embedding's table is trainable"
    if embedding.max_norm is not None:
        return "the embedding renormalises its table (max_norm)"
    return None


def head_obstacle(model: CausalLM) -> str | None:
    """Why logits have to be made by the model's own head, or None where `linear_cross_entropy` can read
    it.
    """
    obstacle = head_weight_obstacle(model)
    if obstacle is None and getattr(model.loss_function, "__name__", "") != "ForCausalLMLoss":
        name = getattr(model.loss_function, "__name__", "?")
        return f"the model has a loss function of its own ({name})"
    return obstacle


def head_weight_obstacle(model: CausalLM) -> str | None:
    """Why the weight of the model's head cannot be read, or None."""
    head = model.get_output_embeddings()
    if head is None:
        return "the model names no output embeddings"
    if type(head) is not nn.Linear:
        return f"the head is {_class_of(head)}"
    if has_hooks(head):
        return "the head has hooks"
    return precision.weight_obstacle("the head's weight", head.weight)


def head_facts(model: CausalLM) -> HeadFacts:
    """Scale and softcap of the logits: Cohere multiplies by `logit_scale`, Granite divides by
    `logits_scaling`.
    """
    config = config_of(model)
    multiply, divide = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = None
    if isinstance(multiply, float | int):
        scale = float(multiply)
    elif isinstance(divide, float | int):
        scale = 1.0 / float(divide)
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadFacts(scale, float(softcap) if softcap else None)


def row_limit(model: CausalLM) -> int | None:
    """Rows up to which Llama-4's attention has one scale for every place in the row; None for other models.

    The scale grows with each multiple of `floor_scale`. A sixteenth of it is left for the rows that recorded
    steps add.
    """
    config = config_of(model)
    floor = getattr(config, "floor_scale", None)
    if not getattr(config, "attn_temperature_tuning", False) or not isinstance(floor, int | float):
        return None
    return int(floor) * 15 // 16


def rotary_switch(model: CausalLM) -> int | None:
    """Length from which dynamic and longrope rotary embeddings change, None for others.

    They look at the largest position of the batch, which pads on the right belong to.
    """
    config = config_of(model)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for kind in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope"):
            original = kind.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            return int(original or config.max_position_embeddings)
    return None


def dropout_of(model: CausalLM) -> list[str]:
    """Names of the random settings above 0, which act in training mode."""
    active = set()
    structure, modules = structure_of(model)
    for place in structure.dropouts:
        dropout: Any = modules[place]
        if dropout.p > 0:
            active.add(f"{type(dropout).__name__}(p={dropout.p})")
    for place, name in structure.random_settings:
        value = getattr(modules[place], name, None)
        if isinstance(value, float) and value > 0:
            active.add(f"{type(modules[place]).__name__}.{name}={value}")
    return sorted(active)


def uses_gradient_checkpointing(body: nn.Module) -> bool:
    """Whether layers are recomputed in the backward pass."""
    if not body.training:
        return False
    structure, modules = structure_of(body)
    return any(getattr(modules[place], "gradient_checkpointing", False) for place in structure.checkpointing)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that a linear layer over `weight` gives: autocast's where it is on (it leaves fp64 alone)."""
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
