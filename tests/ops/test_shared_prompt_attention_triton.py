"""The Triton kernels beyond what all back ends are asked: blocks, unknown lengths, precision, resources."""

import importlib

import pytest
import torch
from attention_problem import (
    BATCHES,
    DEVICE,
    HEADS,
    OPTIONS,
    assert_error_of_the_dtype,
    layout_of,
    long_batch,
    packed_batch,
    results,
    tensors,
    with_vectors,
)
from marks import slow_unless
from poison import poisoned_buffers

from benchmarks.attention_kernels import ARCHITECTURES, KERNELS, attention_case
from softprompt.ops.registry import triton_availability
from softprompt.ops.shared_prompt_attention import AttentionLayout, configs, shared_prompt_attention
from softprompt.ops.shared_prompt_attention.configs import (
    KINDS,
    LaunchConfig,
    architecture,
    launch_config,
    launch_configs,
    launched_with,
    padded_dim,
)
from softprompt.ops.shared_prompt_attention.layout import AttentionOptions

PACKAGE = "softprompt.ops.shared_prompt_attention"
triton_api = importlib.import_module(f"{PACKAGE}.api")
BLOCKS = [(16, 16), (16, 32), (32, 16), (64, 16)]


def blocks(queries, keys):
    return launched_with(**dict.fromkeys(KINDS, LaunchConfig(queries, keys, 4, 1)))


def unknown(layout):
    """The same layout for a host that does not know what its tensors hold."""
    fields = {name: getattr(layout, name) for name in AttentionLayout.__dataclass_fields__ if name != "plans"}
    return AttentionLayout(**(fields | {"num_tokens": None, "longest_text": None}))


def gradient_like(layout, heads, width, dtype=torch.float64):
    """A gradient of the output that is zero at dummies, which no model reads."""
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(layout.num_rows, heads, width, generator=generator, dtype=torch.float64)
    grad[layout.num_live :] = 0
    return grad.to(DEVICE, dtype).transpose(0, 1)


def assert_equal(got, expected, bound=1e-11):
    for value, wanted in zip(got, expected, strict=True):
        assert value.shape == wanted.shape
        assert (value.double() - wanted.double()).abs().max() <= bound


CROSSING = [(size, options) for size in BLOCKS for options in ("none", "window 3", "alibi", "all")]


@pytest.mark.parametrize(
    "size, options",
    slow_unless(
        {((16, 16), "all"), ((16, 32), "none"), ((32, 16), "window 3"), ((64, 16), "alibi")}, CROSSING
    ),
    ids=str,
)
def test_texts_that_cross_many_blocks_are_exact(size, options):
    layout = long_batch(4, 70, [20, 33])
    inputs = tensors(layout, (2, 1, 8, 6))
    options = with_vectors(OPTIONS[options], 2)
    grad = gradient_like(layout, 2, 6)
    expected = results(inputs, layout, options, grad, backend="reference")
    with blocks(*size):
        assert_equal(results(inputs, layout, options, grad, backend="triton"), expected)


@pytest.mark.parametrize(
    "options, batch",
    slow_unless(
        lambda case: case[0] == "window 3" or case[1] == "ragged prompts",
        [(options, batch) for options in ("none", "window 3", "softcap") for batch in BATCHES],
    ),
)
def test_a_host_that_knows_no_lengths_gets_the_same(batch, options):
    layout = layout_of(batch)
    inputs = tensors(layout, HEADS[1])
    options = with_vectors(OPTIONS[options], HEADS[1][0])
    grad = gradient_like(layout, HEADS[1][0], HEADS[1][3])
    expected = results(inputs, layout, options, grad, backend="reference")
    with blocks(16, 16):
        for backend in ("triton", "sdpa"):
            got = results(inputs, unknown(layout), options, grad, backend=backend)
            got[0], wanted = got[0][:, : layout.num_live], expected[0][:, : layout.num_live]
            assert_equal(got, [wanted, *expected[1:]])


def test_more_dummies_change_nothing():
    inputs = tensors(layout_of("right, dummies"))
    first = None
    for bucket in (1, 16, 64):
        layout = packed_batch(**(BATCHES["right, dummies"] | {"token_bucket": bucket}))[1].attention
        rows = [
            torch.cat(
                [x[:, : layout.num_live], x.new_full((x.shape[0], layout.num_rows, x.shape[2]), 7.0)], 1
            )[:, : layout.num_rows]
            .detach()
            .requires_grad_()
            for x in inputs
        ]
        got = results(rows, layout, {}, gradient_like(layout, 4, 8), backend="triton")
        got = [value[:, : layout.num_live] for value in got]
        if first is not None:
            assert_equal(got, first, 1e-13)
        first = got


