"""The same training twice: a model in plain PEFT, one behind `softprompt.patch`, and the batches of both."""

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import set_seed

from softprompt.cli.initial import prompt_starts
from softprompt.cli.inputs import Setup
from softprompt.cli.models import load_model, patch
from softprompt.prompts.adapters import set_prompt
from softprompt.tasks.collate import LeftPadCollator
from softprompt.tasks.compare import Side

PLAIN, PATCHED = "plain PEFT", "softprompt"


def two_sides(setup: Setup) -> tuple[Side, Side]:
    """Return (plain, patched): two models with the same weights and the same prompt on the same device."""
    (start,) = prompt_starts(setup, setup.config, ["default"])

    def build(base: Any) -> Any:
        set_seed(start.seed)
        model = get_peft_model(base, start.config)
        if start.prompt is not None:
            set_prompt(model, start.prompt)
        return model.to(setup.device)

    plain = build(setup.base)
    patched = patch(build(load_model(setup.model_name, setup.base.dtype)))
    return Side(PLAIN, plain), Side(PATCHED, patched)


def seeded_batches(setup: Setup, steps: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Return the batches of as many steps: the training rows in a new order of the seed in each pass."""
    table = setup.drawn_table
    examples = setup.encoder.examples(table.rows, table.labels or [])
    collate = LeftPadCollator.of(setup.encoder)
    generator = torch.Generator().manual_seed(setup.config.seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += torch.randperm(len(examples), generator=generator).tolist()
    return [
        {
            name: tensor.to(setup.device)
            for name, tensor in collate([examples[i] for i in order[start : start + batch_size]]).items()
        }
        for start in range(0, steps * batch_size, batch_size)
    ]
