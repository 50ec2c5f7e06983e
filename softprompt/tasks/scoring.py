"""Likelihoods of labels and targets: no text is generated, all labels of a row are scored in one forward.

The end token is part of a label, so that a label which begins like another one is told apart from it: "no"
and its end against "no complaint" and its end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt.engine.candidates import score
from softprompt.engine.forward import forward
from softprompt.nesting import base_of
from softprompt.prompt_encoders import prompt_of
from softprompt.prompts.vocabulary import embed
from softprompt.tasks.classification import IGNORED, Encoder
from softprompt.tasks.collate import LeftPadCollator, collate_prompts
from softprompt.tasks.errors import TaskError
from softprompt.tasks.inference import evaluation_mode
from softprompt.tasks.table import Table
from softprompt.tasks.template import Row

CONTENT_FREE_TEXTS = ("N/A", "", "[MASK]")  # of Zhao et al. 2021, section 5


@torch.no_grad()
def label_log_likelihoods(
    model: Any,
    encoder: Encoder,
    texts: Sequence[Row],
    *,
    adapters: Sequence[str] | None = None,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`log p(label, end token | prompt, text)` of every label of the task, as the model would write it.

    Args:
        model: a PEFT prompt-tuning model, patched or not.
        encoder: of the task.
        texts: N texts, or rows where the template reads other columns, too; one that is too long loses its
            end, as in training.
        adapters: K adapters; every text is scored behind each of their prompts, all in one forward. None: the
            active one.
        batch_size: texts in a forward.
        progress: called with the number of texts done in each batch.

    Returns:
        [K, N, C] fp64 on the CPU; the labels are those of `encoder.task.labels`, in their order.

    Raises:
        TaskError: one label with its end token begins another one.
        ValueError: see `softprompt.score`.
    """
    names = [model.active_adapter] if adapters is None else list(adapters)
    prompts = [prompt_of(model, name) for name in names]

    def batch_of(ids: list[list[int]]) -> tuple[list[Tensor], list[int], list[list[int]]]:
        return prompts, [number for number in range(len(names)) for _ in ids], ids * len(names)

    return _scored(model, encoder, texts, batch_of, len(names), batch_size, progress)


