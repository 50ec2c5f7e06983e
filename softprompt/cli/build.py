"""From the arguments of `softprompt train` to a Trainer that is ready to run."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from softprompt import ensemble
from softprompt.cli.errors import UsageError
from softprompt.cli.initial import PEFT_INITS, initial_prompt
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
from softprompt.cli.progress import TrainingProgress
from softprompt.cli.resume import RESUME_SETTINGS, check_same_run, check_whole, fingerprint
from softprompt.cli.table_options import table_arguments
from softprompt.engine import plan_for
from softprompt.engine.runner import obstacle_to
from softprompt.prompts.adapters import INITIAL_PROMPT, prompt_parameter, read_npy, set_prompt
from softprompt.tasks.classification import ClassificationTask, Encoder, load_task
from softprompt.tasks.ensemble_trainer import EnsembleTrainer
from softprompt.tasks.errors import TaskError
from softprompt.tasks.folders import adapter_folders
from softprompt.tasks.table import (
    Table,
    check_several_labels,
    read_table,
    split_table,
    with_known_labels,
)
from softprompt.tasks.template import parse_template
from softprompt.tasks.trainer import Patience, PromptTrainer, StopAtStepEnd

OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor"}
LOGS_PER_EPOCH = 20
DEFAULT_PATIENCE = 3


def read_tables(args: argparse.Namespace) -> tuple[Table, Table | None]:
    """Return the training rows and the evaluation rows, None if nothing is to be measured."""
    columns = parse_template(args.template, args.text_column, args.label_column).columns
    train_source = args.data or _tiny("train_table")
    eval_source = args.eval_data or (_tiny("eval_table") if args.data is None else None)
    sources = [source for source in (train_source, eval_source) if source is not None]
    arguments = table_arguments(args, sources)
    tables = [
        read_table(source, args.text_column, args.label_column, columns=columns, **arguments)
        for source in sources
    ]
    train_table = tables[0]
    check_several_labels(train_table)
    if len(tables) == 2:
        known = train_table.known_labels()
        return train_table, with_known_labels(tables[1], known, train_table.label_names)
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
    task = task_of(args, train_table, base)
    settings = {name: getattr(args, name) for name in RESUME_SETTINGS}
    record: dict[str, Any] = {"model": model_name, "training": {**settings, "rows": fingerprint(train_table)}}
    if checkpoint is not None:
        check_whole(checkpoint)
        check_same_run(load_task(checkpoint), (task, record["model"], record["training"]))
    encoder = Encoder(task, load_tokenizer(model_name))
    model = _build_model(args, base, model_name, encoder, train_table, checkpoint)
    arguments = training_arguments(
        args,
        device,
        steps_per_epoch=math.ceil(len(train_table) / args.batch_size),
        eval_strategy="no" if eval_table is None and validation_table is None else "epoch",
        metric_for_best_model=None if validation_table is None else "validation_loss",
        greater_is_better=False,
        save_strategy="epoch",
    )
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
    say_rows(encoder, train_table, eval_table, validation_table)
    return trainer, stop


def task_of(args: argparse.Namespace, train_table: Table, base: Any) -> ClassificationTask:
    """Return the task that the options and the training rows describe."""
    return ClassificationTask(
        text_column=args.text_column,
        label_column=args.label_column,
        labels=train_table.known_labels(),
        template=args.template,
        max_length=args.max_length,
        padding=args.padding,
        end_token=args.end_token or ("eos" if args.model is None else "pad"),
        positions=choose_positions(args, base),
        label_names=tuple(train_table.label_names.items()),
    )


def training_arguments(
    args: argparse.Namespace,
    device: str,
    *,
    steps_per_epoch: int,
    **more: Any,
) -> TrainingArguments:
    """Return what a Trainer is told of the options of a run, and `more`."""
    arguments = TrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        max_steps=args.steps or -1,
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
        logging_steps=max(1, steps_per_epoch // LOGS_PER_EPOCH),
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=True,
        report_to="none",
        **more,
    )
    # On several GPUs, Trainer would copy the model to all of them and split every batch, tiny as it is.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


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


def _build_model(
    args: argparse.Namespace,
    base: Any,
    model_name: str,
    encoder: Encoder,
    train_table: Table,
    checkpoint: Path | None,
) -> Any:
    check_prompt_fits(args, base, model_name, encoder.tokenizer)
    kinds = _kinds(args)
    for text in args.ensemble_texts or []:
        if not encoder.tokenizer(text)["input_ids"]:
            raise UsageError(f"--ensemble-texts {text!r} has no tokens: give other words")
    starts = _saved_starts(checkpoint) or [
        initial_prompt(args, base, encoder.tokenizer, train_table, number=number, count=len(kinds))
        for number in range(len(kinds))
    ]
    configs = [prompt_config(args, model_name, kind, text) for kind, text in kinds]
    set_seed(args.seed)
    if args.ensemble:
        _check_packed(base)
        seeds = [args.seed + number for number in range(args.ensemble)]
        model = ensemble.create(base, configs, seeds=seeds)
    else:
        model = get_peft_model(base, configs[0])
    for name, start in zip(list(model.peft_config), starts, strict=True):
        if start is not None:
            set_prompt(model, start, name)
    _check_different(args, model)
    return patch(model, positions=encoder.task.positions, no_patch=args.no_patch)


def check_prompt_fits(args: argparse.Namespace, base: Any, model_name: str, tokenizer: Any) -> None:
    """Raise UsageError where prompt and text are longer than the model, or the words have no tokens."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and args.num_virtual_tokens + args.max_length > positions:
        raise UsageError(
            f"--num-virtual-tokens {args.num_virtual_tokens} and --max-length {args.max_length} together "
            f"exceed the {positions} positions of {model_name}: make one of them smaller"
        )
    if args.init == "text" and not tokenizer(args.init_text)["input_ids"]:
        raise UsageError(f"--init-text {args.init_text!r} has no tokens: give other words")


