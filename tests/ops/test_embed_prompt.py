import importlib

import pytest
import torch
from backends import BACKENDS, DEVICE
from poison import poisoned_buffers

from softprompt.ops.embed_prompt import embed_prompt

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = [1, 3, 64, 1000]
VOCAB = 11
IDS = [[3, VOCAB, 0, 10], [-1, 7, 2**31 - 1, 5]]  # three of them are outside the vocabulary
TOKEN_INDEX = [-1, 99, -1, 0, 1, 2, 3, 4, 5, 6, 7, 7, -1, -1]  # the first three are not read


def expected_rows(table, ids, token_index, prompts):
    """The definition, one row at a time."""
    flat = [number for line in ids for number in line]
    rows = [row.to(table.dtype) for row in prompts]
    for index in token_index[len(rows) :]:
        known = index >= 0 and 0 <= flat[index] < table.shape[0]
        rows.append(table[flat[index]] if known else torch.zeros_like(table[0]))
    return torch.stack(rows)[None]


def make_inputs(width, dtype, prompt_dtype=torch.float32, *, integers=torch.int64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCAB, width, generator=generator).to(dtype).to(DEVICE)
    # Eighths are exact in every dtype, so results can be compared bit by bit.
    prompts = (torch.randint(-64, 64, (3, width), generator=generator) / 8).to(prompt_dtype).to(DEVICE)
    ids = torch.tensor(IDS, dtype=integers, device=DEVICE)
    token_index = torch.tensor(TOKEN_INDEX, dtype=integers, device=DEVICE)
    return table, ids, token_index, prompts


