"""`softprompt train`: from a table of texts and labels to a PEFT prompt-tuning adapter."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.errors import UsageError, require_extra
from softprompt.cli.initial import check_init_options
from softprompt.cli.options import (
    Parser,
    add_command,
    add_compute_options,
    given,
    number,
    whole,
    words,
)
from softprompt.cli.paths import check_inputs
from softprompt.cli.run_options import add_data_options, add_model_options, add_training_options, apply_recipe
from softprompt.tasks.folders import (
    held,
    holds_adapter,
    latest_checkpoint,
    publish_adapter,
    remove_checkpoints,
    staging,
)

if TYPE_CHECKING:
    from softprompt.cli.progress import TrainingProgress
    from softprompt.tasks.trainer import PromptTrainer, StopAtStepEnd


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `softprompt train`."""
    parser = add_command(
        commands,
        "train",
        summary="train a soft prompt on a table of texts and labels",
        description="Train a soft prompt that makes a frozen language model write the label of a text. "
        "Without options it trains a tiny shipped model on a shipped synthetic table.",
        example="softprompt train --data tweets.csv --text-column text --label-column label \\\n"
        "      --model bigscience/bloomz-560m --output complaints",
        run=run,
    )
    add_data_options(parser)
    prompt = add_model_options(parser)
    prompt.add_argument(
        "--ensemble",
        type=whole(1),
        metavar="N",
        help="train N prompts together, on the same rows in the same order, and predict by their majority; "
        "their seeds are --seed and the numbers after it",
    )
    prompt.add_argument(
        "--ensemble-texts",
        type=words,
        nargs="+",
        metavar="TEXT",
        help="words for each prompt of an ensemble to start from (default with --init text: --init-text for "
        "the first one, and random words of the vocabulary for the others)",
    )
    training = add_training_options(parser)
    training.add_argument(
        "--validation-share",
        type=number(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of every label's training rows to keep for deciding when to stop: training ends once "
        "their loss has stopped falling, and the prompt with the lowest loss is saved; 0 trains all epochs",
    )
    training.add_argument(
        "--patience",
        type=whole(1),
        metavar="N",
        help="epochs without a lower loss on the validation rows before training stops (default: 3)",
    )
    add_compute_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=given,
        default="softprompt-output",
        metavar="FOLDER",
        help="folder for the adapter and its checkpoints",
    )
    existing = output.add_mutually_exclusive_group()
    existing.add_argument(
        "--overwrite", action="store_true", help="replace an adapter that is in the folder already"
    )
    existing.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the folder"
    )


def run(args: argparse.Namespace) -> int:
    """Check what was asked, train, save, and print the summary."""
    apply_recipe(args)
    _check_ensemble(args)
    if args.patience is not None and args.validation_share == 0:
        raise UsageError("--patience needs rows to watch: give --validation-share")
    check_init_options(args)
    output = Path(args.output)
    checkpoint = _check_output(output, overwrite=args.overwrite, resume=args.resume)
    check_inputs(tables=[args.data, args.eval_data], model=args.model)
    require_extra()

    from softprompt.cli.build import build_trainer, read_tables
    from softprompt.cli.models import quiet_libraries
    from softprompt.cli.progress import TrainingProgress

    quiet_libraries()
    tables = read_tables(args)
    progress = TrainingProgress()
    trainer, stop = build_trainer(args, *tables, checkpoint=checkpoint, progress=progress)
    with held(output):
        # Again: another run may have ended in the meantime.
        if _check_output(output, overwrite=args.overwrite, resume=args.resume) != checkpoint:
            raise UsageError(f"--resume: another run has gone on from {checkpoint}: start again")
        return _train(args, trainer, stop, progress, checkpoint, output)


