"""The cases: what is trained on what, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import BLOOM_560M, LLAMA_1B, LLAMA_3B, LLAMA_8B, Shape, bloom, toy_of
from benchmarks.texts import EvenLengths, TextLengths, twitter_complaints

IGNORE_INDEX = -100
PAD_TOKEN = 3
STEP, ENSEMBLE, GENERATE = "step", "ensemble", "generate"


@dataclass(frozen=True)
class Targets:
    """What softprompt has to reach in a case; None: nothing is asked."""

    share_of_limit: float | None = None  # at least: (step of PEFT / step) / token limit
    share_of_memory: float | None = None  # at most: peak above the weights / that of PEFT
    vs_peft: float | None = None  # at least: step of PEFT / step
    vs_best_peer: float | None = None  # at least: step of the fastest other one / step
    over_floor: float | None = None  # at most: step / floor
    prefill_vs_peft: float | None = None  # at least: prefill of PEFT / prefill (generate only)


@dataclass(frozen=True)
class Case:
    """One training step, again and again; or one call of generate."""

    name: str
    why: str
    shape: Shape
    rows: int  # B
    num_virtual_tokens: int  # P
    pad_to: int | None  # L; None: the longest row of the batch
    texts: Callable[[], TextLengths | EvenLengths]
    rounds: int
    targets: Targets = field(default_factory=Targets)
    device: str = "cpu"
    dtype: str = "float32"
    # fp32: limits of |loss - loss of PEFT| and |d(prompt) - that of PEFT| / |that of PEFT|, Euclidean norms.
    # Narrower: what is allowed beyond twice PEFT's own error, see gate.py.
    loss_tolerance: float = 1e-4
    gradient_tolerance: float = 1e-3
    kind: str = STEP
    num_prompts: int = 1  # K, ensemble only: every row is run with each of them
    new_tokens: int = 0  # generate only
    padding_side: str = "left"
    seconds: float = 0.0  # what its important variants take on a GPU, estimated: kept free by the budget


@dataclass(frozen=True, eq=False)
class StepBatch:
    """A padded batch and what there is to know about it."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, labels: [B, L]
    lengths: tuple[int, ...]  # L_i, tokens of each row, label included
    num_labels: int  # M
    source: str
    rule: str = ""

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
            "length_rule": self.rule,
        }


