"""The Triton kernels natively on a GPU, in every dtype; the same functions run through the interpreter."""

import pytest
import torch
from poison import poisoned_buffers

from softprompt.ops.embed_prompt import embed_prompt
from softprompt.ops.linear_cross_entropy import linear_cross_entropy
from softprompt.ops.pack_layout import pack_layout
from softprompt.ops.prepend_prompt import prepend_prompt

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter has no bf16 arithmetic; these kernels only move what they read.
PLACES = [
    *(pytest.param("cpu", dtype, (3, 9, 40), id=f"cpu-{dtype}") for dtype in (torch.float32, torch.float16)),
    *(
        pytest.param("cuda", dtype, size, id=f"cuda-{dtype}-{size}", marks=pytest.mark.gpu)
        for dtype in DTYPES
        for size in ((1, 1, 64), (8, 64, 1024), (32, 300, 2304))
    ),
]


def texts(device, num_rows, row_length, vocabulary=1000):
    generator = torch.Generator().manual_seed(num_rows)
    lengths = torch.randint(0, row_length + 1, (num_rows, 1), generator=generator)
    input_ids = torch.randint(0, vocabulary, (num_rows, row_length), generator=generator)
    mask = torch.arange(row_length) >= row_length - lengths
    labels = torch.where(torch.arange(row_length) >= row_length - 2, input_ids, -100)
    return input_ids.to(device), mask.long().to(device), labels.to(device)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("positions", ["slots", "mask", "compact"])
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (8, 64), (5, 2500)])
@pytest.mark.parametrize("lengths", [[8], [3, 100, 1]], ids=str)
def test_pack_layout_is_the_reference(device, positions, size, lengths):
    input_ids, mask, labels = texts(device, *size)
    prompt_of_row = (torch.arange(size[0]) % len(lengths)).to(device)
    arguments = {
        "labels": labels,
        "input_ids": input_ids,
        "prompt_of_row": prompt_of_row,
        "vocab_size": 900,
        "positions": positions,
        "capacity": sum(lengths) + size[0] * size[1] + 70,
    }
    with poisoned_buffers():
        got = pack_layout(mask, lengths, **arguments, backend="triton")
    expected = pack_layout(mask, lengths, **arguments, backend="reference")
    for name, value, wanted in zip(got._fields, got, expected, strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("device, dtype, size", PLACES)
def test_embed_prompt_is_the_reference(device, dtype, size):
    num_rows, row_length, width = size
    input_ids, mask, labels = texts(device, num_rows, row_length)
    layout = pack_layout(mask, [5], labels=labels, capacity=5 + input_ids.numel() + 11, backend="reference")
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(1000, width, generator=generator).to(device, dtype)
    values = []
    for backend in ("triton", "reference"):
        prompts = torch.randn(5, width, generator=torch.Generator().manual_seed(2))
        prompts = prompts.to(device).requires_grad_()
        with poisoned_buffers():
            out = embed_prompt(table, input_ids, layout.token_index, prompts, backend=backend)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        values.append((out.detach(), *torch.autograd.grad(out, prompts, grad)))
    for got, expected in zip(*values, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("device, dtype, size", PLACES)
@pytest.mark.parametrize("of_rows", [False, True])
def test_prepend_prompt_is_the_reference(device, dtype, size, of_rows):
    num_rows, row_length, width = size
    input_ids, mask, labels = texts(device, num_rows, row_length)
    table = torch.randn(1000, width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    numbers = (torch.arange(num_rows) % 2).to(device) if of_rows else None
    values = []
    for backend in ("triton", "reference"):
        prompts = torch.randn(12 if of_rows else 6, width, generator=torch.Generator().manual_seed(2))
        prompts = prompts.to(device).requires_grad_()
        with poisoned_buffers():
            batch = prepend_prompt(
                table,
                input_ids,
                prompts,
                [6, 6] if of_rows else [6],
                attention_mask=mask,
                labels=labels,
                prompt_of_row=numbers,
                backend=backend,
            )
        grad = torch.randn(batch.inputs_embeds.shape, generator=torch.Generator().manual_seed(3))
        (gradient,) = torch.autograd.grad(batch.inputs_embeds, prompts, grad.to(device, dtype))
        values.append((*(value.detach() for value in batch), gradient))
    for got, expected in zip(*values, strict=True):
        assert torch.equal(got, expected)


HEADS = [
    *(
        pytest.param("cpu", dtype, (5, 32, 131), id=f"cpu-{dtype}")
        for dtype in (torch.float32, torch.float16)
    ),
    *(
        pytest.param("cuda", dtype, size, id=f"cuda-{dtype}-{size}", marks=pytest.mark.gpu)
        for dtype in DTYPES
        for size in ((8, 1024, 250_880), (100, 256, 50_257), (1500, 256, 32_000))
    ),
]


@pytest.mark.parametrize("device, dtype, size", HEADS)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "logit_scale": 0.7}, {"label_smoothing": 0.1, "num_items": 3}], ids=str
)
def test_linear_cross_entropy_has_the_error_of_the_dtype(device, dtype, size, options):
    num_labels, width, vocabulary = size
    generator = torch.Generator().manual_seed(num_labels)
    hidden = torch.randn(num_labels + 7, width, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(device, dtype)
    rows = torch.randperm(num_labels + 7, generator=generator)[:num_labels].to(device)
    targets = torch.randint(0, vocabulary, (num_labels,), generator=generator).to(device)
    targets[1::4] = -100

    def run(wide, backend):
        own = hidden.detach().to(wide).requires_grad_()
        with poisoned_buffers():
            loss = linear_cross_entropy(own, weight.to(wide), rows, targets, backend=backend, **options)
        return loss.detach().double(), torch.autograd.grad(loss, own)[0].double()

    truth = run(torch.float64, "reference")
    plain, ours = run(dtype, "reference"), run(dtype, "triton")
    for got, other, right in zip(ours, plain, truth, strict=True):
        scale = right.norm()
        allowed = 2 * float((other - right).norm() / scale) + torch.finfo(dtype).eps / 2
        assert float((got - right).norm() / scale) <= allowed


def kernels_of(run):
    """Names of the kernels that one call launches."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type.name == "CUDA"]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[100], [8, 8, 8], [3, 100, 1]], ids=str)
def test_pack_layout_is_one_launch(lengths):
    input_ids, mask, labels = texts("cuda", 8, 64)
    rows = torch.zeros(8, dtype=torch.int32, device="cuda")
    names = kernels_of(
        lambda: pack_layout(mask, lengths, labels=labels, input_ids=input_ids, prompt_of_row=rows)
    )
    assert len(names) == 1, names


@pytest.mark.gpu
def test_embed_prompt_is_one_launch():
    input_ids, mask, _ = texts("cuda", 8, 64)
    table = torch.randn(1000, 1024, device="cuda", dtype=torch.bfloat16)
    prompts = torch.randn(8, 1024, device="cuda")
    index = pack_layout(mask, [8]).token_index
    names = kernels_of(lambda: embed_prompt(table, input_ids, index, prompts))
    assert len(names) == 1, names
