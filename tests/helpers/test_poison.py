"""What `poisoned_buffers` finds, and what it leaves alone."""

import pytest
import torch
from poison import UnwrittenMemoryError, poison, poisoned_buffers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape, rows, columns",
    [((4, 128), 4, 97), ((4, 97), 3, 97), ((4, 104), 1, 97), ((2, 128), 2, 96)],
    ids=["gaps", "next row", "rest of the row", "gap of whole blocks"],
)
def test_a_product_is_refused_gaps_and_what_follows_its_last_row(shape, rows, columns, dtype):
    buffer = poison(torch.empty(shape, dtype=dtype))
    operand, factors = buffer[:rows, :columns], torch.ones(columns, 5, dtype=dtype)
    operand.fill_(1)
    with poisoned_buffers(), pytest.raises(UnwrittenMemoryError, match=r"mm reads operand 0.* never written"):
        operand @ factors
    buffer.nan_to_num_(0)
    with poisoned_buffers() as watch:
        operand @ factors
    assert watch.products == 1


def test_a_product_of_whole_blocks_is_not_refused_for_what_follows():
    buffer = poison(torch.empty(4, 96))
    buffer[:2] = 1
    with poisoned_buffers() as watch:
        buffer[:2] @ torch.ones(96, 5)
    assert watch.products == 1


def test_the_watch_sees_what_is_allocated_inside_and_what_a_backward_multiplies():
    factors = torch.ones(3, 4, requires_grad=True)
    with poisoned_buffers():
        assert torch.empty(3).isnan().all()
        assert factors.new_empty(2, 2).isnan().all()
        assert torch.empty_like(factors).isnan().all()
        assert torch.empty_strided((2, 2), (4, 1), dtype=torch.bfloat16).isnan().all()
        product = factors @ torch.ones(4, 5)
        with pytest.raises(UnwrittenMemoryError, match="mm reads operand 0"):
            product.backward(torch.empty(3, 5))


def test_what_a_product_only_adds_zero_times_may_be_unwritten():
    with poisoned_buffers():
        nothing = torch.empty(2, 3)
        sums = torch.addmm(nothing, torch.ones(2, 4), torch.ones(4, 3), beta=0)
        assert torch.equal(sums, torch.full((2, 3), 4.0))
        with pytest.raises(UnwrittenMemoryError):
            torch.addmm(nothing, torch.ones(2, 4), torch.ones(4, 3))
