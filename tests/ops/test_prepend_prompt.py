import importlib

import pytest
import torch
from backends import BACKENDS, DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_buffers

from softprompt.ops.prepend_prompt import PrependedBatch, prepend_prompt

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = [1, 3, 64, 1000]
VOCAB = 11


def expected_batch(table, input_ids, prompts, prompt_length, *, attention_mask, labels, prompt_of_row):
    """The definition, one entry at a time."""
    vocab_size, width = table.shape
    embeds, masks, targets, positions, counts = [], [], [], [], [0, 0, 0]
    for b, ids in enumerate(input_ids.tolist()):
        prompt = 0 if prompt_of_row is None else prompt_of_row.tolist()[b]
        row = [prompts[prompt * prompt_length + p].to(table.dtype) for p in range(prompt_length)]
        row_mask, row_labels = [1.0] * prompt_length, [-100] * prompt_length
        for c, number in enumerate(ids):
            known = 0 <= number < vocab_size
            row.append(table[number] if known else torch.zeros_like(table[0]))
            row_mask.append(1.0 if attention_mask is None else float(attention_mask[b, c]))
            row_labels.append(-100 if labels is None else int(labels[b, c]))
            counts[1] += not known
        # The label at a position is predicted by the position before it, so the first one has no prediction.
        scored = [label for label in row_labels[1:] if label != -100]
        counts[0] += len(scored)
        counts[2] += sum(not 0 <= label < vocab_size for label in scored)
        embeds += row
        masks += row_mask
        targets += row_labels
        positions += range(len(row))
    shape = (input_ids.shape[0], prompt_length + input_ids.shape[1])
    stacked = torch.stack(embeds) if embeds else table.new_zeros(0)
    return PrependedBatch(
        stacked.reshape(*shape, width),
        torch.tensor(masks, dtype=torch.float32, device=DEVICE).reshape(shape),
        torch.tensor(targets, dtype=torch.int64, device=DEVICE).reshape(shape),
        torch.tensor(positions, dtype=torch.int64, device=DEVICE).reshape(shape),
        torch.tensor(counts, dtype=torch.int32, device=DEVICE),
    )


def check(backend, table, input_ids, prompts, prompt_length, **options):
    num_prompts = prompts.shape[0] // prompt_length
    with poisoned_buffers():
        actual = prepend_prompt(
            table, input_ids, prompts, [prompt_length] * num_prompts, **options, backend=backend
        )
    expected = expected_batch(table, input_ids, prompts, prompt_length, **options)
    for name, tensor, definition in zip(PrependedBatch._fields, actual, expected, strict=True):
        assert tensor.dtype == definition.dtype, name
        assert tensor.shape == definition.shape, name
        assert torch.equal(tensor, definition), name


