import math

import pytest
import torch
from backends import BACKENDS, DEVICE
from elementwise import (
    DTYPES,
    IGNORED_WARNINGS,
    assert_compiles_into_one_graph,
    assert_errs_like_pytorch,
    assert_takes_batches_of_gradients,
    numbers,
    outputs_and_gradients,
    refuses,
)
from poison import poisoned_buffers
from torch.nn import functional

from softprompt.ops.glu import ACTIVATIONS, glu

WIDTHS = [1, 3, 17, 64, 1100]
pytestmark = pytest.mark.filterwarnings(IGNORED_WARNINGS)


def definition(activation):
    def silu(gate, up):
        return gate / (1 + torch.exp(-gate)) * up

    def gelu_tanh(gate, up):
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return gate / 2 * (1 + torch.tanh(inner)) * up

    return {"silu": silu, "gelu_tanh": gelu_tanh}[activation]


def composed(activation):
    """The MLPs of Llama and of Gemma."""
    if activation == "silu":
        return lambda gate, up: functional.silu(gate) * up
    return lambda gate, up: functional.gelu(gate, approximate="tanh") * up


def run_with(backend, activation="silu"):
    return lambda gate, up: glu(gate, up, activation=activation, backend=backend)


def inputs_of(*shape, dtype=torch.float32):
    gate = (2 * numbers(*shape, dtype=dtype).detach()).requires_grad_()
    return gate, numbers(*shape, dtype=dtype, seed=3)


def assert_right(backend, activation, *inputs):
    assert_errs_like_pytorch(
        run_with(backend, activation), composed(activation), definition(activation), *inputs
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_error_is_at_most_twice_that_of_pytorch(width, dtype, activation, backend):
    assert_right(backend, activation, *inputs_of(5, width, dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [*WIDTHS, 4099])
def test_every_set_of_instructions_errs_as_little(instruction_set, width, dtype, activation):
    assert_right("native", activation, *inputs_of(3, width, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [11008, 4099])
def test_wide_rows(width, backend):
    assert_right(backend, "silu", *inputs_of(2, width))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 8), (2, 3, 4, 5), (300, 16)])
def test_any_number_of_dimensions(shape, backend):
    assert_right(backend, "gelu_tanh", *inputs_of(*shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0,)])
def test_nothing_gives_nothing(shape, backend):
    for tensor in outputs_and_gradients(run_with(backend), *inputs_of(*shape)):
        assert tensor.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_up_may_be_parts_of_one_tensor(activation, backend):
    whole = numbers(3, 5, 20).detach()
    views = {
        "halves": (whole[..., :10], whole[..., 10:]),
        "every other entry": (whole[..., ::2], whole[..., 1::2]),
        "rows far apart": (whole[:, 0], whole[:, 2]),
        "transposed": (whole.transpose(1, 2), whole.transpose(1, 2)),
        "one row many times": (whole[:1, :1, :10].expand(3, 4, 10), whole[:, :4, 10:]),
    }
    for name, given in views.items():
        leaves = [view.detach().requires_grad_() for view in given]
        with poisoned_buffers():
            strided = outputs_and_gradients(run_with(backend, activation), *leaves)
        dense = outputs_and_gradients(
            run_with(backend, activation), *(view.contiguous().requires_grad_() for view in given)
        )
        for mine, right in zip(strided, dense, strict=True):
            torch.testing.assert_close(mine, right, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_at_any_stride(backend):
    inputs = inputs_of(3, 6)
    out = run_with(backend)(*inputs)
    for grad in (torch.ones(6, 3).T, torch.ones(()).expand(3, 6), torch.ones(3, 12)[:, ::2]):
        grad = grad.to(DEVICE)
        strided = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        dense = torch.autograd.grad(out, inputs, grad.contiguous(), retain_graph=True)
        for mine, right in zip(strided, dense, strict=True):
            torch.testing.assert_close(mine, right)


def ends(dtype):
    """Numbers of a dtype at which an exponential overflows or is zero, or that are none."""
    info = torch.finfo(dtype)
    # The cube in the derivative of GELU is infinite beyond, for PyTorch too.
    most = min(info.max, 1e18)
    sizes = [
        0.0,
        info.tiny,
        1e-4,
        5.0,
        9.0,
        12.0,
        17.0,
        44.0,
        80.0,
        87.5,
        88.5,
        89.0,
        104.0,
        710.0,
        6e4,
        most,
    ]
    values = torch.tensor(sizes, dtype=torch.float64)
    none = torch.tensor([float("inf"), -float("inf"), float("nan")])
    return torch.cat([values, -values, none]).to(dtype)


def assert_close_to_pytorch_at_the_ends(dtype, activation, backend):
    gate = ends(dtype).to(DEVICE).requires_grad_()
    up = torch.full_like(gate, 0.5).requires_grad_()
    ours = outputs_and_gradients(run_with(backend, activation), gate, up)
    wide = [tensor.detach().to(torch.promote_types(dtype, torch.float32)) for tensor in (gate, up)]
    grad = numbers(*gate.shape, seed=1).to(dtype).detach().to(wide[0].dtype)
    leaves = [tensor.requires_grad_() for tensor in wide]
    out = composed(activation)(*leaves)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for mine, right in zip(ours, expected, strict=True):
        # GELU's tail is a difference of almost equal numbers for PyTorch, and no difference here.
        torch.testing.assert_close(mine, right.to(dtype), atol=2e-6, rtol=1e-2, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_at_the_ends_of_the_dtype(dtype, activation, backend):
    assert_close_to_pytorch_at_the_ends(dtype, activation, backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_set_of_instructions_at_the_ends_of_fp32(instruction_set, activation):
    assert_close_to_pytorch_at_the_ends(torch.float32, activation, "native")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_a_large_negative_gate_is_shut(size, activation, backend):
    gate = torch.tensor([-size], device=DEVICE)
    assert run_with(backend, activation)(gate, torch.full_like(gate, 1e8)).item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, backend):
    inputs = inputs_of(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(run_with(backend, activation), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ops_are_registered_correctly(backend):
    gate, up = inputs_of(3, 4)
    torch.library.opcheck(torch.ops.softprompt.glu.default, (gate, up, 1, backend))
    arguments = (gate.detach() + 1, gate.detach(), up.detach(), 1, backend)
    torch.library.opcheck(torch.ops.softprompt.glu_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_gradients(backend):
    assert_takes_batches_of_gradients(run_with(backend), *inputs_of(3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph_with_its_gradients(backend):
    assert_compiles_into_one_graph(run_with(backend), *inputs_of(2, 3, 4))


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "relu"}, "activation must be one of silu, gelu_tanh, got 'relu'"),
        ({"up": ONES[:1]}, r"up must have the shape of gate \[2, 3\], got \[1, 3\]"),
        ({"up": ONES.half()}, "of one dtype, got torch.float32 and torch.float16"),
        ({"gate": ONES[0, 0], "up": ONES[0, 0]}, r"gate and up must be \[..., I\]"),
        ({"gate": ONES.long()}, "gate must be fp16, bf16, fp32 or fp64, got torch.int64"),
        ({"up": ONES.to("meta")}, "glu: all tensors must be on one device"),
        ({"backend": "numpy"}, "glu: unknown backend 'numpy'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    refuses(glu, message, {"gate": ONES, "up": ONES, "activation": "silu"}, change)
