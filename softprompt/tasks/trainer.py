"""The Trainer of a prompt: evaluation by generated labels, checkpoints that are never half written."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from softprompt.prompt_paths import WEIGHTS
from softprompt.prompts.adapters import INITIAL_PROMPT, prompt_parameter, write_npy
from softprompt.tasks.classification import ClassificationTask, Encoder
from softprompt.tasks.collate import LeftPadCollator
from softprompt.tasks.errors import TaskError
from softprompt.tasks.folders import (
    TRAINER_STATE,
    adapter_folders,
    publish_folder,
    remove_checkpoints,
    staging,
)
from softprompt.tasks.inference import label_texts, mean_loss
from softprompt.tasks.metrics import exact_match, perplexity
from softprompt.tasks.table import Table

KEPT_CHECKPOINTS = 2
GENERATED_BATCHES = 4  # generation keeps neither gradients nor logits, so it has room for more rows at once


class PromptTrainer(Trainer):
    """A `transformers.Trainer` for one classification task.

    `evaluate` scores `eval_table` by the loss and perplexity of its labels and by the exact match of the
    labels that the model generates, and `validation_table`, whose loss decides which checkpoint is best, by
    its loss alone. A checkpoint folder appears under its name when it is complete, and holds
    `softprompt.json` and the initial prompt beside each adapter. `evaluated` is called with the rows done and
    the rows of all passes.
    """

    passes = 2  # over the evaluation table, by `measure`

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        encoder: Encoder,
        train_table: Table,
        eval_table: Table | None,
        validation_table: Table | None = None,
        record: dict[str, Any],
        callbacks: list[TrainerCallback],
        evaluated: Callable[[int, int], None],
    ) -> None:
        if args.world_size > 1:
            raise TaskError(
                f"{type(self).__name__} trains in one process, got {args.world_size}: its prompts would not "
                "be the same on all ranks; transformers' Trainer with a patched model trains in several"
            )
        task: ClassificationTask = encoder.task
        collate = LeftPadCollator(
            encoder.pad_token_id, task.max_length if task.padding == "max_length" else None
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=encoder.examples(train_table.rows, train_table.labels or []),
            eval_dataset=[]
            if eval_table is None
            else encoder.examples(eval_table.rows, eval_table.labels or []),
            callbacks=callbacks,
        )
        self.encoder = encoder
        self.validation_table = validation_table
        self.eval_table = eval_table
        self.record = record
        self.initial_prompts = [
            prompt_parameter(model, name).detach().cpu().clone() for name in model.peft_config
        ]
        self._evaluated = evaluated
        self._staging: Path | None = None

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint if there is one; that of a finished run is only loaded.

        Trainer would make another step where the last one lies within an epoch.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
            callbacks = self.callback_handler.callbacks
            worn = any(isinstance(each, Patience) and each.is_worn(self.args, state) for each in callbacks)
            if worn or state.global_step >= state.max_steps:
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log loss, perplexity, exact match and seconds of the evaluation table.

        `eval_validation_loss` is the loss of the validation table.
        """
        if self.eval_table is None and self.validation_table is None:
            return {}
        start = time.perf_counter()
        passes = self.passes * len(self.eval_table or ()) + len(self.validation_table or ())

        def progress(rows: int) -> None:
            self._evaluated(rows, passes)

        metrics: dict[str, float] = {}
        if self.validation_table is not None:
            metrics["validation_loss"] = self.loss_of(self.validation_table, progress)
        if self.eval_table is not None:
            metrics |= self.measure(self.eval_table, progress)
        metrics["seconds"] = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def loss_of(self, table: Table, progress: Callable[[int], None]) -> float:
        """Return the mean loss over all target tokens of a table."""
        examples = self.encoder.examples(table.rows, table.labels or [])
        batch_size = self.args.per_device_eval_batch_size
        return mean_loss(self.model, self.data_collator, examples, batch_size=batch_size, progress=progress)

    def measure(self, table: Table, progress: Callable[[int], None]) -> dict[str, float]:
        """Return loss, perplexity and exact match of a table, which is gone through `passes` times."""
        loss = self.loss_of(table, progress)
        predicted = label_texts(
            self.model,
            self.encoder,
            table.rows,
            batch_size=GENERATED_BATCHES * self.args.per_device_eval_batch_size,
            progress=progress,
        )
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "exact_match": exact_match(predicted, table.labels or []),
        }

    def prompts(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained prompts by the names of their adapters."""
        return {name: encoder.embedding.weight for name, encoder in self.model.prompt_encoder.items()}

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss; None without a validation table."""
        return self.state.best_global_step if self.validation_table is not None else None

    def restore_best(self) -> None:
        """Put the prompts of the best checkpoint back, where there is a validation table."""
        if self.best_step is None or self.best_step == self.state.global_step:
            return
        folders = adapter_folders(Path(self.args.output_dir) / f"checkpoint-{self.best_step}")
        for folder, prompt in zip(folders, self.prompts().values(), strict=True):
            saved = load_file(folder / WEIGHTS[0])["prompt_embeddings"]
            with torch.no_grad():
                prompt.copy_(saved)

    def save_adapter(self, folder: Path) -> None:
        """Write PEFT's adapter files and what softprompt adds to them into an existing folder."""
        self.model.save_pretrained(str(folder))
        self._save_own_files(folder)

    def _save_own_files(self, folder: Path) -> None:
        self.encoder.task.save(folder, **self.record)
        for path, start in zip(adapter_folders(folder), self.initial_prompts, strict=True):
            self.encoder.task.save(path, **self.record)
            write_npy(start, path / INITIAL_PROMPT)

    def _get_output_dir(self, trial: Any) -> str:
        return str(super()._get_output_dir(trial) if self._staging is None else self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(self.args.output_dir)
        with staging(output) as stage:
            self._staging = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            staged = stage / f"checkpoint-{self.state.global_step}"
            self._save_own_files(staged)
            publish_folder(staged, output / staged.name)
        best = None if self.best_step is None else output / f"checkpoint-{self.best_step}"
        remove_checkpoints(output, keep=KEPT_CHECKPOINTS, also=best)


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """transformers' early stopping, which counts on from the log when a run is resumed."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count the evaluations since the best one."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = self._since_best(args, state)

    def is_worn(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Return whether a run in this state has stopped."""
        return self._since_best(args, state) >= self.early_stopping_patience

    def _since_best(self, args: TrainingArguments, state: TrainerState) -> int:
        metric = f"eval_{args.metric_for_best_model}"
        best = state.best_global_step or 0
        return sum(entry["step"] > best for entry in state.log_history if metric in entry)


class StopAtStepEnd(TrainerCallback):
    """Ends training at the next step boundary, with a checkpoint, once `requested` is set."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Save and stop."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Take back the evaluation and the checkpoint that Trainer puts after an epoch cut short."""
        if self.requested and state.epoch is not None and state.epoch % 1 != 0:
            control.should_evaluate = False
            control.should_save = False
            control.should_log = False
        return control