def make_inputs(shape=(3, 5), width=4, dtype=torch.float32, prompt_dtype=torch.float32, *, seed=0):
    """table, input_ids, prompts (two of three rows), and the three options, all given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    table = torch.randn(VOCAB, width, generator=generator).to(dtype)
    prompts = (draw(-64, 64, (6, width)) / 8).to(prompt_dtype)  # eighths are exact in every dtype
    labels = torch.where(draw(0, 2, shape) == 0, draw(-2, VOCAB + 2, shape), -100)
    options = {
        "attention_mask": draw(0, 2, shape),
        "labels": labels,
        "prompt_of_row": draw(0, 2, shape[:1]),
    }
    inputs = [tensor.to(DEVICE) for tensor in (table, draw(-2, VOCAB + 2, shape), prompts)]
    return *inputs, {name: tensor.to(DEVICE) for name, tensor in options.items()}


@st.composite
def batches(draw):
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 5)))
    table, ids, prompts, options = make_inputs(
        shape,
        draw(st.sampled_from([1, 3, 16])),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
    )
    for name in options:
        if draw(st.booleans()):
            options[name] = None
    if options["attention_mask"] is not None:
        mask_dtype = draw(st.sampled_from([torch.int64, torch.bool, torch.bfloat16, torch.float32]))
        options["attention_mask"] = options["attention_mask"].to(mask_dtype)
    ids = ids.to(draw(st.sampled_from([torch.int32, torch.int64])))
    return table, ids, prompts, draw(st.sampled_from([1, 3])), options


@settings(max_examples=150, deadline=None)
@given(batches())
def test_the_reference_matches_the_definition(batch):
    *inputs, options = batch
    check("reference", *inputs, **options)


@settings(max_examples=25, deadline=None)
@given(batches())
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_kernels_match_the_definition(backend, batch):
    *inputs, options = batch
    check(backend, *inputs, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_and_dtype_matches_the_definition(width, dtype, backend):
    table, ids, prompts, options = make_inputs(width=width, dtype=dtype)
    check(backend, table, ids, prompts, 3, **options)


def test_the_counts_cover_a_batch_of_several_blocks(monkeypatch):
    monkeypatch.setattr(importlib.import_module("softprompt.ops.triton_rows"), "COUNTED", 16)
    table, ids, prompts, options = make_inputs((5, 7))
    check("triton", table, ids, prompts, 3, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_the_mask_are_kept(backend):
    table, ids, prompts, options = make_inputs()
    mask = torch.linspace(-1, 2, 15, device=DEVICE).reshape(3, 5)
    check(backend, table, ids, prompts, 3, **{**options, "attention_mask": mask})


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same_batch_as_dense_ones(backend):
    table, ids, prompts, options = make_inputs(width=12)
    table, prompts = table.T.contiguous().T, torch.stack([prompts, prompts], 2)[..., 1]
    options = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in options.items()}
    ids = ids.T.contiguous().T
    for tensor in (table, prompts, ids, *options.values()):
        assert not tensor.is_contiguous()
    check(backend, table, ids, prompts, 3, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_that_is_part_of_a_larger_one_is_not_left(backend):
    table, ids, prompts, options = make_inputs(width=8)
    larger = torch.full((VOCAB + 40, 24), float("nan"), device=DEVICE)
    larger[20 : 20 + VOCAB, 8:16] = table
    check(backend, larger[20 : 20 + VOCAB, 8:16], ids, prompts, 3, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_prompt", [True, False])
def test_the_gradient_of_a_prompt_is_the_wide_sum_over_its_rows(one_prompt, dtype, backend):
    table, ids, prompts, options = make_inputs((65, 1), 4, dtype)
    prompt_of_row = None if one_prompt else options["prompt_of_row"]
    table.requires_grad_(), prompts.requires_grad_()
    out = prepend_prompt(
        table, ids, prompts, [3, 3], prompt_of_row=prompt_of_row, backend=backend
    ).inputs_embeds
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    out.backward(grad)

    exact = torch.zeros(2, 3, 4, dtype=torch.float64, device=DEVICE)
    for b in range(65):
        exact[0 if one_prompt else options["prompt_of_row"][b]] += grad[b, :3].double()
    assert prompts.grad.dtype == torch.float32
    assert table.grad is None
    error = (prompts.grad.view(2, 3, 4).double() - exact).abs().max()
    # A sum of 65 terms in the dtype of the table would be off by more than its eps.
    assert error <= 65 * torch.finfo(torch.float32).eps
    assert exact.abs().max() > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_embeddings_require_a_gradient(backend):
    table, ids, prompts, options = make_inputs()
    batch = prepend_prompt(table, ids, prompts.requires_grad_(), [3, 3], **options, backend=backend)
    assert [tensor.requires_grad for tensor in batch] == [True, False, False, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("one_prompt", [True, False])
def test_gradcheck(one_prompt, backend):
    table, ids, prompts, options = make_inputs((3, 2), 2, torch.float64, torch.float64)
    prompt_of_row = None if one_prompt else options["prompt_of_row"]

    def embeds(prompts):
        return prepend_prompt(table, ids, prompts, [3, 3], prompt_of_row=prompt_of_row, backend=backend)[0]

    assert torch.autograd.gradcheck(embeds, prompts.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_is_registered_correctly(backend):
    table, ids, prompts, options = make_inputs()
    arguments = (table, ids, prompts.requires_grad_(), *options.values(), 3, backend)
    torch.library.opcheck(torch.ops.softprompt.prepend_prompt.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph_with_its_gradient(backend):
    table, ids, prompts, options = make_inputs()

    def run(function):
        leaf = prompts.clone().requires_grad_()
        batch = function(table, ids, leaf, **options)
        (batch.inputs_embeds**2).sum().backward()
        return *batch, leaf.grad

    def prepend(table, ids, prompts, **options):
        return prepend_prompt(table, ids, prompts, [3, 3], **options, backend=backend)

    compiled = run(torch.compile(prepend, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, run(prepend), strict=True):
        assert torch.equal(actual, expected)


FLOATS, INTEGERS = torch.ones(4, 3), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": FLOATS[0]}, r"table and prompts must be \[V, H\] and \[P, H\], got \[3\] and \[4, 3\]"),
        ({"prompts": FLOATS[None]}, r"must be \[V, H\] and \[P, H\], got \[4, 3\] and \[1, 4, 3\]"),
        ({"prompts": FLOATS[:, :2]}, "prompts must be 3 wide like the table, got 2"),
        ({"prompts": FLOATS[:3]}, r"prompts must have 4 rows \(the sum of prompt_lengths\), got 3"),
        ({"prompt_lengths": [1, 3]}, r"prompt_lengths must be equal and at least 1 .*, got \[1, 3\]"),
        ({"prompt_lengths": []}, r"prompt_lengths must be equal and at least 1 .*, got \[\]"),
        ({"prompt_lengths": [0]}, r"prompt_lengths must be equal and at least 1 .*, got \[0\]"),
        ({"input_ids": INTEGERS[0]}, r"input_ids must be \[B, L\], got shape \[5\]"),
        (
            {"attention_mask": INTEGERS[:, 1:]},
            r"attention_mask must have the shape of input_ids \[2, 5\], got \[2, 4\]",
        ),
        ({"labels": INTEGERS[:1]}, r"labels must have the shape of input_ids \[2, 5\], got \[1, 5\]"),
        ({"prompt_of_row": INTEGERS[0]}, r"prompt_of_row must be \[2\], got shape \[5\]"),
        ({"prompt_of_row": FLOATS[0, :2]}, "prompt_of_row must be integers, got torch.float32"),
        ({"input_ids": INTEGERS.double()}, "input_ids must be integers, got torch.float64"),
        ({"labels": INTEGERS.bool()}, "labels must be integers, got torch.bool"),
        ({"table": FLOATS.long()}, "table must be floating point, got torch.int64"),
        ({"prompts": FLOATS.int()}, "prompts must be floating point, got torch.int32"),
        ({"labels": INTEGERS.to("meta")}, "all tensors must be on one device"),
        ({"backend": "numpy"}, "unknown backend 'numpy'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    fitting = {"table": FLOATS, "input_ids": INTEGERS, "prompts": FLOATS, "prompt_lengths": [2, 2]}
    with pytest.raises(ValueError, match=message):
        prepend_prompt(**{**fitting, **change})


@pytest.mark.slow
def test_the_kernel_compiles_for_three_gpu_generations_without_spilling(compile_kernels):
    module = importlib.import_module("softprompt.ops.triton_rows")
    constexprs = {
        **dict.fromkeys(("table_column_stride", "ids_column_stride", "prompts_column_stride"), 1),
        **dict.fromkeys(("mask_column_stride", "labels_column_stride"), 1),
        "prompt_of_row_ptr": None,
        "ROWS": 2,
        "COLUMNS": 1024,
        "COUNTED": module.COUNTED,
    }
    types = {
        **dict.fromkeys(("table_ptr", "embeds_ptr"), "*bf16"),
        **dict.fromkeys(("prompts_ptr", "out_mask_ptr"), "*fp32"),
        **dict.fromkeys(("ids_ptr", "mask_ptr", "labels_ptr", "out_labels_ptr", "position_ids_ptr"), "*i64"),
        "counts_ptr": "*i32",
    }
    aligned = ["table_ptr", "prompts_ptr", "embeds_ptr", "width", "table_row_stride", "prompts_row_stride"]
    names = module._prepend_prompt.arg_names
    records = compile_kernels(
        [
            {
                "module": module.__name__,
                "kernel": "_prepend_prompt",
                "signature": [[n, "constexpr" if n in constexprs else types.get(n, "i32")] for n in names],
                "constexprs": constexprs,
                "divisible": aligned,
                "num_warps": module.NUM_WARPS,
            }
        ]
    )
    assert [record["arch"] for record in records] == [80, 90, 100]
    for record in records:
        assert record["cubin_bytes"] > 0
        assert record["local"] == 0
        assert record["registers"] <= 64  # more would leave too few warps to keep the memory busy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_numbers_are_read_as_such(dtype, backend):
    largest = torch.iinfo(dtype).max
    mask = torch.tensor([[largest, 0, 1]], dtype=dtype)
    numbers = torch.tensor([1], dtype=dtype)
    batch = prepend_prompt(
        torch.ones(5, 4, device=DEVICE),
        torch.tensor([[1, 2, 3]], dtype=dtype).to(DEVICE),
        torch.tensor([[2.0], [3.0]], device=DEVICE).expand(2, 4),
        [1, 1],
        attention_mask=mask.to(DEVICE),
        prompt_of_row=numbers.to(DEVICE),
        backend=backend,
    )
    assert batch.attention_mask.tolist() == [
        [1.0, torch.tensor(largest, dtype=dtype).float().item(), 0.0, 1.0]
    ]
    assert batch.inputs_embeds[0, :, 0].tolist() == [3.0, 1.0, 1.0, 1.0]
    assert batch.counts.tolist() == [0, 0, 0]
