import itertools

import pytest
import torch
from attention_problem import (
    BACKENDS,
    BATCHES,
    DEVICE,
    HEADS,
    OPTIONS,
    as_double,
    assert_error_of_the_dtype,
    hold,
    layout_of,
    long_batch,
    packed_batch,
    results,
    tensors,
    with_vectors,
)
from marks import slow_unless
from poison import poisoned_buffers

from softprompt.ops.shared_prompt_attention import shared_prompt_attention
from softprompt.ops.shared_prompt_attention.reference import visible


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    return hold(monkeypatch, request.param)


@pytest.fixture(params=["dense", "padded"])
def form(request, monkeypatch):
    hold(monkeypatch, request.param)
    return request.param


def padded_truth(inputs, mask, packed, scale=None, sliding_window=None, alibi_slopes=None):
    """The attention of the padded batch [prompt | text], one packed query at a time."""
    query, key, value = (x.detach() for x in inputs)
    group = query.shape[0] // key.shape[0]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    row_length = packed.batch_shape[1]
    out = torch.zeros(query.shape[0], packed.num_rows, value.shape[2], dtype=query.dtype, device=query.device)

    def attend(row, slot, keys):
        keys = [
            (r, s) for r, s in keys if s <= slot and (sliding_window is None or slot - s < sliding_window)
        ]
        if not keys:
            return
        rows = [r for r, _ in keys]
        for head in range(query.shape[0]):
            scores = key[head // group, rows] @ query[head, row] * scale
            if alibi_slopes is not None:
                positions = packed.position_ids[rows] - packed.position_ids[row]
                scores = scores + alibi_slopes[head] * positions
            out[head, row] = scores.softmax(0) @ value[head // group, rows]

    prompts, first = [], 0
    for length in packed.prompt_lengths:
        prompts.append([(first + i, i) for i in range(length)])
        first += length
        for row, slot in prompts[-1]:
            attend(row, slot, prompts[-1])
    texts = {}
    for row in range(first, first + packed.num_tokens):
        batch_row, column = divmod(int(packed.token_index[row]), row_length)
        texts.setdefault(batch_row, []).append((row, column))
    for batch_row, tokens in texts.items():
        prompt = prompts[int(packed.prompt_of_row[batch_row])]
        real = [(row, column) for row, column in tokens if mask[batch_row, column]]
        own = [(row, len(prompt) + column) for row, column in real]
        for row, column in tokens:
            attend(row, len(prompt) + column, prompt + own)
    for row in range(first + packed.num_tokens, packed.num_rows):
        attend(row, 0, [(row, 0)])
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 2}, {"scale": 0.7, "alibi_slopes": True}],
    ids=["plain", "window", "alibi"],
)
@pytest.mark.parametrize("batch", [name for name in BATCHES if name != "compact"])
def test_the_packed_row_equals_the_padded_batch(backend, batch, options):
    mask, packed = packed_batch(**BATCHES[batch])
    inputs = tensors(packed.attention, HEADS[1])
    options = with_vectors(options, HEADS[1][0])
    out = shared_prompt_attention(*inputs, packed.attention, backend=backend, **options)
    torch.testing.assert_close(out, padded_truth(inputs, mask, packed, **options), rtol=0, atol=1e-12)


def heads_for(batch):
    return HEADS if batch == "ragged prompts" else HEADS[1:2]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch, heads", [(batch, heads) for batch in BATCHES for heads in heads_for(batch)])
def test_sdpa_equals_the_reference(form, batch, options, heads):
    layout = layout_of(batch)
    options = with_vectors(OPTIONS[options], heads[0])
    inputs = tensors(layout, heads)
    truth = results(inputs, layout, options, backend="reference")
    for value, expected in zip(results(inputs, layout, options, backend="sdpa"), truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "batch, options",
    slow_unless(
        {("ragged prompts", "all"), ("left, predictors", "none")},
        itertools.product(["ragged prompts", "left, predictors"], ["none", "alibi", "all"]),
    ),
)
def test_gradients_equal_finite_differences(backend, batch, options):
    layout = layout_of(batch)
    inputs = tensors(layout, (2, 1, 3, 2))
    options = with_vectors(OPTIONS[options], 2)
    sinks = options.pop("sinks", None)

    def attend(query, key, value, sinks=None):
        return shared_prompt_attention(query, key, value, layout, backend=backend, sinks=sinks, **options)

    arguments = (*inputs, sinks) if sinks is not None else tuple(inputs)
    # One direction for all entries at once, where one entry after the other would take half a minute.
    fast = batch == "ragged prompts" or backend == "triton"
    assert torch.autograd.gradcheck(attend, arguments, fast_mode=fast)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The truth of "window 1" has no gradient.
