"""What of a model lies on other processes or devices, and how the packed route gets at it.

FSDP2 (`fully_shard`) keeps a part of every weight and gathers the whole in hooks of the modules. The packed
route calls the modules, so most of it happens by itself. What is left: the language model's own hooks, whose
forward the packed route does not call, and a head whose weight is read instead of being called.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from softprompt.engine import model_records
from softprompt.engine.overrides import HOOKS, override
from softprompt.engine.structure import structure_of

_FSDP2: tuple[type, ...] = ()
_FSDP1: tuple[type, ...] = ()
_DTENSOR: tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    _FSDP2, _FSDP1, _DTENSOR = (FSDPModule,), (FullyShardedDataParallel,), (DTensor,)

Answer = TypeVar("Answer")

UNCHECKED = (
    "the weights were sharded by fully_shard before the route was checked, and a check needs whole weights: "
    "call softprompt.patch before fully_shard or accelerator.prepare"
)
BROUGHT = "accelerate brings weights only when a module is called (device_map), and takes them away again"
DISAGREE = "the route is not the same on all ranks, which gather weights together (their models differ)"
ROWS_OF_ADAPTERS = (
    "adapter_names was given, and the prompts are sharded by fully_shard: a rank without rows of an adapter "
    "has no gradient to reduce, and the others would wait for it; call fully_shard on "
    "model.get_base_model(), which leaves the prompts whole"
)
ONLY_FORWARD = "the weights are sharded by fully_shard, and only forward gathers them"
NOT_EMBEDDED = (
    "PEFT's own, which is left, embeds the texts outside of the model that was sharded by fully_shard: call "
    "fully_shard on the PEFT model instead of model.get_base_model()"
)


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this very module."""
    return isinstance(module, _FSDP2)


def by_fsdp(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on the model or a part of it."""
    return in_group() and _any_of(_FSDP2, structure_of(model)[1])


def embeds_in_parts(model: nn.Module) -> bool:
    """Whether the embedding of a language model is whole in a call of the model alone."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return is_fsdp(model) and not is_fsdp(embedding) and is_part(getattr(embedding, "weight", None))


def in_group() -> bool:
    """Whether there are other processes; without them nothing is looked for, since every step asks."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _any_of(kinds: tuple[type, ...], items: Iterable[Any]) -> bool:
    """Whether an item is of one of the kinds."""
    return any(issubclass(kind, kinds) for kind in set(map(type, items)))


def _parameters_of(modules: list[nn.Module]) -> Iterator[Any]:
    return itertools.chain.from_iterable(module._parameters.values() for module in modules)


def is_part(weight: Any) -> bool:
    """Whether a weight is a part of one that lies on several processes (FSDP2, tensor parallel)."""
    return isinstance(weight, _DTENSOR)


def has_parts(model: nn.Module) -> bool:
    """Whether any weight is a part of one."""
    return in_group() and _any_of(_DTENSOR, _parameters_of(structure_of(model)[1]))


def has_foreign_hooks(module: nn.Module, *, known_forward: bool = False) -> bool:
    """Whether calling the module does more than its class and FSDP2 say.

    `known_forward`: a forward that was set on the instance does not count.
    """
    if "forward" in module.__dict__ and not known_forward:
        return not _only_moves(module)
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    if not is_fsdp(module):
        return bool(hooks)
    return any(
        not str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.") for hook in hooks
    )


def _only_moves(module: nn.Module) -> bool:
    """Whether the forward was replaced by accelerate's `device_map`, to move what comes and goes."""
    hook = module.__dict__.get("_hf_hook")
    if type(hook).__name__ != "AlignDevicesHook" or len(vars(module).get("_parameters", ())):
        return False
    return not any(getattr(module, name) for name in HOOKS)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's weights when it is called, and takes them away again."""
    return bool(getattr(module.__dict__.get("_hf_hook"), "offload", False))


def offloads(model: nn.Module) -> bool:
    """Whether accelerate does so for any module of a model."""
    return any(map(is_offloaded, structure_of(model)[1]))


def device_of(module: Any) -> torch.device:
    """Where a module with a weight computes."""
    hook = module.__dict__.get("_hf_hook")
    if is_offloaded(module) and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    device: torch.device = module.weight.device if hasattr(module, "weight") else _first_device(module)
    return device


def _first_device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def obstacle(model: nn.Module) -> str | None:
    """Why weights of this model cannot be reached outside of its own forward, as a sentence, or None."""
    if getattr(model, "_is_replica", False):
        return (
            "nn.DataParallel copies the model in every step, and a copy is not checked again: "
            "use DistributedDataParallel (torchrun, accelerate launch)"
        )
    if hasattr(model, "hf_split_points"):
        return "the model is cut into pipeline stages, each with layers of its own"
    weight = next(model.parameters(), None)
    if _is_flattened(model, weight) or (in_group() and _any_of(_FSDP1, structure_of(model)[1])):
        return (
            "FSDP1 (FullyShardedDataParallel) flattens the weights: "
            "FSDP2 (fully_shard, fsdp_version 2) is served"
        )
    if hasattr(weight, "ds_id"):
        return (
            "DeepSpeed ZeRO-3 partitions the weights and gathers them for the model's own forward only: "
            "FSDP2 is served, and ZeRO-1 and ZeRO-2 leave the weights whole"
        )
    return None


def _is_flattened(model: nn.Module, weight: Any) -> bool:
    """Whether FSDP1 around the model has put its weights into one, which it cuts up again for a forward."""
    cut = bool(getattr(model, "_is_fsdp_managed_module", False)) and not isinstance(weight, nn.Parameter)
    return cut or getattr(weight, "_fsdp_flattened", False)


def shared_device_obstacle(model: nn.Module) -> str | None:
    """Why the weights of a model do not simply lie on one device, or None."""
    devices, kinds = set(), set()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        devices.add(str(tensor.device))
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            kinds.add(type(tensor).__name__)
    if kinds:
        return f"weights are of type {', '.join(sorted(kinds))}"
    if len(devices) > 1:
        return f"weights lie on several devices ({', '.join(sorted(devices))})"
    return None


def inside(model: Any, run: Callable[[], Answer]) -> Answer:
    """What `run` returns, inside of a call of the model, where FSDP2 has gathered the model's own weights."""
    if not is_fsdp(model):
        return run()

    def forward(*args: Any, **kwargs: Any) -> Answer:
        return run()

    with override(model, forward=forward):  # over one that is there, such as TRL's
        answer: Answer = model()
    return answer


@contextlib.contextmanager
def whole(module: Any) -> Iterator[None]:
    """The module's weight can be read in the block; FSDP2 gathers it once where it is not whole already."""
    gather = is_fsdp(module) and is_part(module.weight)
    if gather:
        module.unshard()
    try:
        yield
    finally:
        if gather:
            module.reshard()


def all_agree(model: nn.Module, choice: tuple[Any, ...]) -> bool:
    """Whether all ranks chose the same for a model; they gather weights together, so they must.

    Every rank has to ask, whatever it chose. The answer is kept as long as the choice is the same.
    """
    if not in_group():
        return True
    return model_records.kept(model, "agreement", choice, lambda: len(set(_choices_of_ranks(choice))) == 1)


def _choices_of_ranks(choice: tuple[Any, ...]) -> list[Any]:
    chosen: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(chosen, choice)
    return chosen
