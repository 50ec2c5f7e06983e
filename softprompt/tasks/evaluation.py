"""How well a prompt, or an ensemble of them, labels the rows of a table."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt.ensemble import combine
from softprompt.tasks.classification import Encoder
from softprompt.tasks.collate import LeftPadCollator
from softprompt.tasks.inference import Progress, label_texts, mean_loss
from softprompt.tasks.metrics import exact_match, perplexity
from softprompt.tasks.scoring import label_log_likelihoods
from softprompt.tasks.table import Table

GENERATED_BATCHES = 4  # generation keeps neither gradients nor logits, so it has room for more rows at once


class Evaluation:
    """Losses and scores of tables with the prompts of a model.

    Losses are means over all target tokens, in nats per token.

    Attributes:
        ensemble: names of the adapters of an ensemble, whose labels are those that most prompts prefer; empty
            where the active prompt writes the labels.
        passes: how often `measure` goes through a table.
    """

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        collate: LeftPadCollator,
        *,
        ensemble: Sequence[str] = (),
        batch_size: int,
    ) -> None:
        self.model, self.encoder, self.collate = model, encoder, collate
        self.ensemble, self.batch_size = list(ensemble), batch_size
        self.passes = 1 if ensemble else 2

    def loss(self, table: Table, progress: Progress | None = None) -> float:
        """Return the loss of a table, of an ensemble the mean over its prompts."""
        if self.ensemble:
            losses = self._prompt_losses(table, self._log_likelihoods(table, progress))
            return sum(losses) / len(losses)
        examples = self.encoder.examples(table.rows, table.labels or [])
        return mean_loss(self.model, self.collate, examples, batch_size=self.batch_size, progress=progress)

    def measure(self, table: Table, progress: Progress | None = None) -> dict[str, Any]:
        """Return `loss`, `perplexity` and `exact_match`; of an ensemble those of each prompt, too."""
        expected = table.labels or []
        if not self.ensemble:
            loss = self.loss(table, progress)
            predicted = label_texts(
                self.model,
                self.encoder,
                table.rows,
                batch_size=GENERATED_BATCHES * self.batch_size,
                progress=progress,
            )
            return _scores(loss, exact_match(predicted, expected))
        logs = self._log_likelihoods(table, progress)
        losses = self._prompt_losses(table, logs)

        def accuracy(log_likelihoods: Tensor) -> float:
            chosen, _ = combine(log_likelihoods.softmax(2))
            return exact_match([self.encoder.task.labels[i] for i in chosen.tolist()], expected)

        return {
            **_scores(sum(losses) / len(losses), accuracy(logs)),
            "prompt_losses": losses,
            "prompt_exact_match": [accuracy(logs[k : k + 1]) for k in range(len(logs))],
        }

    def _log_likelihoods(self, table: Table, progress: Progress | None) -> Tensor:
        """[K, N, C] of the labels of the task."""
        return label_log_likelihoods(
            self.model,
            self.encoder,
            table.rows,
            adapters=self.ensemble,
            batch_size=self.batch_size,
            progress=progress,
        )

    def _prompt_losses(self, table: Table, log_likelihoods: Tensor) -> list[float]:
        labels = table.labels or []
        numbers = torch.tensor([self.encoder.task.labels.index(label) for label in labels])
        tokens = sum(len(self.encoder.targets[label]) for label in labels)
        chosen = log_likelihoods.gather(2, numbers.expand(len(log_likelihoods), -1)[:, :, None])
        losses: list[float] = (-chosen.sum((1, 2)) / tokens).tolist()
        return losses


def _scores(loss: float, accuracy: float) -> dict[str, Any]:
    return {"loss": loss, "perplexity": perplexity(loss), "exact_match": accuracy}
