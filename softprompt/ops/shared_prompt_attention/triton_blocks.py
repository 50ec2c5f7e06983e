"""What the attention kernels share: scores, visibility, and where the keys of a block lie."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from batch to batch. Specialised on which of them are 1 or multiples of 16, one kernel is
# compiled up to 18 times, in the middle of a training.
BATCH_SIZES = ["num_rows", "prompt_rows", "num_prompts", "num_texts", "splits"]


@triton.jit
def scores_of(
    dot,  # [queries, keys] query . key
    slope,
    position_q,
    position_k,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
):
    """Scores in units of log2, and tanh(dot * scale / softcap)."""
    scores = dot * scale
    squashed = scores
    if HAS_SOFTCAP:
        squashed = 2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0
        scores = softcap * squashed
    if HAS_SLOPES:
        scores += slope * (position_k[None, :] - position_q[:, None]).to(scores.dtype)
    return scores * 1.4426950408889634, squashed


@triton.jit
def seen_pairs(
    slot_q,
    segment_q,
    prefix_q,
    slot_k,
    segment_k,
    window,
    HAS_WINDOW: tl.constexpr,
):
    """[queries, keys] which key is seen by which query."""
    seen = (segment_k[None, :] == segment_q[:, None]) | (segment_k[None, :] == prefix_q[:, None])
    seen &= slot_k[None, :] <= slot_q[:, None]
    if HAS_WINDOW:
        seen &= slot_q[:, None] - slot_k[None, :] < window
    return seen


@triton.jit
def own_start(row, segment, cu_prompts_ptr, cu_texts_ptr, num_prompts, num_texts):
    """First row of the segment that `row` belongs to."""
    is_prompt = segment < num_prompts
    is_text = (segment >= num_prompts) & (segment < num_prompts + num_texts)
    prompt = tl.load(cu_prompts_ptr + segment, mask=is_prompt, other=0)
    text = tl.load(cu_texts_ptr + segment - num_prompts, mask=is_text, other=0)
    return tl.where(is_prompt, prompt, tl.where(is_text, text, row))


@triton.jit
def own_end(row, segment, cu_prompts_ptr, cu_texts_ptr, num_prompts, num_texts):
    """The row after the last one of the segment that `row` belongs to."""
    is_prompt = segment < num_prompts
    is_text = (segment >= num_prompts) & (segment < num_prompts + num_texts)
    prompt = tl.load(cu_prompts_ptr + segment + 1, mask=is_prompt, other=0)
    text = tl.load(cu_texts_ptr + segment - num_prompts + 1, mask=is_text, other=0)
    return tl.where(is_prompt, prompt, tl.where(is_text, text, row + 1))


@triton.jit
def key_ranges(
    rows,
    in_row,
    segment_q,
    prefix_q,
    first,
    segments_ptr,
    cu_prompts_ptr,
    cu_texts_ptr,
    num_prompts,
    num_texts,
    window,
    HAS_WINDOW: tl.constexpr,
):
    """Where the keys of a block of queries lie: prompt rows from, to; own rows from; and if it is uniform."""
    first_segment = tl.load(segments_ptr + first)
    own = own_start(first, first_segment, cu_prompts_ptr, cu_texts_ptr, num_prompts, num_texts)
    is_text = in_row & (segment_q >= num_prompts) & (prefix_q >= 0) & (prefix_q < num_prompts)
    lowest = tl.min(tl.where(is_text, prefix_q, num_prompts), 0)
    highest = tl.max(tl.where(is_text, prefix_q, -1), 0)
    prompt_from = tl.load(cu_prompts_ptr + lowest)
    prompt_to = tl.load(cu_prompts_ptr + highest + 1)
    # A block that begins inside the prompts has the rest of them among its own rows.
    prompt_to = tl.minimum(prompt_to, own)
    uniform = tl.min(tl.where(in_row & (segment_q == first_segment), 1, 0), 0) == 1
    if HAS_WINDOW:
        # Slots grow by at least one from row to row of a text, so nothing further back is inside the window.
        own = tl.maximum(own, first - window + 1)
        uniform = False
    return prompt_from, prompt_to, own, uniform


@triton.jit
def gradient_of_scores(
    dot,  # query . key
    grad_dot,  # grad_out . value
    lse,
    delta,
    seen,
    slope,
    position_q,
    position_k,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    BY_KEY: tl.constexpr,  # the arguments are [keys, queries]
):
    """Probabilities, and the gradient of the products query . key."""
    if BY_KEY:
        scores, squashed = scores_of(
            dot, -slope, position_k, position_q, scale, softcap, HAS_SOFTCAP, HAS_SLOPES
        )
        lse, delta = lse[None, :], delta[None, :]
    else:
        scores, squashed = scores_of(
            dot, slope, position_q, position_k, scale, softcap, HAS_SOFTCAP, HAS_SLOPES
        )
        lse, delta = lse[:, None], delta[:, None]
    probabilities = tl.exp2(tl.where(seen, scores, float("-inf")) - lse)
    grad = probabilities * (grad_dot - delta)
    if HAS_SOFTCAP:
        grad *= 1.0 - squashed * squashed
    return probabilities, grad * scale
