import importlib
import math
import os

import pytest
import torch
from backends import BACKENDS
from head_problem import DEVICE, IGNORED, NAMES, as_double, largest_error, loss_and_gradients, problem
from poison import poisoned_buffers

from softprompt.ops.linear_cross_entropy import linear_cross_entropy
from softprompt.ops.linear_cross_entropy.arguments import LossOptions
from softprompt.ops.linear_cross_entropy.reference import linear_cross_entropy_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "none": {},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": 0.125},
    "smoothing": {"label_smoothing": 0.2},
    "all": {"softcap": 5.0, "logit_scale": 1.5, "label_smoothing": 0.1, "num_items": 7.5},
}
# The interpreter computes with the minus infinity beyond the vocabulary, which the kernel then discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size, bias", [(131, True), (1024, False)])
def test_the_error_is_at_most_twice_that_of_plain_pytorch(backend, dtype, vocab_size, bias, name):
    case = problem(vocab_size, dtype, bias=bias)
    truth = loss_and_gradients(linear_cross_entropy_ref, *as_double(*case[:3]), *case[3:], **OPTIONS[name])
    plain = loss_and_gradients(linear_cross_entropy_ref, *case, **OPTIONS[name])
    ours = loss_and_gradients(linear_cross_entropy, *case, backend=backend, **OPTIONS[name])
    assert [x.dtype for x in ours] == [torch.float32] + [dtype] * (len(ours) - 1)
    # Where plain PyTorch happens to hit the truth, the last steps of any order of sums may round twice.
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert largest_error(a, c) <= 2 * largest_error(b, c) + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("label_rows_given", [True, False])
@pytest.mark.parametrize("name", ["none", "all"])
def test_gradcheck_with_a_different_gradient_for_every_loss(backend, name, label_rows_given):
    hidden, weight, bias, label_rows, targets = problem(7, width=3, num_rows=20)
    if not label_rows_given:
        label_rows, targets = None, torch.nn.functional.pad(targets, (3, 8), value=IGNORED)
    options = {**OPTIONS[name], "num_items": None, "reduction": "none"}

    def losses(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, label_rows, targets, bias=bias, backend=backend, **options
        )

    # Interpreted and emulated kernels are too slow to perturb every entry.
    slow = backend == "triton" or "SOFTPROMPT_TEST_NATIVE" in os.environ
    assert torch.autograd.gradcheck(losses, (hidden, weight, bias), fast_mode=slow)
    (d_hidden,) = torch.autograd.grad(losses(hidden, weight, bias).pow(2).sum(), hidden)
    literal = linear_cross_entropy_ref(hidden, weight, label_rows, targets, bias=bias, **options)
    torch.testing.assert_close(d_hidden, torch.autograd.grad(literal.pow(2).sum(), hidden)[0])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_label_rows_of_none_means_the_rows_whose_target_is_not_ignored(backend, index_dtype):
    hidden, weight, bias, _, _ = problem()
    targets = torch.full((20,), IGNORED, dtype=index_dtype, device=DEVICE)
    targets[2], targets[11] = 130, 0
    rows = torch.tensor([2, 11], dtype=index_dtype, device=DEVICE)
    left_out = loss_and_gradients(linear_cross_entropy, hidden, weight, bias, None, targets, backend=backend)
    given = loss_and_gradients(
        linear_cross_entropy, hidden, weight, bias, rows, targets[rows], backend=backend
    )
    torch.testing.assert_close(left_out, given)
    losses = linear_cross_entropy(hidden, weight, None, targets, reduction="none", backend=backend)
    assert losses.nonzero().flatten().tolist() == [2, 11]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_labels", [0, 1, 5])
def test_nothing_to_score_gives_loss_zero_and_a_connected_zero_gradient(backend, num_labels, reduction):
    hidden, weight, bias, _, _ = problem()
    rows = torch.zeros(num_labels, dtype=torch.int32, device=DEVICE)
    for num_items in [None, 0, torch.tensor([0])] if reduction == "mean" else [None]:
        loss = linear_cross_entropy(
            hidden,
            weight,
            rows,
            torch.full_like(rows, IGNORED),
            bias=bias,
            num_items=num_items,
            reduction=reduction,
            backend=backend,
        )
        assert loss.shape == ((num_labels,) if reduction == "none" else ())
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        assert not loss.any()
        assert not any(gradient.any() for gradient in gradients)


def test_a_vocabulary_of_one_token_has_no_loss(backend):
    case = problem(1, torch.float32)
    for options in OPTIONS.values():
        for value in loss_and_gradients(linear_cross_entropy, *case, backend=backend, **options):
            torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-6)


def test_one_label_row_and_another_ignore_index(backend):
    hidden, weight, bias, _, _ = problem()
    rows, targets = torch.tensor([4, 5], device=DEVICE), torch.tensor([7, 3], device=DEVICE)
    one = linear_cross_entropy(hidden, weight, rows[:1], targets[:1], bias=bias, backend=backend)
    both = linear_cross_entropy(hidden, weight, rows, targets, bias=bias, ignore_index=3, backend=backend)
    torch.testing.assert_close(
        one, torch.nn.functional.cross_entropy((hidden @ weight.t() + bias)[rows[:1]], targets[:1])
    )
    torch.testing.assert_close(both, one)


def test_num_items_may_be_a_number_or_a_tensor_of_one_element(backend):
    hidden, weight, _, label_rows, targets = problem(dtype=torch.float32)
    total = linear_cross_entropy(hidden, weight, label_rows, targets, reduction="sum", backend=backend)
    torch.testing.assert_close(
        total, linear_cross_entropy_ref(hidden, weight, label_rows, targets, reduction="sum")
    )
    for num_items in (5, 5.0, torch.tensor(5), torch.tensor([5.0], dtype=torch.float64, device=DEVICE)):
        loss = linear_cross_entropy(hidden, weight, label_rows, targets, num_items=num_items, backend=backend)
        torch.testing.assert_close(loss, total / 5)


def test_rows_outside_the_label_rows_may_be_nan(backend):
    hidden, weight, bias, label_rows, targets = problem(dtype=torch.float32)
    clean = loss_and_gradients(
        linear_cross_entropy, hidden, weight, bias, label_rows, targets, backend=backend
    )
    dirty = torch.full_like(hidden, math.nan)
    dirty[label_rows] = hidden.detach()[label_rows]
    with poisoned_buffers():
        ours = loss_and_gradients(
            linear_cross_entropy, dirty.requires_grad_(), weight, bias, label_rows, targets, backend=backend
        )
    torch.testing.assert_close(ours, clean, rtol=0, atol=0)


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_tensors_need_not_be_contiguous(backend, view):
    hidden, weight, bias, label_rows, targets = problem()
    views = {
        "transposed": [x.detach().t().contiguous().t() for x in (hidden, weight)],
        "strided": [torch.stack([x.detach()] * 2, -1)[..., 0] for x in (hidden, weight, bias)],
        "expanded": [hidden.detach()[:1].expand_as(hidden), weight.detach()[:1].expand_as(weight)],
    }[view]
    views = [x.requires_grad_() for x in views] + [bias][len(views) - 2 :]
    pairs = torch.stack([label_rows, targets], 1)
    ours = loss_and_gradients(linear_cross_entropy, *views, *pairs.unbind(1), backend=backend)
    truth = loss_and_gradients(linear_cross_entropy_ref, *views, label_rows, targets)
    torch.testing.assert_close(ours, truth)


def test_repeated_rows_are_summed_in_fp32():
    width, repeats = 16, 3000
    hidden = torch.ones(2, width, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [2.0]], device=DEVICE).expand(2, width).to(torch.bfloat16)
    rows = torch.zeros(repeats, dtype=torch.int64, device=DEVICE)
    linear_cross_entropy(hidden, weight, rows, rows, reduction="sum", backend="reference").backward()
    share = 1 / (1 + math.exp(-width))
    torch.testing.assert_close(
        hidden.grad[0].float().cpu(), torch.full((width,), repeats * share), rtol=4e-3, atol=0
    )
    assert not hidden.grad[1].any()


def test_a_second_derivative_is_refused(backend):
    case = problem()
    loss = linear_cross_entropy(*case[:2], *case[3:], bias=case[2], backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, case[0], create_graph=True)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_products_run_in_the_autocast_dtype(backend, weight_dtype):
    hidden, weight, bias, label_rows, targets = problem(dtype=torch.float32)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    case = hidden, weight, bias, label_rows, targets
    narrow = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    truth = loss_and_gradients(linear_cross_entropy_ref, *as_double(*narrow, bias), label_rows, targets)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, *case, backend=backend)
        plain = loss_and_gradients(linear_cross_entropy_ref, *case)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, weight_dtype, torch.float32]
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert largest_error(a, c) <= 2 * largest_error(b, c) + torch.finfo(torch.bfloat16).eps
    double = problem()
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, *double, backend=backend)
    torch.testing.assert_close(ours, loss_and_gradients(linear_cross_entropy_ref, *double))


@pytest.mark.parametrize("gradient", [True, False])
def test_the_row_function_handles_ignored_and_unknown_targets_in_place(backend, gradient):
    module = importlib.import_module(f"softprompt.ops.linear_cross_entropy.{backend}")
    logits = torch.randn(4, 48, device=DEVICE)
    logits[1] = math.nan
    padded = torch.full((4, 48), math.nan, device=DEVICE)
    padded[:, :37] = logits[:, :37]
    losses = torch.full((4,), 5.0, device=DEVICE)
    factors = torch.tensor([2.0, 3.0, 5.0, 7.0], device=DEVICE)
    targets = torch.tensor([36, IGNORED, 37, 0], device=DEVICE)
    options = LossOptions(ignore_index=IGNORED)
    module.rows_loss_and_gradient_(padded[:, :37], None, targets, losses, factors, options, gradient=gradient)
    expected = torch.nn.functional.cross_entropy(logits[[0, 3], :37], targets[[0, 3]], reduction="none")
    torch.testing.assert_close(losses[[0, 3]], expected)
    assert losses[1] == 0
    assert losses[2].isnan()
    if gradient:
        one_hot = torch.nn.functional.one_hot(targets[[0, 3]], 37)
        d_logits = (logits[[0, 3], :37].softmax(-1) - one_hot) * factors[[0, 3], None]
        torch.testing.assert_close(padded[[0, 3], :37], d_logits)
        if backend != "reference" or DEVICE == "cuda":
            assert not padded[1, :37].any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": torch.zeros(2, 20, 24)}, r"\[T, H\] and \[V, H\], got \[2, 20, 24\] and \[131, 24\]"),
        ({"weight": torch.zeros(131, 25)}, r"weight must be \[V, 24\].*got \[131, 25\]"),
        ({"weight": torch.zeros(0, 24)}, "V = 0"),
        ({"weight": torch.zeros(131, 24).half()}, r"one dtype, got torch.float32 and torch.float16"),
        ({"hidden": torch.zeros(20, 24).int()}, "hidden must be fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"targets": torch.zeros(9)}, "targets must be int32 or int64, got torch.float32"),
        ({"label_rows": torch.zeros(9).bool()}, "label_rows must be int32 or int64, got torch.bool"),
        ({"targets": torch.zeros(8).long()}, r"both be \[M\], got \[9\] and \[8\]"),
        ({"label_rows": None}, r"targets without label_rows must be \[T\] = \[20\], got \[9\]"),
        ({"bias": torch.zeros(130)}, r"bias must be \[V\] = \[131\], got \[130\]"),
        ({"reduction": "max"}, "unknown reduction 'max', expected one of mean, sum, none"),
        ({"label_smoothing": 1.0}, "at least 0 and below 1, got 1.0"),
        ({"softcap": 0.0}, "softcap must be positive or None, got 0.0"),
        ({"logit_scale": -1.0}, "logit_scale must be positive or None, got -1.0"),
        ({"num_items": 4, "reduction": "sum"}, "num_items replaces.*reduction='sum'"),
        ({"num_items": torch.ones(2)}, r"one element, got shape \[2\]"),
        ({"num_items": -1}, "must be a number of at least 0, got -1"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"weight": torch.zeros(131, 24, device="meta")}, "hidden on cpu, weight on meta"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(changes, message):
    case = dict(zip(NAMES, problem(dtype=torch.float32, device="cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**case, **changes})


@pytest.mark.parametrize(
    "name, value", [("targets", 131), ("targets", -1), ("label_rows", 20), ("label_rows", -1)]
)
def test_an_index_outside_is_named_on_a_cpu(name, value):
    case = dict(zip(NAMES, problem(device="cpu"), strict=True))
    case[name][4] = value
    with pytest.raises(IndexError, match=rf"{name}\[4\] is {value}, expected 0 .. "):
        linear_cross_entropy(**case)
