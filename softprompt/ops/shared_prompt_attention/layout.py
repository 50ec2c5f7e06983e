"""What the attention has to know of the packed row."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """The packed row as the attention sees it: int32 tensors on its device, and sizes that the host knows.

    A token q sees a token k where `(segments[k] == segments[q] or segments[k] == prefix_id[q]) and
    key_position[k] <= query_position[q]`, and with a sliding window of W where also `query_position[q] -
    key_position[k] < W`. Where texts have branches, also `branches[k] == 0 or branches[k] == branches[q]`
    must hold: a branch goes on from its text as if the other branches were not there. See
    `softprompt.ops.pack_layout.LayoutTensors` for the row.
    """

    query_position: Tensor  # [T]
    position_ids: Tensor  # [T] what ALiBi counts
    key_position: Tensor  # [T]
    segments: Tensor  # [T]
    prefix_id: Tensor  # [T]
    cu_prompts: Tensor  # [K + 1] first row of each prompt, and the first text row
    cu_texts: Tensor  # [B + 1] first row of each text, and the first dummy
    prompt_of_row: Tensor  # [B] the prompt that each text sees
    prompt_lengths: tuple[int, ...]  # K
    # N text tokens; rows from ΣP + N on are dummies, which see only themselves. None, for both: only the
    # tensors tell, whose values may change under a recorded step, and every row is treated alike.
    num_tokens: int | None
    longest_text: int | None
    # [T] number of the branch of its text that a token belongs to, 0 where it belongs to none. None: no text
    # has branches.
    branches: Tensor | None = None
    plans: dict[Hashable, Any] = field(
        init=False, default_factory=dict, repr=False
    )  # of the back ends, for a step

    def fields(self) -> list[Any]:
        """What it was made of, as the ops are given it."""
        return [getattr(self, name) for name in _FIELDS]

    @property
    def num_rows(self) -> int:
        """T, dummies included."""
        return self.query_position.shape[0]

    @property
    def prompt_tokens(self) -> int:
        """ΣP: rows of the prompts."""
        return sum(self.prompt_lengths)

    @property
    def num_live(self) -> int:
        """ΣP + N: all rows but the dummies, or all rows where the host does not know N."""
        if self.num_tokens is None:
            return self.num_rows
        return self.prompt_tokens + self.num_tokens


_FIELDS = tuple(one.name for one in fields(AttentionLayout) if one.init)


class AttentionOptions(NamedTuple):
    """How the scores are made; see `shared_prompt_attention`."""

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None  # [Hq]
    dropout_p: float = 0.0


class Attended(NamedTuple):
    """What a forward was given and made, as its backward needs it."""

    query: Tensor  # [Hq, T, D]
    key: Tensor  # [Hkv, T, D]
    value: Tensor  # [Hkv, T, Dv]
    sinks: Tensor | None  # [Hq]
    out: Tensor  # [Hq, T, Dv]
    lse: Tensor  # [Hq, T], in the unit of the back end


def rows_first(like: Tensor, heads: int | None = None) -> Tensor:
    """An empty [heads, T, D] like the tensor, with a token's heads side by side."""
    own, rows, width = like.shape
    return like.new_empty(rows, own if heads is None else heads, width).transpose(0, 1)