def prompt_config(
    args: argparse.Namespace, model_name: str, kind: str, text: str | None
) -> PromptTuningConfig:
    """Return PEFT's configuration of a prompt that starts at `kind`, with `text` at its words."""
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=args.num_virtual_tokens,
        prompt_tuning_init=PEFT_INITS.get(kind, "RANDOM"),
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=None if text is None else model_name,
    )


def _kinds(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Return the initialiser of each prompt, and the words that PEFT makes it from."""
    count = args.ensemble or 1
    if args.init != "text":
        return [(args.init, None)] * count
    if args.ensemble_texts:
        return [("text", text) for text in args.ensemble_texts]
    # The same words again would give the same prompt again.
    return [("text", args.init_text), *[("vocab", None)] * (count - 1)]


def _check_packed(base: Any) -> None:
    plan = plan_for(base)
    if plan.route != "packed":
        reason = obstacle_to(plan, compact=False) or plan.reason
        raise UsageError(f"--ensemble needs a model whose rows can be packed: {reason}")


def _check_different(args: argparse.Namespace, model: Any) -> None:
    """Raise UsageError where two prompts of an ensemble start at the same place, and so end there too."""
    found: dict[bytes, str] = {}
    for name in model.peft_config:
        other = found.setdefault(prompt_parameter(model, name).detach().cpu().numpy().tobytes(), name)
        if other != name:
            raise UsageError(
                f"--init {args.init}: {other} and {name} of the ensemble start at the same numbers and would "
                "stay the same: give more --num-virtual-tokens, or another --init"
            )


def _saved_starts(checkpoint: Path | None) -> list[Tensor | None]:
    """Return the initial prompts of an interrupted run: what they were made from may have gone since."""
    folders = [] if checkpoint is None else adapter_folders(checkpoint)
    files = [folder / INITIAL_PROMPT for folder in folders]
    if not all(path.is_file() for path in files):
        return []
    try:
        return [read_npy(path) for path in files]
    except ValueError as error:
        raise UsageError(f"--resume: {error}") from error


def _tiny(name: str) -> str:
    from softprompt import tiny

    return str(getattr(tiny, name)())
