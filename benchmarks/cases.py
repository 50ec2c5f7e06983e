"""The cases: what is trained on what, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.texts import RULE, TextLengths, twitter_complaints

IGNORE_INDEX = -100
BLOOM_VOCABULARY = 250_880


@dataclass(frozen=True)
class Shape:
    """A model with random weights: times depend on shapes, not on quality."""

    name: str
    model_type: str
    config: dict[str, int]  # for transformers' AutoConfig

    def build(self, dtype: torch.dtype, device: str) -> PreTrainedModel:
        """The model, its weights drawn from seed 0."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **self.config)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


@dataclass(frozen=True)
class Targets:
    """What softprompt has to reach in a case; None: nothing is asked."""

    share_of_limit: float | None = None  # at least: (step of PEFT / step) / token limit
    share_of_memory: float | None = None  # at most: peak above the weights / that of PEFT


@dataclass(frozen=True)
class Case:
    """One training step, again and again."""

    name: str
    why: str
    shape: Shape
    rows: int  # B
    num_virtual_tokens: int  # P
    pad_to: int | None  # L; None: the longest row of the batch
    texts: Callable[[], TextLengths]
    rounds: int
    targets: Targets = field(default_factory=Targets)
    device: str = "cpu"
    dtype: str = "float32"
    loss_tolerance: float = 1e-4  # |loss - loss of PEFT|
    gradient_tolerance: float = 1e-3  # |d(prompt) - that of PEFT| / |that of PEFT|, Euclidean norms


@dataclass(frozen=True, eq=False)
class StepBatch:
    """A left-padded batch and what there is to know about it."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, labels: [B, L]
    lengths: tuple[int, ...]  # L_i, tokens of each row, label included
    num_labels: int  # M
    source: str

    @property
    def padded_length(self) -> int:
        """L."""
        return self.inputs["input_ids"].shape[1]

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return {
            "lengths": list(self.lengths),
            "padded_length": self.padded_length,
            "labels": self.num_labels,
            "length_source": self.source,
            "length_rule": RULE,
        }


def build_batch(case: Case) -> StepBatch:
    """Random token ids (seed 0) in rows of real lengths; labels on the answer only, pads on the left.

    A row that does not fit `pad_to` loses text tokens, never its label.
    """
    texts = case.texts()
    rows = texts.sample(case.rows)
    if case.pad_to is not None:
        rows = tuple((min(text, case.pad_to - label), label) for text, label in rows)
    lengths = tuple(text + label for text, label in rows)
    padded_length = case.pad_to or max(lengths)
    generator = torch.Generator().manual_seed(0)
    shape = (case.rows, padded_length)
    input_ids = torch.randint(10, case.shape.config["vocab_size"], shape, generator=generator)
    columns_left = padded_length - torch.arange(padded_length)  # [L], from a column to the end of its row
    attention_mask = (columns_left <= torch.tensor(lengths)[:, None]).long()
    is_label = columns_left <= torch.tensor([label for _, label in rows])[:, None]
    inputs = {
        "input_ids": input_ids.masked_fill(attention_mask == 0, 3),
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(~is_label, IGNORE_INDEX),
    }
    return StepBatch(
        {name: tensor.to(case.device) for name, tensor in inputs.items()},
        lengths,
        int(is_label.sum()),
        texts.source,
    )


def bloom(num_layers: int, hidden_size: int, vocab_size: int = BLOOM_VOCABULARY, head_dim: int = 64) -> Shape:
    """A BLOOM shape."""
    return Shape(
        f"BLOOM {num_layers} x {hidden_size}, vocabulary {vocab_size:,}",
        "bloom",
        {
            "n_layer": num_layers,
            "hidden_size": hidden_size,
            "n_head": hidden_size // head_dim,
            "vocab_size": vocab_size,
        },
    )


_CPU_TARGETS = Targets(share_of_limit=0.95, share_of_memory=0.25)
_ARTICLE = Case(
    "article",
    "PEFT's prompt-tuning article: 8 rows padded to 64",
    bloom(6, 512),
    rows=8,
    num_virtual_tokens=8,
    pad_to=64,
    texts=twitter_complaints,
    rounds=11,
    targets=_CPU_TARGETS,
)
_PAPER = replace(
    _ARTICLE,
    name="paper",
    why="the prompt length of Lester et al. 2021, padded to the longest row",
    num_virtual_tokens=100,
    pad_to=None,
)
_BLOOM_560M = bloom(24, 1024)

CASES = {
    case.name: case
    for case in (
        _ARTICLE,
        _PAPER,
        replace(_ARTICLE, name="article-full", shape=_BLOOM_560M, rounds=7),
        replace(_PAPER, name="paper-full", shape=_BLOOM_560M, rounds=7),
    )
}

SUITES = {"cpu": ("article", "paper")}
FULL_SUITES = {"cpu": ("article-full", "paper-full")}


def toy(case: Case) -> Case:
    """The same case at a toy size, to test the runner; its times say nothing, so it has no targets."""
    return replace(case, shape=bloom(2, 32, vocab_size=512, head_dim=16), targets=Targets())
