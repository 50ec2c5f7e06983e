"""Prompt tuning of the tiny model with stock PEFT: `python -m benchmarks.tiny_model.recipe`.

It tunes 8 virtual tokens on `tweets.csv` and prints the share of exact labels on `tweets_eval.csv` of the
model without a prompt, with the initial prompt, and with the tuned prompt.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
    set_seed,
)

from benchmarks.tiny_model.generate import LABEL_COLUMN, TEXT_COLUMN, template
from softprompt.generation.stock import right_options
from softprompt.tiny import eval_table, model_path, train_table

INIT_TEXT = "Classify if the tweet is a complaint or not:"
MAX_LENGTH = 64


def read_table(path: Path) -> list[tuple[str, str]]:
    """The (tweet, label) pairs of a table of the package."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row[TEXT_COLUMN], row[LABEL_COLUMN]) for row in csv.DictReader(file)]


def training_batch(
    rows: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Left-padded `input_ids`, `attention_mask`, `labels` [B, MAX_LENGTH]; only the label has a loss."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for text, label in rows:
        prompt = tokenizer(template(text))["input_ids"]
        target = [*tokenizer(label)["input_ids"], tokenizer.eos_token_id]
        pads = MAX_LENGTH - len(prompt) - len(target)
        columns["input_ids"].append([tokenizer.pad_token_id] * pads + prompt + target)
        columns["attention_mask"].append([0] * pads + [1] * (MAX_LENGTH - pads))
        columns["labels"].append([-100] * (MAX_LENGTH - len(target)) + target)
    return {name: torch.tensor(column) for name, column in columns.items()}


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[tuple[str, str]],
    *,
    batch_size: int = 50,
) -> float:
    """Share of rows whose greedily decoded label is the table's."""
    model.eval()
    right = 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs = tokenizer([template(text) for text, _ in part], padding=True, return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **right_options(model),
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.decode(new_tokens, skip_special_tokens=True)
        right += sum(text.strip() == label for text, (_, label) in zip(texts, part, strict=True))
    return right / len(rows)


def tune(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[tuple[str, str]],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> list[float]:
    """AdamW with a linear schedule on the prompt; returns the loss of each step."""
    loader: Any = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=True,
        collate_fn=lambda part: training_batch(part, tokenizer),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, epochs * len(loader))
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=model_path())
    parser.add_argument("--init", choices=[init.value for init in PromptTuningInit], default="TEXT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--num-virtual-tokens", type=int, default=8)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    train_rows, eval_rows = read_table(train_table()), read_table(eval_table())
    for seed in arguments.seeds:
        set_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        without = exact_match(base, tokenizer, eval_rows)
        config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            prompt_tuning_init=arguments.init,
            prompt_tuning_init_text=INIT_TEXT if arguments.init == "TEXT" else None,
            num_virtual_tokens=arguments.num_virtual_tokens,
            tokenizer_name_or_path=arguments.model,
        )
        model: Any = get_peft_model(base, config)
        before = exact_match(model, tokenizer, eval_rows)
        start = time.perf_counter()
        losses = tune(
            model,
            tokenizer,
            train_rows,
            epochs=arguments.epochs,
            batch_size=8,
            learning_rate=arguments.learning_rate,
        )
        seconds = time.perf_counter() - start
        after = exact_match(model, tokenizer, eval_rows)
        print(
            f"{arguments.init:12} seed {seed}: exact labels {without:.3f} without prompt, {before:.3f} with "
            f"the initial one, {after:.3f} tuned; {len(losses)} steps, {seconds:.0f} s, "
            f"loss {losses[0]:.3f} -> {losses[-1]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
