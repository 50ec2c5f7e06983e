"""The runs of `softprompt sweep`: told apart, trained together, and kept."""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from softprompt.cli.build import (
    check_prompt_fits,
    prompt_config,
    read_tables,
    task_of,
    training_arguments,
)
from softprompt.cli.errors import UsageError
from softprompt.cli.initial import initial_prompt
from softprompt.cli.models import (
    choose_device,
    choose_dtype,
    load_model,
    load_tokenizer,
    patch,
    set_threads,
)
from softprompt.cli.notes import say_rows
from softprompt.cli.paths import check_model
from softprompt.cli.resume import RESUME_SETTINGS, fingerprint
from softprompt.cli.sweep import with_values
from softprompt.engine import plan_for
from softprompt.prompts.adapters import INITIAL_PROMPT, set_prompt, write_npy
from softprompt.tasks.classification import Encoder
from softprompt.tasks.folders import publish_folder, staging
from softprompt.tasks.metrics import to_json
from softprompt.tasks.sweep import RECORD, Run, batches_of_runs, grid, read_record
from softprompt.tasks.sweep_trainer import Member, SweepTrainer
from softprompt.tasks.template import Row

# Of those a batch stream, or an optimizer, has one.
SAME = ["batch_size", "epochs", "steps", "optimizer", "schedule"]
NOT_SWEPT = ("ensemble", "ensemble_texts", "validation_share", "patience")
SHIPPED = "the shipped tiny model"
MARKS = ("weights", "tokens", "start", "no_patch")


def marks_of(args: argparse.Namespace, base: Any, encoder: Encoder, rows: Sequence[Row]) -> dict[str, Any]:
    """Marks of what names and options do not tell: files may change and keep their names.

    The shipped model and a run without these options have none.
    """
    marks: dict[str, Any] = {}
    if args.model is not None:
        numbers = hashlib.sha256()
        for name, tensor in sorted(base.state_dict().items()):
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
            numbers.update(name.encode() + some.double().cpu().numpy().tobytes())
        marks["weights"] = numbers.hexdigest()[:12]
        ids = [encoder.prompt(row) for row in rows[:64]]
        marks["tokens"] = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
    if args.init_from:
        start = Path(args.init_from)
        files = sorted(path for path in start.rglob("*") if path.is_file()) if start.is_dir() else [start]
        content = b"".join(path.read_bytes() for path in files if path.is_file())
        marks["start"] = hashlib.sha256(content).hexdigest()[:12]
    if args.no_patch:
        marks["no_patch"] = True
    return marks


