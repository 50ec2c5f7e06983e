"""`shared_prompt_attention` on `scaled_dot_product_attention`: what the CPU runs, and a GPU without Triton.

The prompts attend to themselves, and the texts, padded to a batch, to `[prompt | own text]`; few and short
texts run as one dense attention over the row instead. Everything is [rows, heads, D] inside, the layout in
which models produce their heads, so that rows are gathered as contiguous pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from softprompt.ops.shared_prompt_attention import plans
from softprompt.ops.shared_prompt_attention.layout import AttentionLayout, AttentionOptions
from softprompt.ops.shared_prompt_attention.plans import Bias, TextIndex

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class _Options:
    scale: float
    window: int | None
    softcap: float | None
    slopes: Tensor | None  # [Hq]
    dropout_p: float
    sinks: Tensor | None  # [Hq] in bias_dtype
    explicit: bool  # needs something that scaled_dot_product_attention lacks
    bias_dtype: torch.dtype

    @property
    def bias_key(self) -> tuple[Any, ...]:
        return self.window, None if self.slopes is None else id(self.slopes), self.bias_dtype


def shared_prompt_attention(
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    sinks: Tensor | None,  # [Hq]
    layout: AttentionLayout,
    given: AttentionOptions,
) -> Tensor:
    dtype, head_dim, value_dim = value.dtype, query.shape[2], value.shape[2]
    on_cpu = query.device.type == "cpu"
    if on_cpu and dtype in _HALF:
        # PyTorch's CPU kernel sums the gradients of half-precision keys in half precision, and a prompt's are
        # sums over all texts. Without AMX its backward is also several times slower than that of fp32.
        query, key, value = query.float(), key.float(), value.float()
    half = query.dtype in _HALF
    explicit = given.softcap is not None or sinks is not None or (half and given.alibi_slopes is not None)
    if on_cpu and not explicit and head_dim != value_dim:
        # The CPU kernel wants heads of one width; zeros change neither the scores nor the columns kept.
        width = max(head_dim, value_dim)
        query, key, value = (
            functional.pad(tensor, (0, width - tensor.shape[2])) for tensor in (query, key, value)
        )
    bias_dtype = torch.float32 if half and explicit else query.dtype
    sinks = None if sinks is None else sinks.to(bias_dtype)
    options = _Options(*given, sinks=sinks, explicit=explicit, bias_dtype=bias_dtype)
    run = _dense if _dense_is_cheaper(layout, query.shape[0] * query.shape[2]) else _padded
    out = run(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), layout, options)
    return out[..., :value_dim].to(dtype).transpose(0, 1)


def _dense_is_cheaper(layout: AttentionLayout, width: int) -> bool:
    """Compares the two forms in (query, key) pairs of the dense one; `width` is Hq * D.

    The weights are measured on a CPU (fp32, widths 16 to 4096, texts of 5 to 300 tokens): gathering and
    scattering a query costs as much as 60 pairs, copying a row of a prompt to a text as much as 25, and the
    calls that the padded form adds as much as 8,000 at a width of 512. A causal prompt visits half its pairs.
    """
    if layout.num_tokens is None or layout.longest_text is None:
        return True  # the padded form needs to know
    if layout.num_tokens == 0:
        return False
    batch_size, longest = layout.prompt_of_row.shape[0], layout.longest_text
    longest_prompt = max(layout.prompt_lengths)
    prompts = sum(length * length for length in layout.prompt_lengths) // 2
    queries = batch_size * longest * (longest_prompt + longest + 60)
    padded = prompts + queries + 25 * batch_size * longest_prompt + 8000 * 512 // width
    return bool(layout.num_live**2 <= padded)


def _dense(
    rows_q: Tensor, rows_k: Tensor, rows_v: Tensor, layout: AttentionLayout, options: _Options
) -> Tensor:
    bias = plans.remember(
        layout,
        ("dense", *options.bias_key),
        lambda: plans.bias_of_all(layout, options.window, options.slopes, options.bias_dtype),
    )
    live = layout.num_live
    q, k, v = (_heads_first(_head_rows(rows, live), 1) for rows in (rows_q, rows_k, rows_v))
    out = _rows_first(_attend(q, k, v, bias, options))
    if bias.sees_nothing is not None:
        out = out.masked_fill(bias.sees_nothing.view(-1, 1, 1), 0)
    return _with_dummies([out], rows_v, live, rows_q.shape[1])


def _padded(
    rows_q: Tensor, rows_k: Tensor, rows_v: Tensor, layout: AttentionLayout, options: _Options
) -> Tensor:
    if layout.num_tokens == 0:
        q, k, v = (_head_rows(rows, layout.prompt_tokens) for rows in (rows_q, rows_k, rows_v))
        outs = _prompts(q, k, v, layout, options)
        return _with_dummies(outs, rows_v, layout.prompt_tokens, rows_q.shape[1])
    texts = plans.remember(layout, "texts", lambda: plans.index_texts(layout))
    bias = plans.remember(
        layout,
        ("texts", *options.bias_key),
        lambda: plans.bias_of_texts(layout, texts, options.window, options.slopes, options.bias_dtype),
    )
    prompt_q, text_q = _GatherQueries.apply(rows_q, texts)
    prompt_k, text_k = _GatherKeys.apply(rows_k, texts)
    prompt_v, text_v = _GatherKeys.apply(rows_v, texts)
    batch = texts.batch_size
    q, k, v = (_heads_first(rows, batch) for rows in (text_q, text_k, text_v))
    out = _Scatter.apply(_rows_first(_attend(q, k, v, bias, options)), texts)
    if bias.sees_nothing is not None:
        nothing = bias.sees_nothing.view(-1)[texts.query_inverse]
        out = out.masked_fill(nothing.view(-1, 1, 1), 0)
    outs = [*_prompts(prompt_q, prompt_k, prompt_v, layout, options), out]
    return _with_dummies(outs, rows_v, layout.num_live, rows_q.shape[1])


def _prompts(
    rows_q: Tensor, rows_k: Tensor, rows_v: Tensor, layout: AttentionLayout, options: _Options
) -> list[Tensor]:
    """The prompts among themselves; prompts of one length are one batch."""
    lengths = layout.prompt_lengths
    together = len(lengths) if len(set(lengths)) == 1 else 1
    sizes = [lengths[0] * together] if together > 1 else list(lengths)
    outs, first = [], 0
    for size, *parts in zip(sizes, *(rows.split(sizes) for rows in (rows_q, rows_k, rows_v)), strict=True):
        rows = slice(first, first + size)
        first += size
        bias = None
        windowed = options.window is not None and options.window < size // together
        if options.explicit or options.slopes is not None or windowed:
            bias = plans.remember(
                layout,
                ("prompts", rows.start, *options.bias_key),
                functools.partial(
                    plans.bias_of_prompt,
                    layout,
                    rows,
                    together,
                    options.window,
                    options.slopes,
                    options.bias_dtype,
                ),
            )
        q, k, v = (_heads_first(part, together) for part in parts)
        outs.append(_rows_first(_attend(q, k, v, bias, options)))
    return outs


def _attend(
    query: Tensor,  # [B, Hq, queries, D]
    key: Tensor,  # [B, Hkv, keys, D]
    value: Tensor,  # [B, Hkv, keys, Dv]
    bias: Bias | None,  # None: causal
    options: _Options,
) -> Tensor:
    if not options.explicit or bias is None:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if bias is None else bias.scores,
            dropout_p=options.dropout_p,
            is_causal=bias is None,
            scale=options.scale,
            enable_gqa=bool(query.shape[1] != key.shape[1]),
        )
    # The query heads of one key head stand in one matrix, so that keys need not be repeated.
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ key.transpose(2, 3)).view(*query.shape[:3], key.shape[2])
    scores = scores.to(bias.scores.dtype) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores + bias.scores
    if options.sinks is None:
        probabilities = scores.softmax(3)
    else:
        sinks = options.sinks[:, None, None]
        probabilities = (scores - torch.logaddexp(scores.logsumexp(3, keepdim=True), sinks)).exp()
    probabilities = functional.dropout(probabilities, options.dropout_p, options.dropout_p > 0)
    out = probabilities.to(value.dtype).view(*grouped.shape[:3], key.shape[2]) @ value
    return out.view(*query.shape[:3], value.shape[3])


def _heads_first(rows: Tensor, batch_size: int) -> Tensor:
    """[B * n, H, D] -> [B, H, n, D]."""
    return rows.view(batch_size, -1, *rows.shape[1:]).transpose(1, 2)


def _rows_first(heads: Tensor) -> Tensor:
    """[B, H, n, D] -> [B * n, H, D]."""
    return heads.transpose(1, 2).flatten(0, 1)


def _head_rows(rows: Tensor, count: int) -> Tensor:
    return rows if rows.shape[0] == count else rows[:count]


def _with_dummies(outs: Sequence[Tensor], rows_v: Tensor, live: int, heads: int) -> Tensor:
    """The row's parts in order, and the dummies, which see only themselves: their output is their value."""
    parts = list(outs)
    if rows_v.shape[0] > live:
        parts.append(rows_v[live:].repeat_interleave(heads // rows_v.shape[1], 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# Every packed text row stands at one place of the padded batch, so the gradient of a gather is a gather too:
# faster than the index_add that autograd would do, deterministic, and nothing that a pad holds is read.
class _GatherQueries(torch.autograd.Function):
    """Rows [T, H, D] -> the prompts' [ΣP, H, D] and the padded texts' [B * Lmax, H, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, texts: TextIndex) -> tuple[Tensor, Tensor]:
        ctx.texts = texts
        return rows[: texts.prompt_inverse.shape[0]].clone(), rows.index_select(0, texts.query_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _assemble(grads[0], grads[1], ctx.texts.query_inverse, ctx.texts), None


class _GatherKeys(torch.autograd.Function):
    """Rows [T, H, D] -> the prompts' [ΣP, H, D] and the padded texts' behind their prompts, [B * S, H, D].

    The gradient of a prompt's rows is the sum over all texts that see it, in fp32 or better.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, texts: TextIndex) -> tuple[Tensor, Tensor]:
        ctx.texts = texts
        return rows[: texts.prompt_inverse.shape[0]].clone(), rows.index_select(0, texts.key_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        texts: TextIndex = ctx.texts
        own, of_texts = grads
        longest, num_prompts = texts.longest_prompt, len(texts.prompt_lengths)
        wide = torch.float32 if own.dtype in _HALF else own.dtype
        shares = of_texts.view(texts.batch_size, -1, *own.shape[1:])[:, :longest]
        if num_prompts == 1:
            shared = shares.sum(0, dtype=wide)
        else:
            if texts.rows_of_prompt is not None:
                # Adding up rows that stand together is several times faster.
                summed = shares.unflatten(0, (num_prompts, texts.rows_of_prompt)).sum(1, dtype=wide)
            else:
                summed = shares.new_zeros(num_prompts, *shares.shape[1:], dtype=wide)
                summed.index_add_(0, texts.prompt_of_row, shares.to(wide))
            # A shorter prompt's pads are left behind here.
            shared = summed.flatten(0, 1).index_select(0, texts.prompt_inverse)
        return _assemble(shared + own, of_texts, texts.key_inverse, texts), None


class _Scatter(torch.autograd.Function):
    """The padded texts [B * Lmax, H, D] -> their rows [N, H, D]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, texts: TextIndex) -> Tensor:
        ctx.texts = texts
        return padded.index_select(0, texts.query_inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        texts: TextIndex = ctx.texts
        out = grads[0].index_select(0, texts.query_index - texts.prompt_inverse.shape[0])
        return out.masked_fill_(texts.query_is_pad.view(-1, 1, 1), 0), None


def _assemble(prompts: Tensor, padded: Tensor, inverse: Tensor, texts: TextIndex) -> Tensor:
    """The row's gradient from the prompts' and the padded texts'; none for the dummies."""
    out = padded.new_empty(texts.num_rows, *padded.shape[1:])
    first, live = prompts.shape[0], texts.num_live
    out[:first] = prompts
    torch.index_select(padded, 0, inverse, out=out[first:live])
    out[live:] = 0
    return out