@pytest.mark.parametrize(
    "size, options", slow_unless({((32, 16), "all")}, [(size, o) for size in BLOCKS for o in ("none", "all")])
)
def test_a_dummy_sees_itself_and_no_other_row_sees_it(size, options):
    # Dummies share a block with the last text, and fill blocks of their own.
    layout = packed_batch(**(BATCHES["right, dummies"] | {"token_bucket": 64}))[1].attention
    heads = (2, 1, 8, 6)
    options, grad = with_vectors(OPTIONS[options], heads[0]), gradient_like(layout, heads[0], heads[3])
    dummies = slice(layout.num_live, None)
    inputs = tensors(layout, heads)
    expected = results(inputs, layout, options, grad, backend="reference")
    # Zero times infinity or NaN is NaN: nothing of a dummy may be multiplied into another row.
    for rows, held in zip([*inputs, grad], (torch.nan, torch.nan, torch.inf, torch.inf), strict=True):
        rows.detach()[:, dummies] = held
    with blocks(*size):
        got = results(inputs, layout, options, grad, backend="triton")
    for rows, wanted, of_dummy in zip(got[:4], expected, (torch.inf, 0, 0, torch.inf), strict=False):
        assert (rows[:, dummies] == of_dummy).all()
        assert_equal([rows[:, : layout.num_live]], [wanted[:, : layout.num_live]])
    assert_equal(got[4:], expected[4:])


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [[1], [17, 3, 40], [64, 64]], ids=str)
def test_the_sums_over_texts_are_split_and_stay_the_same_bits(prompts, monkeypatch):
    module = importlib.import_module(f"{PACKAGE}.triton")
    layout = long_batch(9, 30, prompts)
    inputs = tensors(layout, (2, 2, 8, 8))
    grad = gradient_like(layout, 2, 8)
    expected = results(inputs, layout, {}, grad, backend="reference")
    for rows in (32, 512):
        monkeypatch.setattr(module, "_FEWEST_SPLIT_ROWS", rows)
        with blocks(16, 16):
            once, again = (results(inputs, layout, {}, grad, backend="triton") for _ in range(2))
        assert_equal(once, expected)
        for left, right in zip(once, again, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize(
    "text_rows, programs, expected",
    [
        (312, 16, (5, 64)),  # 8 short texts on a prompt of 8, 16 key heads
        (5020, 16, (16, 320)),  # 32 texts on a prompt of 100, 8 key heads
        (59372, 8, (32, 1856)),  # as many splits as there may be
        (59372, 40, (6, 9920)),
        (5020, 132, (2, 2528)),
        (5020, 133, (1, 5024)),
        (5020, 5024, (1, 5024)),
        (9, 0, (1, 64)),
        (0, 64, (0, 64)),
    ],
)
def test_the_sums_over_texts_are_split_to_fill_a_gpu_once(text_rows, programs, expected):
    assert importlib.import_module(f"{PACKAGE}.triton").splits_of(text_rows, programs, 32) == expected


def test_splits_hold_every_text_row_and_are_neither_short_nor_too_many():
    splits_of = importlib.import_module(f"{PACKAGE}.triton").splits_of
    for text_rows in (1, 63, 64, 65, 500, 4097, 70_000):
        for programs in (1, 2, 5, 16, 88, 131, 200, 9000):
            for queries in (16, 32, 64, 128):
                splits, rows = splits_of(text_rows, programs, queries)
                assert (splits - 1) * rows < text_rows <= splits * rows
                assert rows >= 64
                assert rows % queries == 0
                assert splits == 1 or splits * programs <= 264
                if text_rows == 70_000 and programs >= 5:
                    assert splits * programs >= 132


@pytest.mark.parametrize("kind", KERNELS)
def test_other_sizes_of_a_batch_do_not_compile_a_kernel_anew(kind):
    module, name = KERNELS[kind]
    kernel = getattr(importlib.import_module(module), name)
    fixed = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize
    sizes = {"num_rows", "prompt_rows", "num_prompts", "num_texts", "splits"}
    assert sizes & set(kernel.arg_names) <= set(fixed)


@pytest.mark.parametrize(
    "heads",
    [(2, 1, 32, 32), (2, 1, 80, 80), (1, 1, 96, 96), (2, 1, 128, 64), (1, 1, 192, 128), (1, 1, 256, 256)],
)
def test_head_dims_of_real_models(heads):
    layout = long_batch(3, 20, [9])
    inputs = tensors(layout, heads)
    grad = gradient_like(layout, heads[0], heads[3])
    expected = results(inputs, layout, {}, grad, backend="reference")
    assert_equal(results(inputs, layout, {}, grad, backend="triton"), expected, 1e-10)


@pytest.mark.parametrize("batch", ["right, dummies", "ragged prompts", "empty texts", "no rows"])
def test_every_entry_of_every_buffer_is_written(batch):
    layout = layout_of(batch)
    inputs = tensors(layout)
    with poisoned_buffers():
        values = results(inputs, layout, {}, gradient_like(layout, 4, 8), backend="triton")
    for value in values:
        assert value.isfinite().all()


NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_HEADS = [(16, 16, 64, 64), (8, 2, 128, 128), (4, 4, 80, 80), (2, 1, 256, 256), (4, 4, 192, 128)]
# Each compiles four kernels, for seconds: every pair is met, not every combination.
NATIVE = [
    *((dtype, heads, "none") for dtype in NATIVE_DTYPES for heads in NATIVE_HEADS),
    *((torch.bfloat16, heads, "all") for heads in NATIVE_HEADS),
    *(
        (dtype, NATIVE_HEADS[0], options)
        for dtype in NATIVE_DTYPES
        for options in ("window 99", "softcap", "alibi", "sinks", "all")
        if (dtype, options) != (torch.bfloat16, "all")
    ),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, heads, options", NATIVE, ids=str)
def test_the_native_kernels_have_the_error_of_the_dtype(dtype, heads, options):
    assert_error_of_the_dtype(long_batch(8, 300, [100, 8]), heads, OPTIONS[options], dtype, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_texts_on_a_device(dtype):
    assert_error_of_the_dtype(long_batch(4, 2048, [20]), (8, 2, 64, 64), {}, dtype, "triton")


@pytest.mark.gpu
def test_a_device_takes_the_kernels_by_itself():
    layout = long_batch(4, 40, [8])
    inputs = [x.detach().bfloat16().requires_grad_() for x in tensors(layout, (4, 4, 64, 64))]
    grad = gradient_like(layout, 4, 64, torch.bfloat16)
    for left, right in zip(
        results(inputs, layout, {}, grad, backend="auto"),
        results(inputs, layout, {}, grad, backend="triton"),
        strict=True,
    ):
        assert torch.equal(left, right)


def test_what_the_kernels_do_not_serve_goes_elsewhere_or_is_named(monkeypatch):
    layout = layout_of("one token")
    wide = tensors(layout, (1, 1, 257, 8))
    with pytest.raises(ValueError, match="heads are at most 256 wide, got 257"):
        shared_prompt_attention(*wide, layout, backend="triton")
    monkeypatch.setattr(triton_api, "triton_availability", lambda device: triton_availability("meta"))
    with pytest.raises(ValueError, match="'triton' cannot be used: Triton needs CUDA tensors"):
        shared_prompt_attention(*tensors(layout), layout, backend="triton")


def test_a_configuration_holds_for_the_block_and_no_longer():
    before = launch_config("forward", 64, 2, 0)
    other = LaunchConfig(16, 16, 4, 1)
    with launched_with(forward=other):
        assert launch_config("forward", 64, 2, 0) == other
        assert launch_config("query", 64, 2, 0) != other
    assert launch_config("forward", 64, 2, 0) == before
    with (
        pytest.raises(ValueError, match="expected kinds of forward, query, key, prompt, got backward"),
        blocks(16, 16),
        launched_with(backward=other),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_dim, itemsize", [(64, 2), (80, 2), (128, 4), (256, 2)])
def test_a_sweep_begins_with_the_tables_choice(kind, head_dim, itemsize, arch):
    candidates = launch_configs(kind, head_dim, itemsize, arch)
    assert candidates[0] == launch_config(kind, head_dim, itemsize, arch)
    assert len(set(candidates)) == len(candidates) > 4
    assert [padded_dim(width) for width in (1, 16, 17, 80, 256)] == [16, 16, 32, 128, 256]


@pytest.mark.slow(seconds=100)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_kernels_compile_for_three_gpu_generations_without_spilling(head_dim, compile_kernels):
    kinds = [(kind, arch) for kind in KERNELS for arch in ARCHITECTURES]
    cases = [attention_case(kind, head_dim, "bf16", arch) for kind, arch in kinds]
    for (kind, arch), case, record in zip(kinds, cases, compile_kernels(cases), strict=True):
        assert record["cubin_bytes"] > 0
        if head_dim <= 128:
            assert (record["label"], record["local"], record["stack"]) == (record["label"], 0, 0)
        assert record["shared"] <= 99 * 1024  # what every GPU since sm_80 has for a block
        # A product gives each warp 16 rows at least: more warps than that compute the same rows again, as in
        # the one configuration that would spill with fewer.
        rows = case["constexprs"]["QUERIES" if kind in ("forward", "query") else "KEYS"]
        if (kind, head_dim, arch) != ("forward", 256, 90):
            assert (record["label"], record["row_warps"] * 16 <= rows) == (record["label"], True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_without_configurations_of_its_own_has_the_common_ones(kind):
    for head_dim, itemsize in ((64, 2), (128, 2), (256, 2), (128, 4)):
        common = launch_config(kind, head_dim, itemsize, 0)
        assert launch_config(kind, head_dim, itemsize, 120) == common
        assert launch_config(kind, head_dim, itemsize, 89) == launch_config(kind, head_dim, itemsize, 80)
        assert (launch_config(kind, head_dim, itemsize, 90) != common) == ((head_dim, itemsize) == (128, 2))
    assert architecture(torch.device("cpu")) == 0


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_the_newer_precision_setting_is_followed(setting):
    module = importlib.import_module(f"{PACKAGE}.triton")
    config, before = launch_config("forward", 64, 4, 0), torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        for dtype, expected in ((torch.float32, setting), (torch.bfloat16, "ieee")):
            heads = torch.empty(1, 1, 64, dtype=dtype)
            launch = module._Launch(heads, heads, heads, layout_of("right"), AttentionOptions(1.0))
            assert launch.options(config)["PRECISION"] == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_override_is_empty_outside_of_tests():
    assert configs._OVERRIDE == {}