def embed(*arguments, backend):
    with poisoned_buffers():
        return embed_prompt(*arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_prompts_then_embeddings_then_zeros(width, dtype, integers, backend):
    table, ids, token_index, prompts = make_inputs(width, dtype, integers=integers)
    out = embed(table, ids, token_index, prompts, backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, expected_rows(table, IDS, TOKEN_INDEX, prompts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompt_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_of_any_dtype_are_cast_to_that_of_the_table(dtype, prompt_dtype, backend):
    table, ids, token_index, prompts = make_inputs(5, dtype, prompt_dtype)
    out = embed(table, ids, token_index, prompts, backend=backend)
    assert torch.equal(out, expected_rows(table, IDS, TOKEN_INDEX, prompts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cast_errs_at_most_twice_as_much_as_that_of_pytorch(dtype, backend):
    table, ids, token_index, _ = make_inputs(64, dtype)
    prompts = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out = embed(table, ids, token_index, prompts, backend=backend)[0, :3]
    error = (out.float() - prompts).abs()
    largest_of_pytorch = torch.finfo(dtype).eps / 2 * prompts.abs()  # it rounds to the nearest
    # Triton's interpreter cuts fp32 off to bf16 instead of rounding it; a GPU rounds.
    factor = 1 if backend == "reference" or DEVICE == "cuda" else 2
    assert torch.all(error <= factor * largest_of_pytorch + torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same_rows_as_dense_ones(backend):
    table, ids, token_index, prompts = make_inputs(12, torch.float32)
    table, prompts = table.T.contiguous().T, torch.stack([prompts, prompts], 2)[..., 1]
    ids, token_index = ids.T.contiguous().T, torch.stack([token_index, token_index], 1)[:, 0]
    for tensor in (table, prompts, ids, token_index):
        assert not tensor.is_contiguous()
    out = embed(table, ids, token_index, prompts, backend=backend)
    assert torch.equal(out, expected_rows(table, IDS, TOKEN_INDEX, prompts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_that_is_part_of_a_larger_one_is_not_left(backend):
    table, ids, token_index, prompts = make_inputs(8, torch.float32)
    larger = torch.full((VOCAB + 40, 24), float("nan"), device=DEVICE)
    larger[20 : 20 + VOCAB, 8:16] = table
    out = embed(
        larger[20 : 20 + VOCAB, 8:16], ids.clamp(-15, VOCAB + 15), token_index, prompts, backend=backend
    )
    assert torch.equal(out, expected_rows(table, IDS, TOKEN_INDEX, prompts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_an_empty_batch_has_only_prompts_and_dummies(shape, backend):
    table, _, _, prompts = make_inputs(4, torch.float32)
    ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    out = embed(table, ids, torch.full((5,), -1, device=DEVICE), prompts, backend=backend)
    assert torch.equal(out[0], torch.cat([prompts, torch.zeros(2, 4, device=DEVICE)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_prompts_and_one_without_anything_are_possible(backend):
    table, ids, token_index, prompts = make_inputs(4, torch.float32)
    out = embed(table, ids, token_index[3:], prompts[:0], backend=backend)
    assert torch.equal(out, expected_rows(table, IDS, TOKEN_INDEX[3:], prompts[:0]))
    assert embed(table, ids, token_index[:0], prompts[:0], backend=backend).shape == (1, 0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_prompts_is_that_of_their_rows_in_their_own_dtype(dtype, backend):
    table, ids, token_index, prompts = make_inputs(6, dtype)
    table.requires_grad_(), prompts.requires_grad_()
    out = embed_prompt(table, ids, token_index, prompts, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    out.backward(grad)
    assert prompts.grad.dtype == torch.float32
    assert torch.equal(prompts.grad, grad[0, :3].float())
    assert table.grad is None


def test_the_gradient_does_not_keep_that_of_the_whole_row_in_memory():
    table, ids, token_index, prompts = make_inputs(6, torch.float32)
    prompts.requires_grad_()
    embed_prompt(table, ids, token_index, prompts).sum().backward()
    assert prompts.grad.untyped_storage().nbytes() == 3 * 6 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    table, ids, token_index, prompts = make_inputs(3, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(
        lambda prompts: embed_prompt(table, ids, token_index, prompts, backend=backend),
        prompts.requires_grad_(),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_is_registered_correctly(backend):
    table, ids, token_index, prompts = make_inputs(4, torch.float32)
    arguments = (table, ids, token_index, prompts.requires_grad_(), backend)
    torch.library.opcheck(torch.ops.softprompt.embed_prompt.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph_with_its_gradient(backend):
    table, ids, token_index, prompts = make_inputs(4, torch.float32)

    def run(function):
        leaf = prompts.clone().requires_grad_()
        out = function(table, ids, token_index, leaf)
        (out**2).sum().backward()
        return out, leaf.grad

    def embed(*arguments):
        return embed_prompt(*arguments, backend=backend)

    compiled = run(torch.compile(embed, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, run(embed), strict=True):
        assert torch.equal(actual, expected)


FLOATS, INTEGERS = torch.ones(4, 3), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": FLOATS[0]}, r"table and prompts must be \[V, H\] and \[P, H\], got \[3\] and \[2, 3\]"),
        ({"prompts": FLOATS[None]}, r"must be \[V, H\] and \[P, H\], got \[4, 3\] and \[1, 4, 3\]"),
        ({"prompts": FLOATS[:, :2]}, "prompts must be 3 wide like the table, got 2"),
        ({"token_index": INTEGERS[0, :1]}, r"token_index must be \[T\] with T >= 2 prompt rows, got \[1\]"),
        ({"token_index": INTEGERS}, r"token_index must be \[T\] with T >= 2 prompt rows, got \[2, 5\]"),
        ({"token_index": FLOATS[0]}, "token_index must be integers, got torch.float32"),
        ({"input_ids": INTEGERS.bool()}, "input_ids must be integers, got torch.bool"),
        ({"input_ids": INTEGERS[0]}, r"input_ids must be \[B, L\], got shape \[5\]"),
        ({"table": FLOATS.long()}, "table must be floating point, got torch.int64"),
        ({"prompts": FLOATS[:2].int()}, "prompts must be floating point, got torch.int32"),
        ({"table": FLOATS.to("meta")}, "all tensors must be on one device"),
        ({"backend": "numpy"}, "unknown backend 'numpy'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    fitting = {"table": FLOATS, "input_ids": INTEGERS, "token_index": INTEGERS[0], "prompts": FLOATS[:2]}
    with pytest.raises(ValueError, match=message):
        embed_prompt(**{**fitting, **change})


def test_tiles_divide_common_widths_and_cover_the_others():
    tile_shape = importlib.import_module("softprompt.ops.triton_rows").tile_shape
    shapes = {width: tile_shape(width, 2) for width in (1, 3, 64, 1000, 1024, 2304, 4096)}
    assert shapes == {
        1: (2048, 1),
        3: (512, 4),
        64: (32, 64),
        1000: (2, 1024),
        1024: (2, 1024),
        2304: (8, 256),
        4096: (1, 2048),
    }


@pytest.mark.slow
def test_the_kernel_compiles_for_three_gpu_generations_without_spilling(compile_kernels):
    module = importlib.import_module("softprompt.ops.triton_rows")
    constexprs = {"table_column_stride": 1, "prompts_column_stride": 1, "ROWS": 2, "COLUMNS": 1024}
    types = {
        "table_ptr": "*bf16",
        "ids_ptr": "*i64",
        "token_index_ptr": "*i32",
        "prompts_ptr": "*fp32",
        "out_ptr": "*bf16",
    }
    names = module._embed_prompt.arg_names
    records = compile_kernels(
        [
            {
                "module": module.__name__,
                "kernel": "_embed_prompt",
                "signature": [[n, "constexpr" if n in constexprs else types.get(n, "i32")] for n in names],
                "constexprs": constexprs,
                "divisible": [
                    "table_ptr",
                    "prompts_ptr",
                    "out_ptr",
                    "width",
                    "table_row_stride",
                    "prompts_row_stride",
                ],
                "num_warps": module.NUM_WARPS,
            }
        ]
    )
    assert [record["arch"] for record in records] == [80, 90, 100]
    for record in records:
        assert record["cubin_bytes"] > 0
        assert record["local"] == 0
        assert record["registers"] <= 64  # more would leave too few warps to keep the memory busy