ROUNDED = [(options, dtype) for options in OPTIONS if options != "window 1" for dtype in DTYPES]


@pytest.mark.parametrize(
    "options, dtype",
    slow_unless(lambda case: case[0] == "all" or case == ("none", torch.bfloat16), ROUNDED),
    ids=str,
)
def test_the_error_is_at_most_twice_that_of_plain_pytorch_in_the_same_dtype(backend, options, dtype):
    layout = long_batch(num_texts=20, longest=12, prompts=[10])
    assert_error_of_the_dtype(layout, (4, 2, 16, 12), OPTIONS[options], dtype, backend)


@pytest.mark.parametrize("prompts", [[4], [4, 3]], ids=str)
def test_the_gradient_of_a_prompt_in_half_precision_is_summed_in_fp32(form, prompts):
    layout = long_batch(num_texts=400, longest=5, prompts=prompts)
    inputs = tensors(layout, dtype=torch.bfloat16)
    wide_inputs, _ = as_double(inputs, {})
    grad = torch.ones(4, layout.num_rows, 8)
    truth = results(wide_inputs, layout, {}, grad, backend="reference")
    ours = results(inputs, layout, {}, grad, backend="sdpa")
    prompt = slice(0, layout.prompt_tokens)
    # A GPU rounds the share of each text, and the shares of keys cancel.
    for index in (2, 3) if DEVICE == "cpu" else (3,):
        value, expected = ours[index][:, prompt].double(), truth[index][:, prompt]
        torch.testing.assert_close(value, expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    "batch, options",
    slow_unless(
        {("right, dummies", "all"), ("ragged prompts", "none"), ("empty texts", "all")},
        itertools.product(["right, dummies", "ragged prompts", "empty texts"], ["none", "all"]),
    ),
)
def test_what_dummies_hold_touches_no_other_row(backend, batch, options):
    layout = layout_of(batch)
    live = layout.num_live
    assert live < layout.num_rows
    options = with_vectors(OPTIONS[options], 4)
    inputs = tensors(layout, HEADS[1])
    grad = torch.randn(4, layout.num_rows, HEADS[1][3], dtype=torch.float64)
    clean = results(inputs, layout, options, grad, backend=backend)
    assert all(torch.all(x[:, live:] == 0) for x in clean[1:3])
    for x in (*inputs, grad):
        x.detach()[:, live:] = torch.nan
    with poisoned_buffers():
        dirty = results(inputs, layout, options, grad, backend=backend)
    for value, expected in zip(dirty[:4], clean[:4], strict=True):
        torch.testing.assert_close(value[:, :live], expected[:, :live], rtol=0, atol=1e-13)
    if "sinks" in options:
        torch.testing.assert_close(dirty[4], clean[4], rtol=0, atol=1e-12)
    assert dirty[0][:, live:].isnan().all()


def test_dummies_get_their_own_value(backend):
    layout = layout_of("right, dummies")
    inputs = tensors(layout, HEADS[1])
    out, _, _, grad_value = results(inputs, layout, {}, torch.ones(4, layout.num_rows, 6), backend=backend)
    live = layout.num_live
    torch.testing.assert_close(out[:, live:], inputs[2][:, live:].repeat_interleave(2, 0))
    torch.testing.assert_close(grad_value[:, live:], torch.full_like(grad_value[:, live:], 2.0))


