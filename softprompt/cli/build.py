"""From the arguments of `softprompt train` to a Trainer that is ready to run."""

import argparse
import math
from pathlib import Path
from typing import Any

from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PrinterCallback, TrainingArguments, set_seed

from softprompt.cli.errors import UsageError
from softprompt.cli.initial import PEFT_INITS, initial_prompt
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
from softprompt.prompts.adapters import INITIAL_PROMPT, read_npy, set_prompt
from softprompt.tasks.classification import ClassificationTask, Encoder, load_task
from softprompt.tasks.table import Table, check_labels_known, read_table, split_table
from softprompt.tasks.trainer import PromptTrainer, StopAtStepEnd

OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor"}
LOGS_PER_EPOCH = 20


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
    task = ClassificationTask(
        text_column=args.text_column,
        label_column=args.label_column,
        labels=train_table.known_labels(),
        template=args.template,
        max_length=args.max_length,
        padding=args.padding,
        end_token=args.end_token or ("eos" if args.model is None else "pad"),
    )
    settings = {name: getattr(args, name) for name in RESUME_SETTINGS}
    record: dict[str, Any] = {"model": model_name, "training": {**settings, "rows": fingerprint(train_table)}}
    if checkpoint is not None:
        check_same_run(load_task(checkpoint), (task, record["model"], record["training"]))
    encoder = Encoder(task, load_tokenizer(model_name))
    model = _build_model(args, model_name, dtype, encoder, train_table, checkpoint)
    steps_per_epoch = math.ceil(len(train_table) / args.batch_size)
    arguments = TrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        optim=OPTIMIZERS[args.optimizer],
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        # A bfloat16 model has nothing left to cast; a float16 one needs the Trainer's loss scaling.
        fp16=args.fp16,
        use_cpu=device == "cpu",
        seed=args.seed,
        eval_strategy="no" if eval_table is None else "epoch",
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
    trainer = PromptTrainer(
        model=model,
        args=arguments,
        encoder=encoder,
        train_table=train_table,
        eval_table=eval_table,
        record=record,
        callbacks=[progress, stop],
        evaluated=progress.evaluated,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, stop


def _build_model(
    args: argparse.Namespace,
    model_name: str,
    dtype: Any,
    encoder: Encoder,
    train_table: Table,
    checkpoint: Path | None,
) -> Any:
    words = args.init == "text"
    if words and not encoder.tokenizer(args.init_text)["input_ids"]:
        raise UsageError(f"--init-text {args.init_text!r} has no tokens: give other words")
    base = load_model(model_name, dtype)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and args.num_virtual_tokens + args.max_length > positions:
        raise UsageError(
            f"--num-virtual-tokens {args.num_virtual_tokens} and --max-length {args.max_length} together "
            f"exceed the {positions} positions of {model_name}: make one of them smaller"
        )
    start = _saved_start(checkpoint)
    if start is None:
        start = initial_prompt(args, base, encoder.tokenizer, train_table)
    set_seed(args.seed)
    model = get_peft_model(
        base,
        PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=args.num_virtual_tokens,
            prompt_tuning_init=PEFT_INITS.get(args.init, "RANDOM"),
            prompt_tuning_init_text=args.init_text if words else None,
            tokenizer_name_or_path=model_name if words else None,
        ),
    )
    if start is not None:
        set_prompt(model, start)
    return model if args.no_patch else patch(model)


def _saved_start(checkpoint: Path | None) -> Tensor | None:
    """Return the initial prompt of an interrupted run: what it was made from may have gone since."""
    if checkpoint is None or not (checkpoint / INITIAL_PROMPT).is_file():
        return None
    try:
        return read_npy(checkpoint / INITIAL_PROMPT)
    except ValueError as error:
        raise UsageError(f"--resume: {error}") from error


def _tiny(name: str) -> str:
    from softprompt import tiny

    return str(getattr(tiny, name)())
