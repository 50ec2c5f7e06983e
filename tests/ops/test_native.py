"""What the compiled back ends do by size: threads, shares of rows, cooperating blocks, streamed stores."""

import importlib
import itertools

import pytest
import torch
from backends import DEVICE, backend_parameter
from poison import poisoned_buffers
from torch.profiler import ProfilerActivity, profile

from softprompt import ops
from softprompt.ops.embed_prompt import embed_prompt
from softprompt.ops.linear_cross_entropy.arguments import LossOptions
from softprompt.ops.linear_cross_entropy.reference import rows_loss_and_gradient_ as reference_rows
from softprompt.ops.pack_layout import pack_layout
from softprompt.ops.prepend_prompt import prepend_prompt

OPS = ["embed_prompt", "linear_cross_entropy", "pack_layout", "prepend_prompt", "shared_prompt_attention"]
NATIVE = [backend_parameter("native")]
OPTIONS = LossOptions()


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rows_of(backend):
    return importlib.import_module(f"softprompt.ops.linear_cross_entropy.{backend}").rows_loss_and_gradient_


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("num_rows", [1, 2, 40])
@pytest.mark.parametrize("vocab_size, row_length", [(9001, 9008), (9001, 9001), (40_000, 40_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_a_long_vocabulary_are_those_of_pytorch(
    dtype, vocab_size, row_length, num_rows, backend, threads
):
    threads(3)
    generator = torch.Generator().manual_seed(num_rows)
    values = 4 * torch.randn(num_rows, row_length, generator=generator, dtype=torch.float64)
    logits = values.to(DEVICE, dtype)[:, :vocab_size]
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator).to(DEVICE)
    targets[-1] = vocab_size - 1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = torch.rand(num_rows, generator=generator).to(DEVICE, wide)
    results = {}
    for name, function, numbers in (
        ("truth", reference_rows, torch.float64),
        ("plain", reference_rows, dtype),
        ("native", rows_of(backend), dtype),
    ):
        own = logits.to(numbers).clone()
        sums = torch.float64 if numbers == torch.float64 else torch.float32
        losses = torch.full((num_rows,), float("nan"), dtype=sums, device=DEVICE)
        options = LossOptions(softcap=9.0, label_smoothing=0.1)
        with poisoned_buffers():
            function(own, None, targets, losses, factors.to(sums), options, gradient=True)
        results[name] = losses.double(), own.double()
    for ours, plain, truth in zip(results["native"], results["plain"], results["truth"], strict=True):
        error, allowed = (ours - truth).abs().max(), (plain - truth).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("backend", NATIVE)
def test_an_ignored_row_among_shares_is_zero(backend, threads):
    threads(4)
    logits = torch.full((2, 20_000), float("nan"), device=DEVICE)
    logits[1] = torch.linspace(-3, 3, 20_000)
    expected = logits[1].clone()
    losses = torch.full((2,), 5.0, device=DEVICE)
    targets = torch.tensor([-100, 19_999], device=DEVICE)
    rows_of(backend)(logits, None, targets, losses, None, OPTIONS, gradient=True)
    assert losses[0] == 0
    assert not logits[0].any()
    torch.testing.assert_close(losses[1], torch.nn.functional.cross_entropy(expected, targets[1]))


@pytest.mark.parametrize("backend", NATIVE)
def test_logits_of_minus_infinity_are_tokens_that_cannot_come(backend):
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, :2048] = float("-inf")
    targets = torch.tensor([2999, 2048, 2100])
    own, losses = logits.to(DEVICE).clone(), torch.empty(3, device=DEVICE)
    rows_of(backend)(own, None, targets.to(DEVICE), losses, None, OPTIONS, gradient=True)
    torch.testing.assert_close(
        losses.cpu(), torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    )
    assert not own[:, :2048].any()
    torch.testing.assert_close(own.sum(1).cpu(), torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_all_have_the_lowest_logit_are_as_likely_as_each_other(dtype, backend):
    logits = torch.full((1, 5000), torch.finfo(dtype).min, dtype=dtype, device=DEVICE)
    losses = torch.empty(1, device=DEVICE)
    rows_of(backend)(logits, None, torch.tensor([7], device=DEVICE), losses, None, OPTIONS, gradient=True)
    torch.testing.assert_close(losses.cpu(), torch.tensor([5000.0]).log())
    torch.testing.assert_close(logits[0, 7], torch.full_like(logits[0, 7], 1 / 5000 - 1))
    torch.testing.assert_close(logits[0, :7], torch.full_like(logits[0, :7], 1 / 5000))


@pytest.mark.parametrize("backend", NATIVE)
def test_a_row_with_a_nan_has_a_nan_as_its_loss(backend):
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, 4321] = float("nan")
    losses = torch.empty(2, device=DEVICE)
    rows_of(backend)(logits, None, torch.tensor([7, 7], device=DEVICE), losses, None, OPTIONS, gradient=False)
    assert losses.isnan().tolist() == [True, False]


def test_no_argument_of_a_compiled_op_is_a_string():
    """The stable ABI of torch 2.13 leaves a copy of each string behind at every call, of 48 bytes or more."""
    for op in OPS:
        assert hasattr(ops, op)
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if "::native_" in schema.name]
    assert len(schemas) >= len(OPS)
    for schema in schemas:
        assert "str" not in {str(argument.type) for argument in schema.arguments}, schema


