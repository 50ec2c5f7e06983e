"""FlexAttention on the packed row: the same visibility as a BlockMask, made once as for a whole step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.kernels.attention_problem import AttentionProblem
from benchmarks.kernels.problem import Outputs
from benchmarks.rehearsal import rehearsing

_BLOCK = 128


def prepared(problem: AttentionProblem) -> Callable[[], Outputs]:
    """The compiled attention; in a rehearsal its eager form, which needs no compiler."""
    mask = block_mask(problem)
    # A static shape: what is timed is the kernel, and a dynamic one is not faster.
    attend = flex_attention if rehearsing() else torch.compile(flex_attention, dynamic=False)
    grouped = problem.query.shape[0] != problem.key.shape[0]
    score = _score_mod(problem)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attend(
            query[None], key[None], value[None], score_mod=score, block_mask=mask, enable_gqa=grouped
        )
        return out[0]

    return problem.results(run)


def _score_mod(problem: AttentionProblem) -> Callable[..., Tensor] | None:
    slopes, positions = problem.slopes, problem.layout.position_ids
    if slopes is None:
        return None

    def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes[head] * (positions[key] - positions[query])

    return alibi


def block_mask(problem: AttentionProblem) -> BlockMask:
    """Which blocks of 128 x 128 are seen in part and which as a whole, a row of blocks at a time.

    `create_block_mask` would make the whole [T, T] mask first, 3.5 GB for the longest case.
    """
    layout = problem.layout
    segments, prefix_id, query_position, key_position = (
        layout.segments,
        layout.prefix_id,
        layout.query_position,
        layout.key_position,
    )

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (segments[key] == segments[query]) | (segments[key] == prefix_id[query])
        return own & (key_position[key] <= query_position[query])

    count = layout.num_rows // _BLOCK
    keys = torch.arange(layout.num_rows, device=query_position.device)
    seen = torch.empty(count, count, dtype=torch.int32, device=query_position.device)
    for block in range(count):
        queries = keys[block * _BLOCK : (block + 1) * _BLOCK, None]
        seen[block] = visible(keys, keys, queries, keys[None]).view(_BLOCK, count, _BLOCK).sum((0, 2))
    whole = seen == _BLOCK * _BLOCK
    partial = (seen > 0) & ~whole
    return BlockMask.from_kv_blocks(*_ordered(partial), *_ordered(whole), BLOCK_SIZE=_BLOCK, mask_mod=visible)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[1, 1, Q] counts and [1, 1, Q, K] indices of the key blocks of each row of blocks."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]
