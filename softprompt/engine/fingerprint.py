"""Signs that a model is no longer the one that was checked."""

from __future__ import annotations

import sys
import types
from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softprompt.engine import families, hooks, precision, sharding
from softprompt.engine.attributes import OF_CALLS
from softprompt.engine.families import CausalLM
from softprompt.engine.structure import structure_of

_MODEL_FILES = "transformers.models."
_ATOMS = (bool, int, float, str)


def fingerprint(model: CausalLM) -> tuple[Any, ...]:
    """Cheap signs that a model is no longer the one that was checked."""
    config = getattr(model, "config", None)
    weight = next(iter(model.parameters()), None)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    lasting = (
        getattr(config, "_attn_implementation", None),
        id(embedding),
        id(head),
        id(getattr(model, "_loss_function", None)),
        bool(getattr(config, "output_router_logits", False)),
        _numbers(model),
        _unanswered(model),
        sharding.obstacle(model),
        _code_of(model) if isinstance(model, nn.Module) else None,
        _positions(model),
    )
    passing = (  # FSDP2 changes these
        None if weight is None else (weight.dtype, weight.device.type),
        precision.make_of(model),
        None if not isinstance(embedding, nn.Module) else families.embedding_obstacle(embedding),
        None if head is None else families.head_obstacle(model),
        sharding.has_parts(model),
    )
    return lasting, passing


def _code_of(model: nn.Module) -> tuple[Any, ...]:
    """The functions that the packed row calls or stands in for, which kernel libraries exchange: forwards of
    classes, the code of transformers' model files, attention functions, and PyTorch's below them.

    Told apart by identity and code: a function that is held here may hold the model.
    """
    kinds: dict[Any, None] = dict.fromkeys(map(type, structure_of(model)[1]))
    every = dict.fromkeys(base for kind in kinds for base in kind.__mro__)
    # Without those that FSDP2 derives, whose modules are the same.
    bases = [base for base in every if not base.__module__.startswith("torch.distributed.")]
    files = dict.fromkeys(
        base.__module__ for base in bases if base.__module__.startswith("transformers.models.")
    )
    namespaces = [vars(sys.modules[name]) for name in files]
    namespaces += [vars(base) for base in bases if base.__module__ in files]
    functions: list[Any] = [vars(base).get("forward") for base in bases]
    for namespace in namespaces:
        functions += [value for value in namespace.values() if isinstance(value, types.FunctionType)]
    configs = structure_of(model)[0].configs
    names = {getattr(config, "_attn_implementation", None) for config in configs} - {None}
    functions += [
        table.get(name) for name in names for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    ]
    functions += [nn.functional.scaled_dot_product_attention, nn.functional.cross_entropy]
    return tuple({id(function): getattr(function, "__code__", None) for function in functions}.items())


def _positions(model: CausalLM) -> bool | None:
    """Whether the decoder takes positions; None: there is no decoder."""
    try:
        return families.takes_position_ids(families.body_of(model))
    except AttributeError:
        return None


def _numbers(model: CausalLM) -> tuple[Any, ...]:
    """Numbers, names and switches of the model itself and of its configuration, such as the scale of its
    logits and the length of its positions.
    """
    of_model = [(name, value) for name, value in vars(model).items() if isinstance(value, _ATOMS)]
    of_config = [
        (name, value if isinstance(value, _ATOMS) else str(value))
        for name, value in getattr(families.config_of(model), "__dict__", {}).items()
        if name[0] != "_" and name not in OF_CALLS and isinstance(value, (*_ATOMS, list, dict))
    ]
    return (*(pair for pair in of_model if pair[0][0] != "_" and pair[0] != "training"), *of_config)


def _unanswered(model: CausalLM) -> str | None:
    """Why a model whose attention modules are answered one by one has one that cannot be."""
    model_type = getattr(families.config_of(model), "model_type", None)
    if model_type not in hooks.FAMILIES:
        return None
    return hooks.obstacle(families.body_of(model), str(model_type))


def settings(model: CausalLM, embedding: Any) -> tuple[Any, ...]:
    """What a fingerprint holds beside modules, hooks, parameters and buffers."""
    state, config = vars(model), getattr(model, "config", None)
    return (
        getattr(config, "_attn_implementation", None),
        bool(getattr(config, "output_router_logits", False)),
        getattr(embedding, "max_norm", None),
        id(state.get("_loss_function")),
        state.get("loss_type"),
        _numbers(model),
    )
