"""What the commands show while they run: bars, and a line for what is done; and a table at the end."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from transformers import TrainerCallback, TrainerState

from softprompt.cli.notes import loss_note, say
from softprompt.tasks.sweep import Run

SHOWN = 200  # characters of a text that was written, or of its target


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar for a block, which gets a function that moves it on."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(description, total=total)
        yield lambda done: progress.update(bar, advance=done)


class _Bars(TrainerCallback):
    """Bars that are shown for a block, one of them that of the steps."""

    _steps: TaskID

    def __init__(self, *columns: ProgressColumn) -> None:
        console = Console(stderr=True)
        shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns)
        self._bars = Progress(*shown, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Any:
        self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bars.stop()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        """Move the bar of the steps."""
        self._bars.update(self._steps, total=state.max_steps, completed=state.global_step)


class TrainingProgress(_Bars):
    """Progress bars of the steps and of each evaluation, and a line with the scores after it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self._vocabulary = vocabulary
        self._steps = self._bars.add_task("training", total=None, note="")
        self._evaluation = self._bars.add_task("evaluation", total=None, note="", visible=False)

    def evaluated(self, rows: int, total: int) -> None:
        """Move the bar of the evaluation by `rows` of all the `total` rows that it goes through."""
        if self._bars.tasks[self._evaluation].finished:  # another evaluation follows at once
            self._bars.reset(self._evaluation)
        self._bars.update(self._evaluation, advance=rows, total=total, visible=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Show the newest training loss."""
        if logs and "loss" in logs:
            self._bars.update(self._steps, note=f"loss {logs['loss']:.4f}")
            note = loss_note(logs["loss"], self._vocabulary) if state.global_step == 1 else None
            if note is not None:
                say([note])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        """Print the scores of the watched rows."""
        self._bars.reset(self._evaluation, visible=False)
        if not metrics:
            return
        rows = "validation rows" if "eval_validation_loss" in metrics else "evaluation rows"
        prefix = "eval_validation" if "eval_validation_loss" in metrics else "eval"
        labelled = ""
        if f"{prefix}_exact_match" in metrics:
            labelled = (
                f"accuracy {metrics[f'{prefix}_exact_match']:.1%}, "
                f"macro-F1 {metrics[f'{prefix}_macro_f1']:.3f}, "
            )
        self._bars.console.print(
            f"step {state.global_step}: {labelled}loss {metrics[f'{prefix}_loss']:.4f} "
            f"on {metrics[f'{prefix}_rows']} {rows}",
            highlight=False,
        )


class SweepProgress(_Bars):
    """Progress bars of the finished runs and of the steps of those in training."""

    def __init__(self, total: int) -> None:
        super().__init__(TimeElapsedColumn())
        self._runs = self._bars.add_task("runs", total=total)
        self._steps = self._bars.add_task("steps", total=None)

    def finished(self, run: Run, record: dict[str, Any]) -> None:
        """Count one run and print its scores."""
        self._bars.update(self._runs, advance=1)
        settings = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in run.values.items())
        scores = "diverged"
        if not record["diverged"]:
            scores = f"accuracy {record['eval_exact_match']:.1%}, loss {record['eval_loss']:.4f}"
        text = f"{settings}, seed {run.seed}: {scores}"
        self._bars.console.print(text, highlight=False, markup=False)


def print_summary(metrics: dict[str, Any], output: Path) -> None:
    """Print the table at the end of a training run."""
    table = RichTable(title="Soft prompt trained", show_header=False, title_justify="left")
    rows = {
        "model": metrics["model"],
        "rows": f"{metrics['train_rows']} for training, {metrics['eval_rows']} for evaluation",
        "virtual tokens": ("" if metrics["prompts"] == 1 else f"{metrics['prompts']} x ")
        + f"{metrics['num_virtual_tokens']} ({metrics['trainable_parameters']:,} parameters)",
        "steps": f"{metrics['steps']} in {metrics['seconds']:.1f} s"
        + ("" if metrics["best_step"] is None else f"; the prompt of step {metrics['best_step']} was kept"),
        "training loss": _shown(metrics["train_loss"], ".4f"),
        "evaluation loss": _shown(metrics["eval_loss"], ".4f"),
        **(_written_rows(metrics) if "eval_rouge_l" in metrics else _labelled_rows(metrics)),
        "adapter": str(output),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for sample in metrics.get("eval_samples") or []:
        shown = (
            f"{name:>8}: {textwrap.shorten(sample[name], SHOWN)}" for name in ("text", "target", "written")
        )
        console.print("\n".join(shown), highlight=False, markup=False, soft_wrap=True)


def _labelled_rows(metrics: dict[str, Any]) -> dict[str, str]:
    predicted = (metrics["eval_predicted"] or {}).items()
    return {
        "accuracy": _shown(metrics["eval_exact_match"], ".1%") + _beside(metrics),
        "macro-F1": _shown(metrics["eval_macro_f1"], ".3f"),
        "accuracy in training": _shown(metrics["train_exact_match"], ".1%"),
        "predicted": ", ".join(f"{label} {n:,}" for label, n in predicted) or "-",
    }


def _written_rows(metrics: dict[str, Any]) -> dict[str, str]:
    zero_shot = metrics["zero_shot"] or {}
    rows = {
        title: _shown(metrics[f"eval_{name}"], form)
        + (f" (without a prompt {zero_shot[name]:{form}})" if zero_shot else "")
        for title, name, form in (
            ("exact match", "exact_match", ".1%"),
            ("ROUGE-L", "rouge_l", ".3f"),
            ("BLEU", "bleu", ".1f"),
        )
    }
    if zero_shot:
        rows["written"] = f"{metrics['eval_written_rows']} rows (without a prompt {zero_shot['rows']})"
    return rows


def _beside(metrics: dict[str, Any]) -> str:
    """What the accuracy is to be compared with."""
    if metrics["majority"] is None:
        return ""
    zero_shot = metrics["zero_shot"]
    return (
        f" (without a prompt {zero_shot['exact_match']:.1%} of {zero_shot['rows']} rows; always "
        f"{metrics['majority']['label']!r} {metrics['majority']['exact_match']:.1%})"
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