@torch.no_grad()
def zero_shot_log_likelihoods(
    model: Any,
    encoder: Encoder,
    texts: Sequence[Row],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`label_log_likelihoods` [1, N, C] of the frozen model alone, without a prompt.

    The first token of each row stands where a prompt would, so that the forward is the same.
    """

    def batch_of(ids: list[list[int]]) -> tuple[list[Tensor], list[int], list[list[int]]]:
        tokens, first = _first_tokens(model, ids)
        return tokens, first, [row[1:] for row in ids]

    return _scored(model, encoder, texts, batch_of, 1, batch_size, progress)


def _first_tokens(model: Any, ids: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[int]]:
    """The embeddings [1, H] of the first tokens of rows, each once, and the number of that of each row."""
    first = sorted({row[0] for row in ids})
    return [embed(model, [token]) for token in first], [first.index(row[0]) for row in ids]


@torch.no_grad()
def target_loss(
    model: Any,
    encoder: Encoder,
    table: Table,
    *,
    adapter: str | None,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> float:
    """The mean loss of the targets of a table, in nats per token, in packed forwards as in training.

    Args:
        model: a PEFT prompt-tuning model, patched or not.
        encoder: of the task.
        table: N rows with targets.
        adapter: behind whose prompt the rows stand. None: the frozen model alone, where the first token of
            each row stands in the place of a prompt, as in `zero_shot_log_likelihoods`.
        batch_size: rows in a forward.
        progress: called with the number of rows done in each batch.
    """
    collate = LeftPadCollator.of(encoder)
    total, tokens = 0.0, 0
    examples = encoder.examples(table.rows, table.labels or [])
    with evaluation_mode(model):
        for start in range(0, len(examples), batch_size):
            rows = examples[start : start + batch_size]
            prompts, prompt_of_row = [prompt_of(model, adapter)] if adapter else [], [0] * len(rows)
            if adapter is None:
                prompts, prompt_of_row = _first_tokens(model, [row["input_ids"] for row in rows])
                rows = [{name: values[1:] for name, values in row.items()} for row in rows]
            batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
            output = forward(
                base_of(model),
                [prompt.to(model.device) for prompt in prompts],
                batch["input_ids"],
                batch["attention_mask"],
                batch["labels"],
                prompt_of_row,
                positions=encoder.task.positions,
            )
            count = int((batch["labels"] != IGNORED).sum())
            total += float(output.loss) * count
            tokens += count
            if progress is not None:
                progress(len(rows))
    return total / tokens


def _scored(
    model: Any,
    encoder: Encoder,
    texts: Sequence[Row],
    batch_of: Callable[[list[list[int]]], tuple[list[Tensor], list[int], list[list[int]]]],
    count: int,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Tensor:
    """[count, N, C]: `batch_of` turns token rows into prompts, the prompt of each row, and rows."""
    candidates = label_candidates(encoder)
    parts = []
    with evaluation_mode(model), warnings.catch_warnings():
        warnings.filterwarnings("once", message="softprompt: candidates are scored one at a time")
        for start in range(0, len(texts), batch_size):
            ids = [encoder.prompt(text) for text in texts[start : start + batch_size]]
            prompts, prompt_of_row, rows = batch_of(ids)
            batch = collate_prompts(encoder, rows)
            scores = score(
                base_of(model),
                [prompt.to(model.device) for prompt in prompts],
                candidates,
                batch["input_ids"].to(model.device),
                batch["attention_mask"].to(model.device),
                prompt_of_row,
                positions=encoder.task.positions,
            )
            parts.append(scores.double().cpu().view(count, len(ids), -1))
            if progress is not None:
                progress(len(ids))
    return torch.cat(parts, 1)


def label_candidates(encoder: Encoder) -> list[list[int]]:
    """Return the token ids of every label of the task with its end token.

    Raises:
        TaskError: one of them begins another one, so that their likelihoods cannot be compared.
    """
    targets = encoder.targets
    for label, target in targets.items():
        for other, longer in targets.items():
            if label != other and longer[: len(target)] == target:
                raise TaskError(
                    f"the label {label!r} with its end token begins the label {other!r}: labels must not "
                    f"contain the end token {encoder.tokenizer.decode([encoder.end_token_id])!r}; rename "
                    f"{other!r}"
                )
    return [targets[label] for label in encoder.task.labels]


def content_free_log_likelihoods(
    model: Any, encoder: Encoder, *, adapters: Sequence[str] | None = None
) -> Tensor:
    """`label_log_likelihoods` [K, 3, C] of texts that say nothing: "N/A", the empty text and "[MASK]".

    They stand in every column that the template reads.
    """
    rows = [encoder.filled_with(text) for text in CONTENT_FREE_TEXTS]
    return label_log_likelihoods(model, encoder, rows, adapters=adapters, batch_size=len(rows))


def label_probabilities(
    log_likelihoods: Tensor,  # [..., N, C]
    *,
    lengths: Sequence[int] | None = None,  # [C]
    content_free: Tensor | None = None,  # [..., n, C]
) -> Tensor:
    """Turns log-likelihoods of labels into probabilities that sum to 1 over the labels.

    Args:
        log_likelihoods: [..., N, C] from `label_log_likelihoods`.
        lengths: [C] tokens of each label: its mean log-likelihood per token counts instead of the sum, so
            that long labels are not at a disadvantage (Brown et al. 2020, "Language Models are Few-Shot
            Learners", section 2.4). None: the sum, which is what training raises.
        content_free: [..., n, C] log-likelihoods after texts that say nothing: contextual calibration (Zhao
            et al. 2021, "Calibrate Before Use", section 5), `q ∝ p / mean over the n texts of
            p_content_free`, which takes out what the model prefers whatever the text.

    Returns:
        [..., N, C].
    """
    if lengths is not None:
        tokens = torch.tensor(lengths, dtype=log_likelihoods.dtype)
        log_likelihoods = log_likelihoods / tokens
        content_free = None if content_free is None else content_free / tokens
    logs = log_likelihoods.log_softmax(-1)
    if content_free is not None:
        # The logarithm of the mean, without its factor 1 / n, which all labels have alike.
        logs = logs - content_free.log_softmax(-1).logsumexp(-2, keepdim=True)
    return logs.softmax(-1)