@pytest.mark.parametrize("changed", ["key", "value"])
def test_a_text_sees_its_prompt_and_no_other_text(backend, changed):
    _, packed = packed_batch(["rrr", "rrr"], [2, 2], prompt_of_row=[0, 1], token_bucket=4)
    layout = packed.attention
    inputs = tensors(layout)
    before = shared_prompt_attention(*inputs, layout, backend=backend)
    position = ("query", "key", "value").index(changed)

    def rows_that_change(row):
        moved = list(inputs)
        moved[position] = moved[position].detach().clone()
        moved[position][:, row] += 1 + torch.rand(4, 8, device=DEVICE, dtype=torch.float64)
        after = shared_prompt_attention(*moved, layout, backend=backend)
        return ((after - before).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()

    # A softmax over one key is 1 whatever the key is, so row 0 follows its value alone.
    assert rows_that_change(0) == ([0, 1, 4, 5, 6] if changed == "value" else [1, 4, 5, 6])
    assert rows_that_change(2) == ([2, 3, 7, 8, 9] if changed == "value" else [3, 7, 8, 9])
    assert rows_that_change(4) == [4, 5, 6]
    assert rows_that_change(9) == [9]
    assert rows_that_change(10) == ([10] if changed == "value" else [])


def test_a_predictor_is_a_key_of_no_query(backend):
    layout = layout_of("left, predictors")
    predictors = (layout.key_position == 2**31 - 1).nonzero().flatten()
    assert predictors.numel() > 0
    _, _, grad_key, grad_value = results(tensors(layout), layout, {}, backend=backend)
    assert torch.all(grad_key[:, predictors] == 0)
    assert torch.all(grad_value[:, predictors] == 0)


def test_a_row_that_sees_no_key_gives_zeros_and_no_gradient(backend):
    _, packed = packed_batch(["....rr"], [2], labelled=True)
    layout = packed.attention
    blind = ~visible(layout, 2).any(1)
    assert blind.tolist() == [False, False, False, True, True, True, False, False]
    inputs = tensors(layout)
    for options in ({}, {"sinks": torch.zeros(4, device=DEVICE, dtype=torch.float64, requires_grad=True)}):
        values = results(inputs, layout, {"sliding_window": 2, **options}, backend=backend)
        assert torch.all(values[0][:, blind] == 0)
        assert torch.all(values[1][:, blind] == 0)
        assert all(x.isfinite().all() for x in values)


def test_visible_is_the_rule_of_the_layout():
    _, packed = packed_batch(["r.", ".r"], [2], labelled=True, token_bucket=8)
    expected = [
        "x.......",
        "xx......",
        "xxx.....",
        "xx......",  # a predictor: the prompt, not itself
        "xx..x...",
        ".....x..",
        "......x.",
        ".......x",
    ]
    assert packed.num_tokens == 3
    seen = visible(packed.attention, None)
    assert ["".join(".x"[int(x)] for x in row) for row in seen] == expected
    windowed = visible(packed.attention, 2)
    assert ["".join(".x"[int(x)] for x in row) for row in windowed[:5]] == [
        "x.......",
        "xx......",
        ".xx.....",
        ".x......",
        "....x...",
    ]


@pytest.mark.parametrize("view", slow_unless(["strided"], ["fused", "heads first", "strided"]))
def test_tensors_may_have_any_strides(backend, view):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout)
    expected = results(inputs, layout, {}, backend=backend)
    if view == "fused":
        fused = torch.stack([x.detach().transpose(0, 1) for x in inputs], 2)
        moved = [x.requires_grad_() for x in fused.permute(2, 1, 0, 3)]
    elif view == "heads first":
        moved = [x.detach().contiguous().requires_grad_() for x in inputs]
    else:
        moved = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    for value, wanted in zip(results(moved, layout, {}, backend=backend), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "name, view",
    slow_unless(
        {("alibi_slopes", "every second"), ("sinks", "expanded")},
        itertools.product(["alibi_slopes", "sinks"], ["every second", "expanded"]),
    ),
)
def test_vectors_may_have_any_stride(backend, name, view):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout, HEADS[1])
    values = torch.rand(8, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(DEVICE)
    vector = values[::2] if view == "every second" else values[:1].expand(4)
    wanted = name == "sinks"
    options, copied = (
        {name: x.detach().requires_grad_(wanted)} for x in (vector, vector.clone().contiguous())
    )
    assert options[name].stride() != copied[name].stride()
    expected = results(inputs, layout, copied, backend="reference")
    for got, right in zip(results(inputs, layout, options, backend=backend), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**63 - 1])
