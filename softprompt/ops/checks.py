"""What the ops ask of the tensors that they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """Raises IndexError for an entry of a CPU tensor outside 0 .. size - 1; on a GPU nothing is read."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    values = indices.numpy()  # the same memory; PyTorch has no minimum of the larger unsigned numbers
    outside = (values < 0) | (values >= size)
    if outside.any():
        place = int(outside.argmax())
        raise IndexError(f"{name}[{place}] is {values[place]}, expected 0 .. {size - 1}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all given tensors are on one device."""
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        listing = ", ".join(
            f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None
        )
        raise ValueError(f"{op}: all tensors must be on one device, got {listing}")


def check_integers(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all given tensors hold integers."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")


def check_shape_of(like: str, shape: torch.Size, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all given tensors have the shape of the tensor named `like`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have the shape of {like} {list(shape)}, got {list(tensor.shape)}")


def check_table_and_prompts(table: Tensor, prompts: Tensor) -> None:
    """Raises ValueError unless these are floating-point tensors [V, H] and [ΣP, H]."""
    if table.ndim != 2 or prompts.ndim != 2:
        raise ValueError(
            f"table and prompts must be [V, H] and [P, H], got {list(table.shape)} and {list(prompts.shape)}"
        )
    if prompts.shape[1] != table.shape[1]:
        raise ValueError(f"prompts must be {table.shape[1]} wide like the table, got {prompts.shape[1]}")
    for name, tensor in (("table", table), ("prompts", prompts)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_floating(**tensors: Tensor) -> None:
    """Raises ValueError unless all given tensors are floating point, of 16 bits or more."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")


def check_frozen(**tensors: Tensor) -> None:
    """Raises ValueError where a tensor wants a gradient that the op does not give."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(f"{name} gets no gradient; pass it detached, got a tensor that requires grad")
