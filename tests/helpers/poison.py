"""Memory that shows who reads what nobody has written.

An op that reads it as a number gives NaN. A product of a library's may read it without a trace: a kernel for
AMX takes rows in blocks of 32 columns, what stands between two rows included, and multiplies what is too much
with zeros, which is right for anything but NaN. Whether it does depends on the processor, the shape and the
version, so every operand is looked at instead, on any processor.
"""

import re

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GARBAGE = 0x5A5A5A5A  # no index, label or count of these tests
# NaNs that no arithmetic makes, by the bits.
_UNWRITTEN = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.float32: (torch.int32, 0x7FDA5A5A),
    torch.float64: (torch.int64, 0x7FFA5A5A5A5A5A5A),
}
_EMPTY = re.compile(r"(new_)?empty(_like|_strided|_permuted)?")
_PRODUCT = re.compile(r"(add|b|badd|addb)?m[mv]_?|v?dot|matmul|linear|einsum|.*(conv|attention).*")
_BLOCK = 32  # columns that a product may read at once


class UnwrittenMemoryError(AssertionError):
    """A product was handed memory that was never written."""


def poisoned_buffers():
    """Inside, what is allocated empty holds NaN, integers `GARBAGE`, and no product may meet any of it.

    Looks into the ops of softprompt too, and into the backward pass of a CPU. Yields what counts the
    `products` that were looked at.
    """
    return _Watch()


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "softprompt":
            return self._look_into(func, args, kwargs)
        if _PRODUCT.fullmatch(name):
            self.products += 1
            _check_operands(name, args, kwargs)
        made = func(*args, **kwargs)
        if _EMPTY.fullmatch(name):
            poison(made)
        return made

    def _look_into(self, func, args, kwargs):
        """Runs an op's own code with this mode, which is off while an operation is answered, on again."""
        device = next(one.device for one in tree_leaves((args, kwargs)) if torch.is_tensor(one))
        key = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}.get(device.type)
        if key is None:  # nothing is computed on "meta"
            return func(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd(), self:
            return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)


def poison(tensor):
    """Fills a tensor as if it had never been written."""
    if tensor.dtype in _UNWRITTEN:
        integers, bits = _UNWRITTEN[tensor.dtype]
        tensor.view(integers).fill_(bits)
    elif tensor.dtype in (torch.int32, torch.int64):
        tensor.fill_(GARBAGE)
    return tensor


def _check_operands(name, args, kwargs):
    operands = list(args)
    if kwargs.get("beta", 1) == 0:
        operands = operands[1:]  # is not read
    operands += [value for key, value in kwargs.items() if key != "out"]
    for number, operand in enumerate(tree_leaves(operands)):
        if torch.is_tensor(operand) and (places := unwritten_places(operand)):
            raise UnwrittenMemoryError(
                f"{name} reads operand {number}, {list(operand.shape)} with strides {operand.stride()} in "
                f"{operand.dtype}, and memory among or right behind it was never written: {places} places"
            )


def unwritten_places(tensor):
    """Places never written from a tensor's first entry to its last, the gaps between rows included, and on to
    the end of the last row's last block.
    """
    if tensor.dtype not in _UNWRITTEN or tensor.numel() == 0 or tensor.layout != torch.strided:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    row = max((n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 1), default=1)
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    count = min(last + 1 + -row % _BLOCK, room)
    integers, bits = _UNWRITTEN[tensor.dtype]
    return int((tensor.detach().as_strided((count,), (1,)).view(integers) == bits).sum())
