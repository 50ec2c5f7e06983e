"""Memory that shows which entries an op did not write."""

import contextlib
from unittest import mock

import torch

GARBAGE = 0x5A5A5A5A  # no index, label or count of these tests


def _poison(tensor):
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(GARBAGE) if tensor.dtype in (torch.int32, torch.int64) else tensor


@contextlib.contextmanager
def poisoned_buffers():
    """Inside, `torch.empty`, `torch.empty_like` and `Tensor.new_empty` give NaN, integers `GARBAGE`."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with (
        mock.patch.object(torch, "empty", lambda *args, **options: _poison(empty(*args, **options))),
        mock.patch.object(
            torch, "empty_like", lambda *args, **options: _poison(empty_like(*args, **options))
        ),
        mock.patch.object(
            torch.Tensor,
            "new_empty",
            lambda self, *args, **options: _poison(new_empty(self, *args, **options)),
        ),
    ):
        yield
