"""From the options of a call, its tables and its model to a trainer that is ready to run."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from softprompt.cli.checks import UsageError
from softprompt.cli.initial import check_different, prompt_starts, with_prompts
from softprompt.cli.inputs import Setup
from softprompt.cli.progress import TrainingProgress
from softprompt.cli.training_config import TrainingConfig
from softprompt.engine import plan_for
from softprompt.engine.runner import obstacle_to
from softprompt.ensemble import PROMPT_NAME
from softprompt.tasks.callbacks import EvaluateAtEnd, Patience, StopAtStepEnd
from softprompt.tasks.trainer import Member, PromptTrainer

OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor"}
LOGS_PER_EPOCH = 20
DEFAULT_PATIENCE = 3
EVALUATIONS = 4  # of a run that is counted in steps
MEASURED_AT_ONCE = 4  # batches: without gradients they take less memory than one with


def build_trainer(
    setup: Setup, progress: TrainingProgress, *, checkpoint: Path | None
) -> tuple[PromptTrainer, StopAtStepEnd]:
    """Return the trainer of `softprompt train`, and the callback that ends it early."""
    config = setup.config
    names = [f"{PROMPT_NAME}-{number + 1}" for number in range(config.ensemble or 0)] or ["default"]
    starts = prompt_starts(setup, config, names, checkpoint=checkpoint)
    if config.ensemble:
        plan = plan_for(setup.base)
        if plan.route != "packed":
            reason = obstacle_to(plan, compact=False) or plan.reason
            raise UsageError(f"--ensemble needs a model whose rows can be packed: {reason}")
    model = with_prompts(setup, starts)
    check_different(config, model)
    stop = StopAtStepEnd()
    callbacks: list[TrainerCallback] = [progress, stop]
    more: dict[str, Any] = {"save_strategy": "epoch"}
    if config.steps is not None:
        every = math.ceil(config.steps / EVALUATIONS)
        more = {"save_strategy": "steps", "save_steps": every, "eval_steps": every}
        callbacks.append(EvaluateAtEnd())
    watched = setup.eval_table is not None or setup.validation_table is not None
    more["eval_strategy"] = more["save_strategy"] if watched else "no"
    if setup.validation_table is not None:
        more["metric_for_best_model"] = "validation_loss"
        callbacks.append(Patience(early_stopping_patience=config.patience or DEFAULT_PATIENCE))
    return trainer_of(setup, config, model, callbacks, evaluated=progress.evaluated, **more), stop


def trainer_of(
    setup: Setup,
    config: TrainingConfig,
    model: Any,
    callbacks: list[TrainerCallback],
    *,
    members: Sequence[Member] = (),
    evaluated: Callable[[int, int], None] | None = None,
    **more: Any,
) -> PromptTrainer:
    """Return a trainer of the prompts of a model; `more` is for `TrainingArguments`."""
    streams = len({member.seed for member in members}) or 1  # each has its own order of the rows
    steps_per_epoch = math.ceil(len(setup.drawn_table) / config.compute.batch_size)
    arguments = TrainingArguments(
        output_dir=config.output,
        num_train_epochs=config.epochs or 1,
        max_steps=config.steps or -1,
        per_device_train_batch_size=config.compute.batch_size * streams,
        per_device_eval_batch_size=MEASURED_AT_ONCE * config.compute.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        optim=OPTIMIZERS[config.optimizer],
        lr_scheduler_type=config.schedule,
        max_grad_norm=0.0,
        # A bfloat16 model has nothing left to cast; a float16 one needs the Trainer's loss scaling.
        fp16=config.compute.dtype == "float16",
        use_cpu=setup.device == "cpu",
        seed=config.seed,
        logging_steps=max(1, steps_per_epoch // LOGS_PER_EPOCH),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=setup.device == "cuda",
        disable_tqdm=True,
        report_to="none",
        greater_is_better=False,
        **more,
    )
    # On several GPUs, Trainer would copy the model to all of them and split every batch, tiny as it is.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return PromptTrainer(
        model=model,
        args=arguments,
        encoder=setup.encoder,
        train_table=setup.train_table,
        drawn_table=setup.drawn_table,
        eval_table=setup.eval_table,
        validation_table=setup.validation_table,
        record=setup.record,
        callbacks=callbacks,
        evaluated=evaluated,
        members=members,
    )
