"""The Trainer of several runs at once: one forward and one backward for prompts that differ in settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from softprompt import ensemble
from softprompt.tasks.classification import Example
from softprompt.tasks.collate import LeftPadCollator
from softprompt.tasks.table import Table
from softprompt.tasks.trainer import PromptTrainer


@dataclass(frozen=True)
class Member:
    """What a run of a `SweepTrainer` does not share with the others.

    Attributes:
        adapter: the name of its adapter.
        seed: of the order of its rows.
        learning_rate: the first one.
        weight_decay: of the optimizer.
    """

    adapter: str
    seed: int
    learning_rate: float
    weight_decay: float


class SweepTrainer(PromptTrainer):
    """A `PromptTrainer` of several runs at once, each as if it were the only one.

    Every step packs the batch of each run behind the run's own prompt, and AdamW and Adafactor keep a state
    for each parameter. A run whose loss is no number is left where it is, and the others go on.

    Attributes:
        losses: of the steps of each run, by adapter.
        diverged: adapters of the runs that were left.
    """

    train_dataset: Any
    data_collator: Any
    optimizer: Any

    def __init__(self, *, members: Sequence[Member], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.members = {member.adapter: member for member in members}
        self.seeds = sorted({member.seed for member in members})
        self.losses: dict[str, list[Tensor]] = {member.adapter: [] for member in members}
        self.diverged: set[str] = set()
        self.train_dataset = _Streams(self.train_dataset)
        self.data_collator = _StreamCollator(self.data_collator)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[tuple[int, ...]]:
        return _StreamSampler(len(self.train_dataset), self.seeds)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One group of the optimizer for each run, with the settings of the run."""
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {
                    "params": [prompt],
                    "lr": self.members[name].learning_rate,
                    "weight_decay": self.members[name].weight_decay,
                }
                for name, prompt in self.prompts().items()
            ]
            self.optimizer = kind(groups, **settings)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the sum of the mean losses of the runs that have not diverged."""
        names = [name for name in self.members if name not in self.diverged]
        total, each = self._losses(names, inputs)
        if not bool(torch.isfinite(each).all()):
            # What is no number crosses every mask: only alone does a run show whether it is the one.
            alone = [self._losses([name], inputs)[1] for name in names]
            sound = [name for name, loss in zip(names, alone, strict=True) if bool(torch.isfinite(loss))]
            self.diverged |= set(names) - set(sound)
            names = sound
            total, each = self._losses(names, inputs)
        for name, loss in zip(names, each, strict=True):
            self.losses[name].append(loss)
        return (total, {}) if return_outputs else total

    def _losses(self, names: Sequence[str], inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum of the mean losses of some runs, [], and each of them, [K], detached."""
        if not names:
            self.control.should_training_stop = True
            nothing = sum(prompt.sum() * 0 for prompt in self.prompts().values())
            return torch.nan_to_num(torch.as_tensor(nothing)), torch.zeros(0)
        if len(names) == 1:
            self.model.set_adapter(names[0])
            loss = self.model(**self._rows(names, inputs)).loss
            return loss, loss.detach()[None]
        one_stream = len(self.seeds) == 1
        losses = ensemble.losses(
            self.model,
            **(inputs if one_stream else self._rows(names, inputs)),
            adapters=names,
            own_rows=not one_stream,
            positions=self.encoder.task.positions,
        )
        return losses.total, losses.each

    def _rows(self, names: Sequence[str], inputs: dict[str, Any]) -> dict[str, Any]:
        """The rows of each run, run by run, out of the rows of each seed, seed by seed."""
        streams = [self.seeds.index(self.members[name].seed) for name in names]
        return {
            key: torch.cat([tensor.chunk(len(self.seeds))[stream] for stream in streams])
            for key, tensor in inputs.items()
        }

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log the mean over the runs instead of the sum."""
        for name in ("loss", "train_loss"):
            if name in logs:
                logs[name] /= len(self.members)
        super().log(logs, *args, **kwargs)

    def measure_run(self, name: str, table: Table, progress: Callable[[int], None]) -> dict[str, float]:
        """Return `PromptTrainer.measure` of one run."""
        self.model.set_adapter(name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            return self.measure(table, progress)


class _Streams(Dataset[list[Example]]):
    """The same rows in several orders at once: the item at (i, j, ...) is the rows i, j, ..."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, numbers: tuple[int, ...]) -> list[Example]:
        return [self.examples[number] for number in numbers]


class _StreamSampler(Sampler[tuple[int, ...]]):
    """The orders in which Trainer takes `count` rows at each of several seeds, side by side."""

    def __init__(self, count: int, seeds: Sequence[int]) -> None:
        self.count = count
        self.orders = [
            SeedableRandomSampler(range(count), data_seed=seed, generator=torch.Generator()) for seed in seeds
        ]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return zip(*self.orders, strict=True)


class _StreamCollator:
    """Collates the rows of the first stream, then those of the second, and so on; takes plain rows too."""

    def __init__(self, collate: LeftPadCollator) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        if isinstance(items[0], list):
            items = [row for stream in zip(*items, strict=True) for row in stream]
        return self.collate(items)
