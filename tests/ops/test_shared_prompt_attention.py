import importlib

import pytest
import torch
from poison import poisoned_buffers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt.layout import build_layout
from softprompt.ops.shared_prompt_attention import AttentionLayout, shared_prompt_attention
from softprompt.ops.shared_prompt_attention.reference import visible

sdpa = importlib.import_module("softprompt.ops.shared_prompt_attention.sdpa")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "dense", "padded"]
HEADS = [(4, 4, 8, 8), (4, 2, 8, 6), (3, 1, 6, 8)]  # Hq, Hkv, D, Dv
OPTIONS = {
    "none": {},
    "scale": {"scale": 0.9},
    "window 1": {"sliding_window": 1},
    "window 3": {"sliding_window": 3},
    "window 99": {"sliding_window": 99},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": True},
    "sinks": {"sinks": True},
    "all": {"scale": 1.1, "sliding_window": 3, "softcap": 2.0, "alibi_slopes": True, "sinks": True},
}
# Rows of each batch: r a real token, . a pad.
RIGHT, LEFT, HOLED = (
    ["rrrrr", "r....", ".....", "rrr.."],
    ["rrrrr", "....r", "..rrr"],
    ["r.rr.", ".r..r", "rr.rr"],
)
BATCHES = {
    "right": {"rows": RIGHT, "prompts": [3]},
    "right, dummies": {"rows": RIGHT, "prompts": [3], "token_bucket": 16},
    "left, predictors": {"rows": LEFT, "prompts": [4], "labelled": True},
    "holed, predictors, mask positions": {
        "rows": HOLED,
        "prompts": [2],
        "labelled": True,
        "positions": "mask",
        "token_bucket": 8,
    },
    "compact": {"rows": HOLED, "prompts": [2], "labelled": True, "positions": "compact"},
    "ragged prompts": {
        "rows": RIGHT + LEFT,
        "prompts": [2, 5, 1],
        "prompt_of_row": [2, 0, 1, 0, 1, 1, 2],
        "labelled": True,
        "token_bucket": 16,
    },
    "equal prompts, one unused": {"rows": RIGHT, "prompts": [3, 3, 3], "prompt_of_row": [2, 0, 0, 2]},
    "one token": {"rows": ["..r"], "prompts": [1]},
    "empty texts": {"rows": ["...", "..."], "prompts": [2, 3], "prompt_of_row": [0, 1], "token_bucket": 4},
    "no rows": {"rows": [], "prompts": [4]},
}


def packed_batch(rows, prompts, prompt_of_row=None, labelled=False, **options):
    mask = torch.tensor([[letter == "r" for letter in row] for row in rows], dtype=torch.int64)
    mask = mask.view(len(rows), -1 if rows else 3).to(DEVICE)
    return mask, build_layout(
        mask,
        prompts,
        labels=torch.ones_like(mask) if labelled else None,
        prompt_of_row=None if prompt_of_row is None else torch.tensor(prompt_of_row, device=DEVICE),
        **options,
    )


def layout_of(name):
    return packed_batch(**BATCHES[name])[1].attention


def long_batch(num_texts=24, longest=40, prompt=20, seed=0):
    lengths = torch.randint(1, longest + 1, (num_texts, 1), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(longest) < lengths).long().to(DEVICE)
    return build_layout(mask, [prompt]).attention


def tensors(layout, heads=HEADS[0], dtype=torch.float64, seed=0):
    """query, key and value, in the layout in which models produce them."""
    generator = torch.Generator().manual_seed(seed)
    num_query, num_key, width, value_width = heads
    return [
        torch.randn(layout.num_rows, count, size, generator=generator, dtype=torch.float64)
        .to(DEVICE, dtype)
        .transpose(0, 1)
        .requires_grad_()
        for count, size in ((num_query, width), (num_key, width), (num_key, value_width))
    ]


def with_vectors(options, num_heads, dtype=torch.float64):
    """The options with ALiBi slopes and sinks filled in."""
    generator = torch.Generator().manual_seed(7)
    filled = dict(options)
    for name in ("alibi_slopes", "sinks"):
        if filled.get(name) is True:
            vector = torch.rand(num_heads, generator=generator, dtype=torch.float64)
            filled[name] = vector.to(DEVICE, dtype).requires_grad_(name == "sinks")
    return filled


