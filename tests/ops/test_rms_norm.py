import importlib

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
from marks import slow_unless
from poison import poisoned_buffers

from softprompt.ops.rms_norm import rms_norm

EPS = 0.25  # of a row of one number the gradient would else be a difference of equal numbers
# Around vectors of 4 to 16 numbers; a width that is summed in parts.
WIDTHS = [1, 3, 17, 64, 1100]
pytestmark = pytest.mark.filterwarnings(IGNORED_WARNINGS)


def definition(x, weight, offset=0.0):
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS) * (weight + offset)


def composed(x, weight, offset=0.0):
    """The modules of Llama (its weight is around 1) and of Gemma."""
    wide = x.float() if x.dtype != torch.float64 else x
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if offset:
        return (normalised * (offset + weight.to(wide.dtype))).to(x.dtype)
    return weight.to(x.dtype) * normalised.to(x.dtype)


def run_with(backend, offset=0.0):
    return lambda x, weight: rms_norm(x, weight, eps=EPS, offset=offset, backend=backend)


def inputs_of(*shape, dtype=torch.float32):
    return numbers(*shape, dtype=dtype), numbers(shape[-1], dtype=dtype, seed=5).detach()


def assert_right(backend, x, weight, offset=0.0):
    assert_errs_like_pytorch(
        run_with(backend, offset),
        lambda x, weight: composed(x, weight, offset),
        lambda x, weight: definition(x, weight, offset),
        x,
        weight,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_error_is_at_most_twice_that_of_pytorch(width, dtype, offset, backend):
    assert_right(backend, *inputs_of(5, width, dtype=dtype), offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [*WIDTHS, 16384])
def test_every_set_of_instructions_errs_as_little(instruction_set, width, dtype):
    assert_right("native", *inputs_of(3, width, dtype=dtype), 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", slow_unless([16384, 16400], [4096, 16384, 16400]))
def test_wide_rows(width, backend):
    assert_right(backend, *inputs_of(2, width))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_a_weight_of_any_dtype_is_taken_as_it_is(weight_dtype, backend):
    x, _ = inputs_of(4, 24, dtype=torch.bfloat16)
    weight = numbers(24, dtype=weight_dtype).detach()
    assert_right(backend, x, weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 8), (2, 3, 4, 5), (70, 16)])
def test_any_number_of_dimensions(shape, backend):
    assert_right(backend, *inputs_of(*shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0,)])
def test_nothing_gives_nothing(shape, backend):
    x, weight = inputs_of(*shape)
    out, grad = outputs_and_gradients(run_with(backend), x, weight)
    assert out.shape == grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same_rows_as_dense_ones(backend):
    whole, weights = numbers(3, 6, 20).detach(), numbers(10, 2).detach()
    views = {
        "half of each row": whole[..., 10:],
        "heads by token": whole[..., :10].transpose(0, 1),
        "one row many times": whole[:, :1, :10].expand(3, 4, 10),
        "entries apart": whole[..., ::2],
    }
    weight = weights[:, 1]
    for name, view in views.items():
        x = view.detach().requires_grad_()
        assert not x.is_contiguous(), name
        with poisoned_buffers():
            strided = outputs_and_gradients(run_with(backend), x, weight)
        dense = outputs_and_gradients(
            run_with(backend), view.contiguous().requires_grad_(), weight.contiguous()
        )
        for mine, right in zip(strided, dense, strict=True):
            assert torch.equal(mine, right), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_at_any_stride(backend):
    x, weight = inputs_of(3, 6)
    out = run_with(backend)(x, weight)
    for grad in (torch.ones(6, 3).T, torch.ones(()).expand(3, 6), torch.ones(3, 12)[:, ::2]):
        grad = grad.to(DEVICE)
        (strided,) = torch.autograd.grad(out, x, grad, retain_graph=True)
        (dense,) = torch.autograd.grad(out, x, grad.contiguous(), retain_graph=True)
        assert torch.equal(strided, dense)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_at_the_ends_of_the_dtype(dtype, backend):
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    rows = [
        [0.0, 0.0, 0.0],
        [smallest, -smallest, 0.0],
        [largest, -largest, 1.0],
        [float("inf"), 1.0, 0.0],
        [-float("inf"), 1.0, 0.0],
        [float("nan"), 1.0, 0.0],
    ]
    x = torch.tensor(rows, dtype=dtype, device=DEVICE)
    weight = torch.tensor([1.0, 2.0, -0.5], device=DEVICE)
    torch.testing.assert_close(
        run_with(backend)(x, weight), composed(x.float(), weight).to(dtype), equal_nan=True
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_small_numbers_without_eps_is_finite(backend):
    """The third power of what they are multiplied with is not."""
    x = (numbers(2, 8).detach() * 1e-15).requires_grad_()
    _, grad = outputs_and_gradients(lambda x: rms_norm(x, torch.ones_like(x[0]), eps=0.0, backend=backend), x)
    wide = x.detach().double().requires_grad_()
    _, right = outputs_and_gradients(
        lambda x: rms_norm(x, torch.ones_like(x[0]), eps=0.0, backend="reference"), wide
    )
    torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend):
    x, weight = inputs_of(67, 40)
    rows = run_with(backend)(x, weight)
    alone = torch.cat([run_with(backend)(row, weight) for row in x.split(1)[::11]])
    assert torch.equal(rows[::11], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 1)])
