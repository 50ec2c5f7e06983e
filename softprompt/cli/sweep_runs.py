"""The runs of `softprompt sweep`: told apart, trained together, and kept."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from softprompt.cli.build import trainer_of
from softprompt.cli.checks import UsageError
from softprompt.cli.initial import Start, prompt_starts, with_prompts
from softprompt.cli.inputs import Setup, read_tables, set_up
from softprompt.cli.progress import SweepProgress
from softprompt.cli.resume import fingerprint
from softprompt.cli.sweep_config import SweepConfig
from softprompt.cli.training_config import NOT_SWEPT, TrainingConfig
from softprompt.engine import plan_for
from softprompt.tasks.folders import publish_folder, staging
from softprompt.tasks.metrics import to_json
from softprompt.tasks.sweep import RECORD, Run, batches_of_runs, grid, read_record
from softprompt.tasks.trainer import Member, PromptTrainer

# Of those a batch stream, or an optimizer, has one.
SAME = ["batch_size", "epochs", "steps", "optimizer", "schedule"]
SHIPPED = "the shipped tiny model"
MARKS = ("weights", "tokens", "start", "no_patch")


def marks_of(setup: Setup) -> dict[str, Any]:
    """Marks of what names and options do not tell: files may change and keep their names.

    The shipped model and a run without these options have none.
    """
    config = setup.config
    marks: dict[str, Any] = {}
    if config.model is not None:
        numbers = hashlib.sha256()
        for name, tensor in sorted(setup.base.state_dict().items()):
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
            numbers.update(name.encode() + some.double().cpu().numpy().tobytes())
        marks["weights"] = numbers.hexdigest()[:12]
        ids = [setup.encoder.prompt(row) for row in setup.train_table.rows[:64]]
        marks["tokens"] = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
    if config.init_from:
        start = Path(config.init_from)
        files = sorted(path for path in start.rglob("*") if path.is_file()) if start.is_dir() else [start]
        content = b"".join(path.read_bytes() for path in files if path.is_file())
        marks["start"] = hashlib.sha256(content).hexdigest()[:12]
    if config.compute.no_patch:
        marks["no_patch"] = True
    return marks


class Sweep:
    """All runs of one call, and everything that they share.

    Attributes:
        setup: what the runs share.
        runs: setting by setting, and of each seed by seed.
        folder: holds a folder for each finished run.
    """

    def __init__(
        self, training: TrainingConfig, config: SweepConfig, over: Mapping[str, Sequence[Any]]
    ) -> None:
        # Of what is left open, a sweep fills in only what it is not over.
        self.training, self.together = replace(training, validation_share=0.0), config.together
        training = self.training.with_values({name: values[0] for name, values in over.items()})
        self.folder = Path(config.output) / "runs"
        training, train_table, eval_table = read_tables(training)
        if training.task == "generate":
            raise UsageError(
                "a sweep compares accuracies, and generated texts have none: use softprompt train, or give "
                "--task classify if the targets are labels"
            )
        if eval_table is None:
            raise UsageError("a sweep compares accuracies: give --eval-data, or a larger --eval-share")
        self.setup = set_up(training, train_table, eval_table)
        training = self.setup.config
        self.eval_table = eval_table
        # What the table calls the labels changes nothing that is learnt.
        task = {name: v for name, v in self.setup.encoder.task.record().items() if name != "label_names"}
        settings = {
            **_swept(training.settings),
            "model": SHIPPED if training.model is None else self.setup.model_name,
            "task": task,
            "rows": fingerprint(self.setup.drawn_table),
            "eval_rows": fingerprint(eval_table),
            **marks_of(self.setup),
        }
        self.runs = grid(over, range(training.seed, training.seed + config.seeds), settings)

    def missing(self) -> list[Run]:
        """Return the runs that have not finished."""
        return [run for run in self.runs if read_record(self.folder / run.name) is None]

    def records(self) -> dict[str, dict[str, Any]]:
        """Return what the finished runs left, by their names."""
        found = {run.name: read_record(self.folder / run.name) for run in self.runs}
        return {name: record for name, record in found.items() if record is not None}

    def describe(self) -> dict[str, Any]:
        """Return what the table says of all runs."""
        training, settings = self.setup.config, self.runs[0].settings
        swept = {*self.runs[0].values, "seed", "model", "task", "rows", "eval_rows", *MARKS}
        return {
            "title": f"{Path(settings['model']).name}, {len(self.eval_table)} evaluation rows",
            "model": training.model or SHIPPED,
            "data": training.data or "the shipped table",
            "train_rows": len(self.setup.train_table),
            "eval_rows": len(self.eval_table),
            "seeds": sorted({run.seed for run in self.runs}),
            "fixed": {name: value for name, value in settings.items() if name not in swept},
            "positions": self.setup.encoder.task.positions,
        }

    def starts(self, runs: Sequence[Run]) -> dict[str, Start]:
        """Return where each run starts.

        Raises:
            UsageError: a run cannot be started.
        """
        return {run.name: prompt_starts(self.setup, self._config_of(run), [run.name])[0] for run in runs}

    def batches(self, runs: Sequence[Run]) -> list[list[Run]]:
        """Return the runs that are trained together."""
        task, compute = self.setup.encoder.task, self.training.compute
        packed = plan_for(self.setup.base).route == "packed" and not compute.no_patch
        # In fp16 a run with too large a gradient would make every other skip the step, too.
        together = self.together if packed and compute.dtype != "float16" else 1
        # Where pads count, a row's positions depend on the longest row of its batch.
        one_order = task.positions == "padded" and task.padding == "longest"
        same = [*SAME, "seed"] if one_order else SAME
        return batches_of_runs(runs, same, together=together)

    def train(self, runs: Sequence[Run], starts: Mapping[str, Start]) -> None:
        """Train runs from their `starts`, batch by batch, and keep each in a folder of its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with SweepProgress(len(runs)) as progress:
            for batch in self.batches(runs):
                self._train_together(batch, starts, progress)

    def _config_of(self, run: Run) -> TrainingConfig:
        config = self.training.with_values({**run.values, "seed": run.seed})
        return config.resolved(
            rows=len(self.setup.train_table),
            scale=self.setup.scale,
            dtype=self.setup.config.compute.dtype,
        )

    def _train_together(
        self, runs: Sequence[Run], starts: Mapping[str, Start], progress: SweepProgress
    ) -> None:
        configs = [self._config_of(run) for run in runs]
        trainer = trainer_of(
            self.setup,
            configs[0],
            with_prompts(self.setup, [starts[run.name] for run in runs]),
            [progress],
            members=[
                Member(run.name, run.seed, config.learning_rate or 0.0, config.weight_decay)
                for run, config in zip(runs, configs, strict=True)
            ],
            eval_strategy="no",
            save_strategy="no",
        )
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / len(runs)
        for run in runs:
            progress.finished(run, self._keep(run, trainer, seconds))

    def _keep(self, run: Run, trainer: PromptTrainer, seconds: float) -> dict[str, Any]:
        """Measure a run and write its folder; returns its record."""
        prompt, losses = trainer.prompts()[run.name], trainer.losses_of_run(run.name)
        diverged = run.name in trainer.diverged or not bool(torch.isfinite(prompt).all())
        steps_per_epoch = math.ceil(len(self.setup.drawn_table) / run.settings["batch_size"])
        last = losses[-steps_per_epoch:]
        scores: dict[str, Any] = {"loss": None, "perplexity": None, "exact_match": None}
        if not diverged:
            scores = trainer.measure_run(run.name, self.eval_table)
            diverged = not math.isfinite(scores["loss"])
        record = {
            "settings": run.settings,
            **{f"eval_{name}": value for name, value in scores.items()},
            "train_loss": sum(last) / len(last) if last else None,
            "steps": trainer.state.global_step,
            "trainable_parameters": prompt.numel(),
            "diverged": diverged,
            "seconds": seconds,
            "losses": losses,
        }
        training = {name: run.settings[name] for name in _swept(self.setup.config.settings)}
        with staging(self.folder) as stage:
            staged = trainer.save_run(run.name, stage, {"model": self.setup.model_name, "training": training})
            (staged / RECORD).write_text(to_json(record), encoding="utf-8")
            publish_folder(staged, self.folder / run.name)
        return record


def _swept(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in NOT_SWEPT}