def results(inputs, layout, options, grad=None, **more):
    """Output and gradients of all inputs, sinks included."""
    out = shared_prompt_attention(*inputs, layout, **options, **more)
    if grad is None:
        shape = (out.shape[1], out.shape[0], out.shape[2])
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).transpose(
            0, 1
        )
    wanted = [*inputs, *([options["sinks"]] if options.get("sinks") is not None else [])]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.device, out.dtype))]


def as_double(inputs, options):
    def double(value):
        if isinstance(value, torch.Tensor):
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return [double(x) for x in inputs], {name: double(value) for name, value in options.items()}


def errors(values, truth):
    """Relative errors in the 2-norm."""
    return [
        ((a.double() - b).norm() / b.norm().clamp_min(1e-3)).item()
        for a, b in zip(values, truth, strict=True)
    ]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The reference, and "sdpa" held to each of its two forms."""
    if request.param == "reference":
        return "reference"
    dense = request.param == "dense"
    monkeypatch.setattr(sdpa, "_dense_is_cheaper", lambda layout, width: dense and layout.num_tokens > 0)
    return "sdpa"


@pytest.fixture(params=["dense", "padded"])
def form(request, monkeypatch):
    dense = request.param == "dense"
    monkeypatch.setattr(sdpa, "_dense_is_cheaper", lambda layout, width: dense and layout.num_tokens > 0)
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


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch", BATCHES)
def test_sdpa_equals_the_reference(form, batch, options, heads):
    layout = layout_of(batch)
    options = with_vectors(options, heads[0])
    inputs = tensors(layout, heads)
    truth = results(inputs, layout, options, backend="reference")
    for value, expected in zip(results(inputs, layout, options, backend="sdpa"), truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", ["none", "alibi", "all"])
@pytest.mark.parametrize("batch", ["ragged prompts", "left, predictors"])
def test_gradients_equal_finite_differences(backend, batch, options):
    layout = layout_of(batch)
    inputs = tensors(layout, (2, 1, 3, 2))
    options = with_vectors(OPTIONS[options], 2)
    sinks = options.pop("sinks", None)

    def attend(query, key, value, sinks=None):
        return shared_prompt_attention(query, key, value, layout, backend=backend, sinks=sinks, **options)

    arguments = (*inputs, sinks) if sinks is not None else tuple(inputs)
    assert torch.autograd.gradcheck(attend, arguments, fast_mode=batch == "ragged prompts")


def plain_pytorch(
    inputs, layout, scale=None, sliding_window=None, softcap=None, alibi_slopes=None, sinks=None
):
    """Dense attention in the dtype of the inputs, written as a model would."""
    query, key, value = inputs
    group = query.shape[0] // key.shape[0]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    scores = query @ key.repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes[:, None, None] * (layout.position_ids - layout.position_ids[:, None])
    scores = scores.float().masked_fill(~visible(layout, sliding_window), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], 2)
    probabilities = scores.softmax(2)[:, :, : layout.num_rows].to(query.dtype)
    return probabilities @ value.repeat_interleave(group, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "window 1"])  # truth: no gradient
def test_the_error_is_at_most_twice_that_of_plain_pytorch_in_the_same_dtype(backend, options, dtype):
    layout = long_batch()
    heads = (4, 2, 16, 12)
    inputs = tensors(layout, heads, dtype)
    options = with_vectors(OPTIONS[options], heads[0], dtype)
    grad = torch.randn(layout.num_rows, heads[0], heads[3], generator=torch.Generator().manual_seed(3))
    grad = grad.to(DEVICE, dtype).transpose(0, 1)
    wide_inputs, wide_options = as_double(inputs, options)
    truth = results(wide_inputs, layout, wide_options, grad.double(), backend="reference")

    plain = plain_pytorch(inputs, layout, **options)
    wanted = [*inputs, *([options["sinks"]] if "sinks" in options else [])]
    plain = [plain.detach(), *torch.autograd.grad(plain, wanted, grad)]
    ours = results(inputs, layout, options, grad, backend=backend)
    assert [x.dtype for x in ours] == [dtype] * len(ours)
    for error, limit in zip(errors(ours, truth), errors(plain, truth), strict=True):
        assert error <= 2 * limit + 4 * torch.finfo(torch.float32).eps


def test_the_gradient_of_a_prompt_in_half_precision_is_summed_in_fp32(form):
    layout = long_batch(num_texts=200, longest=5, prompt=4)
    inputs = tensors(layout, dtype=torch.bfloat16)
    wide_inputs, _ = as_double(inputs, {})
    grad = torch.ones(4, layout.num_rows, 8)  # all shares of one sign: a sum in bf16 would stop growing
    truth = results(wide_inputs, layout, {}, grad, backend="reference")
    ours = results(inputs, layout, {}, grad, backend="sdpa")
    prompt = slice(0, layout.prompt_tokens)
    assert truth[3][:, prompt].abs().max() > 100
    torch.testing.assert_close(ours[3][:, prompt].double(), truth[3][:, prompt], rtol=0.006, atol=0.1)


@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("batch", ["right, dummies", "ragged prompts", "empty texts"])
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
    predictors = (layout.key_slots == 2**31 - 1).nonzero().flatten()
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


@pytest.mark.parametrize("view", ["fused", "heads first", "strided"])
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


def test_a_gradient_without_strides_is_accepted(backend):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout)
    expected = results(inputs, layout, {}, torch.ones(4, layout.num_rows, 8), backend=backend)
    shared_prompt_attention(*inputs, layout, backend=backend).sum().backward()
    for tensor, wanted in zip(inputs, expected[1:], strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=0, atol=1e-13)


def test_layers_share_what_is_prepared_for_the_step(form):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout)
    slopes = torch.rand(4, device=DEVICE)

    def layers():
        for options in ({}, {"alibi_slopes": slopes}, {"sliding_window": 2}):
            shared_prompt_attention(*inputs, layout, backend="sdpa", **options)
        return dict(layout.plans)

    first, second = layers(), layers()
    assert first.keys() == second.keys()
    assert all(second[key] is plan for key, plan in first.items())
    assert ("texts" in first) == (form == "padded")


def test_other_slopes_are_never_served_from_the_plans(form):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout)
    for seed in range(5):  # each tensor is freed before the next is made, so that addresses repeat
        slopes = torch.rand(4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        out = shared_prompt_attention(*inputs, layout, backend="sdpa", alibi_slopes=slopes)
        expected = shared_prompt_attention(*inputs, layout, backend="reference", alibi_slopes=slopes)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_texts, dense", [(1, True), (2, True), (8, False), (32, False)])
def test_few_short_texts_run_densely_and_many_padded(num_texts, dense):
    layout = packed_batch(["r" * 40] * num_texts, [8])[1].attention
    inputs = tensors(layout, (8, 8, 64, 64), torch.float32)
    shared_prompt_attention(*inputs, layout, backend="sdpa")
    assert any(key[0] == "dense" for key in layout.plans) == dense
    assert ("texts" in layout.plans) != dense


class Recorder(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


READS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "repeat_interleave",
}


@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("batch", ["ragged prompts", "left, predictors", "empty texts"])
def test_the_host_reads_nothing(backend, batch, options):
    layout = layout_of(batch)
    inputs = tensors(layout, HEADS[1])
    options = with_vectors(OPTIONS[options], 4)
    with Recorder() as recorder:
        results(inputs, layout, options, backend=backend)
    assert len(recorder.names) > 10
    assert not READS & set(recorder.names)


@pytest.mark.parametrize("options", ["none", "all"])
def test_no_shape_and_no_branch_depends_on_what_tensors_hold(backend, options):
    layout = layout_of("ragged prompts")
    mode = FakeTensorMode()

    def without_data(value):
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    fields = [getattr(layout, name) for name in AttentionLayout.__dataclass_fields__ if name != "plans"]
    fake_layout = AttentionLayout(*map(without_data, fields))
    inputs = [without_data(x) for x in tensors(layout, HEADS[1])]
    options = {name: without_data(x) for name, x in with_vectors(OPTIONS[options], 4).items()}
    with mode:  # raises where a value would be needed
        out = shared_prompt_attention(*inputs, fake_layout, backend=backend, **options)
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert out.shape == (4, layout.num_rows, HEADS[1][3])
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_the_recorder_would_see_a_read():
    with Recorder() as recorder:
        values = torch.arange(3, device=DEVICE)
        (values > 1).nonzero()
        values.max().item()
    assert {"nonzero", "_local_scalar_dense"} <= set(recorder.names)


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at the choice of the CPU kernel")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["none", "alibi", "window 3"])
def test_the_cpu_runs_its_flash_kernel_forward_and_backward(form, heads, dtype, options):
    layout = layout_of("right, dummies")
    inputs = tensors(layout, heads, dtype)
    with Recorder() as recorder:
        results(inputs, layout, with_vectors(OPTIONS[options], heads[0]), backend="sdpa")
    calls = 1 if form == "dense" else 2
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert recorder.names.count(kernel) == calls
    assert recorder.names.count(f"{kernel}_backward") == calls
    assert not {"_softmax", "_safe_softmax", "index_add_", "index_put_"} & set(recorder.names)


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


@pytest.mark.parametrize("batch", ["ragged prompts", "right"])
def test_autocast_decides_the_dtype(backend, batch):
    layout = layout_of(batch)
    query, key, value = tensors(layout, dtype=torch.float32)
    slopes = torch.rand(4, device=DEVICE)
    halves = [x.detach().bfloat16().requires_grad_() for x in (query, key, value)]
    mixed = (query, key, value.detach().bfloat16().requires_grad_())
    with torch.autocast(DEVICE, torch.bfloat16):
        out = shared_prompt_attention(*mixed, layout, alibi_slopes=slopes, backend=backend)
    assert out.dtype == torch.bfloat16
    grad = torch.ones_like(out)
    expected = results(halves, layout, {"alibi_slopes": slopes}, grad, backend=backend)
    for result, wanted in zip((out, *torch.autograd.grad(out, mixed, grad)), expected, strict=True):
        torch.testing.assert_close(result.to(wanted.dtype), wanted, rtol=0, atol=0)


def op_arguments(inputs, layout):
    return (
        *inputs,
        layout.slots,
        layout.position_ids,
        layout.key_slots,
        layout.segments,
        layout.sees,
        layout.cu_prompts,
        layout.cu_texts,
        layout.prompt_of_row,
        list(layout.prompt_lengths),
        layout.num_tokens,
        layout.longest_text,
        0.4,
    )


@pytest.mark.parametrize(
    "options", [{"sliding_window": 2}, {"softcap": 2.0, "sinks": True}], ids=["sdpa", "explicit"]
)
def test_opcheck(backend, options):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout, HEADS[1])
    operator = torch.ops.softprompt.shared_prompt_attention.default
    options = with_vectors(options, 4)
    arguments = op_arguments(inputs, layout)
    torch.library.opcheck(operator, arguments, {**options, "backend": backend})
    torch.testing.assert_close(
        operator(*arguments, **options, backend=backend),
        shared_prompt_attention(*inputs, layout, scale=0.4, **options, backend=backend),
        rtol=0,
        atol=0,
    )


def test_a_compiled_call_is_one_graph_and_equals_the_eager_one(form):
    layout = layout_of("ragged prompts")
    inputs = tensors(layout, HEADS[1])
    slopes = torch.rand(4, device=DEVICE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two_layers(query, key, value):
        first = shared_prompt_attention(query, key, value, layout, backend="sdpa", sliding_window=3)
        second = shared_prompt_attention(query, key, value, layout, backend="sdpa", alibi_slopes=slopes)
        return first + second

    out = two_layers(*inputs)
    grad = torch.randn_like(out)
    options = [{"sliding_window": 3}, {"alibi_slopes": slopes}]
    eager = [results(inputs, layout, option, grad, backend="reference") for option in options]
    compiled = [out, *torch.autograd.grad(out, inputs, grad)]
    for value, one, other in zip(compiled, *eager, strict=True):
        torch.testing.assert_close(value, one + other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["padded"], indirect=True)
def test_a_second_derivative_is_refused(form):
    layout = layout_of("right")
    inputs = tensors(layout)
    out = shared_prompt_attention(*inputs, layout, backend="sdpa", softcap=1.0)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
        ({"backend": "fast"}, "unknown backend 'fast', expected one of auto, reference, sdpa"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(change, message):
    layout = layout_of("right, dummies")
    inputs = dict(zip(("query", "key", "value"), tensors(layout, HEADS[1]), strict=True))
    values = tuple(inputs.values())
    options = {name: x(*values) if callable(x) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        shared_prompt_attention(**{**inputs, "layout": layout, **options})
