"""The Trainer of a prompt ensemble: one batch stream, one forward and one backward for all prompts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softprompt import ensemble
from softprompt.tasks.metrics import exact_match, perplexity
from softprompt.tasks.scoring import label_log_likelihoods
from softprompt.tasks.table import Table
from softprompt.tasks.trainer import PromptTrainer


class EnsembleTrainer(PromptTrainer):
    """A `PromptTrainer` of all adapters of its model at once.

    AdamW and Adafactor keep their state parameter by parameter, so one optimizer over N prompts is N
    optimizers, and each prompt is trained as if it were the only one. Losses are means over the prompts;
    `prompt_losses` beside them has each one's. Labels are those that most prompts prefer.
    """

    passes = 1

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.adapters = list(self.model.peft_config)
        # Else Trainer would divide what is divided by the labels of all accumulated batches already.
        self.model_accepts_loss_kwargs = True
        self._losses: list[Tensor] = []
        self._logged_step = 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the sum of the prompts' mean losses."""
        losses = ensemble.losses(
            self.model,
            **inputs,
            adapters=self.adapters,
            positions=self.encoder.task.positions,
            num_items_in_batch=num_items_in_batch,
        )
        if not self._losses:
            self._logged_step = self.state.global_step
        self._losses.append(losses.each)
        return (losses.total, {}) if return_outputs else losses.total

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log the mean over the prompts and each prompt's own loss instead of the sum."""
        for name in ("loss", "train_loss"):
            if name in logs:
                logs[name] /= len(self.adapters)
        if "loss" in logs and self._losses:
            steps = self.state.global_step - self._logged_step
            logs["prompt_losses"] = (torch.stack(self._losses).sum(0) / steps).tolist()
            self._losses.clear()
        super().log(logs, *args, **kwargs)

    def loss_of(self, table: Table, progress: Callable[[int], None]) -> float:
        """Return the mean over the prompts of the mean loss over all target tokens of a table."""
        losses = self._losses_of(table, self._scores(table, progress))
        return sum(losses) / len(losses)

    def measure(self, table: Table, progress: Callable[[int], None]) -> dict[str, Any]:
        """Return loss and perplexity, and the exact match of the labels that most prompts prefer."""
        scores = self._scores(table, progress)
        losses = self._losses_of(table, scores)
        labels = self.encoder.task.labels

        def accuracy(log_likelihoods: Tensor) -> float:
            chosen, _ = ensemble.combine(log_likelihoods.softmax(2))
            return exact_match([labels[number] for number in chosen.tolist()], table.labels or [])

        loss = sum(losses) / len(losses)
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "exact_match": accuracy(scores),
            "prompt_losses": losses,
            "prompt_exact_match": [accuracy(scores[k : k + 1]) for k in range(len(scores))],
        }

    def _scores(self, table: Table, progress: Callable[[int], None]) -> Tensor:
        return label_log_likelihoods(
            self.model,
            self.encoder,
            table.rows,
            adapters=self.adapters,
            batch_size=self.args.per_device_eval_batch_size,
            progress=progress,
        )

    def _losses_of(self, table: Table, scores: Tensor) -> list[float]:
        """The loss of each prompt, in nats per target token."""
        labels = table.labels or []
        numbers = torch.tensor([self.encoder.task.labels.index(label) for label in labels])
        tokens = sum(len(self.encoder.targets[label]) for label in labels)
        total = scores.gather(2, numbers.expand(len(scores), -1)[:, :, None]).sum((1, 2))
        losses: list[float] = (-total / tokens).tolist()
        return losses
