"""Trainer and accelerate's loop on rows in their order, and the same steps by hand in one process."""

import torch
from parity import make_batch, prompt_of
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

LENGTHS = (7, 3, 5, 6, 4, 7, 2, 5)
ROWS_OF_A_STEP = 4  # two of each rank
LEARNING_RATE = 0.05


def all_rows(labels="everywhere"):
    """Rows with as many labels as tokens; the second rank has none in the first step."""
    rows = make_batch(LENGTHS, "left", labels)
    rows["labels"][2:4] = -100
    return rows


class Rows(Dataset):
    """The rows of a batch, one by one."""

    def __init__(self, rows, count=None):
        self.rows, self.count = rows, count or len(rows["labels"])

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.rows.items()}


class InOrder(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def train(model, folder, rows, *, steps=2, **options):
    """A Trainer that has trained."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        max_steps=steps,
        **({"save_strategy": "no"} | options),
    )
    trainer = InOrder(model, arguments, train_dataset=Rows(rows), eval_dataset=Rows(rows, 5))
    trainer.train()
    return trainer


def losses_of(trainer):
    """What it logged, step by step."""
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def by_hand(alone, rows, *, rows_of_a_step=ROWS_OF_A_STEP, steps=2):
    """The losses of PEFT's model in one process, which ends with the prompt that the ranks should have."""
    optimizer = torch.optim.AdamW([prompt_of(alone)], lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for number in range(steps):
        first = number * rows_of_a_step % len(rows["labels"])
        optimizer.zero_grad()
        loss = alone(**{name: value[first : first + rows_of_a_step] for name, value in rows.items()}).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).float()


def loop(accelerator, model, rows, *, count=None):
    """One epoch of accelerate's own loop."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    loader = DataLoader(Rows(rows, count), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
