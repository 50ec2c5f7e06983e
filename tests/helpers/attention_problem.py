"""Packed rows, inputs and options for the tests of `shared_prompt_attention`."""

import importlib

import torch
from backends import DEVICE, backend_parameter

from softprompt.layout import build_layout
from softprompt.ops.shared_prompt_attention import configs, shared_prompt_attention
from softprompt.ops.shared_prompt_attention.reference import visible

sdpa = importlib.import_module("softprompt.ops.shared_prompt_attention.sdpa")

BACKENDS = ["reference", "dense", "padded", "triton", backend_parameter("native", "cpu")]
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
    "ragged prompts, prompt by prompt": {
        "rows": RIGHT[:2] + LEFT[:2],
        "prompts": [2, 5],
        "prompt_of_row": [0, 0, 1, 1],
        "labelled": True,
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


def long_batch(num_texts, longest, prompts, seed=0):
    """Texts of random lengths, one after the other on the prompts in turn."""
    lengths = torch.randint(1, longest + 1, (num_texts, 1), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(longest) < lengths).long().to(DEVICE)
    prompt_of_row = torch.arange(num_texts, device=DEVICE) % len(prompts)
    return build_layout(mask, prompts, prompt_of_row=prompt_of_row).attention


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


def hold(monkeypatch, name):
    """The back end of that name.

    "dense" and "padded" are "sdpa" held to one of its forms, "triton" has blocks so small that small problems
    have many.
    """
    if name in ("reference", "native"):
        return name
    if name == "triton":
        blocks = dict.fromkeys(configs.KINDS, configs.LaunchConfig(16, 16, 4, 1))
        monkeypatch.setattr(configs, "_OVERRIDE", blocks)
        return name
    dense = name == "dense"
    monkeypatch.setattr(sdpa, "_dense_is_cheaper", lambda layout, width: dense and layout.num_tokens > 0)
    return "sdpa"


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


def assert_error_of_the_dtype(layout, heads, options, dtype, backend):
    """Errors against fp64 are at most twice those of plain PyTorch in the same dtype."""
    inputs = tensors(layout, heads, dtype)
    options = with_vectors(options, heads[0], dtype)
    grad = torch.randn(layout.num_rows, heads[0], heads[3], generator=torch.Generator().manual_seed(3))
    grad = grad.to(DEVICE, dtype).transpose(0, 1)
    wide_inputs, wide_options = as_double(inputs, options)
    truth = results(wide_inputs, layout, wide_options, grad.double(), backend="reference")

    plain = plain_pytorch(inputs, layout, **options)
    wanted = [*inputs, *([options["sinks"]] if "sinks" in options else [])]
    plain = [plain.detach(), *torch.autograd.grad(plain, wanted, grad)]
    ours = results(inputs, layout, options, grad, backend=backend)
    assert [x.dtype for x in ours] == [dtype] * len(ours)
    rounding = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    for error, limit in zip(errors(ours, truth), errors(plain, truth), strict=True):
        assert error <= 2 * limit + rounding
