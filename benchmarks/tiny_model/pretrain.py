"""Pretrain the tiny BLOOM of the package on generated text: `python -m benchmarks.tiny_model.pretrain`.

The model learns to name each attribute of a tweet when an instruction asks for it. Without an instruction
the label is that of a random attribute, so the bare template `Tweet text : ... Label : ` brings out a
mixture; a tuned prompt can take the place of the instruction. The same seed gives the same tokenizer and
the same documents bit for bit, and the same weights up to the rounding of differently many threads.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from benchmarks.tiny_model.generate import Document, documents, eval_rows, train_rows
from softprompt.tiny import model_path

# The ids of BLOOM's own special tokens.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
TOKENIZER_DOCUMENTS = 20_000
POOL = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Recipe:
    """Sizes and hyperparameters of the shipped model; a test shrinks them."""

    vocab_size: int = 4096
    hidden_size: int = 128
    n_layer: int = 3
    n_head: int = 4
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of the steps
    text_weight: float = 0.3  # of the loss on text tokens, against 1 for the loss on label tokens
    text_rows: int = 16  # rows of a batch whose text tokens have a loss; labels have one in every row
    seed: int = 0


@dataclass(frozen=True)
class Encoded:
    """A document as token ids; the last `num_label_tokens` are the label and the end of the sequence."""

    input_ids: list[int]
    num_label_tokens: int


def held_out() -> frozenset[str]:
    """The tweets of the package's two tables, which no pretraining document may hold."""
    return frozenset(text for text, _ in train_rows() + eval_rows())


def build_tokenizer(
    vocab_size: int,
    seed: int,
    num_documents: int = TOKENIZER_DOCUMENTS,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BLOOM's special tokens that adds none of them by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = islice(documents(seed, excluded=held_out()), num_documents)
    bpe.train_from_iterator(
        (part for document in sample for part in (document.prompt, document.label)), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, batch: Sequence[Document]) -> list[Encoded]:
    """Prompt and label are tokenized apart, as prompt-tuning scripts do, and closed by `</s>`."""
    prompts = tokenizer([document.prompt for document in batch])["input_ids"]
    labels = tokenizer([document.label for document in batch])["input_ids"]
    return [
        Encoded([*prompt, *label, EOS_ID], len(label) + 1 if label else 0)
        for prompt, label in zip(prompts, labels, strict=True)
    ]


def collate(rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask` and a mask of the label tokens, each [B, L]."""
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), PAD_ID)
    is_label = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        end = len(row.input_ids)
        input_ids[i, :end] = torch.tensor(row.input_ids)
        is_label[i, end - row.num_label_tokens : end] = True
    return input_ids, (input_ids != PAD_ID).long(), is_label


def build_model(recipe: Recipe) -> BloomForCausalLM:
    """A BLOOM with random weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = BloomConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        use_cache=True,
    )
    return BloomForCausalLM(config)


def pretraining_loss(
    model: BloomForCausalLM,
    rows: Sequence[Encoded],
    recipe: Recipe,
) -> torch.Tensor:
    """Mean cross entropy of the label tokens plus `text_weight` times that of text tokens of `text_rows`."""
    input_ids, attention_mask, is_label = collate(rows)
    hidden = model.transformer(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
    is_text = attention_mask.bool() & ~is_label
    is_text[recipe.text_rows :] = False
    is_text[:, 0] = is_label[:, 0] = False
    loss = hidden.new_zeros(())
    for chosen, weight in ((is_label, 1.0), (is_text, recipe.text_weight)):
        logits = model.lm_head(hidden[:, :-1][chosen[:, 1:]])
        loss = loss + weight * F.cross_entropy(logits, input_ids[chosen])
    return loss


def train(
    model: BloomForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    steps: int,
    *,
    progress: bool = True,
) -> list[float]:
    """Train in place with AdamW, linear warm-up and cosine decay; returns the loss of each step."""
    stream = documents(recipe.seed + 1, excluded=held_out())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup * steps), steps)
    model.train()
    losses: list[float] = []
    bar = tqdm(range(steps), desc="pretrain", disable=not progress, mininterval=5.0)
    for _, rows in zip(bar, _batches(stream, tokenizer, recipe), strict=False):
        loss = pretraining_loss(model, rows, recipe)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.3f}")
    model.eval()
    return losses


def _batches(
    stream: Iterator[Document],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> Iterator[list[Encoded]]:
    """Batches of documents of like length, so that little is spent on padding."""
    rng = Random(recipe.seed)
    while True:
        pool = encode(tokenizer, list(islice(stream, POOL * recipe.batch_size)))
        pool.sort(key=lambda row: len(row.input_ids))
        batches = [
            pool[start : start + recipe.batch_size] for start in range(0, len(pool), recipe.batch_size)
        ]
        rng.shuffle(batches)
        yield from batches


@torch.no_grad()
def label_accuracy(
    model: BloomForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sample: Iterable[Document],
) -> dict[tuple[str, bool], float]:
    """Share of labels that greedy decoding gets right, by (attribute, instructed).

    Every token of the label and the end of the sequence must be the most likely one given those before it,
    which is what an exact match of the greedily decoded label means.
    """
    right: defaultdict[tuple[str, bool], list[bool]] = defaultdict(list)
    labelled = [document for document in sample if document.label]
    for start in range(0, len(labelled), 100):
        part = labelled[start : start + 100]
        input_ids, attention_mask, is_label = collate(encode(tokenizer, part))
        best = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].argmax(-1)
        exact = ((best == input_ids[:, 1:]) | ~is_label[:, 1:]).all(1)
        for document, match in zip(part, exact.tolist(), strict=True):
            right[document.attribute, document.instructed].append(match)
    return {key: sum(matches) / len(matches) for key, matches in sorted(right.items())}


def save(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write model (rounded to bfloat16) and tokenizer to `output`, complete or not at all.

    The files are written beside `output` and renamed; what was there before stays if anything fails.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as work:
        fresh, old = Path(work, "new"), Path(work, "old")
        rounded = BloomForCausalLM(model.config).to(torch.bfloat16)
        rounded.load_state_dict(model.state_dict())
        rounded.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        for file in fresh.iterdir():
            file.chmod(0o644)  # an installed package belongs to one user and is read by all
        if output.exists():
            os.replace(output, old)
        try:
            os.replace(fresh, output)
        except OSError:
            if old.exists():
                os.replace(old, output)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=model_path())
    arguments = parser.parse_args()

    recipe = Recipe(seed=arguments.seed)
    tokenizer = build_tokenizer(recipe.vocab_size, recipe.seed)
    model = build_model(recipe)
    print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")
    losses = train(model, tokenizer, recipe, arguments.steps)
    last = losses[-100:]
    print(f"loss: {losses[0]:.3f} at first, {sum(last) / len(last):.3f} over the last {len(last)} steps")
    save(model, tokenizer, arguments.output)

    rounded: Any = BloomForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    sample = islice(documents(recipe.seed + 2, excluded=held_out()), 3000)
    for (attribute, instructed), share in label_accuracy(rounded.eval(), tokenizer, sample).items():
        print(f"{attribute:10} {'with instruction' if instructed else 'bare template':16} {share:.3f}")


if __name__ == "__main__":
    main()
