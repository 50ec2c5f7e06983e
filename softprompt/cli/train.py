"""`softprompt train`: from a table of texts and labels to a PEFT prompt-tuning adapter."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.checks import UsageError, check_inputs, check_output_folder, require_extra
from softprompt.cli.options import Command
from softprompt.cli.training_config import TrainingConfig
from softprompt.tasks.folders import (
    held,
    holds_adapter,
    latest_checkpoint,
    publish_adapter,
    remove_checkpoints,
    staging,
)

if TYPE_CHECKING:
    from softprompt.cli.inputs import Setup
    from softprompt.tasks.trainer import PromptTrainer


EVALUATED = (
    "eval_loss",
    "eval_perplexity",
    "eval_exact_match",
    "eval_macro_f1",
    "eval_predicted",
    "eval_confusion",
    "eval_prompt_exact_match",
)
WRITTEN = (
    "eval_loss",
    "eval_perplexity",
    "eval_exact_match",
    "eval_rouge_l",
    "eval_bleu",
    "eval_prompt_exact_match",
    "eval_prompt_rouge_l",
    "eval_prompt_bleu",
    "eval_written_rows",
    "eval_samples",
)

COMMAND = Command(
    TrainingConfig,
    summary="train a soft prompt on a table of texts and labels, or texts and targets",
    description="Train a soft prompt that makes a frozen language model write the label of a text, or its "
    "summary, its answer, its translation. "
    "Without options it trains a tiny shipped model on a shipped synthetic table.",
    example="softprompt train --data tweets.csv --text-column text --label-column label \\\n"
    "      --model bigscience/bloomz-560m --output complaints",
)


def run(config: TrainingConfig) -> int:
    """Check what was asked, train, save, and print the summary."""
    config = config.with_recipe()
    config.check()
    output = check_output_folder(config.output)
    checkpoint = _checkpoint_of(config, output)
    check_inputs(config.data, config.eval_data, model=config.model)
    require_extra()

    from softprompt.cli import build
    from softprompt.cli.inputs import read_tables, set_up
    from softprompt.cli.models import quiet_libraries
    from softprompt.cli.notes import say_rows, say_training
    from softprompt.cli.progress import TrainingProgress
    from softprompt.cli.resume import say_how_to_resume, stop_on_interrupt
    from softprompt.prompts.vocabulary import vocab_size_of

    quiet_libraries()
    setup = set_up(*read_tables(config), checkpoint=checkpoint)
    progress = TrainingProgress(vocab_size_of(setup.base))
    trainer, stop = build.build_trainer(setup, progress, checkpoint=checkpoint)
    say_rows(setup)
    say_training(setup)
    with held(output):
        # Again: another run may have ended in the meantime.
        if _checkpoint_of(config, output) != checkpoint:
            raise UsageError(f"--resume: another run has gone on from {checkpoint}: start again")
        if checkpoint is None:
            remove_checkpoints(output)
        start = time.perf_counter()
        with progress:
            zero_shot = trainer.zero_shot()
            with stop_on_interrupt(stop):
                trainer.train_from(checkpoint)
            state = trainer.state
            if stop.requested and state.global_step < state.max_steps:
                return say_how_to_resume(config.argv, state.global_step, state.max_steps, output)
            trainer.restore_best()
            scores = {
                "zero_shot": zero_shot,
                "eval": trainer.evaluate_all(),
                "train": {} if setup.encoder.task.generates else trainer.evaluate_trained(),
            }
        _save(setup, trainer, output, scores, seconds=time.perf_counter() - start)
    return 0


def _checkpoint_of(config: TrainingConfig, output: Path) -> Path | None:
    """The checkpoint to go on from, None for a new run; raises UsageError where the folder has no room."""
    if config.resume:
        checkpoint = latest_checkpoint(output)
        if checkpoint is None:
            raise UsageError(f"--resume: {output} has no complete checkpoint: train without --resume")
        return checkpoint
    if not config.overwrite and holds_adapter(output):
        raise UsageError(
            f"{output} holds an adapter already: name another --output, replace it with --overwrite, "
            "or go on with it with --resume"
        )
    return None


def _save(
    setup: "Setup", trainer: "PromptTrainer", output: Path, scores: dict[str, Any], *, seconds: float
) -> None:
    import torch

    from softprompt.cli.notes import result_notes, say
    from softprompt.cli.progress import print_summary
    from softprompt.tasks.evaluation import majority
    from softprompt.tasks.metrics import to_json
    from softprompt.tasks.plot import draw_training

    prompts = trainer.prompts()
    if not all(torch.isfinite(prompt).all() for prompt in prompts.values()):
        raise UsageError(
            f"training diverged: the prompt is not finite after {trainer.state.global_step} steps and was "
            "not saved; use a smaller --learning-rate, or --dtype bfloat16 instead of float16"
        )
    history = trainer.state.log_history
    eval_labels = [] if setup.eval_table is None else setup.eval_table.labels or []
    evaluated: dict[str, Any]
    if setup.encoder.task.generates:
        evaluated = {name: scores["eval"].get(name) for name in WRITTEN} | {"zero_shot": scores["zero_shot"]}
    else:
        evaluated = {
            **{name: scores["eval"].get(name) for name in EVALUATED},
            "labels": setup.encoder.task.labels,
            "train_exact_match": scores["train"].get("exact_match"),
            "zero_shot": scores["zero_shot"],
            "majority": majority(setup.train_table.labels or [], eval_labels) if eval_labels else None,
        }
    metrics = {
        "model": setup.model_name,
        "train_rows": len(setup.train_table),
        "eval_rows": len(eval_labels),
        "validation_rows": 0 if setup.validation_table is None else len(setup.validation_table),
        "num_virtual_tokens": setup.config.num_virtual_tokens,
        "prompts": len(prompts),
        "trainable_parameters": sum(prompt.numel() for prompt in prompts.values()),
        "learning_rate": setup.config.learning_rate,
        "steps": trainer.state.global_step,
        "best_step": trainer.best_step,
        "validation_loss": trainer.state.best_metric,
        "seconds": seconds,
        "train_loss": _last(history, "loss").get("loss"),
        **evaluated,
        "history": history,
    }
    with staging(output) as stage:
        trainer.save_adapter(stage)
        (stage / "metrics.json").write_text(to_json(metrics), encoding="utf-8")
        draw_training(metrics, stage / "training.png")
        publish_adapter(stage, output)
    print_summary(metrics, output)
    say(result_notes(metrics))


def _last(history: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next((entry for entry in reversed(history) if key in entry), {})
