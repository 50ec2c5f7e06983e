"""What `softprompt train` shows while it runs, and at the end."""

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """Progress bars of the steps and of each evaluation, and a line with the scores after it."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._training = self._progress.add_task("training", total=None, note="")
        self._evaluation = self._progress.add_task("evaluation", total=None, note="", visible=False)

    def __enter__(self) -> "TrainingProgress":
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bars away."""
        self._progress.stop()

    def evaluated(self, rows: int, total: int) -> None:
        """Move the bar of the evaluation by `rows` of all the `total` rows that it goes through."""
        self._progress.update(self._evaluation, advance=rows, total=total, visible=True)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move the bar of the steps."""
        self._progress.update(self._training, total=state.max_steps, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest training loss."""
        if logs and "loss" in logs:
            self._progress.update(self._training, note=f"loss {logs['loss']:.4f}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the scores of the epoch."""
        self._progress.reset(self._evaluation, visible=False)
        if metrics and state.epoch is not None:
            parts = []
            if "eval_loss" in metrics:
                parts = [
                    f"accuracy {metrics['eval_exact_match']:.1%}",
                    f"loss {metrics['eval_loss']:.4f}",
                    f"perplexity {metrics['eval_perplexity']:.4g}",
                ]
            if "eval_validation_loss" in metrics:
                parts.append(f"validation loss {metrics['eval_validation_loss']:.4f}")
            self._progress.console.print(f"epoch {state.epoch:g}: {', '.join(parts)}", highlight=False)


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
        "perplexity": _shown(metrics["eval_perplexity"], ".4g"),
        "accuracy": _shown(metrics["eval_exact_match"], ".1%"),
        "adapter": str(output),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