def build_batch(case: Case) -> StepBatch:
    """Random token ids (seed 0) in rows of the lengths that the case says; labels at the end of each text.

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
    totals, labels = torch.tensor(lengths)[:, None], torch.tensor([label for _, label in rows])[:, None]
    column = torch.arange(padded_length)  # [L]
    # [B, L]: tokens from a column to the end of its text, itself included; a pad behind the text has none.
    left = padded_length - column if case.padding_side == "left" else totals - column
    attention_mask = ((left >= 1) & (left <= totals)).long()
    is_label = (attention_mask == 1) & (left <= labels)
    inputs = {
        "input_ids": input_ids.masked_fill(attention_mask == 0, PAD_TOKEN),
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(~is_label, IGNORE_INDEX),
    }
    return StepBatch(
        {name: tensor.to(case.device) for name, tensor in inputs.items()},
        lengths,
        int(is_label.sum()),
        texts.source,
        texts.rule,
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

_GPU: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "loss_tolerance": 5e-3,
    "gradient_tolerance": 5e-3,
    "rounds": 11,
}
_GPU_ARTICLE = replace(
    _ARTICLE,
    name="gpu-article",
    shape=BLOOM_560M,
    targets=Targets(vs_peft=10, vs_best_peer=4, over_floor=4, share_of_memory=1 / 20),
    seconds=14,
    **_GPU,
)
_MATH = Case(
    "math",
    "PEFT's own published comparison (MetaMathQA): every text token labelled",
    LLAMA_3B,
    rows=4,
    num_virtual_tokens=200,
    pad_to=None,
    texts=lambda: EvenLengths(100, 400, 1.0),
    padding_side="right",
    targets=Targets(vs_peft=2.2, vs_best_peer=1.8, over_floor=1.5, share_of_memory=1 / 3),
    seconds=12,
    **_GPU,
)
_LONG = Case(
    "long",
    "long texts, nearly no pads, every token labelled: where the cuts save least",
    LLAMA_1B,
    rows=32,
    num_virtual_tokens=20,
    pad_to=2048,
    texts=lambda: EvenLengths(1639, 2048, 1.0),
    padding_side="right",
    targets=Targets(vs_peft=1.15, vs_best_peer=1.1, over_floor=1.4, share_of_memory=1 / 2),
    seconds=35,
    **_GPU | {"rounds": 7},
)
_GENERATE = replace(
    _GPU_ARTICLE,
    name="generate-bloom",
    why="32 new tokens, greedy",
    rows=32,
    num_virtual_tokens=100,
    pad_to=None,
    kind=GENERATE,
    new_tokens=32,
    targets=Targets(prefill_vs_peft=2),
    seconds=14,
    rounds=7,
    gradient_tolerance=2e-2,
)

# Cases of one shape stand together: its model is built once.
CASES = {
    case.name: case
    for case in (
        _ARTICLE,
        _PAPER,
        replace(
            _ARTICLE,
            name="ensemble-cpu",
            why="prompt ensembling: 8 rows with each of 5 prompts, against 5 runs of PEFT",
            kind=ENSEMBLE,
            num_prompts=5,
            rounds=7,
        ),
        replace(_ARTICLE, name="article-full", shape=BLOOM_560M, rounds=7),
        replace(_PAPER, name="paper-full", shape=BLOOM_560M, rounds=7),
        _GPU_ARTICLE,
        replace(
            _GPU_ARTICLE,
            name="gpu-paper",
            why=_PAPER.why,
            rows=32,
            num_virtual_tokens=100,
            pad_to=None,
            targets=Targets(vs_peft=8, vs_best_peer=4, over_floor=2.5, share_of_memory=1 / 20),
        ),
        replace(
            _GPU_ARTICLE,
            name="ensemble",
            why="the article's section 3: 8 rows with each of 5 prompts, against 5 runs of PEFT",
            kind=ENSEMBLE,
            num_prompts=5,
            targets=Targets(vs_peft=20, over_floor=3),
            seconds=8,
        ),
        _GENERATE,
        _MATH,
        replace(
            _MATH,
            name="math-half",
            why="the same with the second half of each text labelled",
            texts=lambda: EvenLengths(100, 400, 0.5),
        ),
        Case(
            "8b",
            "a large frozen base, rows filled to 60 %, labels on 10 %",
            LLAMA_8B,
            rows=16,
            num_virtual_tokens=100,
            pad_to=512,
            texts=lambda: EvenLengths(102, 512, 0.1),
            padding_side="right",
            targets=Targets(vs_peft=2.2, vs_best_peer=1.9, over_floor=1.35, share_of_memory=1 / 3),
            seconds=45,
            **_GPU | {"rounds": 7},
        ),
        _LONG,
        replace(
            _LONG,
            name="long-8",
            why="the same with 8 rows, as PEFT's logits of 32 fill more than 139 GiB (estimated)",
            rows=8,
            seconds=15,
        ),
        replace(_GENERATE, name="generate-llama", shape=LLAMA_1B),
    )
}

SUITES = {
    "cpu": ("article", "paper", "ensemble-cpu"),
    "gpu": tuple(name for name, case in CASES.items() if case.device == "cuda"),
}
FULL_SUITES = SUITES | {"cpu": ("article-full", "paper-full")}


def toy(case: Case) -> Case:
    """The same case at a toy size, to test the runner; its times say nothing, so it has no targets.

    Cases of a GPU run on the CPU where there is none.
    """
    small = replace(case, shape=toy_of(case.shape), targets=Targets())
    if case.device == "cpu":
        return small
    texts = case.texts()
    if isinstance(texts, EvenLengths):
        short = replace(texts, scale=32)
        small = replace(small, texts=lambda: short, pad_to=None if case.pad_to is None else case.pad_to // 32)
    return replace(
        small,
        rows=min(case.rows, 4),
        num_virtual_tokens=min(case.num_virtual_tokens, 6),
        new_tokens=min(case.new_tokens, 3),
        device="cuda" if torch.cuda.is_available() else "cpu",
        seconds=0.0,
    )
