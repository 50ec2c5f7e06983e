"""How well prompts label the rows of a table or write their targets, beside what is there without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from softprompt.ensemble import combine
from softprompt.nesting import base_of
from softprompt.tasks.classification import Encoder
from softprompt.tasks.inference import Progress, label_texts
from softprompt.tasks.metrics import accuracy_and_f1, confusion_counts, exact_match, perplexity, text_scores
from softprompt.tasks.scoring import label_log_likelihoods, target_loss, zero_shot_log_likelihoods
from softprompt.tasks.table import Table

SAMPLES = 5  # of what was written, kept beside its targets


class Evaluation:
    """Losses and scores of tables with the prompts of a model.

    Classification is one pass, in which every label is scored. A row gets its likeliest label, of several
    prompts the one that most of them prefer. For generation `measure` is the loss of the targets, and
    `written` compares them with what the model writes. Losses are means over the target tokens of all rows,
    end token included, in nats per token; of several prompts the mean of each one's.

    Args:
        model: a PEFT model, patched or not.
        encoder: of the task.
        batch_size: rows in a forward.
    """

    def __init__(self, model: Any, encoder: Encoder, *, batch_size: int) -> None:
        self.model, self.encoder, self.batch_size = model, encoder, batch_size

    def measure(
        self, table: Table, adapters: Sequence[str], progress: Progress | None = None
    ) -> dict[str, Any]:
        """Return the scores of a table.

        Args:
            table: N rows with labels of the task, or targets.
            adapters: names of K adapters.
            progress: called with the number of rows done in each batch.

        Returns:
            `loss`, `perplexity`, and of classification `exact_match` (the share of rows with the right
            label), `macro_f1`, `predicted` (how many rows got each label) and `confusion` [C][C] (how many
            rows of label c got label d, labels in the order of the task); of several adapters also
            `prompt_losses` and `prompt_exact_match`, [K] each.
        """
        if self.encoder.task.generates:
            losses = [self._target_loss(table, adapter, progress) for adapter in adapters]
            scores = _loss_scores(sum(losses) / len(losses))
            return scores | ({"prompt_losses": losses} if len(losses) > 1 else {})
        logs = label_log_likelihoods(
            self.model,
            self.encoder,
            table.rows,
            adapters=adapters,
            batch_size=self.batch_size,
            progress=progress,
        )
        scores = self._scores(table, logs)
        if len(adapters) > 1:
            each = [self._scores(table, logs[k : k + 1]) for k in range(len(logs))]
            scores["prompt_losses"] = [one["loss"] for one in each]
            scores["prompt_exact_match"] = [one["exact_match"] for one in each]
        return scores

    def zero_shot(self, table: Table, progress: Progress | None = None) -> dict[str, Any]:
        """Return what `measure` does, and of generation `written`, of the frozen model without any prompt."""
        if self.encoder.task.generates:
            loss = self._target_loss(table, None, progress)
            return _loss_scores(loss) | self.written(table, [None], progress)
        logs = zero_shot_log_likelihoods(
            self.model, self.encoder, table.rows, batch_size=self.batch_size, progress=progress
        )
        return self._scores(table, logs)

    def written(
        self, table: Table, adapters: Sequence[str | None], progress: Progress | None = None
    ) -> dict[str, Any]:
        """Return how near what is written behind the rows of a table, greedily, is to their targets.

        Args:
            table: N rows with targets.
            adapters: names of K adapters, each of which writes; None: the frozen model without any prompt.
            progress: called with the number of rows done in each batch.

        Returns:
            `exact_match`, `rouge_l` and `bleu`, see `text_scores`, means over the adapters; of several ones
            also `prompt_exact_match`, `prompt_rouge_l` and `prompt_bleu`, [K] each; and `samples`, some rows
            with their `text`, `target` and what the first adapter has `written`.
        """
        targets, texts, scores = table.labels or [], [], []
        for adapter in adapters:
            if adapter is not None:
                self.model.set_adapter(adapter)
            writer = base_of(self.model) if adapter is None else self.model
            texts.append(
                label_texts(writer, self.encoder, table.rows, batch_size=self.batch_size, progress=progress)
            )
            scores.append(text_scores(texts[-1], targets))
        found: dict[str, Any] = {}
        for name in scores[0]:
            each = [one[name] for one in scores]
            found[name] = sum(each) / len(each)
            if len(each) > 1:
                found[f"prompt_{name}"] = each
        rows = zip(table.texts[:SAMPLES], targets, texts[0], strict=False)
        samples = [{"text": text, "target": target, "written": words} for text, target, words in rows]
        return {**found, "samples": samples}

    def _target_loss(self, table: Table, adapter: str | None, progress: Progress | None) -> float:
        return target_loss(
            self.model, self.encoder, table, adapter=adapter, batch_size=self.batch_size, progress=progress
        )

    def _scores(self, table: Table, logs: Tensor) -> dict[str, Any]:
        """Of the log-likelihoods [K, N, C]."""
        known, expected = self.encoder.task.labels, table.labels or []
        numbers = logs.new_tensor([known.index(label) for label in expected]).long()
        tokens = sum(len(self.encoder.targets[label]) for label in expected)
        right = logs.gather(2, numbers.expand(len(logs), -1)[:, :, None])
        loss = float(-right.sum() / (tokens * len(logs)))
        # What is no number (a prompt that diverged) is shown by the loss; it is the likeliest of nothing.
        chosen, _ = combine(logs.nan_to_num(nan=-1e9).softmax(2))
        predicted = [known[number] for number in chosen.tolist()]
        accuracy, f1 = accuracy_and_f1(predicted, expected)
        return {
            **_loss_scores(loss),
            "exact_match": accuracy,
            "macro_f1": f1,
            "predicted": dict(Counter(predicted).most_common()),
            "confusion": confusion_counts(predicted, expected, known),
        }


def _loss_scores(loss: float) -> dict[str, Any]:
    return {"loss": loss, "perplexity": perplexity(loss)}


def majority(train_labels: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Return what always answering the most frequent training label scores on rows with these `labels`."""
    label, _ = Counter(train_labels).most_common(1)[0]
    answers = [label] * len(labels)
    return {
        "label": label,
        "exact_match": exact_match(answers, labels),
        "macro_f1": accuracy_and_f1(answers, labels)[1],
    }
