"""The one trainer: K prompts of a model in one batch stream, of which a single prompt is the case K = 1.

Several prompts are an ensemble, which is trained, evaluated and saved as one, or runs of their own, as in a
sweep. What saves a checkpoint leaves it complete or not there at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from softprompt import ensemble
from softprompt.prompt_paths import WEIGHTS
from softprompt.prompts.adapters import INITIAL_PROMPT, prompt_parameter, write_npy
from softprompt.tasks.callbacks import Patience
from softprompt.tasks.classification import Encoder
from softprompt.tasks.collate import LeftPadCollator, StreamSampler
from softprompt.tasks.errors import TaskError
from softprompt.tasks.evaluation import Evaluation
from softprompt.tasks.folders import (
    TRAINER_STATE,
    adapter_folders,
    publish_folder,
    remove_checkpoints,
    staging,
)
from softprompt.tasks.table import Table, sample_rows

KEPT_CHECKPOINTS = 2
WATCHED_ROWS = 128  # measured again and again while a prompt is trained
WRITTEN_ROWS = 32  # written without a prompt, which rarely ends a text before the longest target is over


@dataclass(frozen=True)
class Member:
    """What a prompt that is a run of its own does not share with the others.

    Attributes:
        adapter: the name of its adapter.
        seed: of the order of its rows.
        learning_rate: the first one.
        weight_decay: of the optimizer.
    """

    adapter: str
    seed: int
    learning_rate: float
    weight_decay: float


class PromptTrainer(Trainer):
    """A `transformers.Trainer` of all prompts of a model at once, each as if it were the only one.

    AdamW and Adafactor keep their state parameter by parameter, so one optimizer over K prompts is K
    optimizers. Losses are means over the prompts; `prompt_losses` beside them has each one's of an ensemble.

    `evaluate`, which runs while a prompt is trained, measures the rows of `validation_table`, whose loss
    decides which checkpoint is best, or some of `eval_table` where there are none; `evaluate_all` measures
    all of `eval_table`. See `Evaluation` for what is measured. A checkpoint folder appears under its name
    when it is complete, and holds `softprompt.json` and the initial prompt beside each adapter.

    Args:
        model: a PEFT model; all of its adapters are trained.
        args: as for Trainer.
        encoder: of the task.
        train_table: the rows to learn.
        drawn_table: the same rows as often as an epoch draws them, in the order of the seed; None: once.
        eval_table: None measures nothing.
        validation_table: see above.
        record: `model` and `training` for `softprompt.json`.
        callbacks: as for Trainer.
        evaluated: called with the rows done in each batch of an evaluation, and all rows of it.
        members: where the prompts are runs of their own: a batch has as many rows in the order of each seed,
            which are packed behind the prompts of the runs with it, and a run whose loss is no number is left
            where it is.

    Attributes:
        adapters: names of the K prompts.
        diverged: adapters of the runs that were left.

    Raises:
        TaskError: there are several processes.
    """

    train_dataset: Any
    optimizer: Any

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        encoder: Encoder,
        train_table: Table,
        drawn_table: Table | None = None,
        eval_table: Table | None,
        validation_table: Table | None = None,
        record: dict[str, Any],
        callbacks: list[TrainerCallback],
        evaluated: Callable[[int, int], None] | None = None,
        members: Sequence[Member] = (),
    ) -> None:
        if args.world_size > 1:
            raise TaskError(
                f"{type(self).__name__} trains in one process, got {args.world_size}: its prompts would not "
                "be the same on all ranks; transformers' Trainer with a patched model trains in several"
            )
        collate = LeftPadCollator.of(encoder)
        drawn_table = train_table if drawn_table is None else drawn_table
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=encoder.examples(drawn_table.rows, drawn_table.labels or []),
            eval_dataset=[],  # `evaluate` reads the tables
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.encoder = encoder
        self.train_table = train_table
        self.validation_table = validation_table
        self.eval_table = eval_table
        self.record = record
        self.adapters = list(model.peft_config)
        self.initial_prompts = [
            prompt_parameter(model, name).detach().cpu().clone() for name in self.adapters
        ]
        self.members = {member.adapter: member for member in members}
        self.seeds = sorted({member.seed for member in members})
        self.is_ensemble = not members and len(self.adapters) > 1
        self.evaluation = Evaluation(model, encoder, batch_size=args.per_device_eval_batch_size)
        watched = validation_table if validation_table is not None else eval_table
        self.watched = None if watched is None else sample_rows(watched, WATCHED_ROWS, args.seed)
        self.diverged: set[str] = set()
        self._losses: list[Tensor] = []  # [K] of each batch, not a number for a run that was left
        self._first_logged = 0
        self._last: tuple[int, Table | None, dict[str, Any]] = (
            0,
            None,
            {},
        )  # step, what was measured, scores
        self._evaluated = evaluated
        self._staging: Path | None = None
        if len(self.adapters) > 1:
            # Else Trainer would divide what is divided by the labels of all accumulated batches already.
            self.model_accepts_loss_kwargs = True

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
        self.args.eval_on_start = checkpoint is None and self.watched is not None
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """For runs of their own one group of the optimizer for each, with the settings of the run."""
        if not self.members:
            return super().create_optimizer(model)  # type: ignore[no-any-return]
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {
                    "params": [prompt],
                    "lr": self.members[name].learning_rate,
                    "weight_decay": self.members[name].weight_decay,
                }
                for name, prompt in self.prompts().items()
            ]
            self.optimizer = kind(groups, **settings)
        return self.optimizer  # type: ignore[no-any-return]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if len(self.seeds) > 1:
            batch_size = self.args.per_device_train_batch_size // len(self.seeds)
            return StreamSampler(len(self.train_dataset), self.seeds, batch_size)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the sum of the prompts' mean losses, without the runs that have diverged."""
        if not self.members and len(self.adapters) == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        names = [name for name in self.adapters if name not in self.diverged]
        total, each = self._losses_of(names, inputs, num_items_in_batch)
        if self.members and not bool(torch.isfinite(each).all()):
            # What is no number crosses every mask: only alone does a run show whether it is the one.
            alone = [self._losses_of([name], inputs, num_items_in_batch)[1] for name in names]
            sound = [name for name, loss in zip(names, alone, strict=True) if bool(torch.isfinite(loss))]
            self.diverged |= set(names) - set(sound)
            names = sound
            total, each = self._losses_of(names, inputs, num_items_in_batch)
        if not self._losses:
            self._first_logged = self.state.global_step
        if len(names) < len(self.adapters):
            all_of_them = each.new_full([len(self.adapters)], torch.nan)
            all_of_them[[self.adapters.index(name) for name in names]] = each
            each = all_of_them
        self._losses.append(each)
        return (total, {}) if return_outputs else total

    def _losses_of(
        self, names: Sequence[str], inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor]:
        """The sum of the mean losses of some prompts, [], and each of them, [K], detached."""
        if not names:
            self.control.should_training_stop = True
            nothing = sum(prompt.sum() * 0 for prompt in self.prompts().values())
            return torch.nan_to_num(torch.as_tensor(nothing)), torch.zeros(0)
        several = len(self.seeds) > 1
        if several:  # the rows of each run, run by run, out of those of each seed, seed by seed
            streams = [self.seeds.index(self.members[name].seed) for name in names]
            inputs = {
                key: torch.cat([tensor.chunk(len(self.seeds))[stream] for stream in streams])
                for key, tensor in inputs.items()
            }
        if len(names) == 1:
            self.model.set_adapter(names[0])
            loss = self.model(**inputs).loss
            return loss, loss.detach()[None]
        found = ensemble.losses(
            self.model,
            **inputs,
            adapters=names,
            own_rows=several,
            positions=self.encoder.task.positions,
            num_items_in_batch=None if self.members else num_items_in_batch,
        )
        return found.total, found.each

    def losses_of_run(self, name: str) -> list[float]:
        """Return the losses of the steps of one of the runs, until it diverged."""
        column = [float(each[self.adapters.index(name)]) for each in self._losses]
        return [loss for loss in column if math.isfinite(loss)]

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log the mean over the prompts, and each prompt's own loss of an ensemble, instead of the sum."""
        for name in ("loss", "train_loss"):
            if name in logs:
                logs[name] /= len(self.adapters)
        if "loss" in logs and self.is_ensemble and self._losses:
            steps = self.state.global_step - self._first_logged
            logs["prompt_losses"] = (torch.stack(self._losses).sum(0) / steps).tolist()
            self._losses.clear()
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log the scores of the watched rows, and the seconds that they took.

        The names of those of validation rows begin with `eval_validation_`.
        """
        if self.watched is None:
            return {}
        if self.validation_table is not None:
            metric_key_prefix += "_validation"
        metrics = self._measured(self.watched, metric_key_prefix)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def evaluate_all(self) -> dict[str, Any]:
        """Return and log the scores of the whole evaluation table, unless `evaluate` has just measured it.

        Those of what is written for some of its rows, of a generation task, are with them, but not logged.
        """
        if self.eval_table is None:
            return {}
        step, table, scores = self._last
        if step != self.state.global_step or table is not self.eval_table:
            scores = self._measured(self.eval_table, "eval")
        if not self.encoder.task.generates:
            return scores
        table = sample_rows(self.eval_table, WATCHED_ROWS, self.args.seed)
        written = self.evaluation.written(table, self._measured_adapters, self._progress(table))
        written |= {"written_rows": len(table)}
        return {**scores, **{f"eval_{name}": value for name, value in written.items()}}

    def zero_shot(self) -> dict[str, Any] | None:
        """Return the scores of the frozen model alone on some of the evaluation rows; None without any."""
        if self.eval_table is None:
            return None
        rows = WRITTEN_ROWS if self.encoder.task.generates else WATCHED_ROWS
        table = sample_rows(self.eval_table, rows, self.args.seed)
        return {**self.evaluation.zero_shot(table, self._progress(table)), "rows": len(table)}

    def evaluate_trained(self) -> dict[str, Any]:
        """Return the scores of some of the training rows."""
        table = sample_rows(self.train_table, WATCHED_ROWS, self.args.seed)
        scores = self.evaluation.measure(table, self._measured_adapters, self._progress(table))
        return {**scores, "rows": len(table)}

    def _progress(self, table: Table) -> Callable[[int], None]:
        def progress(rows: int) -> None:
            if self._evaluated is not None:
                self._evaluated(rows, len(table))

        return progress

    def _measured(self, table: Table, prefix: str) -> dict[str, Any]:
        start = time.perf_counter()
        metrics = self.evaluation.measure(table, self._measured_adapters, self._progress(table))
        metrics |= {"rows": len(table), "seconds": time.perf_counter() - start}
        metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
        self.log({name: value for name, value in metrics.items() if not name.endswith("_confusion")})
        self._last = (self.state.global_step, table, metrics)
        return metrics

    @property
    def _measured_adapters(self) -> list[str]:
        return self.adapters if self.is_ensemble else [self.model.active_adapter]

    def measure_run(self, name: str, table: Table) -> dict[str, Any]:
        """Return the scores of a table with the prompt of one of the runs."""
        return self.evaluation.measure(table, [name])

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

    def save_run(self, name: str, folder: Path, record: dict[str, Any]) -> Path:
        """Write the adapter of one of the runs into a folder of its name in `folder`, and return that."""
        self.model.save_pretrained(str(folder), selected_adapters=[name])
        self.encoder.task.save(folder / name, **record)
        write_npy(self.initial_prompts[self.adapters.index(name)], folder / name / INITIAL_PROMPT)
        return folder / name

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
