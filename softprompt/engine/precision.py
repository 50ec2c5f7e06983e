"""What mixed and quantised weights mean for a step: how exact it can be, and which layers mix tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# The dtypes that the ops read.
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weight_obstacle(name: str, weight: Any) -> str | None:
    """Why an op cannot read a weight, or None."""
    if type(weight) not in (Tensor, nn.Parameter):
        return f"{name} is a {type(weight).__name__}"
    if weight.device.type == "meta":
        return f"{name} is on the meta device"
    if weight.dtype not in READABLE:
        return f"{name} holds {str(weight.dtype).removeprefix('torch.')} numbers"
    return None


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The least exact floating dtype that the model computes in, as far as its weights and layers tell."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    for module in model.modules():
        # 4-bit layers keep bytes, and say in which dtype they multiply; bitsandbytes' 8-bit ones take fp16.
        dtype = vars(module).get("compute_dtype")
        dtype = torch.float16 if type(module).__name__ == "Linear8bitLt" else dtype
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            dtypes.add(dtype)
        if any(granularity is not None for granularity in _granularities(module)):
            dtypes.add(torch.bfloat16)  # its 8 bits, as those of a layer that rounds its input
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def whole_batch_obstacle(root: nn.Module | None) -> str | None:
    """Why the tokens of a batch change what layers below `root` make of each other, or None.

    Rounding with one scale for all tokens does that. Two short rows may happen not to show it, so these
    layers are known by name.
    """
    for module in () if root is None else root.modules():
        kind = type(module).__name__
        threshold = getattr(getattr(module, "state", None), "threshold", 0)
        if kind == "Linear8bitLt" and threshold:
            return (
                f"its {kind} layers look for outliers among all tokens of the batch, pads included "
                f"(llm_int8_threshold={threshold}; with 0.0 each token is on its own)"
            )
        if any(type(granularity).__name__ == "PerTensor" for granularity in _granularities(module)):
            return f"its {kind} layers round all tokens of the batch, pads included, with one scale"
    return None


def _granularities(module: nn.Module) -> Iterator[Any]:
    """How torchao's layers round their input: a quantised weight knows it, or a module for training."""
    of_weight = getattr(module._parameters.get("weight"), "act_quant_kwargs", None)
    of_module = getattr(module._modules.get("activation_fake_quantizer"), "config", None)
    yield from (getattr(settings, "granularity", None) for settings in (of_weight, of_module))