def most_memory(function):
    """Bytes that a call has at the most, beside what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU allocates")
@pytest.mark.parametrize("backend", NATIVE)
def test_rows_need_no_memory_of_the_size_of_the_logits(backend):
    logits = torch.randn(8, 60_000, requires_grad=True)
    targets = torch.arange(8)

    def plain():
        torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), logits)

    own, losses = logits.detach().clone(), torch.empty(8)

    def ours():
        rows_of(backend)(own, None, targets, losses, None, OPTIONS, gradient=True)

    assert most_memory(plain) >= 2 * logits.nbytes
    assert most_memory(ours) < 0.01 * logits.nbytes


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("positions", ["slots", "mask", "compact"])
@pytest.mark.parametrize("shape", [(40, 9), (70, 33), (3, 6000), (1, 70)], ids=str)
def test_many_rows_and_long_rows_are_packed_as_by_pytorch(shape, positions, backend, threads):
    threads(3)
    generator = torch.Generator().manual_seed(shape[0])
    mask = torch.randint(0, 3, shape, generator=generator).to(DEVICE)
    labels = torch.randint(-2, 9, shape, generator=generator)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.7, -100, labels).to(DEVICE)
    arguments = {
        "labels": labels,
        "input_ids": torch.randint(-2, 9, shape, generator=generator).to(DEVICE),
        "prompt_of_row": (torch.arange(shape[0]) % 3).to(DEVICE),
        "vocab_size": 7,
        "positions": positions,
        "capacity": 40 + shape[0] * shape[1],
        "label_capacity": 5 + shape[0] * shape[1],
    }
    with poisoned_buffers():
        found = pack_layout(mask, [3, 20, 1], **arguments, backend=backend)
    expected = pack_layout(mask, [3, 20, 1], **arguments, backend="reference")
    for name, actual, right in zip(found._fields, found, expected, strict=True):
        assert torch.equal(actual, right), name


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_larger_than_a_cache_are_the_same(dtype, backend, threads):
    threads(2)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(64, 4096, generator=generator).to(DEVICE, dtype)
    ids = torch.randint(-1, 66, (3, 1500), generator=generator).to(DEVICE)
    prompts = torch.randn(5, 4096, generator=generator).to(DEVICE)
    index = pack_layout(torch.ones_like(ids), [5], backend="reference").token_index
    with poisoned_buffers():
        found = embed_prompt(table, ids, index, prompts, backend=backend)
    assert found.numel() * found.element_size() >= 32 << 20
    assert torch.equal(found, embed_prompt(table, ids, index, prompts, backend="reference"))


@pytest.mark.parametrize("backend", NATIVE)
def test_the_gradient_of_prompts_has_the_same_bits_for_any_number_of_threads(backend, threads):
    generator = torch.Generator().manual_seed(0)
    table, ids = torch.randn(9, 2048, generator=generator), torch.randint(0, 9, (64, 2), generator=generator)
    grad = torch.randn(64, 13, 2048, generator=generator)
    found = []
    for number in (1, 3):
        threads(number)
        prompts = torch.zeros(33, 2048, requires_grad=True, device=DEVICE)
        batch = prepend_prompt(
            table.to(DEVICE),
            ids.to(DEVICE),
            prompts,
            [11, 11, 11],
            prompt_of_row=(torch.arange(64) % 3).to(DEVICE),
            backend=backend,
        )
        found.append(torch.autograd.grad(batch.inputs_embeds, prompts, grad.to(DEVICE))[0])
    assert torch.equal(*found)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nothing is read back, and prompt 0 is used instead")
@pytest.mark.parametrize("backend", ["reference", "triton", *NATIVE])
@pytest.mark.parametrize("wrong", [-1, 2])
def test_a_prompt_that_is_not_there_is_named_by_every_back_end(backend, wrong):
    of_row = torch.tensor([0, 1, wrong])
    message = rf"prompt_of_row\[2\] is {wrong}, expected 0 .. 1"
    with pytest.raises(IndexError, match=message):
        pack_layout(torch.ones(3, 4), [2, 2], prompt_of_row=of_row, backend=backend)
    with pytest.raises(IndexError, match=message):
        prepend_prompt(
            torch.ones(5, 3),
            torch.zeros(3, 4, dtype=torch.int64),
            torch.ones(4, 3),
            [2, 2],
            prompt_of_row=of_row,
            backend=backend,
        )
