"""One training step of a T5-small on the CPU, PEFT against the patch: `python -m benchmarks.seq2seq`.

Random weights of the real shape; P = 100 as in Lester et al. 2021, eight texts of at most 64 tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import softprompt
from benchmarks.timing import interleaved, summary
from softprompt.tasks.compare import measure_peak_bytes

VOCABULARY, ROWS, PROMPT, TEXT, ROUNDS = 32_128, 8, 100, 64, 7


@dataclass(frozen=True)
class Lengths:
    """What a batch is padded to, and how many labels its rows have."""

    name: str
    pad_to: int  # L
    labels: tuple[int, int]  # fewest and most labels of a row
    pad_labels_to: int = 0  # T, where it is more than the most labels


CASES = (
    Lengths("a label of 4 tokens", TEXT, (4, 4)),
    Lengths("labels of 4 to 32 tokens", TEXT, (4, 32)),
    Lengths('a label of 4 tokens, padding="max_length" of 128', 128, (4, 4)),
    Lengths("the same with labels padded to 128", 128, (4, 4), 128),
)


def t5_small() -> Any:
    """A PEFT model."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=6,
        num_heads=8,
        decoder_start_token_id=0,
    )
    base = T5ForConditionalGeneration(config)
    return get_peft_model(base, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=PROMPT))


def batch_of(case: Lengths) -> dict[str, Tensor]:
    """Right-padded texts of 24 to 64 tokens and their labels."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(24, TEXT, ROWS).long()[:, None]
    fewest, most = case.labels
    answers = torch.linspace(fewest, most, ROWS).long()[:, None]
    width = max(most, case.pad_labels_to)
    labels = torch.randint(3, VOCABULARY, (ROWS, width), generator=generator)
    return {
        "input_ids": torch.randint(3, VOCABULARY, (ROWS, case.pad_to), generator=generator),
        "attention_mask": (torch.arange(case.pad_to) < lengths).long(),
        "labels": labels.masked_fill(torch.arange(width) >= answers, -100),
    }


def step_of(model: Any, batch: dict[str, Tensor]) -> Callable[[], float]:
    """A forward and a backward."""

    def step() -> float:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return float(loss.detach())

    return step


def main() -> None:
    """Prints a row for each case."""
    stock = t5_small()
    fast = softprompt.patch(copy.deepcopy(stock), on_unsupported="error")
    print("| case | PEFT | softprompt | x PEFT | peak above the weights, PEFT | softprompt |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        batch = batch_of(case)
        steps = {"peft": step_of(stock.eval(), batch), "softprompt": step_of(fast.eval(), batch)}
        losses = [step() for step in steps.values()]
        if abs(losses[0] - losses[1]) > 1e-4:
            raise SystemExit(f"{case.name}: the losses {losses} differ")
        seconds = interleaved(steps, ROUNDS, "cpu")
        theirs, ours = summary(seconds["peft"]), summary(seconds["softprompt"], seconds["peft"])
        peaks = [measure_peak_bytes(model, batch) / 2**20 for model in (stock, fast)]
        times = " | ".join(f"{found['p50'] * 1e3:,.0f} ms" for found in (theirs, ours))
        memory = " | ".join(f"{peak:,.0f} MiB" for peak in peaks)
        print(f"| {case.name} | {times} | {ours['ratio']:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
