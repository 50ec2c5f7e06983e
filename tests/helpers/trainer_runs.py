"""Short runs of the Trainer of transformers."""

from parity import make_batch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

DATA = make_batch((7, 3, 5, 6, 4, 7), "left", "everywhere")


class Rows(Dataset):
    """The rows of one batch."""

    def __len__(self):
        return len(DATA["input_ids"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in DATA.items()}


def trainer_of(model, path, *, data=None, extra=None, **options):
    """A Trainer on the CPU.

    Args:
        model: PEFT's, patched or not.
        path: for its output.
        data: training and evaluation rows.
        extra: arguments of the Trainer beside its TrainingArguments.
        options: of the TrainingArguments.
    """
    arguments = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=3e-2,
        per_device_train_batch_size=2,
        logging_steps=1,
        seed=1,
        **({"max_steps": 3, "save_strategy": "no"} | options),
    )
    rows = Rows() if data is None else data
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, **(extra or {}))


def train(model, path, *, resume=None, **options):
    """The Trainer after its steps (see `trainer_of`), and the loss of each."""
    trainer = trainer_of(model, path, **options)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses
