"""The compiled products of a few rows with a large matrix, with every set of instructions that is there."""

import pytest
import torch
from poison import poisoned_buffers

from softprompt.ops.linear_cross_entropy import linear_cross_entropy
from softprompt.ops.linear_cross_entropy.native import serves_few_rows
from softprompt.ops.registry import INSTRUCTIONS, native_availability

pytestmark = pytest.mark.skipif(not native_availability("cpu").usable, reason="the native ops are not built")

BEST = INSTRUCTIONS["best"]
NUM_ROWS = [0, 1, 3, 4, 6, 7, 13, 21, 128]
# Widths around vectors of 4, 8 and 16 numbers and four of them; vocabularies around blocks and their sums.
SIZES = [(1, 1), (3, 5), (15, 3), (17, 64), (64, 131), (71, 1003), (5, 4101), (130, 9001)]


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    number, one = INSTRUCTIONS[request.param], torch.ones(1, 1)
    try:
        torch.ops.softprompt.native_few_rows_logits(one, one, torch.empty(1, 1), number)
    except RuntimeError as error:
        if "has no instructions" not in str(error):
            raise
        pytest.skip(f"no {request.param} here")
    return number


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def assert_near(ours, left, right):
    """The error is at most twice that of plain PyTorch, and a few roundings of the terms that were added."""
    truth, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    plain = (left @ right - truth).abs().amax() if truth.numel() else 0
    assert ((ours - truth).abs() <= 2 * plain + 2 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("width, vocab_size", SIZES)
def test_logits_of_few_rows_are_those_of_pytorch(instructions, threads, width, vocab_size):
    weight = numbers(vocab_size, width + 3)[:, :width]  # dense rows at a distance
    for num_rows in NUM_ROWS:
        rows = numbers(num_rows, width)
        with poisoned_buffers():
            logits = torch.empty(num_rows, vocab_size + 5)
            outside = logits[:, vocab_size:].clone()
            out = logits[:, :vocab_size]
            torch.ops.softprompt.native_few_rows_logits(rows, weight, out, instructions)
        assert_near(out, rows, weight.t())
        torch.testing.assert_close(logits[:, vocab_size:], outside, equal_nan=True)


@pytest.mark.parametrize("width, vocab_size", SIZES)
def test_the_gradient_of_few_rows_is_that_of_pytorch(instructions, threads, width, vocab_size):
    weight = numbers(vocab_size, width + 3)[:, :width]
    for num_rows in NUM_ROWS:
        d_logits = numbers(num_rows, vocab_size + 5)[:, :vocab_size]
        with poisoned_buffers():
            d_rows = torch.empty(num_rows, width)
            torch.ops.softprompt.native_few_rows_d_rows(d_logits, weight, d_rows, instructions)
        assert_near(d_rows, d_logits, weight)


def test_long_sums_are_as_near_as_those_of_pytorch(instructions):
    """Gradients that all have one sign: what is added one by one to a growing total would be lost."""
    d_logits, weight = numbers(2, 200_000).abs(), numbers(200_000, 20).abs()
    d_rows = torch.empty(2, 20)
    torch.ops.softprompt.native_few_rows_d_rows(d_logits, weight, d_rows, instructions)
    truth = d_logits.double() @ weight.double()
    assert ((d_rows - truth).abs() / truth).max() < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("size", [(2, 3), (3, 2)])
def test_sizes_that_do_not_fit_are_refused(size):
    rows, weight = numbers(2, 4), numbers(3, 4)
    with pytest.raises(RuntimeError, match="sizes do not fit"):
        torch.ops.softprompt.native_few_rows_logits(rows, weight, torch.empty(3, 3), BEST)
    with pytest.raises(RuntimeError, match="sizes do not fit"):
        torch.ops.softprompt.native_few_rows_d_rows(numbers(*size), weight, torch.empty(2, 5), BEST)
    with pytest.raises(RuntimeError, match="dense fp32 rows"):
        torch.ops.softprompt.native_few_rows_logits(rows, numbers(4, 3).t(), torch.empty(2, 3), BEST)
    with pytest.raises(RuntimeError, match="has no instructions of number 9"):
        torch.ops.softprompt.native_few_rows_logits(rows, weight, torch.empty(2, 3), 9)


@pytest.mark.parametrize(
    "weight, num_rows, served",
    [
        (torch.ones(3, 4), 256, True),
        (torch.ones(3, 4), 257, False),
        (torch.ones(4, 3).t(), 1, False),
        (torch.ones(3, 4, dtype=torch.float64), 1, False),
        (torch.ones(3, 4, dtype=torch.bfloat16), 1, False),
    ],
)
def test_other_products_stay_with_pytorch(weight, num_rows, served):
    assert serves_few_rows(torch.ones(num_rows, 4, dtype=weight.dtype), weight) is served


@pytest.mark.parametrize("num_rows", [5, 260])
def test_the_op_uses_them_for_few_rows_only(num_rows, monkeypatch):
    from softprompt.ops.linear_cross_entropy import native

    used = []
    for name in ("logits_of_few_rows", "d_rows_of_few_rows"):
        product = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *given, name=name, product=product: (used.append(name), product(*given))
        )
    hidden, weight = numbers(num_rows, 8).requires_grad_(), numbers(40, 8)
    targets = torch.arange(num_rows) % 40
    losses = {
        backend: linear_cross_entropy(hidden, weight, None, targets, backend=backend)
        for backend in ("reference", "native")
    }
    torch.testing.assert_close(losses["native"], losses["reference"])
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, hidden)[0] for loss in (losses["native"], losses["reference"]))
    )
    assert used == (["logits_of_few_rows", "d_rows_of_few_rows"] if num_rows == 5 else [])
