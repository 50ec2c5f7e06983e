"""From the arguments of `softprompt train` to a Trainer that is ready to run."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PromptTuningConfig, get_peft_model
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from softprompt import ensemble
from softprompt.cli.errors import UsageError
from softprompt.cli.models import (
    check_model,
    choose_device,
    choose_dtype,
    load_model,
    load_tokenizer,
    patch,
    set_threads,
)
from softprompt.cli.progress import TrainingProgress
from softprompt.cli.resume import RESUME_SETTINGS, check_same_run, fingerprint
from softprompt.engine import plan_for
from softprompt.engine.forward import obstacle_to
from softprompt.tasks.classification import ClassificationTask, Encoder, load_task
from softprompt.tasks.ensemble_trainer import EnsembleTrainer
from softprompt.tasks.errors import TaskError
from softprompt.tasks.table import Table, check_labels_known, read_table, split_table
from softprompt.tasks.trainer import Patience, PromptTrainer, StopAtStepEnd

INITS = {"text": "TEXT", "vocab": "SAMPLE_VOCAB", "random": "RANDOM"}
OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor"}
LOGS_PER_EPOCH = 20
DEFAULT_PATIENCE = 3


def read_tables(args: argparse.Namespace) -> tuple[Table, Table | None]:
    """Return the training rows and the evaluation rows, None if nothing is to be measured."""

    def read(source: str) -> Table:
        return read_table(
            source,
            args.text_column,
            args.label_column,
            subset=args.data_config,
            split=args.data_split,
        )

    train_table = read(args.data or _tiny("train_table"))
    if args.eval_data or args.data is None:
        eval_table = read(args.eval_data or _tiny("eval_table"))
        check_labels_known(eval_table, train_table.known_labels())
        return train_table, eval_table
    if args.eval_share == 0:
        return train_table, None
    return split_table(train_table, args.eval_share, args.seed)


def build_trainer(
    args: argparse.Namespace,
    train_table: Table,
    eval_table: Table | None,
    *,
    checkpoint: Path | None,
    progress: TrainingProgress,
) -> tuple[PromptTrainer, StopAtStepEnd]:
    """Return the Trainer of the run, and the callback that ends it early."""
    model_name = check_model(args.model or _tiny("model_path"))
    device = choose_device(args.device)
    set_threads(args.threads, tiny=args.model is None)
    dtype = choose_dtype(bf16=args.bf16, fp16=args.fp16, device=device)
    train_table, validation_table = _split_validation(args, train_table)
    base = load_model(model_name, dtype)
    task = ClassificationTask(
        text_column=args.text_column,
        label_column=args.label_column,
        labels=train_table.known_labels(),
        template=args.template,
        max_length=args.max_length,
        padding=args.padding,
        end_token=args.end_token or ("eos" if args.model is None else "pad"),
        positions=choose_positions(args, base),
    )
    settings = {name: getattr(args, name) for name in RESUME_SETTINGS}
    record: dict[str, Any] = {"model": model_name, "training": {**settings, "rows": fingerprint(train_table)}}
    if checkpoint is not None:
        check_same_run(load_task(checkpoint), (task, record["model"], record["training"]))
    encoder = Encoder(task, load_tokenizer(model_name))
    model = _build_model(args, base, model_name, encoder)
    steps_per_epoch = math.ceil(len(train_table) / args.batch_size)
    arguments = TrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        optim=OPTIMIZERS[args.optimizer],
        lr_scheduler_type=args.schedule,
        max_grad_norm=0.0,
        # A bfloat16 model has nothing left to cast; a float16 one needs the Trainer's loss scaling.
        fp16=args.fp16,
        use_cpu=device == "cpu",
        seed=args.seed,
        eval_strategy="no" if eval_table is None and validation_table is None else "epoch",
        metric_for_best_model=None if validation_table is None else "validation_loss",
        greater_is_better=False,
        save_strategy="epoch",
        logging_steps=max(1, steps_per_epoch // LOGS_PER_EPOCH),
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=True,
        report_to="none",
    )
    # On several GPUs, Trainer would copy the model to all of them and split every batch, tiny as it is.
    arguments._n_gpu = min(1, arguments.n_gpu)
    stop = StopAtStepEnd()
    callbacks: list[TrainerCallback] = [progress, stop]
    if validation_table is not None:
        callbacks.append(Patience(early_stopping_patience=args.patience or DEFAULT_PATIENCE))
    trainer = (EnsembleTrainer if args.ensemble else PromptTrainer)(
        model=model,
        args=arguments,
        encoder=encoder,
        train_table=train_table,
        eval_table=eval_table,
        validation_table=validation_table,
        record=record,
        callbacks=callbacks,
        evaluated=progress.evaluated,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, stop


def _split_validation(args: argparse.Namespace, table: Table) -> tuple[Table, Table | None]:
    if args.validation_share == 0:
        return table, None
    try:
        return split_table(table, args.validation_share, args.seed)
    except TaskError:
        raise UsageError(
            f"--validation-share {args.validation_share:g}: {table.source} has too few rows ({len(table)} "
            "for training) to keep any of them out: give a larger share or a larger table"
        ) from None


def choose_positions(args: argparse.Namespace, base: Any) -> str:
    """Return what `--positions` asks for; without it "compact" where softprompt can run it."""
    if args.no_patch:
        if args.positions == "compact":
            raise UsageError("--positions compact needs softprompt's path: leave --no-patch out")
        return "padded"
    if args.positions == "padded":
        return "padded"
    plan = plan_for(base)
    obstacle = obstacle_to(plan, compact=True)
    if obstacle is None:
        return "compact"
    if args.positions == "compact":
        raise UsageError(f"--positions compact cannot be had for this model: {plan.reason}")
    print(f"softprompt: pads count for positions (--positions padded): {plan.reason}", file=sys.stderr)
    return "padded"


def _build_model(args: argparse.Namespace, base: Any, model_name: str, encoder: Encoder) -> Any:
    words = args.init == "text"
    if words and not encoder.tokenizer(args.init_text)["input_ids"]:
        raise UsageError(f"--init-text {args.init_text!r} has no tokens: give other words")
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and args.num_virtual_tokens + args.max_length > positions:
        raise UsageError(
            f"--num-virtual-tokens {args.num_virtual_tokens} and --max-length {args.max_length} together "
            f"exceed the {positions} positions of {model_name}: make one of them smaller"
        )
    set_seed(args.seed)

    def config(init: str, text: str | None) -> PromptTuningConfig:
        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=args.num_virtual_tokens,
            prompt_tuning_init=INITS[init],
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=None if text is None else model_name,
        )

    if args.ensemble:
        model = _build_ensemble(args, base, config)
    else:
        model = get_peft_model(base, config(args.init, args.init_text if words else None))
    return model if args.no_patch else patch(model, positions=encoder.task.positions)


def _build_ensemble(args: argparse.Namespace, base: Any, config: Callable[[str, str | None], Any]) -> Any:
    reason = obstacle_to(plan_for(base), compact=False) or plan_for(base).reason
    if plan_for(base).route != "packed":
        raise UsageError(f"--ensemble needs a model whose rows can be packed: {reason}")
    if args.init != "text":
        configs = [config(args.init, None) for _ in range(args.ensemble)]
    elif args.ensemble_texts:
        configs = [config("text", text) for text in args.ensemble_texts]
    else:
        # The same words again would give the same prompt again.
        configs = [config("text", args.init_text), *(config("vocab", None) for _ in range(args.ensemble - 1))]
    return ensemble.create(base, configs, seeds=[args.seed + number for number in range(args.ensemble)])


def _tiny(name: str) -> str:
    from softprompt import tiny

    return str(getattr(tiny, name)())
