"""When training ends early: once the validation loss has stopped falling, or at a request."""

from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """transformers' early stopping, which counts on from the log when a run is resumed."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Count the evaluations since the best one."""
        super().on_train_begin(args, state, control, **more)
        self.early_stopping_patience_counter = self._since_best(args, state)

    def is_worn(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Return whether a run in this state has stopped."""
        stops: bool = self._since_best(args, state) >= self.early_stopping_patience
        return stops

    def _since_best(self, args: TrainingArguments, state: TrainerState) -> int:
        metric = f"eval_{args.metric_for_best_model}"
        best = state.best_global_step or 0
        return sum(entry["step"] > best for entry in state.log_history if metric in entry)


class StopAtStepEnd(TrainerCallback):
    """Ends training at the next step boundary, with a checkpoint, once `requested` is set."""

    requested = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> Any:
        """Save and stop."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> Any:
        """Take back the evaluation and the checkpoint that Trainer puts after an epoch cut short."""
        if self.requested and state.epoch is not None and state.epoch % 1 != 0:
            control.should_evaluate = False
            control.should_save = False
            control.should_log = False
        return control


class EvaluateAtEnd(TrainerCallback):
    """Evaluates after the last step, too, where the steps between two evaluations do not divide them."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> Any:
        """Evaluate."""
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True
        return control
