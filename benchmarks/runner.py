"""One variant on one case: its model, its prompts, and its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PromptTuningConfig
from torch import Tensor, nn

from benchmarks.cases import ENSEMBLE, Case, StepBatch
from benchmarks.variants import Variant

LEARNING_RATE = 3e-2


@dataclass(eq=False)
class Runner:
    """One variant on one case."""

    variant: Variant
    model: Any
    prompts: list[nn.Parameter]
    forward_backward: Callable[[], Tensor]  # returns the loss, detached; gradients are left on the prompts
    step: Callable[[], None]

    @property
    def name(self) -> str:
        """Of the variant."""
        return self.variant.name

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Loss and [ΣP, H] fp64 gradient of a step without the optimizer."""
        loss = self.forward_backward()
        if any(prompt.grad is None for prompt in self.prompts):
            raise ValueError(f"{self.name}: the backward gave the prompt no gradient")
        grad = torch.cat([prompt.grad.double() for prompt in self.prompts])
        self.forget()
        return float(loss), grad

    def forget(self) -> None:
        """Drops the gradients."""
        for prompt in self.prompts:
            prompt.grad = None


def prompt_config(case: Case) -> PromptTuningConfig:
    """PEFT's configuration of a case."""
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=case.num_virtual_tokens)


def adapter_names(case: Case) -> list[str]:
    """PEFT's default name, and as many others as the case has further prompts."""
    return ["default", *(f"prompt-{number}" for number in range(1, case.num_prompts))]


def make_runner(
    variant: Variant, base: Any, case: Case, batch: StepBatch, prompts: list[Tensor] | None = None
) -> Runner:
    """Builds a variant on the base model that all share.

    Args:
        variant: who runs it.
        base: the causal LM.
        case: what is run.
        batch: of the case.
        prompts: values of the prompts; None: as PEFT draws them from seed 1.
    """
    torch.manual_seed(1)
    model = variant.build(base, prompt_config(case)).to(case.device)
    names = adapter_names(case)
    for name in names[1:]:
        model.add_adapter(name, prompt_config(case))
    model.to(case.device)
    model.train()
    own = [model.prompt_encoder[name].embedding.weight for name in names]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if trainable != {id(prompt) for prompt in own}:
        raise ValueError(f"{variant.name}: {len(trainable)} tensors are trained, expected the prompts alone")
    if prompts is not None:
        for prompt, value in zip(own, prompts, strict=True):
            prompt.data.copy_(value)
    forward_backward = _forward_backward(variant, model, case, batch, names)
    fused = {"fused": True} if case.device == "cuda" else {}
    optimizer = torch.optim.AdamW(own, lr=LEARNING_RATE, **fused)

    def step() -> None:
        forward_backward()
        optimizer.step()
        optimizer.zero_grad()

    return Runner(variant, model, own, forward_backward, step)


def _forward_backward(
    variant: Variant, model: Any, case: Case, batch: StepBatch, names: list[str]
) -> Callable[[], Tensor]:
    if case.kind != ENSEMBLE:
        called = variant.wrap(model)

        def one() -> Tensor:
            loss = variant.loss(called, batch.inputs)
            loss.backward()
            return loss.detach()

        return one
    if variant.own and not variant.in_turn:
        inputs = {name: tensor.repeat(len(names), 1) for name, tensor in batch.inputs.items()}
        of_rows = [name for name in names for _ in range(case.rows)]

        def together() -> Tensor:
            # Every prompt has the same labels, so the mean over all rows is the mean of the prompts' losses.
            loss = model(**inputs, adapter_names=of_rows).loss
            loss.backward()
            return loss.detach()

        return together

    def in_turn() -> Tensor:
        losses = []
        for name in names:
            model.set_adapter(name)
            loss = variant.loss(model, batch.inputs) / len(names)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return in_turn