def test_gradcheck(shape, backend):
    x, weight = inputs_of(*shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: run_with(backend, 1.0)(x, weight), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ops_are_registered_correctly(backend):
    x, weight = inputs_of(3, 4)
    torch.library.opcheck(torch.ops.softprompt.rms_norm.default, (x, weight, EPS, 1.0, backend))
    inverse = torch.rand(3, device=DEVICE)
    arguments = (x.detach() + 1, x.detach(), weight, inverse, 1.0, backend)
    torch.library.opcheck(torch.ops.softprompt.rms_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_gradients(backend):
    x, weight = inputs_of(3, 4)
    assert_takes_batches_of_gradients(lambda x: run_with(backend)(x, weight), x)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph_with_its_gradient(backend):
    assert_compiles_into_one_graph(run_with(backend), *inputs_of(2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiler_takes_other_numbers_of_rows(backend):
    weight = torch.ones(4, device=DEVICE)
    compiled = torch.compile(run_with(backend), fullgraph=True, dynamic=True)
    for num_rows in (3, 7):
        x = numbers(num_rows, 4)
        torch.testing.assert_close(compiled(x, weight), run_with(backend)(x, weight))


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": ONES}, r"weight must be \[H\] with H = \[3\], got \[2, 3\]"),
        ({"weight": ONES[0, :2]}, r"weight must be \[H\] with H = \[3\], got \[2\]"),
        ({"x": ONES[0, 0]}, r"weight must be \[H\] with H = \[\], got \[3\]"),
        ({"x": ONES.long()}, "x must be fp16, bf16, fp32 or fp64, got torch.int64"),
        ({"weight": ONES[0].int()}, "weight must be fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"weight": ONES[0].clone().requires_grad_()}, "weight gets no gradient; pass it detached"),
        ({"weight": ONES[0].to("meta")}, "rms_norm: all tensors must be on one device"),
        ({"backend": "numpy"}, "rms_norm: unknown backend 'numpy'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    refuses(rms_norm, message, {"x": ONES, "weight": ONES[0], "eps": EPS}, change)


def test_narrow_rows_share_a_program_and_wide_ones_get_more_warps():
    norm_tile = importlib.import_module("softprompt.ops.triton_elementwise").norm_tile
    tiles = {width: norm_tile(width) for width in (1, 64, 128, 2048, 3072, 16384, 16385)}
    assert tiles == {
        1: (2048, 1, 4),
        64: (32, 64, 4),
        128: (16, 128, 4),
        2048: (1, 2048, 4),
        3072: (1, 4096, 8),
        16384: (1, 16384, 32),
        16385: (1, 4096, 8),
    }