class Sweep:
    """All runs of one call, and everything that they share.

    Attributes:
        runs: setting by setting, and of each seed by seed.
        folder: holds a folder for each finished run.
    """

    def __init__(self, args: argparse.Namespace, over: dict[str, list[Any]]) -> None:
        self.args = args
        self.folder = Path(args.output) / "runs"
        self.train_table, eval_table = read_tables(args)
        if eval_table is None:
            raise UsageError("a sweep compares accuracies: give --eval-data, or a larger --eval-share")
        self.eval_table = eval_table
        self.model_name = check_model(args.model or _tiny_model())
        self.device = choose_device(args.device)
        set_threads(args.threads, tiny=args.model is None)
        dtype = choose_dtype(bf16=args.bf16, fp16=args.fp16, device=self.device)
        self.base = load_model(self.model_name, dtype)
        task = task_of(args, self.train_table, self.base)
        # What the table calls the labels changes nothing that is learnt.
        told_apart = {name: value for name, value in task.record().items() if name != "label_names"}
        self.encoder = Encoder(task, load_tokenizer(self.model_name))
        settings = {
            **{name: getattr(args, name) for name in RESUME_SETTINGS if name not in NOT_SWEPT},
            "model": SHIPPED if args.model is None else self.model_name,
            "task": told_apart,
            "rows": fingerprint(self.train_table),
            "eval_rows": fingerprint(self.eval_table),
            **marks_of(args, self.base, self.encoder, self.train_table.rows),
        }
        self.runs = grid(over, range(args.seed, args.seed + args.seeds), settings)

    def say_rows(self) -> None:
        """Print how many rows each label has, and the notes on the tables."""
        say_rows(self.encoder, self.train_table, self.eval_table)

    def missing(self) -> list[Run]:
        """Return the runs that have not finished."""
        return [run for run in self.runs if read_record(self.folder / run.name) is None]

    def records(self) -> dict[str, dict[str, Any]]:
        """Return what the finished runs left, by their names."""
        found = {run.name: read_record(self.folder / run.name) for run in self.runs}
        return {name: record for name, record in found.items() if record is not None}

    def describe(self) -> dict[str, Any]:
        """Return what the table says of all runs."""
        args, settings = self.args, self.runs[0].settings
        swept = {*self.runs[0].values, "seed", "model", "task", "rows", "eval_rows", *MARKS}
        return {
            "title": f"{Path(settings['model']).name}, {len(self.eval_table)} evaluation rows",
            "model": args.model or SHIPPED,
            "data": args.data or "the shipped table",
            "train_rows": len(self.train_table),
            "eval_rows": len(self.eval_table),
            "seeds": sorted({run.seed for run in self.runs}),
            "fixed": {name: value for name, value in settings.items() if name not in swept},
            "positions": self.encoder.task.positions,
        }

    def starts(self, runs: Sequence[Run]) -> dict[str, Tensor | None]:
        """Return the prompt that each run starts from, None where PEFT draws it.

        Raises:
            UsageError: a run cannot be started.
        """
        return {run.name: self._start(run) for run in runs}

    def batches(self, runs: Sequence[Run]) -> list[list[Run]]:
        """Return the runs that are trained together."""
        task = self.encoder.task
        packed = plan_for(self.base).route == "packed" and not self.args.no_patch
        # In fp16 a run with too large a gradient would make every other skip the step, too.
        together = self.args.together if packed and not self.args.fp16 else 1
        # Where pads count, a row's positions depend on the longest row of its batch.
        one_order = task.positions == "padded" and task.padding == "longest"
        same = [*SAME, "seed"] if one_order else SAME
        return batches_of_runs(runs, same, together=together)

    def train(self, runs: Sequence[Run], starts: dict[str, Tensor | None]) -> None:
        """Train runs from their `starts`, batch by batch, and keep each in a folder of its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with SweepProgress(len(runs)) as progress:
            for batch in self.batches(runs):
                self._train_together(batch, starts, progress)

    def _start(self, run: Run) -> Tensor | None:
        args = with_values(self.args, run)
        check_prompt_fits(args, self.base, self.model_name, self.encoder.tokenizer)
        return initial_prompt(args, self.base, self.encoder.tokenizer, self.train_table)

    def _train_together(
        self, runs: Sequence[Run], starts: dict[str, Tensor | None], progress: "SweepProgress"
    ) -> None:
        arguments = [with_values(self.args, run) for run in runs]
        model = self._model(runs, arguments, starts)
        trainer = SweepTrainer(
            members=[
                Member(run.name, run.seed, one.learning_rate, one.weight_decay)
                for run, one in zip(runs, arguments, strict=True)
            ],
            model=model,
            args=training_arguments(
                arguments[0],
                self.device,
                steps_per_epoch=math.ceil(len(self.train_table) / arguments[0].batch_size),
                eval_strategy="no",
                save_strategy="no",
            ),
            encoder=self.encoder,
            train_table=self.train_table,
            eval_table=self.eval_table,
            record={},
            callbacks=[progress],
            evaluated=lambda rows, total: None,
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / len(runs)
        for run, first in zip(runs, trainer.initial_prompts, strict=True):
            progress.finished(run, self._keep(run, trainer, first, seconds))

    def _model(
        self,
        runs: Sequence[Run],
        arguments: Sequence[argparse.Namespace],
        starts: dict[str, Tensor | None],
    ) -> Any:
        model: Any = None
        for run, args in zip(runs, arguments, strict=True):
            text = args.init_text if args.init == "text" else None
            config = prompt_config(args, self.model_name, args.init, text)
            set_seed(run.seed)
            if model is None:
                model = get_peft_model(self.base, config, adapter_name=run.name)
            else:
                model.add_adapter(run.name, config)
            start = starts[run.name]
            if start is not None:
                set_prompt(model, start, run.name)
        return patch(model, positions=self.encoder.task.positions, no_patch=self.args.no_patch)

    def _keep(self, run: Run, trainer: SweepTrainer, first: Tensor, seconds: float) -> dict[str, Any]:
        """Measure a run and write its folder; returns its record."""
        prompt = trainer.prompts()[run.name]
        losses = [float(loss) for loss in trainer.losses[run.name]]
        diverged = run.name in trainer.diverged or not bool(torch.isfinite(prompt).all())
        steps_per_epoch = math.ceil(len(self.train_table) / run.settings["batch_size"])
        last = losses[-min(steps_per_epoch, len(losses)) :]
        scores: dict[str, Any] = {"loss": None, "perplexity": None, "exact_match": None}
        if not diverged:
            scores = trainer.measure_run(run.name, self.eval_table, lambda rows: None)
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
        with staging(self.folder) as stage:
            trainer.model.save_pretrained(str(stage), selected_adapters=[run.name])
            staged = stage / run.name
            training = {name: run.settings[name] for name in RESUME_SETTINGS if name not in NOT_SWEPT}
            self.encoder.task.save(staged, model=self.model_name, training=training)
            write_npy(first, staged / INITIAL_PROMPT)
            (staged / RECORD).write_text(to_json(record), encoding="utf-8")
            publish_folder(staged, self.folder / run.name)
        return record


class SweepProgress(TrainerCallback):
    """Progress bars of the finished runs and of the steps of those in training."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._runs = self._progress.add_task("runs", total=total)
        self._steps = self._progress.add_task("steps", total=None)

    def __enter__(self) -> "SweepProgress":
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Take the bars away."""
        self._progress.stop()

    def finished(self, run: Run, record: dict[str, Any]) -> None:
        """Count one run and print its scores."""
        self._progress.update(self._runs, advance=1)
        settings = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in run.values.items())
        scores = "diverged"
        if not record["diverged"]:
            scores = f"accuracy {record['eval_exact_match']:.1%}, loss {record['eval_loss']:.4f}"
        text = f"{settings}, seed {run.seed}: {scores}"
        self._progress.console.print(text, highlight=False, markup=False)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move the bar of the steps."""
        self._progress.update(self._steps, total=state.max_steps, completed=state.global_step)


def _tiny_model() -> str:
    from softprompt.tiny import model_path

    return model_path()
