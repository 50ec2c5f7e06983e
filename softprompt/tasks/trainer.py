"""The Trainer of a prompt: evaluation by generated labels, checkpoints that are never half written."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from softprompt.prompts.adapters import INITIAL_PROMPT, prompt_parameter, write_npy
from softprompt.tasks.classification import ClassificationTask, Encoder
from softprompt.tasks.collate import LeftPadCollator
from softprompt.tasks.folders import publish_folder, remove_checkpoints, staging
from softprompt.tasks.inference import label_texts, mean_loss
from softprompt.tasks.metrics import exact_match, perplexity
from softprompt.tasks.table import Table

KEPT_CHECKPOINTS = 2
GENERATED_BATCHES = 4  # generation keeps neither gradients nor logits, so it has room for more rows at once


class PromptTrainer(Trainer):
    """A `transformers.Trainer` for one classification task.

    `evaluate` scores `eval_table` by the loss and perplexity of its labels and by the exact match of the
    labels that the model generates. A checkpoint folder appears under its name when it is complete, and holds
    `softprompt.json` and the initial prompt beside the adapter. `evaluated` is called with the rows done and
    the rows of all passes.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        encoder: Encoder,
        train_table: Table,
        eval_table: Table | None,
        record: dict[str, Any],
        callbacks: list[TrainerCallback],
        evaluated: Callable[[int, int], None],
    ) -> None:
        task: ClassificationTask = encoder.task
        collate = LeftPadCollator(
            encoder.pad_token_id, task.max_length if task.padding == "max_length" else None
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=encoder.examples(train_table.texts, train_table.labels or []),
            eval_dataset=[]
            if eval_table is None
            else encoder.examples(eval_table.texts, eval_table.labels or []),
            callbacks=callbacks,
        )
        self.encoder = encoder
        self.eval_table = eval_table
        self.record = record
        self.initial_prompt = prompt_parameter(model).detach().cpu().clone()
        self._evaluated = evaluated
        self._staging: Path | None = None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log loss, perplexity, exact match and seconds of the evaluation table."""
        if self.eval_table is None:
            return {}
        start = time.perf_counter()
        passes = 2 * len(self.eval_table)

        def progress(rows: int) -> None:
            self._evaluated(rows, passes)

        batch_size = self.args.per_device_eval_batch_size
        loss = mean_loss(
            self.model,
            self.data_collator,
            self.eval_dataset,
            batch_size=batch_size,
            progress=progress,
        )
        predicted = label_texts(
            self.model,
            self.encoder,
            self.eval_table.texts,
            batch_size=GENERATED_BATCHES * batch_size,
            progress=progress,
        )
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": perplexity(loss),
            f"{metric_key_prefix}_exact_match": exact_match(predicted, self.eval_table.labels or []),
            f"{metric_key_prefix}_seconds": time.perf_counter() - start,
        }
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def save_adapter(self, folder: Path) -> None:
        """Write PEFT's adapter files and what softprompt adds to them into an existing folder."""
        self.model.save_pretrained(str(folder))
        self._save_own_files(folder)

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
        remove_checkpoints(output, keep=KEPT_CHECKPOINTS)

    def _save_own_files(self, folder: Path) -> None:
        self.encoder.task.save(folder, **self.record)
        write_npy(self.initial_prompt, folder / INITIAL_PROMPT)


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
