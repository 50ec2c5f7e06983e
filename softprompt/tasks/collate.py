"""Batches of token rows, padded on the left; and of several orders of the rows at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import Sampler

from softprompt.tasks.classification import IGNORED, Encoder, Example


@dataclass(frozen=True)
class LeftPadCollator:
    """Pads rows on the left and stacks them: ids with `pad_token_id`, masks with 0, labels with -100.

    `length` pads every batch to that many tokens; None pads it to its own longest row.
    """

    pad_token_id: int
    length: int | None = None

    @classmethod
    def of(cls, encoder: Encoder) -> "LeftPadCollator":
        """Return the collator of the rows that a prompt is trained on."""
        task = encoder.task
        return cls(encoder.pad_token_id, task.max_length if task.padding == "max_length" else None)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
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


def collate_prompts(encoder: Encoder, prompts: Sequence[list[int]]) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` [B, L] of rows without a label.

    Where the task pads to `max_length` and pads count for positions, L is the longest that training knows.
    """
    task = encoder.task
    padded = task.positions == "padded" and task.padding == "max_length"
    collate = LeftPadCollator(encoder.pad_token_id, encoder.max_prompt if padded else None)
    return collate([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in prompts])


class StreamSampler(Sampler[int]):
    """The orders in which Trainer takes `count` rows at each of several seeds, batch by batch.

    `batch_size` rows in the order of the first seed come first, then as many in that of the second, and so
    on.
    """

    def __init__(self, count: int, seeds: Sequence[int], batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size
        self.orders = [
            SeedableRandomSampler(range(count), data_seed=seed, generator=torch.Generator()) for seed in seeds
        ]

    def __len__(self) -> int:
        return self.count * len(self.orders)

    def __iter__(self) -> Iterator[int]:
        orders = [list(order) for order in self.orders]
        for start in range(0, self.count, self.batch_size):
            for order in orders:
                yield from order[start : start + self.batch_size]
