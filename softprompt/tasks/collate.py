"""Batches of token rows, padded on the left."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from softprompt.tasks.classification import IGNORED, Example


@dataclass(frozen=True)
class LeftPadCollator:
    """Pads rows on the left and stacks them: ids with `pad_token_id`, masks with 0, labels with -100.

    `length` pads every batch to that many tokens; None pads it to its own longest row.
    """

    pad_token_id: int
    length: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return int64 tensors [B, L] for every key of the examples.

        Raises:
            ValueError: a row is longer than `length`.
        """
        longest = max(len(example["input_ids"]) for example in examples)
        length = longest if self.length is None else self.length
        if longest > length:
            raise ValueError(f"a row has {longest} tokens, expected at most {length}")
        filler = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return {
            name: torch.tensor([[filler[name]] * (length - len(row[name])) + row[name] for row in examples])
            for name in examples[0]
        }