def test_a_window_wider_than_every_row_hides_nothing(backend, window):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout)
    expected = results(inputs, layout, {}, backend="reference")
    got = results(inputs, layout, {"sliding_window": window}, backend=backend)
    for value, right in zip(got, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-12)


def test_a_gradient_without_strides_is_accepted(backend):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout)
    expected = results(inputs, layout, {}, torch.ones(4, layout.num_rows, 8), backend=backend)
    shared_prompt_attention(*inputs, layout, backend=backend).sum().backward()
    for tensor, wanted in zip(inputs, expected[1:], strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"sinks": True}], ids=["plain", "sinks"])
def test_dropout_keeps_the_expectation_and_follows_the_seed(form, options):
    layout = layout_of("left, predictors")
    inputs = tensors(layout, dtype=torch.float32)
    options = with_vectors(options, 4, torch.float32)
    expected = shared_prompt_attention(*inputs, layout, backend="sdpa", **options)

    def draw(seed):
        torch.manual_seed(seed)
        return shared_prompt_attention(*inputs, layout, backend="sdpa", dropout_p=0.3, **options)

    torch.testing.assert_close(draw(0), draw(0), rtol=0, atol=0)
    draws = torch.stack([draw(seed) for seed in range(300)])
    assert (draws[0] - expected).abs().max() > 0.1
    standard_error = draws.std(0) / 300**0.5
    assert ((draws.mean(0) - expected).abs() <= 6 * standard_error + 1e-5).all()
    gradients = torch.autograd.grad(draw(0).sum(), inputs)
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in gradients)


def vector(size, **options):
    return torch.zeros(size, device=DEVICE, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": lambda q, k, v: q[0]}, r"query must be \[Hq, T, D\]"),
        ({"key": lambda q, k, v: k[:, :-1]}, r"key must be .* T = 16, got \[2, 15, 8\]"),
        (
            {"value": lambda q, k, v: v.float()},
            "must have one dtype of .*, got torch.float64, torch.float64 and",
        ),
        (
            {"query": lambda q, k, v: q.long()},
            "must have one dtype of fp16, bf16, fp32 and fp64, got torch.int64",
        ),
        ({"key": lambda q, k, v: k[..., :-1]}, "key must be 8 wide like query, got 7"),
        ({"value": lambda q, k, v: v[:1]}, "value must have 2 heads like key, got 1"),
        ({"query": lambda q, k, v: q[:3]}, "must divide the 3 query heads, got 2"),
        ({"key": lambda q, k, v: k.to("meta")}, "all tensors must be on one device, got .*key on meta"),
        ({"alibi_slopes": vector(3)}, r"alibi_slopes must be \[Hq\] = \[4\], got \[3\]"),
        (
            {"alibi_slopes": vector(4, dtype=torch.int64)},
            "alibi_slopes must be floating point, got torch.int64",
        ),
        ({"alibi_slopes": vector(4, requires_grad=True)}, "alibi_slopes get no gradient"),
        ({"sinks": vector((4, 1))}, r"sinks must be \[Hq\] = \[4\], got \[4, 1\]"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"sliding_window": 0}, "sliding_window must be at least 1 slot, got 0"),
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
        ({"dropout_p": 0.1, "backend": "reference"}, "'reference' takes no dropout, got dropout_p = 0.1"),
        ({"backend": "fast"}, "unknown backend 'fast', expected one of auto, reference, sdpa, triton"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(change, message):
    layout = layout_of("right, dummies")
    inputs = dict(zip(("query", "key", "value"), tensors(layout, HEADS[1]), strict=True))
    values = tuple(inputs.values())
    options = {name: x(*values) if callable(x) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        shared_prompt_attention(**{**inputs, "layout": layout, **options})
