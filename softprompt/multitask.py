"""Training on rows of different adapters in one batch: the rows, their batches, and a loss for each adapter.

rows = multitask.mix({"complaints": complaints, "topics": topics})
loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=multitask.AdapterCollator(collate))
for batch in loader:
    multitask.losses(model, **batch).total.backward()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import Dataset

from softprompt.eligibility import reason_for_peft
from softprompt.engine import model_spec, sharding
from softprompt.engine.batch import check_tensor
from softprompt.engine.runner import UnsupportedModelError
from softprompt.layout import raise_out_of_range
from softprompt.nesting import base_of
from softprompt.patched_model import synchronized
from softprompt.prompt_encoders import adapters_of_rows, batch_of, placed
from softprompt.state import state_of

COLUMN = "adapter"


class MixedRows(Dataset[dict[str, Any]]):
    """The rows of several data sets, one after the other, each with the name of its adapter in a column."""

    def __init__(self, datasets: Mapping[str, Any], column: str) -> None:
        self._rows = [(name, rows, index) for name, rows in datasets.items() for index in range(len(rows))]
        self._column = column

    def __len__(self) -> int:
        """Rows of all data sets."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row with its adapter's name."""
        name, rows, number = self._rows[index]
        return {**rows[number], self._column: name}


def mix(datasets: Mapping[str, Any], *, column: str = COLUMN) -> MixedRows:
    """One data set of the rows of several, for a DataLoader or a Trainer that shuffles.

    Args:
        datasets: adapter -> its rows, anything with `len` whose items are dicts (a list, a
            `datasets.Dataset`).
        column: the column that gets the adapter's name.

    Raises:
        ValueError: no data set, an empty one, rows that are no dicts, or rows that have this column already.
    """
    if datasets is not None and not isinstance(datasets, Mapping):
        raise ValueError(f"mix expects adapter -> rows, got {type(datasets).__name__}")
    if not datasets:
        raise ValueError("mix expects at least one data set, got none")
    for name, rows in datasets.items():
        if len(rows) == 0:
            raise ValueError(f"the data set of adapter {name!r} is empty")
        first = rows[0]
        if not isinstance(first, Mapping):
            raise ValueError(f"rows of adapter {name!r} must be dicts, got {type(first).__name__}")
        if column in first:
            raise ValueError(f"rows of adapter {name!r} have a column {column!r} already: choose another one")
    return MixedRows(datasets, column)


@dataclass(frozen=True)
class AdapterCollator:
    """Collates rows as `collate` does, and carries their adapters to the model as `adapter_names`.

    Attributes:
        collate: makes a batch of the rows without the column: `transformers.default_data_collator`, a
            `DataCollatorForLanguageModeling`, or any other.
        column: holds the name of each row's adapter.
    """

    collate: Callable[[list[dict[str, Any]]], Any]
    column: str = COLUMN

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch with `adapter_names`, a list of B names.

        Raises:
            ValueError: a row without the column, or with something else than a name in it.
        """
        names = []
        for number, row in enumerate(rows):
            if self.column not in row:
                raise ValueError(
                    f"row {number} has no column {self.column!r} with the name of its adapter, it has "
                    f"{', '.join(map(repr, row))}. The Trainer takes columns away that the language model "
                    "does not know, unless it gets remove_unused_columns=False"
                )
            if not isinstance(row[self.column], str):
                raise ValueError(
                    f"column {self.column!r} must hold names of adapters, got {row[self.column]!r} in row "
                    f"{number}"
                )
            names.append(row[self.column])
        rest = [{name: value for name, value in row.items() if name != self.column} for row in rows]
        return {**self.collate(rest), "adapter_names": names}


class AdapterLosses(NamedTuple):
    """What `losses` found."""

    total: Tensor  # [] the sum of the adapters' mean losses: its gradient is that of each one trained alone
    each: dict[str, Tensor]  # adapter -> [] its mean loss, detached


@synchronized
def losses(
    model: Any,
    input_ids: Tensor | None = None,  # [B, L]
    attention_mask: Tensor | None = None,  # [B, L]
    labels: Tensor | None = None,  # [B, L]
    *,
    adapter_names: Sequence[str],
    inputs_embeds: Tensor | None = None,  # [B, L, H]
    task_ids: Tensor | Sequence[int] | None = None,  # [B]
) -> AdapterLosses:
    """The mean loss of each adapter over the labels of its own rows, in one forward over all rows.

    `model(**batch).loss` is the mean over the labels of all rows instead: there an adapter counts as much as
    it has labels in the batch. Here each adapter gets the loss and the gradient of
    `model(**its_rows).loss`, so an optimizer that treats parameters one by one (AdamW, Adafactor) trains it
    as if it were alone; an adapter that a batch does not name gets no gradient.

    Args:
        model: a patched PEFT model.
        input_ids: [B, L], without the prompt.
        attention_mask: [B, L], 0 = pad. None: no pads.
        labels: [B, L], -100 = no label.
        adapter_names: the adapter of each row.
        inputs_embeds: [B, L, H] instead of `input_ids`.
        task_ids: [B] tasks of multitask adapters. An adapter's mean goes over all of its tasks.

    Raises:
        ValueError: a model that is not patched, a call inside of `disable_adapter()`, no labels, or what a
            forward of the model would refuse.
        IndexError: an id, a label or a task out of range.
        UnsupportedModelError: a model or an adapter that has no fast route.
    """
    state = state_of(model) if isinstance(model, nn.Module) else None
    if state is None or state.refusal is not None:
        raise ValueError("multitask.losses takes a model that softprompt.patch has patched")
    if getattr(model, "_adapters_disabled", False):
        raise ValueError(
            "multitask.losses was called inside of disable_adapter(), where no adapter has a loss"
        )
    if labels is None:
        raise ValueError("multitask.losses needs labels, got none")
    check_tensor("labels", labels)
    names = adapters_of_rows(model, adapter_names, input_ids, inputs_embeds)
    base = base_of(model)
    runner = state.runner_of(base)
    plan = runner.plan()
    if sharding.is_fsdp(model) or sharding.by_fsdp(base):
        raise UnsupportedModelError(f"softprompt: {sharding.ONLY_FORWARD}")
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "inputs_embeds": inputs_embeds,
        "labels": labels,
        "task_ids": task_ids,
    }
    reason = reason_for_peft(model, plan, names, arguments)
    if reason is not None:
        raise UnsupportedModelError(f"softprompt: {reason}")
    given, keys = batch_of(model, names, arguments)
    adapters = list(dict.fromkeys(keys))
    groups = [adapters.index(name) for name in keys]
    if base.training:
        state.say_dropout(base)
    try:
        found = runner.group_losses(plan, placed(model, plan, given), state.options, groups)
    except IndexError:
        # Names the column that the user gave it in.
        raise_out_of_range(given.input_ids, given.labels, model_spec.vocab_size(base))
        raise
    return AdapterLosses(found.total, dict(zip(adapters, found.each, strict=False)))