def _train(
    args: argparse.Namespace,
    trainer: "PromptTrainer",
    stop: "StopAtStepEnd",
    progress: "TrainingProgress",
    checkpoint: Path | None,
    output: Path,
) -> int:
    from softprompt.cli.resume import say_how_to_resume, stop_on_interrupt

    if checkpoint is None:
        remove_checkpoints(output)
    start = time.perf_counter()
    with progress:
        with stop_on_interrupt(stop):
            trainer.train_from(checkpoint)
        state = trainer.state
        if stop.requested and state.global_step < state.max_steps:
            return say_how_to_resume(args.argv, state.global_step, state.max_steps, output)
        trainer.restore_best()
        if (
            trainer.eval_table is not None
            and _last(state.log_history, "eval_loss").get("step") != state.global_step
        ):
            trainer.evaluate()
    _save(trainer, output, seconds=time.perf_counter() - start)
    return 0


def _check_ensemble(args: argparse.Namespace) -> None:
    if args.ensemble == 1:
        raise UsageError("--ensemble 1: an ensemble needs at least two prompts; train one without --ensemble")
    if args.ensemble and args.no_patch:
        raise UsageError("--ensemble needs softprompt's path: leave --no-patch out")
    if not args.ensemble_texts:
        return
    if not args.ensemble:
        raise UsageError(
            "--ensemble-texts are the words of an ensemble: give --ensemble, or --init-text instead"
        )
    if len(args.ensemble_texts) != args.ensemble:
        raise UsageError(
            f"--ensemble-texts: expected one text for each of the {args.ensemble} prompts of "
            f"--ensemble, got {len(args.ensemble_texts)}"
        )
    if args.init != "text":
        raise UsageError(f"--ensemble-texts needs --init text, got --init {args.init}")
    if len(set(args.ensemble_texts)) < args.ensemble or not all(map(str.strip, args.ensemble_texts)):
        raise UsageError("--ensemble-texts: texts that are empty or the same give prompts that are the same")


def _check_output(output: Path, *, overwrite: bool, resume: bool) -> Path | None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file: name a folder")
    if resume:
        checkpoint = latest_checkpoint(output)
        if checkpoint is None:
            raise UsageError(f"--resume: {output} has no complete checkpoint: train without --resume")
        return checkpoint
    if not overwrite and holds_adapter(output):
        raise UsageError(
            f"{output} holds an adapter already: name another --output, replace it with --overwrite, "
            "or go on with it with --resume"
        )
    return None


def _save(trainer: "PromptTrainer", output: Path, *, seconds: float) -> None:
    import torch

    from softprompt.cli.progress import print_summary
    from softprompt.tasks.metrics import to_json
    from softprompt.tasks.plot import draw_training

    prompts = trainer.prompts()
    if not all(torch.isfinite(prompt).all() for prompt in prompts.values()):
        raise UsageError(
            f"training diverged: the prompt is not finite after {trainer.state.global_step} steps and was "
            "not saved; use a smaller --learning-rate, or --bf16 instead of --fp16"
        )
    history = trainer.state.log_history
    scores = _last([e for e in history if trainer.best_step in (None, e.get("step"))], "eval_loss")
    metrics = {
        "model": trainer.record["model"],
        "train_rows": len(trainer.train_dataset),
        "eval_rows": 0 if trainer.eval_table is None else len(trainer.eval_table),
        "num_virtual_tokens": trainer.record["training"]["num_virtual_tokens"],
        "prompts": len(prompts),
        "trainable_parameters": sum(prompt.numel() for prompt in prompts.values()),
        "steps": trainer.state.global_step,
        "best_step": trainer.best_step,
        "validation_loss": trainer.state.best_metric,
        "seconds": seconds,
        "train_loss": _last(history, "loss").get("loss"),
        "eval_loss": scores.get("eval_loss"),
        "eval_perplexity": scores.get("eval_perplexity"),
        "eval_exact_match": scores.get("eval_exact_match"),
        "eval_prompt_exact_match": scores.get("eval_prompt_exact_match"),
        "history": history,
    }
    with staging(output) as stage:
        trainer.save_adapter(stage)
        (stage / "metrics.json").write_text(to_json(metrics), encoding="utf-8")
        draw_training(history, stage / "training.png")
        publish_adapter(stage, output)
    print_summary(metrics, output)


def _last(history: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next((entry for entry in reversed(history) if key in entry), {})
