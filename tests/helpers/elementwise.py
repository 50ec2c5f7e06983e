"""What the tests of `rms_norm`, `glu` and `rotary` measure."""

import pytest
import torch
from backends import DEVICE
from head_problem import largest_error
from poison import poisoned_buffers

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# The interpreter computes with what is no number where a test asks for it.
IGNORED_WARNINGS = "ignore::RuntimeWarning:triton.runtime.interpreter"


def numbers(*shape, dtype=torch.float32, seed=0):
    """A leaf that wants a gradient."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def outputs_and_gradients(function, *inputs):
    """Of the inputs that want one, for a gradient of the outputs that is no constant."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    given = [numbers(*out.shape, seed=1 + place).to(out.dtype).detach() for place, out in enumerate(outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, wanted, given)]


def assert_errs_like_pytorch(ours, composed, truth, *inputs):
    """The error is at most twice that of PyTorch's own ops in the dtype, against the definition in fp64."""
    dtype = inputs[0].dtype
    with poisoned_buffers():
        found = outputs_and_gradients(ours, *inputs)
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    expected = outputs_and_gradients(truth, *wide)
    for mine, plain, right in zip(found, outputs_and_gradients(composed, *inputs), expected, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        if right.numel():
            # Where PyTorch happens to hit the truth, the last steps may round twice; that of fp64 is rounded.
            steps = 8 if dtype == torch.float64 else 2
            allowed = 2 * largest_error(plain, right) + steps * torch.finfo(dtype).eps
            assert largest_error(mine, right) <= allowed


def assert_compiles_into_one_graph(function, *inputs):
    """With its gradients, and gives the same numbers."""
    expected = outputs_and_gradients(function, *inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, right in zip(outputs_and_gradients(compiled, *inputs), expected, strict=True):
        assert torch.equal(mine, right)


def assert_takes_batches_of_gradients(function, *inputs):
    """`is_grads_batched` gives what one gradient after the other gives."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [numbers(3, *out.shape).to(out.dtype).detach() for out in outputs]
    batched = torch.autograd.grad(outputs, inputs, given, is_grads_batched=True, retain_graph=True)
    for place in range(3):
        alone = torch.autograd.grad(outputs, inputs, [grad[place] for grad in given], retain_graph=True)
        for mine, right in zip(batched, alone, strict=True):
            torch.testing.assert_close(mine[place], right)


def refuses(function, message, fitting, change):
    with pytest.raises(ValueError, match=message):
        function(**{**fitting, **change})
